"""src/sweep.py: what it refuses before it starts, and a whole search over trials that only pretend to train."""

import contextlib
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

pytest.importorskip("optuna")

import sweep
from gpt2.config import Params
from gpt2.core.errors import Stopped
from gpt2.core.validation import check
from gpt2.tracking import lineage, sweeps
from gpt2.tracking.runs import training_run
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]
TRAINING = "python src/train.py"


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
        ({}, "sweep.space should have at least 1 item"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(
    params: Callable[..., Params], error_line: ErrorLine, space: dict[str, Any], told: str
) -> None:
    assert told in error_line(lambda: sweeps.check_space(params(space=space)))


def test_many_choices_are_checked_at_once_and_a_preset_is_refused(
    params: Callable[..., Params], error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("learning_rate", "weight_decay", "batch_size", "warmup_steps", "seed")
    space: dict[str, Any] = {f"train.{name}": {"choices": list(range(1, 20))} for name in names}
    sweeps.check_space(params(space=space))
    space["train.learning_rate"]["choices"].append(-1)  # the combinations that are checked have only its first value
    assert "train.learning_rate should" in error_line(lambda: sweeps.check_space(params(space=space)))
    monkeypatch.setattr(sweeps, "PARAMS", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("model: gpt2")
    sizes = params(space={"model.n_layers": {"choices": [1, 2]}})
    assert "should have a section model" in error_line(lambda: sweeps.check_space(sizes))


@pytest.fixture
def pretend(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Trials that take no time: their losses by name. A high rate fails, a low one does not end by itself."""
    losses: dict[str, float] = {}

    def run(name: str, values: sweeps.Values, log: Path, parent: str) -> psutil.Popen:
        rate = values["train.learning_rate"]
        log.write_text("Running stage 'prepare'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_RUN_CONTEXT", json.dumps({"mlflow.parentRunId": parent}))
            with mlflow.start_run(experiment_id=open_store(), tags={"dvc.experiment": name}) as run:
                for step in (20, 40):
                    mlflow.log_metric("val/loss", 5 - 100 * rate, step)
        if rate > 0.0047:
            mlflow.MlflowClient().update_run(run.info.run_id, status="FAILED")
            log.write_text(f"error: a bad rate\nERROR: failed to run: {TRAINING}, exited with 2")
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
    taken[1][1].release()  # as when a process dies
    again = sweeps.take_trial(ours, three)
    assert again and again[0].number == 1 and again[0].params == taken[1][0].params


Ending = Callable[..., None]


@pytest.fixture
def ending(pretend: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Ending:
    """Let experiments end at once, without a run in MLflow: each with the next of some logs, of "" with a loss."""

    def use(*logs: str) -> None:
        left = iter(logs)

        def run(name: str, values: sweeps.Values, log: Path, parent: str) -> psutil.Popen:
            log.write_text(told := next(left))
            if not told:
                pretend[name] = 4
            return psutil.Popen(["true"])

        monkeypatch.setattr(sweep, "run_experiment", run)
        monkeypatch.setattr(sweep, "BUSY_SECONDS", 0)

    return use


@pytest.mark.parametrize("stop", [130, 1])  # Ctrl-C, and a traceback: a fault of the code, not of the values
def test_a_training_that_dies_is_one_trial_that_failed_and_one_that_was_stopped_is_taken_again(
    params: Callable[..., Params], ending: Ending, error_line: ErrorLine, capsys: pytest.CaptureFixture[str], stop: int
) -> None:
    three = params(name="dies", trials=3)
    study = sweeps.open_study(three)
    ending(*(f"ERROR: failed to run: {TRAINING}, exited with {code}" for code in (-9, stop)))
    told = error_line(lambda: sweep.search(study, three, jobs=1))
    assert "dies-1 was stopped: ERROR: " in told and "start again" in told and "another sweep.name" in told
    assert states(study) == ["FAIL", "RUNNING"]
    client = mlflow.MlflowClient()  # of the store that the search has opened
    assert client.get_run(study.user_attrs["mlflow_run"]).info.status == "KILLED"
    child = sweeps.find_child(study.user_attrs["mlflow_run"], "dies-0")
    assert child and (child.info.status, child.data.tags["optuna.state"]) == ("FAILED", "FAIL")

    capsys.readouterr()
    gc.collect()  # the locks of the search, as when its process ends
    ending("ERROR: Unable to acquire lock", "ERROR: Unable to acquire lock", "", "")
    sweep.search(study, three, jobs=1)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert capsys.readouterr().out.count("dies-1: train.learning_rate") == 1


def test_a_trial_of_other_parameters_than_the_first_is_refused(
    params: Callable[..., Params], ending: Ending, error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = params(name="mine", trials=2)
    study = sweeps.open_study(mine)
    edited = mine.model_copy(update={"train": mine.train.model_copy(update={"max_steps": 7})})
    read = iter((params(name="theirs"), edited))  # the section sweep may change: it is of no training
    monkeypatch.setattr(sweep, "load_params", lambda path: next(read))
    ending("")
    assert "train.max_steps" in error_line(lambda: sweep.search(study, mine, jobs=1))
    assert states(study) == ["COMPLETE", "RUNNING"]


def test_the_search_has_one_run_unless_that_was_deleted(
    params: Callable[..., Params], pretend: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = sweeps.open_study(params(name="parents"))
    parent = sweeps.open_parent(study)
    with monkeypatch.context() as patch, pytest.raises(mlflow.MlflowException):
        patch.setattr(mlflow.MlflowClient, "get_run", lambda *_: (_ for _ in ()).throw(mlflow.MlflowException("down")))
        sweeps.open_parent(study)
    assert sweeps.open_parent(study) == parent
    mlflow.MlflowClient().delete_run(parent)
    assert sweeps.open_parent(study) != parent


def test_a_broken_study_is_one_line(
    params: Callable[..., Params], pretend: dict[str, float], error_line: ErrorLine
) -> None:
    broken = params(name="garbled")
    folder = sweeps.sweep_folder("garbled")
    folder.mkdir(parents=True)
    (folder / "study.db").write_bytes(b"no database, " * 99)
    assert f"{folder}/study.db cannot be opened" in error_line(lambda: sweeps.open_study(broken))


@pytest.mark.parametrize("name", ["sweep-7", None])
def test_a_trial_that_has_ended_keeps_its_run(
    params: Callable[..., Params], store: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    made = {"train_key": str(name), "train": {}, "commit": "", "uncommitted": [], "environment": "", "threads": 2}
    monkeypatch.setenv("DVC_EXP_NAME", "sweep-3")
    with pytest.raises(Stopped), training_run(params(), made):
        raise Stopped(2, "pruned")
    client = mlflow.MlflowClient()
    (pruned,) = client.search_runs([open_store()], f"tags.`gpt2.train_key` = '{name}'")
    client.set_tag(pruned.info.run_id, "optuna.state", "PRUNED")
    monkeypatch.setenv("DVC_EXP_NAME", name or "")
    with training_run(params(), made):
        pass
    runs = client.search_runs([open_store()], f"tags.`gpt2.train_key` = '{name}'")
    told = {run.data.tags.get("dvc.experiment"): (run.info.status, run.data.tags.get("optuna.state")) for run in runs}
    assert told == {"sweep-3": ("KILLED", "PRUNED"), name: ("FINISHED", None)}


def test_a_process_that_nobody_waits_for_is_over() -> None:
    begin = "subprocess.Popen(['sleep', '60'], process_group=0).pid"
    code = f"import subprocess, time; print({begin}, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as careless:
        assert careless.stdout
        left = psutil.Process(int(careless.stdout.readline()))
        assert not sweep.is_over(left)
        sweep.interrupt(left, None)
        assert left.is_running() and sweep.is_over(left)
        careless.kill()


def test_outside_git_there_are_no_experiments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    assert sweep.trained_loss("sweep-0") is None


def test_the_experiments_of_a_search_are_told_from_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [f"refs/exps/ab/cdef/{name}" for name in ("sweep-2-0", "sweep-21", "sweep-2", "my-sweep-2")]
    monkeypatch.setattr(sweep, "git", lambda *_: "\n".join(listed))
    assert sweep.experiments(r"sweep-\d+") == [listed[1], listed[2]]
