"""The champion has the lowest validation loss, measured alike, on texts that no contender was trained on."""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities.model_registry import ModelVersion

from gpt2.config import ModelConfig, Params
from gpt2.core.validation import check
from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer, load_tokenizer
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import save_model
from gpt2.tracking import champion
from gpt2.tracking.champion import (
    STRIDE,
    TOKENIZER,
    VAL_LOSS,
    VAL_SHA256,
    VERDICT,
    _is_new,
    choose_champion,
    promote,
)
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.registry import TEST_LOSS, fetch_model, unchanged_parent
from gpt2.tracking.runs import PARENT, PARENT_SHA256
from gpt2.tracking.store import open_store

WORDS = np.random.default_rng(1).choice(["the", "nations", "and", "people", "of", "one", "naïve", "state", "日本"], 90)
VALIDATION = {"a": " ".join(WORDS[:50]), "b": " ".join(WORDS[50:])}  # the workspace's validation split


class Registry(SimpleNamespace):
    """A registered model, versions of which a test makes, and the parameters of the register stage."""

    def choose(self, version: ModelVersion, promote: str = "if_better") -> str:
        section = self.params.register_.model_copy(update={"promote": promote})
        return choose_champion(version, self.params.model_copy(update={"register_": section}))

    @property
    def champion(self) -> str:
        return str(self.client.get_model_version_by_alias(self.name, "champion").version)


@pytest.fixture
def registry(
    request: pytest.FixtureRequest,
    shipped: dict[str, Any],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_config: Callable[..., ModelConfig],
    make_model: Callable[..., GPT2Model],
) -> Iterator[Registry]:
    tokens = tmp_path / "tokens"
    documents = {name: gpt2_tokenizer().encode_document(text) for name, text in VALIDATION.items()}
    write_documents(tokens, train={"c": 9}, val={name: len(ids) for name, ids in documents.items()})
    np.concatenate(list(documents.values())).tofile(tokens / "val.bin")
    monkeypatch.setattr(champion, "TOKENS", tokens)
    monkeypatch.setattr(champion, "DOCUMENTS", tokens / "documents.csv")
    name = request.node.name.partition("[")[0]
    sections = {"evaluate": {"stride": 6, "batch_size": 2}, "register": shipped["register"] | {"name": name}}
    runtime = {"runtime": shipped["runtime"] | {"device": "cpu"}}
    open_store()
    client = mlflow.MlflowClient()
    client.create_registered_model(name)

    def make(
        scale: float, val_loss: float, trained_on: str = "c", tokenizer: Path | None = None, **tags: str
    ) -> ModelVersion:
        """Make a version of a model: the larger the scale, the worse on random tokens, whatever its recorded loss."""
        folder = tmp_path / str(scale)
        sizes = {"vocab_size": load_tokenizer(tokenizer).vocab_size if tokenizer else VOCAB_SIZE}
        model = make_model(**sizes)
        model.output_projection.weight.data.mul_(scale)
        measured = {VAL_LOSS: repr(val_loss), VAL_SHA256: "v", STRIDE: "6", TOKENIZER: "gpt2", TEST_LOSS: "1.0"}
        digest = save_model(model, make_config(**sizes), folder / "artifacts" / "model", tokenizer=tokenizer)
        (folder / "MLmodel").touch()
        write_documents(folder / "artifacts", train=dict.fromkeys(trained_on, 9))
        return client.create_model_version(name, str(folder), tags={MODEL_SHA256: digest} | measured | tags)

    yield Registry(params=check(Params, shipped | sections | runtime, "params"), client=client, name=name, make=make)
    client.delete_registered_model(name)


def write_documents(folder: Path, **splits: Mapping[str, int]) -> None:
    """Write what prepare tells of documents; their names stand in for their hashes."""
    rows = []
    for split, documents in splits.items():
        first = 0
        for name, count in documents.items():
            rows.append({"document": name, "split": split, "first_token": first, "tokens": count, "sha256": name})
            first += count
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "documents.csv", index=False)


