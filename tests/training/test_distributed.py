"""A training in several processes is the training in one. Run as a script, this file is what torchrun starts."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpt2.config import ModelConfig, RuntimeParams, TrainParams
from gpt2.core.cli import run_command
from gpt2.core.errors import UserError
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import WEIGHTS, save_model
from gpt2.training import distributed, muon, parallel
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.run import build_model, run_training, take_weights

CPU = torch.device("cpu")
TOKENS = (np.arange(400) * 7 % 53).astype(np.uint16)  # each token tells the next; of 61, 8 never occur
SEEN = np.arange(61) < 53
TINY = {"batch_size": 8, "micro_batch_size": 1, "max_steps": 8, "warmup_steps": 2, "learning_rate": 0.02}
TINY |= {"log_interval": 1, "eval_interval": 2, "eval_windows": 5, "checkpoint_interval": 2}
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"initialization": "bigrams", "keep": "best"},
    "ddp muon": {"optimizer": "muon", "micro_batch_size": 2},
    "fsdp": {"parallel": "fsdp", "fused": False, "activation_checkpointing": True},
    "fsdp muon tied": {"parallel": "fsdp", "optimizer": "muon", "keep": "best"},
    "fsdp given": {"parallel": "fsdp", "init_from": "hf:gpt2"},
}
WITH_FOUR = ("ddp", "fsdp muon tied")  # of them, with four processes too
Job = dict[str, Any]
MakeJob = Callable[..., Job]


def work(job: Job, folder: Path) -> None:
    """Train in this process, and in the others if there are any; write the history and the weights."""
    params, config = TrainParams(**job["train"]), ModelConfig(**job["model"])
    checkpoints = Checkpoints(folder / job["name"])
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    is_last = distributed.rank() == distributed.world_size() - 1

    def disturb(step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics and step == job.get("at_step") and is_last:
            if job["does"] == "raise":
                raise UserError("the last process fails")
            if job["does"] == "fill its disk":
                return resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), job["does"])

    runtime = RuntimeParams(threads=1, device="cpu", precision="float32")
    model = build_model(config, params, CPU)
    if params.init_from:
        torch.manual_seed(5)
        take_weights(model, GPT2Model(**job["model"] | {"max_len": 20}) if distributed.is_first() else None)
    metrics, history = run_training(model, TOKENS, TOKENS[:90], SEEN, params, runtime, checkpoints, disturb)
    whole = parallel.gathered(model, config)
    if distributed.is_first():
        save_model(whole, config, checkpoints.folder / "model")
        (checkpoints.folder / "history.json").write_text(json.dumps([history, metrics]))


def count_matrices(folder: Path) -> None:
    """Write to a file of each process how many matrices Muon orthogonalizes there."""
    orthogonalize = muon.orthogonalize

    def counted(matrices: Tensor) -> Tensor:
        with (folder / f"{distributed.rank()}.txt").open("a") as file:
            file.write(f"{len(matrices)}\n")
        return orthogonalize(matrices)

    muon.orthogonalize = counted


def main() -> None:
    """Do the jobs of a folder, whose "does" is what happens to the last process at a step."""
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    if processes and "RANK" not in os.environ:
        distributed.launch(processes)
    with distributed.process_group("cpu"):
        count_matrices(folder)
        for job in json.loads((folder / "jobs.json").read_text()):
            work(job, folder)


@pytest.fixture(scope="module")
def make_job(make_train_params: Callable[..., TrainParams], make_config: Callable[..., ModelConfig]) -> MakeJob:
    def make(name: str, train: dict[str, Any] | None = None, tied: bool = False, **more: Any) -> Job:
        model = make_config(dropout=0.2, tie_weights=tied or "tied" in name).model_dump()
        return {"name": name, "train": make_train_params(**TINY | (train or {})).model_dump(), "model": model} | more

    return make


def start(folder: Path, jobs: list[Job], processes: int, *torchrun: str) -> psutil.Popen:
    """Start processes by our launcher, or by torchrun with options."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    by_hand = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun]
    source = str(Path(distributed.__file__).parents[2])
    return psutil.Popen(
        [sys.executable, *(by_hand if torchrun else []), __file__, folder, str(0 if torchrun else processes)],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(folder: Path, jobs: list[Job], processes: int, *torchrun: str, code: int = 0) -> tuple[str, str]:
    process = start(folder, jobs, processes, *torchrun)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    return output, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_job: MakeJob) -> Callable[[int], Path]:
    """Return the folder of the results of all kinds in 1, 2 or 4 processes."""

    @cache
    def train(processes: int) -> Path:
        folder = tmp_path_factory.mktemp("results")
        jobs = [make_job(name, kind) for name, kind in KINDS.items() if processes < 4 or name in WITH_FOUR]
        if processes > 1:
            run(folder, jobs, processes)
        else:
            for job in jobs:
                work(job, folder)
        return folder

    return train


