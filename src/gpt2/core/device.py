"""What a computation runs on: device, dtype, threads, and how much memory it took."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
import torch
from joblib import cpu_count

from gpt2.core.errors import UserError

MICRO_BATCH_SIZE, GPU_MICRO_BATCH_SIZE = 8, 32  # sequences: on a CPU for little memory, on a GPU enough to fill it
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes
ALIGNED_COLUMNS = 64  # matrices whose rows begin at multiples of this are multiplied up to twice as fast


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA, then Apple's GPU, then the CPU. Raises UserError."""
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name} is not available here; try auto or cpu") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matmuls; "auto" takes bfloat16 where the hardware computes it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def choose_micro_batch_size(setting: Literal["auto"] | int, device: torch.device) -> int:
    """Return how many sequences to compute at once; "auto" lets memory grow where that is faster."""
    if setting == "auto":
        return MICRO_BATCH_SIZE if device.type == "cpu" else GPU_MICRO_BATCH_SIZE
    return setting


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over values of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which matmuls run in `precision` while weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def use_threads(setting: Literal["auto"] | int) -> int:
    """Compute with so many CPU threads, on which the sums' rounding depends; return their number.

    "auto" takes the CPUs that this process may use, by its affinity and its cgroup's quota; its share of them if
    torchrun has started several processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = max(1, cpu_count() // processes) if setting == "auto" else setting
    torch.set_num_threads(count)
    return count


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: a CUDA device's, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_memory(needed_bytes: int, device: torch.device) -> None:
    """Raise UserError if the machine, or its container, has less memory than that; a GPU tells so itself."""
    total_bytes = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # there is no such file, or no limit, which is the word "max"
        total_bytes = min(total_bytes, int(CGROUP_LIMIT.read_text()))
    if device.type == "cpu" and needed_bytes > total_bytes:
        raise UserError(
            f"this model and batch need at least {needed_bytes / 1e9:,.0f} GB to train; "
            f"this machine has {total_bytes / 1e9:,.0f} GB"
        )
