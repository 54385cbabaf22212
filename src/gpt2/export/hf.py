"""A model as a folder that transformers opens, with AutoModelForCausalLM and AutoTokenizer."""

from pathlib import Path

import tiktoken

from gpt2.config import ModelConfig
from gpt2.core.files import write_json, write_text
from gpt2.core.paths import TOKENIZER_FILE
from gpt2.data.tokenizer import write_tokenizer
from gpt2.export.tokenizer import tokenizer_config, tokenizer_json
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.huggingface import TOKENIZER, to_huggingface, to_huggingface_config
from gpt2.model.weights import CONFIG, WEIGHTS, save_tensors

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# A GPT-2 with {millions:.1f}M parameters

{origin} It is in the format of Hugging Face's `GPT2LMHeadModel`, in float32.

```python
from transformers import pipeline

write = pipeline("text-generation", "path/to/this/folder")
print(write("The state of the union", max_new_tokens=20)[0]["generated_text"])
```

| | |
| --- | --- |
{rows}

It continues texts like those that it was trained on. It has been taught neither to answer questions nor to be right,
and what is biased or wrong in those texts may come back. It sees {config.max_len} tokens at most.
"""


def write(model: GPT2Model, config: ModelConfig, encoding: tiktoken.Encoding, origin: str, path: Path) -> None:
    """Make the folder `path`. Raises OSError."""
    path.mkdir()
    weights = {name: weight.contiguous() for name, weight in to_huggingface(model)}
    save_tensors(weights, path / WEIGHTS, {"format": "pt"})
    write_json(path / CONFIG, to_huggingface_config(config, encoding.eot_token))
    write_json(path / TOKENIZER, tokenizer_json(encoding))
    if encoding.name != "gpt2":  # also as this project reads it
        write_tokenizer(sorted(encoding.token_byte_values(), key=encoding.encode_single_token), path / TOKENIZER_FILE)
    write_json(path / "tokenizer_config.json", tokenizer_config(config.max_len))
    rows = "\n".join(f"| {name} | {value} |" for name, value in config)
    card = CARD.format(millions=model.count_parameters() / 1e6, origin=origin, rows=rows, config=config)
    write_text(path / "README.md", card)
