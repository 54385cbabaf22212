"""serve.py as a process: its text is infer.py's, it stops when told, and its mistakes are one line."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

import infer
import serve
from gpt2.core.cli import run_command

SRC = Path(__file__).parents[1] / "src"
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(model_folder: Path) -> Iterator[Start]:
    """Run serve.py with arguments; return the process and its address."""
    with contextlib.ExitStack() as stack:

        def run(*arguments: str) -> tuple["subprocess.Popen[str]", str]:
            command = [sys.executable, str(SRC / "serve.py"), "--model", str(model_folder), "--port", "0", *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            server = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
            stack.callback(server.kill)
            assert server.stderr
            for line in server.stderr:
                if found := re.fullmatch(r"listens on (http://127.0.0.1:\d+)\n", line):
                    return server, found[1]
            raise AssertionError("the server has ended")

        yield run


def ask(address: str, **body: Any) -> HTTPResponse:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def test_its_text_is_that_of_infer_and_sigterm_lets_texts_end_and_refuses_new_ones(
    start: Start, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, address = start()
    settings = {"max_tokens": 20, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 5}
    with ask(address, prompt="The war", **settings) as answer:
        text = json.load(answer)["choices"][0]["text"]
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(model_folder), "-p", "The war", *arguments])
    infer.main()
    assert capsys.readouterr().out == f"The war{text}\n" and text

    with ask(address, prompt="The war", max_tokens=1000, stream=True) as stream:
        stream.readline()
        server.send_signal(signal.SIGTERM)
        with pytest.raises(HTTPError) as refused:
            while True:  # until the signal has arrived
                ask(address, prompt="One nation", max_tokens=1).close()
        assert refused.value.code == 503
        assert stream.read().endswith(b"data: [DONE]\n\n")
    assert server.wait(30) == 143 and server.stderr and server.stderr.read() == ""


def test_texts_that_take_longer_than_the_grace_are_ended(start: Start) -> None:
    server, address = start("--grace", "0.2", "--max_tokens", "1000000")
    with ask(address, prompt="The war", max_tokens=1000000, stream=True) as text:
        text.readline()
        server.send_signal(signal.SIGINT)
        assert b"the server has stopped" in text.read().splitlines()[-2]
    assert server.wait(30) == 130 and server.stderr and server.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "{taken}"], "Address already in use"),
        (["--port", "65536", "--max_tokens", "0"], "port should be less than 65536 ('65536'); max_tokens should be"),
        (["--host", ""], "host should have at least 1 character"),
        (["--host", "ä..b"], "ä..b is not an address"),
        (["--max-tokens", "1"], "unrecognized arguments: --max-tokens 1 (did you mean --max_tokens?)"),
        (["--port", "0", "--model", "absent"], "absent does not exist"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["serve.py", *given])
        with pytest.raises(SystemExit) as stopped:
            run_command(serve.main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line and len(line.splitlines()) == 1


def test_an_empty_key_does_not_open_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", "0"])
    monkeypatch.setenv(serve.API_KEY, "")
    with pytest.raises(SystemExit):
        run_command(serve.main)
    assert capsys.readouterr().err == "error: GPT2_API_KEY is set, but empty\n"
