"""The attention weights are those by which the model itself, in its fused kernel, mixes the values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2.evaluation.attention_weights import attention_weights
from gpt2.model.gpt2 import GPT2Model

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2])


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_weights": True, "activation": "gelu_tanh"}])
def test_weights_give_each_layer_its_attention(make_model: Callable[..., GPT2Model], changes: dict[str, Any]) -> None:
    model = make_model(random=True, n_layers=3, n_heads=4, **changes)
    calls: list[tuple[Tensor, Tensor]] = []  # what the attention of each layer gets and returns

    def note(_: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((inputs[0], output))

    for block in model.transformer_blocks:
        block.attention.register_forward_hook(note)  # type: ignore[union-attr]
    model(TOKENS[None])
    weights, calls = attention_weights(model, TOKENS), calls[:3]
    assert weights.shape == (3, 4, 7, 7) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7))
    assert weights.triu(1).count_nonzero() == 0
    for layer, (x, output) in enumerate(calls):
        attention: Any = model.transformer_blocks[layer].attention
        values = attention.w_v(x[0]).view(7, 4, 4).transpose(0, 1)  # (H, T, D)
        heads = weights[layer] @ values
        torch.testing.assert_close(attention.w_o(heads.transpose(0, 1).flatten(1)), output[0])


def test_the_model_stays_as_it_was(make_model: Callable[..., GPT2Model]) -> None:
    model = make_model(random=True)
    with pytest.raises(ValueError, match="13 positions do not fit the context of 12"):
        attention_weights(model, torch.zeros(13, dtype=torch.long))
    attention_weights(model, TOKENS)
    assert not any(module._forward_pre_hooks for module in model.modules())
