"""What of a session's lines is a command, what a prompt, and what a mistake; and what a setting's text means."""

import sys
from typing import Any

import pytest

from gpt2.core.errors import UserError
from gpt2.generation.engine import GenerationSettings
from gpt2.generation.repl import change, find_command, line_editing


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("help", ["help"]),
        ("quit ", ["quit"]),
        ("set temperature 1.2", ["set", "temperature", "1.2"]),
        ("set temperture 1.2", ["set", "temperture", "1.2"]),
        ("set colour red", ["set", "colour", "red"]),
        ("set stop the  end ", ["set", "stop", "the  end"]),
        ("set", ["set"]),
        ("set top_k", ["set", "top_k"]),
        ("set top_k 1 2", ["set", "top_k", "1 2"]),
        ("seed 7", ["seed", "7"]),
        ("seed none", ["seed", "none"]),
        ("seed", ["seed"]),
    ],
)
def test_commands(line: str, words: list[str]) -> None:
    assert find_command(line) == words


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "The war",
        "war",
        "help me",
        "quit your job",
        "settings of the sun",
        "reset it",
        "set out upon a journey",
        "Set sail today",
        "sett the table",
        "seed of evil",
        "need money",
        " help",
        " set temperature 1",
        "\thepl",
    ],
)
def test_prompts(line: str) -> None:
    assert find_command(line) == []


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("hepl", "help"),
        ("Help", "help"),
        ("quti", "quit"),
        ("exti", "exit"),
        ("setting", "settings"),
        ("resett", "reset"),
        ("sett temperature 1", "set"),
        ("sett temperture 1", "set"),
        ("sed 7", "seed"),
        ("sede none", "seed"),
    ],
)
def test_mistyped_commands(line: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^{line.split()[0]} is unknown \(did you mean {meant}\?\)"):
        find_command(line)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("stop", "\n", "\n"),
        ("stop", "#", "#"),
        ("stop", " the", " the"),
        ("stop", "5", "5"),
        ("stop", "Q: no", "Q: no"),
        ("stop", r'"\n\n"', "\n\n"),
        ("stop", "'off'", "off"),
        ("stop", '"open', '"open'),
        ("stop", "none", None),
        ("seed", "010", 10),
        ("seed", "Off", None),
        ("max_tokens", "0100", 100),
        ("temperature", "1e-1", 0.1),
        ("temperature", "2", 2.0),
    ],
)
def test_a_settings_text_is_what_it_says(name: str, text: str, value: Any) -> None:
    assert getattr(change(GenerationSettings(), {name: text}), name) == value


@pytest.mark.parametrize(("name", "text"), [("seed", "1:30"), ("top_k", "1e2"), ("temperature", "nan"), ("stop", "''")])
def test_other_texts_are_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^settings: {name} "):
        change(GenerationSettings(), {name: text})


def test_python_without_readline_has_sessions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)
    with line_editing():
        pass
