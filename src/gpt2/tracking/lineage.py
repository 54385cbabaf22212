"""What a result was made from: a key that equal inputs share in every clone, and the record that a training leaves."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from gpt2.config import Params, TrainParams
from gpt2.core.device import choose_device
from gpt2.core.errors import UserError
from gpt2.core.files import read_json, sha256_of, write_json
from gpt2.core.paths import ROOT, TOKENS, main_root
from gpt2.core.validation import check
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.optimizers import steps_before_decay

UNCOMMITTED = ("src", "dvc.yaml", "params.yaml", "requirements.txt")  # what a diff to the commit is of
PRETRAINED = "data/pretrained"  # of which a training reads no more than parent_sha256 tells
# Parameters that may differ where the first steps are equal.
MAY_DIFFER = {"max_steps", "decay_fraction", "checkpoint_interval", "log_checkpoints"}
# Those that tell how to compute, not what: a training goes on in another number of processes.
HOW_TO_COMPUTE = {"launcher", "nproc_per_node", "parallel", "activation_checkpointing"}
Lineage = dict[str, Any]


def collect_lineage(params: Params, threads: int) -> Lineage:
    """Return what a training that begins now is made from, as JSON can hold it.

    `train_key` is the hash of what the trained weights depend on, but for rounding: the files that dvc.yaml lists for
    the stage, its parameters, and PyTorch. The rest tells where these came from.
    """
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    deps = [path for path in pipeline["stages"]["train"]["deps"] if path != PRETRAINED]
    inputs = {
        "files": {name: sha256 for path in deps for name, sha256 in file_hashes(path)},
        "model": params.model.model_dump(),
        "train": params.train.model_dump(),
        "runtime": params.runtime.model_dump(),
        "torch": torch.__version__,
    }
    return {
        "train_key": hash_of(inputs | {"train": params.train.model_dump(exclude=HOW_TO_COMPUTE)}),
        **inputs,
        "prepare": read_json(TOKENS / "meta.json")["prepare"],
        "threads": threads,
        "environment": _environment(choose_device(params.runtime.device)),
        "commit": git("rev-parse", "HEAD").strip(),
        **_uncommitted(),
    }


def _uncommitted() -> Lineage:
    """Return the names of files that are not as in the commit, new ones too, and the patch that makes them so."""
    compare = ("diff", "--relative", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")
    with TemporaryDirectory() as folder, suppress(OSError):
        index = Path(shutil.copy(ROOT / git("rev-parse", "--git-path", "index").strip(), folder))  # of git, for a while
        git("add", "--intent-to-add", "--", *filter(lambda name: (ROOT / name).exists(), UNCOMMITTED), index=index)
        names = git(*compare, "--name-only", "-z", "--", *UNCOMMITTED, index=index).split("\0")[:-1]
        return {"uncommitted": names, "diff": git(*compare, "--binary", "--", *UNCOMMITTED, index=index)}
    return {"uncommitted": [], "diff": ""}


def with_parent(lineage: Lineage, sha256: str) -> Lineage:
    """Add the weights with which the training starts, which its key depends on too."""
    return lineage | {"train_key": hash_of([lineage["train_key"], sha256]), "parent_sha256": sha256}


def first_lineage(lineage: Lineage) -> Lineage:
    """Keep the lineage with which a training starts, and return it: a resumed one has that of its first start."""
    path = checkpoint_folder(lineage["train_key"]) / "lineage.json"
    if not path.exists():
        write_json(path, lineage)
    return read_json(path)


def describe_saved_trainings(lineage: Lineage) -> list[str]:
    """Return a line for each other training with checkpoints: how large they are, and what differs in it."""
    lines, present = [], {name: lineage[name] for name in ("model", "train", "runtime", "torch")}
    for folder, other in _other_trainings(lineage):
        if not Checkpoints(folder).are_used():
            files = [
                f"another {name}" for name, sha256 in lineage["files"].items() if other["files"].get(name) != sha256
            ]
            changes = "; ".join(differences(other, present) + files) or "with other files"
            megabytes = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()) / 1e6
            lines.append(f"{folder} keeps {megabytes:,.0f} MB of another training's checkpoints ({changes})")
    return lines


def checkpoint_to_extend(lineage: Lineage) -> Path | None:
    """Return the last checkpoint of another training that has the same first steps until then, if there is one."""
    found = []
    for folder, other in _other_trainings(lineage):
        if _first_steps(other) == _first_steps(lineage):
            steps = min(steps_before_decay(check(TrainParams, one["train"], str(folder))) for one in (other, lineage))
            found.append(Checkpoints(folder, steps).before_decay())
    return max(filter(None, found), key=lambda path: path.name, default=None)


def _other_trainings(lineage: Lineage) -> Iterator[tuple[Path, Lineage]]:
    """Yield the folder and the lineage of each other training with checkpoints, unless it is deleted meanwhile."""
    for file in sorted(checkpoint_folder("").glob("*/lineage.json")):
        try:
            other = read_json(file)
        except UserError:
            if file.exists():
                raise
            continue
        if other["train_key"] != lineage["train_key"] and file.parent.suffix != ".partial":
            yield file.parent, other


def _first_steps(lineage: Lineage) -> Lineage:
    """Return what the steps before the decay of the learning rates depend on."""
    train = {name: value for name, value in lineage["train"].items() if name not in MAY_DIFFER | HOW_TO_COMPUTE}
    parent = lineage.get("parent_sha256")
    return {name: lineage[name] for name in ("files", "model", "runtime", "torch")} | {"train": train, "parent": parent}


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Return in words what of `present`, e.g. parameters by section, is not as recorded."""
    before, now = flatten(recorded), flatten(present)
    return [f"{key} {before.get(key)}, not {value}" for key, value in now.items() if before.get(key) != value]


