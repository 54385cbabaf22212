from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gpt2.evaluation import mean_loss_of_text, sliding_windows
from gpt2.model import GPT2Model
from gpt2.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE

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


def naive_mean_loss(model: GPT2Model, tokens: np.ndarray, stride: int) -> float:
    """Score one token at a time, each in a forward pass of its own."""
    losses = []
    for i in range(len(tokens)):
        stop = MAX_LEN if i < MAX_LEN else MAX_LEN + (1 + (i - MAX_LEN) // stride) * stride
        context = [END_OF_TEXT_ID, *tokens][max(0, min(stop, len(tokens)) - MAX_LEN) : i + 1]
        with torch.no_grad():
            logits = model(torch.tensor([[int(token) for token in context]]))[0, -1]
        losses.append(F.cross_entropy(logits, torch.tensor(int(tokens[i]))).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [1, 4, MAX_LEN])
@pytest.mark.parametrize("count", [1, MAX_LEN - 1, MAX_LEN, 23])
def test_mean_loss_equals_that_of_one_token_at_a_time(model: GPT2Model, count: int, stride: int) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, count).astype(np.uint16)
    assert mean_loss_of_text(model, tokens, stride, batch_size=2) == pytest.approx(
        naive_mean_loss(model, tokens, stride), abs=1e-5
    )


def test_batch_size_does_not_change_the_mean_loss(model: GPT2Model) -> None:
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, 40).astype(np.uint16)
    losses = [mean_loss_of_text(model, tokens, 2, batch_size) for batch_size in (1, 3, 100)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
