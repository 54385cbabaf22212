"""Initial weights from the training text's bigrams, which save a small training most of its steps.

Token embedding and output projection factor the pairs' log probability ratios, as word embeddings factor pointwise
mutual information (Levy & Goldberg 2014), and are then fitted to Kneser-Ney's probabilities (Kneser & Ney 1995). The
first block's heads look one, two, three ... tokens back; what they add is one step of Newton's method from the bigram
model, with the curvature factored in two as in K-FAC (Martens & Grosse 2015). All else in the blocks adds nothing yet
(Zhang et al. 2019, "Fixup").

Shapes: N tokens of the text, M different ones, P different pairs, K rank, S tokens of a step of the fit, C d_model,
L dimensions for positions, T positions, H heads that add something, D head size, V vocabulary.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.progress import track
from gpt2.data.batches import Tokens
from gpt2.model.gpt2 import GPT2Model, TransformerBlock

COUNTED_TOKENS = 50_000_000  # sorting the pairs takes some 50 bytes for each
DISCOUNT = 0.75  # of each count, in favour of pairs that never occurred
UNSEEN_COUNT = 0.1  # of a token that never occurs
LEAST_SQUARES_POWER = 0.75  # of a token's count, as its weight
FACTOR_RIDGE, OUTPUT_RIDGE, EMBEDDING_RIDGE = 1e-3, 1.0, 0.3  # of the mean variance, added to each
FIT_STEPS, FIT_TOKENS = 60, 1024
BEFORE_RATE, AFTER_RATE, WARMUP_STEPS = 0.01, 0.1, 5  # of Adam's; the rates fall to zero
POSITION_FRACTION = 6  # one dimension in so many is for positions
RESERVED = 2  # dimensions: the mean's, which layer norm takes away, and the unigrams'
MOST_HEADS = 6  # tokens farther back tell little, and the covariance grows with the square of the heads


@torch.no_grad()
def initialize_from_bigrams(model: GPT2Model, tokens: Tokens) -> None:
    """Initialize a model of untied weights and C >= 3 from a text's tokens (N,), at most the first COUNTED_TOKENS.

    Computes on a CUDA device if the model is there, else on the CPU, and draws from PyTorch's generator.
    """
    device = model.output_projection.weight.device
    with device if device.type == "cuda" else torch.device("cpu"):
        _initialize(model, torch.tensor(tokens[:COUNTED_TOKENS].astype(np.int64)))


def _initialize(model: GPT2Model, tokens: Tensor) -> None:
    vocab_size, width = model.output_projection.weight.shape
    seen, text = torch.unique(tokens, return_inverse=True)
    blocks = [block for block in model.transformer_blocks if isinstance(block, TransformerBlock)]
    position_dims = min(width // POSITION_FRACTION, width // blocks[0].attention.n_heads) // 2 * 2  # L
    rank = min(width - RESERVED - position_dims, len(seen))  # K
    bigrams = count_bigrams(text, len(seen))
    before, after, log_frequencies = _fit(bigrams, *_factors(bigrams, rank))
    unseen_frequency = UNSEEN_COUNT / len(bigrams.probability.values())
    unigrams = torch.full((vocab_size,), math.log(unseen_frequency)).index_copy(0, seen, log_frequencies)

    # An orthonormal basis of the residual stream, whose first direction is the mean's.
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q.T  # (C, C)
    unigram_axis, position_axes = basis[1], basis[RESERVED:][:position_dims]
    token_axes = basis[RESERVED + position_dims :][:rank]
    token_norm = math.sqrt(width - position_dims)  # with a position's the norm that layer norm gives, sqrt(C)
    embedding = F.normalize(torch.randn(vocab_size, rank), dim=1).index_copy(0, seen, before)
    embedding = token_norm * embedding @ token_axes
    projection = unigrams.sub(unigrams.mean())[:, None] * unigram_axis / math.sqrt(width)
    projection[seen] += after @ token_axes / token_norm
    bias = unigram_axis * math.sqrt(width)

    model.token_embedding.weight.copy_(embedding)
    model.output_projection.weight.copy_(projection)
    model.layer_norm.bias.copy_(bias)
    for block in blocks:
        block.attention.w_o.weight.zero_()
        block.feed_forward.linear2.weight.zero_()
    if position_dims:
        model.position_embedding.weight.copy_(_look_back(blocks[0], position_axes, model.max_len))
        _add_newton_step(blocks[0], text, embedding[seen], bias, projection[seen])


class Bigrams(NamedTuple):
    """A text's pairs, with Kneser-Ney's p(second | first) = probability + backoff[first] * continuation[second]."""

    probability: Tensor  # (M, M), sparse
    backoff: Tensor  # (M,)
    continuation: Tensor  # (M,), the fraction of the different pairs that end in a token
    counts: Tensor  # (M,), how often a token is followed by any

    def after(self, tokens: Tensor) -> Tensor:
        """Return the probabilities (S, M) of all that may follow different tokens (S,)."""
        rows = self.backoff[tokens, None] * self.continuation
        row_of = torch.full_like(self.counts, -1, dtype=torch.long).index_copy_(0, tokens, torch.arange(len(tokens)))
        (first, second), probability = self.probability.indices(), self.probability.values()
        pairs = (row_of[first] >= 0).nonzero()[:, 0]
        return rows.index_put_((row_of[first[pairs]], second[pairs]), probability[pairs], accumulate=True)


def count_bigrams(text: Tensor, different: int) -> Bigrams:
    """Count the pairs of a text (N,) of ids below `different`, M."""
    first, second, pair_counts = _count_pairs(text[:-1], text[1:], different)  # (P,)
    counts = torch.bincount(text[:-1], minlength=different).float().clamp(min=1)
    backoff = DISCOUNT * torch.bincount(first, minlength=different) / counts
    continuation = torch.bincount(second, minlength=different).float().clamp(min=UNSEEN_COUNT)
    probability = _sparse(first, second, (pair_counts - DISCOUNT) / counts[first], different)
    return Bigrams(probability, backoff, continuation / continuation.sum(), counts)


def _factors(bigrams: Bigrams, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (M, K) and (M, K) of the pairs' log probability ratios to the back-off.

    Rows of the first have norm 1, since layer norm takes their norm away; the second is fitted to them.
    """
    (first, second), counts = bigrams.probability.indices(), bigrams.counts
    ratio = torch.log1p(bigrams.probability.values() / bigrams.backoff[first] / bigrams.continuation[second])  # (P,)
    scaled = _sparse(first, second, ratio * counts.sqrt()[first], len(counts))
    left, singular_values, _ = torch.svd_lowrank(scaled, q=rank)
    before = F.normalize(left * singular_values.sqrt(), dim=1)
    weights = counts**LEAST_SQUARES_POWER
    gram = _with_ridge(before.T @ (before * weights[:, None]), FACTOR_RIDGE)  # (K, K)
    moments = _sparse(second, first, ratio * weights[first], len(counts)) @ before  # (M, K)
    return before, torch.linalg.solve(gram, moments.T).T


