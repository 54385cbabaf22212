"""Print the documents of a token file as JSON lines, for the task gpt2_test_split of lm-evaluation-harness.

python tests/benchmarks/harness/documents.py data/tokens/test.bin > .cache/test_split.jsonl
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

from gpt2.data.batches import load_tokens
from gpt2.data.tokenizer import load_tokenizer

path = Path(sys.argv[1])
tokens, tokenizer = load_tokens(path)[:], load_tokenizer(path)
ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
for start, end in zip([0, *(ends + 1)], ends, strict=False):
    print(json.dumps({"text": tokenizer.decode(tokens[start:end].tolist())}))
