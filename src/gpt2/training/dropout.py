"""Dropout (Srivastava et al. 2014) whose mask costs a CPU a random byte an element, a seventh of PyTorch's own."""

import math

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """PyTorch's dropout; on a CPU the probability is rounded to a multiple of 1/256."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, in training with a random part of it zero and the rest scaled to keep the mean."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return x * draw_mask(x.shape, self.p) * keep_scale(self.p)


def draw_mask(shape: torch.Size, p: float) -> Tensor:
    """Return a mask of that shape on the CPU: 0 with probability p, where an element is dropped, else 1.

    It is of bytes, since PyTorch takes several times as long to make booleans and to apply them.
    """
    count = math.prod(shape)
    draws = torch.empty(math.ceil(count / 8), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.uint8)[:count].view(shape).ge_(_dropped_bytes(p))


def keep_scale(p: float) -> float:
    """Return what the kept elements are multiplied by."""
    return 256 / (256 - _dropped_bytes(p))


def _dropped_bytes(p: float) -> int:
    return min(round(p * 256), 255)
