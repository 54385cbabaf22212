"""A tiktoken encoding as the vocabulary and merges of a byte-level BPE, the form that other programs read."""

import itertools
from typing import Any

import tiktoken

from gpt2.data.bpe import byte_letters
from gpt2.data.tokenizer import END_OF_TEXT

LETTERS = byte_letters()


def vocabulary_of(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Return the id of each token, special ones too, in the order of the ids."""
    ids = {_written(token): encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    ids |= {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def merges_of(encoding: tiktoken.Encoding) -> list[tuple[str, str]]:
    """Return the pairs that make tokens of more than one byte, in the order in which they are merged.

    tiktoken keeps only the tokens' ranks. The last merge of a token is what those of lower rank leave of it.
    """
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((_written(parts[0]), _written(parts[1])))
    return merges


def tokenizer_json(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Return the encoding as the tokenizer.json of Hugging Face's tokenizers, which takes "<|endoftext|>" for special.

    Its ByteLevel splits words by GPT-2's pattern, as all encodings of this project do.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted((encoding.encode_single_token(token), token) for token in encoding.special_tokens_set)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token} | added for number, token in special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary_of(encoding),
            "merges": merges_of(encoding),
        },
    }


def tokenizer_config(max_len: int) -> dict[str, Any]:
    """Return transformers' tokenizer_config.json for it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
    }


def _written(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)
