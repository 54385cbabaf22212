"""What a version shows and how to make it again; models that are not there, or not what was registered, are refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from gpt2.config import ModelConfig
from gpt2.core.paths import ROOT
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import save_model
from gpt2.tracking import registry
from gpt2.tracking import store as stores
from gpt2.tracking.card import Card, describe
from gpt2.tracking.local_registry import MODEL_SHA256, find_model
from gpt2.tracking.logged_models import SIGNATURE
from gpt2.tracking.named_models import load_parent
from gpt2.tracking.provenance import reproduction
from gpt2.tracking.registry import PROJECT_VERSION, RUN_ID, TEST_LOSS, fetch_model, logged_model_of
from gpt2.tracking.runs import PARENT
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]


def version(number: int, sha256: str = "5" * 64, **tags: str) -> ModelVersion:
    shown = {MODEL_SHA256: sha256} | tags
    return ModelVersion("gpt2", str(number), 0, tags=[ModelVersionTag(key, value) for key, value in shown.items()])


def test_making_a_version_again_takes_its_commit_its_changes_and_its_texts() -> None:
    def commands(commit: str, diff: str, source: str, parent: str = "") -> list[str]:
        lineage = {"commit": commit, "diff": diff, "prepare": {"source": source}}
        return reproduction(version(1, **{PARENT: parent}), lineage).splitlines()

    clean, changed = commands("abc", "", "sotu"), commands("abc", "--- a/src", "./data/raw/mine.txt")
    for lines in (clean, changed):
        assert "git -C ../gpt2-55555555 checkout --quiet abc" in lines
    assert not any("git apply" in line or "data/raw" in line for line in clean)
    assert any(line.endswith("| git apply)") for line in changed)
    assert any("--rev abc . data/raw" in line and "cp -rn data/raw ../gpt2-55555555/data/;" in line for line in changed)
    hub = commands("abc", "", "hf:owner/name@abc")
    assert any(line.endswith("requirements.txt datasets") for line in hub) and not any("cp -rn" in line for line in hub)
    assert not any("pretrained" in line or "export" in line for line in clean + commands("abc", "", "sotu", "hf:gpt2"))
    pretrained = commands("abc", "", "sotu", "data/pretrained/x.pt")
    assert any("cp -rn data/pretrained ../gpt2-55555555/data/;" in line for line in pretrained)
    assert any("sqlite:///$OLDPWD/mlflow.db" in line for line in commands("abc", "", "sotu", "models:/gpt2/2"))
    assert commands("", "", "sotu") == ["# It was made outside git, so there is no commit to make it again from."]


@pytest.mark.parametrize(("listed", "reason"), [([], "has lost the files"), (["config"], "config.json does not exist")])
def test_a_download_without_files_is_not_kept(
    listed: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    empty = SimpleNamespace(list_artifacts=lambda _: listed, download_artifacts=lambda *_: None)
    monkeypatch.setattr(registry, "get_artifact_repository", lambda _: empty)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/1")
    monkeypatch.setattr(registry, "main_root", lambda: tmp_path)
    (tmp_path / ".cache/models").mkdir(parents=True)
    assert reason in error_line(lambda: registry.artifacts_folder(version(1)))
    assert [file.suffix for file in (tmp_path / ".cache/models").iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def foreign_model(store: Path) -> None:
    """A registered model that another program has made."""
    open_store()
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(store))
    client.create_model_version("foreign", source=str(store), tags={MODEL_SHA256: "../../x"})  # would name a folder


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/gpt2@champion", "`dvc repro`"),
        ("models:/gpt2/7", "`dvc repro`"),
        ("models:/gpt2", "give a version or an alias"),
        ("models:/foreign/1", "another program has registered it"),
        ("models:/foreign/2", "another program has registered it"),
        ("models:/foreign/3", "; there are versions 2, 1\n"),
        ("models:/foreign@champoin", "; there are versions 2, 1\n"),
        ("models:/foreign@champion", "; there are versions 2, 1; `dvc repro` chooses the champion anew\n"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "`dvc repro`"),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(
    foreign_model: None, error_line: ErrorLine, uri: str, reason: str
) -> None:
    line = error_line(lambda: fetch_model(uri))
    assert line.startswith(f"error: no model at {uri} (") and reason in line
    assert ("there are versions 2, 1" in line) == uri.startswith("models:/foreign")


def test_looking_for_a_model_makes_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine, store: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(stores, "main_root", lambda: tmp_path)
    assert "there is no store" in error_line(lambda: fetch_model("models:/gpt2@champion"))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_damaged_store_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine, store: Path
) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(stores, "main_root", lambda: tmp_path)
    assert "MLflow's store fails (" in error_line(lambda: fetch_model("models:/gpt2@champion"))


def test_a_version_and_its_logged_model_show_the_results_of_the_run(
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
    error_line: ErrorLine,
) -> None:
    for name in ("LINEAGE", "PARAMS", "DOCUMENTS"):
        (tmp_path / name.lower()).touch()
        monkeypatch.setattr(registry, name, tmp_path / name.lower())
    monkeypatch.setattr(registry, "MODEL", tmp_path / "model")
    sizes = {"vocab_size": VOCAB_SIZE, "random": True}
    digest = save_model(make_model(**sizes), make_config(vocab_size=VOCAB_SIZE), tmp_path / "model")
    shown, experiment_id = {"val_perplexity": "117.0"}, open_store()
    client = mlflow.MlflowClient()
    with mlflow.start_run(experiment_id=experiment_id, run_name="lr/0.5") as run:
        mlflow.log_metrics({"val/loss": 9.0, "test/loss": 4.0, "system/cpu_utilization_percentage": 1.0}, step=0)
        mlflow.set_tag(MODEL_SHA256, digest)
        for _ in range(2):
            made = registry.register("shown", run, {MODEL_SHA256: digest}, {TEST_LOSS: "4.0"}, shown)
            describe(made, Card("Perplexity 117.0", shown, "A body", "A sample"), "champion")
    found = client.get_model_version("shown", "1")
    assert list(found.tags) == ["val_perplexity", MODEL_SHA256, PROJECT_VERSION, TEST_LOSS, RUN_ID]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{found.tags[PROJECT_VERSION]}"\n' in pyproject
    assert str(found.description).startswith("Perplexity 117.0\n\nA body")
    assert "champion" in str(client.get_registered_model("shown").description)
    model = client.get_logged_model(str(logged_model_of(found)))
    assert model.name == "lr-0-5" and model.tags["mlflow.note.content"] == found.description
    assert [(metric.key, metric.value) for metric in model.metrics or []] == [("test/loss", 4.0)]
    assert len(client.get_metric_history(run.info.run_id, "test/loss")) == 1
    info = mlflow.models.get_model_info("models:/shown/1")
    assert info.signature == SIGNATURE and info.saved_input_example_info
    assert fetch_model(f"runs:/{run.info.run_id}/model") == fetch_model("models:/shown/1")
    # A training may start from it, under a name that stays its own.
    client.set_registered_model_alias("shown", "best", "1")
    # Without MLflow it is found at the same place, while it is there.
    for uri in ("models:/shown/1", "models:/shown@best"):
        folder = fetch_model(uri)
        assert find_model(uri) is None  # MLflow has set the variable of another store, as far as one can tell
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert find_model(uri) == folder
    for uri in ("models:/shown/2", "models:/shown@worst", "models:/other/1", "models:/shown/latest", "models:/shown"):
        assert find_model(uri) is None
    for name in (f"runs:/{run.info.run_id}/model", "models:/shown/1"):
        assert load_parent(name).sha256 == digest
    for name in ("models:/shown@best", "models:/shown/latest"):
        line = error_line(partial(load_parent, name))
        assert line == f"error: train.init_from {name} may name another version tomorrow: write models:/shown/1\n"
    client.delete_model_version("shown", "1")  # its row stays, with its place
    assert find_model("models:/shown/1") is find_model("models:/shown@best") is None