@torch.enable_grad()
def _fit(bigrams: Bigrams, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors (M, K), (M, K) and log frequencies (M,) fitted to Kneser-Ney's probabilities, from factors."""
    before, after, bias = (x.clone().requires_grad_() for x in (before, after, bigrams.continuation.log()))
    groups = [{"params": [before, bias], "rate": BEFORE_RATE}, {"params": [after], "rate": AFTER_RATE}]
    optimizer = torch.optim.Adam(groups, fused=True)
    for step in track(range(FIT_STEPS), "fit bigrams"):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / FIT_STEPS)
        tokens = torch.multinomial(bigrams.counts, min(FIT_TOKENS, len(bigrams.counts)))  # (S,)
        logits = F.normalize(before[tokens], dim=1) @ after.T + bias  # (S, M)
        F.cross_entropy(logits, bigrams.after(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return F.normalize(before.detach(), dim=1), after.detach(), bias.detach()


def _look_back(block: TransformerBlock, position_axes: Tensor, max_len: int) -> Tensor:
    """Let head h attend to the token h + 1 places back, by queries turned back so far; return positions (T, C).

    Positions are waves along position_axes (L, C) (Vaswani et al. 2017, section 3.5), of mean square 1.
    """
    attention, dims = block.attention, len(position_axes)
    angles = torch.logspace(math.log10(math.pi / max_len), math.log10(0.9 * math.pi), dims // 2)  # (L / 2,) a position
    queries, keys = (x.weight.zero_().unflatten(0, (attention.n_heads, -1)) for x in (attention.w_q, attention.w_k))
    for head in range(attention.n_heads):
        cosine, sine = ((head + 1) * angles).cos().diag(), ((head + 1) * angles).sin().diag()
        turn = torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)])  # (L, L)
        queries[head, :dims], keys[head, :dims] = turn @ position_axes, position_axes
    waves = torch.arange(max_len)[:, None] * angles
    return math.sqrt(2) * torch.cat([waves.cos(), waves.sin()], 1) @ position_axes


