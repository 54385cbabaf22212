"""One row of the output projection for all tokens that the training text lacks.

Such a token is never a target. Where the rows of all of them start equal, each step gives them equal gradients, and
they stay equal: so one row can stand for all, counted so many times. The loss and every gradient remain those of the
whole vocabulary, of which a small text has half.

Shapes: V vocabulary, M rows: one for each seen token, and a last one for all others; C d_model.
"""

import numpy as np
import torch
from torch import Tensor

from gpt2.core.device import ALIGNED_COLUMNS
from gpt2.data.batches import SeenMask


class SeenTokens:
    """Maps token ids (V,) to rows. A few unseen tokens have rows of their own, to align the number of rows."""

    def __init__(self, seen: Tensor) -> None:
        """`seen` (V,) tells of each token whether the training text has it."""
        alone, self.unseen = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
        if (spare := -(len(alone) + 1) % ALIGNED_COLUMNS) < len(self.unseen):
            alone, self.unseen = torch.cat([alone, self.unseen[:spare]]), self.unseen[spare:]
        self.last_count = max(1, len(self.unseen))  # of the tokens that the last row stands for
        self.ids = torch.cat([alone, self.unseen[:1]])  # (M,), a token of each row
        self.row_of = torch.full_like(seen, len(alone), dtype=torch.long)  # (V,)
        self.row_of[alone] = torch.arange(len(alone), device=alone.device)

    @torch.no_grad()
    def equalize(self, weight: Tensor) -> None:
        """Give the rows of a weight (V, C) that the last one stands for their mean."""
        if len(self.unseen):
            weight[self.unseen] = weight[self.unseen].mean(0)

    def are_equal(self, weight: Tensor) -> bool:
        """Tell whether the rows of a weight (V, C) that the last one stands for are equal."""
        return bool((weight[self.unseen] == weight[self.unseen[:1]]).all())

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows (M, C) of a weight (V, C)."""
        return weight.index_select(0, self.ids) if len(self.unseen) else weight

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of a weight (V, C), given that of its rows (M, C), which is overwritten.

        The tokens that the last row stands for share its gradient.
        """
        gradient[-1] /= self.last_count
        return gradient.index_select(0, self.row_of) if len(self.unseen) else gradient

    def all_logits(self, logits: Tensor) -> Tensor:
        """Give each token (..., V) the logit of its row (..., M)."""
        return logits.index_select(-1, self.row_of) if len(self.unseen) else logits


def keep_rows(seen: SeenMask, weight: Tensor, seen_before: SeenMask | None) -> SeenMask:
    """Return which tokens (V,) need rows of their own in a training that starts from a weight (V, C).

    To equalize the rows of all that its text lacks would destroy what the weight knows of these tokens. So only those
    share a row that shared one, as mask `seen_before` of an earlier training tells, and that this text lacks too.
    """
    kept = np.ones_like(seen)
    if seen_before is not None and (before := SeenTokens(torch.from_numpy(seen_before))).are_equal(weight):
        kept[before.unseen] = seen[before.unseen]
    return kept
