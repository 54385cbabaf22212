import pytest
import torch
from torch import nn

from gpt2.training.dropout import Dropout, draw_mask, keep_scale


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_drops_that_part_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(1)
    x = torch.ones(300, 401)  # not a multiple of eight
    y = Dropout(p)(x)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.006)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert y[y != 0].unique().tolist() == pytest.approx([keep_scale(p)])


def test_gradient_flows_through_what_is_kept() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_mask_is_the_seeds() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(draw_mask(torch.Size((9, 11)), 0.5))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_all_bytes_are_equally_likely() -> None:
    torch.manual_seed(1)
    kept = draw_mask(torch.Size((8_000,)), 0.5).unflatten(0, (-1, 8)).float().mean(0)  # by place in a draw
    torch.testing.assert_close(kept, torch.full((8,), 0.5), atol=0.06, rtol=0)


@pytest.mark.parametrize("layer", [Dropout(0.0), Dropout(0.5).eval()])
def test_does_nothing_without_need(layer: nn.Module) -> None:
    x = torch.randn(10)
    assert torch.equal(layer(x), x)


def test_nearly_everything_may_be_dropped() -> None:
    assert torch.isfinite(Dropout(0.9999)(torch.ones(1000))).all()
