"""The report as one HTML page that needs nothing else: no script, no network, no other file."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from gpt2.evaluation.text_metrics import describe_settings
from gpt2.report.figures import for_page

# The surprise of a token by its loss in nats, in words: it had at least that probability.
LEVELS = ((0.5, "1 in 2 or more"), (0.1, "1 in 10"), (0.01, "1 in 100"), (0.001, "1 in 1,000"), (0.0, "less"))

# What stands above and below each picture.
PICTURES = {
    "loss": (
        "Loss during the training",
        "The loss is the mean of -ln p over tokens, where p is the probability that the model gave to the token that "
        "came. Lower is better: 0 would be certainty, and ln {vocab_size:,} = {uniform:.2f} is guessing. Training loss "
        "is of text that the model learns from, validation loss of documents that it never trains on. Where training "
        "loss falls on and validation loss rises, the model learns its text by heart.",
    ),
    "optimization": (
        "Learning rate and gradient norm",
        "The learning rate is the size of the steps, by its schedule: warm-up, plateau, decay. The gradient norm, "
        "before it is clipped, shows how steep the loss is: single high peaks are a sign that training is unstable.",
    ),
    "loss_by_position": (
        "Loss by position in the context",
        "How much context helps, on the test split cut into windows side by side. On the left the model sees only a "
        "few tokens before the one that it predicts, on the right {max_len:,}. Where the line still falls on the "
        "right, the model makes use of text that far back.",
    ),
    "perplexity_by_document": (
        "Perplexity by document",
        "Perplexity is e to the loss: 100 means that the model is as unsure as between 100 equally likely tokens. "
        "These are the documents of the test split, which the model has never seen. On the right stand the tokens "
        "behind each point: the fewer, the more it is chance.",
    ),
    "perplexity_by_decade": (
        "Perplexity by decade",
        "The same documents by when they were written. Decades without a document in the test split are left out.",
    ),
    "perplexity_by_president": (
        "Perplexity by president",
        "The same documents by who gave the address, with the years of the presidency's addresses.",
    ),
    "calibration": (
        "Calibration",
        "Does the model know what it knows? Tokens of the test split are put into bins by the probability of the most "
        "likely token; the height tells how often that token came. Points below the dashed line: the model is too sure "
        "of itself; above: not sure enough. The bars tell how many tokens are in each bin.",
    ),
    "attention": (
        "Attention",
        "Where some of the heads look while they read a sentence. Each row is a token, and tells how its attention is "
        "spread over itself and the tokens before it (columns): each row sums to 1. The rest, above the diagonal, is "
        "the future, which a model that predicts it must not see.",
    ),
}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #d8dce1;
  --mark: 224, 118, 43 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e7eb; --soft: #a0a8b3; --line: #363c44 }
}
* { box-sizing: border-box }
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 46rem; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 0 }
h2 { border-top: 1px solid var(--line); font-size: 1.25rem; margin: 2.2rem 0 0.4rem; padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem }
p { margin: 0.4rem 0 }
a { color: inherit }
.soft, figcaption { color: var(--soft); font-size: 0.9rem }
figure { margin: 0.6rem 0 }
svg { display: block; height: auto; max-width: 100%; width: 36rem }
img { display: block; max-width: 100%; min-width: 40rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.9rem }
td, th { border-bottom: 1px solid var(--line); padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top }
td:first-child { overflow-wrap: break-word }
td.number, th.number { font-variant-numeric: tabular-nums; text-align: right }
.text { border-left: 3px solid var(--line); padding-left: 0.8rem; white-space: pre-wrap }
.tables { columns: 17rem; column-gap: 2rem }
.tables section { break-inside: avoid }
.s0 { background: none }
.s1 { background: rgba(var(--mark), 0.15) }
.s2 { background: rgba(var(--mark), 0.32) }
.s3 { background: rgba(var(--mark), 0.52) }
.s4 { background: rgba(var(--mark), 0.78) }
.legend { line-height: 2 }
.legend span { border: 1px solid var(--line); color: var(--ink); margin-right: 0.3rem; padding: 0 0.4rem;
  white-space: nowrap }
"""


@dataclass(frozen=True)
class Results:
    """All that the page shows."""

    model_sha256: str
    parameters: int
    steps: int  # after which these weights were taken
    vocab_size: int
    lineage: Mapping[str, Any]  # of lineage.json
    evaluated: Mapping[str, Any]  # of evaluate.json
    sampled: Mapping[str, Any]  # of sample.json
    accuracy: float  # of the most likely tokens of the test split
    samples: pd.DataFrame  # of samples.csv, as text
    passage: Sequence[tuple[str, float]]  # tokens' texts and losses in nats
    passage_name: str
    pictures: Mapping[str, str | bytes]  # SVG or PNG, by their names in PICTURES


