from collections.abc import Callable

import pytest
import torch

from gpt2.config import TrainParams
from gpt2.model import GPT2Model
from gpt2.muon import Muon
from gpt2.optimization import build_optimizers, learning_rate_at, set_learning_rate

MakeModel = Callable[..., GPT2Model]
MakeTrainParams = Callable[..., TrainParams]


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(make_model: MakeModel, name: str, tie_weights: bool) -> None:
    model = make_model(tie_weights=tie_weights, qkv_bias=True)
    groups = [group for optimizer in build_optimizers(model, name, 0.1) for group in optimizer.param_groups]
    held = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert held == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_that_are_no_embeddings_decay(make_model: MakeModel, name: str, tie_weights: bool) -> None:
    model = make_model(tie_weights=tie_weights, qkv_bias=True)
    groups = [group for optimizer in build_optimizers(model, name, 0.1) for group in optimizer.param_groups]
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    matrices = ("w_q.weight", "w_k.weight", "w_v.weight", "w_o.weight", "linear1.weight", "linear2.weight")
    for parameter_name, parameter in model.named_parameters():
        decays = parameter_name.endswith((*matrices, "output_projection.weight"))
        assert decay[id(parameter)] == (0.1 if decays else 0.0), parameter_name


def test_muon_moves_the_matrices_of_the_blocks(make_model: MakeModel) -> None:
    model = make_model()
    _, muon = build_optimizers(model, "muon", 0.1)
    assert isinstance(muon, Muon)
    matrices = {id(one) for block in model.transformer_blocks for one in block.parameters() if one.dim() == 2}
    assert {id(parameter) for group in muon.param_groups for parameter in group["params"]} == matrices
    assert all(type(one) is torch.optim.AdamW for one in build_optimizers(model, "adamw", 0.1))


def test_rate_reaches_every_group(make_model: MakeModel) -> None:
    optimizers = build_optimizers(make_model(), "muon", 0.1)
    set_learning_rate(optimizers, 0.125)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.125}


def test_schedule_warms_up_stays_and_decays(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=100, warmup_steps=4, decay_fraction=0.2, learning_rate=1.0)
    rates = [learning_rate_at(step, params) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:81] == [1.0] * 76
    assert rates[81:] == pytest.approx([1 - i / 20 for i in range(1, 20)])  # 0.05 at the last step, never 0


def test_schedule_without_warmup_and_decay_is_constant(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=10, warmup_steps=0, decay_fraction=0, learning_rate=0.5)
    assert [learning_rate_at(step, params) for step in range(10)] == [0.5] * 10


def test_schedule_that_decays_all_the_way_starts_at_the_full_rate(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=4, warmup_steps=0, decay_fraction=1, learning_rate=1.0)
    assert [learning_rate_at(step, params) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_warmup_longer_than_the_run_never_exceeds_the_rate(make_train_params: MakeTrainParams) -> None:
    params = make_train_params(max_steps=10, warmup_steps=100, decay_fraction=0.5, learning_rate=1.0)
    rates = [learning_rate_at(step, params) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 101 for step in range(10)])
