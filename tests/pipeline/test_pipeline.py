"""The whole pipeline at a tiny size, run by the commands that users run, in a checkout of its own."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from filelock import FileLock
from mlflow.entities import Run

from gpt2.core.files import sha256_of
from gpt2.tracking.runs import FLUSH_SECONDS

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "train", "evaluate", "sample", "register")
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

pytestmark = pytest.mark.slow
COMMIT_RESULTS = "git add -A && git commit -q --allow-empty -m results"
Shell = Callable[..., subprocess.CompletedProcess[str]]


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
        else:
            output = shell("dvc repro").stdout
            shutil.copytree(checkout, shared / "gpt2", symlinks=True)
            said.write_text(output)
    return said.read_text()


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
    for name in curves | samples | {"test/loss", "test/perplexity", "test/bits_per_byte"}:
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert steps and max(steps) == max_steps and len(steps) == len(set(steps)), name
    assert run.inputs and [one.dataset.name for one in run.inputs.dataset_inputs] == ["data/raw"]
    location = "mlflow-artifacts:/" if server else f"{checkout.as_uri()}/mlartifacts/"
    assert str(run.info.artifact_uri).startswith(location)
    artifacts = {
        item.path for folder in ("config", "samples", "plots") for item in client.list_artifacts(run_id, folder)
    }
    assert {"config/params.yaml", "samples/samples.md", "samples/samples.json", "plots/val_loss.csv"} <= artifacts


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
    patterns = ("tokens/*", "model/*", "samples/*", "metrics/evaluate.json", "metrics/sample.json", "plots/*loss.csv")
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


# Kills a training, which seeds dropout with 1234 plus the number of steps done.
DIE_AT_STEP_4 = """
import os, signal, sys
if sys.orig_argv[-1] == "src/train.py":
    import torch
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: os.kill(os.getpid(), signal.SIGKILL) if seed == 1237 else manual_seed(seed)
"""


def test_experiments_leave_complete_runs_and_the_same_bytes(
    checkout: Path, shell: Shell, environment: dict[str, str], tmp_path: Path, reproduced: object
) -> None:
    mine = shutil.copytree(checkout, tmp_path / "mine" / "gpt2", symlinks=True)
    shell(f"cd {mine} && {COMMIT_RESULTS}")
    (tmp_path / "sitecustomize.py").write_text(DIE_AT_STEP_4)
    aside = f"cd {mine} && dvc exp run --temp -n aside -S train.max_steps=5 -S train.checkpoint_interval=2"
    shell(f"export PYTHONPATH={tmp_path} && {aside}", code=255)
    assert "going on after step 2" in shell(aside).stdout
    for steps in (7, 8):
        shell(f"cd {mine} && dvc exp run --queue -n queued-{steps} -S train.max_steps={steps}")
    run_queue(mine, shell, environment)
    runs = runs_by_name(mine)
    expected = {"aside": 5, "queued-7": 7, "queued-8": 8}
    assert set(expected) < set(runs)
    for name, steps in expected.items():
        assert runs[name].data.tags["dvc.experiment"] == name
        assert_complete(mine, runs[name], steps)
    assert "queued-8" in shell(f"cd {mine} && dvc exp show --csv").stdout
    assert not list((mine / ".dvc/tmp/exps").glob("**/mlflow.db"))
    by_hand = clone(mine, tmp_path / "gpt2", max_steps=8)
    shell(f"cd {by_hand} && python src/prepare.py && python src/train.py")
    trained = sha256_of(by_hand / "data/model/model.safetensors")
    assert runs["queued-8"].data.tags["gpt2.model_sha256"] == trained
    applied = shutil.copytree(mine, tmp_path / "applied", symlinks=True)
    shell(f"cd {applied} && dvc exp apply queued-8")
    # Texts were not in the experiment's own folder, so prepare runs again, with the same outcome.
    assert stages_run(shell(f"cd {applied} && dvc repro").stdout) == ["prepare", "register"]
    assert sha256_of(applied / "data/model/model.safetensors") == trained
    assert set(runs_by_name(applied)) == set(runs)


def test_repro_runs_every_stage_once(shell: Shell, reproduced: str) -> None:
    assert stages_run(reproduced) == list(STAGES)
    assert "gpt2 version 1 is champion" in reproduced
    assert stages_run(shell("dvc repro").stdout) == []
    assert "up to date" in shell("dvc status").stdout


def test_files_hold_the_contract(checkout: Path, reproduced: object) -> None:
    trained = json.loads((checkout / "data/metrics/train.json").read_text())
    names = {"train_loss", "val_loss", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "parameters"}
    assert names <= set(trained)
    assert trained["steps"] == 6 and trained["tokens"] == 6 * 4 * 32
    evaluated = json.loads((checkout / "data/metrics/evaluate.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "stride", "model"} <= set(evaluated)
    with (checkout / "data/plots/val_loss.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]
    sampled = json.loads((checkout / "data/metrics/sample.json").read_text())
    model = json.loads((checkout / "data/model/config.json").read_text())["model_sha256"]
    assert evaluated["model"] == sampled.pop("model") == model[:8]
    assert list(sampled) == ["distinct_1", "distinct_2", "distinct_3", "repetition", "copied_8grams"]
    assert all(type(value) is float and 0 <= value <= 1 for value in sampled.values()) and sampled["distinct_1"] > 0
    assert "**The quick brown**" in (checkout / "data/samples/samples.md").read_text()


def test_dvc_shows_metrics_and_plots(checkout: Path, shell: Shell, reproduced: object) -> None:
    shown = shell("dvc metrics show").stdout
    assert "perplexity" in shown and "copied_8grams" in shown
    shell("dvc plots show -o plots")
    assert (checkout / "plots" / "index.html").is_file()
    shutil.rmtree(checkout / "plots")


def test_mlflow_mirrors_the_run(checkout: Path, reproduced: object) -> None:
    (run,) = runs_by_name(checkout).values()
    assert_complete(checkout, run, max_steps=6)


def test_a_version_tells_how_to_make_it_again(checkout: Path, shell: Shell, reproduced: object) -> None:
    facts, commands = shell("python src/register.py --show").stdout.split("\n\n")
    shown = yaml.safe_load(facts)
    made = json.loads((checkout / "data/model/config.json").read_text())["model_sha256"]
    assert shown["weights_sha256"] == made
    assert shown["git_commit"] == shell("git rev-parse HEAD").stdout.strip()
    assert shown["test_perplexity"] == json.loads((checkout / "data/metrics/evaluate.json").read_text())["perplexity"]
    assert shown["test_stride"] == 16
    assert shown["data_digest"] == sha256_of(checkout / "data/tokens/train.bin")[:32]
    assert shown["params"]["train"]["max_steps"] == 6 and shown["aliases"] == ["champion"]
    all_installed = "\n".join(line for line in commands.splitlines() if "pip install" not in line)
    assert shell(f"set -e\n{all_installed}").stdout.splitlines()[-1].split()[0] == made


def test_weights_that_were_not_registered_are_refused(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: object
) -> None:
    assert "has the SHA-256 that was registered" in shell("python src/register.py --verify").stdout
    (weights,) = (checkout / "mlartifacts").rglob("model.safetensors")
    config = weights.with_name("config.json")
    whole, recorded = weights.read_bytes(), config.read_text()

    def assert_refused(reason: str) -> None:
        commands = ["register.py --verify", "register.py --verify models:/gpt2/1", "infer.py --prompt Roses"]
        printed = run_scripts(commands, checkout, environment, code=2)
        assert [reason in line for line in printed.splitlines()] == [True] * len(commands)

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused("is damaged")
    config.write_text(json.dumps(json.loads(recorded) | {"model_sha256": sha256_of(weights)}))
    assert_refused("does not hold the weights that were registered")
    weights.write_bytes(whole)
    config.write_text(recorded)


def test_results_that_do_not_belong_together_are_not_registered(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: object
) -> None:
    before = runs_by_name(checkout).keys()
    shell("sed -i.saved 's/max_steps: 6/max_steps: 7/' params.yaml")
    refused = shell("python src/register.py", code=2).stderr
    (checkout / "params.yaml.saved").replace(checkout / "params.yaml")
    assert "the results are of other parameters (train.max_steps 6, not 7); run `dvc repro`" in refused
    for name, changed, reason in (
        ("metrics/evaluate.json", {"model": "of-older"}, "the results of stage evaluate are not of the model in"),
        ("metrics/sample.json", {"model": "of-older"}, "the results of stage sample are not of the model in"),
        ("metrics/evaluate.json", {"stride": 8}, "the results are of other parameters (evaluate.stride 8, not 16)"),
        ("tokens/meta.json", {"source": "sotu"}, "other parameters (prepare.source sotu, not data/raw)"),
        ("tokens/meta.json", {"splits": None}, "the results cannot be read"),
    ):
        file = checkout / "data" / name
        ours = file.read_text()
        file.write_text(json.dumps(json.loads(ours) | changed))
        assert reason in run_scripts(["register.py"], checkout, environment, code=2)
        file.write_text(ours)
    assert runs_by_name(checkout).keys() == before


def test_mlflow_serves_the_text_that_infer_and_sample_write(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: str
) -> None:
    (sample,) = csv.DictReader((checkout / "data" / "samples" / "samples.csv").open())
    prompt, sampled, seed = sample["prompt"], sample["text"], int(sample["seed"])

    def post(address: str, **params: Any) -> tuple[int, Any]:
        body = json.dumps({"inputs": {"prompt": [prompt]}, "params": params}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    port = free_port()
    command = ["mlflow", "models", "serve", "-m", "models:/gpt2@champion", "--env-manager", "local", "-p", str(port)]
    with running(command, checkout, environment, f"http://127.0.0.1:{port}") as address:
        status, answer = post(address, temperature=0.7, top_k=40, max_tokens=9, seed=seed)
        assert (status, answer) == (200, {"predictions": [{"text": sampled}]})
        for params, reason in (
            ({"temperatur": 1.0}, "temperatur"),
            ({"top_p": 1.5}, "top_p should be less than or equal to 1"),
            ({"max_tokens": "many"}, "max_tokens"),
        ):
            status, answer = post(address, **params)
            assert status == 400 and reason in answer, answer
    run_id = re.search(r"run repro-\w+: (\w+)", reproduced)
    assert run_id is not None
    infer = f"python src/infer.py --prompt {shlex.quote(prompt)} --max_tokens 9 --seed {seed} --device cpu"
    for options in ("", f"--temperature 0.7 --top_k 40 --model runs:/{run_id[1]}/model"):  # or the defaults
        written = shell(f"{infer} {options}")
        assert sampled and written.stdout == f"{prompt}{sampled}\n"
        assert "d_model 16" in written.stderr and "tokens/s" in written.stderr


def test_by_hand_gives_the_same_bytes(checkout: Path, shell: Shell, reproduced: object) -> None:
    before = digests(checkout)
    shell("python src/prepare.py && python src/train.py && dvc commit --force train")
    assert stages_run(shell("dvc repro").stdout) == ["register"]  # which shows the measured speed, another one now
    shell("python src/evaluate.py && python src/sample.py && python src/register.py")
    assert stages_run(shell("dvc repro").stdout) == []
    assert digests(checkout) == before


def test_a_lost_store_is_rebuilt_without_training(checkout: Path, shell: Shell, reproduced: object) -> None:
    (checkout / "mlflow.db").unlink()
    shutil.rmtree(checkout / "mlartifacts")
    repaired = shell("dvc repro")
    assert stages_run(repaired.stdout) == ["register"]
    assert "gpt2 version 1 is champion" in repaired.stdout
    (run,) = runs_by_name(checkout).values()
    assert_complete(checkout, run, max_steps=6)


def test_a_clone_that_pulls_the_results_trains_nothing_and_may_be_moved(
    checkout: Path, shell: Shell, tmp_path: Path, reproduced: object
) -> None:
    shell(COMMIT_RESULTS)
    pulled = clone(checkout, tmp_path / "gpt2")
    for folder in (checkout, pulled):
        shell(f"cd {folder} && dvc remote add -q --local --default shelf {tmp_path / 'shelf'}")
    shell(f"dvc push && dvc remote remove --local shelf && cd {pulled} && dvc pull")
    assert stages_run(shell(f"cd {pulled} && dvc repro").stdout) == ["register"]
    (run,) = runs_by_name(pulled).values()
    assert_complete(pulled, run, max_steps=6)
    assert digests(pulled) == digests(checkout)

    moved = pulled.rename(tmp_path / "elsewhere")
    written = 'python src/infer.py --prompt "Roses number" --max_tokens 5 --seed 1'
    assert shell(f"cd {moved} && {written}").stdout == shell(written).stdout
    shell(f"cd {moved} && dvc exp run -n here -S train.max_steps=4")
    assert re.search(r"train.max_steps +6 +4", shell(f"cd {moved} && dvc params diff").stdout)
    here = runs_by_name(moved)["here"]
    assert here.data.tags["dvc.experiment"] == "here"
    assert_complete(moved, here, max_steps=4)
    client = client_of(moved)
    losses = {one.version: float(one.tags["gpt2.test_loss"]) for one in client.search_model_versions("name = 'gpt2'")}
    champion = client.get_model_version_by_alias("gpt2", "champion")
    assert len(losses) == 2 and losses[champion.version] == min(losses.values())
    assert not pulled.exists()


def delete_broken_lock_file(checkout: Path) -> None:
    """What the README tells to do if DVC was killed while it wrote its lock file in place (treeverse/dvc#7615)."""
    file = checkout / ".dvc/tmp/rwlock"
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError:
            file.unlink()


# Python runs such a file when it starts. By this one a training notes its steps as they begin, and a script stops, as
# Ctrl-Z would do it, just before some of its changes and steps.
NOTE_AND_STOP = """
import itertools, os, signal, sys
sys.dont_write_bytecode = True  # its files would be changes too
if sys.orig_argv[-1] == "src/train.py":
    import torch
    manual_seed = torch.manual_seed
    def noting_manual_seed(seed):
        with open(os.environ["NOTED_STEPS"], "a") as file:
            file.write(f"{os.getpid()} {seed}\\n")
        sys.audit("step")
        return manual_seed(seed)
    torch.manual_seed = noting_manual_seed
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
Repro = Callable[..., psutil.Popen]


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
    strike("train", 40, alone=True)  # MLflow's store is half made
    # Only dvc is killed: the next one waits for the training that is left, and goes on when that too has died.
    dvc = start("train", 120)
    orphan = stopped_script(dvc)
    kill(dvc)
    dvc = start("train", 60)
    wait_for(lambda: "another training writes to this checkout; waiting for it" in output.read_text(), dvc)
    assert is_alive(orphan) and is_alive(dvc)
    kill(orphan)
    kill(stopped_script(dvc))
    dvc.wait(60)
    for i, change in enumerate((15, 33, 38, 43, 48, 53)):
        strike("train", change, alone=i % 2 == 0)
    strike("evaluate", 4, alone=True)
    strike("sample", 9, alone=False)  # one of its three files is there
    for i, change in enumerate((5, 20, 40, 60)):
        strike("register", change, alone=i % 2 == 0)
    assert start("train").wait(600) == 0

    seeds: dict[str, list[int]] = {}
    for line in (tmp_path / "steps").read_text().splitlines():
        process, seed = line.split()
        seeds.setdefault(process, []).append(int(seed) - 1234)
    # A training seeds for its weights and, when it is not restored, for its start too, before its first step.
    steps = [seed for own in seeds.values() for seed in own[2 if own[1:2] == [0] else 1 :]]
    repeated = [last - following + 1 for last, following in pairwise(steps) if following != last + 1]
    assert len(repeated) >= 3 and all(0 < count <= interval for count in repeated), repeated
    assert steps[-1] == max_steps - 1
    assert digests(killed) == digests(unbroken)
    (run,) = runs_by_name(killed).values()
    assert_complete(killed, run, max_steps)
    assert not list((killed / ".cache/train").iterdir())


def test_ctrl_c_saves_first_and_the_next_repro_goes_on(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    folder = clone(checkout, tmp_path / "gpt2", max_steps=100)
    refused = run_scripts(["infer.py --prompt Roses"], folder, environment, code=2)
    assert "no model at models:/gpt2@champion" in refused
    dvc = repro(folder, "train", 120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0)
    script = stopped_script(dvc)
    os.killpg(dvc.pid, signal.SIGINT)
    script.resume()
    output, _ = dvc.communicate(timeout=120)
    (step,) = re.findall(r"stopped after step (\d+), which is saved", output)
    assert dvc.returncode != 0 and 0 < int(step) < 100
    done = subprocess.run(
        ["dvc", "repro", "train"], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert f"going on after step {step}, restored" in done.stdout


@contextlib.contextmanager
def tracking_server(folder: Path, port: int, environment: dict[str, str]) -> Iterator[str]:
    """An MLflow server whose store is in `folder`; yields its address, and kills it in the end."""
    folder.mkdir(exist_ok=True)
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", f"{folder}/artifacts"]
    variables = environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running([*command, *stores], folder, variables, f"http://127.0.0.1:{port}") as address:
        yield address


@contextlib.contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str], address: str) -> Iterator[str]:
    """Run a server in `folder`; yield its address when it answers, and kill it in the end."""
    with tempfile.TemporaryFile() as log:
        server = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"{address}/health"), server)
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
        deserted = repro_at(server, 30, 50)
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


def test_wrong_params_stop_everything_with_one_line_and_lose_nothing(
    checkout: Path, shell: Shell, reproduced: object
) -> None:
    before = digests(checkout)
    failed = shell("dvc exp run -S train.max_steps=0 -S model.n_heads=3", code=255)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "train.max_steps" in errors[0] and "n_heads" in errors[0]
    shell("git checkout -q HEAD params.yaml")
    assert digests(checkout) == before
    assert "train" not in stages_run(shell("dvc repro").stdout)
