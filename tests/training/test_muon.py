"""Our Muon moves matrices to the bit as PyTorch's does, and in float32 where that is faster."""

import pytest
import torch
from torch import Tensor

from gpt2.training.muon import Muon, orthogonalize

SHAPES = [(8, 8), (8, 24), (24, 8), (1, 5), (8, 24)]


def moved(optimizer: torch.optim.Optimizer, steps: int = 4) -> list[Tensor]:
    """Return the matrices after some steps with gradients of very different sizes, one of them zero."""
    matrices = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator) * 100.0**-step * (step != 2)
        optimizer.step()
    return matrices


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_it_is_pytorchs_muon_to_the_bit() -> None:
    ours = moved(Muon([{"params": matrices(), "weight_decay": 0.1}], precision=torch.bfloat16))
    theirs = moved(torch.optim.Muon(matrices(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for start, one, other in zip(matrices(), ours, theirs, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, start)


def test_float32_differs_from_bfloat16_by_rounding_only() -> None:
    exact, rounded = (moved(Muon(matrices(), precision)) for precision in (torch.float32, torch.bfloat16))
    for start, one, other in zip(matrices(), exact, rounded, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.02 * (one - start).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix[None])[0]
    singular = u.T @ found @ vt.T
    assert ((singular.diagonal() > 0.6) & (singular.diagonal() < 1.3)).all()
    assert (singular - singular.diagonal().diag()).abs().max() < 1e-4  # the singular vectors stay


def test_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
