"""What a text lacks is one row of the loss, and no number is another for it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2.model import seen_tokens as text_vocabulary
from gpt2.model.seen_tokens import TextVocabulary
from gpt2.training.loss import linear_cross_entropy

CPU = torch.device("cpu")
VOCAB_SIZE = 12


@pytest.mark.parametrize("seen", [[3], [0, 1, 4, 11], range(VOCAB_SIZE - 1), range(VOCAB_SIZE)])
@pytest.mark.parametrize("read", [2, 100])
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(
    seen: list[int], read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_vocabulary, "READ_TOKENS", read)
    text = TextVocabulary.of_text(np.array([*seen, *seen], dtype=np.uint16), VOCAB_SIZE, CPU)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, 5, generator=generator, dtype=torch.float64)
    text.make_unseen_equal(weight)
    weight.requires_grad_()
    targets = torch.tensor([*seen])[torch.randint(len(seen), (7,), generator=generator)]

    found = linear_cross_entropy(features, text.rows(weight), text.row_of[targets], text.last_count)
    expected = F.cross_entropy(features @ weight.T, targets)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(3 * found, (features, weight))
    for gradient, one in zip(gradients, torch.autograd.grad(3 * expected, (features, weight)), strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-10, rtol=0)


def test_seen_rows_stay_and_unseen_ones_get_their_mean() -> None:
    text = TextVocabulary.of_text(np.array([1, 3], dtype=np.uint16), 4, CPU)
    weight = torch.tensor([[0.0, 8.0], [1.0, 1.0], [4.0, 0.0], [3.0, 3.0]])
    text.make_unseen_equal(weight)
    assert weight.tolist() == [[2.0, 4.0], [1.0, 1.0], [2.0, 4.0], [3.0, 3.0]]
    assert text.rows(weight).tolist() == [[1.0, 1.0], [3.0, 3.0], [2.0, 4.0]]
    assert text.last_count == 2


@pytest.mark.parametrize(("seen", "rows"), [(10, 64), (63, 64), (64, 128), (191, 192), (192, 193), (200, 200)])
def test_the_number_of_rows_is_good_for_products_where_enough_tokens_are_unseen(seen: int, rows: int) -> None:
    text = TextVocabulary.of_text(np.arange(seen, dtype=np.uint16), 200, CPU)
    assert len(text.ids) == rows == len(set(text.row_of.tolist())) and text.last_count == 200 - rows + 1
    weight = torch.randn(200, 3)
    text.make_unseen_equal(weight)
    assert torch.equal(text.rows(weight)[text.row_of], weight)


def test_rows_that_training_has_moved_apart_do_not_hide_the_equal_ones() -> None:
    text = TextVocabulary.of_text(np.arange(100, dtype=np.uint16), 200, CPU)
    weight = torch.randn(200, 3)
    text.make_unseen_equal(weight)
    unseen_alone = text.ids[100:-1]
    weight[unseen_alone, 1] *= 1 + 1e-6
    assert TextVocabulary.of_weight(weight).ids.tolist() == [*range(100), *unseen_alone, *text.ids[-1:]]


def test_a_weight_tells_what_its_text_lacked() -> None:
    weight = torch.tensor([[1.0, 2.0], [5.0, 6.0], [5.0, 7.0], [5.0, 6.0], [3.0, 4.0]])
    text = TextVocabulary.of_weight(weight)
    assert text.unseen.tolist() == [1, 3] and text.last_count == 2
    rows = text.rows(weight)
    assert torch.equal(rows[text.row_of], weight)
    assert torch.equal(text.all_logits(rows.T), weight.T)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_weight_of_different_rows_was_trained_on_all(value: float) -> None:
    weight = torch.arange(10.0).view(5, 2)
    weight[3] = value
    text = TextVocabulary.of_weight(weight)
    assert text.last_count == 1 and text.row_of.tolist() == [0, 1, 2, 3, 4]
