"""infer.py as users call it: one prompt, a session, and what it says of their mistakes."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import infer
from gpt2 import tokenizer
from gpt2.cli import run_command
from gpt2.config import ModelParams
from gpt2.model import GPT2Model
from gpt2.weights import save_model

Infer = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., GPT2Model],
    make_model_params: Callable[..., ModelParams],
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model(vocab_size=tokenizer.VOCAB_SIZE), make_model_params(), tokenizer.VOCAB_SIZE, folder)
    return folder


@pytest.fixture
def run_infer(model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Infer:
    """Run infer.py with arguments and standard input; return its exit code, output and errors."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(model_folder), "--device", "cpu", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            run_command(infer.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_seed_repeats_the_text(run_infer: Infer) -> None:
    arguments = ("-p", "The state", "-t", "5", "--temperature", "1")
    first, second, other = (run_infer(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first[0] == 0 and first[1].startswith("The state") and len(first[1]) > len("The state\n")
    assert first[1] == second[1] != other[1]


def test_the_seed_that_was_drawn_is_told_and_repeats_the_text(run_infer: Infer) -> None:
    _, text, report = run_infer("-p", "The state", "-t", "5")
    seed = re.search(r"seed (\d+)", report)
    assert seed and run_infer("-p", "The state", "-t", "5", "--seed", seed[1])[1] == text


def test_configuration_time_and_speed_are_reported(run_infer: Infer) -> None:
    _, _, report = run_infer("-p", "The state", "-t", "3", "--seed", "1")
    assert "d_model 16, n_layers 2, n_heads 2, d_ff 32, max_len 12" in report
    assert re.search(r"3 tokens in [\d.]+ s, [\d.]+ tokens/s", report)


def test_a_prompt_beyond_the_context_is_cut_and_said(run_infer: Infer) -> None:
    code, text, report = run_infer("-p", "one two " * 10, "-t", "2", "--seed", "1")
    assert code == 0 and text.startswith("one two")
    assert re.search(r"the prompt has 21 tokens; the first 9 ", report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", " \n"], "the prompt is empty"),
        (["-p", "a\udc80"], "the prompt is not UTF-8 text"),
        (["-p", "a", "--device", "tpu"], "device should be auto, cpu, mps, cuda or cuda:N ('tpu')"),
        (["-p", "a", "--temperature", "-1", "--top_k", "many"], "temperature should be"),
        (["-p", "a", "--temperature", "-1", "--top_k", "many"], "top_k should be"),
        (["-p", "a", "--top_p", "1.5"], "top_p should be"),
        (["-p", "a", "--seed", "!!bool maybe"], "seed should be"),
        (["-p", "a", "--seed", "!!timestamp noon"], "seed should be"),
        (["-p", "a", "--seed", "[" * 5000], "seed should be"),
        (["-p", "a", "--max_tokens", "0"], "max_tokens should be"),
        (["-p", "a", "--tempereture", "1"], "--tempereture"),
        (["-p", "a", "--model", "absent"], "absent does not exist"),
    ],
)
def test_mistakes_are_one_line(run_infer: Infer, arguments: list[str], message: str) -> None:
    code, text, report = run_infer(*arguments)
    assert code == 2 and text == ""
    assert report.startswith("error: ") and message in report and len(report.splitlines()) == 1


def test_a_model_of_another_vocabulary_is_refused(
    run_infer: Infer,
    tmp_path: Path,
    make_model: Callable[..., GPT2Model],
    make_model_params: Callable[..., ModelParams],
) -> None:
    save_model(make_model(vocab_size=61), make_model_params(), 61, tmp_path)
    code, text, report = run_infer("-p", "a", "--model", str(tmp_path))
    assert (code, text) == (2, "")
    assert report == f"error: {tmp_path} has a vocabulary of 61, not GPT-2's 50257\n"


def test_session(run_infer: Infer) -> None:
    commands = [
        "help",
        "set temperature 1.2",
        "set top_k none",
        "set max_tokens 2",
        "set seed 3",
        "The war",
        "",
        "quit",
    ]
    code, text, report = run_infer(stdin="\n".join(commands))
    assert code == 0 and text.startswith("The war") and len(text.splitlines()) >= 1
    assert "temperature 1.2, top_k none, top_p none, max_tokens 2, seed 3" in report
    assert "2 tokens in" in report


def test_session_goes_on_after_mistakes(run_infer: Infer) -> None:
    commands = ["set temperture 1", "set top_k 0", "set", "set max_tokens 1", "The war"]
    code, text, report = run_infer(stdin="\n".join(commands))
    assert code == 0 and text.startswith("The war")
    assert "temperture is unknown (did you mean temperature?)" in report
    assert report.count("error: ") == 3
