import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2.data.batches import Shards
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.evaluation.perplexity import mean_loss, predictions, sliding_windows, summarize
from gpt2.model.gpt2 import GPT2Model

MAX_LEN, END_OF_TEXT_ID = 6, VOCAB_SIZE - 1


@given(count=st.integers(1, 200), max_len=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once_with_the_context_there_is(count: int, max_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, max_len))
    scored: list[int] = []
    for start, end, first in sliding_windows(count, max_len, stride):
        assert start >= 0 and end <= count
        assert end - start == min(max_len, end)  # never less context than fits
        assert 1 <= end - first <= (stride if scored else max_len)
        scored += range(first, end)
    assert scored == list(range(count))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., GPT2Model]) -> GPT2Model:
    model = make_model(vocab_size=VOCAB_SIZE, max_len=MAX_LEN, d_model=8, n_layers=1)
    torch.nn.init.normal_(model.output_projection.weight)
    torch.nn.init.normal_(model.token_embedding.weight)
    return model


def naive_logits(model: GPT2Model, tokens: np.ndarray, stride: int) -> Iterator[Tensor]:
    """Yield the logits (V,) of one token at a time, each from a forward pass of its own."""
    for i in range(len(tokens)):
        stop = MAX_LEN if i < MAX_LEN else MAX_LEN + (1 + (i - MAX_LEN) // stride) * stride
        context = [END_OF_TEXT_ID, *tokens][max(0, min(stop, len(tokens)) - MAX_LEN) : i + 1]
        with torch.no_grad():
            yield model(torch.tensor([[int(token) for token in context]]))[0, -1]


def draw_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, VOCAB_SIZE, count).astype(np.uint16)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("stride", [1, 4, MAX_LEN])
@pytest.mark.parametrize("count", [1, MAX_LEN - 1, MAX_LEN, 23])
def test_predictions_equal_those_of_one_token_at_a_time(
    model: GPT2Model, count: int, stride: int, batch_size: int
) -> None:
    tokens = draw_tokens(count)
    logits, targets = map(torch.cat, zip(*predictions(model, tokens, stride, batch_size), strict=True))
    expected = torch.stack(list(naive_logits(model, tokens, stride)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert targets.tolist() == tokens.tolist()
    loss = F.cross_entropy(expected.double(), targets).item()
    assert mean_loss(model, tokens, stride, batch_size) == pytest.approx(loss, abs=1e-6)


def test_a_split_in_several_files_has_the_loss_of_one(model: GPT2Model) -> None:
    tokens = draw_tokens(23)
    shards = Shards(np.split(tokens, [5, 6, 20]))
    assert mean_loss(model, shards, 4, 3) == mean_loss(model, tokens, 4, 3)


def test_a_split_is_read_a_batch_at_a_time(model: GPT2Model) -> None:
    longest = 0

    class Watched(np.ndarray):
        def __getitem__(self, index: Any) -> Any:
            nonlocal longest
            found = super().__getitem__(index)
            longest = max(longest, np.size(found))
            return found

    tokens = draw_tokens(500)
    assert mean_loss(model, tokens.view(Watched), 2, 3) == mean_loss(model, tokens, 2, 3)
    assert longest == MAX_LEN


def test_stride_beyond_the_context_is_refused(
    model: GPT2Model, error_line: Callable[[Callable[[], object]], str]
) -> None:
    line = error_line(lambda: mean_loss(model, draw_tokens(40), MAX_LEN + 1, 8))
    assert "stride 7 is more than the model's max_len 6" in line


def test_a_loss_that_is_not_finite_is_refused(
    make_model: Callable[..., GPT2Model], error_line: Callable[[Callable[[], object]], str]
) -> None:
    broken = make_model(vocab_size=VOCAB_SIZE, max_len=MAX_LEN)
    broken.output_projection.weight.data[:] = math.inf
    assert "the loss is not finite" in error_line(lambda: mean_loss(broken, draw_tokens(9), 2, 8))


def test_summary_of_a_loss_known_beforehand() -> None:
    bits = 1.75  # per token
    assert summarize(bits * math.log(2), tokens=4, text_bytes=14) == {
        "loss": bits * math.log(2),
        "perplexity": pytest.approx(2**1.75),
        "bits_per_byte": pytest.approx(0.5),
        "tokens": 4,
        "bytes": 14,
    }
