"""Weights to start from, so that training begins as a bigram model which sees the tokens before.

What follows what in the training text fills the embeddings: the matrix of each pair's surprise over Kneser-Ney's
back-off (Kneser & Ney 1995) is factored, as word embeddings factor that of pointwise mutual information (Levy &
Goldberg 2014); one side becomes the token embedding, the other the output projection. Then both are fitted to
Kneser-Ney's probabilities, where one row of logits learns from all that ever followed a token, and not from a single
place of the text. Positions have dimensions of their own, by which the first block's heads look one, two, three ...
tokens back. The blocks have no part in the residual stream yet (Zhang et al. 2019, "Fixup"), so the first logits are
those of the factors.

Shapes: N tokens of the text, M different ones among them, P different pairs, K rank, S tokens of a step of the fit,
L dimensions for positions, T positions, C d_model, H heads, D head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.batches import Tokens
from gpt2.model import GPT2Model, MultiHeadAttention, TransformerBlock

COUNTED_TOKENS = 50_000_000  # sorting the pairs takes some 50 bytes for each
DISCOUNT = 0.75  # of each count, in favour of pairs that never occurred
UNSEEN = 0.1  # the count of a token that never occurs
LEAST_SQUARES_POWER = 0.75  # of a token's count, as its weight
RIDGE = 1e-3
FIT_STEPS, FIT_TOKENS = 60, 1024
BEFORE_RATE, AFTER_RATE, WARMUP_STEPS = 0.01, 0.1, 5  # of Adam's; the rates fall to zero
POSITION_SHARE = 6  # one dimension in so many is for positions
SPARED = 2  # dimensions: the mean's, which layer norm takes away, and the frequencies'


@torch.no_grad()
def start_from_bigrams(model: GPT2Model, tokens: Tokens) -> None:
    """Set the weights from a text's tokens (N,). C must be 3 or more, and the embeddings not tied.

    Draws from PyTorch's generator.
    """
    vocab_size, width = model.output_projection.weight.shape
    seen, text = torch.unique(torch.from_numpy(tokens[:COUNTED_TOKENS].astype(np.int64)), return_inverse=True)
    bigrams = count_bigrams(text, len(seen))
    blocks = [block for block in model.modules() if isinstance(block, TransformerBlock)]
    head_size = width // blocks[0].attention.n_heads
    places = min(width // POSITION_SHARE, head_size) // 2 * 2  # L
    rank = min(width - SPARED - places, len(seen))
    before, after, seen_log_frequencies = _fit(bigrams, *_factors(bigrams, rank))
    log_frequencies = torch.full((vocab_size,), math.log(UNSEEN))
    log_frequencies[seen] = seen_log_frequencies

    # An orthonormal basis of the residual stream, whose first direction is the mean's.
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q.T  # (C, C)
    frequency_axis, place_axes, token_axes = basis[1], basis[SPARED:][:places], basis[SPARED + places :][:rank]
    token_size = math.sqrt(width - places)  # together with a position's the length that layer norm gives, sqrt(C)
    embedding = F.normalize(torch.randn(vocab_size, rank), dim=1)
    embedding[seen] = before
    model.token_embedding.weight.copy_(token_size * embedding @ token_axes)
    projection = log_frequencies.sub(log_frequencies.mean())[:, None] * frequency_axis / math.sqrt(width)
    projection[seen] += after @ token_axes / token_size
    model.output_projection.weight.copy_(projection)
    model.layer_norm.bias.copy_(frequency_axis * math.sqrt(width))
    for block in blocks:
        block.attention.w_o.weight.zero_()
        block.feed_forward.linear2.weight.zero_()
    if places:
        angles = torch.arange(model.max_len)[:, None] * _frequencies(places, model.max_len)  # (T, L / 2)
        model.position_embedding.weight.copy_(_waves(angles) @ place_axes)
        _look_back(blocks[0].attention, place_axes, model.max_len)


@dataclass(frozen=True)
class Bigrams:
    """What follows what in a text: Kneser-Ney's p(second | first) = probability + backoff[first] * frequency[second].

    The pairs are ordered by their first token.
    """

    first: Tensor  # (P,)
    second: Tensor  # (P,)
    probabilities: Tensor  # (P,), what the pair's own count gives
    counts: Tensor  # (M,), how often a token is followed by any
    places: Tensor  # (M,), how many different tokens go before a token: tells how often it will come in new places
    backoff: Tensor  # (M,)

    @property
    def frequencies(self) -> Tensor:
        """The probability (M,) of each token in new places."""
        return self.places / self.places.sum()

    def after(self, tokens: Tensor) -> Tensor:
        """Return the probabilities (S, M) of all that may follow tokens (S,)."""
        found = self.backoff[tokens, None] * self.frequencies  # (S, M)
        starts, ends = (torch.searchsorted(self.first, tokens, right=right).tolist() for right in (False, True))
        for row, start, end in zip(found, starts, ends, strict=True):
            row[self.second[start:end]] += self.probabilities[start:end]
        return found


def count_bigrams(text: Tensor, different: int) -> Bigrams:
    """Count the pairs of a text (N,) of ids below `different`, M."""
    pairs, pair_counts = torch.unique(text[:-1] * different + text[1:], return_counts=True)  # (P,)
    first, second = pairs // different, pairs % different
    counts = torch.bincount(text[:-1], minlength=different).float().clamp(min=1)
    places = torch.bincount(second, minlength=different).float().clamp(min=UNSEEN)
    backoff = DISCOUNT * torch.bincount(first, minlength=different) / counts
    return Bigrams(first, second, (pair_counts - DISCOUNT) / counts[first], counts, places, backoff)


def _factors(bigrams: Bigrams, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (M, K) and (M, K) whose products approximate the pairs' surprise.

    Rows of the first have length 1, since layer norm takes their length away; the second is fitted to them.
    """
    first, second, counts = bigrams.first, bigrams.second, bigrams.counts
    surprise = torch.log1p(bigrams.probabilities / (bigrams.backoff[first] * bigrams.frequencies[second]))  # (P,)

    def sparse(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        shape = (len(counts), len(counts))
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True).coalesce()

    left, singular_values, _ = torch.svd_lowrank(sparse(first, second, surprise * counts.sqrt()[first]), q=rank)
    before = F.normalize(left * singular_values.sqrt(), dim=1)
    weights = counts**LEAST_SQUARES_POWER
    gram = before.T @ (before * weights[:, None])  # (K, K)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(rank)
    moments = sparse(second, first, surprise * weights[first]) @ before  # (M, K)
    return before, torch.linalg.solve(gram, moments.T).T


