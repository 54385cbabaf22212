"""A training in several processes is the training in one. Run as a script, this file is what torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2.config import ModelConfig, RuntimeParams, TrainParams
from gpt2.data.batches import TrainingBatches
from gpt2.model.weights import save_model
from gpt2.training import distributed
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.run import build_model, run_training

CPU = torch.device("cpu")
TOKENS = (np.arange(400) * 7 % 53).astype(np.uint16)  # each token tells the next; of 61, 8 never occur
SEEN = np.arange(61) < 53
BASE = {"batch_size": 8, "micro_batch_size": 1, "max_steps": 6, "warmup_steps": 2, "log_interval": 1}
BASE |= {"eval_interval": 2, "eval_windows": 5, "keep": "best", "learning_rate": 0.02}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"initialization": "bigrams"},
    "muon": {"optimizer": "muon", "micro_batch_size": 2},
    "plain": {"fused": False, "activation_checkpointing": True},
}


def do(job: dict[str, Any], folder: Path) -> None:
    """Train in this process, and in the others if there are any; write the history and the weights."""
    params, config = TrainParams(**job["train"]), ModelConfig(**job["model"])
    checkpoints = Checkpoints(folder / job.get("checkpoints", job["name"]))
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    model = build_model(config, params, CPU)
    runtime = RuntimeParams(threads=1, device="cpu", precision="float32")
    metrics, history = run_training(
        model, TOKENS, TOKENS[:90], SEEN, params, runtime, checkpoints, lambda *_: None
    )
    whole = distributed.gathered(model, config)
    if distributed.is_first():
        save_model(whole, config, folder / job["name"] / "model")
        (folder / job["name"] / "history.json").write_text(json.dumps([history, metrics]))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with distributed.process_group(CPU):
        for job in json.loads((folder / "jobs.json").read_text()):
            do(job, folder)


if __name__ == "__main__":
    main()
