"""The tensors of a checkpoint, by torch.distributed.checkpoint: each process writes and reads its part.

Importing it takes a second, unless an optimizer has done a step, which imports as much: so it is imported when needed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gpt2.training.checkpoints import Optimizers, Tensors

BEST = "best/"  # before the names of the weights of the lowest validation loss


class Writer(FileSystemWriter):
    """Raises the OSError of a full disk, behind which torch.save raises a RuntimeError."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write(folder: Path, model: nn.Module, optimizers: Optimizers, best: Tensors) -> set[str]:
    """Write all tensors that a step changes, and the best weights, by name; return the names of all files.

    All processes do so at once. Raises OSError in all if it does in one.
    """
    tensors = {BEST + name: weight for name, weight in best.items()}
    for name, parameter in model.named_parameters():  # tied weights once
        tensors[f"model/{name}"] = parameter
        for optimizer in optimizers:
            for key, tensor in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = tensor
    with _as_in_one_process():
        # Copied ahead, tensors of a GPU that is not the current one might be written before they have arrived.
        metadata = save(tensors, storage_writer=Writer(folder, per_thread_copy_ahead=0))
    return {stored.relative_path for stored in metadata.storage_data.values()}


def read(folder: Path, model: nn.Module, optimizers: Optimizers) -> Tensors:
    """Read what `write` has written, in any number of processes; return the best weights, on the CPU."""
    found, parameters = {}, dict(model.named_parameters())
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    reader = FileSystemReader(folder)
    all_stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, stored in all_stored.items():
        kind, parameter_name, *key = name.split("/")
        parameter = parameters[parameter_name]
        found[name] = tensor = parameter.detach()
        if kind != "model":
            is_alike = stored.size == tensor.shape
            found[name] = torch.empty_like(tensor) if is_alike else torch.empty(stored.size, device=tensor.device)
        if kind == "optimizer":
            owners[id(parameter)].state[parameter][key[0]] = found[name]
    with _as_in_one_process():
        load(found, storage_reader=reader)
    return {name.removeprefix(BEST): tensor.cpu() for name, tensor in found.items() if name.startswith(BEST)}


@contextmanager
def _as_in_one_process() -> Iterator[None]:
    """Raise the error of one process, as it is, in all; and do not warn that there is but one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
