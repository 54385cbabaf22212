"""The part of the vocabulary that a training text can tell apart.

A token that the text never has is never a target. Where the rows of all such tokens in the output projection start
equal, each step gives them equal gradients and they stay equal; so one row can stand for all of them, counted so many
times. The loss and every gradient remain those of the whole vocabulary, and half of GPT-2's is enough for a small text.
The trained model's logits too can be had for half of the work.

Shapes: N tokens of the text, M tokens with rows of their own, V vocabulary, C d_model.
"""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.core.device import ALIGNED_COLUMNS
from gpt2.data.batches import Tokens

READ_TOKENS = 2**24  # at once


class TextVocabulary:
    """Maps ids of the vocabulary (V,) to rows: one for each token that a text has, and a last one for those it lacks.

    A few that it lacks have rows of their own, where this makes the number of rows good for matrix products.
    """

    def __init__(self, unseen: Tensor) -> None:
        """`unseen` tells of each token (V,) whether the text lacks it."""
        alone, self.unseen = (~unseen).nonzero()[:, 0], unseen.nonzero()[:, 0]
        if (spare := -(len(alone) + 1) % ALIGNED_COLUMNS) < len(self.unseen):
            alone, self.unseen = torch.cat([alone, self.unseen[:spare]]), self.unseen[spare:]
        self.ids = torch.cat([alone, self.unseen[:1]])  # (M + 1,), of each row one; (M,) if the text has every token
        self.row_of = torch.full_like(unseen, len(alone), dtype=torch.long)
        self.row_of[alone] = torch.arange(len(alone), device=alone.device)

    @classmethod
    def of_text(cls, tokens: Tokens, vocab_size: int, device: torch.device) -> Self:
        """Return that of a text (N,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), READ_TOKENS):
            counts += np.bincount(tokens[start : start + READ_TOKENS], minlength=vocab_size)
        return cls(torch.from_numpy(counts == 0).to(device))

    @classmethod
    def of_weight(cls, weight: Tensor) -> Self:
        """Return that of the text on which a weight (V, C) was trained: tokens whose rows are equal are unseen."""
        first = weight.detach()[:, 0]
        unseen = first == first.cpu().mode().values.item()  # nearly always only those whose whole rows are equal
        candidates = unseen.nonzero()[:, 0]  # the first of which may have had rows of their own, now a little apart
        unseen[candidates] = (weight[candidates] == weight[candidates[-1:]]).all(1)
        return cls(unseen if unseen.sum() > 1 else torch.zeros_like(unseen))

    @property
    def last_count(self) -> int:
        """How many tokens the last row stands for."""
        return max(1, len(self.unseen))

    @torch.no_grad()
    def make_unseen_equal(self, weight: Tensor) -> None:
        """Give the rows of a weight (V, C) that the last one stands for their mean, as `rows` expects."""
        if len(self.unseen):
            weight[self.unseen] = weight[self.unseen].mean(0)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows (M + 1, C) of a weight (V, C); those that the last stands for share its gradient."""
        return _Rows.apply(weight, self) if len(self.unseen) else weight

    def all_logits(self, logits: Tensor) -> Tensor:
        """Give each token (..., V) the logit of its row (..., M + 1)."""
        return logits.index_select(-1, self.row_of) if len(self.unseen) else logits


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, vocabulary: TextVocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        return weight.index_select(0, vocabulary.ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        vocabulary = ctx.vocabulary
        gradient = gradients[0].clone()
        gradient[-1] /= vocabulary.last_count
        return gradient.index_select(0, vocabulary.row_of), None
