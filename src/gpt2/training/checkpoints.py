"""Checkpoints: what a training that was stopped or killed resumes from, kept apart from its results.

A checkpoint is a folder: the model and the optimizers as torch.distributed.checkpoint writes them, each process its
part, and notes in JSON. Its name tells its step and SHA-256. Any number of processes can read it.
"""

import hashlib
import json
import shutil
import sys
import warnings
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
BEST = "best/"  # before the names of the weights of the lowest validation loss
Optimizers = Sequence[torch.optim.Optimizer]
Tensors = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training, in a folder that nothing else uses.

    The last one within the first `shared_steps` steps is for a longer training to go on from.
    """

    def __init__(self, folder: Path, shared_steps: int = 0) -> None:
        self.folder, self.shared_steps = folder, shared_steps

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
        """Write the checkpoint after `step` steps, with notes that JSON can hold; keep the last two and the shared one.

        `best` are the weights of the lowest validation loss, by name. Raises OSError; the checkpoints before are intact
        then.
        """
        written = self.folder / "partial"
        tensors = _tensors(model, optimizers) | {BEST + name: weight for name, weight in (best or {}).items()}
        try:
            with _dcp() as dcp:
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(written))
            if not distributed.is_first():
                return
            (written / NOTES).write_text(json.dumps(notes), encoding="utf-8")
            publish(written, self.folder / f"{step:010}-{_hash_of(written)}")
        except OSError as error:
            if distributed.is_first():
                delete(written)
            raise OSError(f"the checkpoint of step {step} cannot be saved ({error}); {self.last()}") from None
        for old in self._files()[KEPT:]:
            if old != self.shared():
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
        with _dcp() as dcp:
            reader = dcp.FileSystemReader(path)
            tensors = _places(reader.read_metadata().state_dict_metadata, model, optimizers)
            dcp.load(tensors, storage_reader=reader)
        if best is not None:
            best |= {name[len(BEST) :]: tensor.cpu() for name, tensor in tensors.items() if name.startswith(BEST)}
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

    def shared(self) -> Path | None:
        """Return the last checkpoint that a longer training has too, if there is one."""
        return next((path for path in self._files() if _step_of(path) <= self.shared_steps), None)

    def go_on_from(self, other: Path) -> None:
        """Take a checkpoint of another training that has the same first steps. Raises OSError."""
        try:
            shutil.copytree(other, written := self.folder / "partial")
            publish(written, self.folder / other.name)
        except OSError:
            if other.exists():  # not deleted meanwhile
                raise

    def finish(self) -> None:
        """Keep the shared checkpoint alone, in place of that of the training that was finished before.

        Does nothing while another process uses these checkpoints.
        """
        shared, finished = self.shared(), Checkpoints(self.folder.with_name(FINISHED))
        if shared:
            with suppress(Timeout), FileLock(self._lock, blocking=False), FileLock(finished._lock):
                for path in self._files():
                    if path != shared:
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


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return all tensors that a step changes by the names of their parameters, tied weights once."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[f"model/{name}"] = parameter
        for optimizer in optimizers:
            for key, tensor in optimizer.state.get(parameter, {}).items():
                named[f"optimizer/{name}/{key}"] = tensor
    return named


def _places(stored: dict[str, Any], model: nn.Module, optimizers: Optimizers) -> Tensors:
    """Return tensors to read those of a checkpoint into: the model's own, and new ones, which the optimizers have."""
    found, parameters = {}, dict(model.named_parameters())
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    for name, metadata in stored.items():
        kind, parameter_name, *key = name.split("/")
        parameter = parameters[parameter_name]
        found[name] = tensor = parameter.detach()
        if kind != "model":
            is_alike = metadata.size == tensor.shape
            found[name] = torch.empty_like(tensor) if is_alike else torch.empty(metadata.size, device=tensor.device)
        if kind == "optimizer":
            owners[id(parameter)].state[parameter][key[0]] = found[name]
    return found


@contextmanager
def _dcp() -> Iterator[Any]:
    """Yield torch.distributed.checkpoint, an error of which in one process is raised in all, as it is.

    It takes a second to import, unless an optimizer has done a step, which imports as much.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a single process
        try:
            yield dcp
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _hash_of(path: Path) -> str:
    """Return a SHA-256 of the names and the contents of a checkpoint's files. Raises UserError."""
    listed = [f"{file.name} {sha256_of(file)}" for file in sorted(path.iterdir())]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return _hash_of(path) == path.name.split("-")[1]
    except (OSError, UserError):
        return False
