"""Files in a canonical form, so that equal results are equal bytes, and never half written; locks on them."""

import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from gpt2.core.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write content as indented JSON, making the folder if need be. Infinity and NaN, which JSON lacks, become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises UserError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 with plain line ends, making the folder if need be."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder at; in the end it takes the place of `path`, whole and on the disk.

    If the block fails, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        pid = old.name.removeprefix(f"{path.name}.").split(".")[0]
        if old == partial or (pid.isdecimal() and not psutil.pid_exists(int(pid))):  # of a process that was killed
            with suppress(OSError):  # another process may delete it too
                delete(old)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        with suppress(OSError):
            delete(partial)
        raise


def publish(written: Path, path: Path) -> None:
    """Give a file or folder its name, in place of what has that name, once its content is on the disk.

    Raises OSError; what had the name is unchanged then.
    """
    for file in [*written.rglob("*"), written]:
        _sync(file)
    aside = path.with_name(f"{path.name}.{os.getpid()}.old.partial")  # a folder cannot be replaced at once
    delete(aside)
    try:
        if path.is_dir():
            path.replace(aside)
        written.replace(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.replace(path)
        raise
    _sync(path.parent)
    delete(aside)


@contextmanager
def file_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file at `path` alone; says that it is `busy`, and waits, while another process does.

    Raises OSError.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{busy}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def delete(path: Path) -> None:
    """Delete a file or folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
