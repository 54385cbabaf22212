"""Hashes of what a result was made from: equal inputs have equal keys in every clone."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from gpt2.config import Params
from gpt2.core.files import sha256_of
from gpt2.core.paths import ROOT, main_root


def train_key(params: Params) -> str:
    """Return the hash of what training depends on: the files that dvc.yaml lists for it, its parameters, PyTorch."""
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    return hash_of(
        {
            "files": {name: sha256 for path in pipeline["stages"]["train"]["deps"] for name, sha256 in _hashes(path)},
            "model": params.model.model_dump(),
            "train": params.train.model_dump(),
            "runtime": params.runtime.model_dump(),
            "torch": torch.__version__,
        }
    )


def _hashes(path: str) -> Iterator[tuple[str, str]]:
    """Yield the name and SHA-256 of a file, or of each file of a folder but those that .dvcignore names."""
    found = ROOT / path
    for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
        is_ignored = file.parent.name == "__pycache__" or file.name.startswith(".") or file.name.endswith("~")
        if file.is_file() and not is_ignored:
            yield file.relative_to(ROOT).as_posix(), sha256_of(file)


def checkpoint_folder(params: Params) -> Path:
    """Return the folder of the checkpoints of a training, the same for all experiments."""
    return main_root() / ".cache" / "train" / train_key(params)


def run_key(params: Params, key: str) -> str:
    """Return the hash that names one run of the whole pipeline; `key` is that of its training."""
    return hash_of({"train_key": key, "params": params.model_dump(by_alias=True)})


def git_commit() -> str | None:
    """Return the commit that is checked out, with "-dirty" if its code has been changed; None outside git."""
    git = partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).strip()
        return commit + ("-dirty" if git(["git", "status", "--porcelain", "--", "src", "dvc.yaml"]) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hash_of(content: Any) -> str:
    """Return the SHA-256 of content that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