def _add_newton_step(block: TransformerBlock, text: Tensor, embedding: Tensor, bias: Tensor, rows: Tensor) -> None:
    """Let the heads add to the residual stream what the tokens that they see tell of the next one.

    So far the logits (M, M) are (embedding + bias) @ rows.T, of embedding and output rows (M, C), and bias (C,). The
    step is the loss's gradient by a matrix from the embeddings seen to the residual stream, times the inverse
    covariances of the output rows, as the model draws them, and of the embeddings. Each head keeps rank D of it.
    """
    width, heads = embedding.shape[1], min(block.attention.n_heads, MOST_HEADS)
    frequencies = torch.bincount(text, minlength=len(embedding)) / len(text)  # (M,)
    mean = frequencies @ embedding  # (C,)
    expected, output_covariance = _expected_rows(embedding + bias, rows, frequencies)
    gradient, covariance = _moments(text, embedding - mean, expected, rows, heads)
    output_covariance = _with_ridge(output_covariance, OUTPUT_RIDGE)  # (C, C)
    covariance = _with_ridge(covariance, EMBEDDING_RIDGE)  # (H * C, H * C)
    step = torch.linalg.solve(output_covariance, torch.linalg.solve(covariance, gradient, left=False))  # (C, H * C)
    outs = block.attention.w_o.weight.unflatten(1, (block.attention.n_heads, -1))  # (C, n_heads, D)
    values = block.attention.w_v.weight.unflatten(0, (block.attention.n_heads, -1))  # (n_heads, D, C)
    for head, matrix in enumerate(step.split(width, 1)):
        left, gains, right = torch.linalg.svd(matrix)
        scale = gains[: outs.shape[2]].sqrt()  # (D,)
        outs[:, head] = left[:, : len(scale)] * scale
        values[head] = scale[:, None] * right[: len(scale)]
    block.layer_norm1.bias.copy_(-mean)


def _expected_rows(hidden_states: Tensor, rows: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean output row (M, C) after each token, and the rows' covariance (C, C) about it over a text."""
    expected, drawn = torch.empty_like(hidden_states), torch.zeros_like(frequencies)
    for chunk in track(torch.arange(len(hidden_states)).split(FIT_TOKENS), "expected rows"):
        probabilities = (hidden_states[chunk] @ rows.T).softmax(-1)  # (S, M)
        expected[chunk] = probabilities @ rows
        drawn += frequencies[chunk] @ probabilities
    second_moment = rows.T @ (rows * drawn[:, None])
    return expected, second_moment - expected.T @ (expected * frequencies[:, None])


def _moments(text: Tensor, embedding: Tensor, expected: Tensor, rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the gradient (C, H * C) of the likelihood, and the covariance (H * C, H * C) of what H heads see."""

    def seen(back: int) -> Tensor:
        """Return each token's fraction of the text times the mean embedding of the token so far back: (M, C)."""
        tokens, earlier, counts = _count_pairs(text, text.roll(back), len(embedding))  # the end before the beginning
        return _sparse(tokens, earlier, (counts / len(text)).to(embedding), len(embedding)) @ embedding

    means = [seen(back) for back in track(range(heads + 2), "mean embeddings")]
    gradient = [rows.T @ means[head + 2] - expected.T @ means[head + 1] for head in range(heads)]
    lags = [embedding.T @ means[lag] for lag in range(heads)]  # (C, C) of a token and one `lag` before it
    covariance = [[lags[k - h] if k >= h else lags[h - k].T for k in range(heads)] for h in range(heads)]
    return torch.cat(gradient, 1), torch.cat([torch.cat(row, 1) for row in covariance])


def _count_pairs(first: Tensor, second: Tensor, different: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the different pairs (P,), (P,) of tokens (N,) and (N,), ordered by the first, and their counts (P,)."""
    pairs, counts = torch.unique(first * different + second, return_counts=True)
    return pairs // different, pairs % different, counts


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    indices = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(indices, values, (size, size), check_invariants=True).coalesce()


def _with_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """Return a covariance with that fraction of its mean variance added to each variance, for a stable inverse."""
    return matrix + ridge * matrix.diagonal().mean().clamp(min=1e-6) * torch.eye(len(matrix))
