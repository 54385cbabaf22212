"""One step of a model sharded by FSDP: each process's peak memory, when the model is built and after the step.

export MALLOC_MMAP_THRESHOLD_=1000000  # glibc then gives freed memory back
torchrun --standalone --nproc-per-node 4 tests/benchmarks/memory.py gpt2-medium
torchrun --standalone --nproc-per-node 4 tests/benchmarks/memory.py gpt2-xl --backward-only

On CPUs, with batches of one short sequence for each process, activation checkpointing, and AdamW.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist

from peers import ROOT, print_circumstances

sys.path.insert(0, str(ROOT / "src"))

from gpt2.config import OPENAI_SIZES, ModelConfig, load_params
from gpt2.core.device import peak_memory_bytes, use_threads
from gpt2.core.paths import PARAMS
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.distributed import process_group, world_size
from gpt2.training.run import build_model, checkpoint_activations
from gpt2.training.trainer import Trainer

LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=OPENAI_SIZES)
    parser.add_argument("--backward-only", action="store_true", help="gradients, but no step of the optimizer")
    options = parser.parse_args()
    tokens = (np.arange(10 * LENGTH) * 7).astype(np.uint16)
    threads = use_threads("auto")
    d_model, n_layers, n_heads = OPENAI_SIZES[options.size]
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model, "vocab_size": 50257}
    config = ModelConfig(**sizes, max_len=1024, dropout=0.1, tie_weights=True, qkv_bias=True, activation="gelu_tanh")
    with process_group("cpu") as device, TemporaryDirectory() as folder:
        changes = {"parallel": "fsdp", "micro_batch_size": 1, "batch_size": world_size(), "sequence_length": LENGTH}
        params = load_params(PARAMS).train.model_copy(update=changes)
        peaks = [peak_memory_bytes(device)]
        model = build_model(config, params, device)
        peaks.append(peak_memory_bytes(device))
        checkpoint_activations(model)
        trainer = Trainer(model, tokens, tokens, params, torch.float32, Checkpoints(Path(folder)))
        if options.backward_only:
            trainer.gradients(*trainer.batches(0, trainer.rows), 0)
        else:
            trainer.step(0)
        peaks.append(peak_memory_bytes(device))
        found: list[list[int]] = [[]] * world_size()
        dist.all_gather_object(found, peaks)
        print_circumstances(threads)
        print(f"{model.count_parameters():,} parameters; GB after importing, building, and the step:")
        for rank, values in enumerate(found):
            print(f"process {rank}:", *(f"{value / 1e9:.2f}" for value in values))


if __name__ == "__main__":
    main()
