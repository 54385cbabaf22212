"""The store in processes of its own: paths that are absolute, mended and read where it lies; made by many or killed."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE as NOTE

from gpt2.config import ModelConfig
from gpt2.core.files import write_json, write_text
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import save_model
from gpt2.tracking.store import PATH_COLUMNS, charts_address, open_store, repair

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
# Its processes have opened no store yet, since MLflow remembers stores, but have loaded what takes long to load.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "pandas", "torch", "gpt2.tracking.provenance"])
OPENING = """
import os
from pathlib import Path
os.environ.pop("MLFLOW_TRACKING_URI", None)
import mlflow
from gpt2.tracking import store
store.main_root = lambda: root
"""


def start(root: Path, script: str) -> tuple[ForkServerProcess, Connection]:
    """Run a script in a process of its own, with `root` as the main checkout; it gives its result to `answer`."""
    answers, sender = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=exec, args=(OPENING + script, {"root": root, "answer": sender.send}))
    process.start()
    return process, answers


def answer_of(root: Path, script: str) -> Any:
    """Run a script like `start`, and return its answer."""
    process, answers = start(root, script)
    process.join(240)
    assert process.exitcode == 0
    return answers.recv()


LOG = """
with mlflow.start_run(experiment_id=store.open_store()) as run:
    mlflow.log_text("kept", "note.txt")
answer(run.info.run_id)
"""
OTHER_DATABASE = """
os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///tracking.db"
"""
# What `mlflow ui` does: nothing of this project, in the folder where it is called.
READ = """
os.chdir(root)
mlflow.set_tracking_uri("sqlite:///mlflow.db")
answer(mlflow.artifacts.load_text("runs:/{run}/note.txt"))
"""
REGISTER = """
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from gpt2.tracking import registry
from gpt2.tracking.champion import STRIDE, VAL_LOSS, promote
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.runs import ENVIRONMENT, THREADS
registry.MODEL, registry.PARAMS = root / "model", root / "params.yaml"
registry.LINEAGE, registry.DOCUMENTS = root / "lineage.json", root / "documents.csv"
made_from = {{MODEL_SHA256: "{digest}", ENVIRONMENT: "of a test", THREADS: "1"}}
measured = {{VAL_LOSS: "5.0", registry.TEST_LOSS: "5.0", STRIDE: "16"}}
with mlflow.start_run(experiment_id=store.open_store()) as run:
    mlflow.log_text("kept", "note.txt")
    mlflow.log_artifact(str(root / "params.yaml"), "config")
    mlflow.log_input(from_pandas(pd.DataFrame({{"document": ["a"]}}), name="corpus"), context="training")
    version = registry.register("gpt2", run, made_from, measured, {{"corpus": "of a test"}})
    promote("gpt2", "champion", str(version.version))
answer(run.info.run_id)
"""
CHAMPION = """
from gpt2.tracking.provenance import provenance
from gpt2.tracking.registry import fetch_model, verify
def read():
    return [tell("models:/gpt2@champion") for tell in (fetch_model, verify, provenance)]
"""


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> Path:
    """A checkout whose store holds a champion."""
    root = tmp_path_factory.mktemp("registered") / "checkout"
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "params.yaml", root)
    model = make_model(vocab_size=VOCAB_SIZE, random=True)
    digest = save_model(model, make_config(vocab_size=VOCAB_SIZE), root / "model")
    write_text(root / "documents.csv", "document\n")
    files = {"data/tokens/train.bin": 64 * "a"}
    write_json(root / "lineage.json", {"commit": "", "diff": "", "prepare": {"source": "sotu"}, "files": files})
    answer_of(root, REGISTER.format(digest=digest))
    shutil.rmtree(root / "model")
    return root


def paths_in(root: Path) -> list[str]:
    """All paths of artifacts in a store but those of a model version's source, which name a logged model."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        found = (connection.execute(f"SELECT {column} FROM {table}").fetchall() for table, column in PATH_COLUMNS)
        return [path for rows in found for (path,) in rows if not path.startswith("models:/")]


def test_an_experiment_says_where_to_look_and_keeps_what_a_person_writes(store: Path) -> None:
    experiment_id = open_store()
    client = mlflow.MlflowClient()
    assert "Charts" in client.get_experiment(experiment_id).tags[NOTE]
    client.set_experiment_tag(experiment_id, NOTE, "My notes")
    open_store()
    assert client.get_experiment(experiment_id).tags[NOTE] == "My notes"