@pytest.mark.parametrize(
    ("loss", "expected", "reason"),
    [(4.9, "2", "4.9000 is below the 5.0000 of version 1"), (5.0, "1", "5.0000 is not below the 5.0000 of version 1")],
)
def test_a_lower_validation_loss_wins(registry: Registry, loss: float, expected: str, reason: str) -> None:
    name = registry.name
    assert registry.choose(registry.make(1, 5.0)) == f"{name} version 1 is champion: there is no other version"
    second = registry.make(2, loss, **{TEST_LOSS: repr(9.0 if loss < 5 else 0.1)})  # the test split tells nothing
    said = registry.choose(second)
    assert said == f"{name} version 2 {'is' if expected == '2' else 'is not'} champion: validation loss {reason}"
    assert registry.champion == expected
    assert registry.client.get_model_version(name, "2").tags[VERDICT] == f"validation loss {reason}"
    assert registry.choose(registry.client.get_model_version(name, registry.champion)).endswith("it holds it already")


@pytest.mark.parametrize("other", [{STRIDE: "3"}, {VAL_SHA256: "of another split"}])
def test_losses_that_were_measured_differently_are_measured_again(registry: Registry, other: dict[str, str]) -> None:
    registry.choose(registry.make(3, 5.0))
    worse = registry.choose(registry.make(9, 0.5, **other))  # it only seems better
    assert "version 2 is not champion: scored again on 2 of 2 validation documents, bits per byte" in worse
    better = registry.choose(registry.make(0.1, 9.5, **other))
    assert "version 3 is champion" in better and registry.champion == "3"


def test_models_of_two_tokenizers_are_compared_by_bits_per_byte(registry: Registry, bpe_file: Path) -> None:
    """Of two models that guess, the one with fewer tokens has the lower loss for each, but more of them in a text."""
    registry.choose(registry.make(0.1, 10.8))
    guess = {TOKENIZER: "bpe", VAL_SHA256: "of other tokens"}
    said = registry.choose(registry.make(0.2, 5.6, tokenizer=bpe_file, **guess))
    figures = re.search(r"bits per byte ([\d.]+) is not below the ([\d.]+) of version 1", said)
    own, gpt2, size = (
        load_tokenizer(bpe_file),
        gpt2_tokenizer(),
        sum(len(text.encode()) for text in VALIDATION.values()),
    )
    counts = [sum(len(one.encode_document(text)) for text in VALIDATION.values()) for one in (own, gpt2)]
    expected = [math.log2(one.vocab_size) * n / size for one, n in zip((own, gpt2), counts, strict=True)]
    assert figures and [float(figure) for figure in figures.groups()] == pytest.approx(expected, rel=1e-2)


def test_no_model_is_scored_on_what_it_was_trained_on(registry: Registry) -> None:
    registry.choose(registry.make(9, 5.0, trained_on="ca"))
    said = registry.choose(registry.make(1, 5.0, **{VAL_SHA256: "another"}))
    assert "version 2 is champion: scored again on 1 of 2 validation documents" in said


def test_nor_on_a_text_that_was_cut_elsewhere() -> None:
    def documents(**split_of: str) -> pd.DataFrame:
        names = [name.replace("_", "[", 1).replace("_", ":") + ("]" if "_" in name else "") for name in split_of]
        return pd.DataFrame({"document": names, "sha256": list(split_of), "split": list(split_of.values())})

    known = documents(a_0_5="train", a_5_9="val", b="train", c_0_4="test", d_0_4="val", e="train")
    asked = documents(a_0_5="val", a_0_6="val", a_5_9="val", a="val", b_0_2="val", c_0_3="val", e="val", f="val")
    assert _is_new(asked, known).tolist() == [False, False, True, False, False, True, False, True]


def test_nor_on_what_it_started_from_was_trained_on(registry: Registry) -> None:
    """Whose split was another one. Where it was the same, the losses stand."""
    registry.choose(first := registry.make(9, 5.0))
    seen = registry.make(8, 6.0, trained_on="ca", **{VAL_SHA256: "another"})
    said = registry.choose(registry.make(1, 4.0, **{PARENT_SHA256: seen.tags[MODEL_SHA256]}))
    assert "version 3 is champion: scored again on 1 of 2 validation documents" in said
    said = registry.choose(registry.make(2, 3.9, **{PARENT_SHA256: first.tags[MODEL_SHA256]}))
    assert "version 4 is not champion: scored again on 1 of 2 validation documents" in said  # version 3 has seen one
    registry.client.set_registered_model_alias(registry.name, "champion", "1")
    said = registry.choose(registry.make(3, 3.8, **{PARENT_SHA256: first.tags[MODEL_SHA256]}))
    assert "version 5 is champion: validation loss 3.8000 is below the 5.0000 of version 1" in said


