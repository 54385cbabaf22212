import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor import config, cpp_builder

from gpt2.core.cli import Parser, run_command, stop_requests
from gpt2.core.errors import Stopped, UserError

SOURCE = Path(__file__).parents[2] / "src"


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_success_ends_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such file"), "error: no such file\n"),
        (UserError("two\n  lines\r\tof\u2028text "), "error: two lines of text\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
        (UserError("a server's \x1b[2J\x07\x9bname"), "error: a server's [2Jname\n"),
        (
            UserError("http://me:a/b@c@host:5/ fails; see file:///me@home/x"),
            "error: http://host:5/ fails; see file:///me@home/x\n",
        ),
        (UserError("postgresql://h/db?user=me&password=a&b=c)"), "error: postgresql://h/db?user=me&password=&b=c)\n"),
    ],
)
def test_mistake_of_the_user_or_refusal_of_the_system_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(error))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_debugging_shows_the_traceback_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_DEBUG", "1")
    with pytest.raises(SystemExit):
        run_command(raising(OSError(28, "No space left on device")))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):" and last == "error: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "5"], "unrecognized arguments: --max-tokens 5 (did you mean --max_tokens?); see --help"),
        (
            ["--promt=a", "--max_token", "5", "-x"],
            "unrecognized arguments: --promt=a --max_token 5 -x (did you mean --prompt --max_tokens?); see --help",
        ),
        (["--zzz"], "unrecognized arguments: --zzz; see --help"),
        (["-p", "a", "-max_tokens=5"], "-max_tokens=5 has one dash: write --max_tokens=5; see --help"),
        (["--prompt"], "argument -p/--prompt: expected one argument; see --help"),
    ],
)
def test_an_unknown_option_is_told_the_nearest(arguments: list[str], message: str) -> None:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("-p", "--prompt")
    parser.add_argument("-m", "--model")
    parser.add_argument("--max_tokens")
    assert parser.parse_args(["-p", "-5", "-max_token"]).model == "ax_token"
    assert parser.parse_args(["--prompt", "p", "-m", "prompt"]).prompt == "p"
    with pytest.raises(UserError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == message


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_stopped_work_says_how_to_continue(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(Stopped(signal.SIGTERM, "stopped; the same command continues")))
    assert ended.value.code == 143
    assert capfd.readouterr() == ("", "stopped; the same command continues\n")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory.\n")],
)
def test_no_memory_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(error))
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: there is not enough memory") and len(printed.splitlines()) == 1


def test_no_compiler_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        monkeypatch.setattr(config.cpp, "cxx", (None, "/absent"))
        cpp_builder.get_cpp_compiler()

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: train.compile needs a C++ compiler, such as g++, or must be false\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_held_back_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as requested:
        assert requested() == 0
        os.kill(os.getpid(), number)
        assert requested() == number
        assert signal.getsignal(number) is before  # a second one acts at once
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RuntimeError("shapes do not fit")])
def test_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        run_command(raising(error))


def command(main: str) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from gpt2.core.cli import *; run_command(lambda: {main})"
    return [sys.executable, "-c", code]


def run_python(main: str) -> subprocess.Popen[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command(main), stdin=-1, stdout=-1, stderr=-1, text=True, env=buffered)


@pytest.mark.parametrize(
    ("main", "code", "printed"), [("print('fine')", 0, ""), ("fail_with()", 1, "NameError"), ("sys.exit(3)", 3, "")]
)
def test_exit_code_of_a_process(main: str, code: int, printed: str) -> None:
    process = run_python(main)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert printed in errors and (printed or not errors)


def test_sigterm_lets_what_is_open_be_closed() -> None:
    process = run_python("print(next(iter([print('ready', flush=True)])), input(), file=sys.stderr)")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and not errors


WAIT_FOR_CTRL_C = """
with stop_requests() as received:
    print("ready", file=sys.stderr, flush=True)
    while not received():
        pass
sys.stdin.read()  # until the reader has left
raise Stopped(received(), "saved")
"""


@pytest.mark.parametrize("told", ["", "saving before it stops ...\n"])
def test_ctrl_c_that_ends_the_reader_too_still_lets_it_save(told: str) -> None:
    process = run_python(f"exec({WAIT_FOR_CTRL_C!r}, globals())")
    assert process.stdin is not None and process.stderr is not None and process.stderr.readline() == "ready\n"
    if not told:
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    if told:
        assert process.stderr.readline() + process.stderr.readline() == f"\n{told}"
        process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("lines", [1, 10_000])  # one line is written at the end, from the buffer
def test_reader_that_leaves_early_ends_it_in_silence(lines: int) -> None:
    process = run_python(f"[input(), [print('x' * 1000) for _ in range({lines})]]")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_closed_output_is_no_error() -> None:
    closing = ["sh", "-c", '"$@" >&-', "sh"]
    done = subprocess.run([*closing, *command("print('fine')")], stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
