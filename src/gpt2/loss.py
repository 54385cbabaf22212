"""The next-token loss, a chunk of rows at a time, so that the logits of a whole batch never exist at once.

At GPT-2's vocabulary the softmax is bound by memory, not arithmetic. A chunk's gradient is computed in place of its
logits in the forward pass (as in Liger Kernel, Hsu et al. 2024, section 3.2); the backward pass only scales it.

Shapes: N rows (batch times positions), C d_model, V vocabulary, R rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 128


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy () in nats of targets (N,) under the logits features (N, C) @ weight (V, C).T.

    Matrix products run in autocast's format where it is on; the softmax and the sums never below float32.
    """
    needs_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(features, weight, targets, needs_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        device = features.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = features.new_zeros((), dtype=exact)
        with torch.autocast(device, enabled=False):
            inputs, matrix = features.to(product), weight.to(product)
            logits = inputs @ matrix.T  # (N, V), each chunk of which becomes its gradient
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        return features_gradient * gradients[0], weight_gradient * gradients[0], None, None
