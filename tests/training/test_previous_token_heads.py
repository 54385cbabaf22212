from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.training.bigrams import MOST_HEADS, _expected_rows, _moments, initialize_from_bigrams

MakeModel = Callable[..., GPT2Model]
SEEN = 20


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Tokens below SEEN, mostly with the tens of the token before and the units of the third before."""
    generator = np.random.default_rng(1)
    tokens = [0, 1, 2]
    for _ in range(20_000):
        chance = int(generator.integers(SEEN)) if generator.random() < 0.2 else None
        tokens.append((tokens[-1] // 10 * 10 + tokens[-3] % 10) if chance is None else chance)
    return np.array(tokens, dtype=np.uint16)


def first_block(model: GPT2Model) -> TransformerBlock:
    return next(one for one in model.modules() if isinstance(one, TransformerBlock))


def test_each_head_looks_one_token_farther_back(make_model: MakeModel, text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=3)
    initialize_from_bigrams(model, text)
    block = first_block(model)
    tokens = torch.from_numpy(text[: model.max_len].astype(np.int64))
    x = block.layer_norm1(model.token_embedding(tokens) + model.position_embedding.weight)
    queries, keys = (one(x).unflatten(1, (3, -1)).transpose(0, 1) for one in (block.attention.w_q, block.attention.w_k))
    scores = (queries @ keys.mT).masked_fill(torch.ones(model.max_len, model.max_len).triu(1).bool(), -torch.inf)
    for head in range(3):
        first = head + 1  # that can look so far back
        places = torch.arange(first, model.max_len)
        assert torch.equal(scores[head].argmax(1)[first:], places - first), head


def test_only_the_first_heads_add_something(make_model: MakeModel, text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=MOST_HEADS + 2)
    initialize_from_bigrams(model, text)
    added = first_block(model).attention.w_o.weight.unflatten(1, (MOST_HEADS + 2, -1)).abs().amax((0, 2))
    assert added[:MOST_HEADS].all() and not added[MOST_HEADS:].any()


def test_heads_tell_what_the_last_token_does_not(make_model: MakeModel, text: np.ndarray) -> None:
    model = make_model(d_model=96, n_heads=3)
    initialize_from_bigrams(model, text)
    windows = torch.from_numpy(text[:9600].astype(np.int64)).unfold(0, model.max_len + 1, model.max_len)

    def loss() -> float:
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()

    with_heads = loss()
    torch.nn.init.zeros_(first_block(model).attention.w_o.weight)
    assert with_heads < loss() - 0.5


def test_first_logits_are_of_the_last_tokens(make_model: MakeModel, text: np.ndarray) -> None:
    model = make_model(d_model=192, n_heads=3)  # 32 dimensions for positions
    initialize_from_bigrams(model, text)
    tokens = torch.from_numpy(text[: model.max_len].astype(np.int64))
    logits = model(tokens[None])[0, -1]
    moves = []
    for back in range(6):
        changed = tokens.clone()
        changed[-1 - back] = (changed[-1 - back] + 11) % SEEN
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
