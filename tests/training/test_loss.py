from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt2.core.device import ALIGNED_COLUMNS
from gpt2.model.gpt2 import cross_entropy
from gpt2.model.seen_tokens import SeenTokens
from gpt2.training import loss
from gpt2.training.loss import FusedCrossEntropy

CHUNK_ROWS = 4  # of float64
VOCAB_SIZE = 23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", CHUNK_ROWS * ALIGNED_COLUMNS * 8)
    monkeypatch.setattr(loss, "CACHED_ROWS", CHUNK_ROWS - 1)


@pytest.fixture
def fused() -> FusedCrossEntropy:
    return FusedCrossEntropy(SeenTokens(torch.ones(VOCAB_SIZE, dtype=torch.bool)))


def make_inputs(rows: int, dtype: torch.dtype = torch.float64, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (1, rows, width), a weight (VOCAB_SIZE, width) and targets (1, rows)."""
    generator = torch.Generator().manual_seed(rows)
    hidden_states = torch.randn(1, rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, width, generator=generator, dtype=dtype, requires_grad=True)
    return hidden_states, weight, torch.randint(VOCAB_SIZE, (1, rows), generator=generator)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS - 1])
def test_value_and_gradients_equal_the_models_own_loss(fused: FusedCrossEntropy, rows: int) -> None:
    hidden_states, weight, targets = make_inputs(rows)
    value, expected = (one(hidden_states, weight, targets) for one in (fused, cross_entropy))
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    # Scaled, since a gradient that ignored what flows into the loss would pass unscaled.
    gradients = torch.autograd.grad(3 * value, (hidden_states, weight))
    for gradient, one in zip(gradients, torch.autograd.grad(3 * expected, (hidden_states, weight)), strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-10, rtol=0)


@pytest.mark.parametrize("unseen", [0, 5])
def test_gradcheck(unseen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2.model.seen_tokens.ALIGNED_COLUMNS", 1)
    seen_tokens = SeenTokens(torch.arange(VOCAB_SIZE) >= unseen)
    hidden_states, weight, targets = make_inputs(CHUNK_ROWS + 1)
    own_rows = seen_tokens.ids.tolist()

    def loss_of(hidden_states: Tensor, rows: Tensor) -> Tensor:
        whole = weight.detach().index_copy(0, torch.tensor(own_rows), rows)
        if unseen:
            whole = whole.index_copy(0, seen_tokens.unseen, rows[-1:].expand(unseen, -1))
        return FusedCrossEntropy(seen_tokens)(hidden_states, whole, targets.clamp(min=unseen))

    assert torch.autograd.gradcheck(loss_of, (hidden_states, weight[own_rows].detach().requires_grad_()))


@pytest.mark.parametrize("without", ["hidden_states", "weight"])
def test_one_side_alone_may_need_a_gradient(fused: FusedCrossEntropy, without: str) -> None:
    hidden_states, weight, targets = make_inputs(5)
    {"hidden_states": hidden_states, "weight": weight}[without].requires_grad_(False)
    moved = weight if without == "hidden_states" else hidden_states
    found, expected = (
        torch.autograd.grad(one(hidden_states, weight, targets), moved)[0] for one in (fused, cross_entropy)
    )
    torch.testing.assert_close(found, expected)


def test_inputs_stay_as_they_are(fused: FusedCrossEntropy) -> None:
    inputs = make_inputs(5)
    copies = [one.detach().clone() for one in inputs]
    fused(*inputs).backward()
    assert all(torch.equal(one, copy) for one, copy in zip(inputs, copies, strict=True))


def test_large_logits_do_not_overflow(fused: FusedCrossEntropy) -> None:
    hidden_states, weight, targets = make_inputs(5)
    value = fused(1000 * hidden_states, weight, targets)
    torch.testing.assert_close(value, cross_entropy(1000 * hidden_states, weight, targets), atol=0, rtol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(
    fused: FusedCrossEntropy, mode: type[torch.no_grad] | type[torch.inference_mode]
) -> None:
    inputs = make_inputs(5)
    with mode():  # and may come before training
        value = fused(*inputs)
    assert not value.requires_grad
    assert value.item() == fused(*inputs).item()


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), pytest.param("cuda", False, marks=on_cuda), pytest.param("cuda", True, marks=on_cuda)],
)
def test_under_autocast_no_farther_from_the_truth_than_the_models_own_loss(
    device: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2**20)  # three chunks
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(1, 300, 64, generator=generator).to(device).requires_grad_()
    weight = torch.randn(5000, 64, generator=generator).to(device).requires_grad_()
    targets = torch.randint(5000, (1, 300), generator=generator).to(device)
    exact = hidden_states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact_value = cross_entropy(*exact, targets)
    truth = (exact_value, *torch.autograd.grad(exact_value, exact))

    def distances(function: Callable[..., Tensor]) -> list[float]:
        with torch.autocast(device, dtype=torch.bfloat16):
            value = function(hidden_states, weight, targets)
        assert value.dtype == torch.float32
        found = (value, *torch.autograd.grad(value, (hidden_states, weight)))
        return [(one.double() - true).norm().item() for one, true in zip(found, truth, strict=True)]

    fused = FusedCrossEntropy(SeenTokens(torch.ones(5000, dtype=torch.bool, device=device)), compiled)
    names = "value", "hidden_states", "weight"
    for name, ours, theirs in zip(names, distances(fused), distances(cross_entropy), strict=True):
        assert ours <= theirs * 1.02 + 1e-6, name
