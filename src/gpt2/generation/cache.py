"""The keys and values of tokens that the model has seen, so that a next token costs the work of one position.

Shapes: B slots of the cache, R of them in use, H heads, L positions of the context, S of them in use, T positions of
new tokens, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """The layers' keys and values of B texts. `prefill` or `step` says where the next tokens stand."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` is (layers, 2, B, H, L, D) of zeros, where the model is."""
        self._memory = memory
        self.positions = torch.empty(0)  # of the next tokens: (T,), or one for each slot (R, 1)
        self._slots = torch.empty(0)  # (R,)
        self._mask: Tensor | None = None  # (R, 1, 1, S), what is added to the scores; None in a prefill

    def prefill(self, slots: Tensor, length: int) -> None:
        """The next tokens (R, T) begin the texts in these slots (R,), in place of what was there; T is `length`."""
        self._slots, self._mask = slots, None
        self.positions = torch.arange(length, device=slots.device)

    def step(self, positions: Tensor, used: int) -> None:
        """The next tokens (R, 1) stand at positions (R,) of the first R slots, all of them below `used`, S."""
        self._slots, self.positions = torch.arange(len(positions), device=positions.device), positions[:, None]
        later = torch.arange(used, device=positions.device) > self.positions
        self._mask = torch.zeros(later.shape, device=positions.device).masked_fill(later, -torch.inf)[:, None, None]

    def move(self, source: int, target: int) -> None:
        """Put what one slot holds in another's place."""
        self._memory[:, :, target] = self._memory[:, :, source]

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """Keep the keys and values among qkv (R, T, 3, H, D); return the heads (R, H, T, D) over all of each text."""
        memory = self._memory[layer]  # (2, B, H, L, D)
        if self._mask is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, H, T, D)
            memory[:, self._slots, :, : qkv.shape[1]] = torch.stack([k, v])
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        memory[:, self._slots, :, self.positions[:, 0]] = qkv[:, 0, 1:]
        keys, values = memory[:, : len(qkv), :, : self._mask.shape[-1]]
        return F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, attn_mask=self._mask)
