"""`dvc exp run` in folders of their own, one by one and from the queue."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gpt2.core.files import sha256_of
from pipeline.helpers import COMMIT_RESULTS, Shell, assert_complete, clone, runs_by_name, stages_run

pytestmark = pytest.mark.slow

# Columns for the parameters that differ and for the result; DVC ends names that do not fit with "…".
SHOW_WHAT_CHANGED = r"dvc exp show --only-changed --drop '(?!Exp|State|loss|perplexity|\w+\.\w+$)'"

# Kills a training before its fourth step.
DIE_AT_STEP_4 = """
import os, signal, sys
if sys.orig_argv[-1] == "src/train.py":
    sys.path.insert(0, "src")
    from gpt2.training.trainer import Trainer
    do_step = Trainer.step
    Trainer.step = lambda trainer, step: os.kill(os.getpid(), signal.SIGKILL) if step == 3 else do_step(trainer, step)
"""


def test_experiments_leave_complete_runs_and_the_same_bytes(
    checkout: Path, shell: Shell, environment: dict[str, str], tmp_path: Path, reproduced: object
) -> None:
    mine = shutil.copytree(checkout, tmp_path / "mine" / "gpt2", symlinks=True)
    shell(f"cd {mine} && {COMMIT_RESULTS}")
    refused = shell(f"cd {mine} && dvc exp run --temp", code=255).stderr
    assert "run `dvc add data/raw/poems.txt` and commit data/raw/poems.txt.dvc" in refused
    shell(f"cd {mine} && dvc add data/raw/poems.txt && {COMMIT_RESULTS}")
    (tmp_path / "sitecustomize.py").write_text(DIE_AT_STEP_4)
    aside = f"cd {mine} && dvc exp run --temp -n aside -S train.max_steps=5 -S train.checkpoint_interval=2"
    shell(f"export PYTHONPATH={tmp_path} && {aside}", code=255)
    assert "resuming after step 2" in shell(aside).stdout
    for steps in (7, 8):
        shell(f"cd {mine} && dvc exp run --queue -n queued-{steps} -S train.max_steps={steps}")
    run_queue(mine, shell, environment)
    runs = runs_by_name(mine)
    expected = {"aside": 5, "queued-7": 7, "queued-8": 8}
    assert set(expected) < set(runs)
    for name, steps in expected.items():
        assert runs[name].data.tags["dvc.experiment"] == name
        assert_complete(mine, runs[name], steps)
    shown = shell(f"cd {mine} && COLUMNS=120 {SHOW_WHAT_CHANGED}").stdout
    assert all(word in shown for word in ("queued-8", "perplexity", "train.max_steps")) and "…" not in shown
    assert not list((mine / ".dvc/tmp/exps").glob("**/mlflow.db"))
    by_hand = clone(mine, tmp_path / "gpt2", max_steps=8)
    shell(f"cd {by_hand} && python src/prepare.py && python src/train.py")
    trained = sha256_of(by_hand / "data/model/model.safetensors")
    assert runs["queued-8"].data.tags["gpt2.model_sha256"] == trained
    applied = shutil.copytree(mine, tmp_path / "applied", symlinks=True)
    shell(f"cd {applied} && dvc exp apply queued-8")
    assert stages_run(shell(f"cd {applied} && dvc repro").stdout) == ["register"]
    assert sha256_of(applied / "data/model/model.safetensors") == trained
    assert set(runs_by_name(applied)) == set(runs)


def run_queue(checkout: Path, shell: Shell, environment: dict[str, str]) -> None:
    """Run what is queued, two at a time.

    On a busy machine one of DVC's workers can miss the message that ends it (treeverse/dvc#10398), and
    --run-all then waits for it although all experiments have ended: so it is ended here.
    """
    process = subprocess.Popen(["dvc", "exp", "run", "--run-all", "-j", "2"], cwd=checkout, env=environment)
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            if not re.search("Queued|Running", shell(f"cd {checkout} && dvc queue status").stdout):
                break
    if process.poll() is None:
        process.kill()
        process.wait()
        for file in checkout.glob(".dvc/tmp/exps/celery/*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGTERM)
    assert "Failed" not in shell(f"cd {checkout} && dvc queue status").stdout