def results(folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    history, metrics = json.loads((folder / "history.json").read_text())
    clock = ("train/tokens_per_second", "tokens_per_second", "peak_memory_bytes")
    logged = [*(metrics for _, metrics in history), metrics]
    return [{name: one[name] for name in one if name not in clock} for one in logged], load_file(
        folder / "model" / WEIGHTS
    )


def assert_same(found: Path, expected: Path) -> None:
    (logged, weights), (expected_logged, expected_weights) = results(found), results(expected)
    assert len(logged) == len(expected_logged)
    for one, other in zip(logged, expected_logged, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("processes", "kind"),
    [*((2, kind) for kind in KINDS), *(pytest.param(4, kind, marks=pytest.mark.slow) for kind in WITH_FOUR)],
)
def test_several_processes_train_as_one(trained: Callable[[int], Path], processes: int, kind: str) -> None:
    assert_same(trained(processes) / kind, trained(1) / kind)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_computes_each_matrix_in_one_process(trained: Callable[[int], Path], processes: int) -> None:
    counts = [
        [int(line) for line in (trained(processes) / f"{rank}.txt").read_text().split()] for rank in range(processes)
    ]
    of_a_step = [8, 2, 2]  # of each shape in two blocks
    for i, of_shape in enumerate(zip(*counts, strict=True)):
        assert sum(of_shape) == of_a_step[i % 3] and max(of_shape) == math.ceil(of_a_step[i % 3] / processes)


@pytest.mark.slow
def test_a_training_goes_on_in_other_numbers_of_processes(
    trained: Callable[[int], Path], tmp_path: Path, make_job: MakeJob
) -> None:
    """Each part but the last is stopped by a signal to one process; the model is sharded or not."""
    for part, (processes, kind) in enumerate([(1, "ddp"), (2, "fsdp"), (4, "ddp"), (2, "fsdp")]):
        stop = {"does": signal.SIGTERM, "at_step": 2 * part + 1} if part < 3 else {}
        job = make_job("job", KINDS["fsdp muon tied"] | {"parallel": kind}, tied=True, **stop)
        output, errors = run(tmp_path, [job], processes, code=128 + signal.SIGTERM if stop else 0)
        assert ("starting at step 0" if part == 0 else f"resuming after step {2 * part},") in output
        assert not stop or errors.count(f"stopped after step {2 * part + 2}, which is saved") == 1
    assert_same(tmp_path / "job", trained(1) / "fsdp muon tied")


@pytest.mark.parametrize("kind", ["alone", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("alike", "disk"))])
def test_an_error_ends_all_processes_and_is_told_once(tmp_path: Path, make_job: MakeJob, kind: str) -> None:
    """The last process fails, or all in the same way, or the last cannot write its part of a checkpoint."""
    job, told = {
        "alone": (make_job("job", does="raise", at_step=2), "the last process fails"),
        "alike": (make_job("job", {"batch_size": 9}), "train.batch_size 9 is not a multiple of the 2 processes"),
        "disk": (
            make_job("job", does="fill its disk", at_step=3),
            "the checkpoint of step 4 cannot be saved ([Errno 27] File too large); the last good checkpoint is that of "
            f"step 2, in {tmp_path / 'job'}",
        ),
    }[kind]
    _, errors = run(tmp_path, [job], 2, code=2)
    assert [line for line in errors.splitlines() if not line.startswith("train ")] == [f"error: {told}"]


@pytest.mark.slow
def test_a_killed_process_is_told_and_torchrun_goes_on_without_anybody(
    trained: Callable[[int], Path], tmp_path: Path, make_job: MakeJob
) -> None:
    job = make_job("job", KINDS["ddp muon"], does=signal.SIGKILL, at_step=5)
    _, errors = run(tmp_path, [job], 2, code=2)
    assert "error: process 1 was killed by SIGKILL; the same command resumes the training\n" in errors
    output, _ = run(tmp_path, [job], 2, "--max-restarts=1")
    assert "resuming after step 4" in output
    assert_same(tmp_path / "job", trained(1) / "ddp muon")


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_first(tmp_path: Path, make_job: MakeJob) -> None:
    process = start(tmp_path, [make_job("job", {"max_steps": 10**6, "log_interval": 1000})], 2)
    for line in process.stdout:
        if line.startswith("starting at step 0"):
            break
    while not list((tmp_path / "job").glob("*-*")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.count("which is saved; the same command resumes it") == 1


if __name__ == "__main__":
    run_command(main)
