"""lm-evaluation-harness measures an exported model as evaluate does."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gpt2.config import ModelConfig
from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.evaluation.perplexity import mean_loss
from gpt2.export.hf import write
from gpt2.model.gpt2 import GPT2Model

HARNESS = Path(__file__).parents[1] / "benchmarks" / "harness"
TEXTS = ["The state of the Union is “naïve” 🦊.\r\n" * 3, "a", "My fellow citizens, the war is over.\n\nNo.  "]


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """The texts as JSON lines, out of a token file."""
    encoded = [gpt2_tokenizer().encode_document(text) for text in TEXTS]
    np.concatenate(encoded).tofile(tmp_path / "test.bin")
    command = [sys.executable, str(HARNESS / "documents.py"), str(tmp_path / "test.bin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_documents_are_the_texts(documents: str) -> None:
    assert [json.loads(line)["text"] for line in documents.splitlines()] == TEXTS


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, which brings many packages, is not installed")
def test_bits_per_byte_are_those_of_evaluate(
    documents: str,
    tmp_path: Path,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> None:
    model = make_model(random=True, vocab_size=VOCAB_SIZE)
    write(model, make_config(vocab_size=VOCAB_SIZE), gpt2_tokenizer().encoding, "", tmp_path / "hf")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "test_split.jsonl").write_text(documents)
    # In a process of its own: src/evaluate.py would be taken for a package that lm-eval imports.
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=hf,dtype=float32"]
    task = ["--include_path", str(HARNESS), "--tasks", "gpt2_test_split"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    options = ["--device", "cpu", "--output_path", "out.json"]
    subprocess.run(command + task + options, cwd=tmp_path, env=environment, check=True)
    (found,) = tmp_path.glob("out*.json")
    measured = json.loads(found.read_text())["results"]["gpt2_test_split"]["bits_per_byte,none"]
    nats = 0.0
    for text in TEXTS:
        tokens = gpt2_tokenizer().encode_document(text)[:-1]
        nats += mean_loss(model, tokens, stride=model.max_len, batch_size=1) * len(tokens)
    assert measured == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-5)
