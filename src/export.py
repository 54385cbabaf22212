"""Write a trained GPT-2 for other programs: as a Hugging Face folder, a GGUF file or an ONNX file."""

import argparse
import importlib
import tomllib
from pathlib import Path

from gpt2.config import champion_uri
from gpt2.core.cli import Parser, run_command
from gpt2.core.errors import UserError
from gpt2.core.files import atomic_write
from gpt2.core.paths import PARAMS, ROOT
from gpt2.tracking.named_models import load_named

FORMATS = ("hf", "gguf", "onnx")  # each written by the module of that name in gpt2/export


def main() -> None:
    arguments = parse_arguments()
    target: Path = arguments.path
    if target.exists():
        raise UserError(f"{target} exists; delete it, or take another name")
    try:
        module = importlib.import_module(f"gpt2.export.{arguments.to}")
    except ModuleNotFoundError as error:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        pins = " ".join(project["optional-dependencies"]["export"])
        raise UserError(f"--to {arguments.to} needs {error.name}: run `pip install {pins}`") from None
    name = arguments.model or champion_uri(PARAMS)
    named = load_named(name)
    origin = f"Made from `{name}`, weights with SHA-256 {named.sha256}."
    with atomic_write(target) as partial:
        module.write(named.model, named.config, named.tokenizer.encoding, origin, partial)
    print(f"{target} has {name}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("path", type=Path, help="the folder (hf) or the file to write")
    add("--to", choices=FORMATS, required=True, help="hf for transformers, gguf for llama.cpp, onnx for ONNX Runtime")
    add("-m", "--model", help="registry or run URI, path, or hf:NAME (default: params.yaml's champion)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
