"""A checkout of the project at a tiny size, and its results, for tests of the commands that users run."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock

from pipeline.helpers import ROOT, TINY, Repro, Shell


@pytest.fixture(scope="module", autouse=True)
def no_kept_connections() -> Iterator[None]:
    """A pooled connection would go on showing a database whose file has been deleted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of the project as it stands in the working tree, with tiny parameters and a tiny corpus."""
    folder = tmp_path_factory.mktemp("checkout") / "gpt2"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section, values in TINY.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    poem = "".join(f"Roses number {i} are red,\nviolets number {i * i} are blue.\n\n" for i in range(300))
    (folder / "data" / "raw" / "poems.txt").write_text(poem)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "A tiny pipeline"]):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """A user's environment, with this test's Python first on the path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "Test",
        "GIT_AUTHOR_EMAIL": "test@example.com",
        "GIT_COMMITTER_NAME": "Test",
        "GIT_COMMITTER_EMAIL": "test@example.com",
    }


@pytest.fixture(scope="module")
def shell(checkout: Path, environment: dict[str, str]) -> Shell:
    """Run a command in the checkout and check its exit code."""

    def run(command: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, input=stdin, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="module")
def reproduced(checkout: Path, shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Let the checkout hold the results of `dvc repro`, run once for all processes that run tests; what it said."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reproduced"
    said = shared / "stdout"
    with FileLock(f"{shared}.lock"):
        if said.exists():
            shutil.rmtree(checkout)
            shutil.copytree(shared / "gpt2", checkout, symlinks=True)
            shell("python src/register.py --repair")  # the store is now elsewhere than where it was made
        else:
            output = shell("dvc repro").stdout
            shutil.copytree(checkout, shared / "gpt2", symlinks=True)
            said.write_text(output)
    return said.read_text()


# Python runs such a file when it starts. By this one a training notes its steps as they begin, and a script stops, as
# Ctrl-Z would do it, just before some of its changes and steps.
NOTE_AND_STOP = """
import itertools, os, signal, sys
sys.dont_write_bytecode = True  # its files would be changes too
if sys.orig_argv[-1] == "src/train.py":
    sys.path.insert(0, "src")
    from gpt2.training.trainer import Trainer
    do_step = Trainer.step
    def note_and_do_step(trainer, step):
        with open(os.environ["NOTED_STEPS"], "a") as file:
            file.write(f"{step}\\n")
        sys.audit("step")
        return do_step(trainer, step)
    Trainer.step = note_and_do_step
if sys.orig_argv[-1] == f"src/{os.environ['STOPPED_STAGE']}.py":
    from sqlalchemy import Engine, event
    numbers = itertools.count(1)
    def stop_before_a_change(name, arguments):
        if name in ("os.mkdir", "os.rename", "os.remove", "commit", "step"):
            if str(next(numbers)) in os.environ["STOPS_BEFORE"].split():
                os.kill(os.getpid(), signal.SIGSTOP)
    sys.addaudithook(stop_before_a_change)
    event.listen(Engine, "commit", lambda connection: sys.audit("commit"))
"""


@pytest.fixture
def repro(environment: dict[str, str], tmp_path: Path) -> Iterator[Repro]:
    """Start `dvc repro` in a folder, where a stage's script stops before some of its changes, counted from 1.

    Steps are noted in tmp_path / "steps". All that is left is killed in the end.
    """
    (tmp_path / "sitecustomize.py").write_text(NOTE_AND_STOP)
    steps = tmp_path / "steps"
    steps.touch()

    def start(
        folder: Path, stage: str, *stops: int, more: dict[str, str] | None = None, **options: Any
    ) -> psutil.Popen:
        stopping = {"STOPPED_STAGE": stage, "STOPS_BEFORE": " ".join(map(str, stops))}
        variables = environment | {"PYTHONPATH": str(tmp_path), "NOTED_STEPS": str(steps)} | stopping | (more or {})
        return psutil.Popen(["dvc", "repro"], cwd=folder, env=variables, text=True, **options)

    yield start
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NOTED_STEPS") == str(steps):
                process.kill()
