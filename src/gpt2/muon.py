"""Muon: momentum whose update is made nearly orthogonal (Jordan et al. 2024), for the matrices inside a network.

It gives the bytes of torch.optim.Muon, which always computes in bfloat16; a CPU without bfloat16 spends far longer on
that than on all the rest of a step, so here the format of the products can be chosen.

Shapes: M, N rows and columns of a matrix; K the smaller of both.
"""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: small singular values grow fastest
SMALLEST_NORM = 1e-7
ADAMW_RMS = 0.2  # Liu et al. 2025, section 2.2: the usual size of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Moves matrices (M, N) by Nesterov momentum made orthogonal, scaled to the size of AdamW's updates.

    So one learning rate and weight decay serve both. `precision` is the format of its matrix products.
    """

    def __init__(self, matrices: ParamsT, weight_decay: float, precision: torch.dtype) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever called
        """Move every matrix once, by its gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalize(matrix.grad.lerp(momentum, MOMENTUM).to(self.precision))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * ADAMW_RMS * math.sqrt(max(matrix.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the matrix (M, N) with all singular values brought near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T  # (K, K)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T
