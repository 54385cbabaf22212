"""The part of the vocabulary that a training text can tell apart.

A token that the text never has is never a target. Where the rows of all such tokens in the output projection start
equal, each step gives them equal gradients and they stay equal; so one row can stand for all of them, counted so many
times. The loss and every gradient remain those of the whole vocabulary, and half of GPT-2's is enough for a small text.

Shapes: N tokens of the text, M different ones among them, V vocabulary, C d_model.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.batches import Tokens

READ_TOKENS = 2**24  # at once


class TextVocabulary:
    """Maps ids of the vocabulary (V,) to rows: one for each token of a text (N,), and a last one for all others."""

    def __init__(self, tokens: Tokens, vocab_size: int, device: torch.device) -> None:
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), READ_TOKENS):
            counts += np.bincount(tokens[start : start + READ_TOKENS], minlength=vocab_size)
        seen, self.unseen = (torch.from_numpy(np.flatnonzero(chosen)).to(device) for chosen in (counts, counts == 0))
        self.ids = torch.cat([seen, self.unseen[:1]])  # (M + 1,), of each row one; (M,) if the text has every token
        self.row_of = torch.full((vocab_size,), len(seen), device=device)
        self.row_of[seen] = torch.arange(len(seen), device=device)

    @property
    def last_count(self) -> int:
        """How many tokens the last row stands for."""
        return max(1, len(self.unseen))

    @torch.no_grad()
    def make_unseen_equal(self, weight: Tensor) -> None:
        """Give the unseen tokens' rows of a weight (V, C) their mean, as `rows` expects."""
        if len(self.unseen):
            weight[self.unseen] = weight[self.unseen].mean(0)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows (M + 1, C) of a weight (V, C); those that the last stands for share its gradient."""
        return _Rows.apply(weight, self)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, vocabulary: TextVocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        return weight[vocabulary.ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        vocabulary = ctx.vocabulary
        gradient = gradients[0].clone()
        gradient[-1] /= vocabulary.last_count
        return gradient[vocabulary.row_of], None
