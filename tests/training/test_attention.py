from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.training import attention
from gpt2.training.attention import _draw_signs, causal_attention

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
BLOCK = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", BLOCK)


def make_inputs(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (2, 3, T, 5), as a model makes them: views of (B, T, H, D)."""
    generator = torch.Generator().manual_seed(length)
    draws = torch.randn(3, 2, length, 3, 5, dtype=torch.float64, generator=generator).to(dtype)
    q, k, v = (draw.transpose(1, 2).requires_grad_() for draw in draws)
    return q, k, v


def with_seed(function: Attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Let each call drop the same 30%."""

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(q, k, v, 0.3)

    return seeded


def pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The formula, whole, with the masks that the blocks draw."""
    length = q.shape[2]
    mask = torch.zeros(6, length, length)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        mask[:, start:end, :end] = _draw_signs(torch.Size((6, end - start, end)), round(256 * dropout)) > 0
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) * mask.unflatten(0, (2, 3)) * 256 / (256 - round(256 * dropout))) @ v


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_value_and_gradients_equal_the_formula(length: int) -> None:
    inputs = make_inputs(length)
    value, expected = (with_seed(function)(*inputs) for function in (causal_attention, plain))
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    weights = torch.randn(value.shape, dtype=value.dtype)
    found, true = (torch.autograd.grad((one * weights).sum(), inputs) for one in (value, expected))
    torch.testing.assert_close(found, true, atol=1e-12, rtol=0)


def test_without_dropout_it_is_pytorchs() -> None:
    inputs = make_inputs(BLOCK + 1)
    assert torch.equal(causal_attention(*inputs, 0.0), pytorchs(*inputs))


def test_next_to_no_dropout_changes_next_to_nothing() -> None:
    inputs = make_inputs(3 * BLOCK)
    expected = pytorchs(*inputs)
    torch.testing.assert_close(causal_attention(*inputs, 1e-9), expected, atol=1e-12, rtol=0)


def test_bfloat16_is_as_near_the_truth_as_the_formula_under_autocast() -> None:
    inputs = make_inputs(64, torch.bfloat16)
    q, k, v = exact = [one.detach().double().requires_grad_() for one in inputs]
    truth = with_seed(plain)(q, k, v)
    draws = torch.randn(50, *truth.shape, generator=torch.Generator().manual_seed(1))  # one alone may be lucky

    def gradients(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of many sums of the value with random weights."""
        found = [torch.autograd.grad((value * weights).sum(), of, retain_graph=True) for weights in draws]
        return [torch.stack(one) for one in zip(*found, strict=True)]

    true = [truth, *gradients(truth, exact)]

    def distances(function: Attention) -> list[float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = with_seed(function)(*inputs)
        pairs = zip([value, *gradients(value, inputs)], true, strict=True)
        return [(found.double() - one).norm().item() for found, one in pairs]

    ours, theirs = distances(causal_attention), distances(plain)
    assert all(one <= 1.4 * other for one, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_mean_stays_and_each_call_drops_anew() -> None:
    torch.manual_seed(1)
    q, k, v = make_inputs(16)
    results = torch.stack([causal_attention(q, k, v, 0.5) for _ in range(400)])
    assert not torch.equal(results[0], results[1])
    expected = pytorchs(q, k, v)
    torch.testing.assert_close(results.mean(0), expected, atol=0.25, rtol=0)


def test_signs_drop_the_fraction_asked_for() -> None:
    signs = _draw_signs(torch.Size((100, 1001)), 64)
    assert set(signs.unique().tolist()) == {-1, 1} and (signs > 0).float().mean() == pytest.approx(0.75, abs=0.01)
