"""Stage prepare: the corpus becomes token files in data/tokens."""

from gpt2.config import load_params
from gpt2.core.cli import run_command
from gpt2.core.files import replacing
from gpt2.core.paths import PARAMS, TOKENS, main_root
from gpt2.data.corpus import read_corpus
from gpt2.data.token_files import write_token_files


def main() -> None:
    params = load_params(PARAMS).prepare
    documents = read_corpus(params.source, main_root())
    with replacing(TOKENS) as folder:
        folder.mkdir()
        meta = write_token_files(documents, folder, params.source, params.val_fraction, params.test_fraction)
    for name, split in meta["splits"].items():
        print(f"{name:5} {split['documents']:8,} documents {split['bytes']:13,} bytes {split['tokens']:12,} tokens")


if __name__ == "__main__":
    run_command(main)
