"""Checkpoints: what a training that was stopped or killed resumes from, kept apart from its results.

A checkpoint is a folder: the model and the optimizers as torch.distributed.checkpoint writes them (dcp.py), and notes
in JSON. Its name tells its step and SHA-256. Any number of processes can read it.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from gpt2.core.errors import UserError
from gpt2.core.files import delete, file_lock, publish, sha256_of
from gpt2.training import distributed

KEPT = 2  # the newest may be found damaged
FINISHED = "finished"  # the folder of the training that register has seen last
NOTES = "notes.json"
Optimizers = Sequence[torch.optim.Optimizer]
Tensors = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training, in a folder that nothing else uses.

    The last one within the first `steps_before_decay` steps stays, for a longer training to go on from.
    """

    def __init__(self, folder: Path, steps_before_decay: int = 0) -> None:
        self.folder, self.steps_before_decay = folder, steps_before_decay

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold these checkpoints alone; says so and waits while another process does. Raises OSError."""
        with file_lock(self._lock, f"another process is running this training ({self.folder.name[:12]})"):
            self.folder.mkdir(exist_ok=True)
            for unfinished in self.folder.glob("*partial"):
                delete(unfinished)
            yield

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, notes: dict[str, Any], best: Tensors | None = None
    ) -> None:
        """Write the checkpoint after `step` steps, with notes that JSON can hold.

        The last two and that before the decay are kept. `best` are the weights of the lowest validation loss, by name.
        Raises OSError; the checkpoints before are intact then.
        """
        from gpt2.training import dcp

        written = self.folder / "partial"
        try:
            names = dcp.write(written, model, optimizers, best or {})
            if not distributed.is_first():
                return
            if names - {file.name for file in written.iterdir()}:
                raise OSError("parts of it are elsewhere: all machines of a training need to share a disk")
            (written / NOTES).write_text(json.dumps(notes), encoding="utf-8")
            publish(written, self.folder / f"{step:010}-{_hash_of(written)}")
        except (OSError, UserError) as error:
            if distributed.is_first():
                delete(written)
            raise OSError(f"the checkpoint of step {step} cannot be saved ({error}); {self.last()}") from None
        for old in self._files()[KEPT:]:
            if old != self.before_decay():
                delete(old)

    def restore(
        self, model: nn.Module, optimizers: Optimizers, best: Tensors | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint, its best weights into `best`; return its step and notes, or None.

        Damaged ones are deleted, with a warning, so that they do not take the place of good ones among those kept.
        """
        path = distributed.from_first(self._newest_whole)
        if not (distributed.is_first() or self.folder.is_dir()):
            raise UserError(f"{self.folder} is missing on another machine: all of a training's need to share a disk")
        if path is None:
            return None
        from gpt2.training import dcp

        read = dcp.read(path, model, optimizers)
        if best is not None:
            best |= read
        return _step_of(path), json.loads((path / NOTES).read_text(encoding="utf-8"))

    def last(self) -> str:
        """Say where the last checkpoint is."""
        files = self._files()
        if not files:
            return "no checkpoint has been saved yet"
        return f"the last good checkpoint is that of step {_step_of(files[0])}, in {self.folder}"

    def is_empty(self) -> bool:
        """Tell whether there is no checkpoint."""
        return not self._files()

    def before_decay(self) -> Path | None:
        """Return the last checkpoint before the decay, which a longer training has too, if there is one."""
        return next((path for path in self._files() if _step_of(path) <= self.steps_before_decay), None)

    def go_on_from(self, other: Path) -> None:
        """Take a checkpoint of another training that has the same first steps. Raises OSError."""
        written = self.folder / "partial"
        try:
            shutil.copytree(other, written)
            publish(written, self.folder / other.name)
        except OSError:
            delete(written)
            if other.exists():  # not deleted meanwhile
                raise

    def finish(self) -> None:
        """Keep the checkpoint before the decay alone, in place of that of the training that was finished before.

        Does nothing while another process uses these checkpoints.
        """
        kept, finished = self.before_decay(), Checkpoints(self.folder.with_name(FINISHED))
        if kept:
            with suppress(Timeout), FileLock(self._lock, blocking=False), FileLock(finished._lock):
                for path in self._files():
                    if path != kept:
                        delete(path)
                publish(self.folder, finished.folder)
                finished._lock.unlink()
        self.remove()

    def remove(self) -> None:
        """Delete all checkpoints, unless another process uses them."""
        with suppress(Timeout), FileLock(self._lock, blocking=False):
            delete(self.folder)
            self._lock.unlink(missing_ok=True)

    def are_used(self) -> bool:
        """Tell whether a process, also this one, holds these checkpoints."""
        try:
            with FileLock(self._lock, blocking=False):
                return False
        except Timeout:
            return True

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def _newest_whole(self) -> Path | None:
        for path in self._files():
            if _is_whole(path):
                return path
            print(f"warning: {path} is damaged; it is skipped and deleted", file=sys.stderr, flush=True)
            delete(path)
        return None

    def _files(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob("*-*"), reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _hash_of(path: Path) -> str:
    """Return a SHA-256 of the names and the contents of a checkpoint's files. Raises UserError."""
    files = [path / NOTES, path / ".metadata", *sorted(path.glob("*.distcp"))]  # a file manager may add others
    listed = [f"{file.name} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return _hash_of(path) == path.name.split("-")[1]
    except UserError:
        return False
