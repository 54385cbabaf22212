import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model.gpt2 import GPT2Model
from gpt2.training.bigrams import count_bigrams, initialize_from_bigrams

MakeModel = Callable[..., GPT2Model]
VOCABULARY, SEEN = 61, 50


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Tokens below SEEN, each followed by one of three, by chance."""
    generator = np.random.default_rng(1)
    tokens = [0]
    for _ in range(20_000):
        tokens.append((tokens[-1] * 7 + int(generator.choice(3, p=(0.6, 0.3, 0.1)))) % SEEN)
    return np.array(tokens, dtype=np.uint16)


def loss_of(model: GPT2Model, tokens: np.ndarray) -> float:
    windows = torch.from_numpy(tokens[: 13 * 300].astype(np.int64)).view(300, 13)[:, : model.max_len + 1]
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()


def entropy(counts: Tensor) -> float:
    """Mean entropy in nats of the rows' distributions, weighed by their sums."""
    return -(counts / counts.sum() * (counts / counts.sum(-1, keepdim=True)).clamp(min=1e-9).log()).sum().item()


def test_bigrams_have_kneser_neys_probabilities() -> None:
    bigrams = count_bigrams(torch.tensor([0, 1, 0, 1, 0, 2, 2]), 3)
    found = bigrams.after(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert found[1, 1].item() == pytest.approx((2 - 0.75) / 3 + 0.75 * 2 / 3 * 1 / 4)
    assert found[0, 2].item() == pytest.approx((1 - 0.75) / 1 + 0.75 * 1 / 1 * 2 / 4)
    assert found[2, 2].item() == pytest.approx(0.75 * 1 / 2 * 2 / 4)  # never seen


def test_starts_near_the_bigrams_entropy(make_model: MakeModel, text: np.ndarray) -> None:
    model = make_model(d_model=48)
    first = loss_of(model, text)
    initialize_from_bigrams(model, text)
    counts = torch.zeros(SEEN, SEEN).index_put_(
        (torch.from_numpy(text[:-1].astype(np.int64)), torch.from_numpy(text[1:].astype(np.int64))),
        torch.ones(len(text) - 1),
        accumulate=True,
    )
    assert first == pytest.approx(math.log(VOCABULARY), abs=0.1)
    assert loss_of(model, text) < entropy(counts) + 0.15 < entropy(counts.sum(0)) - 1


def test_few_dimensions_still_help(make_model: MakeModel, text: np.ndarray) -> None:
    losses = []
    for width in (4, 8, 16):
        model = make_model(d_model=width)
        initialize_from_bigrams(model, text)
        losses.append(loss_of(model, text))
    assert losses == sorted(losses, reverse=True) and losses[0] < math.log(SEEN)


def test_is_a_function_of_the_seed_and_the_text(make_model: MakeModel, text: np.ndarray) -> None:
    states = []
    for seed, tokens in ((1, text), (1, text), (2, text), (1, text[::-1].copy())):
        model = make_model()
        torch.manual_seed(seed)
        initialize_from_bigrams(model, tokens)
        states.append(model.output_projection.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2]) and not torch.equal(states[0], states[3])


def test_the_weights_may_be_on_another_device(make_model: MakeModel, text: np.ndarray) -> None:
    initialize_from_bigrams(make_model(d_model=48).to("meta"), text)


@pytest.mark.parametrize("tokens", [[5] * 20, [1, 2], list(range(13))], ids=["one token", "one pair", "no repetition"])
def test_odd_texts_leave_finite_weights(make_model: MakeModel, tokens: list[int]) -> None:
    model = make_model(d_model=4)
    initialize_from_bigrams(model, np.array(tokens, dtype=np.uint16))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(model(torch.tensor([[0, 60]]))).all()
