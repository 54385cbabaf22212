"""Training against its peers, in one interleaved run: tokens per second, memory, and time to a loss.

python tests/benchmarks/training.py                 the steps of our training, of transformers' and of a plain loop
python tests/benchmarks/training.py --time-to-loss  how soon ours has the loss of transformers after 600,000 tokens

Ours is what params.yaml says, from random weights. Every contender takes the same batches of the training split (run
`dvc repro prepare` first), clips its gradient, drops out and chooses its precision alike. The peers have what the best
users would give them: the fused AdamW that ours has, fused attention, a malloc that keeps freed memory (on a CPU), and
torch.compile where there is a compiler; "as it comes" is without. They compute whole logits; so does "ours, whole
vocabulary", without the row that unseen tokens share. Each measurement is a process of its own; nothing else should run
meanwhile. --quick takes one round of the peers that are tuned and not compiled.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peers import ROOT, model_config, print_circumstances, run, transformers_model

sys.path.insert(0, str(ROOT / "src"))

import torch
from torch import Tensor, nn

from gpt2.config import Params, load_params
from gpt2.core.device import (
    autocast,
    choose_device,
    choose_precision,
    peak_memory_bytes,
    use_threads,
)
from gpt2.data.batches import Tokens, TrainingBatches, load_seen, load_tokens, validation_batches
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.model.seen_tokens import SeenTokens
from gpt2.model.weights import SEEN_TOKENS
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.run import build_model, run_training

GPU_STEPS = 50  # are timed together on a GPU
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}  # of glibc
TOKENS = ROOT / "data" / "tokens"
PEER_TOKENS, PEER_RATE, PEER_WARMUP = 600_000, 6e-4, 10
Step = Callable[[int], object]


class Enough(Exception):  # noqa: N818  # no error
    """Ends our training early."""


def ours(
    params: Params,
    tokens: dict[str, Tokens],
    log: Callable[[int, dict[str, float]], None],
    whole_vocabulary: bool = False,
) -> None:
    """Train as the stage does; the log ends it early by raising Enough."""
    model = build_model(model_config(params), params.train, choose_device(params.runtime.device))
    seen = load_seen(TOKENS / SEEN_TOKENS, VOCAB_SIZE) | whole_vocabulary
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        run_training(model, tokens["train"], tokens["val"], seen, params.train, params.runtime, checkpoints, log)


def plain(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    params: Params,
    batches: TrainingBatches,
    device: torch.device,
    precision: torch.dtype,
    fused: bool = True,
    steps: int | None = None,
) -> Step:
    """The loop that everybody writes: whole logits, cross_entropy, AdamW; a cosine schedule if `steps` is given."""
    decay = params.train.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEER_RATE, weight_decay=decay, fused=fused or None)

    def step(index: int) -> None:
        torch.manual_seed(index)
        if steps:
            cosine = (1 + math.cos(math.pi * index / steps)) / 2
            optimizer.param_groups[0]["lr"] = PEER_RATE * min(1, (index + 1) / PEER_WARMUP) * cosine
        inputs, targets = (one.to(device) for one in batches(index))
        with autocast(device, precision):
            loss = nn.functional.cross_entropy(logits_of(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), params.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(
    make: Callable[[Params], nn.Module],
    params: Params,
    batches: TrainingBatches,
    device: torch.device,
    precision: torch.dtype,
    fused: bool = True,
    compiled: bool = False,
) -> Step:
    model = make(params).to(device).train()
    called: Any = torch.compile(model) if compiled else model

    def logits_of(tokens: Tensor) -> Tensor:
        output = called(tokens)
        return output if isinstance(output, Tensor) else output.logits  # as transformers names them

    return plain(model, logits_of, params, batches, device, precision, fused)


plain_loop = partial(peer, lambda params: build_model(model_config(params), params.train, torch.device("cpu")))
transformers = partial(peer, partial(transformers_model, use_cache=False))
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, whole vocabulary": {},
    "ours, compiled": {"compile": True},
}
PEERS: dict[str, Callable[..., Step]] = {
    "transformers, as it comes": partial(transformers, fused=False),
    "transformers": transformers,
    "transformers, compiled": partial(transformers, compiled=True),
    "plain loop, as it comes": partial(plain_loop, fused=False),
    "plain loop": plain_loop,
    "plain loop, compiled": partial(plain_loop, compiled=True),
}
QUICK = ("ours", "ours, whole vocabulary", "transformers", "plain loop")


def matmul_rate(device: torch.device, precision: torch.dtype) -> float:
    """Return the operations per second of a large matmul."""
    a, b = (torch.randn(4096, 4096, device=device).to(precision) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * 4096**3 / min(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, steps: int, precision_name: str, batch_size: int | None) -> dict[str, float]:
    """Return the median seconds of a step, the fraction of them spent on reading data, and the peak memory."""
    on_gpu = choose_device(load_params(ROOT / "params.yaml").runtime.device).type == "cuda"
    together = GPU_STEPS if on_gpu else 1
    most = together * (steps + 2)
    changes: dict[str, Any] = {"log_interval": together, "max_steps": most, "checkpoint_interval": most}
    changes |= {"initialization": "random"} | OURS.get(name, {})
    params, device, precision, tokens = prepare(precision_name, batch_size=batch_size, **changes)
    setting = params.train
    batches = TrainingBatches(tokens["train"], setting.batch_size, setting.sequence_length, setting.seed)
    seconds: list[float] = []

    def note(_: int, metrics: dict[str, float]) -> None:
        if speed := metrics.get("train/tokens_per_second"):
            seconds.append(setting.batch_size * setting.sequence_length / speed)
        if len(seconds) > steps:
            raise Enough

    if name in OURS:
        with suppress(Enough):
            ours(params, tokens, note, "whole vocabulary" in name)
    else:
        step = PEERS[name](params, batches, device, precision)
        for first in range(0, together * (steps + 1), together):
            wait(device)
            began = time.perf_counter()
            for index in range(first, first + together):
                step(index)
            wait(device)
            seconds.append((time.perf_counter() - began) / together)
    began = time.perf_counter()
    batches(steps)
    reading = time.perf_counter() - began
    median = statistics.median(seconds[1:])  # the first is for warming up
    seen_tokens = SeenTokens(torch.from_numpy(load_seen(TOKENS / SEEN_TOKENS, VOCAB_SIZE)))
    return {
        "seconds": median,
        "reading": reading / median,
        "memory": peak_memory_bytes(device),
        "matmul": matmul_rate(device, precision),
        "logits": len(seen_tokens.ids),
    }


def prepare(precision: str, **changes: Any) -> tuple[Params, torch.device, torch.dtype, dict[str, Tokens]]:
    """Return params.yaml with the train section's changes that are not None, and what follows from it."""
    params = load_params(ROOT / "params.yaml")
    changed = {name: value for name, value in changes.items() if value is not None}
    sections = {
        "train": params.train.model_copy(update=changed),
        "runtime": params.runtime.model_copy(update={"precision": precision}),
    }
    params = params.model_copy(update=sections)
    use_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    tokens = {split: load_tokens(TOKENS / f"{split}.bin") for split in ("train", "val")}
    return params, device, choose_precision(precision, device), tokens


