"""How every command ends: its exit code, and one line on standard error for a user's mistake."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can mend; its message says how."""


class Stopped(KeyboardInterrupt):
    """Work that ended because a signal asked for it; the message says how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Parser(argparse.ArgumentParser):
    """An argparse whose errors are the project's one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_command(main: Callable[[], None]) -> None:
    """Run main. Exit with 2 on a UserError or what the system refuses (a full disk, no memory), 130 on Ctrl-C.

    SIGTERM ends it with 143, and what main has opened is closed.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, e.g. `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(fail(error))
    except MemoryError:
        sys.exit(fail("there is not enough memory"))
    except RuntimeError as error:
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
        os.write(2, b"\nsaving before it stops ...\n")  # print must not be called from a handler

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, hold_back) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        restore()


def fail(message: object) -> int:
    """Print an error as one line and return the exit code for it."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
