"""A model is found by any name that a user may give, and known by its weights."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2.config import ModelConfig
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.data.tokenizer import load_tokenizer
from gpt2.export.hf import write
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import save_model
from gpt2.tracking import named_models
from gpt2.tracking.named_models import load_named, load_parent

ErrorLine = Callable[[Callable[[], object]], str]
OPENAI = {"tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment's own checkout, inside which a main one is pretended."""
    monkeypatch.setattr(named_models, "ROOT", tmp_path)
    monkeypatch.setattr(named_models, "main_root", lambda: tmp_path / "main")
    return tmp_path


def test_equal_weights_have_one_sha256_wherever_they_come_from(
    root: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, config = make_model(random=True, **OPENAI), make_config(**OPENAI)
    asked = []

    def load_huggingface(name: str) -> tuple[Path, GPT2Model, ModelConfig]:
        asked.append(name)
        return Path(name), model, config

    monkeypatch.setitem(
        sys.modules,
        "gpt2.model.huggingface",
        SimpleNamespace(load_huggingface=load_huggingface, TOKENIZER="tokenizer.json"),
    )
    folder = root / "data/pretrained"
    (folder / "hub").mkdir(parents=True)
    (folder / "hub/config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16}))
    digest = save_model(model, config, folder / "ours")
    saved = {"model_state_dict": model.state_dict(), "model_config": config.model_dump(exclude={"qkv_bias"})}
    torch.save(saved, folder / "x.pt")
    names = ("hf:owner/gpt2", "data/pretrained/hub", "data/pretrained/ours", "data/pretrained/x.pt")
    assert {load_parent(name).sha256 for name in names} == {digest}
    assert asked == ["hf:owner/gpt2", str(folder / "hub")]
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    assert load_parent("hf:owner/gpt2").sha256 != digest
    assert load_named(str(folder / "ours")).config == config


def test_a_folder_of_hugging_face_keeps_its_own_tokenizer(
    tmp_path: Path,
    bpe_file: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
    error_line: ErrorLine,
) -> None:
    own = load_tokenizer(bpe_file)
    model, config = make_model(vocab_size=own.vocab_size), make_config(vocab_size=own.vocab_size)
    write(model, config, own.encoding, "", tmp_path / "hf")
    assert load_named(str(tmp_path / "hf")).tokenizer.name == own.name
    (tmp_path / "hf" / TOKENIZER_FILE).unlink()
    assert "tokenizer.json is not GPT-2's tokenizer" in error_line(lambda: load_named(str(tmp_path / "hf")))


def test_weights_that_are_not_there_or_not_tracked_are_told_so(root: Path, error_line: ErrorLine) -> None:
    name = "data/pretrained/x.pt"
    assert f"{root / name} does not exist" in error_line(partial(load_parent, name))
    (root / "main/data/pretrained").mkdir(parents=True)
    (root / "main" / name).touch()
    assert f"run `dvc add {name}` and commit {name}.dvc" in error_line(partial(load_parent, name))
    shutil.copytree(root / "main/data", root / "data")
    assert "is not a checkpoint" in error_line(partial(load_parent, name))
