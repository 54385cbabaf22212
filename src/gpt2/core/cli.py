"""How every command ends: its exit code, and one line on standard error for a user's mistake."""

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gpt2.core.errors import Stopped, UserError, one_line

NO_COMPILER = r"No working C\+\+ compiler|Failed to find C compiler"  # PyTorch's words, and Triton's


class Parser(argparse.ArgumentParser):
    """An argparse whose errors are the project's one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but refuse a long option with one dash, which argparse takes for a short one and its value."""
        for word in sys.argv[1:] if args is None else args:
            is_short = word.startswith("-") and not word.startswith("--")
            if is_short and f"-{word.partition('=')[0]}" in self._option_string_actions:
                self.error(f"{word} has one dash: write -{word}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, with the nearest option for each one that is unknown."""
        options = [name for action in self._actions for name in action.option_strings]
        unknown = re.findall(r"(?<!\S)--[\w-]+", message.partition("unrecognized arguments: ")[2])
        near = [option for name in unknown for option in difflib.get_close_matches(name, options, n=1)]
        hint = f" (did you mean {' '.join(near)}?)" if near else ""
        raise UserError(f"{message}{hint}; see --help")


def run_command(main: Callable[[], None]) -> None:
    """Run main. Exit with 2 on a UserError or what the system refuses (a full disk, no memory), 130 on Ctrl-C.

    SIGTERM ends it with 143, and what main has opened is closed. If the reader of its output has left, e.g. `head`,
    it ends silently with 141, as SIGPIPE would. With GPT2_DEBUG=1 in the environment, an error's traceback comes first.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed; print would take the other one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        _write_error(f"{stopped}\n")
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        sys.exit(fail(error))
    except MemoryError:
        sys.exit(fail("there is not enough memory"))
    except RuntimeError as error:
        if re.search(NO_COMPILER, str(error)):
            sys.exit(fail("train.compile needs a C++ compiler, such as g++, or must be false"))
        if "allocate" not in str(error) and "out of memory" not in str(error):  # PyTorch's words for no memory
            raise
        sys.exit(fail(f"there is not enough memory: {str(error).splitlines()[0]}"))


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Hold back Ctrl-C and SIGTERM; yield a function that returns the number of the one received, or 0.

    A second one acts at once, and so does either where it was not held back.
    """
    received = 0

    def hold_back(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()
        _write_error("\nsaving before it stops ...\n")

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, hold_back) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        restore()


def _write_error(text: str) -> None:
    """Write to standard error, also from a signal handler, where print may fail."""
    try:
        os.write(2, text.encode())
    except OSError:  # Ctrl-C has ended its reader too, e.g. `tee`
        _discard_output()


def _discard_output() -> None:
    """Let nothing that is printed from here on fail because nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def fail(message: object) -> int:
    """Print an error as one line and return the exit code for it. With GPT2_DEBUG=1 its traceback comes first."""
    if os.environ.get("GPT2_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
