"""The next-token loss, whose softmax is computed a chunk of rows at a time and leaves its gradient behind.

At GPT-2's vocabulary the softmax is bound by memory, not arithmetic: a chunk stays in the cache, and its gradient
takes its logits' place in the forward pass (Hsu et al. 2024, "Liger Kernel"); the backward pass only scales.

Shapes: N rows (batch times positions), C d_model, V vocabulary, R rows of a chunk.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 128


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy () in nats of targets (N,) under the logits features (N, C) @ weight (V, C).T.

    Matrix products run in autocast's format where it is on; the softmax and the sums never below float32.
    """
    needs_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(features, weight, targets, needs_gradient)


@lru_cache(maxsize=1)
def _logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the same memory each time: by far the largest block of a step would find no place among smaller ones."""
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside
        return torch.empty(rows, columns, dtype=dtype, device=device)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        device = features.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = features.new_zeros((), dtype=exact)
        with torch.autocast(device, enabled=False):
            inputs, matrix = features.to(product), weight.to(product)
            logits = _logits_buffer(len(inputs), len(matrix), product, features.device)
            torch.mm(inputs, matrix.T, out=logits)  # (N, V), each chunk of which becomes its gradient
            buffer = torch.empty_like(logits[:CHUNK_ROWS], dtype=exact)  # (R, V)
            for chunk, target in zip(logits.split(CHUNK_ROWS), targets[:, None].split(CHUNK_ROWS), strict=True):
                exponentials = buffer[: len(chunk)].copy_(chunk)
                largest = exponentials.amax(1, keepdim=True)
                target_logits = exponentials.gather(1, target)
                sums = exponentials.sub_(largest).exp_().sum(1, keepdim=True)
                total += (sums.log() + largest - target_logits).sum()
                if needs_gradient:
                    probabilities = exponentials.div_(sums)
                    probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1))
                    chunk.copy_(probabilities.div_(len(logits)))
            if needs_gradient:
                ctx.save_for_backward((logits @ matrix).to(features.dtype), (logits.T @ inputs).to(weight.dtype))
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        return features_gradient * gradients[0], weight_gradient * gradients[0], None, None


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats; infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
