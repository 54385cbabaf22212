"""Model folders: weights in safetensors, their shape and SHA-256 in config.json. Nothing here runs code from a file."""

import hashlib
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt2.config import ModelConfig, TrainParams
from gpt2.core.errors import UserError
from gpt2.core.files import atomic_write, read_json, sha256_of, write_json
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.core.validation import check
from gpt2.data.batches import SeenMask, load_seen
from gpt2.model.gpt2 import GPT2Model

WEIGHTS, CONFIG, SEEN_TOKENS = "model.safetensors", "config.json", "seen_tokens.npy"

# Names of the original project's later version, and what they are called here.
LATER_NAMES = {
    ".attn.": ".attention.",
    ".mlp.c_fc.": ".feed_forward.linear1.",
    ".mlp.c_proj.": ".feed_forward.linear2.",
}


def save_model(
    model: GPT2Model,
    config: ModelConfig,
    folder: Path,
    trained_with: TrainParams | None = None,
    seen: SeenMask | None = None,
    tokenizer: Path | None = None,
) -> str:
    """Write a model folder in place of the present one; return the weights' SHA-256.

    Its configuration also tells the parameters that the model was trained with, if they are given; `seen` (V,), which
    tokens have rows of their own in the output projection, if those of all others are equal; `tokenizer` is the file of
    one that is not GPT-2's, copied if it exists. The same weights give the same bytes. Tied weights are written once,
    as token_embedding. Raises OSError.
    """
    state = _stored(model, config)
    with atomic_write(folder) as partial:
        partial.mkdir()
        save_tensors(state, partial / WEIGHTS)
        digest = sha256_of(partial / WEIGHTS)
        told: dict[str, Any] = {"model": config.model_dump(), "model_sha256": digest}
        if tokenizer and tokenizer.exists():
            told["tokenizer_sha256"] = sha256_of(shutil.copyfile(tokenizer, partial / TOKENIZER_FILE))
        write_json(partial / CONFIG, told | ({"train": trained_with.model_dump()} if trained_with else {}))
        if seen is not None:
            np.save(partial / SEEN_TOKENS, seen)
    return digest


def weights_sha256(model: GPT2Model, config: ModelConfig) -> str:
    """Return the SHA-256 that the model's weights have in a model folder, wherever they come from."""
    return hashlib.sha256(save(_stored(model, config))).hexdigest()


def _stored(model: GPT2Model, config: ModelConfig) -> dict[str, Tensor]:
    state = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    if config.tie_weights:
        del state["output_projection.weight"]
    return state


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU tensors as safetensors. Raises OSError."""
    try:
        save_file(tensors, path, metadata)
        path.chmod(path.parent.stat().st_mode & 0o666)  # else for its owner alone
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def load_model(path: Path) -> tuple[GPT2Model, ModelConfig, SeenMask | None]:
    """Return the model saved at `path`, ready to generate on the CPU, its configuration, and what `seen` tells.

    `path` is a model folder, its .safetensors file, or a checkpoint (.pt, .pth) of the original project. Raises
    UserError if it is missing, broken, of another shape than its configuration, or does not match its recorded SHA-256.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    seen = None
    if path.suffix in (".pt", ".pth"):
        config, state = _read_original_checkpoint(path)
    else:
        config, state = _read_model_folder(path)
        seen_path = (path if path.is_dir() else path.parent) / SEEN_TOKENS
        seen = load_seen(seen_path, config.vocab_size) if seen_path.exists() else None
    if config.tie_weights and "token_embedding.weight" in state:
        state["output_projection.weight"] = state["token_embedding.weight"]
    try:
        # Shapes only: the file's tensors become the weights, once they are known to fit.
        with shapes_only():
            model = GPT2Model(**config.model_dump())
        model.load_state_dict({name: weight.float() for name, weight in state.items()}, assign=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold the weights of its configuration: {error}") from None
    if config.tie_weights:
        model.output_projection.weight = model.token_embedding.weight
    return model.eval(), config, seen


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """Return the configuration and the weights' SHA-256 recorded in a model folder. Raises UserError."""
    path = folder / CONFIG
    raw = read_json(path)
    digest = raw.get("model_sha256") if isinstance(raw, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(f"{path} is not a model's configuration: it has no SHA-256 of weights")
    return check(ModelConfig, raw.get("model"), str(path)), digest


def short_name(folder: Path) -> str:
    """Return the first digits of the SHA-256 of a model folder's weights: by them results name their model."""
    return read_config(folder)[1][:8]


def _read_model_folder(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    weights = path / WEIGHTS if path.is_dir() else path
    if not (weights.parent / CONFIG).exists():
        raise UserError(f"{path} is no model: {weights.parent / CONFIG} does not exist")
    config, recorded = read_config(weights.parent)
    if sha256_of(weights) != recorded:
        raise UserError(f"{weights} is damaged or not the model of its {CONFIG}: its SHA-256 is not {recorded}")
    tokenizer, recorded = weights.parent / TOKENIZER_FILE, read_json(weights.parent / CONFIG).get("tokenizer_sha256")
    if recorded != (sha256_of(tokenizer) if tokenizer.exists() else None):
        raise UserError(f"{tokenizer} is missing, damaged or not that of its {CONFIG}: its SHA-256 is not {recorded}")
    try:
        return config, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is not a safetensors file: {error}") from None


def _read_original_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a dict with model_state_dict and model_config, saved by torch.save, without running code from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {_present_name(name): weight.detach() for name, weight in checkpoint["model_state_dict"].items()}
        raw = {"dropout": 0.0, "tie_weights": False, "activation": "gelu", **checkpoint["model_config"]}
        raw["qkv_bias"] = any(name.endswith("w_q.bias") for name in weights)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is damaged, or holds more than weights") from None
    except Exception:  # torch.load meets a damaged file with errors of any kind
        raise UserError(f"{path} is not a checkpoint with model_state_dict and model_config") from None
    return check(ModelConfig, raw, f"{path}: model_config"), weights


def _present_name(name: str) -> str:
    for later, present in LATER_NAMES.items():
        name = name.replace(later, present)
    return name


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let the block build models whose weights, on the meta device, have shapes but no values and take no memory."""
    with torch.device("meta"), _NoInitialization():
        yield


class _NoInitialization(TorchFunctionMode):
    """Skips torch.nn.init: drawing weights on the meta device takes as long as importing PyTorch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))
