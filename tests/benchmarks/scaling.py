"""Data-parallel training on paper: communication of a step beside its computation, for GPT-2 on 8 to 1,024 GPUs.

python tests/benchmarks/scaling.py            the table, under the assumptions that the options state
python tests/benchmarks/scaling.py --measure  DDP over Gloo with 2 and 4 processes here: prediction, measurement, error

Computation: 6 N + 12 L C T operations a token (Chowdhery et al. 2022, appendix B), two thirds of them backward.
Communication: an all-gather or a reduce-scatter takes (n - 1) / n of its bytes and n - 1 hops around a ring, an
all-reduce both; or a double binary tree (Sanders et al. 2009) where that takes less time, as NCCL chooses. All GPUs of
a node send to the next node at once, each over its own link, so the ring has the bandwidth of all these links.
DDP all-reduces float32 gradients, in its buckets of 25 MiB, while the backward pass goes on. FSDP is `fully_shard` of
each block and of the rest: it gathers the weights in the forward pass and again in the backward pass, and scatters
float32 gradients, each overlapping with the layer before or after. The weights are float32, its default; with
--gather-bytes 2, as with MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=float32).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from joblib import cpu_count

from peers import ROOT, print_circumstances

sys.path.insert(0, str(ROOT / "src"))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import OPENAI_SIZES
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.model.gpt2 import GPT2Model

GPUS = 8, 64, 256, 1024
CONTEXT = 1024
FLOAT32 = 4  # bytes
BUCKET = 25 * 2**20  # bytes, DDP's default
PROCESSES, SEQUENCES, STEPS = (1, 2, 4), (1, 4), 5  # of what is measured
SHAPE = {"d_model": 256, "n_layers": 6, "n_heads": 4, "max_len": 64}


def gpt2(d_model: int, n_layers: int, n_heads: int, max_len: int) -> GPT2Model:
    """Return a model of GPT-2's architecture, without dropout."""
    return GPT2Model(
        vocab_size=VOCAB_SIZE,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=4 * d_model,
        max_len=max_len,
        dropout=0.0,
        tie_weights=True,
        qkv_bias=True,
    )


