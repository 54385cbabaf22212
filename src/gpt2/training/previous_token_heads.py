"""Heads that look one, two, three ... tokens back, started from how those tokens change what follows.

Positions are waves in dimensions of their own, and a head's queries are the waves turned back so far. What the heads
add to the residual stream is one step of Newton's method from a bigram model, the curvature factored in two as in K-FAC
(Martens & Grosse 2015): the loss's gradient by a matrix from the embeddings looked at to the residual stream, over the
whole text, times the inverse covariances of the output rows, as the bigram model draws them, and of the embeddings.
A head's size limits its matrix's rank: it keeps the part that lowers the loss most. Heads beyond MOST_HEADS add nothing
yet, since tokens so far back tell next to nothing and the covariance grows with the square of the heads.

Shapes: N tokens of the text, M different ones in the vocabulary of the text, C d_model, H heads that add something,
D head size, L dimensions for positions, T positions, S tokens computed at once.
"""

import math

import torch
from torch import Tensor

from gpt2.model.gpt2 import MultiHeadAttention, TransformerBlock

MOST_HEADS = 6
OUTPUT_RIDGE, EMBEDDING_RIDGE = 1.0, 0.3  # of the mean variance, added to each
TOKENS_AT_ONCE = 512


def position_waves(position_dims: int, max_len: int) -> Tensor:
    """Return cosines and sines of all positions (T, L), of mean square 1 (Vaswani et al. 2017, section 3.5)."""
    angles = torch.arange(max_len)[:, None] * _angles_per_position(position_dims, max_len)  # (T, L / 2)
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], 1)


def look_back(attention: MultiHeadAttention, position_axes: Tensor, max_len: int) -> None:
    """Let head h attend to the token h + 1 places back, given axes (L, C) along which positions are waves."""
    angles = _angles_per_position(len(position_axes), max_len)
    for weight in (attention.w_q.weight, attention.w_k.weight):
        weight.zero_()
    queries, keys = (
        x.weight.unflatten(0, (attention.n_heads, -1)) for x in (attention.w_q, attention.w_k)
    )  # each of (n_heads, D, C)
    for head in range(attention.n_heads):
        cosine, sine = ((head + 1) * angles).cos().diag(), ((head + 1) * angles).sin().diag()
        turn = torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)])  # (L, L)
        queries[head, : len(position_axes)] = turn @ position_axes
        keys[head, : len(position_axes)] = position_axes


def add_what_is_seen(
    block: TransformerBlock, text: Tensor, embedding: Tensor, bias: Tensor, output_rows: Tensor
) -> None:
    """Let such heads add to the residual stream what the tokens that they see tell of the next one.

    So far the model is one of the bigrams of a text (N,): its logits (M, M) are (embedding + bias) @ output_rows.T,
    of embedding and output_rows (M, C) and bias (C,).
    """
    frequencies = torch.bincount(text, minlength=len(embedding)) / len(text)  # (M,)
    mean = frequencies @ embedding  # (C,)
    expected, output_covariance = _expected_rows(embedding + bias, output_rows, frequencies)
    heads = min(block.attention.n_heads, MOST_HEADS)
    gradient, covariance = _moments(text, embedding - mean, expected, output_rows, heads)
    output_covariance = with_ridge(output_covariance, OUTPUT_RIDGE)  # (C, C)
    covariance = with_ridge(covariance, EMBEDDING_RIDGE)  # (H * C, H * C)
    step = torch.linalg.solve(output_covariance, torch.linalg.solve(covariance, gradient, left=False))  # (C, H * C)

    width = embedding.shape[1]
    output_root, embedding_root = _square_root(output_covariance), _square_root(covariance[:width, :width])
    outs = block.attention.w_o.weight.unflatten(1, (block.attention.n_heads, -1))  # (C, n_heads, D)
    values = block.attention.w_v.weight.unflatten(0, (block.attention.n_heads, -1))  # (n_heads, D, C)
    for head, matrix in enumerate(step.split(width, 1)):
        left, worth, right = torch.linalg.svd(output_root @ matrix @ embedding_root)
        rank = outs.shape[2]  # D
        scale = worth[:rank].sqrt()
        outs[:, head] = torch.linalg.solve(output_root, left[:, :rank] * scale)
        values[head] = torch.linalg.solve(embedding_root, scale[:, None] * right[:rank], left=False)
    block.layer_norm1.bias.copy_(-mean)


def _expected_rows(features: Tensor, output_rows: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean output row (M, C) after each token, and the rows' covariance (C, C) about it over a text."""
    expected, drawn = torch.empty_like(features), torch.zeros_like(frequencies)
    for start in range(0, len(features), TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        probabilities = (features[some] @ output_rows.T).softmax(-1)  # (S, M)
        expected[some] = probabilities @ output_rows
        drawn += frequencies[some] @ probabilities
    second_moment = output_rows.T @ (output_rows * drawn[:, None])
    return expected, second_moment - expected.T @ (expected * frequencies[:, None])


def _moments(
    text: Tensor, embedding: Tensor, expected: Tensor, output_rows: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient (C, H * C), of the likelihood, and the covariance (H * C, H * C) of what H heads see.

    The text's end is taken to go before its beginning, so that all are means over N positions.
    """

    def seen(back: int) -> Tensor:
        """Return for each token its share of the text, times the mean embedding of the token so far back: (M, C)."""
        tokens, earlier, counts = count_pairs(text, text.roll(back), len(embedding))
        return sparse_matrix(tokens, earlier, (counts / len(text)).to(embedding), len(embedding)) @ embedding

    means = [seen(back) for back in range(heads + 2)]
    gradient = [output_rows.T @ means[head + 2] - expected.T @ means[head + 1] for head in range(heads)]
    lags = [embedding.T @ means[lag] for lag in range(heads)]  # (C, C) of a token and one `lag` before it
    covariance = [[lags[k - h] if k >= h else lags[h - k].T for k in range(heads)] for h in range(heads)]
    return torch.cat(gradient, 1), torch.cat([torch.cat(row, 1) for row in covariance])


def count_pairs(first: Tensor, second: Tensor, different: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the different pairs (P,), (P,) of tokens (N,) and (N,), ordered by the first, and their counts (P,)."""
    pairs, counts = torch.unique(first * different + second, return_counts=True)
    return pairs // different, pairs % different, counts


def sparse_matrix(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return a sparse matrix (size, size) with the sum of the values of each row and column."""
    indices = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(indices, values, (size, size), check_invariants=True).coalesce()


def with_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """Return a covariance with such a part of its mean variance added to each variance, for a stable inverse."""
    variance = matrix.diagonal().mean().clamp(min=1e-6)
    return matrix + ridge * variance * torch.eye(len(matrix))


def _square_root(matrix: Tensor) -> Tensor:
    """Return the symmetric root of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


def _angles_per_position(position_dims: int, max_len: int) -> Tensor:
    """Return angles a position (L / 2,), from half a turn over the whole context to nearly half a turn a position."""
    return torch.logspace(math.log10(math.pi / max_len), math.log10(0.9 * math.pi), position_dims // 2)
