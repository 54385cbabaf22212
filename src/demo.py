"""A guided tour of this GPT-2: architecture, generation, training, attention; then a checklist of what has just run."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

import argparse
import io
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gpt2.config import champion_uri
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import use_threads
from gpt2.core.errors import NoModelError, UserError
from gpt2.core.files import atomic_write
from gpt2.core.paths import PARAMS, main_root
from gpt2.data.batches import SeenMask, TrainingBatches
from gpt2.data.corpus import read_sotu
from gpt2.data.tokenizer import VOCAB_SIZE, Tokenizer, gpt2_tokenizer
from gpt2.evaluation.attention_weights import attention_weights
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.model.gpt2 import GPT2Model, MultiHeadAttention
from gpt2.report.attention import draw_heads, token_labels
from gpt2.report.figures import png, same_style
from gpt2.report.terminal import (
    COLUMN,
    WIDTH,
    output_shapes,
    print_columns,
    print_modules,
    terminal_map,
    terminal_maps,
)
from gpt2.tracking.named_models import load_named

SEED = 1234
PARTS = ("architecture", "generation", "training", "attention")

# The original project's model, and a smaller one that learns something in seconds.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "d_ff": 1536,
    "max_len": 512,
    "dropout": 0.1,
}
SMALL = SHAPE | {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 256, "max_len": 64}

PROMPTS = (
    "The future of artificial intelligence",
    "In a world where technology",
    "Machine learning has revolutionized",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_k": None},
    {"temperature": 0.5, "top_k": 10},
)
MAX_TOKENS = 30

TRAINING_TOKENS, BATCH_SIZE, EPOCHS = 8_192, 8, 2
LEARNING_RATE = 0.002

SENTENCE = "The cat sat on the mat"
MOST_TOKENS = 24  # of a sentence whose attention is shown


class Check(NamedTuple):
    """What the tour has tried, and whether it was so."""

    claim: str
    holds: bool


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    arguments = parse_arguments()
    use_threads("auto")
    parts: dict[str, Callable[[], list[Check]]] = {
        "architecture": architecture,
        "generation": generation,
        "training": training,
        "attention": partial(attention, arguments.text, arguments.output),
    }
    checks = []
    for name in [arguments.only] if arguments.only else PARTS:
        print(f"{name.capitalize()}\n{'=' * len(name)}")
        checks += parts[name]()
        print(flush=True)
    print("Checklist, each line tried just now\n===================================")
    for claim, holds in checks:
        print(f"{'[ok]    ' if holds else '[FAILED]'} {claim}")
    if not all(check.holds for check in checks):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--only", choices=PARTS, help="show one part (default: all)")
    add("--text", default=SENTENCE, help="the sentence whose attention is shown (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=main_root() / ".cache" / "demo",
        help="folder of the picture (default: .cache/demo)",
    )
    arguments = parser.parse_args()
    if not 1 <= (count := len(gpt2_tokenizer().encode(arguments.text))) <= MOST_TOKENS:
        raise UserError(f"--text has {count} tokens; give 1 to {MOST_TOKENS}")
    return arguments


def architecture() -> list[Check]:
    """Show the modules of the original project's model, with the shapes that a forward pass gives."""
    model = untrained(SHAPE)
    for name, value in SHAPE.items():
        print(f"{name:12}{value:>8,}")
    tokens = torch.randint(SHAPE["vocab_size"], (2, 16))
    print(f"\n{'module':44}{'output':16}{'parameters':>12}")
    print_modules(model, output_shapes(model, tokens))

    with torch.no_grad():
        logits, loss = model(tokens), model(tokens[:, :-1], tokens[:, 1:]).item()
        changed = tokens.clone()
        changed[:, 8] = (changed[:, 8] + 1) % SHAPE["vocab_size"]
        difference = (model(changed) - logits).abs().amax((0, 2))  # (T,)
        repeated = model(tokens[:1, :1].expand(1, 16))[0]
        with_dropout = model.train()(tokens)
        without = model.eval()(tokens)
    print(f"\nA forward pass of token ids {tuple(tokens.shape)} gives logits {tuple(logits.shape)}: one for each")
    print(f"token that may come next. Loss {loss:.2f}, as of a guess among {math.exp(loss):,.0f} tokens.")
    counted, expected = model.count_parameters(), count_by_hand(SHAPE)
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    return [
        Check(f"parameters: {counted:,}, as counted by hand", counted == expected),
        Check(
            f"attention: {SHAPE['n_heads']} heads in each of {SHAPE['n_layers']} layers",
            [attention.n_heads for attention in attentions] == [SHAPE["n_heads"]] * SHAPE["n_layers"],
        ),
        Check(
            f"forward pass: {SHAPE['vocab_size']:,} finite logits at each position",
            logits.shape == (*tokens.shape, SHAPE["vocab_size"]) and bool(logits.isfinite().all()),
        ),
        Check(
            "causal: a changed token leaves all earlier logits as they were",
            bool((difference[:8] < 1e-5).all() and (difference[8:] > 1e-5).all()),
        ),
        Check(
            "positions: a token that is repeated has other logits at each place",
            bool(((repeated[1:] - repeated[:-1]).abs().amax(-1) > 1e-5).all()),
        ),
        Check(
            "dropout: at work in training, off otherwise",
            torch.equal(without, logits) and not torch.allclose(with_dropout, logits),
        ),
        Check(
            f"untrained: the loss is near ln {SHAPE['vocab_size']:,} = {math.log(SHAPE['vocab_size']):.2f}",
            abs(loss - math.log(SHAPE["vocab_size"])) < 0.3,
        ),
    ]


