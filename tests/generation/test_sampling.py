from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2.config import SamplingParams
from gpt2.generation.sampling import MOST_LIKELY, draw, keep_min_p, keep_top_p, penalize

ErrorLine = Callable[[Callable[[], object]], str]
PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(error_line: ErrorLine, bad: float, temperature: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    line = error_line(lambda: draw(logits, SamplingParams(temperature=temperature), torch.Generator(), []))
    assert "the model's weights are broken" in line


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_hold_p(p: float, expected: list[int]) -> None:
    logits = PROBABILITIES.log()
    filtered = keep_top_p(logits, p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[expected], logits[expected])


def test_top_p_of_one_keeps_all() -> None:
    logits = torch.tensor([20.0, 0.0, 0.0])  # the first alone holds 1 in float32
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@pytest.mark.parametrize("spread", [0.01, 5.0])
def test_top_p_finds_nuclei_of_any_size(spread: float) -> None:
    logits = torch.randn(4 * MOST_LIKELY, generator=torch.Generator().manual_seed(1)) * spread
    found = kept(keep_top_p(logits, 0.9))
    assert (len(found) > MOST_LIKELY) == (spread < 1)
    probabilities = logits.double().softmax(-1)
    assert probabilities[found].sum() >= 0.9 - 1e-5
    assert probabilities[found].sum() - probabilities[found].min() < 0.9 + 1e-5
    assert probabilities[found].min() >= probabilities.sort(descending=True).values[len(found) - 1]


@pytest.mark.parametrize(("p", "expected"), [(1, [1]), (0.76, [1]), (0.74, [1, 3]), (0.2, [0, 1, 3, 4])])
def test_min_p_keeps_what_is_likely_beside_the_most_likely(p: float, expected: list[int]) -> None:
    logits = PROBABILITIES.log()
    filtered = keep_min_p(logits, p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[expected], logits[expected])


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_filters_always_keep_the_best(values: list[float], p: float) -> None:
    logits = torch.tensor(values)
    assert keep_top_p(logits, p).max() == keep_min_p(logits, p).max() == logits.max()


def test_penalty_makes_the_texts_tokens_less_likely() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0, 0.0])
    assert penalize(logits, torch.tensor([0, 1, 0, 3]), 2).tolist() == [1, -4, 3, 0]
    assert logits.tolist() == [2, -2, 3, 0]


def draws(count: int, text: Sequence[int] = (), **setting: Any) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [draw(PROBABILITIES.log(), SamplingParams(**setting), generator, text) for _ in range(count)]


def test_temperature_0_takes_the_largest_after_the_penalty() -> None:
    assert draws(20, temperature=0) == [1] * 20
    assert draws(3, [1], temperature=0, repetition_penalty=1.5) == [3] * 3  # -0.92 * 1.5 is below -1.2


def test_draws_follow_the_probabilities() -> None:
    found = torch.tensor(draws(2000, temperature=1)).bincount(minlength=5) / 2000
    torch.testing.assert_close(found, PROBABILITIES, atol=0.05, rtol=0)


def test_temperature_sharpens_before_top_p() -> None:
    found = torch.tensor(draws(2000, temperature=0.5)).bincount(minlength=5) / 2000
    torch.testing.assert_close(found, PROBABILITIES.square() / PROBABILITIES.square().sum(), atol=0.05, rtol=0)
    assert set(draws(200, temperature=0.5, top_p=0.45)) == {1}  # at temperature 1 it would be {1, 3}


def test_draws_stay_within_the_filters() -> None:
    assert set(draws(200, temperature=1, top_k=2)) == {1, 3}
    assert set(draws(200, temperature=1, top_p=0.71)) == {1, 3, 4}
    assert set(draws(200, temperature=1, top_k=2, top_p=0.5)) == {1}  # 4/7 of what top_k left
    assert set(draws(200, temperature=1, top_k=1000)) == {0, 1, 2, 3, 4}
    assert set(draws(200, temperature=1, min_p=0.3)) == {1, 3, 4}
    assert set(draws(200, temperature=0.5, min_p=0.3)) == {1, 3}  # the temperature sharpens before


def test_top_k_keeps_k_even_when_they_tie() -> None:
    generator = torch.Generator().manual_seed(1)
    setting = SamplingParams(temperature=1, top_k=2)
    assert len({draw(torch.tensor([1.0, 1.0, 1.0, 0.0]), setting, generator, []) for _ in range(200)}) == 2


def test_smallest_temperature_still_draws() -> None:
    assert draws(1, temperature=1e-45) == [1]
