"""What runs otherwise on a CUDA device: a training's and a decoder's steps, captured, and the initialization."""

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.helpers import logits_after
from gpt2.config import RuntimeParams, TrainParams
from gpt2.core.files import delete
from gpt2.core.validation import check
from gpt2.data.batches import Tokens
from gpt2.generation.decoder import Decoder
from gpt2.model.gpt2 import GPT2Model
from gpt2.training.bigrams import initialize_from_bigrams
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.cuda_graph import capture
from gpt2.training.run import run_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MakeModel = Callable[..., GPT2Model]
Run = Callable[..., tuple[GPT2Model, dict[str, float]]]
TOKENS: Tokens = (np.arange(4000) * 7 % 53).astype(np.uint16)  # each token tells the next; of 61, 8 never occur
SEEN = np.arange(61) < 53
assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)


@pytest.fixture
def run(make_model: MakeModel, make_train_params: Callable[..., TrainParams], tmp_path: Path) -> Run:
    """Train a tiny model, of three micro-batches a step unless told otherwise; return it, on the CPU, and metrics."""

    def run(
        folder: str = "", dropout: float = 0.0, device: str = "cuda", precision: str = "float32", **changes: Any
    ) -> tuple[GPT2Model, dict[str, float]]:
        model = make_model(dropout=dropout).to(device)
        tiny = {"max_steps": 12, "warmup_steps": 2, "batch_size": 5, "micro_batch_size": 2}
        runtime = check(RuntimeParams, {"threads": 1, "device": device, "precision": precision}, "runtime")
        params = make_train_params(**tiny | changes)
        checkpoints = Checkpoints(tmp_path / (folder or str(len(list(tmp_path.iterdir())))))
        checkpoints.folder.mkdir(exist_ok=True)
        metrics, _ = run_training(model, TOKENS, TOKENS[:90], SEEN, params, runtime, checkpoints, lambda *_: None)
        return model.cpu(), metrics

    return run


def assert_same(one: GPT2Model, two: GPT2Model) -> None:
    for name, weight in one.state_dict().items():
        assert_close(weight, two.state_dict()[name])


def test_a_captured_function_takes_new_inputs_draws_anew_and_returns_copies() -> None:
    memory = torch.zeros(3, device="cuda")

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        memory.copy_(x)
        return x * 2, torch.rand((), device="cuda")

    captured = capture(function, torch.zeros(3, device="cuda"))
    found = [captured(torch.tensor(numbers)) for numbers in ([1.0, 2.0, 3.0], [4.0])]
    assert [outputs[0].tolist() for outputs in found] == [[2, 4, 6], [8, 4, 6]] and memory.tolist() == [4, 2, 3]
    assert found[0][1] != found[1][1]
    torch.manual_seed(5)
    again = [captured(torch.zeros(3))[1] for _ in range(2)]
    torch.manual_seed(5)
    assert again == [captured(torch.zeros(3))[1] for _ in range(2)] and again[0] != again[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_is_that_of_the_cpu(run: Run, optimizer: str) -> None:
    (found, metrics), (expected, on_cpu) = (run(optimizer=optimizer, device=device) for device in ("cuda", "cpu"))
    assert_same(found, expected)
    assert metrics["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=1e-4)
    assert metrics["val_loss"] == pytest.approx(on_cpu["val_loss"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_falls_in_bfloat16_with_dropout(run: Run, optimizer: str, compiled: bool) -> None:
    settings = {"precision": "auto", "optimizer": optimizer, "max_steps": 100, "learning_rate": 0.02}
    _, metrics = run(dropout=0.2, compile=compiled, **settings)
    assert metrics["val_loss"] < 1 and math.log(61) > metrics["train_loss"] > metrics["val_loss"]


def test_a_resumed_training_ends_as_an_unbroken_one(run: Run, tmp_path: Path) -> None:
    unbroken, _ = run("states", dropout=0.2, checkpoint_interval=5, max_steps=10, optimizer="muon")
    other, _ = run(dropout=0.2, max_steps=10, optimizer="muon", seed=1)
    delete(max((tmp_path / "states").glob("*-*")))  # that of the last step
    resumed, _ = run("states", dropout=0.2, checkpoint_interval=5, max_steps=10, optimizer="muon")
    assert_same(resumed, unbroken)
    with pytest.raises(AssertionError):
        assert_same(other, unbroken)


def test_a_step_does_not_wait_for_the_device(run: Run) -> None:
    def waits(steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run(max_steps=steps, optimizer="muon", log_interval=100, eval_interval=100, checkpoint_interval=100)
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)

    assert waits(30) - waits(6) == 0 < waits(6)


def test_the_start_is_as_good_as_the_cpus(make_model: MakeModel) -> None:
    losses = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(1)
        model = make_model(d_model=48).to(device)
        initialize_from_bigrams(model, TOKENS)
        windows = torch.from_numpy(TOKENS[:1300].astype(np.int64)).view(100, 13)
        losses.append(F.cross_entropy(model.cpu()(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item())
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] < 1


def test_a_decoders_logits_are_the_models(make_model: MakeModel) -> None:
    model = make_model(random=True)
    texts = [[3, 1, 4, 1, 5], [9], [2, 6]]

    def expected() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])

    decoder = Decoder(deepcopy(model).cuda(), slots=4)
    found = logits_after(decoder, dict(enumerate(texts))).cpu()
    assert_close(found, expected())
    for new in ([7, 8, 9], [1, 1, 2]):
        found = decoder.step(new, [len(text) for text in texts]).cpu()
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        assert_close(found, expected())
