import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gpt2.data.batches import (
    ROUNDS,
    Purpose,
    Shards,
    TokenArray,
    TrainingBatches,
    load_tokens,
    permute,
    seed_torch,
    stack_windows,
    validation_batches,
)

ErrorLine = Callable[[Callable[[], object]], str]


def counting(count: int) -> np.ndarray:
    """Tokens that tell their own place."""
    return np.arange(count, dtype=np.uint16)


def test_targets_are_inputs_shifted_by_one() -> None:
    batches = [TrainingBatches(counting(100), 4, 7, seed=1)(step) for step in range(20)]
    for inputs, targets in [*batches, *validation_batches(counting(100), 4, 7)]:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape and inputs.shape[1] == 7
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
        assert torch.equal(targets, inputs + 1)


def test_batch_depends_on_seed_and_step_alone() -> None:
    batches, again = (TrainingBatches(counting(200), 4, 7, seed=1) for _ in range(2))
    steps = list(range(30))
    forwards = {step: batches(step)[0] for step in steps}
    np.random.seed(5)
    torch.manual_seed(5)
    for step in [*reversed(steps), 3, 29, 0]:
        assert torch.equal(again(step)[0], forwards[step])


def test_seeds_give_different_orders() -> None:
    one, two = (TrainingBatches(counting(1000), 8, 7, seed) for seed in (1, 2))
    assert not torch.equal(one(0)[0], two(0)[0])


def test_streams_of_different_seeds_purposes_and_steps_differ() -> None:
    streams = list(itertools.product(range(4), Purpose, range(51)))
    drawn = set()
    for seed, purpose, step in streams:
        seed_torch(seed, purpose, step)
        drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == len(streams)


@given(count=st.integers(2, 300), length=st.integers(1, 20), seed=st.integers(0, 2**31 - 1))
def test_each_pass_takes_each_window_once(count: int, length: int, seed: int) -> None:
    windows = count // length - 1
    assume(windows >= 1)
    batches = TrainingBatches(counting(count), windows, length, seed)  # a step is a pass
    for step in range(3):
        inputs, targets = batches(step)
        starts = inputs[:, 0].sort().values
        assert torch.equal(starts, starts[0] + length * torch.arange(windows))
        assert 0 <= starts[0] < length
        assert int(targets.max()) < count


def test_passes_are_shuffled_anew() -> None:
    batches = TrainingBatches(counting(1000), 99, 10, seed=1)
    starts = [batches(step)[0][:, 0] for step in range(4)]
    assert len({tuple((one - one.min()).tolist()) for one in starts}) == 4
    assert len({int(one.min()) for one in starts}) > 1  # where windows begin shifts too


def shuffle(size: int, seed: int) -> np.ndarray:
    side = math.isqrt(size - 1) + 1
    return permute(np.arange(size), size, np.random.default_rng(seed).integers(side, size=(ROUNDS, side)))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 97, 100, 101, 4096, 65_537])
def test_shuffle_takes_each_once(size: int) -> None:
    assert np.array_equal(np.sort(shuffle(size, seed=1)), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 4, 20])
def test_shuffle_puts_each_anywhere(size: int) -> None:
    """Each item is at each place about as often, over many seeds: chi-square, six standard deviations."""
    seeds, expected = 4000, 4000 / size
    for at in np.transpose([shuffle(size, seed) for seed in range(seeds)]):
        chi_square = ((np.bincount(at, minlength=size) - expected) ** 2 / expected).sum()
        assert chi_square < size - 1 + 6 * math.sqrt(2 * (size - 1))
    orders = Counter(tuple(shuffle(4, seed).tolist()) for seed in range(seeds))
    assert len(orders) == 24 and max(orders.values()) < 2 * min(orders.values())


@pytest.mark.parametrize("lag", [1, 2, 8, 101])  # 101 is the network's side
def test_neighbours_in_a_shuffle_are_independent(lag: int) -> None:
    size, near = 10_007, []
    for seed in range(20):
        windows = shuffle(size, seed)
        assert abs(np.corrcoef(windows[lag:], windows[:-lag])[0, 1]) < 5 / math.sqrt(size)
        near.append(np.mean(np.abs(windows[lag:] - windows[:-lag]) < size / 100))
    assert np.mean(near) == pytest.approx(1 - 0.99**2, rel=0.05)  # as for two uniform numbers


def test_ranks_read_their_rows_of_the_batch_alone() -> None:
    class Counted(Shards):
        reads = 0

        def __getitem__(self, key: slice) -> TokenArray:
            self.reads += 1
            return super().__getitem__(key)

    whole = TrainingBatches(counting(1000), 12, 7, seed=1)
    for step, ranks in itertools.product((0, 5, 11, 30), (1, 2, 4)):  # step 11 has windows of two passes
        size = 12 // ranks
        for rank in range(ranks):
            for rows in (slice(rank * size, (rank + 1) * size), slice(rank, None, ranks)):
                tokens = Counted([counting(1000)])
                mine = TrainingBatches(tokens, 12, 7, seed=1)(step, rows)
                assert all(torch.equal(ours, every[rows]) for ours, every in zip(mine, whole(step), strict=True))
                assert tokens.reads == size


