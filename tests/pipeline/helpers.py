"""What the tests of the whole pipeline share: its commands, its results and its processes."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import yaml
from mlflow.entities import Run

from gpt2.core.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "train", "evaluate", "sample", "report", "register")
TINY = {
    "prepare": {"source": "data/raw", "val_fraction": 0.1, "test_fraction": 0.1},
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_len": 32},
    "train": {
        "max_steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "warmup_steps": 2,
        "log_interval": 2,
        "eval_interval": 3,
        "eval_windows": 4,
    },
    "runtime": {"threads": 1, "device": "cpu"},
    "evaluate": {"stride": 16},
    "sample": {"prompts": ["The quick brown"], "settings": [{"temperature": 0.7, "top_k": 40}], "max_tokens": 9},
}
COMMIT_RESULTS = "git add -A && git commit -q --allow-empty -m results"
Shell = Callable[..., subprocess.CompletedProcess[str]]  # runs a command in the checkout
Repro = Callable[..., psutil.Popen]  # starts `dvc repro` in a folder


def client_of(checkout: Path, server: str | None = None) -> mlflow.MlflowClient:
    """A client of the checkout's own store, or of a server."""
    return mlflow.MlflowClient(server or f"sqlite:///{checkout / 'mlflow.db'}")


def runs_by_name(checkout: Path, server: str | None = None) -> dict[str, Run]:
    client = client_of(checkout, server)
    experiment = client.get_experiment_by_name("gpt2")
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def assert_complete(checkout: Path, run: Run, max_steps: int, server: str | None = None) -> None:
    """What every run must show, whether it was logged live or rebuilt from files."""
    client = client_of(checkout, server)
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["train.max_steps"] == str(max_steps)
    assert run.data.params["model.d_model"] == "16"
    assert {"gpt2.train_key", "gpt2.model_sha256", "mlflow.source.git.commit"} <= set(run.data.tags)
    samples = {f"sample/{name}" for name in ("distinct_1", "distinct_2", "distinct_3", "repetition", "copied_8grams")}
    curves = {"train/loss", "train/learning_rate", "train/tokens_per_second", "val/loss"}
    for name in curves:
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert steps and max(steps) == max_steps and len(steps) == len(set(steps)), name
    for name in samples | {"test/loss", "test/perplexity", "test/bits_per_byte", "val/full_loss", "train/tokens"}:
        assert [point.step for point in client.get_metric_history(run_id, name)] == [0], name
    assert int(run.data.params["model.parameters"]) > 0
    assert run.inputs
    contexts = [(one.dataset.name, one.tags[0].value) for one in run.inputs.dataset_inputs]
    assert sorted(contexts) == [("data/raw", "test"), ("data/raw", "training"), ("data/raw", "validation")]
    location = "mlflow-artifacts:/" if server else f"{checkout.as_uri()}/mlartifacts/"
    assert str(run.info.artifact_uri).startswith(location)
    artifacts = {
        item.path for folder in ("config", "samples", "plots") for item in client.list_artifacts(run_id, folder)
    }
    assert {"config/params.yaml", "samples/samples.md", "samples/samples.json", "plots/val_loss.csv"} <= artifacts


def clone(checkout: Path, folder: Path, **train: int) -> Path:
    """Return a clone that has the corpus, and other parameters of the training."""
    subprocess.run(["git", "clone", "-q", checkout, folder], check=True)
    shutil.copy(checkout / "data/raw/poems.txt", folder / "data/raw")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"] |= train
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def digests(checkout: Path) -> dict[str, str]:
    """The SHA-256 of all results that do not tell of the clock."""
    patterns = (
        "tokens/*",
        "model/*",
        "samples/*",
        "report/*",
        "metrics/evaluate.json",
        "metrics/sample.json",
        "plots/*loss.csv",
    )
    files = [file for pattern in patterns for file in (checkout / "data").glob(pattern)]
    return {file.relative_to(checkout).as_posix(): sha256_of(file) for file in files if file.name != ".gitignore"}


# Runs scripts in one process, since each would take seconds to import PyTorch and MLflow.
RUN_SCRIPTS = """
import runpy, sys
sys.path.insert(0, "src")
expected = int(sys.argv[1])
for command in sys.argv[2:]:
    script, *sys.argv[1:] = command.split()
    code = 0
    try:
        runpy.run_path(f"src/{script}", run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert code == expected, (command, code)
"""


def run_scripts(commands: list[str], checkout: Path, environment: dict[str, str], code: int = 0) -> str:
    """Run scripts of src with their arguments, which must end with this exit code; return what they say on stderr."""
    program = [sys.executable, "-c", RUN_SCRIPTS, str(code)]
    done = subprocess.run([*program, *commands], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def wait_for(find: Callable[[], Any], process: psutil.Process | None = None) -> Any:
    """Wait until something is found, or the process has ended that might have brought it; return what is found."""
    deadline = time.monotonic() + 600
    while not (found := find()) and (process is None or is_alive(process)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


@contextlib.contextmanager
def running(
    command: list[str], folder: Path, environment: dict[str, str], address: str, path: str = "health"
) -> Iterator[str]:
    """Run a server in `folder`; yield its address when it answers at `path`, and kill it in the end."""
    with tempfile.TemporaryFile() as log:
        server = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"{address}/{path}"), server)
        yield address
    finally:
        for process in (*server.children(recursive=True), server):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        time.sleep(0.1)
        return False
