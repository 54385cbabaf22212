import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from gpt2.core import files
from gpt2.core.files import atomic_write, file_lock, read_json, sha256_of, write_json, write_text

PARTIAL = f"it.{os.getpid()}.partial"
FullDisk = Callable[..., contextlib.AbstractContextManager[None]]


def test_text_comes_back_in_the_same_bytes_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text.json"
    write_json(path, {"b": "é", "a": [1]})
    assert path.read_bytes() == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'.encode()
    assert read_json(path) == {"b": "é", "a": [1]}


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("inf"), "b": [1.5, (-math.inf, math.nan)]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, [None, None]]}


def test_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "text"
    write_text(path, "old")
    with pytest.raises(OSError, match="too large"), full_disk():
        write_text(path, "x" * 2000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_not_finished_replaces_nothing(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    path = tmp_path / "it"
    write = make_file if kind == "file" else make_folder
    for text in ("old", "new"):
        with atomic_write(path) as partial:
            write(partial, text)
            assert partial != path
    with contextlib.suppress(error), atomic_write(path) as partial:
        write(partial, "newest")
        raise error
    assert (path if kind == "file" else path / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_another_process_may_write_the_same_and_what_a_killed_one_left_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "it[1]"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    half = [tmp_path / f"it[1].{other.pid}{end}.partial" for end in ("", ".old")]
    for folder in (*half, tmp_path / f"it[1].{os.getpid()}.partial"):
        make_folder(folder, "half")
    for left in ([path, *half], [path]):
        with atomic_write(path) as partial:
            make_folder(partial, "whole")
        assert (path / "file").read_text() == "whole" and sorted(tmp_path.iterdir()) == sorted(left)
        other.communicate()


def test_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "it", Path.replace

    def fail(source: Path, target: Path) -> Path:
        if source.name == PARTIAL:
            raise OSError("no space left")
        return replace(source, target)

    with atomic_write(path) as partial:
        make_folder(partial, "old")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"), atomic_write(path) as partial:
        make_folder(partial, "new")
    assert (path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("renamed", "left"), [("it", "old"), (PARTIAL, "new")], ids=["old", "new"])
def test_folder_is_whole_if_ctrl_c_comes_as_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: str, left: str
) -> None:
    path, replace = tmp_path / "it", Path.replace

    def interrupted(source: Path, target: Path) -> Path:
        replace(source, target)
        if source.name == renamed:
            raise KeyboardInterrupt
        return target

    with atomic_write(path) as partial:
        make_folder(partial, "old")
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        make_folder(partial, "new")
    assert (path / "file").read_text() == left and not (tmp_path / PARTIAL).exists()


REPLACE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from gpt2.core.files import atomic_write
for number in itertools.count():
    with atomic_write(Path(sys.argv[1])) as partial:
        partial.mkdir()
        for name in ("a", "b"):
            (partial / name).write_text(str(number) * 10_000)
"""


def test_killed_process_never_leaves_half_a_folder(tmp_path: Path) -> None:
    path, random = tmp_path / "it", Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[2])}
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", REPLACE_FOR_EVER, str(path)], env=environment)
        begun = time.monotonic()
        while not path.exists():
            assert process.poll() is None and time.monotonic() < begun + 60
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.wait()
        if path.exists():  # the old one may be aside, and the new one not yet in its place
            first, second = ((path / name).read_text() for name in ("a", "b"))
            assert first == second and len(first) >= 10_000
            shutil.rmtree(path)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("old")
    (tmp_path / "it").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        with atomic_write(tmp_path / "it") as partial:
            partial.mkdir()
            (partial / "a").write_text("new")
    assert (tmp_path / "it" / "a").read_text() == "new" and (tmp_path / "elsewhere" / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "it"]


def test_lock_is_waited_for_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "lock"

    def second() -> None:
        with file_lock(path, "it is busy"):
            pass

    thread = threading.Thread(target=second)
    with file_lock(path, "it is free"):
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive() and capsys.readouterr().err == "it is busy; waiting for it\n"


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "file").write_text(text)


@pytest.mark.parametrize("text", [None, "", "{", "\0", "[" * 100_000])
def test_broken_json_is_refused(tmp_path: Path, error_line: Callable[..., str], text: str | None) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    assert "a.json" in error_line(lambda: read_json(path))


def test_sha256_of_what_cannot_be_read_is_refused(tmp_path: Path, error_line: Callable[..., str]) -> None:
    assert f"{tmp_path} cannot be read" in error_line(lambda: sha256_of(tmp_path))
