"""From logits to a token: free functions that change, filter and draw.

Shapes: V vocabulary, or what a filter before has left of it; N tokens of a text.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2.config import SamplingParams
from gpt2.core.errors import UserError

GREEDY_BELOW = 1e-6  # a temperature that float32 cannot divide by is as good as 0
MOST_LIKELY = 1024  # tokens, which mostly hold top_p; sorting the whole vocabulary costs as much as a token's matmuls


def penalize(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Return logits (V,) with those of tokens (N,) over penalty, or times it if negative (Keskar et al. 2019, 4.1)."""
    found = logits[tokens]
    return logits.index_put((tokens,), torch.where(found > 0, found / penalty, found * penalty))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (V,) with all at -inf but the fewest largest that hold probability p (Holtzman et al. 2020)."""
    if p == 1:
        return logits
    probabilities = logits.softmax(-1)
    best, order = probabilities.topk(min(MOST_LIKELY, len(logits)))
    if best.sum() < p:
        best, order = probabilities.sort(descending=True)
    kept = order[best.cumsum(-1) - best < p]  # what stands before does not hold p
    return torch.full_like(logits, -torch.inf).scatter(-1, kept, logits[kept])


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (V,) with all at -inf that are below p times as likely as the most likely (Nguyen et al. 2025)."""
    return logits.masked_fill(logits < logits.max() + math.log(p), -torch.inf)


def draw(logits: Tensor, setting: SamplingParams, generator: torch.Generator, text: Sequence[int]) -> int:
    """Draw the token that follows a text (N,) from logits (V,) on the CPU.

    The repetition penalty comes first. At temperature 0 the largest is taken, else one is drawn from those that top_k
    (Fan et al. 2018, section 5), top_p and min_p leave, in this order. Raises UserError if the largest is infinite or
    NaN.
    """
    if setting.repetition_penalty != 1:
        logits = penalize(logits, torch.tensor(text), setting.repetition_penalty)
    tokens = None
    top_k = 1 if setting.temperature < GREEDY_BELOW else setting.top_k
    if top_k:
        logits, tokens = logits.topk(min(top_k, len(logits)))
    largest = logits.max()
    if not largest.isfinite():
        raise UserError(f"the model's weights are broken: a logit is {largest.item()}")
    if tokens is not None and len(tokens) == 1:
        return int(tokens)
    logits = (logits - largest) / setting.temperature
    if setting.top_p is not None:
        logits = keep_top_p(logits, setting.top_p)
    if setting.min_p is not None:
        logits = keep_min_p(logits, setting.min_p)
    sums = logits.double().exp().cumsum(-1)
    chosen = torch.searchsorted(sums, sums[-1] * (1 - torch.rand((), dtype=torch.double, generator=generator)))
    return int(chosen if tokens is None else tokens[chosen])


def score(logits: Tensor, tokens: Sequence[int], most_likely: int) -> list[tuple[float, dict[int, float]]]:
    """Return the log probability of each token (N,) by logits (N, V), and those of so many most likely ones."""
    total = logits.logsumexp(-1, keepdim=True)
    found = (logits.gather(-1, torch.tensor(tokens, dtype=torch.long).unsqueeze(-1)) - total).squeeze(-1).tolist()
    best, order = logits.topk(most_likely)
    return [
        (logprob, dict(zip(row, values, strict=True)))
        for logprob, row, values in zip(found, order.tolist(), (best - total).tolist(), strict=True)
    ]
