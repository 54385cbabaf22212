"""Keys change with all that a training depends on, and with nothing else."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpt2.config import Params, check
from gpt2.tracking import lineage
from gpt2.tracking.lineage import git_commit, hash_of, run_key, train_key

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a key is made from, with some tokens."""
    shutil.copytree(REPOSITORY / "src", tmp_path / "src")
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    (tmp_path / "data" / "tokens").mkdir(parents=True)
    for name in ("meta.json", "train.bin", "val.bin"):
        (tmp_path / "data" / "tokens" / name).write_bytes(b"tokens")
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def params(shipped: dict[str, Any]) -> Callable[..., Params]:
    return lambda section="train", **changes: check(Params, shipped | {section: shipped[section] | changes}, "")


@pytest.mark.parametrize(
    "name",
    [
        "data/tokens/train.bin",
        "data/tokens/val.bin",
        "src/train.py",
        "src/gpt2/model/gpt2.py",
        "src/gpt2/training/loss.py",
    ],
)
def test_train_key_changes_with_data_and_code(checkout: Path, params: Callable[..., Params], name: str) -> None:
    before = train_key(params())
    with (checkout / name).open("ab") as file:
        file.write(b"\n")
    assert train_key(params()) != before


@pytest.mark.parametrize("name", ["src/gpt2/tracking/runs.py", "src/gpt2/generation/sampling.py", "src/infer.py"])
def test_train_key_stays_with_other_code(checkout: Path, params: Callable[..., Params], name: str) -> None:
    before = train_key(params())
    (checkout / name).unlink()
    assert train_key(params()) == before


def test_train_key_changes_with_parameters_of_training_alone(checkout: Path, params: Callable[..., Params]) -> None:
    key = train_key(params())
    assert key == train_key(params())
    assert key != train_key(params(learning_rate=0.1)) and key != train_key(params("model", dropout=0.3))
    assert key == train_key(params("evaluate", stride=7))
    assert run_key(params(), key) != run_key(params("evaluate", stride=7), key)


def test_train_key_changes_with_pytorch(
    checkout: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = train_key(params())
    monkeypatch.setattr(torch, "__version__", "0")
    assert train_key(params()) != key


def test_a_commit_is_dirty_while_its_code_is_changed(checkout: Path) -> None:
    assert git_commit() is None
    for command in ("init -q", "add -A", "-c user.name=Test -c user.email=test@example.com commit -qm code"):
        subprocess.run(["git", "-C", str(checkout), *command.split()], check=True)
    commit = git_commit()
    assert commit and re.fullmatch("[0-9a-f]{40}", commit)
    (checkout / "params.yaml").write_text("an experiment's")
    assert git_commit() == commit
    with (checkout / "src" / "train.py").open("a") as file:
        file.write("\n")
    assert git_commit() == f"{commit}-dirty"


def test_hash_is_of_the_content_not_of_its_order() -> None:
    assert hash_of({"a": 1, "b": [2, 3]}) == hash_of(yaml.safe_load("{b: [2, 3], a: 1}"))
    assert hash_of({"a": [2, 3]}) != hash_of({"a": [3, 2]})
