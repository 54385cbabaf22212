"""Which of a session's lines are commands, which are prompts; and what the text of a setting means."""

import io
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.generation import repl
from gpt2.generation.engine import GenerationSettings
from gpt2.generation.repl import Lines, change, edit_lines, find_command, read_line

ErrorLine = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quit ", ["quit"]),
        ("/set stop the  end ", ["set", "stop", "the  end"]),
        ("seed  -1", ["seed", "-1"]),
    ],
)
def test_commands(line: str, words: list[str]) -> None:
    assert find_command(line) == words


@pytest.mark.parametrize(
    "line",
    [
        "",
        "quit your job",
        "set the table",
        "set top_kk 1",
        "seed capital",
        " /help",
    ],
)
def test_prompts(line: str) -> None:
    assert find_command(line) == []


@pytest.mark.parametrize("line", ["/ help", "/set colour red"])
def test_a_slash_begins_a_command(line: str, error_line: ErrorLine) -> None:
    assert error_line(lambda: find_command(line)).startswith(f"error: {line} is no command; /help lists them")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("stop", " the", " the"),
        ("stop", "5", "5"),
        ("stop", r'"\n\n"', "\n\n"),
        ("stop", "'none'", "none"),
        ("stop", '"open', '"open'),
        ("stop", "none", None),
        ("seed", "None", None),
        ("max_tokens", "0100", 100),
        ("temperature", "2", 2.0),
    ],
)
def test_a_settings_text_is_what_it_says(name: str, text: str, value: Any) -> None:
    changed = change(GenerationSettings(), name, text)
    assert getattr(changed, name) == value and type(getattr(changed, name)) is type(value)
    assert change(changed, "top_p", "0.5") == changed.model_copy(update={"top_p": 0.5})  # which reads nothing twice


@pytest.mark.parametrize(
    ("name", "text"), [("seed", "1:30"), ("top_k", "1e2"), ("temperature", "nan"), ("stop", "''"), ("tempo", "1")]
)
def test_other_texts_are_refused(name: str, text: str, error_line: ErrorLine) -> None:
    assert error_line(lambda: change(GenerationSettings(), name, text)).startswith(f"error: settings: {name} ")


WORDS = st.lists(st.text("aé", min_size=1, max_size=5), min_size=1, max_size=20)


@given(paragraphs=st.lists(WORDS, max_size=4), width=st.integers(5, 12), cut=st.integers(1, 9))
def test_words_stay_whole_however_they_arrive(paragraphs: list[list[str]], width: int, cut: int) -> None:
    text = "\n\n".join(map(" ".join, paragraphs))
    lines = Lines(width)
    shown = "".join(lines.push(text[start : start + cut]) for start in range(0, len(text), cut)) + lines.finish()
    assert shown == "\n\n".join(textwrap.fill(" ".join(words), width) for words in paragraphs)


def test_long_and_wide_words_and_indents() -> None:
    lines = Lines(6)
    assert lines.push("  ab 中文 abcdefgh 12 34 5") + lines.finish() == "  ab\n中文\nabcdefgh 12\n34 5"


def test_without_a_terminal_the_text_is_exact() -> None:
    lines = Lines(None)
    assert lines.push("a  b \n") + lines.push(" c ") + lines.finish() == "a  b \n c "


def test_a_backslash_continues_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\n two\\\nthree\nfour\\\n"))
    assert [read_line("", ""), read_line("", "")] == ["one\n two\nthree", "four"]


def test_python_without_readline_has_sessions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)
    edit_lines()


def test_a_read_only_checkout_has_sessions_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("no folder")
    monkeypatch.setattr(repl, "main_root", lambda: tmp_path)
    edit_lines()
