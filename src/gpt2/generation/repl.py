"""infer.py's texts on a terminal: one after one prompt, or a session whose lines are prompts and commands."""

import ast
import difflib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from gpt2.config import check
from gpt2.core.cli import fail
from gpt2.core.errors import UserError
from gpt2.core.paths import main_root
from gpt2.generation.engine import GenerationSettings, Text, Writer

AnySettings = TypeVar("AnySettings", bound=GenerationSettings)

HELP = """\
Type a prompt, or one of:
  set NAME VALUE   change a setting, e.g. set temperature 1.2, set top_k none, set max_tokens 100
  seed N           repeat the text of this seed; seed none writes another each time
  settings         show the settings
  reset            take the settings of the start again
  help             show this text
  quit             leave (so does Ctrl-D); Ctrl-C stops a text
A line that says more than its command takes, like "help me", is a prompt; so is any line that begins with a space."""

COMMANDS = ("set", "seed", "settings", "reset", "help", "quit", "exit")
NAMES = tuple(GenerationSettings.model_fields)
TEXTS = ("stop", "device", "quantize")  # settings that are no numbers
SIMILAR = 0.75  # difflib's ratio from which a word counts as another one mistyped: two letters exchanged in four
HISTORY_LINES = 1000


def converse(writer: Writer, settings: GenerationSettings) -> None:
    """Obey the lines of standard input until it ends or the user quits. Raises UserError if it is not UTF-8."""
    at_start, on_terminal = settings, sys.stdin.isatty() and sys.stdout.isatty()
    inform(HELP)
    with line_editing() if on_terminal else nullcontext():
        while True:
            try:
                line = input("> " if on_terminal else "")
            except EOFError:
                if on_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                print()
                continue
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8 text") from None
            try:
                match find_command(line):
                    case []:
                        if prompt := line.strip():
                            print_text(writer, Text(prompt, settings))
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
                        settings = change(settings, {name: value})
                        inform(show(settings))
                    case ["seed"]:
                        raise UserError("seed takes a number or none, e.g. seed 7")
                    case _:
                        raise UserError("set takes a name and a value, e.g. set temperature 1.2")
            except UserError as error:
                fail(error)
            except KeyboardInterrupt:
                if not on_terminal:
                    raise


def find_command(line: str) -> list[str]:
    """Return the words of a command, the last with all that follows it, or none of a prompt.

    Raises UserError if the line is a mistyped command.
    """
    words = line.split(maxsplit=2)
    command = None if not words or line[0].isspace() else _nearest(words[0].lower(), COMMANDS)
    if command is None or not _fits(command, words):
        return []
    if words[0] != command:
        raise UserError(f"{words[0]} is unknown (did you mean {command}?); a space before it makes it a prompt")
    return [word.strip() for word in words]


def _fits(command: str, words: list[str]) -> bool:
    """Tell whether what follows the first word can be meant for the command, more strictly if that is mistyped."""
    is_exact = words[0] == command
    match command, words[1:]:
        case "set", []:
            return True
        case "set", [name, *value]:
            return _nearest(name, NAMES) is not None or (is_exact and len(value) == 1 == len(value[0].split()))
        case "seed", []:
            return is_exact
        case "seed", [value]:
            return is_exact or value.isdecimal() or value == "none"
        case _, rest:
            return not rest


def _nearest(word: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=SIMILAR)), None)


@contextmanager
def line_editing() -> Iterator[None]:
    """Let input() edit lines and recall earlier ones, those of former sessions too."""
    try:
        import readline  # from here on it serves input()
    except ImportError:  # Python was built without it
        yield
        return
    path = main_root() / ".cache" / "infer_history"
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            readline.write_history_file(path)


def print_text(writer: Writer, text: Text) -> None:
    """Print the prompt and, token by token, what follows it; then the seed, time and speed on standard error."""
    if (cut := len(text.tokens) - writer.max_len) > 0:
        inform(f"the prompt has {len(text.tokens)} tokens; the first {cut} are cut, beyond its context")
    started = time.perf_counter()
    print(text.prompt, end="", flush=True)
    try:
        for _, part in writer.write(deque([text])):
            print(part, end="", flush=True)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - started
    inform(f"{text.written} tokens in {seconds:.2f} s, {text.written / seconds:.1f} tokens/s, seed {text.seed}")


def change(settings: AnySettings, texts: dict[str, str]) -> AnySettings:
    """Return settings with some replaced by what a user typed. Raises UserError that names all that is wrong."""
    changes = {name: _value(name, text) for name, text in texts.items()}
    return check(type(settings), settings.model_dump() | changes, "settings")


def _value(name: str, text: str) -> Any:
    """Return what was typed for a setting: none, a number, or the text as it is, without quotes around it."""
    if text.lower() in ("none", "off") and name != "quantize":
        return None
    readings: list[Callable[[str], Any]] = [int, float]
    if name in TEXTS:
        readings = [ast.literal_eval] if text[:1] in ("'", '"') else []
    for read in readings:
        with suppress(Exception):  # literal_eval raises all kinds
            return read(text)
    return text


def show(settings: GenerationSettings) -> str:
    shown = {name: repr(value) if isinstance(value, str) else value for name, value in settings.model_dump().items()}
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown.items())


def inform(message: str) -> None:
    """Print to standard error what is not generated text."""
    print(message, file=sys.stderr, flush=True)
