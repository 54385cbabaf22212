"""Perplexity by a sliding window: every token is scored once, with as much context as the stride leaves it.

Shapes: B batch, T positions, S scored positions, C d_model, N tokens.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gpt2.batches import Tokens
from gpt2.loss import linear_cross_entropy
from gpt2.model import GPT2Model
from gpt2.tokenizer import END_OF_TEXT_ID


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
def mean_loss_of_text(model: GPT2Model, tokens: Tokens, stride: int, batch_size: int) -> float:
    """Return the mean loss in nats of the tokens (N,); the first one is predicted from <|endoftext|>."""
    device, weight = model.output_projection.weight.device, model.output_projection.weight
    inputs = torch.from_numpy(np.concatenate([[END_OF_TEXT_ID], tokens[:-1]]).astype(np.int64))
    targets = torch.from_numpy(tokens.astype(np.int64))
    total = 0.0
    windows = sliding_windows(len(tokens), model.max_len, stride)
    for (length, scored), group in itertools.groupby(windows, key=lambda window: (window.length, window.scored)):
        starts = [window.start for window in group]
        for i in range(0, len(starts), batch_size):
            positions = torch.tensor(starts[i : i + batch_size])[:, None] + torch.arange(length)  # (B, T)
            features = model.features(inputs[positions].to(device))[:, -scored:]  # (B, S, C)
            target = targets[positions[:, -scored:]].to(device).flatten()
            total += float(linear_cross_entropy(features.flatten(0, 1), weight, target)) * target.numel()
    return total / len(tokens)
