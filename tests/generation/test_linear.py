import pytest
import torch
import torch.nn.functional as F

from generation.helpers import ROUNDED
from gpt2.generation.linear import Quantization, make_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("quantization", ROUNDED)
def test_packed_and_rounded_weights_map_alike(
    has_bias: bool, gelu: str | None, rows: int, quantization: Quantization
) -> None:
    torch.manual_seed(1)
    weight, x, bias = torch.randn(5, 8), torch.randn(rows, 2, 8), torch.randn(5) if has_bias else None
    expected = F.linear(x, weight, bias)
    expected = expected if gelu is None else F.gelu(expected, approximate=gelu)
    torch.testing.assert_close(make_linear(weight, bias, "none", gelu)(x), expected, atol=2e-6, rtol=1e-5)
    coarse = make_linear(weight, bias, quantization, gelu)(x)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - expected).abs().max() < 0.05 * expected.abs().max()


def test_int8_is_within_its_rounding() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(400, 64) * torch.logspace(-3, 3, 400)[:, None], torch.randn(2, 64)
    weight[7] = 0
    found, expected = make_linear(weight, None, "int8")(x), x @ weight.T
    assert ((found - expected).norm(dim=0) / weight.norm(dim=1).clamp(min=1e-9)).max() < 0.1
