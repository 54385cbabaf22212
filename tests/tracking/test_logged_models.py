"""Weights from the middle of a training in a real store: logged once, found by name and id, never mistaken."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException

from gpt2.config import ModelConfig, load_params
from gpt2.core.errors import Stopped
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model, save_model
from gpt2.tracking.registry import fetch_model, verify
from gpt2.tracking.runs import training_run
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]
Train = Callable[[], None]
LINEAGE = {
    "train_key": "5" * 64,
    "train": {},
    "commit": "",
    "uncommitted": [],
    "environment": "of a test",
    "threads": 2,
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., GPT2Model]) -> GPT2Model:
    return make_model(vocab_size=VOCAB_SIZE, random=True)


@pytest.fixture(scope="module")
def train(store: Path, model: GPT2Model, make_config: Callable[..., ModelConfig]) -> Train:
    """Train until it is stopped after 40 steps; the weights of steps 20 and 40 are logged."""
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    config = make_config(vocab_size=VOCAB_SIZE)

    def train() -> None:
        with pytest.raises(Stopped), training_run(params, LINEAGE) as (log_metrics, log_weights):
            for step in (20, 40):
                model.layer_norm.bias.data.fill_(step)
                log_metrics(step, {"val/loss": 100 / step})
                log_weights(step, lambda folder: save_model(model, config, folder))
            raise Stopped(15, "stopped after step 40")

    train()
    return train


@pytest.fixture
def run(train: Train) -> Run:
    (run,) = mlflow.MlflowClient().search_runs([open_store()])
    return run


def checkpoints() -> list[LoggedModel]:
    found = mlflow.MlflowClient().search_logged_models([open_store()])
    return sorted(found, key=lambda one: one.name)


def test_a_training_that_never_finished_has_its_checkpoints(run: Run, model: GPT2Model) -> None:
    assert run.info.status == "KILLED"
    assert [one.name for one in checkpoints()] == ["step-20", "step-40"]
    for one, step in zip(checkpoints(), (20, 40), strict=True):
        assert [(metric.key, metric.value, metric.step) for metric in one.metrics or []] == [
            ("val/loss", 100 / step, step)
        ]
        folder = fetch_model(f"runs:/{run.info.run_id}/step-{step}")
        assert fetch_model(f"models:/{one.model_id}") == folder
        bias = torch.full_like(model.layer_norm.bias, step)
        assert torch.equal(load_model(folder)[0].layer_norm.bias, bias)
        assert "has the SHA-256 that was registered" in verify(f"models:/{one.model_id}")
    assert {output.step for output in run.outputs.model_outputs} == {20, 40}  # type: ignore[union-attr]
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/loss")) == 2


def test_mlflow_serves_a_checkpoint(run: Run) -> None:
    served = mlflow.pyfunc.load_model(f"models:/{checkpoints()[0].model_id}")
    [text] = served.predict(pd.DataFrame({"prompt": ["The"]}), params={"max_tokens": 2})["text"]
    assert isinstance(text, str)


def test_a_resumed_training_logs_them_once(train: Train, run: Run) -> None:
    before = {one.model_id for one in checkpoints()}
    train()
    assert {one.model_id for one in checkpoints()} == before


def test_one_that_was_not_finished_is_logged_anew(train: Train, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = checkpoints()
    mlflow.MlflowClient().delete_logged_model(second.model_id)
    with monkeypatch.context() as patch:

        def die(*_: object) -> None:
            raise MlflowException("the disk is full")

        patch.setattr(mlflow.MlflowClient, "log_model_artifacts", die)
        train()
    assert str(checkpoints()[1].status) != "READY"
    train()
    assert checkpoints()[0].model_id == first.model_id and str(checkpoints()[1].status) == "READY"


def test_what_is_no_checkpoint_or_changed_is_refused(run: Run, error_line: ErrorLine) -> None:
    run_id = run.info.run_id
    for name in ("step-7", "model"):
        line = error_line(lambda name=name: fetch_model(f"runs:/{run_id}/{name}"))  # type: ignore[misc]
        assert f"this run has no {name}; it has step-20, step-40" in line
    assert "no model at models:/m-0" in error_line(lambda: fetch_model("models:/m-0"))
    foreign = mlflow.MlflowClient().create_logged_model(open_store(), "step-9", run_id)
    assert "this run has no step-9" in error_line(lambda: fetch_model(f"runs:/{run_id}/step-9"))
    mlflow.MlflowClient().finalize_logged_model(foreign.model_id, LoggedModelStatus.READY)
    assert "another program has logged it" in error_line(lambda: fetch_model(f"runs:/{run_id}/step-9"))
    mlflow.MlflowClient().delete_logged_model(foreign.model_id)
    folder = fetch_model(f"runs:/{run_id}/step-20")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "is damaged" in error_line(lambda: verify(f"runs:/{run_id}/step-20"))
    shutil.copytree(fetch_model(f"runs:/{run_id}/step-40"), folder, dirs_exist_ok=True)
    assert "does not hold the weights" in error_line(lambda: fetch_model(f"runs:/{run_id}/step-20"))
