"""Write text with a trained GPT-2, after one prompt or in an interactive session; or score a text under it."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

import argparse
import io
import sys
from pathlib import Path

import torch

from gpt2.config import ModelConfig, champion_uri
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import autocast, choose_device, choose_precision, use_threads
from gpt2.core.errors import UserError
from gpt2.core.fields import Device
from gpt2.core.paths import PARAMS
from gpt2.core.validation import check
from gpt2.data.tokenizer import Tokenizer
from gpt2.evaluation.scoring import score
from gpt2.generation.engine import Engine, GenerationSettings, Request, check_prompt
from gpt2.generation.linear import Quantization
from gpt2.generation.repl import BYTE_ORDER_MARK, TypedSettings, converse, inform, print_text
from gpt2.model.gpt2 import GPT2Model
from gpt2.tracking.named_models import NamedModel, load_named


class Options(TypedSettings):
    """What is set for the whole command."""

    device: Device = "auto"
    quantize: Quantization = "none"


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    arguments, options = parse_arguments()
    settings = GenerationSettings(**options.model_dump(exclude={"device", "quantize"}))
    device = choose_device_for(options.device, options.quantize)
    scored = None if arguments.score is None else read_text(arguments.score)

    if arguments.prompt is not None:
        check_prompt(arguments.prompt)
    named, tokenizer = load(arguments.model or champion_uri(PARAMS), device)
    request = None if arguments.prompt is None else Request(arguments.prompt, settings, tokenizer)
    if scored is not None:
        with autocast(device, choose_precision("auto", device)):
            print(score(named.model, tokenizer, scored, arguments.explain))
        return
    engine = Engine(named.model, 1, named.seen, options.quantize)
    if request is not None:
        print_text(engine, request)
    else:
        converse(engine, tokenizer, settings)


def parse_arguments() -> tuple[argparse.Namespace, Options]:
    defaults = Options()
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-p", "--prompt", help="the text to continue; without it an interactive session begins")
    add("-m", "--model", help="registry or run URI, path, or hf:NAME (default: params.yaml's champion)")
    add("-t", "--max_tokens", help=f"tokens to write at most (default: {defaults.max_tokens})")
    add("--temperature", help=f"0 takes the most likely token, 1 draws as trained (default: {defaults.temperature})")
    add("--top_k", help=f'draw from the k most likely tokens, or "none" (default: {defaults.top_k})')
    add("--top_p", help='draw from the most likely tokens that hold this probability, or "none" (default: none)')
    add("--min_p", help='draw from tokens at least this fraction as likely as the best, or "none" (default: none)')
    add("--repetition_penalty", help=f"above 1, tokens repeat less (default: {defaults.repetition_penalty})")
    add("--stop", help="the text ends before this one (default: none)")
    add("--seed", help="repeats a text (default: another one each time)")
    add("--device", help=f"auto, cpu, cuda, cuda:N or mps (default: {defaults.device})")
    add("--quantize", help=f"none, or bfloat16 or int8 for weights that are read faster (default: {defaults.quantize})")
    add("--score", metavar="FILE", help="print the perplexity and bits per byte of a text; - is standard input")
    add("--explain", action="store_true", help="with --score: show the most surprising tokens too")
    arguments = parser.parse_args()
    given = {name: text for name in Options.model_fields if (text := getattr(arguments, name)) is not None}
    options = check(Options, given, "settings")
    if arguments.explain and arguments.score is None:
        raise UserError("--explain needs --score FILE")
    if arguments.score is not None and (arguments.prompt is not None or given.keys() - {"device"}):
        raise UserError("--score writes no text: it goes with --model, --device and --explain alone")
    if sys.stdin is None and arguments.prompt is None and arguments.score in (None, "-"):
        raise UserError("standard input is closed; give --prompt or --score FILE")
    return arguments, options


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input if its name is "-", without a byte-order mark.

    Raises UserError if it is empty or not UTF-8.
    """
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        text = data.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(f"the text to score is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None
    if not text:
        raise UserError("the text to score is empty")
    return text


def choose_device_for(name: str, quantize: Quantization) -> torch.device:
    """Return the device called `name`; "auto" is the CPU for int8, which only the CPU has."""
    return choose_device("cpu" if quantize == "int8" and name == "auto" else name)


def load(name: str, device: torch.device) -> tuple[NamedModel, Tokenizer]:
    """Load what load_named finds, onto the device, and tell of it. Raises UserError."""
    use_threads("auto")
    named = load_named(name)
    tokenizer = named.tokenizer
    named.model.to(device)
    inform(f"{name}: {describe_model(named.model, named.config)} on {device}")
    return named, tokenizer


def describe_model(model: GPT2Model, config: ModelConfig) -> str:
    sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len")
    shape = ", ".join(f"{name} {getattr(config, name)}" for name in sizes)
    return f"GPT-2 with {model.count_parameters() / 1e6:.1f}M parameters ({shape})"


if __name__ == "__main__":
    run_command(main)
