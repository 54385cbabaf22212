import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.training.bigrams import MOST_HEADS, _expected_rows, _moments, count_bigrams, initialize_from_bigrams

MakeModel = Callable[..., GPT2Model]
VOCABULARY, SEEN, FEW = 61, 50, 20


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


@pytest.fixture(scope="module")
def skipping_text() -> np.ndarray:
    """Tokens below FEW, mostly with the tens of the token before and the units of the third before."""
    generator = np.random.default_rng(1)
    tokens = [0, 1, 2]
    for _ in range(20_000):
        chance = int(generator.integers(FEW)) if generator.random() < 0.2 else None
        tokens.append((tokens[-1] // 10 * 10 + tokens[-3] % 10) if chance is None else chance)
    return np.array(tokens, dtype=np.uint16)


def first_block(model: GPT2Model) -> TransformerBlock:
    return next(one for one in model.modules() if isinstance(one, TransformerBlock))


def test_each_head_looks_one_token_farther_back(make_model: MakeModel, skipping_text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=3)
    initialize_from_bigrams(model, skipping_text)
    block = first_block(model)
    tokens = torch.from_numpy(skipping_text[: model.max_len].astype(np.int64))
    x = block.layer_norm1(model.token_embedding(tokens) + model.position_embedding.weight)
    queries, keys = (one(x).unflatten(1, (3, -1)).transpose(0, 1) for one in (block.attention.w_q, block.attention.w_k))
    scores = (queries @ keys.mT).masked_fill(torch.ones(model.max_len, model.max_len).triu(1).bool(), -torch.inf)
    for head in range(3):
        first = head + 1  # that can look so far back
        places = torch.arange(first, model.max_len)
        assert torch.equal(scores[head].argmax(1)[first:], places - first), head


def test_only_the_first_heads_add_something(make_model: MakeModel, skipping_text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=MOST_HEADS + 2)
    initialize_from_bigrams(model, skipping_text)
    added = first_block(model).attention.w_o.weight.unflatten(1, (MOST_HEADS + 2, -1)).abs().amax((0, 2))
    assert added[:MOST_HEADS].all() and not added[MOST_HEADS:].any()


def test_heads_tell_what_the_last_token_does_not(make_model: MakeModel, skipping_text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=3)
    initialize_from_bigrams(model, skipping_text)
    windows = torch.from_numpy(skipping_text[:9600].astype(np.int64)).unfold(0, model.max_len + 1, model.max_len)

    def loss() -> float:
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()

    with_heads = loss()
    torch.nn.init.zeros_(first_block(model).attention.w_o.weight)
    assert with_heads < loss() - 0.5


def test_first_logits_are_of_the_last_tokens(make_model: MakeModel, skipping_text: np.ndarray) -> None:
    model = make_model(d_model=192, n_heads=3)  # 32 dimensions for positions
    initialize_from_bigrams(model, skipping_text)
    tokens = torch.from_numpy(skipping_text[: model.max_len].astype(np.int64))
    logits = model(tokens[None])[0, -1]
    moves = []
    for back in range(6):
        changed = tokens.clone()
        changed[-1 - back] = (changed[-1 - back] + 11) % FEW
        moves.append((model(changed[None])[0, -1] - logits).abs().max().item())
    assert min(moves[0], moves[2]) > 0.5, moves  # which the text is made of
    assert max(moves[4:]) < 0.3, moves  # which no head looks at


def test_moments_are_means_over_the_text() -> None:
    torch.manual_seed(1)
    tokens, heads = torch.randint(7, (40,)), 3
    embedding, rows = torch.randn(2, 7, 5, dtype=torch.float64)
    frequencies = torch.bincount(tokens, minlength=7) / 40
    probabilities = (embedding @ rows.T).softmax(-1)
    expected, output_covariance = _expected_rows(embedding, rows, frequencies.double())
    torch.testing.assert_close(expected, probabilities @ rows)
    covariances = [rows.T @ (torch.diag(p) - p[:, None] * p) @ rows for p in probabilities]
    torch.testing.assert_close(output_covariance, torch.stack([covariances[token] for token in tokens]).mean(0))

    gradient, covariance = _moments(tokens, embedding, expected, rows, heads)
    matrix = torch.zeros(5, heads * 5, dtype=torch.float64, requires_grad=True)
    seen = torch.cat([embedding[tokens.roll(1 + head)] for head in range(heads)], 1)  # (N, H * C)

    def likelihood(matrix: Tensor) -> Tensor:
        return -F.cross_entropy((embedding[tokens] + seen @ matrix.T) @ rows.T, tokens.roll(-1))

    torch.testing.assert_close(gradient, torch.autograd.grad(likelihood(matrix), matrix)[0])
    torch.testing.assert_close(covariance, seen.T @ seen / 40)
