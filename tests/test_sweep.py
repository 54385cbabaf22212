"""src/sweep.py: what it refuses before it starts, and a whole search over trials that only pretend to train."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

pytest.importorskip("optuna")

import sweep
from gpt2.config import Params
from gpt2.core.validation import check
from gpt2.tracking import sweeps
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]


@pytest.fixture
def params(shipped: dict[str, Any]) -> Callable[..., Params]:
    def make(**changes: Any) -> Params:
        return check(Params, shipped | {"sweep": shipped["sweep"] | changes}, "params.yaml")

    return make


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"train.learning_rat": {"low": 1, "high": 2}}, "is no parameter of model or train (did you mean train.learn"),
        ({"prepare.vocab_size": {"choices": [300, 400]}}, "prepare.vocab_size is no parameter of model or train"),
        ({"train.learning_rate": {"low": 0, "high": 0.1}}, "train.learning_rate should be greater than 0 (0.0)"),
        ({"train.learning_rate": {"low": 0, "high": 0.1, "log": True}}, "should have a low above 0, where log is true"),
        ({"train.learning_rate": {"low": 0.1, "high": 0.1}}, "should have a low below its high"),
        ({"train.learning_rate": {"low": 0.1}}, "should have a low below its high"),
        ({"train.learning_rate": {}}, "should have low and high (and log), or choices"),
        ({"train.learning_rate": {"low": 0.1, "choices": [1]}}, "should have low and high (and log), or choices"),
        ({"train.learning_rate": {"lo": 0.1, "high": 1}}, "lo is unknown"),
        ({"train.max_steps": {"low": 10, "high": 20}}, "train.max_steps should be a valid integer (10.0)"),
        ({"train.optimizer": {"choices": ["adamw", "adam"]}}, "train.optimizer should be 'adamw' or 'muon' ('adam')"),
        ({"model.d_model": {"choices": [384, 192]}, "model.n_heads": {"choices": [6, 9]}}, "d_model 384 is not a mult"),
        ({"model.max_len": {"choices": [512, 256]}}, "train.sequence_length 512 is more than model.max_len 256"),
        ({}, "sweep.space Dictionary should have at least 1 item"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(
    params: Callable[..., Params], error_line: ErrorLine, space: dict[str, Any], told: str
) -> None:
    assert told in error_line(lambda: sweeps.check_space(params(space=space)))


@pytest.fixture
def pretend(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Trials that take no time: their losses by name. A high rate fails, a low one does not end by itself."""
    losses: dict[str, float] = {}

    def run(name: str, values: sweeps.Values, log: Path, context: dict[str, str]) -> psutil.Popen:
        rate = values["train.learning_rate"]
        log.write_text("Running stage 'prepare'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_RUN_CONTEXT", context["MLFLOW_RUN_CONTEXT"])
            with mlflow.start_run(experiment_id=open_store(), tags={"dvc.experiment": name}) as run:
                for step in (20, 40):
                    mlflow.log_metric("val/loss", 5 - 100 * rate, step)
        if rate > 0.0047:
            mlflow.MlflowClient().update_run(run.info.run_id, status="FAILED")
            return psutil.Popen(["false"])
        if rate < 0.0012 and not name.endswith("-0"):  # the first is never pruned
            return psutil.Popen(["sleep", "60"], process_group=0)
        losses[name] = 4 - 100 * rate
        return psutil.Popen(["true"])

    monkeypatch.setattr(sweeps, "main_root", lambda: tmp_path)
    monkeypatch.setattr(sweeps, "draw_all", lambda tables: {"trials": str(tables["sweep"])})  # which takes a second
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sweep, "run_experiment", run)
    monkeypatch.setattr(sweep, "trained_loss", losses.get)
    return losses


def states(study: Any) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


def test_a_search_goes_on_where_it_was_interrupted(
    params: Callable[..., Params],
    pretend: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error_line: ErrorLine,
) -> None:
    rates = {"train.learning_rate": {"choices": [0.0005, 0.003, 0.004, 0.009]}}
    unbroken, broken, more = (
        params(name=name, trials=trials, seed=7, space=rates)
        for name, trials in (("unbroken", 6), ("broken", 6), ("broken", 7))
    )
    study = sweeps.open_study(unbroken)
    sweep.search(study, unbroken, jobs=1)
    assert set(states(study)) == {"COMPLETE", "PRUNED", "FAIL"}
    best = min(pretend, key=pretend.__getitem__)
    output = capsys.readouterr().out
    assert f"best: {best}, val loss {pretend[best]:.4f}" in output and f"`dvc exp apply {best}`" in output

    calls = itertools.count()

    def die_at_times(*given: Any, settle: Callable[..., None] = sweeps.settle) -> None:
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt
        settle(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "settle", die_at_times)
        for _ in range(6):
            again = sweeps.open_study(broken)
            with contextlib.suppress(KeyboardInterrupt):
                sweep.search(again, broken, jobs=1)
    assert next(calls) > 7 and states(again) == states(study)
    assert [trial.params for trial in again.get_trials()] == [trial.params for trial in study.get_trials()]

    client = mlflow.MlflowClient()
    parent = client.get_run(again.user_attrs["mlflow_run"])
    assert parent.info.status == "FINISHED" and parent.data.tags["gpt2.best_trial"] == best.replace("un", "")
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    told = {run.data.tags["dvc.experiment"]: run for run in children}
    assert {name: run.data.tags["optuna.state"] for name, run in told.items()} == {
        f"broken-{number}": state for number, state in enumerate(states(again))
    }
    losses = {name: run.data.metrics.get("val/full_loss") for name, run in told.items()}
    assert losses == {name: pretend.get(name) for name in told}
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "sweep")}
    assert pictures == {"sweep/trials.csv", "sweep/trials.svg"}

    sweep.search(sweeps.open_study(more), more, jobs=2)
    assert len(states(again)) == 7
    changed = params(name="broken", seed=5, space=rates)
    assert "sweep.seed 7, not 5" in error_line(lambda: sweeps.open_study(changed))


def test_two_searches_never_take_the_same_trial(params: Callable[..., Params], pretend: dict[str, float]) -> None:
    three = params(trials=3)
    ours, theirs = (sweeps.open_study(three) for _ in range(2))
    taken = [sweeps.take_trial(study, three) for study in (ours, theirs, ours, theirs)]
    assert [one and one[0].number for one in taken] == [0, 1, 2, None]
    assert taken[1]
    taken[1][2].release()  # as when a process dies
    again = sweeps.take_trial(ours, three)
    assert again and again[0].number == 1 and again[1] == taken[1][1]
