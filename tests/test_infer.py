"""infer.py as users call it: one prompt, a session, a score, and what it says of their mistakes."""

import io
import itertools
import math
import re
import readline
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
import torch
import torch.nn.functional as F
import yaml

import evaluate
import infer
from gpt2.config import ModelConfig
from gpt2.core.files import read_json, write_json, write_text
from gpt2.data.batches import SeenMask
from gpt2.data.tokenizer import VOCAB_SIZE, TextStream, gpt2_tokenizer, load_tokenizer
from gpt2.generation.engine import Engine
from gpt2.generation.linear import Quantization
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model, save_model
from gpt2.tracking import registry

Infer = Callable[..., tuple[int, str, str]]

SRC = Path(__file__).parents[1] / "src"
WRITES_NO_TEXT = "--score writes no text: it goes with --model, --device and --explain alone"
TEXT = "The state of the Union is “naïve” 🦊.\r\n"


@pytest.fixture
def run_infer(model_folder: Path, run_main: Infer, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """Run infer.py with arguments and standard input; return its exit code, output and errors."""

    def run(*arguments: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return run_main(infer.main, "--model", model_folder, "--device", "cpu", *arguments)

    return run


def test_a_seed_repeats_the_text(run_infer: Infer) -> None:
    arguments = ("-p", "The state", "-t", "5", "--temperature", "1")
    first, second, other = (run_infer(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first[1] == run_infer(*arguments, "--seed", "1", "--quantize", "none")[1]
    assert first[0] == 0 and first[1].startswith("The state") and len(first[1]) > len("The state\n")
    assert first[1] == second[1] != other[1]


def test_a_vocabulary_of_its_own_writes_scores_and_converses(
    run_infer: Infer,
    tmp_path: Path,
    bpe_file: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> None:
    model = make_model(vocab_size=300)
    with torch.no_grad():  # it always writes the last token but <|endoftext|>, and gives each the probability 1/300
        for weight in (model.layer_norm.weight, model.output_projection.weight):
            weight.zero_()
        model.layer_norm.bias.fill_(1)
        model.output_projection.weight[298] = 1e-6
    save_model(model, make_config(vocab_size=300), tmp_path, tokenizer=bpe_file)
    tokenizer, arguments = load_tokenizer(tmp_path), ("--model", str(tmp_path), "--temperature", "0", "-t", "2")
    written = "καὶ" + tokenizer.decode([298]) * 2 + "\n"
    assert run_infer("-p", "καὶ", *arguments)[:2] == run_infer(*arguments, stdin="καὶ\n")[:2] == (0, written)
    code, text, _ = run_infer("--score", "-", "--model", str(tmp_path), stdin="λόγος")
    count = len(tokenizer.encode_document("λόγος"))
    assert code == 0 and f"perplexity 300.00, {count * math.log2(300) / 10:.4f} bits per byte, {count} tokens" in text


def test_the_seed_that_was_drawn_is_told_and_repeats_the_text(run_infer: Infer) -> None:
    _, text, report = run_infer("-p", "The state", "-t", "5")
    seed = re.search(r"seed (\d+)", report)
    assert seed and run_infer("-p", "The state", "-t", "5", "--seed", seed[1])[1] == text


def test_configuration_cut_prompt_time_and_speed_are_reported(run_infer: Infer) -> None:
    code, text, report = run_infer("-p", "one two " * 10, "-t", "2", "--seed", "1")
    assert code == 0 and text.startswith("one two " * 10)
    assert "d_model 16, n_layers 2, n_heads 2, d_ff 32, max_len 12" in report
    assert "the prompt has 21 tokens; the first 9 are cut" in report
    assert re.search(r"2 tokens in [\d.]+ s, [\d.]+ tokens/s", report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "a", "--temperature", "-1", "--device", "tpu"], "temperature should be greater than or equal to 0"),
        (["-p", "a", "--temperature", "-1", "--device", "tpu"], "device should be auto, cpu, mps, cuda or cuda:N"),
        (["-p", "a", "--temperature", "hot", "--top_k", "many"], "temperature should be a valid number"),
        (["-p", "a", "--temperature", "hot", "--top_k", "many"], "top_k should be a valid integer"),
        (["-p", "a", "--seed", "[" * 5000], "seed should be"),
        (["-p", "a", "--quantize", "int4"], "quantize should be 'none', 'bfloat16' or 'int8'"),
        (["-p", "a", "--max-tokens", "1"], "unrecognized arguments: --max-tokens 1 (did you mean --max_tokens?)"),
        (["-p", "a", "--model", "absent"], "absent does not exist"),
    ],
)
def test_mistakes_are_one_line(run_infer: Infer, arguments: list[str], message: str) -> None:
    code, text, report = run_infer(*arguments)
    assert code == 2 and text == ""
    assert report.startswith("error: ") and message in report and len(report.splitlines()) == 1


def test_without_a_model_it_is_the_one_that_params_yaml_names(
    run_infer: Infer, model_folder: Path, shipped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped["register"] |= {"name": "mine", "alias": "best"}
    write_text(tmp_path / "params.yaml", yaml.safe_dump(shipped))
    monkeypatch.setattr(infer, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(registry, "fetch_model", {"models:/mine@best": model_folder}.__getitem__)
    code, _, report = run_infer("-p", "a", "--model", "")
    assert code == 0 and report.startswith("models:/mine@best: GPT-2")


def test_a_model_of_another_vocabulary_is_refused(
    run_infer: Infer,
    tmp_path: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> None:
    save_model(make_model(vocab_size=61), make_config(), tmp_path)
    code, text, report = run_infer("-p", "a", "--model", str(tmp_path))
    assert (code, text) == (2, "")
    assert report == f"error: {tmp_path} has a vocabulary of 61, not GPT-2's 50257\n"


def test_session(run_infer: Infer) -> None:
    commands = [
        "\ufeffset temperature 1.2",
        "help",
        "set top_k none",
        "set max_tokens 2",
        "seed 3",
        "help me",
        "",
        "reset",
        "quit",
        "The war",
    ]
    code, text, report = run_infer("--max_tokens", "7", stdin="\n".join(commands))
    assert code == 0 and text.startswith("help me") and "The war" not in text
    changed = (
        "temperature 1.2, top_k none, top_p none, min_p none, repetition_penalty 1.0, max_tokens 2, stop none, seed 3"
    )
    assert changed in report and "2 tokens in" in report
    assert report.index("them.\ntemperature 0.7, top_k 40") < report.index(changed)  # the settings of the start
    assert "temperature 0.7, top_k 40" in report.splitlines()[-1] and "max_tokens 7, " in report.splitlines()[-1]


def test_session_continues_after_mistakes(run_infer: Infer) -> None:
    mistakes = ["set temperature hot", "set top_k 0", "seed -1", "/hepl", "/set colour red"]
    code, text, report = run_infer(stdin="\n".join([*mistakes, "set max_tokens 1", "The war"]))
    assert code == 0 and text.startswith("The war")
    assert report.count("error: ") == len(mistakes)


def test_ctrl_c_leaves_the_text_its_seed_and_tokens(run_infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = itertools.count(1)

    def push(*_: object) -> str:
        if next(tokens) == 3:
            raise KeyboardInterrupt
        return " word"

    monkeypatch.setattr(TextStream, "push", push)
    code, text, report = run_infer("-p", "The", "-t", "9", "--seed", "5")
    assert (code, text) == (130, "The word word\n")
    assert re.search(r"\n\d tokens in [\d.]+ s, [\d.]+ tokens/s, seed 5\n$", report)


@pytest.mark.parametrize("arguments", [[], ["--score", "-"]])
def test_closed_standard_input_is_one_line(model_folder: Path, arguments: list[str]) -> None:
    closing = ["sh", "-c", '"$@" <&-', "sh", sys.executable, str(SRC / "infer.py"), "--model", str(model_folder)]
    done = subprocess.run([*closing, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: standard input is closed; give --prompt or --score FILE\n"


def test_control_characters_are_shown_harmless(run_infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = "\x1b[2J\x07\x00\r\x7f\x9b\ta\n\xa0é"
    monkeypatch.setattr(TextStream, "push", lambda *_: written)
    assert run_infer("-p", "The", "-t", "1")[1] == "The" + "\\x1b[2J\\x07\\x00\\x0d\\x7f\\x9b\ta\n\xa0é\n"


def test_a_session_that_is_not_utf8_ends_in_one_line(run_infer: Infer) -> None:
    code, _, report = run_infer(stdin=b"settings\n\xff\n")
    assert code == 2 and report.splitlines()[-1] == "error: standard input is not UTF-8 text"


def test_session_in_a_terminal(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(SRC, tmp_path / "src")  # its .cache, with the history, lies beside it
    history = tmp_path / ".cache" / "infer_history"
    history.parent.mkdir()
    readline.clear_history()
    readline.add_history("A former prompt")
    readline.write_history_file(history)
    arguments = [str(tmp_path / "src" / "infer.py"), "--model", str(model_folder), "--device", "cpu", "-t", "3"]
    environment = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(
        sys.executable,
        arguments,
        env=environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 200),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )

    def send(line: str, *expected: str) -> None:
        child.sendline(line)
        for text in (*expected, "\r\n> "):
            child.expect_exact(text)

    def interrupt() -> None:
        for _ in range(6):  # readline sees Ctrl-C late if it comes while a key is read
            child.sendintr()
            if child.expect_exact(["\r\n> ", pexpect.TIMEOUT], timeout=10) == 0:
                return
        raise AssertionError("Ctrl-C gave no new prompt")

    child.expect_exact("stop none, seed none\r\n> ")
    child.send("\x1b[A")  # up
    send("", "A former prompt\r\n", "A former prompt", "3 tokens in")
    send("help", "Ctrl-C stops a text")
    send("set temperature hot", "error: settings: temperature should be a valid number")
    send("/hepl", "error: /hepl is no command")
    send("set temperature 1.5", "temperature 1.5, top_k 40")
    send("seed 7", "max_tokens 3, stop none, seed 7")
    send("Fellow citizens", "\r\nFellow citizens", "3 tokens in", "seed 7")
    child.sendline("Fellow\\")
    child.expect_exact("... ")
    send("citizens", "\r\nFellow\r\ncitizens", "3 tokens in")
    send("war " * 60, "war war\r\nwar war", "3 tokens in")
    child.send("half a line")
    child.expect_exact("half a line")
    interrupt()
    send("set max_tokens 100000", "max_tokens 100000")
    child.sendline("The war")
    child.expect_exact("\r\nThe war")
    child.expect(r"[^\r\n]{30}")  # it streams
    interrupt()
    assert re.search(r"\d+ tokens in .*, seed 7", child.before)
    send("reset", "temperature 0.7, top_k 40", "max_tokens 3, ", "seed none")
    child.send("\x1b[A\x1b[A")  # up, beyond reset
    send("", "The war", "\r\nThe war", "3 tokens in")
    child.sendline("quit")
    child.expect_exact(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "The war" in history.read_text(encoding="utf-8").replace("\\040", " ")  # libedit's space


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit knows no pasted lines")
def test_pasted_lines_are_one_prompt(model_folder: Path, tmp_path: Path) -> None:
    arguments = [str(SRC / "infer.py"), "--model", str(model_folder), "--device", "cpu", "-t", "1"]
    environment = {"PATH": "/usr/bin:/bin", "TERM": "xterm", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(sys.executable, arguments, env=environment, encoding="utf-8", timeout=60)
    child.expect_exact("> ")
    child.send("\x1b[200~Fellow\ncitizens\x1b[201~\r")
    child.expect_exact("1 tokens in")
    assert "Fellow\r\ncitizens" in child.before  # readline shows it with another \r
    child.sendline("quit")
    child.expect_exact(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "tokens in" not in child.before


def test_quantize_is_for_the_text(run_infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def make(model: GPT2Model, slots: int, seen: SeenMask | None, quantization: Quantization) -> Engine:
        given.append(quantization)
        return Engine(model, slots, seen, quantization)

    monkeypatch.setattr(infer, "Engine", make)
    for quantize in ("int8", "none"):
        assert run_infer("--prompt", "a", "--max_tokens", "1", "--quantize", quantize)[0] == 0
    assert given == ["int8", "none"]


def test_int8_takes_the_cpu_where_there_is_a_gpu(run_infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, _, report = run_infer("--prompt", "a", "--max_tokens", "1", "--quantize", "int8", "--device", "auto")
    assert code == 0 and "on cpu" in report


def test_score_is_the_plain_cross_entropy(
    run_infer: Infer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "choose_precision", lambda *_: torch.float32)
    (tmp_path / "text").write_bytes(b"The state")
    tokens = gpt2_tokenizer().encode_document("The state").tolist()
    model, _, _ = load_model(model_folder)
    with torch.no_grad():
        logits = model(torch.tensor([[VOCAB_SIZE - 1, *tokens[:-1]]]))[0]
    loss = F.cross_entropy(logits, torch.tensor(tokens)).item()
    code, text, _ = run_infer("--score", str(tmp_path / "text"))
    assert code == 0
    words = re.fullmatch(r"loss (.*), perplexity (.*), (.*) bits per byte, 3 tokens, 9 bytes\n", text)
    assert words and float(words[1]) == pytest.approx(loss, abs=1e-4)
    assert float(words[2]) == pytest.approx(math.exp(loss), rel=1e-4)
    assert float(words[3]) == pytest.approx(loss * 3 / math.log(2) / 9, abs=1e-4)
    assert run_infer("--score", "-", stdin="The state")[1] == text
    assert run_infer("--score", "-", stdin="\ufeffThe state")[1] == text


def test_score_equals_that_of_the_stage(
    run_infer: Infer, model_folder: Path, tmp_path: Path, shipped_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = gpt2_tokenizer().encode_document(TEXT * 3)
    for split in ("val", "test"):
        np.array(tokens, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    size = {"bytes": len((TEXT * 3).encode())}
    write_json(tmp_path / "meta.json", {"tokenizer": "gpt2", "splits": {"val": size, "test": size}})
    params = yaml.safe_load(shipped_text)
    params["evaluate"]["stride"], params["runtime"] = 6, {"threads": 1, "device": "cpu", "precision": "auto"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    for name, path in {"TOKENS": tmp_path, "METRICS": tmp_path, "MODEL": model_folder}.items():
        monkeypatch.setattr(evaluate, name, path)
    monkeypatch.setattr(evaluate, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    evaluate.main()
    recorded = read_json(tmp_path / "evaluate.json")
    assert (recorded["tokens"], recorded["stride"], recorded["val_loss"]) == (len(tokens), 6, recorded["loss"])
    code, text, _ = run_infer("--score", "-", stdin=TEXT * 3)  # which gives also what evaluate has just printed
    printed = text.splitlines()
    assert code == 0 and printed[1].removeprefix("test ") == printed[2].partition(" per byte, ")[0] + " per byte"
    assert f"perplexity {recorded['perplexity']:.2f}, {recorded['bits_per_byte']:.4f} bits per byte" in printed[2]


def test_explain_shows_the_most_surprising_tokens(run_infer: Infer, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT.encode())
    code, text, _ = run_infer("--score", str(tmp_path / "text"), "--explain")
    _, empty, header, *rows = text.splitlines()
    assert code == 0 and not empty and header.split() == ["loss", "text", "before", "token", "most", "likely"]
    losses = [float(row.split()[0]) for row in rows]
    assert len(rows) == 10 and losses == sorted(losses, reverse=True)
    assert re.fullmatch(r" *[\d.]+  +'.*'  ('.*?'|\".*?\") +('.*'|\".*\") [\d.]+%", rows[0]), rows[0]
    short = run_infer("--score", "-", "--explain", stdin="The")[1]
    assert "'The'" in short and "'<|endoftext|>'" in short and len(short.splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--score", "absent"], b"", "[Errno 2] No such file or directory: 'absent'"),
        (["--score", "-"], b"", "the text to score is empty"),
        (["--score", "-"], b"\xef\xbb\xbf", "the text to score is empty"),
        (["--score", "-"], b"\xef\xbb\xbfab\xff", "the text to score is not UTF-8: byte 0xff at 5"),
        (["--explain"], b"", "--explain needs --score FILE"),
        (["--explain", "-p", "a"], b"", "--explain needs --score FILE"),
        (["--score", "-", "-p", "a"], b"a", WRITES_NO_TEXT),
        (["--score", "-", "--quantize", "int8"], b"a", WRITES_NO_TEXT),
        (["--score", "-", "--seed", "1", "--top_k", "2"], b"a", WRITES_NO_TEXT),
    ],
)
def test_mistakes_about_scores_are_one_line(run_infer: Infer, arguments: list[str], stdin: bytes, message: str) -> None:
    assert run_infer(*arguments, stdin=stdin) == (2, "", f"error: {message}\n")


def test_non_finite_weights_have_no_score(
    run_infer: Infer,
    tmp_path: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> None:
    model = make_model(vocab_size=VOCAB_SIZE)
    torch.nn.init.constant_(model.layer_norm.weight, math.nan)
    save_model(model, make_config(vocab_size=VOCAB_SIZE), tmp_path)
    code, text, report = run_infer("--score", "-", "--model", str(tmp_path), stdin="a")
    assert (code, text) == (2, "") and report.endswith(
        "error: the model's weights are broken: the loss is not finite\n"
    )
