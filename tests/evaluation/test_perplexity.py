import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2.data.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE
from gpt2.evaluation.perplexity import predict, sliding_windows, summarize, token_losses
from gpt2.model.gpt2 import GPT2Model

MAX_LEN = 6


@given(count=st.integers(1, 200), max_len=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_once_with_the_context_there_is(count: int, max_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, max_len))
    scored: list[int] = []
    for window in sliding_windows(count, max_len, stride):
        end = window.start + window.length
        assert window.start >= 0 and window.length <= max_len and end <= count
        assert window.length == min(max_len, end)  # never less context than fits
        assert 1 <= window.scored <= (stride if scored else max_len)
        scored += range(end - window.scored, end)
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


@pytest.mark.parametrize("stride", [1, 4, MAX_LEN])
@pytest.mark.parametrize("count", [1, MAX_LEN - 1, MAX_LEN, 23])
def test_losses_and_predictions_equal_those_of_one_token_at_a_time(model: GPT2Model, count: int, stride: int) -> None:
    tokens = draw_tokens(count)
    losses = token_losses(model, tokens, stride, batch_size=2)
    assert losses.shape == (count,)
    for i, logits in enumerate(naive_logits(model, tokens, stride)):
        expected = F.cross_entropy(logits.double(), torch.tensor(int(tokens[i]))).float()
        torch.testing.assert_close(losses[i], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(predict(model, tokens, i, stride), logits, atol=1e-5, rtol=0)


def test_batch_size_does_not_change_the_losses(model: GPT2Model) -> None:
    losses = [token_losses(model, draw_tokens(40), 2, batch_size) for batch_size in (1, 3, 100)]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], atol=1e-5, rtol=0)


def test_stride_beyond_the_context_is_refused(
    model: GPT2Model, error_line: Callable[[Callable[[], object]], str]
) -> None:
    line = error_line(lambda: token_losses(model, draw_tokens(40), MAX_LEN + 1, 8))
    assert "stride 7 is more than the model's max_len 6" in line


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_have_no_summary(
    error_line: Callable[[Callable[[], object]], str], loss: float
) -> None:
    assert "the loss is not finite" in error_line(lambda: summarize(torch.tensor([1.0, loss]), 1))


def test_summary_of_losses_known_beforehand() -> None:
    half, quarter = math.log(2), math.log(4)  # one bit and two
    summary = summarize(torch.tensor([half, quarter, quarter, quarter]), text_bytes=14)
    assert summary == {
        "loss": pytest.approx(1.75 * half),
        "perplexity": pytest.approx(2**1.75),
        "bits_per_byte": pytest.approx(0.5),
        "tokens": 4,
        "bytes": 14,
    }
