"""All unseen tokens are one row of the loss, and no number is another for it."""

import numpy as np
import pytest
import torch

from gpt2.model.gpt2 import cross_entropy
from gpt2.model.seen_tokens import SeenTokens, keep_rows
from gpt2.training.loss import FusedCrossEntropy

VOCAB_SIZE = 12


def make(seen: list[int] | range, vocab_size: int) -> SeenTokens:
    return SeenTokens(torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, torch.tensor([*seen]), True))


@pytest.mark.parametrize("seen", [[3], [0, 1, 4, 11], range(VOCAB_SIZE - 1), range(VOCAB_SIZE)])
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(seen: list[int]) -> None:
    seen_tokens = make(seen, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(1, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, 5, generator=generator, dtype=torch.float64)
    seen_tokens.equalize(weight)
    weight.requires_grad_()
    targets = torch.tensor([*seen])[torch.randint(len(seen), (1, 7), generator=generator)]

    found, expected = (one(hidden_states, weight, targets) for one in (FusedCrossEntropy(seen_tokens), cross_entropy))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(3 * found, (hidden_states, weight))
    for gradient, one in zip(gradients, torch.autograd.grad(3 * expected, (hidden_states, weight)), strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-10, rtol=0)


def test_seen_rows_stay_and_unseen_ones_get_their_mean() -> None:
    seen_tokens = make([1, 3], 4)
    weight = torch.tensor([[0.0, 8.0], [1.0, 1.0], [4.0, 0.0], [3.0, 3.0]])
    seen_tokens.equalize(weight)
    assert weight.tolist() == [[2.0, 4.0], [1.0, 1.0], [2.0, 4.0], [3.0, 3.0]]
    assert seen_tokens.rows(weight).tolist() == [[1.0, 1.0], [3.0, 3.0], [2.0, 4.0]]
    assert seen_tokens.last_count == 2


@pytest.mark.parametrize(("seen", "rows"), [(10, 64), (63, 64), (64, 128), (191, 192), (192, 193), (200, 200)])
def test_the_number_of_rows_is_aligned_where_enough_tokens_are_unseen(seen: int, rows: int) -> None:
    seen_tokens = make(range(seen), 200)
    assert len(seen_tokens.ids) == rows == len(set(seen_tokens.row_of.tolist()))
    assert seen_tokens.last_count == 200 - rows + 1
    weight = torch.randn(200, 3)
    seen_tokens.equalize(weight)
    assert torch.equal(seen_tokens.rows(weight)[seen_tokens.row_of], weight)


def test_rows_of_given_weights_are_shared_only_where_they_are_equal() -> None:
    before, seen = np.arange(200) < 40, np.arange(200) % 3 == 0  # 25 unseen tokens had rows of their own
    weight = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    SeenTokens(torch.from_numpy(before)).equalize(weight)
    kept = keep_rows(seen, weight, before)
    assert kept[:63].all() and np.array_equal(kept[63:], seen[63:])
    assert SeenTokens(torch.from_numpy(kept)).are_equal(weight)
    weight[150] += 1  # the mask is of other weights
    assert keep_rows(seen, weight, before).all() and keep_rows(seen, weight, None).all()
