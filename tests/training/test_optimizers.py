from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import TrainParams
from gpt2.model.gpt2 import GPT2Model
from gpt2.training.muon import Muon
from gpt2.training.optimizers import build_optimizers, learning_rate_factor, set_learning_rates, steps_before_decay

MakeModel = Callable[..., GPT2Model]
MakeTrainParams = Callable[..., TrainParams]
Build = Callable[..., tuple[GPT2Model, list[torch.optim.Optimizer]]]


@given(
    steps=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    fractions=st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    warmup_steps=st.integers(0, 100),
)
def test_trainings_share_the_steps_before_the_first_decay(
    make_train_params: MakeTrainParams, steps: tuple[int, int], fractions: tuple[float, float], warmup_steps: int
) -> None:
    one, other = (
        make_train_params(max_steps=count, decay_fraction=fraction, warmup_steps=warmup_steps)
        for count, fraction in zip(steps, fractions, strict=True)
    )
    shared = min(steps_before_decay(one), steps_before_decay(other))
    assert 0 <= shared < min(steps)
    factors = [[learning_rate_factor(step, params) for step in range(shared)] for params in (one, other)]
    assert factors[0] == factors[1]


@pytest.mark.parametrize(("fraction", "shared"), [(0, 79), (0.01, 79), (0.5, 40), (0.99, 0), (1, 0)])
def test_no_step_that_could_be_shared_is_lost(make_train_params: MakeTrainParams, fraction: float, shared: int) -> None:
    assert steps_before_decay(make_train_params(max_steps=80, decay_fraction=fraction)) == shared


@pytest.fixture
def build(make_model: MakeModel, make_train_params: MakeTrainParams) -> Build:
    """Build a tiny model and the optimizers of a kind that move it."""

    def build(optimizer: str, tie_weights: bool = False) -> tuple[GPT2Model, list[torch.optim.Optimizer]]:
        model = make_model(tie_weights=tie_weights, qkv_bias=True)
        return model, build_optimizers(model, make_train_params(optimizer=optimizer, weight_decay=0.1), torch.float32)

    return build


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(build: Build, name: str, tie_weights: bool) -> None:
    model, optimizers = build(optimizer=name, tie_weights=tie_weights)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert held == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_that_are_no_embeddings_decay(build: Build, name: str, tie_weights: bool) -> None:
    model, optimizers = build(optimizer=name, tie_weights=tie_weights)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    matrices = ("w_q.weight", "w_k.weight", "w_v.weight", "w_o.weight", "linear1.weight", "linear2.weight")
    for parameter_name, parameter in model.named_parameters():
        decays = parameter_name.endswith((*matrices, "output_projection.weight"))
        assert decay[id(parameter)] == (0.1 if decays else 0.0), parameter_name


def test_muon_moves_the_matrices_of_the_blocks(build: Build) -> None:
    model, (_, muon) = build(optimizer="muon")
    assert isinstance(muon, Muon)
    matrices = {id(one) for block in model.transformer_blocks for one in block.parameters() if one.dim() == 2}
    assert {id(parameter) for group in muon.param_groups for parameter in group["params"]} == matrices
    assert all(type(one) is torch.optim.AdamW for one in build(optimizer="adamw")[1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_blocks_and_embeddings_have_rates_of_their_own(
    build: Build, make_train_params: MakeTrainParams, name: str
) -> None:
    model, optimizers = build(optimizer=name)
    rates = {"learning_rate": 0.5, "embedding_learning_rate": 0.125}
    set_learning_rates(optimizers, 0, make_train_params(warmup_steps=1, max_steps=10, **rates))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        assert rate[id(parameter)] == (0.25 if "transformer_blocks" in parameter_name else 0.0625), parameter_name


def test_schedule_warms_up_stays_and_decays(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=100, warmup_steps=4, decay_fraction=0.2)
    rates = [learning_rate_factor(step, params) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:81] == [1.0] * 76
    assert rates[81:] == pytest.approx([1 - i / 20 for i in range(1, 20)])  # 0.05 at the last step, never 0


def test_schedule_without_warmup_and_decay_is_constant(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=10, warmup_steps=0, decay_fraction=0)
    assert [learning_rate_factor(step, params) for step in range(10)] == [1.0] * 10


def test_schedule_that_decays_all_the_way_starts_at_the_full_rate(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=4, warmup_steps=0, decay_fraction=1)
    assert [learning_rate_factor(step, params) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_warmup_longer_than_the_run_never_exceeds_the_rate(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=10, warmup_steps=100, decay_fraction=0.5)
    rates = [learning_rate_factor(step, params) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 101 for step in range(10)])