def changes_since_commit(params: Params, lineage: Lineage) -> str:
    """Return in words how parameters and code differ from those of the lineage's commit; nothing if it is not known."""
    if not (commit := lineage["commit"]):
        return ""
    with suppress(UserError, yaml.YAMLError):
        committed = check(Params, yaml.safe_load(git("show", f"{commit}:./params.yaml")), "params.yaml")
        changes = differences(params.model_dump(by_alias=True), committed.model_dump(by_alias=True))
        files = [f"uncommitted {name}" for name in lineage["uncommitted"] if name != "params.yaml"]
        return f"{'; '.join(changes + files) or 'params.yaml as it is'} (commit {commit[:8]})"
    return ""


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into one level: {"train": {"seed": 1}} becomes {"train.seed": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def checkpoint_folder(train_key: str) -> Path:
    """Return the folder of the checkpoints of a training, the same for all experiments."""
    return main_root() / ".cache" / "train" / train_key


def run_key(params: Params, train_key: str) -> str:
    """Return the hash that names one run of the whole pipeline."""
    return hash_of({"train_key": train_key, "params": params.model_dump(by_alias=True)})


def hash_of(content: Any) -> str:
    """Return the SHA-256 of content that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hashes(path: str) -> Iterator[tuple[str, str]]:
    """Yield the name and SHA-256 of a file, or of each file of a folder but those that .dvcignore names."""
    found = ROOT / path
    for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
        is_ignored = file.parent.name == "__pycache__" or file.name.startswith(".") or file.name.endswith("~")
        if file.is_file() and not is_ignored:
            yield file.relative_to(ROOT).as_posix(), sha256_of(file)


def _environment(device: torch.device) -> str:
    """Return what a training's bytes depend on besides its inputs, in words."""
    cpu = torch.backends.cpu.get_cpu_capability()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu}"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}, {hardware}"


def git(*arguments: str, index: Path | None = None) -> str:
    """Return what a git command prints; nothing outside git. The repository may be another user's, as is the code.

    `index` is taken for git's own.
    """
    try:
        return subprocess.check_output(
            ["git", "-c", "safe.directory=*", *arguments],
            cwd=ROOT,
            encoding="utf-8",
            errors="replace",
            stderr=subprocess.DEVNULL,
            env=os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {}),
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
