"""Initial weights from the training text's bigrams.

The matrix of each pair's surprise, its log probability ratio to Kneser-Ney's back-off (Kneser & Ney 1995), is factored
as word embeddings factor pointwise mutual information (Levy & Goldberg 2014): one factor becomes the token embedding,
the other the output projection. Both are then fitted to Kneser-Ney's probabilities, so that a row of logits learns from
all successors of a token, not from one place in the text. The first block's heads look one, two, three ... tokens back
(previous_token_heads.py). All else in the blocks adds nothing to the residual stream yet (Zhang et al. 2019, "Fixup").

Shapes: N tokens of the text, M different ones among them, P different pairs, K rank, S tokens of a step of the fit,
L dimensions for positions, C d_model, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.data.batches import Tokens
from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.training.previous_token_heads import (
    add_what_is_seen,
    count_pairs,
    look_back,
    position_waves,
    sparse_matrix,
    with_ridge,
)

COUNTED_TOKENS = 50_000_000  # sorting the pairs takes some 50 bytes for each
DISCOUNT = 0.75  # of each count, in favour of pairs that never occurred
UNSEEN = 0.1  # the count of a token that never occurs
LEAST_SQUARES_POWER = 0.75  # of a token's count, as its weight
RIDGE = 1e-3
FIT_STEPS, FIT_TOKENS = 60, 1024
BEFORE_RATE, AFTER_RATE, WARMUP_STEPS = 0.01, 0.1, 5  # of Adam's; the rates fall to zero
POSITION_SHARE = 6  # one dimension in so many is for positions
SPARED = 2  # dimensions: the mean's, which layer norm takes away, and the unigrams'


@torch.no_grad()
def start_from_bigrams(model: GPT2Model, tokens: Tokens) -> None:
    """Initialize a model on any device from a text's tokens (N,), at most the first COUNTED_TOKENS.

    C must be 3 or more, and the weights not tied. Computes on a CUDA device if the model is there, else on the CPU, and
    draws from PyTorch's generator.
    """
    device = model.output_projection.weight.device
    computed_on = device if device.type == "cuda" else torch.device("cpu")
    with computed_on:
        _start_from_bigrams(model, torch.tensor(tokens[:COUNTED_TOKENS].astype(np.int64)))


def _start_from_bigrams(model: GPT2Model, tokens: Tensor) -> None:
    vocab_size, width = model.output_projection.weight.shape
    seen, text = torch.unique(tokens, return_inverse=True)
    bigrams = count_bigrams(text, len(seen))
    blocks = [block for block in model.transformer_blocks if isinstance(block, TransformerBlock)]
    head_size = width // blocks[0].attention.n_heads
    position_dims = min(width // POSITION_SHARE, head_size) // 2 * 2  # L
    rank = min(width - SPARED - position_dims, len(seen))
    before, after, seen_log_counts = _fit(bigrams, *_factors(bigrams, rank))
    log_counts = torch.full((vocab_size,), math.log(UNSEEN))
    log_counts[seen] = seen_log_counts

    # An orthonormal basis of the residual stream, whose first direction is the mean's.
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q.T  # (C, C)
    unigram_axis, position_axes = basis[1], basis[SPARED:][:position_dims]
    token_axes = basis[SPARED + position_dims :][:rank]
    token_size = math.sqrt(width - position_dims)  # with a position's the length that layer norm gives, sqrt(C)
    embedding = F.normalize(torch.randn(vocab_size, rank), dim=1)
    embedding[seen] = before
    embedding = token_size * embedding @ token_axes
    model.token_embedding.weight.copy_(embedding)
    projection = log_counts.sub(log_counts.mean())[:, None] * unigram_axis / math.sqrt(width)
    projection[seen] += after @ token_axes / token_size
    model.output_projection.weight.copy_(projection)
    bias = unigram_axis * math.sqrt(width)
    model.layer_norm.bias.copy_(bias)
    for block in blocks:
        block.attention.w_o.weight.zero_()
        block.feed_forward.linear2.weight.zero_()
    if position_dims:
        model.position_embedding.weight.copy_(position_waves(position_dims, model.max_len) @ position_axes)
        look_back(blocks[0].attention, position_axes, model.max_len)
        add_what_is_seen(blocks[0], text, embedding[seen], bias, projection[seen])


@dataclass(frozen=True)
class Bigrams:
    """What follows what in a text, its pairs ordered by their first token.

    Kneser-Ney's p(second | first) = probability + backoff[first] * continuation_probability[second].
    """

    first: Tensor  # (P,)
    second: Tensor  # (P,)
    probabilities: Tensor  # (P,), what the pair's own count gives
    counts: Tensor  # (M,), how often a token is followed by any
    continuation_counts: Tensor  # (M,), how many different tokens go before a token
    backoff: Tensor  # (M,)

    @property
    def continuation_probabilities(self) -> Tensor:
        """Kneser-Ney's lower-order probabilities (M,): each token's share of the different pairs."""
        return self.continuation_counts / self.continuation_counts.sum()

    def after(self, tokens: Tensor) -> Tensor:
        """Return the probabilities (S, M) of all that may follow tokens (S,)."""
        found = self.backoff[tokens, None] * self.continuation_probabilities  # (S, M)
        starts, ends = (torch.searchsorted(self.first, tokens, right=right).tolist() for right in (False, True))
        for row, start, end in zip(found, starts, ends, strict=True):
            row[self.second[start:end]] += self.probabilities[start:end]
        return found


def count_bigrams(text: Tensor, different: int) -> Bigrams:
    """Count the pairs of a text (N,) of ids below `different`, M."""
    first, second, pair_counts = count_pairs(text[:-1], text[1:], different)  # (P,)
    counts = torch.bincount(text[:-1], minlength=different).float().clamp(min=1)
    continuation_counts = torch.bincount(second, minlength=different).float().clamp(min=UNSEEN)
    backoff = DISCOUNT * torch.bincount(first, minlength=different) / counts
    return Bigrams(first, second, (pair_counts - DISCOUNT) / counts[first], counts, continuation_counts, backoff)


def _factors(bigrams: Bigrams, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (M, K) and (M, K) whose products approximate the pairs' surprise.

    Rows of the first have length 1, since layer norm takes their length away; the second is fitted to them.
    """
    first, second, counts = bigrams.first, bigrams.second, bigrams.counts
    without_pair = bigrams.backoff[first] * bigrams.continuation_probabilities[second]
    surprise = torch.log1p(bigrams.probabilities / without_pair)  # (P,)
    scaled = sparse_matrix(first, second, surprise * counts.sqrt()[first], len(counts))
    left, singular_values, _ = torch.svd_lowrank(scaled, q=rank)
    before = F.normalize(left * singular_values.sqrt(), dim=1)
    weights = counts**LEAST_SQUARES_POWER
    gram = with_ridge(before.T @ (before * weights[:, None]), RIDGE)  # (K, K)
    moments = sparse_matrix(second, first, surprise * weights[first], len(counts)) @ before  # (M, K)
    return before, torch.linalg.solve(gram, moments.T).T


@torch.enable_grad()
def _fit(bigrams: Bigrams, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors (M, K), (M, K) and log counts (M,) fitted to the bigrams, from first factors."""
    before, after, bias = (x.clone().requires_grad_() for x in (before, after, bigrams.continuation_counts.log()))
    groups = [{"params": [before, bias], "rate": BEFORE_RATE}, {"params": [after], "rate": AFTER_RATE}]
    optimizer = torch.optim.Adam(groups, fused=True)
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / FIT_STEPS)
        tokens = torch.multinomial(bigrams.counts, min(FIT_TOKENS, len(bigrams.counts)))  # (S,)
        logits = F.normalize(before[tokens], dim=1) @ after.T + bias  # (S, M)
        F.cross_entropy(logits, bigrams.after(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return F.normalize(before.detach(), dim=1), after.detach(), bias.detach()
