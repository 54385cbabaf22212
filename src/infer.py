"""Write text with a trained GPT-2, after one prompt or in an interactive session; or score a text under it."""

import argparse
import io
import os
import sys
from pathlib import Path

import numpy as np

from gpt2.config import Device, ModelConfig, champion_uri
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import autocast, choose_device, choose_precision, keep_freed_memory
from gpt2.core.environment import MLFLOW_DEFAULTS
from gpt2.core.errors import UserError
from gpt2.core.paths import PARAMS
from gpt2.data import tokenizer
from gpt2.evaluation.perplexity import format_summary, predict, summarize, token_losses
from gpt2.generation.decoder import Quantization
from gpt2.generation.engine import GenerationSettings, Text, Writer
from gpt2.generation.repl import change, converse, inform, print_text
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model

SCORE_BATCH = 8  # windows
EXPLAINED, CONTEXT_CHARACTERS, TOKEN_CHARACTERS = 10, 32, 18


class Options(GenerationSettings):
    """What is set for the whole command."""

    device: Device = "auto"
    quantize: Quantization = "none"


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    arguments = parse_arguments()
    given = {name: text for name in Options.model_fields if (text := getattr(arguments, name)) is not None}
    options = change(Options(), given)
    settings = GenerationSettings(**options.model_dump(exclude={"device", "quantize"}))
    int8_device = "cpu" if options.device == "auto" else options.device  # the only one that has it
    device = choose_device(int8_device if options.quantize == "int8" else options.device)
    text = None if arguments.prompt is None else Text(arguments.prompt, settings)
    scored = None
    if arguments.score is not None:
        if unused := [f"--{name}" for name in [*given, *(["prompt"] if text else [])] if name != "device"]:
            raise UserError(f"--score writes no text: leave out {', '.join(unused)}")
        scored = read_text(arguments.score)
    elif arguments.explain:
        raise UserError("--explain needs --score FILE")

    name = arguments.model or champion_uri(PARAMS)
    model, config = load_model(find_model(name))
    if config.vocab_size != tokenizer.VOCAB_SIZE:
        raise UserError(f"{name} has a vocabulary of {config.vocab_size}, not GPT-2's {tokenizer.VOCAB_SIZE}")
    model.to(device)
    inform(describe_model(model, config, name, str(device)))
    if scored is not None:
        with autocast(device, choose_precision("auto", device)):
            score(model, scored, arguments.explain)
        return
    writer = Writer(model, 1, options.quantize)
    if text is not None:
        print_text(writer, text)
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
        help="registry or run URI, model folder, .safetensors file or .pt checkpoint of the original project "
        "(default: the champion that params.yaml names)",
    )
    add("-t", "--max_tokens", help=f"tokens to write at most (default: {defaults.max_tokens})")
    add("--temperature", help=f"0 takes the likeliest token, 1 draws as trained (default: {defaults.temperature})")
    add("--top_k", help=f'draw from the k likeliest tokens, or "none" (default: {defaults.top_k})')
    add("--top_p", help='draw from the likeliest tokens that hold this probability, or "none" (default: none)')
    add("--min_p", help='draw from tokens at least this part as likely as the likeliest, or "none" (default: none)')
    add(
        "--repetition_penalty", help=f"above 1 makes what is there less likely (default: {defaults.repetition_penalty})"
    )
    add("--stop", help="the text ends before this one (default: none)")
    add("--seed", help="repeats a text (default: another one each time)")
    add("--device", help=f"auto, cpu, cuda, cuda:N or mps (default: {defaults.device})")
    add("--quantize", help=f"none, or int8 for weights that are read faster (default: {defaults.quantize})")
    add(
        "--score",
        metavar="FILE",
        help='print the perplexity and bits per byte of a text file, or of "-", standard input',
    )
    add("--explain", action="store_true", help="with --score: show the most surprising tokens too")
    return parser.parse_args()


def find_model(name: str) -> Path:
    """Return the path of a model given as a path or as an MLflow URI."""
    if name.startswith(("models:", "runs:")):
        os.environ.update(MLFLOW_DEFAULTS | os.environ)
        from gpt2.tracking.registry import fetch_model  # MLflow takes as long to import as PyTorch

        return fetch_model(name)
    return Path(name)


def describe_model(model: GPT2Model, config: ModelConfig, name: str, device: str) -> str:
    shape = ", ".join(
        f"{key} {getattr(config, key)}" for key in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len")
    )
    return f"{name}: GPT-2 with {model.count_parameters() / 1e6:.1f}M parameters ({shape}) on {device}"


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input if its name is "-". Raises UserError."""
    shown = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode()
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8 text") from None
    if not text:
        raise UserError(f"{shown} is empty")
    return text


def score(model: GPT2Model, text: str, explain: bool) -> None:
    """Print how well the model foretells a text, which ends with <|endoftext|> as the corpus's documents do.

    Raises UserError if it gives losses that are not finite.
    """
    keep_freed_memory()
    stride = max(1, model.max_len // 2)
    tokens = np.array([*tokenizer.encode(text), tokenizer.END_OF_TEXT_ID], dtype=np.uint16)
    losses = token_losses(model, tokens, stride, SCORE_BATCH)
    summary = summarize(losses, len(text.encode()))
    print(f"{format_summary(summary)}, {summary['tokens']:,} tokens, {summary['bytes']:,} bytes")
    if not explain:
        return
    print(f"\n{'loss':>6}  {'text before':>{CONTEXT_CHARACTERS + 2}}  {'token':{TOKEN_CHARACTERS}}  likeliest")
    for index in losses.topk(min(EXPLAINED, len(losses))).indices.tolist():
        before = tokenizer.decode(tokens[max(0, index - CONTEXT_CHARACTERS) : index].tolist())[-CONTEXT_CHARACTERS:]
        probability, likeliest = predict(model, tokens, index, stride).softmax(-1).max(-1)
        token, other = show_token(int(tokens[index])), show_token(int(likeliest))
        print(
            f"{losses[index]:6.2f}  {before!r:>{CONTEXT_CHARACTERS + 2}}  {token:{TOKEN_CHARACTERS}}  "
            f"{other} {probability:.1%}"
        )


def show_token(token: int) -> str:
    """Return a token's text in quotes, or its bytes if they are not whole characters."""
    data = tokenizer.load_tokenizer().decode_single_token_bytes(token)
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


if __name__ == "__main__":
    run_command(main)
