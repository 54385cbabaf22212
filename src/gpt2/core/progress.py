"""How far a long computation has come: tqdm's bar on a terminal, plain lines in a file or a pipe."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

COUNTS = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR, LINE = "{desc} |{bar}| " + COUNTS, "{desc} " + COUNTS
DELAY_SECONDS = 1  # before a brief computation shows its bar
LINE_SECONDS = 5  # between plain lines

Item = TypeVar("Item")


class Progress:
    """Shows on standard error how many of `total` units are done.

    A brief one shows its bar only if it lasts, and takes it away at the end. Where there is no terminal, a line comes
    every line_seconds, and with `show`.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, *, brief: bool = False, line_seconds: float = LINE_SECONDS
    ) -> None:
        self._name, self._total, self._done, self._start = name, total, done, done
        self._line_seconds = line_seconds
        self._began = self._printed = time.monotonic()
        self._plain = not (sys.stderr and sys.stderr.isatty())
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            file=_StandardError(),
            disable=self._plain,
            bar_format=BAR,
            dynamic_ncols=True,
            mininterval=0.5,
            leave=not brief,
            delay=DELAY_SECONDS if brief else 0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count so many units more as done."""
        self._done += count
        self._bar.update(count)
        if self._plain and time.monotonic() - self._printed > self._line_seconds:
            self._print()

    def show(self, figures: str) -> None:
        """Show figures, e.g. the loss, behind the counts."""
        self._bar.set_postfix_str(figures)
        if self._plain:
            self._print(figures)

    def _print(self, figures: str = "") -> None:
        self._printed = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            self._total,
            self._printed - self._began,
            prefix=self._name,
            initial=self._start,
            postfix=figures,
            bar_format=LINE,
        )
        print(line, file=_StandardError(), flush=True)


def track(items: Sequence[Item], name: str) -> Iterator[Item]:
    """Yield the items, and show how many are done if that takes long."""
    with Progress(name, len(items), brief=True) as progress:
        for item in items:
            yield item
            progress.advance()


class _StandardError:
    """Standard error, whose reader may leave: Ctrl-C ends `tee` too, and a training goes on to save its state."""

    def write(self, text: str) -> None:
        with suppress(BrokenPipeError):
            if sys.stderr:  # it may be closed
                sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            if sys.stderr:
                sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
