"""Perplexity by a sliding window: every token is scored once, with as much context as the stride leaves it.

Shapes: B batch, T positions, S scored positions, R rows of logits, C d_model, N tokens, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.data.batches import Tokens
from gpt2.data.tokenizer import END_OF_TEXT_ID
from gpt2.model.gpt2 import GPT2Model

LOGITS_ROWS = 128  # at once: more would need memory that the allocator gets anew each time


@dataclass(frozen=True)
class Window:
    """`length` inputs from `start` on, of which the predictions at the last `scored` count."""

    start: int
    length: int
    scored: int


def sliding_windows(count: int, max_len: int, stride: int) -> Iterator[Window]:
    """Yield windows of at most max_len that score `count` tokens once each, `stride` at a time after the first."""
    scored_to = 0
    while scored_to < count:
        end = min(count, scored_to + (stride if scored_to else max_len))
        start = max(0, end - max_len)
        yield Window(start, end - start, end - scored_to)
        scored_to = end


@torch.inference_mode()
def token_losses(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int) -> Tensor:
    """Return the loss in nats of each of the tokens (N,), on the CPU; the first is predicted from <|endoftext|>.

    Raises UserError if the stride is more than the model's context.
    """
    if stride > model.max_len:
        raise UserError(f"stride {stride} is more than the model's max_len {model.max_len}")
    device = model.output_projection.weight.device
    inputs, targets = _inputs(tokens), torch.from_numpy(tokens.astype(np.int64))
    losses = torch.empty(len(tokens))
    windows = sliding_windows(len(tokens), model.max_len, stride)
    for (length, scored), group in itertools.groupby(windows, key=lambda window: (window.length, window.scored)):
        starts = [window.start for window in group]
        for i in range(0, len(starts), batch_size):
            positions = torch.tensor(starts[i : i + batch_size])[:, None] + torch.arange(length)  # (B, T)
            hidden_states = model.hidden_states(inputs[positions].to(device))[:, -scored:].flatten(0, 1)  # (B * S, C)
            scored_at = positions[:, -scored:].flatten()
            for rows, at in zip(hidden_states.split(LOGITS_ROWS), scored_at.split(LOGITS_ROWS), strict=True):
                logits = model.output_projection(rows).float()  # (R, V)
                losses[at] = F.cross_entropy(logits, targets[at].to(device), reduction="none").cpu()
    return losses


@torch.inference_mode()
def predict(model: GPT2Model, tokens: Tokens, index: int, stride: int) -> Tensor:
    """Return the logits (V,) under which token_losses scores one of the tokens (N,), in float32 on the CPU."""
    windows = sliding_windows(len(tokens), model.max_len, stride)
    window = next(window for window in windows if index < window.start + window.length)
    inputs = _inputs(tokens[: window.start + window.length])[None, window.start :]  # (1, T)
    hidden_states = model.hidden_states(inputs.to(model.output_projection.weight.device))[0, index - window.start]
    return model.output_projection(hidden_states).float().cpu()


def summarize(losses: Tensor, text_bytes: int) -> dict[str, float]:
    """Return the scores of a text of text_bytes bytes, from its losses (N,) in nats.

    Raises UserError if a loss is not finite.
    """
    loss = losses.double().mean().item()
    if not math.isfinite(loss):
        raise UserError("the model's weights are broken: the loss is not finite")
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * len(losses) / math.log(2) / text_bytes,
        "tokens": len(losses),
        "bytes": text_bytes,
    }


def format_summary(summary: dict[str, float]) -> str:
    """Return the figures of `summarize` as evaluate and infer print them."""
    return "loss {loss:.4f}, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits per byte".format_map(summary)


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats; infinite where that is more than a float holds."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def _inputs(tokens: Tokens) -> Tensor:
    return torch.from_numpy(np.concatenate([[END_OF_TEXT_ID], tokens[:-1]]).astype(np.int64))


def mean_loss(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int) -> float:
    return token_losses(model, tokens, stride, batch_size).double().mean().item()
