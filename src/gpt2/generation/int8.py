"""Weights in int8, on the CPU: a quarter of the bytes to read.

Shapes: V rows of a matrix, C its columns.
"""

import warnings

import torch
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.generation.packed import Linear


def check_int8(device: torch.device) -> None:
    """Raise UserError if int8 weights are not for this device or machine."""
    if device.type != "cpu":
        raise UserError(f"int8 weights are for the CPU (device cpu), not {device.type}")
    if torch.backends.quantized.engine == "none":
        raise UserError("int8 is not supported on this machine: its PyTorch has no int8 matmuls")


def int8_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return a function of x (..., C) that computes x @ weight (V, C).T + bias (V,), in int8.

    Each row of the weight has a scale, and all of x has one. What is not finite may become finite.
    """
    scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # PyTorch is to move quantization to another package
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)  # a bit less of x, or sums would overflow
