"""Stage sample: the trained model continues every prompt under every setting: a table, a page to read, and figures."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

import csv
import itertools

import pandas as pd

from gpt2.config import SampleParams, load_params
from gpt2.core.cli import run_command
from gpt2.core.device import choose_device, use_threads
from gpt2.core.files import write_json, write_text
from gpt2.core.paths import METRICS, MODEL, PARAMS, SAMPLES, TOKENS
from gpt2.core.progress import Progress
from gpt2.data.batches import load_tokens
from gpt2.data.tokenizer import Tokenizer, load_tokenizer
from gpt2.evaluation.text_metrics import measure, quote
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.model.weights import load_model, short_name


def main() -> None:
    params = load_params(PARAMS)
    use_threads(params.runtime.threads)
    training = load_tokens(TOKENS / "train.bin")
    model, config, seen = load_model(MODEL)
    engine = Engine(model.to(choose_device(params.runtime.device)), MAX_SLOTS, seen)
    table, written = sample(engine, load_tokenizer(MODEL, config.vocab_size), params.sample)
    # Texts may hold a \r, for which pandas sees no need to quote.
    write_text(SAMPLES / "samples.csv", table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC))
    write_text(SAMPLES / "samples.md", page(table))
    write_json(SAMPLES / "params.json", params.sample.model_dump())
    metrics = measure(written, training)
    write_json(METRICS / "sample.json", metrics | {"model": short_name(MODEL)})
    figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{len(table)} samples in data/samples: {figures}")


def sample(engine: Engine, tokenizer: Tokenizer, params: SampleParams) -> tuple[pd.DataFrame, list[list[int]]]:
    """Return one row for each prompt and setting, and the tokens of each row's text."""
    asked = list(itertools.product(params.prompts, params.settings))
    requests = [
        Request(
            prompt,
            GenerationSettings(**setting.model_dump(), max_tokens=params.max_tokens, seed=params.seed),
            tokenizer,
        )
        for prompt, setting in asked
    ]
    with Progress("sample", len(requests) * params.max_tokens, brief=True) as progress:
        texts = engine.generate_all(requests, progress.advance)
    rows = [
        {"prompt": prompt, **setting.model_dump(), "seed": params.seed, "text": text}
        for (prompt, setting), text in zip(asked, texts, strict=True)
    ]
    written = [request.tokens[len(request.tokens) - request.generated :] for request in requests]
    return pd.DataFrame(rows).astype({"top_k": "Int64"}), written


def page(table: pd.DataFrame) -> str:
    """Return the samples as markdown: a section for each prompt, the prompt in bold before what follows it."""
    parts = ["# Samples\n"]
    for prompt, rows in table.groupby("prompt", sort=False):
        parts.append(f"## {' '.join(str(prompt).split())}\n")
        parts += map(quote, rows.to_dict("records"))
    return "\n".join(parts)


if __name__ == "__main__":
    run_command(main)
