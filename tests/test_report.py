"""The stage report: the same files give the same bytes, and what is no result of this model is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import report
from gpt2.config import ModelConfig
from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import save_model

ErrorLine = Callable[[Callable[[], object]], str]


@pytest.fixture
def data(
    make_config: Callable[..., ModelConfig], shipped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The files that the stage reads, of a tiny model that is uniform over the vocabulary."""
    config = make_config(d_model=4, d_ff=4, max_len=8, vocab_size=VOCAB_SIZE)
    torch.manual_seed(0)
    model = GPT2Model(**config.model_dump())
    model.output_projection.weight.data.zero_()
    name = save_model(model, config, tmp_path / "model")[:8]
    shipped["evaluate"] |= {"stride": 4}
    shipped["runtime"] |= {"threads": 1, "device": "cpu"}
    shipped["train"] |= {"sequence_length": 8}
    shipped["model"] |= config.model_dump(exclude={"vocab_size"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(shipped))

    texts = {"001 1790 Washington": "Fellow citizens", "002 1791 Washington": "I", "003 1797 Adams": "A war. " * 9}
    rows, tokens = [], [np.empty(0, np.uint16)]
    for document, text in texts.items():
        ids = gpt2_tokenizer().encode_document(text)
        rows.append(
            {
                "document": document,
                "split": "test",
                "first_token": sum(map(len, tokens)),
                "tokens": len(ids),
                "bytes": 4 * len(ids),
            }
        )
        tokens.append(ids)
    rows.insert(0, {"document": "000 1789 Washington", "split": "val", "first_token": 0, "tokens": 1, "bytes": 4})
    (tmp_path / "tokens").mkdir()
    np.concatenate(tokens).tofile(tmp_path / "tokens/test.bin")
    pd.DataFrame(rows).to_csv(tmp_path / "tokens/documents.csv", index=False)

    (tmp_path / "plots").mkdir()
    for curve in ("train_loss", "val_loss", "train_grad_norm", "train_learning_rate"):
        table = pd.DataFrame({"step": [0, 5] if curve == "val_loss" else [5], curve.split("_", 1)[1]: 1.5})
        table.to_csv(tmp_path / f"plots/{curve}.csv", index=False)
    lineage = {section: shipped[section] for section in ("prepare", "model", "train", "runtime")}
    lineage |= {"train_key": "k", "commit": "c", "uncommitted": [], "environment": "Python", "threads": 1, "files": {}}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    found = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5, "tokens": 9, "stride": 4, "model": name}
    (tmp_path / "metrics").mkdir()
    evaluated = found | {f"val_{key}": value for key, value in found.items()}
    (tmp_path / "metrics/evaluate.json").write_text(json.dumps(evaluated))
    (tmp_path / "metrics/sample.json").write_text(json.dumps({"distinct_1": 0.5, "model": name}))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/samples.csv").write_text('"prompt","temperature","text"\n"NA",0.5," or\r <b>null</b>"\n')

    monkeypatch.setattr(report, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(report, "LINEAGE", tmp_path / "lineage.json")
    for folder in ("METRICS", "MODEL", "PLOTS", "REPORT", "SAMPLES", "TOKENS"):
        monkeypatch.setattr(report, folder, tmp_path / folder.lower())
    return tmp_path


def test_the_same_files_give_the_same_bytes(data: Path, offline: None) -> None:
    def written() -> dict[str, bytes]:
        report.main()
        return {file.name: file.read_bytes() for file in (data / "report").iterdir()}

    first = written()
    (data / "report" / "left_over.csv").touch()
    assert written() == first
    assert {"index.html", "training.csv", "loss.svg", "perplexity_by_president.svg"} <= set(first)
    page = first["index.html"].decode()
    assert set(re.findall(r'(?:src|href)="(.)', page)) <= {"#", "d"} and "https:" not in page
    assert "<b>NA</b> or" in page and "&lt;b&gt;null&lt;/b&gt;" in page and "003 1797 Adams" in page

    decades = pd.read_csv(data / "report/perplexity_by_decade.csv")
    assert decades["decade"].tolist() == ["1790s"]
    assert decades["perplexity"][0] == pytest.approx(VOCAB_SIZE, rel=1e-5)
    presidents = pd.read_csv(data / "report/perplexity_by_president.csv")
    assert presidents["president"].tolist() == ["Washington 1789-1791", "Adams 1797"]
    curves = pd.read_csv(data / "report/training.csv")
    assert curves["tokens"].tolist() == [0, 5 * 8 * 8]


@pytest.mark.parametrize(("keep", "steps"), [("last", 5), ("best", 0)])
def test_the_page_tells_whose_steps_the_weights_are(data: Path, keep: str, steps: int) -> None:
    lineage = json.loads((data / "lineage.json").read_text())
    lineage["train"]["keep"] = keep
    (data / "lineage.json").write_text(json.dumps(lineage))
    report.main()
    assert f"trained for {steps} steps" in (data / "report/index.html").read_text()


def test_results_of_another_model_and_broken_ones_are_refused(data: Path, error_line: ErrorLine) -> None:
    (data / "samples/samples.csv").write_text("")
    assert "the results cannot be read" in error_line(report.main)
    evaluated = json.loads((data / "metrics/evaluate.json").read_text())
    (data / "metrics/evaluate.json").write_text(json.dumps(evaluated | {"model": "another"}))
    assert "stage evaluate are not of the model" in error_line(report.main)
    (data / "metrics/evaluate.json").write_text("{}")
    assert "the results cannot be read" in error_line(report.main)
