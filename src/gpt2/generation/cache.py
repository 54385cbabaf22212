"""The keys and values of tokens that the model has seen, so that a next token costs the work of one position.

Shapes: B slots of the cache, R of them in use, H heads, L positions of the context, S of them in use, T positions of
new tokens, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """The layers' keys and values of B texts. `place` says where the next tokens stand."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` is (layers, 2, B, H, L, D) of zeros, where the model is."""
        self._memory = memory
        self.positions = torch.empty(0)  # (R, T) of the next tokens, or (1, T) where they are the same in all texts
        self._slots = torch.empty(0)  # (R,)
        self._rows: Tensor | slice = slice(0)  # the same slots; a slice reads them without a copy
        self._mask = torch.empty(0)  # (R or 1, 1, T, S), what is added to the scores

    def place(self, positions: Tensor, used: int, slots: Tensor | None = None) -> None:
        """The next tokens (R, T) stand in slots (R,), or the first R, at positions (R or 1, T), below `used`, S."""
        self._slots = torch.arange(len(positions), device=positions.device) if slots is None else slots
        self._rows = slice(len(positions)) if slots is None else slots
        self.positions = positions
        later = torch.arange(used, device=positions.device) > positions[:, None, :, None]
        self._mask = torch.zeros(later.shape, device=positions.device).masked_fill(later, -torch.inf)

    def move(self, source: int, target: int) -> None:
        """Put what one slot holds in another's place."""
        self._memory[:, :, target] = self._memory[:, :, source]

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """Keep the keys and values among qkv (R, T, 3, H, D); return the heads (R, H, T, D) over all of each text."""
        memory = self._memory[layer]  # (2, B, H, L, D)
        memory[:, self._slots[:, None], :, self.positions] = qkv[:, :, 1:]
        keys, values = memory[:, self._rows, :, : self._mask.shape[-1]]
        return F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, attn_mask=self._mask)