def generation() -> list[Check]:
    """Continue each prompt under each setting, and show the texts of a prompt side by side."""
    model, tokenizer, seen, _ = find_model()
    engine = Engine(model, MAX_SLOTS, seen)

    def write() -> tuple[list[Request], list[str]]:
        settings = [GenerationSettings(**setting, max_tokens=MAX_TOKENS, seed=SEED) for setting in SETTINGS]
        requests = [Request(prompt, setting, tokenizer) for prompt in PROMPTS for setting in settings]
        return requests, engine.generate_all(requests)

    requests, texts = write()
    for i, prompt in enumerate(PROMPTS):
        print(f"\n{prompt} ...")
        for name in SETTINGS[0]:
            print_columns([f"{name} {setting[name] or 'none'}" for setting in SETTINGS])
        print_columns(["-" * COLUMN] * len(SETTINGS))
        print_columns(texts[i * len(SETTINGS) : (i + 1) * len(SETTINGS)])
    return [
        Check("generation: each prompt is continued under each setting", all(one.generated for one in requests)),
        Check(
            "sampling: each token is one of the top_k most likely", all(keeps_to_top_k(model, one) for one in requests)
        ),
        Check("seeds: the same seed gives the same text", write()[1] == texts),
    ]


def training() -> list[Check]:
    """Train a small model for two epochs on the beginning of the corpus."""
    ids = (token for part in read_sotu() for text in part.read() for token in gpt2_tokenizer().encode(text))
    tokens = np.fromiter(islice(ids, TRAINING_TOKENS), dtype=np.uint16)
    model = untrained(SMALL).train()
    batches = TrainingBatches(tokens, BATCH_SIZE, SMALL["max_len"], SEED)
    steps = batches.windows // BATCH_SIZE
    print(f"{model.count_parameters():,} parameters learn {len(tokens):,} tokens of the State of the Union addresses")

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    averages: list[float] = []
    for epoch in range(EPOCHS):
        losses = []
        bar = tqdm(range(steps), f"epoch {epoch + 1} of {EPOCHS}", unit="step", ncols=WIDTH - 1, disable=None)
        for step in bar:
            loss = model(*batches(epoch * steps + step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
        averages.append(fmean(losses))
        print(f"epoch {epoch + 1}: average loss {averages[-1]:.3f}", flush=True)
    return [
        Check("training: the average loss fell from epoch to epoch", all(b < a for a, b in pairwise(averages))),
        Check(
            "training: every weight matrix, bias and norm has a gradient",
            all(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters()),
        ),
    ]


def attention(text: str, folder: Path) -> list[Check]:
    """Show how much each token of a text looks at those before it, in each layer and head."""
    model, tokenizer, _, name = find_model()
    tokens = tokenizer.encode(text)[: min(model.max_len, MOST_TOKENS)]
    weights = attention_weights(model, torch.tensor(tokens))  # (L, H, T, T)
    labels = token_labels([tokenizer.decode([token]) for token in tokens])
    layers, heads = weights.shape[:2]
    print(
        "A row is a token; its columns are the tokens from the first to itself. A digit\n"
        "is the tenths of its attention that go there (9: 0.9 to 1, a dot: below 0.1)."
    )
    for layer in range(layers):
        print(f"\nlayer {layer}\n{terminal_maps(weights[layer], labels, [f'head {head}' for head in range(heads)])}")
    sharpest = int(weights.amax(-1).mean(-1).argmax())
    layer, head = divmod(sharpest, heads)
    print(f"\nlayer {layer}, head {head}, the most decided one, in percent")
    print(terminal_map(weights[layer, head], labels))
    path = folder / "attention.png"
    with same_style(), atomic_write(path) as partial_path:
        figure = draw_heads(weights, labels, [(layer, head) for layer in range(layers) for head in range(heads)])
        figure.suptitle(f"Attention of {name}, all layers and heads", fontsize=11)
        partial_path.write_bytes(png(figure))
    print(f"\nall heads as a picture: {min(str(path), os.path.relpath(path), key=len)}")
    return [
        Check("attention: every row of weights sums to 1", bool(((weights.sum(-1) - 1).abs() < 1e-5).all())),
        Check("attention: no token looks at a later one", not weights.triu(1).any()),
    ]


@cache
def find_model() -> tuple[GPT2Model, Tokenizer, SeenMask | None, str]:
    """Return the champion, or an untrained model, its tokenizer, which tokens it has seen, and its name."""
    uri = champion_uri(PARAMS)
    try:
        named = load_named(uri)
    except NoModelError:
        print("no registered model yet: an untrained one of the same shape")
        return untrained(SHAPE), gpt2_tokenizer(), None, "an untrained model"
    print(f"{uri}, {named.model.count_parameters():,} parameters")
    return named.model, named.tokenizer, named.seen, uri


def untrained(shape: dict[str, Any]) -> GPT2Model:
    torch.manual_seed(SEED)
    return GPT2Model(**shape).eval()


def count_by_hand(shape: dict[str, Any]) -> int:
    """Return the number of weights and biases of a model without query, key and value biases or tied weights."""
    c, f = shape["d_model"], shape["d_ff"]
    norm = 2 * c
    block = (4 * c * c + c) + (c * f + f) + (f * c + c) + 2 * norm
    embeddings = shape["vocab_size"] * c + shape["max_len"] * c
    return embeddings + shape["n_layers"] * block + norm + c * shape["vocab_size"]


@torch.no_grad()
def keeps_to_top_k(model: GPT2Model, request: Request) -> bool:
    """Whether each generated token was one of the top_k most likely, by a forward pass of the whole text."""
    top_k, prompt = request.settings.top_k, len(request.tokens) - request.generated
    tokens = torch.tensor(request.tokens[: model.max_len])
    if top_k is None:
        return True
    logits = model(tokens[None, :-1])[0, prompt - 1 :]  # of the generated tokens
    drawn = logits.gather(1, tokens[prompt:, None])[:, 0]
    return bool((drawn >= logits.topk(top_k).values[:, -1] - 1e-3).all())  # the cache rounds a little differently


if __name__ == "__main__":
    run_command(main)