class Places:
    """Tokens of a file that tell their own place in the split, computed as they are read."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice) -> np.ndarray:
        start, end, _ = key.indices(self.size)
        return np.arange(self.first + start, self.first + end, dtype=np.uint64)


def test_ten_billion_tokens_take_no_memory() -> None:
    count, size = 10_000_000_000, 1 << 20
    tokens = Shards([Places(first, min(size, count - first)) for first in range(0, count, size)])  # type: ignore[misc]
    tracemalloc.start()
    batches = TrainingBatches(tokens, 64, 1024, seed=1)
    last = batches.windows // 64  # has windows of two passes
    starts, crossing = [], 0
    for step in [*range(50), last - 1, last, 100 * last]:
        inputs, targets = batches(step)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(1024)) and torch.equal(targets, inputs + 1)
        starts += inputs[:, 0].tolist() if step < last else []
        crossing += int((inputs[:, 0] // size != targets[:, -1] // size).sum())
    inputs, targets = next(validation_batches(tokens, 64, 1024))
    assert torch.equal(targets.flatten(), torch.arange(1, 64 * 1024 + 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches.windows == 9_765_624 and len(set(starts)) == 51 * 64
    assert crossing and peak < 6e6
    assert np.ptp(starts) > 0.99 * count and np.mean(starts) == pytest.approx(count / 2, rel=0.05)


def test_batch_across_two_passes_takes_from_both() -> None:
    whole = TrainingBatches(counting(100), 9, 10, seed=1)
    pairs = TrainingBatches(counting(100), 2, 10, seed=1)
    windows = torch.cat([whole(0)[0], whole(1)[0]])
    assert torch.equal(torch.cat([pairs(step)[0] for step in range(9)]), windows)


@given(count=st.integers(2, 300), length=st.integers(1, 20), batch_size=st.integers(1, 9))
def test_validation_takes_each_window_once(count: int, length: int, batch_size: int) -> None:
    windows = (count - 1) // length
    assume(windows >= 1)
    batches = list(validation_batches(counting(count), batch_size, length))
    assert torch.cat([inputs for inputs, _ in batches]).flatten().tolist() == list(range(windows * length))
    assert [len(inputs) for inputs, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert int(batches[-1][1].max()) == windows * length < count


def test_some_validation_windows_are_spread_over_the_split() -> None:
    batches = list(validation_batches(counting(1001), 3, 10, max_windows=4))
    assert torch.cat([inputs[:, 0] for inputs, _ in batches]).tolist() == [0, 250, 500, 750]


def test_more_validation_windows_than_there_are_take_all() -> None:
    assert sum(len(inputs) for inputs, _ in validation_batches(counting(101), 3, 10, max_windows=99)) == 10


def test_too_short_split_is_refused(error_line: ErrorLine) -> None:
    TrainingBatches(counting(16), 1, 8, seed=1)(0)
    assert "15 tokens, too few" in error_line(lambda: TrainingBatches(counting(15), 1, 8, seed=1))
    assert len(list(validation_batches(counting(9), 1, 8))) == 1
    assert "8 tokens, too few" in error_line(lambda: list(validation_batches(counting(8), 1, 8)))


def test_ids_above_the_signed_range_survive() -> None:
    inputs, targets = stack_windows(np.array([50256, 40000, 1], dtype=np.uint16), [0], 2)
    assert (inputs.tolist(), targets.tolist()) == ([[50256, 40000]], [[40000, 1]])


def test_token_file_is_little_endian(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\x01\x02\x03\x04")
    assert load_tokens(tmp_path / "train.bin")[:].tolist() == [0x0201, 0x0403]


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(0, 99), st.integers(0, 99))
def test_files_are_read_as_one(sizes: list[int], start: int, end: int) -> None:
    whole = counting(sum(sizes))
    shards = Shards(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(shards) == len(whole)
    for key in (slice(start, end), slice(start, None), slice(end), slice(np.int64(start), np.int64(end))):
        assert shards[key].dtype == whole.dtype and shards[key].tolist() == whole[key].tolist()


def test_batches_of_several_files_are_those_of_one() -> None:
    whole = counting(100)
    shards = Shards(np.split(whole, [33, 66, 99]))
    for step in range(9):
        ours, theirs = (TrainingBatches(tokens, 4, 7, seed=1)(step) for tokens in (shards, whole))
        assert all(map(torch.equal, ours, theirs))
    for ours, theirs in zip(validation_batches(shards, 4, 7), validation_batches(whole, 4, 7), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("data", [None, b"", b"odd"])
def test_unreadable_token_file_is_refused(tmp_path: Path, error_line: ErrorLine, data: bytes | None) -> None:
    path = tmp_path / "train.bin"
    if data is not None:
        path.write_bytes(data)
    assert "train.bin cannot be read" in error_line(lambda: load_tokens(path))
