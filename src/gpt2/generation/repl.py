"""infer.py's texts on a terminal: one after one prompt, or a session whose lines are prompts and commands."""

import ast
import atexit
import re
import sys
import time
from collections import deque
from contextlib import suppress

from pydantic import field_validator

from gpt2.config import check
from gpt2.core.cli import fail
from gpt2.core.errors import UserError
from gpt2.core.paths import main_root
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
A line that begins with / is always a command, like /help; a line that begins with a space is always a prompt."""

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


def converse(engine: Engine, settings: GenerationSettings) -> None:
    """Obey the lines of standard input until it ends or the user quits. Raises UserError if it is not UTF-8."""
    at_start, on_terminal = settings, sys.stdin.isatty() and sys.stdout.isatty()
    inform(HELP)
    if on_terminal:
        edit_lines()
    while True:
        try:
            line = input("> " if on_terminal else "").removeprefix(BYTE_ORDER_MARK)
            match find_command(line):
                case []:
                    if prompt := line.strip():
                        print_text(engine, Request(prompt, settings))
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


def find_command(line: str) -> list[str]:
    """Return the words of a command, or none of a prompt. Raises UserError if a line that begins with / is neither."""
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

        readline.set_history_length(HISTORY_LINES)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        atexit.register(readline.write_history_file, path)
        readline.read_history_file(path)


def print_text(engine: Engine, request: Request) -> None:
    """Print the prompt and, token by token, what follows it; then the seed, time and speed on standard error.

    Control characters that the model writes are shown as \\x1b and the like, since a terminal would obey them.
    """
    if (cut := len(request.tokens) - engine.max_len) > 0:
        inform(f"the prompt has {len(request.tokens)} tokens; the first {cut} are cut, beyond its context")
    started = time.perf_counter()
    print(request.prompt, end="", flush=True)
    try:
        for _, part in engine.generate(deque([request])):
            print(part.translate(ESCAPES), end="", flush=True)
    finally:
        print(flush=True)
    seconds, count = time.perf_counter() - started, request.generated
    inform(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, seed {request.seed}")


def show(settings: GenerationSettings) -> str:
    shown = {name: repr(value) if isinstance(value, str) else value for name, value in settings}
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown.items())


def inform(message: str) -> None:
    """Print to standard error what is not generated text."""
    print(message, file=sys.stderr, flush=True)
