"""The image's entrypoint: it removes the lock file that a killed container has left, and none that is in use."""

import shutil
import subprocess
from pathlib import Path

import pytest

COMMAND = ["sh", str(Path(__file__).resolve().parents[2] / ".docker/entrypoint")]

pytestmark = pytest.mark.skipif(not shutil.which("flock"), reason="flock is part of Linux")


def start(project: Path) -> subprocess.Popen[str]:
    """Start a command as a container would, and wait until it is at work."""
    command = [*COMMAND, "sh", "-c", "echo started; read end"]
    process = subprocess.Popen(command, cwd=project, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "started\n"
    return process


def test_a_lock_file_is_removed_when_no_other_container_is_at_work(tmp_path: Path) -> None:
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    first, second = start(tmp_path), start(tmp_path)
    lock.touch()
    first.communicate("\n")
    third = start(tmp_path)
    assert lock.exists()  # the second may hold it
    for process in (second, third):
        process.communicate("\n")
    start(tmp_path).communicate("\n")
    assert not lock.exists()


def test_a_folder_without_a_project_is_refused_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "true"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
