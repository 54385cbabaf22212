"""GPT-2, bottom-up, as in Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Shapes: B batch, T positions, C d_model, H n_heads, D head size (C / H), F d_ff, V vocab_size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


class LayerNorm(nn.LayerNorm):
    """PyTorch's layer norm (Ba et al. 2016), printed in the same words by every version of PyTorch."""

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2.2) with a separate matrix for each projection."""

    def __init__(self, d_model: int, n_heads: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        self.n_heads = n_heads
        self.w_q = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.w_k = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.w_v = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.w_o = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.scaled_dot_product_attention: Callable[..., Tensor] = F.scaled_dot_product_attention  # replaceable

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C); position t sees positions 0 to t."""
        q, k, v = (self._split_heads(projection(x)) for projection in (self.w_q, self.w_k, self.w_v))
        dropout = self.dropout.p if self.training else 0.0
        heads = self.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        return self.w_o(heads.transpose(1, 2).flatten(2))  # (B, T, C)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class PositionwiseFeedForward(nn.Module):
    """Two linear layers with a GELU between (Hendrycks & Gimpel 2016), applied to each position alone."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.approximation = GELU_APPROXIMATION[activation]
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C), through (B, T, F)."""
        return self.dropout(self.linear2(F.gelu(self.linear1(x), approximate=self.approximation)))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a layer norm on its residual branch (pre-norm: GPT-2, section 2.3)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, qkv_bias: bool, activation: str) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_heads, dropout, qkv_bias)
        self.feed_forward = PositionwiseFeedForward(d_model, d_ff, dropout, activation)
        self.layer_norm1 = LayerNorm(d_model)
        self.layer_norm2 = LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.layer_norm1(x)))
        return x + self.feed_forward(self.layer_norm2(x))


def cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy () in nats of targets (B, T), given (B, T, C) and the output projection (V, C)."""
    logits = F.linear(hidden_states, weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPT2Model(nn.Module):
    """The decoder-only transformer. `activation` is "gelu" (exact) or "gelu_tanh" (GPT-2's own approximation).

    With tie_weights, qkv_bias and gelu_tanh it has the architecture of OpenAI's GPT-2; without them it is the model of
    the original project, whose embedding and output projection are learned apart.

    Raises ValueError if d_model is not a multiple of n_heads, KeyError for an unknown activation.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        max_len: int,
        dropout: float,
        tie_weights: bool = False,
        qkv_bias: bool = False,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.max_len = max_len
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff, dropout, qkv_bias, activation) for _ in range(n_layers)
        )
        self.layer_norm = LayerNorm(d_model)
        self.output_projection = nn.Linear(d_model, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy  # replaceable
        self.apply(self._initialize)
        if tie_weights:
            self.output_projection.weight = self.token_embedding.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of the tokens that follow token ids (B, T), or with targets (B, T) the loss ().

        Raises ValueError if T > max_len.
        """
        hidden_states = self.hidden_states(tokens)
        if targets is None:
            return self.output_projection(hidden_states)
        return self.loss(hidden_states, self.output_projection.weight, targets)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to the last layer's hidden states (B, T, C). Raises ValueError if T > max_len."""
        length = tokens.shape[1]
        if length > self.max_len:
            raise ValueError(f"{length} positions do not fit the context of {self.max_len}")
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.transformer_blocks:
            x = block(x)
        return self.layer_norm(x)

    def count_parameters(self) -> int:
        """The number of trained weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())
