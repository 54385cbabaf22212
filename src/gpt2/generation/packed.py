"""Linear layers whose weights are packed for the CPU (oneDNN): one row of inputs is multiplied far faster."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # of x (..., C) to (..., V)


def can_pack(device: torch.device) -> bool:
    """Tell whether weights can be packed for this device on this machine."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def packed_linear(weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Linear:
    """Return a function of x (..., C) that computes x @ weight (V, C).T + bias (V,), packed.

    `gelu` is the approximation of a GELU behind it, if there is one.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    activation, approximation = ("none", "") if gelu is None else ("gelu", gelu)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], approximation)
