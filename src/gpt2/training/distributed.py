"""The processes of a training, which torchrun starts; without it every function here does nothing.

Each process computes its rows of the same global batch. The first one alone writes files and talks to people.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gpt2.config import TrainParams
from gpt2.core.device import choose_device
from gpt2.core.errors import UserError

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
