import pytest
import torch

from gpt2.core.device import choose_precision

HAS_BFLOAT16 = choose_precision("auto", torch.device("cpu")) == torch.bfloat16
ROUNDED = [
    "int8",
    pytest.param("bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no native bfloat16 here")),
]
