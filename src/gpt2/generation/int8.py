"""Weights in int8: a quarter of the bytes to read, in place of the float ones or to find out which of these matter.

Shapes: V rows of a matrix, C its columns; N rows of what it is multiplied by.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
GROUPED = 16  # rows: the count-th largest of the groups' maxima is a lower bound of the count-th largest of all


def int8_linear(weight: Tensor, bias: Tensor | None = None) -> Map:
    """Return the map of x (..., C) to x @ weight (V, C).T + bias (V,), in int8; x is rounded at one scale for all.

    What is not finite may become finite.
    """
    return _linear(_quantize(weight), bias)


class Shortlist:
    """Computes the largest of x @ weight.T, mostly without reading all of the weight.

    With the row w rounded to w' and x to x', w'x' is off wx by at most |w - w'| |x| + |w'| |x - x'|. So the product
    with the weight's int8 copy tells what cannot be among the largest; the others come from the weight itself.
    """

    def __init__(self, weight: Tensor, project: Map) -> None:
        """weight is (V, C); project maps x (N, C) to x @ weight.T (N, V), where few rows can be left out."""
        self._weight, self._project = weight.detach(), project
        self._groups = len(weight) // GROUPED
        rounded = _quantize(self._weight)
        self._product = _linear(rounded, None)
        norms = self._weight.norm(dim=1)
        errors = rounded.q_per_channel_scales().float() * weight.shape[1] ** 0.5 / 2 + 1e-5 * norms  # of float32 too
        self._norms = torch.stack([errors, norms + errors])  # (2, V)

    def __call__(self, x: Tensor, count: int) -> Tensor:
        """Return x (N, C) @ weight.T (N, V), in which what is not among the `count` largest of a row may be -inf."""
        if count * len(x) > self._groups or not x.isfinite().all():  # many are found no sooner
            return self._project(x)
        bounds, products = self._bounds(x), self._product(x)
        grouped = (products - bounds)[:, : self._groups * GROUPED].unflatten(1, (GROUPED, -1))
        least = grouped.amax(1).topk(count).values[:, -1:]  # none of the largest is smaller
        found = (~(products + bounds < least)).any(0).nonzero()[:, 0]  # NaN is found
        if len(found) > 2 * self._groups:
            return self._project(x)
        return torch.full_like(products, -torch.inf).index_copy_(1, found, x @ self._weight[found].T)

    def _bounds(self, x: Tensor) -> Tensor:
        """Return how far the int8 products (N, V) may be off."""
        scale, zero = torch._choose_qparams_per_tensor(x, True)  # as the product does
        rounding = x - torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
        return torch.stack([x.norm(dim=-1), rounding.norm(dim=-1)], dim=-1) @ self._norms


def _quantize(weight: Tensor) -> Tensor:
    """Return the weight in int8, at one scale for each row."""
    scales = (torch.maximum(weight.amax(1), -weight.amin(1)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # PyTorch is to move quantization to another package
        return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)


def _linear(rounded: Tensor, bias: Tensor | None) -> Map:
    packed = torch.ops.quantized.linear_prepack(rounded, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)  # a bit less of x, or products would overflow
