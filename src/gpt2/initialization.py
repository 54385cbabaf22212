"""Embeddings to start from: what follows what in the training text, so that training begins as a bigram model.

The matrix of each pair's surprise over Kneser-Ney's back-off (Kneser & Ney 1995) is factored, as word embeddings factor
that of pointwise mutual information (Levy & Goldberg 2014): one side becomes the token embedding, the other the output
projection. The blocks begin with no part in the residual stream (Zhang et al. 2019, "Fixup"), so the first logits are
those of the factors.

Shapes: N tokens of the text, M different ones among them, P different pairs, K rank, C d_model, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.batches import Tokens
from gpt2.model import GPT2Model, TransformerBlock

COUNTED_TOKENS = 50_000_000  # sorting the pairs takes some 50 bytes for each
DISCOUNT = 0.75  # of each count, in favour of pairs that never occurred
UNSEEN = 0.1  # the count of a token that never occurs
SPARED = 2  # of C: the mean, which layer norm takes away, and the direction of the frequencies
EMBEDDING_RMS = 1.0
FIT_POWER = 0.75  # of a context's count, as its weight in the fit
RIDGE = 1e-3


@torch.no_grad()
def start_from_bigrams(model: GPT2Model, tokens: Tokens) -> None:
    """Set the embeddings and the output projection, which must not be tied, from a text's tokens (N,); C is 3 or more.

    Draws from PyTorch's generator.
    """
    vocab_size, width = model.output_projection.weight.shape
    seen, text = torch.unique(torch.from_numpy(tokens[:COUNTED_TOKENS].astype(np.int64)), return_inverse=True)
    pairs, counts = torch.unique(text[:-1] * len(seen) + text[1:], return_counts=True)  # (P,)
    first, second = pairs // len(seen), pairs % len(seen)
    first_counts = torch.bincount(first, counts.double(), len(seen)).float().clamp(min=1)  # (M,)

    # How many tokens go before a token tells its frequency in new places better than its count does.
    log_frequencies = torch.full((vocab_size,), UNSEEN).index_add_(0, seen[second], torch.ones(len(pairs))).log()
    discounted = DISCOUNT * torch.bincount(first, minlength=len(seen)) / first_counts
    backoff = discounted[first] * log_frequencies.softmax(0)[seen[second]]
    surprise = torch.log1p((counts - DISCOUNT) / first_counts[first] / backoff)  # (P,)

    before, after = _factors(first, second, surprise, first_counts, min(width - SPARED, len(seen)))
    # An orthonormal basis whose first direction is the mean's.
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q.T  # (C, C)
    axes = basis[SPARED : SPARED + before.shape[1]]  # (K, C)
    size = width**0.5  # of what layer norm gives
    model.token_embedding.weight.mul_(EMBEDDING_RMS / model.token_embedding.weight.std())
    model.token_embedding.weight[seen] = (before @ axes * size * EMBEDDING_RMS).to(model.token_embedding.weight)
    projection = log_frequencies.sub(log_frequencies.mean())[:, None] * basis[1]
    projection[seen] += after @ axes
    model.output_projection.weight.copy_(projection / size)
    model.layer_norm.bias.copy_(basis[1] * size)
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            block.attention.w_o.weight.zero_()
            block.feed_forward.linear2.weight.zero_()


def _factors(first: Tensor, second: Tensor, surprise: Tensor, first_counts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (M, K) and (M, K) whose products approximate the surprise of the pairs (P,).

    Rows of the first have length 1, since layer norm takes their length away; the second is fitted to them.
    """

    def sparse(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        shape = (len(first_counts), len(first_counts))
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True).coalesce()

    left, singular_values, _ = torch.svd_lowrank(sparse(first, second, surprise * first_counts.sqrt()[first]), q=rank)
    before = F.normalize(left * singular_values.sqrt(), dim=1)
    weights = first_counts**FIT_POWER
    gram = before.T @ (before * weights[:, None])  # (K, K)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(rank)
    moments = sparse(second, first, surprise * weights[first]) @ before  # (M, K)
    return before, torch.linalg.solve(gram, moments.T).T
