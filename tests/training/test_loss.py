from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.device import ALIGNED_COLUMNS
from gpt2.training import loss
from gpt2.training.loss import linear_cross_entropy, token_cross_entropy

CHUNK_ROWS = 4  # of float64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loss, "CHUNK_BYTES", CHUNK_ROWS * ALIGNED_COLUMNS * 8)
    monkeypatch.setattr(loss, "CACHED_ROWS", CHUNK_ROWS - 1)
    loss._memory.cache_clear()
    yield
    loss._memory.cache_clear()


def make_inputs(rows: int, dtype: torch.dtype = torch.float64, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(23, width, generator=generator, dtype=dtype, requires_grad=True)
    return features, weight, torch.randint(23, (rows,), generator=generator)


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(features @ weight.T, targets)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS - 1])
def test_value_and_gradients_equal_the_plain_computation(rows: int) -> None:
    features, weight, targets = make_inputs(rows)
    value, expected = linear_cross_entropy(features, weight, targets), plain(features, weight, targets)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    # Scaled, since a gradient that ignored what flows into the loss would pass unscaled.
    gradients = torch.autograd.grad(3 * value, (features, weight))
    for gradient, one in zip(gradients, torch.autograd.grad(3 * expected, (features, weight)), strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-10, rtol=0)


@pytest.mark.parametrize("last_count", [1, 1000])
def test_gradcheck(last_count: int) -> None:
    assert torch.autograd.gradcheck(
        lambda x, w, y: linear_cross_entropy(x, w, y, last_count), make_inputs(CHUNK_ROWS + 1)
    )


@pytest.mark.parametrize("without", ["features", "weight"])
def test_one_side_alone_may_need_a_gradient(without: str) -> None:
    features, weight, targets = make_inputs(5)
    {"features": features, "weight": weight}[without].requires_grad_(False)
    moved = weight if without == "features" else features
    gradient = torch.autograd.grad(linear_cross_entropy(features, weight, targets), moved)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(features, weight, targets), moved)[0])


def test_inputs_stay_as_they_are() -> None:
    features, weight, targets = make_inputs(5)
    copies = [one.detach().clone() for one in (features, weight, targets)]
    linear_cross_entropy(features, weight, targets).backward()
    assert all(torch.equal(one, copy) for one, copy in zip((features, weight, targets), copies, strict=True))


def test_large_logits_do_not_overflow() -> None:
    features, weight, targets = make_inputs(5)
    value = linear_cross_entropy(1000 * features, weight, targets)
    torch.testing.assert_close(value, plain(1000 * features, weight, targets), atol=0, rtol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
    features, weight, targets = make_inputs(5)
    with mode():
        value = linear_cross_entropy(features, weight, targets)
    assert not value.requires_grad
    assert value.item() == linear_cross_entropy(features, weight, targets).item()


@pytest.mark.parametrize("rows", [5, 64])
def test_under_autocast_no_farther_from_the_truth_than_the_plain_computation(rows: int) -> None:
    features, weight, targets = make_inputs(rows, torch.float32, width=32)
    exact = features.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact_value = plain(exact[0], exact[1], targets)
    truth = (exact_value, *torch.autograd.grad(exact_value, exact))

    def distances(function: Callable[..., Tensor]) -> list[float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(features, weight, targets)
        assert value.dtype == torch.float32
        found = (value, *torch.autograd.grad(value, (features, weight)))
        return [(one.double() - true).norm().item() for one, true in zip(found, truth, strict=True)]

    def plain_autocast(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight), targets)

    for name, ours, theirs in zip(
        ("value", "features", "weight"), distances(linear_cross_entropy), distances(plain_autocast), strict=True
    ):
        assert ours <= theirs * 1.02 + 1e-6, name


def test_inference_before_training_is_no_hindrance() -> None:
    features, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    with torch.inference_mode():
        inferred = token_cross_entropy(features, weight, targets).mean()
    weight.requires_grad_()
    trained = linear_cross_entropy(features, weight, targets)
    trained.backward()
    assert weight.grad is not None
    torch.testing.assert_close(inferred, trained.detach())


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS - 1])
@pytest.mark.parametrize("last_count", [1, 4])
def test_each_row_has_its_loss(rows: int, last_count: int) -> None:
    features, weight, targets = make_inputs(rows)
    targets[0] = len(weight) - 1
    found = token_cross_entropy(features, weight, targets, last_count)
    whole = torch.cat([weight, *[weight[-1:]] * (last_count - 1)])
    expected = F.cross_entropy(features @ whole.T, targets, reduction="none")
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)


def test_each_row_has_its_loss_under_autocast() -> None:
    features, weight, targets = make_inputs(5, torch.float32, width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_cross_entropy(features, weight, targets)
        mean = linear_cross_entropy(features, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(), mean.detach())
