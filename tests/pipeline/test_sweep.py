"""A search with the tiny pipeline, killed in the middle: DVC, MLflow and Optuna tell the same of its trials."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("optuna")

from pipeline.helpers import COMMIT_RESULTS, Shell, client_of, runs_by_name, stages_run, wait_for

pytestmark = pytest.mark.slow

# A training that lasts long enough to be pruned: MLflow gets its points every five seconds.
SLOW_STEPS = """
import sys, time
if sys.orig_argv[-1] == "src/train.py":
    sys.path.insert(0, "src")
    from gpt2.training.trainer import Trainer
    do_step = Trainer.step
    Trainer.step = lambda trainer, step: time.sleep(0.2) or do_step(trainer, step)
"""
SWEEP = {
    "name": "rates",
    "trials": 4,
    "seed": 3,  # three good trials, of which two are repeated, and a bad one
    "prune": True,
    "space": {"train.learning_rate": {"choices": [0.00001, 0.005]}, "train.weight_decay": {"choices": [0.0, 0.1, 0.2]}},
}


@pytest.fixture
def searches(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of searches whose trainings are slow; all that is left of them is killed in the end."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_STEPS)
    path = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    yield environment | {"PYTHONPATH": path, "SEARCHES": str(tmp_path)}
    for process in psutil.process_iter():
        try:
            if process.environ().get("SEARCHES") == str(tmp_path):
                process.kill()
        except psutil.Error:
            pass


def test_a_killed_search_goes_on_to_its_end(
    checkout: Path, shell: Shell, searches: dict[str, str], tmp_path: Path, reproduced: object
) -> None:
    folder = shutil.copytree(checkout, tmp_path / "gpt2", symlinks=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"] |= {"max_steps": 60}
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"sweep": SWEEP}))
    shell(f"cd {folder} && dvc add data/raw/poems.txt && {COMMIT_RESULTS}")

    def search(**options: Any) -> psutil.Popen:
        return psutil.Popen(["python", "src/sweep.py"], cwd=folder, env=searches, text=True, **options)

    def has_begun(name: str) -> bool:
        return (folder / "mlflow.db").exists() and name in runs_by_name(folder)

    first = search()
    wait_for(lambda: has_begun("rates-0"), first)
    first.kill()  # its trial goes on, and the next search follows it
    second = search()
    wait_for(lambda: has_begun("rates-3"), second)
    for process in (*second.children(recursive=True), second):
        process.kill()
    last = search(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0 and "rates-3: pruned" in output, output
    (best,) = re.findall(r"`dvc exp apply (rates-\d)`", output)

    shown = json.loads(shell(f"cd {folder} && dvc exp show --json").stdout)
    ended = [one for branch in shown for one in branch["experiments"] or [] if not one["executor"]]  # DVC's was killed
    rows = [revision for one in ended for revision in one["revs"]]
    losses = {one["name"]: one["data"]["metrics"]["data/metrics/train.json"]["data"]["val_loss"] for one in rows}
    runs = runs_by_name(folder)
    assert {name: runs[name].data.metrics["val/full_loss"] for name in losses} == losses
    assert set(losses) == {"rates-0", "rates-1", "rates-2"} and losses[best] == min(losses.values())
    assert runs["rates"].data.tags["gpt2.best_trial"] == best
    assert (runs["rates-3"].info.status, runs["rates-3"].data.tags["optuna.state"]) == ("KILLED", "PRUNED")
    assert {runs[f"rates-{i}"].data.tags["mlflow.parentRunId"] for i in range(4)} == {runs["rates"].info.run_id}
    assert {kept.stem for kept in (folder / ".cache/train").iterdir()} == {"finished"}  # that of `reproduced`

    shell(f"cd {folder} && dvc exp apply {best}")
    assert stages_run(shell(f"cd {folder} && dvc repro").stdout) == ["evaluate", "sample", "report", "register"]
    completed = client_of(folder).get_run(runs[best].info.run_id)
    assert "test/loss" in completed.data.metrics and completed.data.tags["optuna.state"] == "COMPLETE"
