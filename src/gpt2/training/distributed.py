"""A training in several processes, which torchrun starts; without it every function here does nothing.

Each process computes its rows of the same global batch. Where the model is sharded (FSDP2), each holds a part of each
weight, of its gradient and of its optimizer's state. The first process alone writes files and talks to people.

DDP, FSDP and DTensor take seconds to import, so the functions that need them import them.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from gpt2.config import ModelConfig, TrainParams
from gpt2.core.device import choose_device
from gpt2.core.errors import UserError
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import shapes_only

TIMEOUT = timedelta(days=1)  # the first process may wait for a lock, write to a slow disk, or ask MLflow's server
GRACE_SECONDS = 2  # in which the process that failed first says why, and closes its run in MLflow
SAVING_SECONDS = 600  # that a signal leaves for the last step and its checkpoint

Value = TypeVar("Value")


def is_launcher(params: TrainParams) -> bool:
    """Tell whether this process is to start torchrun's processes, rather than to train."""
    return params.launcher == "torchrun" and not dist.is_torchelastic_launched()


def launch(processes: int) -> NoReturn:
    """Run this script in so many processes, as `torchrun --standalone` does, and exit as they do.

    Ctrl-C and SIGTERM are passed on to them. Raises UserError if one was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the processes say themselves what is wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="train",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SAVING_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise UserError(f"process {rank} was killed by {name}; the same command resumes the training") from None
        sys.exit(failure.exitcode)
    sys.exit()


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """Join the other processes, if torchrun has started this one; all but the first are silent. Yield its device.

    An error ends all processes, and one of them tells it.
    """
    if not dist.is_torchelastic_launched():
        yield choose_device(device_name)
        return
    has_gpu = device_name in ("auto", "cuda") and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own_rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    # After a restart, torchrun's store still has the addresses of the processes before.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, world_size=count, rank=own_rank, store=store)
    try:
        with nullcontext() if is_first() else _silence():
            yield _own_device(device_name)
    except BaseException as error:
        lost_another = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if lost_another or not is_first():
            time.sleep(GRACE_SECONDS)
        if _is_told(store):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would interrupt what Python does at exit
            sys.exit(1)
        if lost_another:
            raise UserError(f"the processes cannot reach each other: {error}") from None
        raise
    dist.destroy_process_group()


def _own_device(name: str) -> torch.device:
    """Return this process's device. Raises UserError if there are too few GPUs, or for a device of one process."""
    device = choose_device(name)
    if device.type == "mps" or device.index is not None:
        raise UserError(f"runtime.device {device} is for one process; several take cpu or cuda")
    if device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs")
    return device


def _is_told(store: Any) -> bool:
    """Tell whether another process tells or has told why all end; if not, this one is to."""
    try:
        return bool(store.add("failed", 1) > 1)
    except dist.DistError:  # the store has ended with its process
        return True


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what the block writes to standard output and standard error."""
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        sys.stdout.flush()
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)


def is_started() -> bool:
    """Tell whether torchrun has started this process, maybe as the only one."""
    return dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this process is the one that writes files and logs."""
    return rank() == 0


@contextmanager
def first_only(context: AbstractContextManager[Value], otherwise: Value) -> Iterator[Value]:
    """Enter a context in the first process alone; the others get `otherwise`."""
    with ExitStack() as stack:
        yield stack.enter_context(context) if is_first() else otherwise


def from_first(make: Callable[[], Value]) -> Value:
    """Return in all processes what the first one makes."""
    made = [make() if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def agreed_signal(stop_signal: Callable[[], int]) -> Callable[[], int]:
    """Return the function that all processes call at once, and that tells all of a signal that any has received."""
    if not dist.is_initialized():
        return stop_signal

    def largest() -> int:
        number = torch.tensor(stop_signal())
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    return largest


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


def own_rows(batch_size: int) -> slice:
    """Return which rows of the global batch are this process's."""
    count = batch_size // world_size()
    return slice(rank() * count, (rank() + 1) * count)


def own_share(items: Iterator[Value]) -> Iterator[tuple[Value, bool]]:
    """Yield to each process every so many-th item, and whether it counts.

    All get equally many, since a sharded model computes in all of them at once: the last may be another's.
    """
    while group := [item for _, item in zip(range(world_size()), items, strict=False)]:
        yield group[min(rank(), len(group) - 1)], rank() < len(group)


def mean(values: Tensor) -> Tensor:
    """Return the means over all processes of values, which may be overwritten."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values / world_size()


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
