import torch

from gpt2.generation.int8 import int8_linear


def test_int8_is_within_its_rounding() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(400, 64) * torch.logspace(-3, 3, 400)[:, None], torch.randn(2, 64)
    found, expected = int8_linear(weight)(x), x @ weight.T
    assert ((found - expected).norm(dim=0) / weight.norm(dim=1)).max() < 0.1


def test_int8_knows_rows_of_nothing() -> None:
    weight, x = torch.zeros(3, 8), torch.randn(2, 8)
    assert torch.equal(int8_linear(weight)(x), torch.zeros(2, 3))
