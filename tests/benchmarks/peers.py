"""What the benchmarks share: the peer, processes, and the circumstances that they print. PyTorch loads when needed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from gpt2.config import ModelConfig, Params

ROOT = Path(__file__).resolve().parents[2]


def model_config(params: Params) -> ModelConfig:
    """Return the configuration of the model that the pipeline trains."""
    from gpt2.config import ModelConfig
    from gpt2.data.tokenizer import VOCAB_SIZE

    return ModelConfig(**params.model.model_dump(), vocab_size=VOCAB_SIZE)


def transformers_model(params: Params, **changes: Any) -> nn.Module:
    """Return transformers' GPT2LMHeadModel of the same shape, tied if it is, with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = model_config(params)
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.max_len,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_inner=shape.d_ff,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        tie_word_embeddings=shape.tie_weights,
        **changes,
    )
    torch.manual_seed(params.train.seed)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def run(*command: str, **environment: str) -> str:
    """Return what a command prints, with these variables too. It ends this process if the command fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def print_circumstances(threads: int) -> None:
    """Print the processor, the GPU, the versions, the commit and the command."""
    import torch

    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        print(f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}"
    print(f"{versions}, commit {commit.strip()}, {' '.join(sys.argv)}")
