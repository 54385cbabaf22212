from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2.config import SamplingParams
from gpt2.model import GPT2Model
from gpt2.sampling import draw, generate, keep_top_k, keep_top_p
from gpt2.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE

ErrorLine = Callable[[Callable[[], object]], str]
MakeModel = Callable[..., GPT2Model]
PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_largest(k: int, expected: list[int]) -> None:
    logits = PROBABILITIES.log()
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == expected
    assert torch.equal(filtered[expected], logits[expected])


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.equal(keep_top_k(PROBABILITIES.log(), 1000), PROBABILITIES.log())


def test_top_k_keeps_k_even_when_they_tie() -> None:
    assert len(kept(keep_top_k(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2))) == 2


@pytest.mark.parametrize("ruined", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(error_line: ErrorLine, ruined: float, temperature: float) -> None:
    logits = torch.tensor([0.0, ruined, 1.0])
    line = error_line(lambda: draw(logits, SamplingParams(temperature=temperature), torch.Generator()))
    assert "the model's weights are ruined" in line


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_hold_p(p: float, expected: list[int]) -> None:
    logits = PROBABILITIES.log()
    filtered = keep_top_p(logits, p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[expected], logits[expected])


@pytest.mark.parametrize(
    "logits",
    [
        PROBABILITIES.log(),
        torch.zeros(VOCAB_SIZE),
        torch.tensor([20.0, 0.0, 0.0]),
    ],
)
def test_top_p_of_one_keeps_all(logits: Tensor) -> None:
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0.001, 0.999), st.integers(1, 25))
def test_filters_always_keep_the_best(values: list[float], p: float, k: int) -> None:
    logits = torch.tensor(values)
    assert keep_top_p(logits, p).max() == keep_top_k(logits, k).max() == logits.max()


def draws(count: int, **setting: Any) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [draw(PROBABILITIES.log(), SamplingParams(**setting), generator) for _ in range(count)]


def test_temperature_0_takes_the_largest() -> None:
    assert draws(20, temperature=0) == [1] * 20


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


def test_smallest_temperature_still_draws() -> None:
    assert draws(1, temperature=1e-45) == [1]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> GPT2Model:
    model = make_model(max_len=6)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)  # so strong that each token of the context changes what follows
    return model


def tokens_of(model: GPT2Model, prompt: list[int], count: int, seed: int = 1, **setting: Any) -> list[int]:
    return list(generate(model, prompt, count, SamplingParams(**{"temperature": 1} | setting), seed))


def test_temperature_0_gives_the_likeliest_token_at_each_step(model: GPT2Model) -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6]  # the context slides from the start
    for token in tokens_of(model, list(text), 9, temperature=0):
        with torch.no_grad():
            assert token == int(model(torch.tensor([text[-6:]]))[0, -1].argmax())
        text.append(token)
    assert len(text) == 17 and len(set(text[8:])) > 3


def test_what_lies_before_the_context_does_not_matter(model: GPT2Model) -> None:
    recent = [4, 1, 5, 9, 2, 6]
    assert tokens_of(model, [7, 7, 7, *recent], 10) == tokens_of(model, recent, 10)


def test_same_seed_gives_the_same_tokens_and_another_seed_others(model: GPT2Model) -> None:
    torch.manual_seed(5)
    first = tokens_of(model, [3], 20)
    torch.manual_seed(6)
    assert tokens_of(model, [3], 20) == first
    assert tokens_of(model, [3], 20, seed=2) != first


def test_generation_leaves_the_global_generator_and_the_prompt_alone(model: GPT2Model) -> None:
    prompt, state = [3, 1], torch.get_rng_state()
    tokens_of(model, prompt, 5)
    assert prompt == [3, 1] and torch.equal(torch.get_rng_state(), state)


def test_tokens_come_one_by_one(model: GPT2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = generate(model, [3], 10**9, SamplingParams(temperature=1), seed=1)
    assert [next(stream) for _ in range(4)] == tokens_of(model, [3], 4)


@pytest.mark.parametrize(("favourite", "expected"), [(END_OF_TEXT_ID, []), (7, [7, 7, 7])])
def test_end_of_text_ends_the_tokens(make_model: MakeModel, favourite: int, expected: list[int]) -> None:
    model = make_model(vocab_size=VOCAB_SIZE, d_model=8, n_layers=1)
    with torch.no_grad():  # the features become ones, and one row of the head likes ones
        model.layer_norm.weight.zero_()
        model.layer_norm.bias.fill_(1)
        model.output_projection.weight.zero_()
        model.output_projection.weight[favourite] = 1
    assert tokens_of(model, [1], 3, temperature=0) == expected


def test_empty_prompt_is_refused(model: GPT2Model) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokens_of(model, [], 3)


def test_no_tokens_asked_gives_none(model: GPT2Model) -> None:
    assert tokens_of(model, [1], 0) == []
