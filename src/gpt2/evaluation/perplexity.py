"""Perplexity by a sliding window: every token is scored once, with as much context as the stride leaves it.

Shapes: B batch, T positions, S scored positions, R rows of logits, N tokens, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.core.progress import Progress
from gpt2.data.batches import Tokens
from gpt2.model.gpt2 import GPT2Model

LOGITS_ROWS = 128  # at once: more would need memory that the allocator gets anew each time


def sliding_windows(count: int, max_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start and end of windows of at most max_len tokens, and from where on they score.

    They score `count` tokens once each, `stride` at a time after the first window.
    """
    scored = 0
    while scored < count:
        end = min(count, scored + (stride if scored else max_len))
        yield max(0, end - max_len), end, scored
        scored = end


def predictions(
    model: GPT2Model, tokens: Tokens, stride: int, batch_size: int, name: str = "predict"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 logits (R, V) and the tokens (R,) that they predict, where the model is, for all tokens (N,).

    The tokens come in order, and are read as they come; the first is predicted from <|endoftext|>, the last id. A bar
    called `name` shows how far they are. Raises UserError if the stride is more than the model's context.
    """
    if stride > model.max_len:
        raise UserError(f"stride {stride} is more than the model's max_len {model.max_len}")
    with Progress(name, len(tokens), brief=True) as progress:
        for logits, targets in _predictions(model, tokens, stride, batch_size):
            yield logits, targets
            progress.advance(len(targets))


@torch.inference_mode()
def _predictions(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    weight = model.output_projection.weight
    device, end_of_text = weight.device, len(weight) - 1
    if torch.is_autocast_enabled(device.type):
        weight = weight.to(torch.get_autocast_dtype(device.type))  # here, not for every few rows
    windows = sliding_windows(len(tokens), model.max_len, stride)
    for (_, scored), group in itertools.groupby(windows, lambda window: (window[1] - window[0], window[1] - window[2])):
        while batch := list(itertools.islice(group, batch_size)):
            texts = [
                [*(tokens[start - 1 : start] if start else [end_of_text]), *tokens[start:end]]
                for start, end, _ in batch
            ]
            text = torch.tensor(np.array(texts, dtype=np.int64), device=device)  # (B, T + 1)
            hidden_states = model.hidden_states(text[:, :-1])[:, -scored:].flatten(0, 1)  # (B * S, C)
            targets = text[:, -scored:].flatten()
            for rows, predicted in zip(hidden_states.split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True):
                yield F.linear(rows, weight).float(), predicted


def mean_loss(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int, name: str = "predict") -> float:
    """Return the mean loss of tokens (N,) in nats. Raises UserError if it is not finite; see also `predictions`."""
    total = 0.0
    for logits, targets in predictions(model, tokens, stride, batch_size, name):
        total += F.cross_entropy(logits, targets, reduction="none").cpu().double().sum().item()
    return check_finite(total / len(tokens))


def check_finite(loss: float) -> float:
    """Return a loss. Raises UserError if it is not finite."""
    if not math.isfinite(loss):
        raise UserError("the model's weights are broken: the loss is not finite")
    return loss


def summarize(loss: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Return the figures of a text of so many tokens and bytes, from its mean loss in nats."""
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * tokens / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": text_bytes,
    }


def format_summary(summary: dict[str, float]) -> str:
    """Return the figures of `summarize` as evaluate and infer print them."""
    return "loss {loss:.4f}, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits per byte".format_map(summary)


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats; infinite where that is more than a float holds."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()
