"""Muon: momentum whose update is made nearly orthogonal (Jordan et al. 2024), for the matrices inside a network.

It matches torch.optim.Muon bit for bit. That always computes in bfloat16; a CPU without bfloat16 spends far longer on
that than on all the rest of a step, so here the dtype of the matmuls can be chosen.

Shapes: L matrices of one shape, M, N their rows and columns; K the smaller of both.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gpt2.training.parallel import split_over_processes

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: small singular values grow fastest
EPS = 1e-7
ADAMW_RMS = 0.2  # Liu et al. 2025, section 2.2: the usual size of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Updates matrices (M, N) by Nesterov momentum made orthogonal, scaled to the size of AdamW's updates.

    So one learning rate and weight decay serve both. `precision` is the dtype of its matmuls.
    """

    def __init__(self, matrices: ParamsT, precision: torch.dtype) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": 0.0})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever called
        """Update every matrix once, by its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)  # in few large products, for a GPU's sake
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                momenta = [self._momentum(matrix) for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
                updates = split_over_processes(orthogonalize, nesterov.to(self.precision)).to(nesterov.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                step = -group["lr"] * ADAMW_RMS * math.sqrt(max(shape))
                torch._foreach_add_(matrices, updates.unbind(), alpha=step)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (L, M, N) with all singular values brought near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if is_wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (L, K, K)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.mT
