from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt2.generation.int8 import Shortlist, int8_linear

V, C = 4000, 64


def shortlist(weight: Tensor) -> Shortlist:
    return Shortlist(weight, lambda x: x @ weight.T)


@pytest.mark.parametrize("make", [torch.randn, torch.rand, torch.ones])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 40, V])
def test_the_largest_are_those_of_the_weight(make: Callable[..., Tensor], rows: int, count: int) -> None:
    weight, x = make(V, C), torch.randn(rows, C)
    found, expected = shortlist(weight)(x, count), x @ weight.T
    torch.testing.assert_close(found.topk(count).values, expected.topk(count).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected.where(found.isfinite(), -torch.inf), atol=1e-5, rtol=1e-5)


def test_most_of_the_weight_is_left_out() -> None:
    found = shortlist(torch.randn(V, C))(torch.randn(2, C), 5)
    assert 5 <= found.isfinite().all(0).sum() <= V / 8


def test_rounding_is_within_its_bound() -> None:
    weight, x = torch.randn(V, C) * torch.logspace(-3, 3, V)[:, None], torch.randn(2, C) * torch.tensor([[1.0], [9.0]])
    listed = shortlist(weight)
    off = (listed._product(x) - x @ weight.T).abs()
    assert (off <= listed._bounds(x)).all()
    assert (off > listed._bounds(x) / 20).any()


@pytest.mark.parametrize("ruined", [torch.nan, torch.inf])
def test_what_is_not_finite_is_found(ruined: float) -> None:
    weight, x = torch.randn(V, C), torch.randn(2, C)
    weight[7, 3] = ruined
    assert not shortlist(weight)(x, 5)[:, 7].isfinite().any()
    x[1, 2] = ruined
    assert not shortlist(torch.randn(V, C))(x, 5)[1].isfinite().any()


def test_int8_knows_rows_of_nothing() -> None:
    weight, x = torch.zeros(3, 8), torch.randn(2, 8)
    assert torch.equal(int8_linear(weight)(x), torch.zeros(2, 3))
