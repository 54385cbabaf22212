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

from gpt2.config import Params
from gpt2.core.files import sha256_of
from gpt2.core.validation import check
from gpt2.tracking import lineage
from gpt2.tracking.lineage import (
    Lineage,
    changes_since_commit,
    checkpoint_to_extend,
    collect_lineage,
    describe_saved_trainings,
    differences,
    first_lineage,
    flatten,
    hash_of,
    run_key,
    with_parent,
)
from gpt2.tracking.runs import PARENT, PARENT_SHA256, lineage_tags
from gpt2.training.checkpoints import Checkpoints

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that a key is made from, with some tokens."""
    shutil.copytree(REPOSITORY / "src", tmp_path / "src")
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    (tmp_path / "data" / "tokens").mkdir(parents=True)
    for name in ("meta.json", "train.bin", "val.bin"):
        (tmp_path / "data" / "tokens" / name).write_bytes(b"tokens")
    (tmp_path / "data" / "tokens" / "meta.json").write_text('{"prepare": {"source": "sotu"}}')
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    monkeypatch.setattr(lineage, "TOKENS", tmp_path / "data" / "tokens")
    monkeypatch.setattr(lineage, "main_root", lambda: tmp_path)
    return tmp_path


def train_key(params: Params) -> str:
    return collect_lineage(params, threads=1)["train_key"]


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
    assert key == train_key(params(launcher="torchrun", nproc_per_node=4, activation_checkpointing=True))
    assert run_key(params(), key) != run_key(params("evaluate", stride=7), key)


def test_train_key_changes_with_pytorch(
    checkout: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = train_key(params())
    monkeypatch.setattr(torch, "__version__", "0")
    assert train_key(params()) != key


def test_train_key_changes_with_the_weights_it_starts_from(checkout: Path, params: Callable[..., Params]) -> None:
    alone = collect_lineage(params(init_from="hf:gpt2"), threads=1)
    one, other = (with_parent(alone, sha256 * 64) for sha256 in "ab")
    assert len({alone["train_key"], one["train_key"], other["train_key"]}) == 3
    told = {PARENT: "hf:gpt2", PARENT_SHA256: "a" * 64}
    assert {name: value for name, value in lineage_tags(one).items() if "parent" in name} == told
    assert not [name for name in lineage_tags(collect_lineage(params(), threads=1)) if "parent" in name]


def test_a_lineage_tells_the_commit_and_what_has_been_changed_since(
    checkout: Path, params: Callable[..., Params], tmp_path: Path
) -> None:
    shutil.copy(REPOSITORY / "params.yaml", checkout)
    outside = collect_lineage(params(), 1)
    assert outside["commit"] == changes_since_commit(params(), outside) == ""
    for command in ("init -q", "add -A", "-c user.name=Test -c user.email=test@example.com commit -qm code"):
        subprocess.run(["git", "-C", str(checkout), *command.split()], check=True)
    found = collect_lineage(params(), 1)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and not found["diff"] and not found["uncommitted"]
    assert found["files"]["src/train.py"] == sha256_of(checkout / "src" / "train.py")
    for name in ("src/train.py", "src/new.py", "notes.txt"):
        with (checkout / name).open("a") as file:
            file.write("# changed\n")
    changed = collect_lineage(params(), 1)
    assert changed["commit"] == found["commit"] and "+# changed" in changed["diff"]
    assert changed["uncommitted"] == ["src/new.py", "src/train.py"]
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "true")):
        subprocess.run(["git", "-C", str(checkout), "config", key, value], check=True)
    assert collect_lineage(params(), 1)["diff"] == changed["diff"]
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    subprocess.run(["git", "apply"], cwd=clone, input=changed["diff"], text=True, check=True)
    assert [(clone / name).read_text() for name in changed["uncommitted"]] == [
        (checkout / name).read_text() for name in changed["uncommitted"]
    ]
    assert "src/new.py" not in lineage.git("ls-files")  # git's own index is as it was
    commit = f"(commit {found['commit'][:8]})"
    assert changes_since_commit(params(), found) == f"params.yaml as it is {commit}"
    told = "train.learning_rate 0.1, not 0.002; uncommitted src/new.py; uncommitted src/train.py"
    assert changes_since_commit(params(learning_rate=0.1), changed) == f"{told} {commit}"
    assert changes_since_commit(params(), found | {"commit": "c0ffee"}) == ""


def test_a_resumed_training_keeps_the_lineage_of_its_first_start_and_others_tell_how_they_differ(
    checkout: Path, params: Callable[..., Params]
) -> None:
    first = first_lineage(collect_lineage(params(), threads=1))
    assert first_lineage(first | {"commit": "of a later start"}) == first
    assert describe_saved_trainings(first) == []
    folder = lineage.checkpoint_folder(first["train_key"])
    (folder / "checkpoint").write_bytes(b"0" * 3_000_000)
    other = collect_lineage(params(learning_rate=0.1), threads=1)
    (line,) = describe_saved_trainings(other)
    assert line == f"{folder} keeps 3 MB of another training's checkpoints (train.learning_rate 0.002, not 0.1)"
    other["files"]["src/train.py"] = "edited"
    assert describe_saved_trainings(other)[0].endswith("(train.learning_rate 0.002, not 0.1; another src/train.py)")
    with Checkpoints(folder).locked():
        assert describe_saved_trainings(other) == []


def test_a_training_goes_on_from_the_last_checkpoint_that_another_shares_with_it(
    checkout: Path, params: Callable[..., Params]
) -> None:
    def collected(**changes: Any) -> Lineage:
        return first_lineage(collect_lineage(params(**changes), threads=1))

    def found(**changes: Any) -> Path | None:
        return checkpoint_to_extend(collect_lineage(params(**changes), threads=1))

    paths = {}
    for max_steps, steps in ((80, (20, 40, 60)), (160, (40, 60, 100))):  # they share 40 and 80 steps
        folder = lineage.checkpoint_folder(collected(max_steps=max_steps)["train_key"])
        for step in steps:
            paths[max_steps, step] = folder / f"{step:010}-{'0' * 64}"
            paths[max_steps, step].mkdir()
            (paths[max_steps, step] / "__0_0.distcp").write_bytes(bytes(10**6))
    assert found(max_steps=320, checkpoint_interval=7) == found(max_steps=200) == paths[160, 60]
    assert found(max_steps=160) == paths[80, 40]  # not its own
    assert found(max_steps=80, decay_fraction=0.75) == paths[80, 20]
    assert found(max_steps=20) is None
    finished = paths[80, 40].parent.rename(checkout / ".cache/train/finished")
    assert found(max_steps=160) == finished / paths[80, 40].name and found(max_steps=80) == paths[160, 40]
    (line,) = describe_saved_trainings(collect_lineage(params(max_steps=80), threads=1))
    assert line.startswith(f"{paths[160, 40].parent} keeps 3 MB") and line.endswith("(train.max_steps 160, not 80)")
    for changes in ({"learning_rate": 0.1}, {"warmup_steps": 6}, {"keep": "best"}, {"patience": 1}):
        assert found(max_steps=320, **changes) is None
    with (checkout / "src/gpt2/training/loss.py").open("a") as file:
        file.write("# changed\n")
    assert found(max_steps=320) is None


def test_differences_join_names_and_keep_lists() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": None}) == {"a.b.c": 1, "a.d": [{"e": 2}], "f": None}
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c 2, not 3", "d None, not 4"]


def test_hash_is_of_the_content_not_of_its_order() -> None:
    assert hash_of({"a": 1, "b": [2, 3]}) == hash_of(yaml.safe_load("{b: [2, 3], a: 1}"))
    assert hash_of({"a": [2, 3]}) != hash_of({"a": [3, 2]})
