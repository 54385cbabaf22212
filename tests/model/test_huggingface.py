import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2.config import ModelConfig
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.huggingface import load_huggingface, to_huggingface, to_huggingface_config

MakeModel = Callable[..., GPT2Model]
MakeConfig = Callable[..., ModelConfig]
ErrorLine = Callable[[Callable[[], object]], str]
SIZES = {"vocab_size": 61, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 2}


def save_peer(folder: Path, shard: str = "5GB", **changes: Any) -> GPT2LMHeadModel:
    """Save a random model of transformers, each weight far from its usual first value."""
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    peer.save_pretrained(folder, max_shard_size=shard)
    return peer


def assert_same_logits(one: torch.nn.Module, two: torch.nn.Module, vocab_size: int, length: int) -> None:
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = one(tokens), two(tokens)
    logits = (found if isinstance(found, torch.Tensor) else found.logits for found in (ours, theirs))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "n_inner": 24, "activation_function": "gelu"},
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},  # of 124M
    ],
    ids=["tied", "untied", "real"],
)
def test_a_saved_model_has_the_logits_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    peer = save_peer(tmp_path, **changes)
    _, model, config = load_huggingface(str(tmp_path))
    assert config.tie_weights == (model.output_projection.weight is model.token_embedding.weight)
    assert config.tie_weights == changes.get("tie_word_embeddings", True)
    assert model.count_parameters() == sum(weight.numel() for weight in peer.parameters())
    assert_same_logits(model, peer, config.vocab_size, min(config.max_len, 64))


def test_shards_half_precision_and_the_names_of_the_hubs_gpt2_are_read(tmp_path: Path) -> None:
    peer = save_peer(tmp_path, shard="10KB").half()
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    for file in files:
        weights = {name.removeprefix("transformer."): weight.half() for name, weight in load_file(file).items()}
        save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 12, 12)}, file)
    assert_same_logits(load_huggingface(str(tmp_path))[1], peer.float(), 61, 12)


def test_weights_that_differ_are_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    peer = save_peer(tmp_path, tie_word_embeddings=False)
    change_config(tmp_path, tie_word_embeddings=True)
    assert_same_logits(load_huggingface(str(tmp_path))[1], peer, 61, 12)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, False)])
def test_transformers_opens_what_is_written(
    tmp_path: Path, make_model: MakeModel, make_config: MakeConfig, activation: str, tied: bool, bias: bool
) -> None:
    kind = {"activation": activation, "tie_weights": tied, "qkv_bias": bias}
    model = make_model(random=True, **kind)
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface_config(make_config(**kind), end_of_text=0)))
    save_file(dict(to_huggingface(model)), tmp_path / "model.safetensors", {"format": "pt"})
    peer, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert_same_logits(model, peer.eval(), 61, 12)
    _, back, config = load_huggingface(str(tmp_path))
    assert config == make_config(**kind | {"qkv_bias": True})
    assert_same_logits(model, back, 61, 12)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "its model_type is not gpt2"),
        ({"activation_function": "relu"}, "activation_function is relu; only gelu_new, gelu are supported"),
        ({"activation_function": []}, "activation_function is []"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05 is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_embd": None}, "d_model"),
        ({"n_head": 3}, "d_model 16 is not a multiple of n_heads 3"),
        ({"n_layer": 4}, "does not hold the weights of its config.json"),
        ({"n_inner": 63}, "does not hold the weights of its config.json"),
    ],
)
def test_what_is_no_such_gpt2_is_refused(
    tmp_path: Path, error_line: ErrorLine, changes: dict[str, Any], said: str
) -> None:
    save_peer(tmp_path)
    change_config(tmp_path, **changes)
    assert said in error_line(lambda: load_huggingface(str(tmp_path)))


def test_broken_folders_are_one_line(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "it has no config.json" in error_line(lambda: load_huggingface(str(tmp_path)))
    save_peer(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    for broken in (
        {name: weight for name, weight in whole.items() if name != "transformer.h.1.ln_1.bias"},
        whole | {"transformer.h.0.mlp.gate.weight": torch.zeros(2)},
        whole | {"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 2)},
        whole | {"transformer.h": torch.zeros(2)},
    ):
        save_file(broken, weights)
        assert "does not hold the weights" in error_line(lambda: load_huggingface(str(tmp_path)))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "does not hold the weights" in error_line(lambda: load_huggingface(str(tmp_path)))
    weights.rename(tmp_path / "pytorch_model.bin")
    assert "has no model*.safetensors" in error_line(lambda: load_huggingface(str(tmp_path)))


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("hf:gpt2", "hf:no/such/name"):
        assert "cannot be had from the Hugging Face hub" in error_line(lambda: load_huggingface(name))  # noqa: B023


@pytest.mark.parametrize(("error", "reason"), [(RuntimeError(), "RuntimeError"), (EOFError("cut\nshort"), "cut")])
def test_whatever_a_download_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine, error: Exception, reason: str
) -> None:
    monkeypatch.setattr("gpt2.model.huggingface.snapshot_download", Mock(side_effect=error))
    line = error_line(lambda: load_huggingface("hf:owner/name"))
    assert line == f"error: hf:owner/name cannot be had from the Hugging Face hub: {reason}\n"
