"""A model as a GGUF file, in float32, for llama.cpp and the programs built on it."""

import sys
from pathlib import Path

import gguf
import tiktoken

from gpt2.config import ModelConfig
from gpt2.export.tokenizer import merges_of, vocabulary_of
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.huggingface import LAYER_NORM_EPSILON, is_transposed, to_huggingface

NOTE = (
    "note: llama.cpp computes every GPT-2 with gelu_tanh; this model has the exact gelu, so its logits differ a little"
)


def write(model: GPT2Model, config: ModelConfig, encoding: tiktoken.Encoding, origin: str, path: Path) -> None:
    """Write the file `path`. Raises OSError."""
    if config.activation == "gelu":
        print(NOTE, file=sys.stderr)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name("GPT-2")
    writer.add_description(origin)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)

    special, kinds = encoding.special_tokens_set, gguf.TokenType
    vocabulary = vocabulary_of(encoding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary))
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(encoding)])
    writer.add_bos_token_id(encoding.eot_token)
    writer.add_eos_token_id(encoding.eot_token)
    writer.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layers)
    for theirs, weight in to_huggingface(model):
        layer, _, kind = theirs.rpartition(".")
        matrix = weight.T.contiguous() if is_transposed(layer, kind) else weight
        writer.add_tensor(f"{names.get_name(layer)}.{kind}", matrix.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
