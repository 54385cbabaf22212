"""Where each head of a model looks: its attention weights, which the model itself never holds.

Shapes: L layers, H heads, T positions, C d_model, D head size.
"""

import torch
from torch import Tensor

from gpt2.model.gpt2 import GPT2Model, MultiHeadAttention


@torch.no_grad()
def attention_weights(model: GPT2Model, tokens: Tensor) -> Tensor:
    """Return the weights (L, H, T, T) of token ids (T,): each row tells how much its position takes of every other.

    The model is in eval mode. Raises ValueError if T > max_len.
    """
    assert not model.training  # dropout would change what the heads see
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    weights: list[Tensor] = []
    hooks = [
        attention.register_forward_pre_hook(lambda module, inputs: weights.append(_weights(module, inputs[0])))
        for attention in attentions
    ]
    try:
        model.hidden_states(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(weights)


def _weights(attention: MultiHeadAttention, x: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) (1, H, T, T) of x (1, T, C), the future hidden (Vaswani et al. 2017, 3.2.1)."""
    q, k = (w(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for w in (attention.w_q, attention.w_k))
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (1, H, T, T)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)
