import pytest
import torch

from gpt2.core.device import choose_precision
from gpt2.generation.decoder import Decoder

HAS_BFLOAT16 = choose_precision("auto", torch.device("cpu")) == torch.bfloat16
ROUNDED = [
    "int8",
    pytest.param("bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no native bfloat16 here")),
]


def logits_after(decoder: Decoder, texts: dict[int, list[int]], start: int = 0) -> torch.Tensor:
    """Let the decoder read token ids, by slot; return the logits after the last of each (R, V)."""
    return decoder.logits(decoder.prefill(texts, start)[range(len(texts)), [len(text) - 1 for text in texts.values()]])
