"""A model in several processes: whole in each (DDP), or sharded (FSDP2).

Of a sharded model each process holds a part of each weight, of its gradient and of its optimizer's state.
DDP, FSDP and DTensor take seconds to import, so the functions that need them import them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2.config import ModelConfig
from gpt2.core.errors import UserError
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import shapes_only
from gpt2.training.distributed import is_first, world_size


def data_parallel(model: nn.Module, batch_size: int) -> nn.Module:
    """Return what computes the model's loss so that gradients are means over all processes.

    Raises UserError if they cannot share a batch evenly.
    """
    if batch_size % world_size():
        raise UserError(f"train.batch_size {batch_size} is not a multiple of the {world_size()} processes")
    weight = next(model.parameters())
    if not dist.is_initialized() or is_sharded(weight):
        return model
    from torch.nn.parallel import DistributedDataParallel

    device = weight.device
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def synchronized(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Return the context of a forward and a backward pass; gradients become means over all processes `now` or later.

    Those of a sharded model do each time: until then, each process would hold them whole.
    """
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "placements")


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor | None) -> None:
    """Give a parameter in all processes the values that the first one has; the others may give None."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        values = torch.empty(placed.shape, dtype=placed.dtype) if values is None else values
        placed.copy_(distribute_tensor(values, placed.device_mesh, placed.placements))
        return
    if values is not None:
        parameter.copy_(values)
    if dist.is_initialized():
        dist.broadcast(parameter, 0)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each process may hold a part."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_sharded(found) else found


def copy_from_first(model: nn.Module) -> None:
    """Give a model in all processes the weights that it has in the first."""
    for parameter in model.parameters():
        fill(parameter.data, None)


@cache
def mesh(device_type: str) -> Any:
    """Return all processes, as DTensor wants to know them."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (world_size(),))


def sharded_model(config: ModelConfig, device: torch.device) -> GPT2Model:
    """Return the model that GPT2Model draws, each process with its part. No process ever holds more than one layer."""
    from torch.distributed.fsdp import fully_shard

    with shapes_only():
        model = GPT2Model(**config.model_dump())
    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    shapes = deepcopy(layers)
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh(device.type))
    model.to_empty(device=device)
    for shape in shapes:  # GPT2Model draws twice: as PyTorch's layers do, then as GPT-2 does
        if is_first():
            deepcopy(shape).to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    for layer, shape in zip(layers, shapes, strict=True):
        if is_first():
            shape.to_empty(device="cpu")
            if isinstance(shape, nn.LayerNorm):
                shape.reset_parameters()
            GPT2Model._initialize(shape)
        if layer is model.output_projection and config.tie_weights:
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            fill(parameter, shape.get_parameter(name) if is_first() else None)
        shape.to("meta")
    return model


def reshard(model: nn.Module) -> None:
    """Let each process hold its part alone again, after a forward pass without a backward pass."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def gathered(model: GPT2Model, config: ModelConfig) -> GPT2Model:
    """Return the model with whole weights, on the CPU if it was sharded; the first process has it, the others not."""
    if not is_sharded(model.token_embedding.weight):
        return model
    with shapes_only():
        found = GPT2Model(**config.model_dump())
    for name, parameter in model.state_dict().items():
        values = whole(parameter)
        if is_first():
            found.load_state_dict({name: values.cpu()}, strict=False, assign=True)
    return found


def split_over_processes(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Apply a function of independent matrices (L, M, N), each of them in one process alone.

    A process that holds a part of each matrix sends it to the one that computes with it.
    """
    if not dist.is_initialized():
        return function(matrices)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placed: Any = matrices
    if not is_sharded(matrices):
        placed = DTensor.from_local(matrices, mesh(matrices.device.type), [Replicate()], run_check=False)
    own = placed.redistribute(placements=[Shard(0)])
    results = DTensor.from_local(
        function(own.to_local()), own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    ).redistribute(placements=placed.placements)
    return results if is_sharded(matrices) else results.to_local()
