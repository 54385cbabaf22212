"""A training that is killed or stopped, or that loses MLflow's server, ends with the same bytes."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2.core.files import sha256_of
from gpt2.tracking.runs import FLUSH_SECONDS
from pipeline.helpers import (
    STAGES,
    Repro,
    assert_complete,
    client_of,
    clone,
    digests,
    free_port,
    is_alive,
    run_scripts,
    running,
    runs_by_name,
    stages_run,
    wait_for,
)

pytestmark = pytest.mark.slow


def delete_broken_lock_file(checkout: Path) -> None:
    """What the README tells to do if DVC was killed while it wrote its lock file in place (treeverse/dvc#7615)."""
    file = checkout / ".dvc/tmp/rwlock"
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError:
            file.unlink()


def stopped_script(dvc: psutil.Popen) -> psutil.Process:
    """Wait until a script of `dvc repro` stops, and return its process."""

    def find() -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in dvc.children(recursive=True):
                if process.status() == psutil.STATUS_STOPPED:
                    return process
        return None

    process = wait_for(find, dvc)
    assert process
    return process


def test_killed_at_any_moment_equals_unbroken(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    max_steps, interval = 120, 3
    unbroken, killed = (
        clone(checkout, tmp_path / name / "gpt2", max_steps=max_steps, checkpoint_interval=interval)
        for name in ("unbroken", "killed")
    )
    run_scripts([f"{stage}.py" for stage in STAGES if stage != "register"], unbroken, environment)
    output = tmp_path / "output"

    def start(stage: str, *stops: int) -> psutil.Popen:
        delete_broken_lock_file(killed)
        with output.open("a") as file:
            return repro(killed, stage, *stops, stdout=file, stderr=file)

    def kill(*victims: psutil.Process) -> None:
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                victim.wait(60)

    def strike(stage: str, change: int, alone: bool) -> None:
        """Run the pipeline, and kill it before a change that a stage makes: the stage's script alone, or all."""
        dvc = start(stage, change)
        process = stopped_script(dvc)
        kill(*([process] if alone else [dvc, *dvc.children(recursive=True)]))
        dvc.wait(60)

    strike("prepare", 10, alone=False)  # its folder is whole, and about to be renamed
    strike("train", 39, alone=True)  # MLflow's store is half made
    # Only dvc is killed: the next one waits for the training that is left, and runs when that too has died.
    dvc = start("train", 136)
    orphan = stopped_script(dvc)
    kill(dvc)
    dvc = start("train", 86)
    wait_for(lambda: "another training writes to this checkout; waiting for it" in output.read_text(), dvc)
    assert is_alive(orphan) and is_alive(dvc)
    kill(orphan)
    kill(stopped_script(dvc))
    dvc.wait(60)
    for i, change in enumerate((14, 47, 55, 74)):
        strike("train", change, alone=i % 2 == 0)
    strike("evaluate", 4, alone=True)
    strike("sample", 9, alone=False)  # one of its three files is there
    for i, change in enumerate((5, 40)):
        strike("register", change, alone=i % 2 == 0)
    assert start("train").wait(600) == 0

    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    repeated = [last - following + 1 for last, following in pairwise(steps) if following != last + 1]
    assert len(repeated) >= 3 and all(0 < count <= interval for count in repeated), repeated
    assert steps[-1] == max_steps - 1
    assert digests(killed) == digests(unbroken)
    (run,) = runs_by_name(killed).values()
    assert_complete(killed, run, max_steps)
    (kept,) = (killed / ".cache/train").iterdir()
    assert kept.name == "finished" and len(list(kept.glob("*-*"))) == 1


def test_ctrl_c_saves_first_and_the_next_repro_goes_on(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    folder = clone(checkout, tmp_path / "gpt2", max_steps=100)
    refused = run_scripts(["infer.py --prompt Roses"], folder, environment, code=2)
    assert "no model at models:/gpt2@champion" in refused
    dvc = repro(folder, "train", 140, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0)
    script = stopped_script(dvc)
    os.killpg(dvc.pid, signal.SIGINT)
    script.resume()
    output, _ = dvc.communicate(timeout=120)
    (step,) = re.findall(r"stopped after step (\d+), which is saved", output)
    assert dvc.returncode != 0 and 0 < int(step) < 100
    done = subprocess.run(
        ["dvc", "repro", "train"], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert f"resuming after step {step}, from" in done.stdout


def test_an_edit_during_a_training_is_not_what_has_trained(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    folder = clone(checkout, tmp_path / "gpt2", max_steps=20)
    edited = folder / "src/gpt2/training/trainer.py"
    trained = sha256_of(edited)
    dvc = repro(folder, "train", 60)
    script = stopped_script(dvc)
    with edited.open("a") as file:
        file.write("# edited\n")
    script.resume()
    assert dvc.wait(600) == 0
    lineage = json.loads((folder / "data/lineage.json").read_text())
    assert lineage["files"]["src/gpt2/training/trainer.py"] == trained != sha256_of(edited)
    assert lineage["uncommitted"] == ["params.yaml"] and "+  max_steps: 20" in lineage["diff"]
    (run,) = runs_by_name(folder).values()
    assert_complete(folder, run, 20)
    (version,) = client_of(folder).search_model_versions("name = 'gpt2'")
    for tags in (run.data.tags, version.tags):
        assert tags["gpt2.train_key"] == lineage["train_key"]
        assert tags["mlflow.source.git.commit"] == lineage["commit"]


def test_a_finished_training_is_extended(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    extended, unbroken = (
        clone(checkout, tmp_path / name / "gpt2", max_steps=steps, log_checkpoints=15)
        for name, steps in (("short", 20), ("long", 40))
    )
    assert repro(extended, "").wait(600) == 0
    shutil.copy(unbroken / "params.yaml", extended)
    assert repro(extended, "").wait(600) == 0
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps == [*range(20), *range(10, 40)]
    run_scripts([f"{stage}.py" for stage in STAGES if stage != "register"], unbroken, environment)
    assert digests(extended) == digests(unbroken)
    short, long = sorted(runs_by_name(extended).values(), key=lambda run: run.info.start_time)
    assert_complete(extended, short, 20)
    assert_complete(extended, long, 40)
    points = [client_of(extended).get_metric_history(run.info.run_id, "val/loss") for run in (short, long)]
    assert [[point.step for point in one] for one in points] == [[0, *range(3, 20, 3), 20], [0, *range(3, 40, 3), 40]]
    models = client_of(extended).search_logged_models([long.info.experiment_id], "name LIKE 'step-%'")
    assert sorted(model.name for model in models) == ["step-15", "step-15", "step-30"]
    uris = [f"runs:/{short.info.run_id}/step-15", *(f"models:/{model.model_id}" for model in models)]
    run_scripts([f"infer.py --model {uri} --prompt Roses --max_tokens 3" for uri in uris], extended, environment)
    run_scripts(["train.py --remove-checkpoints"], extended, environment)
    assert not list((extended / ".cache/train").iterdir())


@contextlib.contextmanager
def tracking_server(folder: Path, port: int, environment: dict[str, str]) -> Iterator[str]:
    """An MLflow server whose store is in `folder`; yields its address, and kills it in the end."""
    folder.mkdir(exist_ok=True)
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", f"{folder}/artifacts"]
    variables = environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running([*command, *stores], folder, variables, f"http://127.0.0.1:{port}") as address:
        yield address


def test_a_server_that_dies_costs_no_step(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    max_steps, port = 100, free_port()  # the server comes back at the same one
    folder = clone(checkout, tmp_path / "gpt2", max_steps=max_steps)
    hurry = {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}

    def repro_at(server: str, *stops: int) -> psutil.Popen:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return repro(folder, "train", *stops, more=hurry | {"MLFLOW_TRACKING_URI": server}, **pipes)

    def resume_when_points_are_due(process: psutil.Process) -> None:
        time.sleep(FLUSH_SECONDS)
        process.resume()

    with tracking_server(tmp_path / "server", port, environment) as server:
        deserted = repro_at(server, 28, 48)
        resume_when_points_are_due(stopped_script(deserted))
        process = stopped_script(deserted)
        (run,) = runs_by_name(folder, server).values()
        assert "train/loss" in run.data.metrics
    resume_when_points_are_due(process)
    output, errors = deserted.communicate(timeout=300)
    assert stages_run(output) == list(STAGES) and deserted.returncode == 255
    assert "warning: MLflow's store fails, so training continues without it" in errors
    assert len(re.findall("^error: MLflow's store fails .* run `dvc repro` again", errors, flags=re.MULTILINE)) == 1
    before = digests(folder)

    with tracking_server(tmp_path / "server", port, environment) as server:
        completing = repro_at(server)
        output, errors = completing.communicate(timeout=300)
        assert stages_run(output) == ["register"] and completing.returncode == 0, errors
        (run,) = runs_by_name(folder, server).values()
        assert_complete(folder, run, max_steps, server)
        (tmp_path / "temporary").mkdir()
        variables = environment | {"MLFLOW_TRACKING_URI": server, "TMPDIR": str(tmp_path / "temporary")}
        write = [sys.executable, "src/infer.py", "--prompt", "Roses", "--max_tokens", "3"]
        subprocess.run(write, cwd=folder, env=variables, check=True)
    kept = folder / ".cache/models" / run.data.tags["gpt2.model_sha256"]
    assert list(kept.rglob("model.safetensors")) and not list((tmp_path / "temporary").rglob("model.safetensors"))
    assert digests(folder) == before
    assert not (folder / "mlflow.db").exists()