def in_a_process(contender: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--contender", contender, *arguments]
    environment = KEEP_MEMORY if contender in PEERS and "as it comes" not in contender else {}
    return json.loads(run(*command, **environment).splitlines()[-1])


def compare(rounds: int, steps: int, precision: str, quick: bool) -> None:
    device = print_setting(precision)
    params = load_params(ROOT / "params.yaml")
    batch_tokens = params.train.batch_size * params.train.sequence_length
    best, contenders = "ours", [*OURS, *PEERS]
    if quick:
        contenders = [name for name in contenders if name in QUICK]
    elif device.type == "cuda":
        best = "ours, compiled"
    elif not shutil.which("c++"):
        contenders = [name for name in contenders if "compiled" not in name]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, found in results.items():
            found.append(in_a_process(name, "--steps", str(steps), "--precision", precision))
            print(f"  {name}: {batch_tokens / found[-1]['seconds']:,.0f} tokens/s", flush=True)
    twice, four_times = (
        in_a_process(best, "--precision", precision, "--batch-size", str(times * params.train.batch_size))["memory"]
        for times in (2, 4)
    )

    def median(name: str, key: str) -> float:
        return statistics.median(found[key] for found in results[name])

    print(f"\n{'':24}{'tokens/s':>10}{'memory':>10}{best + ' is':>24}{'and needs':>12}")
    for name in results:
        print(
            f"{name:24}{batch_tokens / median(name, 'seconds'):>10,.0f}{median(name, 'memory') / 1e9:>8.2f}GB"
            f"{median(name, 'seconds') / median(best, 'seconds'):>17.2f} x fast"
            f"{median(best, 'memory') / median(name, 'memory'):>11.0%}"
        )
    rate = operations_per_token(params, int(results[best][0]["logits"])) * batch_tokens / median(best, "seconds")
    growth = (four_times - twice) / (2 * batch_tokens) * 1000
    print(f"{best}: {rate / 1e9:,.0f} GFLOP/s, {rate / median(best, 'matmul'):.0%} of a large matmul's")
    print(f"{best}: {twice / 1e9:.2f} GB with twice the batch, then {growth / 1e6:.1f} MB for 1,000 more tokens")
    print(f"{best}: {median(best, 'reading'):.2%} of a step goes into reading data")


def operations_per_token(params: Params, logits: int) -> int:
    """Return the matmuls' operations: six for each weight (Kaplan et al. 2020), and as many for attention's scores."""
    shape = params.model
    weights = shape.n_layers * (4 * shape.d_model**2 + 2 * shape.d_model * shape.d_ff) + logits * shape.d_model
    return 6 * (weights + shape.n_layers * params.train.sequence_length * shape.d_model)


def print_setting(precision: str) -> torch.device:
    params, device, chosen, _ = prepare(precision)
    print_circumstances(torch.get_num_threads())
    print(
        f"{device.type}, {chosen}, batch {params.train.batch_size} x {params.train.sequence_length}, "
        f"dropout {params.model.dropout}"
    )
    return device


def time_to_loss(precision_name: str) -> None:
    """Print how long transformers takes to its loss after PEER_TOKENS tokens, and ours to the same; on val windows."""
    print_setting(precision_name)
    params, device, precision, tokens = prepare(precision_name, eval_interval=2)
    setting = params.train
    validation = partial(
        validation_batches, tokens["val"], setting.batch_size, setting.sequence_length, setting.eval_windows
    )
    batches = TrainingBatches(tokens["train"], setting.batch_size, setting.sequence_length, setting.seed)
    steps = round(PEER_TOKENS / (setting.batch_size * setting.sequence_length))
    began = time.perf_counter()
    model = transformers_model(params, use_cache=False).to(device).train()
    step = plain(model, lambda x: model(x).logits, params, batches, device, precision, steps=steps)
    for index in range(steps):
        step(index)
    wait(device)
    peer_seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        losses = [
            nn.functional.cross_entropy(model(x.to(device)).logits.flatten(0, 1), y.to(device).flatten())
            for x, y in validation()
        ]
    target = statistics.fmean(float(loss) for loss in losses)
    print(f"transformers: loss {target:.3f} after {steps} steps, {peer_seconds:,.0f} s", flush=True)

    def stop_when_reached(step: int, metrics: dict[str, float]) -> None:
        if (loss := metrics.get("val/loss", math.inf)) <= target:
            seconds = time.perf_counter() - began
            print(f"ours: loss {loss:.3f} after {step} steps, {seconds:,.0f} s: {peer_seconds / seconds:.1f} x as fast")
            raise Enough

    began = time.perf_counter()
    with suppress(Enough):
        ours(params, tokens, stop_when_reached)
        print("ours never reached it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--steps", type=int, default=3, help=f"measured in each round; on a GPU {GPU_STEPS} times as many"
    )
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--time-to-loss", action="store_true")
    parser.add_argument("--contender", choices=(*OURS, *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments.steps, arguments.precision, arguments.batch_size)))
    elif arguments.time_to_loss:
        time_to_loss(arguments.precision)
    else:
        compare(
            arguments.rounds or (1 if arguments.quick else 3), arguments.steps, arguments.precision, arguments.quick
        )


if __name__ == "__main__":
    main()
