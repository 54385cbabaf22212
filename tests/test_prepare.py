"""prepare.py as a stage: where it looks for texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import prepare
from gpt2.core.files import read_json


@pytest.fixture
def set_source(tmp_path: Path, shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let prepare run in an experiment's own folder, beside the main checkout."""
    for name in ("main", "own"):
        (tmp_path / name / "data" / "raw").mkdir(parents=True)
    monkeypatch.setattr(prepare, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(prepare, "TOKENS", tmp_path / "own" / "data" / "tokens")
    monkeypatch.setattr(prepare, "main_root", lambda: tmp_path / "main")

    def set_source(source: str) -> None:
        changed = shipped | {"prepare": shipped["prepare"] | {"source": source}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed))

    return set_source


@pytest.mark.parametrize("source", ["data/raw", "./data/raw", "data/raw/deeper"])
def test_an_experiment_reads_the_main_checkouts_texts(
    set_source: Callable[[str], None], tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "main" / "data" / "raw" / "deeper"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"This is text {number}.")
    set_source(source)
    prepare.main()
    splits = read_json(tmp_path / "own" / "data" / "tokens" / "meta.json")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 30