@torch.enable_grad()
def _fit(bigrams: Bigrams, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors (M, K), (M, K) and log frequencies (M,) fitted to the bigrams, from first factors."""
    before, after, bias = (x.clone().requires_grad_() for x in (before, after, bigrams.places.log()))
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


def _look_back(attention: MultiHeadAttention, place_axes: Tensor, max_len: int) -> None:
    """Let head h attend to the token h + 1 places back: its query is the position's waves, turned back so far."""
    frequencies = _frequencies(len(place_axes), max_len)
    for weight in (attention.w_q.weight, attention.w_k.weight):
        weight.zero_()
    queries, keys = (
        x.weight.unflatten(0, (attention.n_heads, -1)) for x in (attention.w_q, attention.w_k)
    )  # (H, D, C)
    for head in range(attention.n_heads):
        cosine, sine = ((head + 1) * frequencies).cos().diag(), ((head + 1) * frequencies).sin().diag()
        turn = torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)])  # (L, L)
        queries[head, : len(place_axes)] = turn @ place_axes
        keys[head, : len(place_axes)] = place_axes


def _frequencies(places: int, max_len: int) -> Tensor:
    """Return angles a position (L / 2,), from half a turn over the whole context to nearly half a turn a position."""
    return torch.logspace(math.log10(math.pi / max_len), math.log10(0.9 * math.pi), places // 2)


def _waves(angles: Tensor) -> Tensor:
    """Return cosines and sines of angles (T, L / 2), as (T, L) of mean square 1 (Vaswani et al. 2017, section 3.5)."""
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], 1)
