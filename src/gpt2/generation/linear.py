"""Linear layers with their weights laid out for generation, which is bound by reading them.

On the CPU they are packed for oneDNN, which multiplies one row of inputs far faster; or on request rounded to bfloat16
or int8, half or a quarter of the bytes to read.

Shapes: V rows of a matrix, C its columns.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.device import choose_precision
from gpt2.core.errors import UserError
from gpt2.model.gpt2 import GPT2Model

Quantization = Literal["none", "bfloat16", "int8"]
Linear = Callable[[Tensor], Tensor]  # of x (..., C) to (..., V)


def check_quantization(model: GPT2Model, quantization: Quantization) -> None:
    """Raise UserError if it is not for the model's device, this machine, or the weights, which are not finite."""
    device = model.output_projection.weight.device
    if quantization == "bfloat16" and choose_precision("auto", device) != torch.bfloat16:
        raise UserError(f"bfloat16 weights would be slow here: this {device.type} does not compute with them natively")
    if quantization == "int8":
        if device.type != "cpu":
            raise UserError(f"int8 weights are for the CPU (device cpu), not {device.type}")
        if torch.backends.quantized.engine == "none":
            raise UserError("int8 is not supported on this machine: its PyTorch has no int8 matmuls")
        for name, parameter in model.named_parameters():  # int8 would make them finite
            if not parameter.sum().isfinite():
                raise UserError(f"the model's weights are broken: {name} is not finite")


def make_linear(weight: Tensor, bias: Tensor | None, quantization: Quantization, gelu: str | None = None) -> Linear:
    """Return a function of x (..., C): x @ weight (V, C).T + bias (V,), and a GELU if `gelu` names its approximation.

    In int8 each row of the weight has a scale, and all of x has one.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantization == "int8":
        linear = _int8_linear(weight, bias)
        return linear if gelu is None else lambda x: F.gelu(linear(x), approximate=gelu)
    if quantization == "bfloat16":
        rounded = _float_linear(weight.bfloat16(), None if bias is None else bias.bfloat16(), gelu)
        return lambda x: rounded(x.bfloat16()).float()
    return _float_linear(weight, bias, gelu)


def _float_linear(weight: Tensor, bias: Tensor | None, gelu: str | None) -> Linear:
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        activation, approximation = ("none", "") if gelu is None else ("gelu", gelu)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], approximation)
    linear = partial(F.linear, weight=weight, bias=bias)
    return linear if gelu is None else lambda x: F.gelu(linear(x), approximate=gelu)


def _int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # PyTorch is to move quantization to another package
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)  # a bit less of x, or sums would overflow
