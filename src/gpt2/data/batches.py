"""Token files read through a memory map and cut into windows; the streams of random numbers of a training.

A batch is a pure function of (seed, step).

Shapes: B batch, T positions, N tokens of a split.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.core.files import read_json

TokenArray = NDArray[np.unsignedinteger[Any]]
SeenMask = NDArray[np.bool_]
ROUNDS = 8  # of the shuffle: four do for many windows, but not for a few


class Shards:
    """The tokens (N,) of several files, of which slices can be read as if they were one array."""

    def __init__(self, files: Sequence[TokenArray]) -> None:
        self.files, self.ends = files, [*itertools.accumulate(map(len, files))]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: slice) -> TokenArray:
        start, end, _ = key.indices(len(self))
        parts = [self.files[0][:0]]
        while start < end:
            number = bisect_right(self.ends, start)
            first = self.ends[number] - len(self.files[number])
            parts.append(self.files[number][start - first : end - first])
            start = self.ends[number]
        return np.concatenate(parts)


Tokens = TokenArray | Shards


class Purpose(IntEnum):
    """What a training draws random numbers for."""

    WEIGHTS = 0
    INITIALIZATION = 1
    BATCHES = 2
    DROPOUT = 3


def seed_sequence(seed: int, purpose: Purpose, step: int = 0, sequence: int = 0) -> np.random.SeedSequence:
    """Return the seed of a random stream: no two seeds, purposes, steps or sequences share one."""
    return np.random.SeedSequence([seed, purpose, step, sequence])


def seed_torch(seed: int, purpose: Purpose, step: int = 0, sequence: int = 0) -> None:
    """Let PyTorch draw from that stream. (It hashes to a number, of which a CPU uses 32 bits, a GPU 64.)"""
    torch.manual_seed(int(seed_sequence(seed, purpose, step, sequence).generate_state(1, np.uint64)[0]))


def load_tokens(path: Path) -> Tokens:
    """Map a split's tokens (N,) into memory: its file, and those that go on with it.

    meta.json beside them lists the files, and has the type of the ids; without it there is one of "<u2".
    Raises UserError if one is missing or empty.
    """
    index = path.with_name("meta.json")
    meta = read_json(index) if index.exists() else {}
    names = meta.get("splits", {}).get(path.stem, {}).get("files", [path.name])
    try:
        files = [np.memmap(path.with_name(name), dtype=meta.get("dtype", "<u2"), mode="r") for name in names]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `dvc repro prepare`") from None
    return files[0] if len(files) == 1 else Shards(files)


def load_seen(path: Path, vocab_size: int) -> SeenMask:
    """Read which tokens (V,) a training split has. Raises UserError if the file is missing or broken."""
    try:
        seen: SeenMask = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(seen, np.ndarray) or seen.dtype != np.bool_ or seen.shape != (vocab_size,):
        raise UserError(f"{path} is not a mask of {vocab_size} tokens")
    return seen


class TrainingBatches:
    """Windows in an order reshuffled at every pass over the split, which also shifts where windows begin.

    Raises UserError if the split is too short for one window and its shifts.
    """

    def __init__(self, tokens: Tokens, batch_size: int, sequence_length: int, seed: int) -> None:
        self.tokens, self.batch_size, self.sequence_length, self.seed = tokens, batch_size, sequence_length, seed
        self.windows = (len(tokens) - sequence_length) // sequence_length  # room for a shift and the last target
        if self.windows < 1:
            raise UserError(
                f"the train split has {len(tokens)} tokens, too few for train.sequence_length {sequence_length}"
            )
        self._pass = lru_cache(maxsize=2)(self._draw)

    def __call__(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (B, T) int64, of optimizer step `step` (from 0), or those rows of them."""
        sequences = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        passes, places = np.divmod(sequences, self.windows)
        starts = np.empty_like(places)
        for number in np.unique(passes):
            (functions, shift), here = self._pass(int(number)), passes == number
            starts[here] = permute(places[here], self.windows, functions) * self.sequence_length + shift
        return stack_windows(self.tokens, starts.tolist(), self.sequence_length)

    def _draw(self, number: int) -> tuple[NDArray[np.int64], int]:
        """Return the random functions and the shift of a pass."""
        generator = np.random.default_rng(seed_sequence(self.seed, Purpose.BATCHES, number))
        side = math.isqrt(self.windows - 1) + 1
        return generator.integers(side, size=(ROUNDS, side)), int(generator.integers(self.sequence_length))


def permute(places: NDArray[np.int64], size: int, functions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what a shuffle of range(size) has at `places`, without a list of it.

    A Feistel network of random functions (rounds, side) permutes range(side ** 2) (Luby & Rackoff 1988), and is
    repeated for results that are not below size: cycle walking (Black & Rogaway 2002).
    """
    permuted, side = places.copy(), functions.shape[1]
    outside = np.full(len(places), True)
    while outside.any():
        left, right = np.divmod(permuted[outside], side)
        for function in functions:
            left, right = right, (left + function[right]) % side
        permuted[outside] = left * side + right
        outside = permuted >= size
    return permuted


def validation_batches(
    tokens: Tokens, batch_size: int, sequence_length: int, max_windows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of inputs and targets (B, T) of windows side by side, or of `max_windows` evenly spread.

    Raises UserError if the split is too short for one window.
    """
    windows = (len(tokens) - 1) // sequence_length
    if windows < 1:
        raise UserError(f"the val split has {len(tokens)} tokens, too few for a window of {sequence_length}")
    chosen = min(windows, max_windows or windows)
    groups = (range(first, min(first + batch_size, chosen)) for first in range(0, chosen, batch_size))
    starts = ([windows * i // chosen * sequence_length for i in group] for group in groups)
    return (stack_windows(tokens, group, sequence_length) for group in starts)


def stack_windows(tokens: Tokens, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Return the windows at `starts` (B, T) and the same windows one token later (B, T), both int64."""
    windows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
