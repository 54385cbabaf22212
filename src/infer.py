"""Write text with a trained GPT-2: after one prompt, or in an interactive session."""

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gpt2 import tokenizer
from gpt2.cli import Parser, UserError, fail, run_command
from gpt2.config import Device, ModelConfig, check
from gpt2.decoding import Quantization
from gpt2.generation import GenerationSettings, Text, Writer
from gpt2.model import GPT2Model
from gpt2.runtime import choose_device
from gpt2.weights import load_model

AnySettings = TypeVar("AnySettings", bound=GenerationSettings)

DEFAULT_MODEL = "models:/gpt2@champion"
HELP = """\
Type a prompt, or one of:
  set NAME VALUE   change a setting, e.g. set temperature 1.2, set top_k none, set max_tokens 100, set seed 7
  settings         show the settings
  help             show this text
  quit             leave (so does Ctrl-D); Ctrl-C stops a text"""


class Options(GenerationSettings):
    """What is set for the whole command."""

    device: Device = "auto"
    quantize: Quantization = "none"


def main() -> None:
    arguments = parse_arguments()
    given = {name: getattr(arguments, name) for name in Options.model_fields}
    options = change(Options(), {name: text for name, text in given.items() if text is not None})
    settings = GenerationSettings(**options.model_dump(exclude={"device", "quantize"}))
    device = choose_device(options.device)
    text = None if arguments.prompt is None else Text(arguments.prompt, settings)

    model, config = load_model(find_model(arguments.model))
    if config.vocab_size != tokenizer.VOCAB_SIZE:
        raise UserError(
            f"{arguments.model} has a vocabulary of {config.vocab_size}, not GPT-2's {tokenizer.VOCAB_SIZE}"
        )
    model.to(device)
    inform(describe(model, config, arguments.model, str(device)))
    writer = Writer(model, 1, options.quantize)
    if text is not None:
        write_text(writer, text)
    else:
        converse(writer, settings)


def parse_arguments() -> argparse.Namespace:
    defaults = Options()
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-p", "--prompt", help="the text to continue; without it an interactive session begins")
    add(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        help="registry or run URI, model folder, .safetensors file or .pt checkpoint of the original project "
        "(default: %(default)s)",
    )
    add("-t", "--max_tokens", help=f"tokens to write at most (default: {defaults.max_tokens})")
    add("--temperature", help=f"0 takes the likeliest token, 1 draws as trained (default: {defaults.temperature})")
    add("--top_k", help=f'draw from the k likeliest tokens, or "none" (default: {defaults.top_k})')
    add("--top_p", help='draw from the likeliest tokens that hold this probability, or "none" (default: none)')
    add("--min_p", help='draw from tokens this part as likely as the likeliest, or "none" (default: none)')
    add(
        "--repetition_penalty", help=f"above 1 makes what is there less likely (default: {defaults.repetition_penalty})"
    )
    add("--stop", help="the text ends before this one (default: none)")
    add("--seed", help="repeats a text (default: another one each time)")
    add("--device", help=f"auto, cpu, cuda or mps (default: {defaults.device})")
    add("--quantize", help=f"none, or int8 for weights that are read faster (default: {defaults.quantize})")
    return parser.parse_args()


def change(settings: AnySettings, texts: dict[str, str]) -> AnySettings:
    """Return settings with some replaced by what a user typed. Raises UserError that names all that is wrong."""
    values: dict[str, Any] = settings.model_dump()
    for name, text in texts.items():
        try:
            values[name] = None if text.lower() in ("none", "off") else yaml.safe_load(text)
        except Exception:  # YAML's tags and depths make PyYAML fail in ways of their own
            values[name] = text
    return check(type(settings), values, "settings")


def find_model(name: str) -> Path:
    """Return the path of a model given as a path or as an MLflow URI."""
    if name.startswith(("models:/", "runs:/")):
        from gpt2.registry import fetch_model  # MLflow takes as long to import as PyTorch

        return fetch_model(name)
    return Path(name)


def describe(model: GPT2Model, config: ModelConfig, name: str, device: str) -> str:
    shape = ", ".join(
        f"{key} {getattr(config, key)}" for key in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len")
    )
    return f"{name}: GPT-2 with {model.count_parameters() / 1e6:.1f}M parameters ({shape}) on {device}"


def write_text(writer: Writer, text: Text) -> None:
    """Print the prompt and, token by token, what follows it; then the seed, time and speed on standard error."""
    if (cut := len(text.tokens) - writer.max_len) > 0:
        inform(f"the prompt has {len(text.tokens)} tokens; the first {cut} are cut, beyond its context")
    started = time.perf_counter()
    print(text.prompt, end="", flush=True)
    try:
        for _, part in writer.write(deque([text])):
            print(part, end="", flush=True)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - started
    inform(f"{text.written} tokens in {seconds:.2f} s, {text.written / seconds:.1f} tokens/s, seed {text.seed}")


def converse(writer: Writer, settings: GenerationSettings) -> None:
    """Read prompts and commands from standard input until it ends or the user quits."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() line editing and a history

    inform(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        match line.split(maxsplit=2):
            case []:
                continue
            case ["quit" | "exit"]:
                return
            case ["help"]:
                inform(HELP)
            case ["settings"]:
                inform(show(settings))
            case ["set", *rest]:
                settings = set_one(settings, rest)
            case _:
                try:
                    write_text(writer, Text(line, settings))
                except UserError as error:
                    fail(error)
                except KeyboardInterrupt:
                    continue


def set_one(settings: GenerationSettings, words: list[str]) -> GenerationSettings:
    """Return the settings after the words of a `set` command, which are reported and change nothing if wrong."""
    try:
        if len(words) != 2:
            raise UserError("give a name and a value, e.g. set temperature 1.2")
        settings = change(settings, {words[0]: words[1]})
    except UserError as error:
        fail(error)
    else:
        inform(show(settings))
    return settings


def show(settings: GenerationSettings) -> str:
    values = settings.model_dump().items()
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in values)


def inform(message: str) -> None:
    """Print to standard error what is not generated text."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