def page(results: Results) -> str:
    """Return the report."""
    trained, model = results.lineage["train"], results.lineage["model"]
    batch_tokens = trained["batch_size"] * trained["sequence_length"]
    facts = {"max_len": model["max_len"], "vocab_size": results.vocab_size, "uniform": math.log(results.vocab_size)}
    pictures = [
        f"<h2>{heading}</h2>\n<p>{about.format_map(facts)}</p>\n{_picture(results.pictures[name], heading)}"
        for name, (heading, about) in PICTURES.items()
        if name in results.pictures
    ]
    summary = (
        f"A GPT-2 of {results.parameters:,} parameters, trained for {results.steps:,} steps of "
        f"{batch_tokens:,} tokens on {results.lineage['prepare']['source']}"
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>GPT-2 {results.model_sha256[:8]}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f'<h1>Report on model {results.model_sha256[:8]}</h1>\n<p class="soft">{escape(summary)}.</p>',
            f"<h2>Results</h2>\n{_figures_of_merit(results)}",
            *pictures,
            f"<h2>A text, coloured by surprise</h2>\n{_surprise(results.passage, results.passage_name)}",
            f"<h2>Samples</h2>\n{_samples(results.samples, results.sampled)}",
            f"<h2>Configuration</h2>\n{_configuration(results)}",
            f"<h2>Lineage</h2>\n{_lineage(results)}",
            "</body>\n</html>\n",
        ]
    )


def _table(rows: Iterable[tuple[str, Any]], header: Sequence[str] = ()) -> str:
    """Return a table of names and values; a value may be a sequence, a cell each."""
    lines = ["<tr>" + "".join(f'<th class="number">{escape(name)}</th>' for name in header) + "</tr>"] if header else []
    for name, values in rows:
        cells = values if isinstance(values, list) else [values]
        kind = ' class="number"' if header else ""
        lines.append(f"<tr><td>{escape(name)}</td>" + "".join(f"<td{kind}>{_show(cell)}</td>" for cell in cells))
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _show(value: Any) -> str:
    if isinstance(value, bool):  # as in params.yaml
        value = str(value).lower()
    return escape("" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value))


def _figures_of_merit(results: Results) -> str:
    found = results.evaluated
    rows: list[tuple[str, Any]] = [
        (about, [form.format(found[prefix + name]) for prefix in ("val_", "")])
        for name, about, form in (
            ("loss", "loss (nats per token)", "{:.4f}"),
            ("perplexity", "perplexity", "{:.2f}"),
            ("bits_per_byte", "bits per byte", "{:.4f}"),
            ("tokens", "tokens", "{:,}"),
        )
    ]
    return (
        f'<div class="wide">{_table(rows, ("", "validation", "test"))}</div>\n'
        "<p>Each token is predicted from the text before it. Models are chosen by the validation split; the test split "
        "is only reported. Bits per byte compares models whatever their tokens are. Of the test split's tokens, "
        f"<b>{results.accuracy:.1%}</b> were the model's most likely one.</p>"
    )


def _picture(picture: str | bytes, heading: str) -> str:
    if isinstance(picture, bytes):
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        return f'<figure class="wide"><img alt="{heading}" src="{source}"></figure>'
    svg = for_page(picture).replace("<svg", f'<svg role="img" aria-label="{heading}"', 1)
    return f"<figure>{svg}</figure>"


def _surprise(passage: Sequence[tuple[str, float]], name: str) -> str:
    spans = []
    for text, loss in passage:
        probability = math.exp(-loss)
        level = next(level for level, (least, _) in enumerate(LEVELS) if probability >= least)
        spans.append(f'<span class="s{level}" title="{probability:.2%}">{escape(text)}</span>')
    legend = "".join(f'<span class="s{level}">{about}</span>' for level, (_, about) in enumerate(LEVELS))
    return (
        f"<p>The beginning of <b>{escape(name)}</b>, of the test split. The stronger the colour of a token, the less "
        "the model expected it; the legend tells what probability it gave to it, at least.</p>\n"
        f'<p class="legend soft">{legend}</p>\n<p class="text">{"".join(spans)}</p>'
    )


def _samples(samples: pd.DataFrame, sampled: Mapping[str, Any]) -> str:
    parts = ["<p>What the model writes after each prompt (bold), under several settings of sampling.</p>"]
    for prompt, rows in samples.groupby("prompt", sort=False):
        parts.append(f"<h3>{escape(str(prompt))}</h3>")
        for row in rows.to_dict("records"):
            parts.append(f'<p class="soft">{escape(describe_settings(row))}</p>')
            parts.append(f'<p class="text"><b>{escape(str(prompt))}</b>{escape(row["text"])}</p>')
    measures = [(name, value) for name, value in sampled.items() if name != "model"]
    about = (
        "Over all samples: different n-grams for each n-gram (distinct), 4-grams that a text repeats of itself "
        "(repetition), 8-grams that stand in the training text word for word (copied)."
    )
    return "\n".join([*parts, f'<h3>Measures of the samples</h3>\n<p class="soft">{about}</p>', _table(measures)])


def _configuration(results: Results) -> str:
    sections = {name: results.lineage[name] for name in ("prepare", "model", "train", "runtime")}
    sections["evaluate"] = {"stride": results.evaluated["stride"]}
    tables = (f"<section><h3>{name}</h3>\n{_table(values.items())}</section>" for name, values in sections.items())
    return f'<div class="tables">\n{"".join(tables)}\n</div>'


def _lineage(results: Results) -> str:
    lineage = results.lineage
    rows = [
        ("weights (SHA-256)", results.model_sha256),
        ("training key", lineage["train_key"]),
        ("commit", lineage["commit"]),
        ("uncommitted changes", ", ".join(lineage["uncommitted"]) or "none"),
        ("environment", lineage["environment"]),
        ("CPU threads", lineage["threads"]),
    ]
    return (
        f"{_table(rows)}\n<details><summary>Files that the training read, and their SHA-256</summary>\n"
        f'<div class="wide">{_table(lineage["files"].items())}</div>\n</details>'
    )
