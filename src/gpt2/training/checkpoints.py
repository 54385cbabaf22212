"""Checkpoints: what a training that was stopped or killed resumes from, kept apart from its results.

A checkpoint is one safetensors file: the model, the optimizers, and notes in JSON. Its name tells its step and SHA-256.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn

from gpt2.core.errors import UserError
from gpt2.core.files import delete, file_lock, publish, sha256_of
from gpt2.training import distributed, parallel

KEPT = 2  # the newest may be found damaged
FINISHED = "finished"  # the folder of the training that register has seen last
NOTES = "notes"
Optimizers = Sequence[torch.optim.Optimizer]
Weights = dict[str, Tensor]


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
        self, step: int, model: nn.Module, optimizers: Optimizers, notes: dict[str, Any], best: Weights | None = None
    ) -> None:
        """Write the checkpoint after `step` steps, with notes that JSON can hold; keep the last two and the shared one.

        `best` are the weights of the lowest validation loss, by name. Raises OSError; the checkpoints before are intact
        then.
        """
        written = self.folder / "partial"
        tensors = _tensors(model, optimizers) | {f"best/{name}": weight for name, weight in (best or {}).items()}
        if not distributed.is_first():
            for tensor in tensors.values():
                parallel.whole(tensor)
            return
        try:
            _write(tensors, written, {NOTES: json.dumps(notes)})
            publish(written, self.folder / f"{step:010}-{sha256_of(written)}.safetensors")
        except OSError as error:
            delete(written)
            raise OSError(f"the checkpoint of step {step} cannot be saved ({error}); {self.last()}") from None
        for old in self._files()[KEPT:]:
            if old != self.shared():
                delete(old)

    def restore(
        self, model: nn.Module, optimizers: Optimizers, best: Weights | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint, its best weights into `best`; return its step and notes, or None.

        Damaged ones are deleted, with a warning, so that they do not take the place of good ones among those kept.
        """
        path = self._newest_whole() if distributed.is_first() else None
        with safe_open(path, framework="pt") if path else nullcontext() as file:
            told = distributed.from_first(lambda: _describe(path, file) if path else None)
            if told is None:
                return None
            step, notes, shapes = told
            _load(shapes, file, model, optimizers, {} if best is None else best)
            return step, notes

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

    def go_on_from(self, checkpoint: Path) -> None:
        """Take a checkpoint of another training that has the same first steps. Raises OSError."""
        with suppress(FileNotFoundError):  # deleted meanwhile
            shutil.copy(checkpoint, written := self.folder / "partial")
            publish(written, self.folder / checkpoint.name)

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
        return sorted(self.folder.glob("*-*.safetensors"), reverse=True)


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return all tensors that a step changes by the names of their parameters, tied weights once."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        named[f"model/{name}"] = parameter
        for optimizer in optimizers:
            for key, tensor in optimizer.state.get(parameter, {}).items():
                named[f"optimizer/{name}/{key}"] = tensor
    return named


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write float32 tensors as safetensors, one at a time, since no process may have room for all. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(parallel.whole(tensor).cpu().contiguous().numpy().data)


def _describe(path: Path, file: Any) -> tuple[int, dict[str, Any], dict[str, list[int]]]:
    """Return the step, the notes and the shape of each tensor of an open checkpoint."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no dict
    return _step_of(path), json.loads(file.metadata()[NOTES]), shapes


def _load(shapes: dict[str, list[int]], file: Any, model: nn.Module, optimizers: Optimizers, best: Weights) -> None:
    """Give all processes the tensors, one at a time, of the file that the first one has."""
    parameters = dict(model.named_parameters())
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    for name, shape in shapes.items():
        kind, parameter_name, *key = name.split("/")
        parameter = parameters[parameter_name]
        tensor = parameter.data
        if kind != "model":
            is_alike = shape == list(parameter.shape)
            tensor = torch.empty_like(tensor) if is_alike else torch.empty(shape, device=parameter.device)
        parallel.fill(tensor, file.get_tensor(name) if file else None)
        if kind == "best":
            best[parameter_name] = tensor.cpu()
        elif kind == "optimizer":
            owners[id(parameter)].state[parameter][key[0]] = tensor


def _step_of(path: Path) -> int:
    return int(path.stem.split("-")[0])


def _is_whole(path: Path) -> bool:
    try:
        return sha256_of(path) == path.stem.split("-")[1]
    except UserError:
        return False