def test_the_address_of_the_charts_is_of_the_store_in_use(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=losses"
    assert charts_address("1") == f"`mlflow ui`, then http://127.0.0.1:5000/{page}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert charts_address("1").startswith('`mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"`')
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # which it sets
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:se%2Fcret@example.com:8080/mlflow/")
    assert charts_address("1") == f"https://example.com:8080/mlflow/{page}"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "se/cret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@example.com/db")
    assert repair() == "nothing to repair: postgresql://example.com/db is not an SQLite database"


def contents(root: Path) -> dict[Path, tuple[int, bytes]]:
    """All files below a folder, with the time of their last change."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python outside of a checkout, with nothing in its environment that names a store; it writes no bytecode."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-B", *arguments], cwd=root.parent, env=environment, capture_output=True, text=True
    )


def command(root: Path, line: str, code: int = 0) -> str:
    """Run a script of a checkout from another folder; return what it says."""
    script, *arguments = line.split()
    done = run(root, str(root / "src" / script), *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_notebook_in_a_subfolder_loads_the_champion_with_mlflow_alone(registered: Path) -> None:
    (registered / "notebooks").mkdir()
    loading = f"""
import mlflow
mlflow.set_tracking_uri("sqlite:///{registered}/mlflow.db")
model = mlflow.pyfunc.load_model("models:/gpt2@champion")
print(len(model.predict([{{"prompt": "The war"}}], params={{"max_tokens": 3}})))
"""
    done = subprocess.run([sys.executable, "-c", loading], cwd=registered / "notebooks", capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    assert len(paths_in(registered)) == 5  # two experiments, a run, a logged model, a version
    assert all(path.startswith(f"{registered.as_uri()}/mlartifacts") for path in paths_in(registered))


LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
from gpt2.tracking.named_models import load_named
print(load_named("models:/gpt2@champion").path, "mlflow" in sys.modules)
"""


def loaded(root: Path) -> list[str]:
    """Load the champion of a checkout; return the place of its files, and whether MLflow was needed."""
    done = run(root, "-c", LOADED, str(root / "src"))
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit(maxsplit=1)


@pytest.mark.slow
def test_the_champion_is_loaded_without_mlflow(registered: Path) -> None:
    place, needed = loaded(registered)
    assert Path(place).is_relative_to(registered / "mlartifacts") and needed == "False"


@pytest.mark.slow
def test_a_moved_store_is_read_without_writing(registered: Path, tmp_path: Path) -> None:
    """The old place is still there, as it is for a copy, or a folder that a container sees under another path."""
    moved = shutil.copytree(registered, tmp_path / "new? 100%25 & #1")
    before = contents(moved)
    folder, verified, shown = answer_of(moved, CHAMPION + "answer(read())")
    assert folder.is_relative_to(moved) and str(moved) in verified and "corpus" in shown
    written = command(moved, "infer.py --prompt Roses --max_tokens 2 --device cpu")
    assert written.startswith("Roses")
    place, needed = loaded(moved)
    assert place == str(folder) and needed == "True"
    assert contents(moved) == before


@pytest.fixture
def read_only(registered: Path) -> Iterator[Path]:
    """A copy of the checkout that nobody may write, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = shutil.copytree(registered, Path(folder) / "checkout")
        for path in (*root.rglob("*"), root):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield root
        for path in (*root.rglob("*"), root):
            path.chmod(0o755)


AS_ANOTHER_USER = f"""
read()  # imports modules that the other user may not read
if os.getuid() == 0:  # root may write anything
    os.setuid({NOBODY})
assert not os.access(root / "mlflow.db", os.W_OK)
try:
    store.repair()
except Exception as error:
    answer([*read(), str(error)])
"""


@pytest.mark.slow
def test_a_read_only_store_is_read(read_only: Path) -> None:
    before = contents(read_only)
    folder, verified, shown, refused = answer_of(read_only, CHAMPION + AS_ANOTHER_USER)
    assert folder.is_relative_to(read_only) and "has the SHA-256" in verified and "weights_sha256" in shown
    assert "Permission denied" in refused
    assert contents(read_only) == before


@pytest.mark.slow
def test_repair_mends_a_moved_store_and_tells_so(registered: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(registered, tmp_path / "moved")
    assert command(moved, "register.py --repair") == f"mended 5 paths in {moved}/mlflow.db\n"
    assert all(path.startswith(f"{moved.as_uri()}/mlartifacts") for path in paths_in(moved))
    assert "nothing to repair" in command(moved, "register.py --repair")
    (moved / "mlflow.db").unlink()
    assert re.fullmatch("error: .*mlflow.db cannot be repaired .*\n", command(moved, "register.py --repair", code=2))
    assert not (moved / "mlflow.db").exists()


@pytest.mark.slow
def test_another_database_in_a_moved_checkout_is_used_where_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    answer_of(old, OTHER_DATABASE + LOG)
    assert (old / "tracking.db").exists() and not (old / "mlflow.db").exists()
    old.rename(new)
    after = answer_of(new, OTHER_DATABASE + LOG)
    assert (new / "mlartifacts" / after / "artifacts" / "note.txt").is_file()
    assert not old.exists()


@pytest.mark.slow
@pytest.mark.parametrize("made", ["absolute", "relative"])
def test_a_write_mends_a_moved_store(tmp_path: Path, made: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new? 100%25 & #1"
    old.mkdir()
    before = answer_of(old, LOG)
    elsewhere = [f"{old}/notebooks/mlruns/9", f"{old}er/mlruns/8", "mlflow-artifacts:/7", f"s3://bucket{old}"]
    with contextlib.closing(sqlite3.connect(old / "mlflow.db")) as connection, connection:
        if made == "relative":  # as an earlier version of this project did
            for table, column in PATH_COLUMNS:
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, '')", (f"{old.as_uri()}/",))
        for number, path in enumerate(elsewhere, 7):
            values = (number, str(number), path, "active")
            connection.execute(
                "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (?, ?, ?, ?)",
                values,
            )
    old.rename(new)
    after = answer_of(new, LOG)
    assert (new / "mlartifacts" / after / "artifacts" / "note.txt").is_file()
    assert not old.exists()
    assert answer_of(new, READ.format(run=before)) == "kept"
    kept = elsewhere[1:] if made == "absolute" else elsewhere
    mended = [path for path in paths_in(new) if path not in kept]
    assert len(mended) == len(paths_in(new)) - len(kept)
    for path in mended:
        assert path.startswith(f"{new.as_uri()}/mlartifacts") or path == f"{new}/notebooks/mlruns/9"


@pytest.mark.slow
def test_a_servers_experiment_keeps_its_paths(tmp_path: Path) -> None:
    assert answer_of(tmp_path, SERVED) == "mlflow-artifacts:/1"


SERVED = """
mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
served = mlflow.create_experiment("gpt2", artifact_location="mlflow-artifacts:/1")
assert store.open_store() == served
answer(mlflow.get_experiment(served).artifact_location)
"""
MANY = """
import time
children = []
start = time.time() + 1
for _ in range(20):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            time.sleep(max(0, start - time.time()))
            experiment_id = store.open_store()
            assert mlflow.MlflowClient().get_experiment_by_name("gpt2").experiment_id == experiment_id
            status = 0
        finally:
            os._exit(status)
    children.append(child)
answer({os.waitpid(child, 0)[1] for child in children})
"""
# Making the store takes about 70 commits.
DIE_AT_A_COMMIT = """
import itertools, signal, sqlalchemy
numbers = itertools.count(1)
def commit(connection):
    if next(numbers) == {}:
        os.kill(os.getpid(), signal.SIGKILL)
sqlalchemy.event.listen(sqlalchemy.Engine, "commit", commit)
"""


@pytest.mark.slow
def test_twenty_processes_open_a_missing_store_at_once(tmp_path: Path) -> None:
    assert answer_of(tmp_path, MANY) == {0}


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_makes_the_store_leaves_none(tmp_path: Path) -> None:
    for commits in (1, 20, 60):
        for left in tmp_path.glob("mlflow.db*"):
            left.unlink()
        process, _ = start(tmp_path, DIE_AT_A_COMMIT.format(commits) + LOG)
        process.join(240)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists(), "killed too late to show anything"
        assert list(tmp_path.glob("mlflow.db*"))
    assert answer_of(tmp_path, LOG)
