"""GPT-2 in the files of Hugging Face's transformers: its names, layouts and configuration, read and written.

Nothing here runs code from a file: weights are safetensors, a configuration is JSON.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2.config import ModelConfig
from gpt2.core.errors import UserError
from gpt2.core.files import read_json
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.core.validation import check
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import CONFIG, shapes_only

WEIGHTS = "model*.safetensors"  # one file, or model-00001-of-00002.safetensors and so on
TOKENIZER = "tokenizer.json"
LAYER_NORM_EPSILON = 1e-5  # as in PyTorch
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu"}
# What the model here cannot do otherwise; a configuration that lacks one of them means this value.
FIXED = {
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}

# Their module, and what it is called here. Theirs of the names with c_ keep the weight transposed.
OUTSIDE = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "layer_norm",
    "lm_head": "output_projection",
}
BLOCK = {
    "ln_1": ["layer_norm1"],
    "attn.c_attn": ["attention.w_q", "attention.w_k", "attention.w_v"],
    "attn.c_proj": ["attention.w_o"],
    "ln_2": ["layer_norm2"],
    "mlp.c_fc": ["feed_forward.linear1"],
    "mlp.c_proj": ["feed_forward.linear2"],
}


def load_huggingface(name: str) -> tuple[Path, GPT2Model, ModelConfig]:
    """Return the folder and the GPT-2 of a local folder or of hf:name, on the hub; float32 on the CPU, ready to use.

    On the hub, hf:name@commit is the state of that commit. Raises UserError if it is not there, broken, no GPT-2 in
    safetensors, or computes what the model here does not.
    """
    folder = _download(name.removeprefix("hf:")) if name.startswith("hf:") else Path(name)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} is no Hugging Face model: it has no {CONFIG}")
    config = from_huggingface_config(read_json(folder / CONFIG), f"{name}: {CONFIG}")
    if not (files := sorted(folder.glob(WEIGHTS))):
        raise UserError(f"{name} has no {WEIGHTS}; weights in other formats could run code and are not read")
    try:
        state = from_huggingface({key: weight for file in files for key, weight in load_file(file).items()})
        if config.tie_weights and (embedding := state.get("token_embedding.weight")) is not None:
            head = state.setdefault("output_projection.weight", embedding)
            # Weights that differ are not tied, whatever is said: transformers reads them so too.
            config = config.model_copy(update={"tie_weights": torch.equal(head, embedding)})
        with shapes_only():
            model = GPT2Model(**config.model_dump())
        model.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name} does not hold the weights of its {CONFIG}: {error}") from None
    if config.tie_weights:
        model.output_projection.weight = model.token_embedding.weight
    return folder, model.eval(), config


def from_huggingface_config(raw: Any, where: str) -> ModelConfig:
    """Return the configuration of a GPT2Config as JSON. Raises UserError that begins with `where`.

    Of their three dropouts it takes that of the residual branches.
    """
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt2":
        raise UserError(f"{where} is not that of a GPT-2: its model_type is not gpt2")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{where}: {key} is {raw[key]}; only {value} is supported")
    activation, inner, width = raw.get("activation_function", "gelu_new"), raw.get("n_inner"), raw.get("n_embd")
    if activation not in list(ACTIVATIONS):  # it may be of any type
        raise UserError(f"{where}: activation_function is {activation}; only {', '.join(ACTIVATIONS)} are supported")
    sizes = {"vocab_size": "vocab_size", "max_len": "n_positions", "n_layers": "n_layer", "n_heads": "n_head"}
    return check(
        ModelConfig,
        {ours: raw.get(theirs) for ours, theirs in sizes.items()}
        | {
            "d_model": width,
            "d_ff": 4 * width if inner is None and isinstance(width, int) else inner,
            "dropout": raw.get("resid_pdrop", 0.1),
            "tie_weights": raw.get("tie_word_embeddings", True),
            "qkv_bias": True,
            "activation": ACTIVATIONS[activation],
        },
        where,
    )


def to_huggingface_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """Return a GPT2Config as JSON."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of GPT2Model, float32, from one of GPT2LMHeadModel or of their GPT2Model, which is emptied.

    A weight that has no name here keeps its own. Raises ValueError for a matrix that cannot be split in three.
    """
    state = {}
    for key in list(weights):
        weight = weights.pop(key).float()
        theirs, _, kind = key.removeprefix("transformer.").rpartition(".")
        if theirs.endswith(".attn"):  # the causal mask, which old files hold
            continue
        block, module = "", theirs
        if theirs.startswith("h."):
            _, index, module = theirs.split(".", 2)
            block = f"transformer_blocks.{index}."
        ours = BLOCK.get(module) if block else [OUTSIDE[module]] if module in OUTSIDE else None
        if ours is None:
            state[key] = weight
            continue
        if is_transposed(module, kind):
            weight = weight.T
        for our, part in zip(ours, weight.chunk(len(ours)), strict=True):
            state[f"{block}{our}.{kind}"] = part.contiguous()
    return state


def to_huggingface(model: GPT2Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and weights of a GPT2LMHeadModel one by one; tied weights once, biases that are missing as 0."""
    state = model.state_dict()
    layers = [("transformer." * (theirs != "lm_head") + theirs, [ours]) for theirs, ours in OUTSIDE.items()]
    for i in range(len(model.transformer_blocks)):
        for theirs, parts in BLOCK.items():
            layers.append((f"transformer.h.{i}.{theirs}", [f"transformer_blocks.{i}.{part}" for part in parts]))
    tied = model.output_projection.weight is model.token_embedding.weight
    for (theirs, ours), kind in itertools.product(layers, ("weight", "bias")):
        if f"{ours[0]}.{kind}" in state and not (tied and theirs == "lm_head"):
            weight = torch.cat([state[f"{our}.{kind}"] for our in ours])
            yield f"{theirs}.{kind}", weight.T.contiguous() if is_transposed(theirs, kind) else weight
        elif theirs.endswith("c_attn"):
            yield f"{theirs}.{kind}", torch.zeros(3 * model.token_embedding.embedding_dim)


def is_transposed(theirs: str, kind: str) -> bool:
    return ".c_" in theirs and kind == "weight"


def _download(name: str) -> Path:
    """Return the folder in the hub's cache that holds a model's configuration and weights. Raises UserError."""
    repository, _, commit = name.partition("@")
    patterns = [CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_FILE]
    try:
        return Path(snapshot_download(repository, revision=commit or None, allow_patterns=patterns))
    except Exception as error:  # of many libraries: offline, not there, or no name that the hub could have
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"hf:{name} cannot be had from the Hugging Face hub: {reason}") from None
