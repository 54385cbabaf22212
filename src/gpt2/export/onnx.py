"""A model as an ONNX file, in float32: from token ids (B, T) to logits (B, T, V), of any batch and length."""

import logging
import warnings
from pathlib import Path

import onnxscript  # noqa: F401  # which torch.onnx needs
import tiktoken
import torch
from torch.export import Dim

from gpt2.config import ModelConfig
from gpt2.core.errors import UserError
from gpt2.model.gpt2 import GPT2Model

LIMIT = 2**31  # bytes that a file in protobuf's format can have


def write(model: GPT2Model, config: ModelConfig, encoding: tiktoken.Encoding, origin: str, path: Path) -> None:
    """Write the file `path`. Raises OSError, UserError for a model that is too large for one file."""
    if model.count_parameters() * 4 >= LIMIT:
        raise UserError("an ONNX file holds 2 GB; this model has more")
    tokens = torch.zeros(2, min(4, config.max_len), dtype=torch.long)
    sizes = {0: Dim("batch"), 1: Dim("length", max=config.max_len)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it tells that torchvision is missing
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of PyTorch about itself
        program = torch.onnx.export(
            model,
            (tokens,),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"tokens": sizes},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["origin"] = origin
    program.save(path)
