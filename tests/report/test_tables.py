"""The numbers of the report are those of the model."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.evaluation.perplexity import predictions
from gpt2.model.gpt2 import GPT2Model
from gpt2.report.tables import Predictions, by_document, by_position, calibration, grouped, predict, sotu_groups

TOKENS = np.random.default_rng(0).integers(VOCAB_SIZE, size=30).astype(np.uint16)


def test_a_uniform_model_has_the_loss_ln_v_everywhere(make_model: Callable[..., GPT2Model]) -> None:
    model = make_model(vocab_size=VOCAB_SIZE)
    model.output_projection.weight.data.zero_()
    predicted = predict(model, TOKENS, 12, 2)
    documents = pd.DataFrame({"document": ["a", "b"], "first_token": [0, 7], "tokens": [7, 23]})
    positions, texts = by_position(predicted.losses, 12), by_document(documents, predicted.losses)
    assert positions["position"].tolist() == list(range(1, 13))
    assert positions["loss"].to_numpy() == pytest.approx(math.log(VOCAB_SIZE))
    assert texts["document"].tolist() == ["a", "b"] and texts["perplexity"].to_numpy() == pytest.approx(VOCAB_SIZE)
    bins = calibration(predicted)
    assert bins[["from", "to", "tokens"]].to_numpy().tolist() == [[0, 0.1, 30]]
    assert bins["confidence"][0] == pytest.approx(1 / VOCAB_SIZE)


def test_predictions_are_those_of_the_logits(make_model: Callable[..., GPT2Model]) -> None:
    model = make_model(vocab_size=VOCAB_SIZE, random=True)
    pairs = list(predictions(model, TOKENS, 6, 2))
    logits, targets = torch.cat([logits for logits, _ in pairs]), torch.cat([targets for _, targets in pairs])
    predicted = predict(model, TOKENS, 6, 2)
    assert predicted.losses == pytest.approx(F.cross_entropy(logits, targets, reduction="none").numpy(), abs=1e-5)
    assert predicted.confidences == pytest.approx(logits.softmax(-1).amax(-1).numpy(), abs=1e-6)
    assert predicted.hits.tolist() == (logits.argmax(-1) == targets).tolist()


def test_positions_count_the_tokens_before() -> None:
    # Windows side by side of 12; the last one begins earlier, to be as long, and scores 6 tokens.
    losses = np.array([*range(1, 13), *range(1, 13), *range(7, 13)], dtype=float)
    table = by_position(losses, 12)
    assert table["loss"].tolist() == table["position"].tolist() == list(range(1, 13))
    assert table["tokens"].tolist() == [2] * 6 + [3] * 6


def test_groups_weigh_documents_by_their_tokens() -> None:
    names = ["115 1907 Roosevelt", "116 1908 Roosevelt", "117 1909 Taft[0:99]", "150 1938 Roosevelt"]
    groups = sotu_groups(pd.DataFrame({"document": names}))
    assert groups["decade"].tolist() == ["1900s"] * 3 + ["1930s"]
    assert groups["president"].tolist() == ["Roosevelt 1907-1908"] * 2 + ["Taft 1909", "Roosevelt 1938"]
    documents = pd.DataFrame({"document": names, "first_token": [0, 1, 4, 5], "tokens": [1, 3, 1, 1]})
    texts = by_document(documents, np.array([2.0, 1, 1, 1, 3, 4]))
    table = grouped(texts, groups["president"])
    assert table["president"].tolist() == ["Roosevelt 1907-1908", "Taft 1909", "Roosevelt 1938"]
    assert table["tokens"].tolist() == [4, 1, 1]
    assert table["loss"].tolist() == [1.25, 3, 4]
    assert table["perplexity"].to_numpy() == pytest.approx([math.exp(1.25), math.exp(3), math.exp(4)])
    with pytest.raises(ValueError, match="mine"):
        sotu_groups(pd.DataFrame({"document": ["mine.txt"]}))


def test_calibration_by_hand() -> None:
    confidences, hits = np.array([0.05, 0.31, 0.39, 1.0]), np.array([0.0, 1, 0, 1])
    table = calibration(Predictions(np.zeros(4), confidences, hits))
    assert table.round(6).to_numpy().tolist() == [[0, 0.1, 1, 0.05, 0], [0.3, 0.4, 2, 0.35, 0.5], [0.9, 1, 1, 1, 1]]
