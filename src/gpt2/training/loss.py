"""The next-token loss, whose logits exist a chunk of rows at a time.

At GPT-2's vocabulary the softmax is bound by memory, not arithmetic. A chunk's gradient takes its logits' place in the
forward pass and is used up there (Hsu et al. 2024, "Liger Kernel"); the backward pass only scales.

Shapes: N rows (batch times positions), C d_model, V vocabulary, R rows of a chunk.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.core.device import ALIGNED_COLUMNS, exact_format

CHUNK_BYTES = 2**28  # of logits at most: enough rows for fast matrix products, few enough to weigh little
CACHED_ROWS = 32  # whose softmax stays in a processor's cache


def linear_cross_entropy(
    features: Tensor, weight: Tensor, targets: Tensor, last_count: int = 1, compiled: bool = False
) -> Tensor:
    """Return the mean cross-entropy () in nats of targets (N,) under the logits features (N, C) @ weight (V, C).T.

    Gradients are computed in the forward pass. The last row of weight stands for `last_count` equal ones; its gradient
    is the sum of theirs. Matrix products run in autocast's format where it is on; the softmax and the sums never below
    float32. If `compiled`, a CUDA device computes the softmax by torch.compile, which reads the logits less often.
    """
    softmax = _compiled_softmax() if compiled and features.device.type == "cuda" else _softmax_
    return _LinearCrossEntropy.apply(features, weight, targets, last_count, softmax)


def _operands(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (N, C) and weight (V, C) in their products' format, and memory for a chunk of logits (R, V)."""
    device = features.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    buffer = _logits_buffer(len(features), len(weight), product, features.device)
    return features.to(product), weight.to(product), buffer


def _logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a chunk's logits (R, V), with N rows split into as few equal chunks as CHUNK_BYTES allows."""
    # MPS before macOS 15 writes no product into rows that are apart.
    stride = columns if device.type == "mps" else math.ceil(columns / ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    chunks = math.ceil(rows / (CHUNK_BYTES // (stride * dtype.itemsize)))
    chunk = math.ceil(rows / chunks)
    memory = _memory(CHUNK_BYTES // dtype.itemsize, dtype, device)
    return memory[: chunk * stride].view(chunk, stride)[:, :columns]


@cache
def _memory(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory (size,), the same each time: so large a block would find no place among smaller ones.

    It is never freed, since a recorded CUDA graph goes on writing there.
    """
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside
        return torch.empty(size, dtype=dtype, device=device)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, last_count: int, softmax: Callable[..., Tensor]
    ) -> Tensor:
        inputs, matrix, buffer = _operands(features, weight)
        with torch.autocast(features.device.type, enabled=False):
            total = features.new_zeros((), dtype=exact_format(buffer))
            features_gradients: list[Tensor] = []
            weight_gradient: Tensor | None = None
            for rows, target in zip(inputs.split(len(buffer)), targets.split(len(buffer)), strict=True):
                logits = torch.mm(rows, matrix.T, out=buffer[: len(rows)])  # (R, V)
                total += softmax(logits, target, last_count, 1 / len(inputs))
                features_gradients.append((logits @ matrix).to(features.dtype))
                part = logits.T @ rows
                weight_gradient = part.to(weight.dtype) if weight_gradient is None else weight_gradient.add_(part)
            ctx.save_for_backward(torch.cat(features_gradients), weight_gradient)
        return total / len(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        return features_gradient * gradients[0], weight_gradient * gradients[0], None, None, None


def _softmax_(logits: Tensor, targets: Tensor, last_count: int, scale: float) -> Tensor:
    """Return the summed loss () of logits (R, V), in whose place its gradient times scale is left.

    The last column counts last_count times.
    """
    cached = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    total = logits.new_zeros((), dtype=exact_format(logits))
    for rows, target in zip(logits.split(cached), targets[:, None].split(cached), strict=True):
        values = rows.to(total.dtype)  # the same memory if the logits are as exact
        largest, target_logits = values.amax(1, keepdim=True), values.gather(1, target)
        values.sub_(largest).exp_()
        values[:, -1] *= last_count
        sums = values.sum(1, keepdim=True)
        total += (sums.log() + largest - target_logits).sum()
        shares = scale / sums
        target_gradients = values.gather(1, target) * shares - scale
        torch.mul(values, shares, out=rows).scatter_(1, target, target_gradients.to(rows.dtype))
    return total


@cache
def _compiled_softmax() -> Callable[..., Tensor]:
    return torch.compile(_softmax_)


@torch.no_grad()
def token_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, last_count: int = 1) -> Tensor:
    """Return the cross-entropy (N,) of each target, of which linear_cross_entropy gives the mean, without gradient."""
    inputs, matrix, buffer = _operands(features, weight)
    device = features.device.type
    with torch.autocast(device, enabled=False):
        losses = []
        for rows, target in zip(inputs.split(len(buffer)), targets.split(len(buffer)), strict=True):
            logits = torch.mm(rows, matrix.T, out=buffer[: len(rows)])  # (R, V)
            cached = CACHED_ROWS if device == "cpu" else len(logits)
            for part, label in zip(logits.split(cached), target.split(cached), strict=True):
                exact = part.to(exact_format(part))
                target_logits = exact.gather(1, label[:, None])[:, 0]
                exact[:, -1] += math.log(last_count)
                losses.append(exact.logsumexp(1) - target_logits)
    return torch.cat(losses)


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats; infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
