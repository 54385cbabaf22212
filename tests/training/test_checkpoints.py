import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader

from gpt2.config import TrainParams
from gpt2.model.gpt2 import GPT2Model
from gpt2.training import dcp, distributed
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.optimizers import build_optimizers

FullDisk = Callable[..., AbstractContextManager[None]]
MakeModel = Callable[..., GPT2Model]
Train = Callable[..., tuple[GPT2Model, list[torch.optim.Optimizer]]]


@pytest.fixture(scope="session")
def trained(make_model: MakeModel, make_train_params: Callable[..., TrainParams]) -> Train:
    """A model and its optimizers after some steps."""

    def train(steps: int, optimizer: str = "adamw", **changes: Any) -> tuple[GPT2Model, list[torch.optim.Optimizer]]:
        model = make_model(**changes)
        optimizers = build_optimizers(model, make_train_params(optimizer=optimizer), torch.float32)
        for step in range(steps):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            for one in optimizers:
                one.step()
        return model, optimizers

    return train


@pytest.fixture(scope="module")
def saved_checkpoints(tmp_path_factory: pytest.TempPathFactory, trained: Train) -> Path:
    """A folder with the checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        Checkpoints(folder).save(step, *trained(step), {})
    return folder


@pytest.fixture
def two_checkpoints(tmp_path: Path, saved_checkpoints: Path) -> Path:
    return shutil.copytree(saved_checkpoints, tmp_path, dirs_exist_ok=True)


def newest(folder: Path) -> Path:
    return max(folder.glob("*-*"))


@pytest.mark.parametrize("kind", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"tie_weights": True}])
def test_restored_training_continues_as_the_saved_one(tmp_path: Path, trained: Train, kind: dict[str, Any]) -> None:
    checkpoints, notes = Checkpoints(tmp_path / "new"), {"history": [[1, {"é": 0.1}]]}
    model, optimizers = trained(3, **kind)
    with checkpoints.locked():
        checkpoints.save(3, model, optimizers, notes)
        again, optimizers_again = trained(0, **kind)
        assert checkpoints.restore(again, optimizers_again) == (3, notes)
    for one, steps in ((model, optimizers), (again, optimizers_again)):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in steps:
            optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_last_two_checkpoints_are_kept(tmp_path: Path, trained: Train) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() == "no checkpoint has been saved yet"
    for step in (1, 2, 10, 100):
        checkpoints.save(step, *trained(0), {})
    assert [path.name[:10] for path in sorted(tmp_path.iterdir())] == ["0000000010", "0000000100"]
    assert checkpoints.last() == f"the last good checkpoint is that of step 100, in {tmp_path}"


def test_last_checkpoint_that_a_longer_training_shares_is_kept_and_replaces_that_of_another(
    tmp_path: Path, trained: Train
) -> None:
    for key, steps in (("one", (2, 4, 6, 8)), ("other", (1, 3, 7, 9, 11))):
        checkpoints = Checkpoints(tmp_path / key, steps_before_decay=5)
        with checkpoints.locked():
            for step in steps:
                checkpoints.save(step, *trained(0), {})
            checkpoints.finish()  # not while it is in use
            shared = max(step for step in steps if step <= 5)
            assert [int(path.name[:10]) for path in sorted(checkpoints.folder.iterdir())] == [shared, *steps[-2:]]
        checkpoints.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["finished"]
        assert [int(path.name[:10]) for path in (tmp_path / "finished").iterdir()] == [shared]
    Checkpoints(tmp_path / "none", steps_before_decay=5).finish()
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]


def test_without_checkpoints_there_is_nothing_to_restore(
    tmp_path: Path, trained: Train, monkeypatch: pytest.MonkeyPatch, error_line: Callable[..., str]
) -> None:
    absent = Checkpoints(tmp_path / "absent")
    assert absent.restore(*trained(0)) is None
    monkeypatch.setattr(distributed, "is_first", lambda: False)  # which has made the folder, on another disk
    assert "all of a training's need to share a disk" in error_line(lambda: absent.restore(*trained(0)))


@given(data=st.data())
def test_damaged_checkpoint_is_skipped_with_a_warning(
    data: st.DataObject, trained: Train, saved_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(saved_checkpoints, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(newest(folder).iterdir())))
    whole = path.read_bytes()
    last = len(whole) - 1
    at = data.draw(st.one_of(st.integers(0, min(200, last)), st.integers(0, last)))  # often in the header
    kind = data.draw(st.sampled_from(["cut", "changed", "inserted"]))
    replacement = data.draw(st.binary(min_size=1, max_size=9).filter(lambda part: part != whole[at : at + len(part)]))
    rest = {"cut": b"", "changed": replacement + whole[at + len(replacement) :], "inserted": replacement + whole[at:]}
    path.write_bytes(whole[:at] + rest[kind])
    expected, restored = trained(1)[0], trained(0)
    assert Checkpoints(folder).restore(*restored) == (1, {})
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), restored[0].parameters(), strict=True))
    shutil.rmtree(folder)


def test_warning_names_the_damaged_checkpoint(
    two_checkpoints: Path, trained: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest(two_checkpoints)
    (path / ".DS_Store").touch()  # is none of the checkpoint's files
    assert Checkpoints(two_checkpoints).restore(*trained(0)) == (2, {})
    (path / "notes.json").unlink()
    Checkpoints(two_checkpoints).restore(*trained(0))
    assert capsys.readouterr().err == f"warning: {path} is damaged; it is skipped and deleted\n"


def test_damaged_checkpoints_do_not_take_the_place_of_good_ones(two_checkpoints: Path, trained: Train) -> None:
    checkpoints = Checkpoints(two_checkpoints)
    for path in two_checkpoints.glob("*/*"):
        path.write_bytes(b"")
    assert checkpoints.restore(*trained(0)) is None
    checkpoints.save(0, *trained(0), {"kept": True})  # a step below theirs
    assert checkpoints.restore(*trained(0)) == (0, {"kept": True})
    assert "the last good checkpoint is that of step 0" in checkpoints.last()


def test_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last(
    two_checkpoints: Path, trained: Train, full_disk: FullDisk
) -> None:
    before, large = sorted(two_checkpoints.iterdir()), torch.nn.Linear(300, 300)
    message = "checkpoint of step 3 cannot be saved .*too large.*the last good checkpoint is that of step 2, in"
    for most_bytes in (1000, max(file.stat().st_size for file in newest(two_checkpoints).iterdir()) - 1):
        with pytest.raises(OSError, match=message), full_disk(most_bytes):
            Checkpoints(two_checkpoints).save(3, *trained(3), {})
    with pytest.raises(OSError, match=message), full_disk(100_000):  # in the midst of a tensor
        Checkpoints(two_checkpoints).save(3, large, [], {})
    assert sorted(two_checkpoints.iterdir()) == before
    assert Checkpoints(two_checkpoints).restore(*trained(0)) == (2, {})


def test_checkpoint_whose_parts_lie_on_several_disks_is_refused(
    two_checkpoints: Path, trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dcp.write
    monkeypatch.setattr(dcp, "write", lambda *given: write(*given) | {"__1_0.distcp"})
    with pytest.raises(OSError, match=r"step 3 cannot be saved .*need to share a disk"):
        Checkpoints(two_checkpoints).save(3, *trained(3), {})
    assert Checkpoints(two_checkpoints).restore(*trained(0)) == (2, {})


def test_unfinished_checkpoint_of_a_killed_process_is_deleted(two_checkpoints: Path) -> None:
    shutil.copytree(newest(two_checkpoints), two_checkpoints / "partial")
    checkpoints = Checkpoints(two_checkpoints)
    with checkpoints.locked():
        assert [int(path.name[:10]) for path in sorted(two_checkpoints.iterdir())] == [1, 2]


def test_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), Checkpoints(tmp_path / "file" / "checkpoints").locked():
        pass


def test_same_training_waits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with Checkpoints(tmp_path / "key").locked():
            order.append("second")

    thread = threading.Thread(target=second)
    with Checkpoints(tmp_path / "key").locked():
        with Checkpoints(tmp_path / "other").locked():  # another training does not wait
            thread.start()
        deadline = time.monotonic() + 60
        while "another process is running this training (key); waiting" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_removed_checkpoints_leave_nothing_unless_they_are_in_use(tmp_path: Path, trained: Train) -> None:
    checkpoints = Checkpoints(tmp_path / "key")
    with checkpoints.locked():
        checkpoints.save(1, *trained(1), {})
        Checkpoints(tmp_path / "key").remove()
        assert checkpoints.restore(*trained(0)) == (1, {})
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoints.remove()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_saved_by_parameter_name(tmp_path: Path, trained: Train, optimizer: str) -> None:
    model, optimizers = trained(2, optimizer=optimizer)
    Checkpoints(tmp_path).save(2, model, optimizers, {})
    keys = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "muon": ("momentum_buffer",)}
    names = set(FileSystemReader(newest(tmp_path)).read_metadata().state_dict_metadata)
    for name, _ in model.named_parameters():
        in_muon = optimizer == "muon" and re.search(r"blocks.*(w_.|linear\d)\.weight", name)
        assert {f"optimizer/{name}/{key}" for key in keys["muon" if in_muon else "adamw"]} < names
        assert f"model/{name}" in names