class Cluster(NamedTuple):
    """Nodes of GPUs, with bytes per second in each direction, and seconds per hop."""

    gpus_per_node: int
    intra_bandwidth: float
    inter_bandwidth: float  # of each GPU
    intra_latency: float
    inter_latency: float

    def ring(self, gpus: int, size: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of so many bytes."""
        nodes = ceil(gpus / self.gpus_per_node)
        latency = (gpus - nodes) * self.intra_latency + (nodes - 1) * self.inter_latency
        return latency + (gpus - 1) / gpus * size / self.bandwidth(nodes)

    def all_reduce(self, gpus: int, size: float) -> float:
        """Return the seconds of an all-reduce: twice around the ring, or up and down the tree."""
        nodes = ceil(gpus / self.gpus_per_node)
        latency = (self.gpus_per_node - 1) * self.intra_latency + log2(nodes) * self.inter_latency
        return 2 * min(self.ring(gpus, size), latency + size / self.bandwidth(nodes))

    def bandwidth(self, nodes: int) -> float:
        if nodes == 1:
            return self.intra_bandwidth
        return min(self.intra_bandwidth, self.inter_bandwidth * self.gpus_per_node)


def overlapped(computation: float, communication: float, parts: int) -> float:
    """Return the seconds of both, in so many equal parts, if one is communicated while the next is computed."""
    return max(computation + communication / parts, computation / parts + communication)


def predict(options: argparse.Namespace) -> None:
    """Print the table of all sizes on all numbers of GPUs."""
    gb, us = 1e9, 1e-6
    cluster = Cluster(
        options.gpus_per_node,
        options.intra_gb * gb,
        options.inter_gb * gb,
        options.intra_us * us,
        options.inter_us * us,
    )
    print(
        f"{options.peak_tflops:g} TFLOP/s at an MFU of {options.mfu:g}, {options.gpus_per_node} GPUs a node, each with "
        f"{options.intra_gb:g} GB/s and {options.intra_us:g} us a hop in its node, {options.inter_gb:g} GB/s and "
        f"{options.inter_us:g} us between nodes; {options.batch_size} x {CONTEXT} tokens a GPU and step; FSDP gathers "
        f"{options.gather_bytes} bytes a weight\n"
    )
    print("| model | GPUs | computation, ms | DDP, ms | efficiency | FSDP, ms | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (d_model, n_layers, n_heads) in OPENAI_SIZES.items():
        with torch.device("meta"):
            weights = gpt2(d_model, n_layers, n_heads, CONTEXT).count_parameters()
        tokens, attention = options.batch_size * CONTEXT, 12 * n_layers * d_model * CONTEXT
        computation = (6 * weights + attention) * tokens / (options.peak_tflops * 1e12 * options.mfu)
        forward, backward, layers = computation / 3, computation * 2 / 3, n_layers + 1
        buckets = ceil(weights * FLOAT32 / BUCKET)
        for gpus in GPUS:
            reduce = buckets * cluster.all_reduce(gpus, weights * FLOAT32 / buckets)
            gather = layers * cluster.ring(gpus, weights * options.gather_bytes / layers)
            scatter = layers * cluster.ring(gpus, weights * FLOAT32 / layers)
            ddp = forward + overlapped(backward, reduce, buckets)
            fsdp = overlapped(forward, gather, layers) + overlapped(backward, gather + scatter, layers)
            print(
                f"| {name}, {weights / 1e6:,.0f}M | {gpus:,} | {1e3 * computation:.1f} | {1e3 * reduce:.1f} | "
                f"{computation / ddp:.0%} | {1e3 * (2 * gather + scatter):.1f} | {computation / fsdp:.0%} |"
            )


def measure(rounds: int) -> None:
    """Print what the same arithmetic predicts for DDP on this machine's CPUs, and what it takes.

    The computation is that of as many processes at once without all-reduces (`no_sync`); the latency and the bandwidth
    are those of two processes' all-reduces. More processes than CPUs share them. Nothing overlaps, since CPUs do both.
    """
    cpus = cpu_count()
    print_circumstances(cpus)
    found: dict[int, list[list[float]]] = {processes: [] for processes in PROCESSES}
    for _ in range(rounds):
        for processes, runs in found.items():
            with TemporaryDirectory() as folder:
                spawn(work, (processes, folder), processes)
                runs.append(json.loads(Path(folder, "seconds").read_text()))
    seconds = {processes: [*map(statistics.median, zip(*runs, strict=True))] for processes, runs in found.items()}
    small, large, *_ = seconds[2]
    bandwidth = BUCKET / (large - small)
    here = Cluster(max(PROCESSES), bandwidth, bandwidth, small / 2, small / 2)
    weights = gpt2(**SHAPE).count_parameters()
    buckets = ceil(weights * FLOAT32 / BUCKET)
    print(f"{weights:,} weights; Gloo: {bandwidth / 1e9:.2f} GB/s, {small / 2 * 1e6:.0f} us a hop\n")
    print("| processes | sequences each | computation, s | communication, s | prediction, s | measured, s | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for processes in PROCESSES:
        communication = buckets * here.all_reduce(processes, weights * FLOAT32 / buckets) * max(1, processes / cpus)
        for number, sequences in enumerate(SEQUENCES):
            computation, measured = seconds[processes][2 + 2 * number : 4 + 2 * number]
            prediction = computation + communication
            print(
                f"| {processes} | {sequences} | {computation:.3f} | {communication:.3f} | {prediction:.3f} | "
                f"{measured:.3f} | {prediction / measured - 1:+.0%} |"
            )


def work(rank: int, processes: int, folder: str) -> None:
    """As one of so many processes, time in turn all-reduces of a number and of a bucket, and steps without and with."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    model = DistributedDataParallel(gpt2(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    actions = [partial(dist.all_reduce, torch.ones(size // FLOAT32)) for size in (FLOAT32, BUCKET)]
    for sequences in SEQUENCES:
        tokens = torch.randint(VOCAB_SIZE, (2, sequences, SHAPE["max_len"]))
        actions += [partial(train_step, model, optimizer, tokens, context) for context in (model.no_sync, nullcontext)]
    seconds = [[seconds_of(action) for action in actions] for _ in range(2 + STEPS)][2:]  # two to warm up
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps([*map(statistics.median, zip(*seconds, strict=True))]))
    dist.destroy_process_group()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    optimizer.zero_grad()
    with context():
        model(*tokens).backward()
    optimizer.step()


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long it takes until all processes have done it."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, default=989, help="of a GPU: H100 SXM, dense bfloat16")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of it that one GPU alone reaches")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra-gb", type=float, default=450, help="GB/s of a GPU in its node, each direction: NVLink")
    parser.add_argument("--inter-gb", type=float, default=50, help="GB/s of a GPU to other nodes: InfiniBand, 400 Gb/s")
    parser.add_argument("--intra-us", type=float, default=1, help="latency of a hop in a node, in microseconds")
    parser.add_argument("--inter-us", type=float, default=5, help="latency of a hop between nodes")
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {CONTEXT} tokens for each GPU")
    parser.add_argument("--gather-bytes", type=int, choices=(2, 4), default=4, help="of each weight, by FSDP")
    parser.add_argument("--measure", action="store_true", help="DDP on this machine's CPUs")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring")
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds)
    else:
        predict(options)


if __name__ == "__main__":
    main()
