"""The champion gives way to a lower test loss, or to a model that was measured in another way; what is not there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from gpt2.tracking import registry
from gpt2.tracking import store as stores
from gpt2.tracking.provenance import reproduction
from gpt2.tracking.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, fetch_model, promote, should_promote
from gpt2.tracking.runs import COMMIT, MODEL_SHA256
from gpt2.tracking.store import open_store

ErrorLine = Callable[[Callable[[], object]], str]


def version(number: int, loss: float, split: str = "a", stride: int = 256) -> ModelVersion:
    tags = {TEST_LOSS: repr(loss), TEST_SHA256: split, TEST_STRIDE: str(stride), MODEL_SHA256: "5" * 64}
    return ModelVersion("gpt2", str(number), 0, tags=[ModelVersionTag(*tag) for tag in tags.items()])


@pytest.mark.parametrize(
    ("challenger", "expected", "reason"),
    [
        (version(2, 4.9), True, "4.9000 is below the 5.0000 of version 1"),
        (version(2, 5.0), False, "5.0000 is not below the 5.0000 of version 1"),
        (version(2, 5.1), False, "5.1000 is not below the 5.0000 of version 1"),
        (version(2, 9.9, split="b"), True, "another test split"),
        (version(2, 9.9, stride=1), True, "another stride"),
        (version(1, 5.0), True, "already"),
    ],
)
def test_who_is_champion(challenger: ModelVersion, expected: bool, reason: str) -> None:
    wins, verdict = should_promote(challenger, version(1, 5.0))
    assert wins is expected and reason in verdict


def test_the_first_version_is_champion() -> None:
    assert should_promote(version(1, 9.0), None) == (True, "no version held the alias")


def test_making_a_version_again_takes_its_commit_its_texts_and_tells_what_is_missing() -> None:
    def commands(commit: str, source: str) -> list[str]:
        run: Any = SimpleNamespace(info=SimpleNamespace(run_id="1"), data=SimpleNamespace(tags={COMMIT: commit}))
        return reproduction(version(1, 5.0), run, source).splitlines()

    clean, dirty = commands("abc", "sotu"), commands("abc-dirty", "./data/raw/mine.txt")
    for lines in (clean, dirty):
        assert "git -C ../gpt2-55555555 checkout --quiet abc" in lines
    assert not any("not committed" in line or "data/raw" in line for line in clean)
    assert dirty[1].startswith("# Not all of its code was committed")
    assert "cp -r data/raw ../gpt2-55555555/data/" in dirty
    assert commands("", "sotu") == ["# It was made outside git, so there is no commit to make it again from."]


def test_a_champion_whose_files_are_lost_gives_way(store: Path, tmp_path: Path) -> None:
    open_store()
    client = mlflow.MlflowClient()
    client.create_registered_model("losing")
    for number, loss in ((1, 4.0), (2, 5.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "MLmodel").touch()
        client.create_model_version("losing", source=str(folder), tags=version(number, loss).tags)
    first, second = (client.get_model_version("losing", number) for number in ("1", "2"))
    assert promote("losing", "champion", first).startswith("losing version 1 is champion")
    assert promote("losing", "champion", second).startswith("losing version 2 is not champion")
    shutil.rmtree(tmp_path / "1")
    told = promote("losing", "champion", second)
    assert told == "losing version 2 is champion: the files of version 1, which held it, are lost"


def test_a_download_without_files_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    empty = SimpleNamespace(download_artifacts=lambda *_: None)
    monkeypatch.setattr(registry, "get_artifact_repository", lambda _: empty)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/1")
    monkeypatch.setattr(registry, "main_root", lambda: tmp_path)
    (tmp_path / ".cache/models").mkdir(parents=True)
    assert "config.json does not exist" in error_line(lambda: registry.local_folder(version(1, 5.0)))
    assert [file.suffix for file in (tmp_path / ".cache/models").iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def foreign_model(store: Path) -> None:
    """A registered model that another program has made."""
    open_store()
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(store))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/gpt2@champion", ""),
        ("models:/gpt2/7", ""),
        ("models:/gpt2", "give a version or an alias"),
        ("models:/foreign/1", "another program has registered it"),
        ("models:/foreign/2", ""),
        ("models:/foreign@champion", ""),
        ("runs:/0123456789abcdef0123456789abcdef/model", ""),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(
    foreign_model: None, error_line: ErrorLine, uri: str, reason: str
) -> None:
    line = error_line(lambda: fetch_model(uri))
    assert line.startswith(f"error: no model at {uri} (") and reason in line and "`dvc repro`" in line


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
