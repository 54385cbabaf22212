"""infer.py's texts on a terminal: one after one prompt, or a session whose lines are prompts and commands."""

import ast
import atexit
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import deque
from contextlib import suppress

from pydantic import field_validator

from gpt2.core.cli import fail
from gpt2.core.errors import UserError
from gpt2.core.paths import main_root
from gpt2.core.validation import check
from gpt2.data.tokenizer import Tokenizer
from gpt2.generation.engine import Engine, GenerationSettings, Request

HELP = """\
Type a prompt, or one of these commands:
  set NAME VALUE   change a setting, e.g. set temperature 1.2, set top_k none, set max_tokens 100
  seed N           repeat the text of this seed; seed none draws a new seed each time
  settings         show the settings
  reset            return to the settings of the start
  help             show this text
  quit             leave (so does Ctrl-D); Ctrl-C stops a text
Every other line is a prompt, also "help me" or "set the table".
A line that begins with / is always a command, like /help; a line that begins with a space is always a prompt.
A line that ends with \\ goes on in the next one. Several lines pasted at once are one prompt, where the terminal marks
them."""

NAMES = "|".join(GenerationSettings.model_fields)
COMMAND = re.compile(rf"help|settings|reset|quit|exit|seed\s+(-?\d+|none)|set\s+({NAMES})\s+\S.*")
HISTORY_LINES = 1000
BYTE_ORDER_MARK = "\ufeff"  # some editors put it before a text
ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class TypedSettings(GenerationSettings, strict=False):
    """Settings from the text that a user types, in which 0.7 is a number."""

    @field_validator("top_k", "top_p", "min_p", "stop", "seed", mode="before")
    @classmethod
    def _read(cls, text: str) -> str | None:
        """Read none as no value, and a text in quotes as Python does, where \\n is the end of a line."""
        if text.startswith(("'", '"')):
            with suppress(ValueError, SyntaxError):
                return ast.literal_eval(text)
        return None if text.lower() == "none" else text


def converse(engine: Engine, tokenizer: Tokenizer, settings: GenerationSettings) -> None:
    """Obey the lines of standard input until it ends or the user quits. Raises UserError if it is not UTF-8."""
    at_start, on_terminal = settings, sys.stdin.isatty() and sys.stdout.isatty()
    inform(f"{HELP}\n{show(settings)}")
    if on_terminal:
        edit_lines()
    while True:
        try:
            line = read_line(*("> ", "... ") if on_terminal else ("", "")).removeprefix(BYTE_ORDER_MARK)
            match find_command(line):
                case []:
                    if prompt := line.strip():
                        print_text(engine, Request(prompt, settings, tokenizer))
                case ["quit" | "exit"]:
                    return
                case ["help"]:
                    inform(HELP)
                case ["settings"]:
                    inform(show(settings))
                case ["reset"]:
                    settings = at_start
                    inform(show(settings))
                case ["set", name, value] | ["seed" as name, value]:
                    settings = change(settings, name, value)
                    inform(show(settings))
        except UserError as error:
            fail(error)
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        except EOFError:
            if on_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            print()


def read_line(prompt: str, more: str) -> str:
    """Return a line of standard input, and the next one if it ends with a backslash. Raises EOFError at the end."""
    line = input(prompt)
    while line.endswith("\\"):
        line = line[:-1]
        with suppress(EOFError):
            line += f"\n{input(more)}"
    return line


def find_command(line: str) -> list[str]:
    """Return the words of a command, or none of a prompt. Raises UserError if a line that begins with / is neither."""
    if "\n" in line:
        return []
    command = line.removeprefix("/").rstrip()
    if COMMAND.fullmatch(command):
        return command.split(maxsplit=2)
    if line.startswith("/"):
        raise UserError(f"{line} is no command; /help lists them, and a line that begins with a space is a prompt")
    return []


def change(settings: GenerationSettings, name: str, text: str) -> GenerationSettings:
    """Return the settings with one replaced by what a user typed. Raises UserError."""
    typed = check(TypedSettings, {name: text}, "settings")
    return settings.model_copy(update={name: getattr(typed, name)})


def edit_lines() -> None:
    """Let input() edit lines and recall earlier ones, also those of former sessions."""
    path = main_root() / ".cache" / "infer_history"
    with suppress(ImportError, OSError):  # Python may lack readline, and the folder may be read-only
        import readline  # from here on it serves input()

        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
        readline.set_history_length(HISTORY_LINES)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        atexit.register(readline.write_history_file, path)
        readline.read_history_file(path)


def print_text(engine: Engine, request: Request) -> None:
    """Print the prompt and, as they come, the words after it; then the seed, time and speed on standard error.

    Control characters that the model writes are shown as \\x1b and the like, since a terminal would obey them. On
    Ctrl-C the text ends, and KeyboardInterrupt is raised in the end.
    """
    if (cut := len(request.tokens) - engine.max_len) > 0:
        inform(f"the prompt has {len(request.tokens)} tokens; the first {cut} are cut, beyond its context")
    lines = Lines(shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None)
    started, interrupted = time.perf_counter(), False
    try:
        print(lines.push(request.prompt), end="", flush=True)
        for _, part in engine.generate(deque([request])):
            print(lines.push(part.translate(ESCAPES)), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        print(lines.finish(), flush=True)
    seconds, count = time.perf_counter() - started, request.generated
    inform(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, seed {request.seed}")
    if interrupted:
        raise KeyboardInterrupt


class Lines:
    """Breaks a text that grows into lines of at most `width` columns, between words; not at all without a width."""

    def __init__(self, width: int | None) -> None:
        self._width, self._column, self._spaces, self._word = width or 0, 0, "", ""

    def push(self, text: str) -> str:
        """Add to the text; return what can be shown now: all but a last word that may go on."""
        if not self._width:
            return text
        shown = ""
        for character in text:
            if character == "\n":
                shown += self.finish() + "\n"
                self._column, self._spaces = 0, ""
            elif character == " ":
                shown += self.finish()
                self._spaces += " "
            else:
                self._word += character
        return shown

    def finish(self) -> str:
        """Return the last word, on a line of its own if it does not fit."""
        if not self._word:
            return ""
        shown, columns = self._spaces + self._word, count_columns(self._word)
        if self._column and self._column + len(self._spaces) + columns > self._width:
            shown, self._column = f"\n{self._word}", columns
        else:
            self._column += len(self._spaces) + columns
        if self._column > self._width:  # the terminal breaks such a word
            self._column = (self._column - 1) % self._width + 1
        self._spaces = self._word = ""
        return shown


def count_columns(word: str) -> int:
    """Return how many columns of a terminal a word takes: two for each Chinese character and the like."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in word)


def show(settings: GenerationSettings) -> str:
    shown = {name: repr(value) if isinstance(value, str) else value for name, value in settings}
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown.items())


def inform(message: str) -> None:
    """Print to standard error what is not generated text."""
    print(message, file=sys.stderr, flush=True)
