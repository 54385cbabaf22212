"""Models that are not there, or are not what was registered, are refused; how to make a version again."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from gpt2.tracking import registry
from gpt2.tracking import store as stores
from gpt2.tracking.provenance import reproduction
from gpt2.tracking.registry import fetch_model
from gpt2.tracking.runs import MODEL_SHA256
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]


def version(number: int, sha256: str = "5" * 64) -> ModelVersion:
    return ModelVersion("gpt2", str(number), 0, tags=[ModelVersionTag(MODEL_SHA256, sha256)])


def test_making_a_version_again_takes_its_commit_its_changes_and_its_texts() -> None:
    def commands(commit: str, diff: str, source: str) -> list[str]:
        return reproduction(version(1), {"commit": commit, "diff": diff, "prepare": {"source": source}}).splitlines()

    clean, changed = commands("abc", "", "sotu"), commands("abc", "--- a/src", "./data/raw/mine.txt")
    for lines in (clean, changed):
        assert "git -C ../gpt2-55555555 checkout --quiet abc" in lines
    assert not any("git apply" in line or "data/raw" in line for line in clean)
    assert any(line.endswith("| git apply)") for line in changed)
    assert "cp -r data/raw ../gpt2-55555555/data/" in changed
    assert commands("", "", "sotu") == ["# It was made outside git, so there is no commit to make it again from."]


def test_a_download_without_files_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    empty = SimpleNamespace(download_artifacts=lambda *_: None)
    monkeypatch.setattr(registry, "get_artifact_repository", lambda _: empty)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/1")
    monkeypatch.setattr(registry, "main_root", lambda: tmp_path)
    (tmp_path / ".cache/models").mkdir(parents=True)
    assert "config.json does not exist" in error_line(lambda: registry.artifacts_folder(version(1)))
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
        ("models:/gpt2@champion", ""),
        ("models:/gpt2/7", ""),
        ("models:/gpt2", "give a version or an alias"),
        ("models:/foreign/1", "another program has registered it"),
        ("models:/foreign/2", "another program has registered it"),
        ("models:/foreign/3", ""),
        ("models:/foreign@champion", ""),
        ("runs:/0123456789abcdef0123456789abcdef/model", ""),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(
    foreign_model: None, error_line: ErrorLine, uri: str, reason: str
) -> None:
    line = error_line(lambda: fetch_model(uri))
    assert line.startswith(f"error: no model at {uri} (") and reason in line and "`dvc repro`" in line
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