def test_nor_where_what_it_started_from_is_not_known(registry: Registry) -> None:
    registry.choose(registry.make(9, 5.0))
    said = registry.choose(registry.make(1, 4.0, **{PARENT: "runs:/5/step-3", PARENT_SHA256: "5" * 64}))
    assert "version 2 is not champion: it cannot be compared with version 1 (what the model that it started" in said


def test_nor_where_a_store_lets_two_models_start_from_each_other(registry: Registry) -> None:
    registry.choose(first := registry.make(9, 5.0))
    second = registry.make(1, 4.0, **{PARENT_SHA256: first.tags[MODEL_SHA256]})
    registry.client.set_model_version_tag(registry.name, "1", PARENT_SHA256, second.tags[MODEL_SHA256])
    assert "version 2 is champion: validation loss 4.0000 is below" in registry.choose(second)


def test_a_version_whose_training_improves_nothing_stays_what_it_is(registry: Registry) -> None:
    first = registry.make(9, 5.0)
    made_from = {MODEL_SHA256: first.tags[MODEL_SHA256]}
    assert unchanged_parent(made_from) is None  # the same training again
    found = unchanged_parent(made_from | {PARENT_SHA256: first.tags[MODEL_SHA256]})
    assert found and found.version == first.version
    own = registry.make(8, 5.0, **{PARENT_SHA256: first.tags[MODEL_SHA256]})
    assert unchanged_parent({MODEL_SHA256: own.tags[MODEL_SHA256], PARENT_SHA256: first.tags[MODEL_SHA256]}) is None


@pytest.mark.parametrize(
    ("trained_on", "reason"),
    [
        ("cab", "no validation document is surely new to both"),
        ("", "what it was trained on is not known"),
    ],
)
def test_where_nothing_can_be_compared_nothing_is_promoted_but_by_hand(
    registry: Registry, tmp_path: Path, trained_on: str, reason: str, error_line: Callable[[Callable[[], object]], str]
) -> None:
    name = registry.name
    registry.choose(registry.make(9, 5.0, trained_on or "c"))
    if not trained_on:
        (tmp_path / "9" / "artifacts" / "documents.csv").unlink()
    said = registry.choose(registry.make(1, 4.0, **{VAL_SHA256: "another"}))
    assert said.startswith(f"{name} version 2 is not champion: it cannot be compared with version 1 ({reason}); ")
    assert said.endswith("`python src/register.py --promote 2` makes it the champion")
    assert promote(name, "champion", "2") == f"{name} version 2 is champion: promoted by hand"
    assert registry.champion == "2"
    assert registry.client.get_model_version(name, "2").tags[VERDICT] == "promoted by hand"
    line = error_line(lambda: promote(name, "champion", "latest"))
    assert line == "error: --promote takes the number of a version, not latest\n"


def test_the_best_of_the_others_takes_over_from_a_champion_that_is_lost(
    registry: Registry, tmp_path: Path, error_line: Callable[[Callable[[], object]], str], store: Path
) -> None:
    name = registry.name
    for scale, loss in ((1, 4.0), (2, 4.2), (3, 4.1)):
        registry.choose(registry.make(scale, loss))
    receipt = store / "mlartifacts" / "receipt.json"
    receipt.parent.mkdir(exist_ok=True)
    receipt.touch()
    registry.client.delete_model_version(name, "1")
    line = error_line(lambda: fetch_model(f"models:/{name}@champion"))
    assert "there are versions 3, 2; `dvc repro` chooses the champion anew" in line
    assert not receipt.exists()
    said = registry.choose(registry.make(4, 4.3))
    assert said.endswith("version 4 is not champion: validation loss 4.3000 is not below the 4.1000 of version 3")
    assert registry.champion == "3"
    shutil.rmtree(tmp_path / "3")
    receipt.touch()
    assert "does not exist" in error_line(lambda: fetch_model(f"models:/{name}@champion"))
    assert not receipt.exists()
    said = registry.choose(registry.make(5, 4.0))
    assert "version 5 is champion: version 3, which held it, is lost; validation loss 4.0000 is below" in said


def test_who_is_champion_may_be_left_to_a_person(registry: Registry) -> None:
    assert "version 1 is not champion: register.promote is never" in registry.choose(registry.make(1, 5.0), "never")
    assert "version 2 is champion: register.promote is always" in registry.choose(registry.make(2, 9.0), "always")
    assert "is not champion" in registry.choose(registry.make(3, 1.0), "never") and registry.champion == "2"
