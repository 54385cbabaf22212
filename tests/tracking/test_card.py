"""A version's model card, from the pipeline's files."""

from pathlib import Path
from typing import Any

import pytest

from gpt2.config import Params
from gpt2.core.files import write_json, write_text
from gpt2.core.validation import check
from gpt2.tracking import card as cards
from gpt2.tracking.card import LIMIT, read_card

LINEAGE = {"commit": "c0ffee", "uncommitted": ["src/train.py"], "environment": "a machine of a test"}
SAMPLES = 'prompt,temperature,top_k,top_p,min_p,repetition_penalty,seed,text\nThe,0.7,40,,,1.0,3,"{text}"\n'


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("METRICS", "SAMPLES", "TOKENS"):
        monkeypatch.setattr(cards, name, tmp_path / name.lower())
    write_json(
        tmp_path / "metrics/train.json", {"tokens": 1500, "parameters": 49_434_624, "steps": 90, "kept_step": 80}
    )
    write_json(tmp_path / "metrics/evaluate.json", {"loss": 4.0, "val_loss": 5.0})
    write_json(tmp_path / "metrics/sample.json", {"copied_8grams": 0.25})
    splits = {split: {"documents": 3, "tokens": 1000, "bytes": 4000} for split in ("train", "val", "test")}
    write_json(tmp_path / "tokens/meta.json", {"splits": splits})
    write_text(tmp_path / "samples/samples.csv", SAMPLES.format(text=" war\nis over."))
    return tmp_path


def test_a_card_tells_the_figures_first_and_then_what_a_reader_needs(results: Path, shipped: dict[str, Any]) -> None:
    card = read_card(check(Params, shipped, ""), LINEAGE)
    assert card.tags == {
        "val_perplexity": "148.4",
        "test_perplexity": "54.6",
        "parameters": "49.4M",
        "steps": "80",
        "corpus": "sotu",
    }
    first, *lines = card.text("models:/gpt2/3", "loss 5 is below the 6 of version 2").splitlines()
    assert first == "Perplexity 148.4 (test 54.6; 1.443 bits per byte): 49.4M parameters, 80 steps on sotu"
    text = "\n".join(lines)
    for words in (
        "## Data\nU.S. State of the Union addresses",
        "| training | 3 | 1,000 | 4,000 |",
        "learning_rate 0.002, embedding_learning_rate 4e-05",
        "tie_weights false",
        "1.50 passes over the training split",
        "The weights are those of step 80 of 90.",
        "a machine of a test, from commit c0ffee with uncommitted changes (src/train.py)",
        "| perplexity | 148.4 | 54.6 |",
        "25% stand in the training split",
        "Beside other versions: loss 5 is below the 6 of version 2.",
        'mlflow.pyfunc.load_model("models:/gpt2/3")',
        "*temperature 0.7, top_k 40, seed 3*\n\n> **The** war\n> is over.",
    ):
        assert words in text, words


def test_a_card_tells_whose_the_tokenizer_is(results: Path, shipped: dict[str, Any]) -> None:
    assert "The tokenizer is GPT-2's." in read_card(check(Params, shipped, ""), LINEAGE).body
    own = shipped | {"prepare": shipped["prepare"] | {"tokenizer": "bpe", "vocab_size": 4096}}
    assert "The tokenizer is byte-level BPE of 4096 tokens" in read_card(check(Params, own, ""), LINEAGE).body


def test_a_long_text_and_a_huge_loss_fit_into_a_card(results: Path, shipped: dict[str, Any]) -> None:
    write_text(results / "samples/samples.csv", SAMPLES.format(text=" war" * LIMIT))
    write_json(results / "metrics/evaluate.json", {"loss": 1000.0, "val_loss": 100.0})
    card = read_card(check(Params, shipped, ""), LINEAGE)
    text = card.text("models:/gpt2/3", "there is no other version")
    assert text.startswith("Perplexity 2.7e+43 (test beyond 1e308; ")
    assert len(text) == LIMIT and "## A sample" in text
