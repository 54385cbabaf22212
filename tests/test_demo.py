"""demo.py: the tour shows what it should, in 80 columns, and each line of its checklist can fail."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import demo
from gpt2.config import SamplingParams
from gpt2.core.errors import UserError
from gpt2.data.tokenizer import VOCAB_SIZE
from gpt2.generation import engine
from gpt2.generation.engine import Engine
from gpt2.generation.sampling import draw
from gpt2.model.gpt2 import GPT2Model, MultiHeadAttention
from gpt2.tracking import registry

Demo = Callable[..., tuple[int, str, str]]

FETCH_MODEL = registry.fetch_model
SRC = Path(__file__).parents[1] / "src"
TINY = demo.SHAPE | {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_len": 16}


@pytest.fixture
def run_demo(model_folder: Path, run_main: Demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Demo:
    """Run demo.py with tiny models in an empty folder; return its exit code, output and errors."""
    small = {"SHAPE": TINY, "SMALL": TINY, "TRAINING_TOKENS": 600, "LEARNING_RATE": 0.02, "MAX_TOKENS": 4}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "use_threads", lambda _: 1)
    monkeypatch.setattr(registry, "fetch_model", lambda _: model_folder)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        demo.find_model.cache_clear()
        done: tuple[int, str, str] = run_main(demo.main, "--output", tmp_path / "pictures", *arguments)
        demo.find_model.cache_clear()
        return done

    return run


def test_tour_has_its_parts_in_order_and_repeats(run_demo: Demo, offline: None, tmp_path: Path) -> None:
    code, text, report = run_demo()
    assert (code, report) == (0, "")
    titles = re.findall(r"^(\w+).*\n=+$", text, re.MULTILINE)
    assert titles == ["Architecture", "Generation", "Training", "Attention", "Checklist"]
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("[ok]") == 14 and "FAILED" not in text
    assert (tmp_path / "pictures" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert run_demo()[1] == text


def test_only_shows_one_part(run_demo: Demo) -> None:
    for part in demo.PARTS:
        code, text, _ = run_demo("--only", part)
        assert code == 0 and re.findall(r"^(\w+).*\n=+$", text, re.MULTILINE) == [part.capitalize(), "Checklist"]
        assert re.findall(r"^\[(\w+)\]", text, re.MULTILINE) == ["ok"] * {"architecture": 7, "generation": 3}.get(
            part, 2
        )


def test_architecture_gives_sizes_shapes_and_parameters(run_demo: Demo) -> None:
    text = run_demo("--only", "architecture")[1]
    assert re.search(r"^vocab_size +50,257$", text, re.MULTILINE) and re.search(r"^d_ff +32$", text, re.MULTILINE)
    assert re.search(r"^model: GPT2Model +\(2, 16, 50257\) +1,61\d,", text, re.MULTILINE)
    assert re.search(r"^      feed_forward: PositionwiseFeedForward +\(2, 16, 16\) +1,072$", text, re.MULTILINE)


def test_original_model_has_the_parameters_that_are_counted_by_hand() -> None:
    assert demo.count_by_hand(demo.SHAPE) == 49_434_624


def test_texts_stand_side_by_side_below_their_settings(run_demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'word ' * 8}{number}" for number in range(9)]
    monkeypatch.setattr(Engine, "generate_all", lambda *_: texts)
    lines = run_demo("--only", "generation")[1].splitlines()
    assert lines[2].startswith("models:/gpt2@champion, 1,6")
    for i, prompt in enumerate(demo.PROMPTS):
        start = lines.index(f"{prompt} ...")
        assert lines[start + 1].split("  ") == [
            "temperature 0.7",
            *[""] * 5,
            "temperature 1.0",
            *[""] * 5,
            "temperature 0.5",
        ]
        assert lines[start + 2].split() == ["top_k", "40", "top_k", "none", "top_k", "10"]
        assert lines[start + 4] == "  ".join(["word word word word word "] * 3).rstrip()
        assert lines[start + 5].split() == [
            *["word"] * 3, str(3 * i), *["word"] * 3, str(3 * i + 1), *["word"] * 3, str(3 * i + 2)
        ]  # fmt: skip


def test_what_a_model_writes_does_not_reach_the_terminal_as_commands(
    run_demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "generate_all", lambda *_: ["\x1b[2J\ra\u202eb\x9b" + "界" * 30 + "\n\tend"] * 9)
    text = run_demo("--only", "generation")[1]
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "\\x1b[2J\\x0da\ufffdb\\x9b" in text and "界" not in text and "end" in text
    assert max(map(len, text.splitlines())) <= 80


def test_training_gives_the_average_of_each_epoch(run_demo: Demo) -> None:
    text = run_demo("--only", "training")[1]
    first, second = map(float, re.findall(r"^epoch \d: average loss ([\d.]+)$", text, re.MULTILINE))
    assert 7 < second < first < 11


def test_attention_shows_every_head_of_a_text(run_demo: Demo) -> None:
    text = run_demo("--only", "attention", "--text", "My fellow citizens\x1b")[1]
    assert text.count("head 0  head 1") == 2 and "layer 0\n" in text and "layer 1\n" in text
    assert re.search(r"^ +My +fellow +citizens +\\x1b$", text, re.MULTILINE)
    assert re.search(r"^ +My +100$", text, re.MULTILINE)
    assert "all heads as a picture: pictures/attention.png" in text


def test_without_a_registered_model_it_says_so(run_demo: Demo, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "fetch_model", FETCH_MODEL)
    code, text, report = run_demo("--only", "generation")
    assert (code, report) == (0, "") and list(store.iterdir()) == []
    assert text.splitlines()[2] == "no registered model yet: an untrained one of the same shape"
    assert text.count("[ok]") == 3


def test_another_problem_with_the_registered_model_is_an_error(run_demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> Path:
        raise UserError("the weights are not those that were registered")

    monkeypatch.setattr(registry, "fetch_model", fail)
    code, _, report = run_demo("--only", "attention")
    assert (code, report) == (2, "error: the weights are not those that were registered\n")


def edited(
    edit: Callable[[GPT2Model], object], untrained: Any = demo.untrained
) -> Callable[[dict[str, Any]], GPT2Model]:
    """Build models as the tour does, but with something wrong."""

    def build(shape: dict[str, Any]) -> GPT2Model:
        model: GPT2Model = untrained(shape)
        edit(model)
        return model

    return build


def change_heads(model: GPT2Model) -> None:
    attention: Any = model.transformer_blocks[1].attention
    attention.n_heads = 4


def see_the_future(model: GPT2Model) -> None:
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.scaled_dot_product_attention = lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v)


def draw_from_all(logits: Tensor, settings: SamplingParams, *rest: Any) -> int:
    return draw(logits, settings.model_copy(update={"top_k": None}), *rest)


BREAKS: list[tuple[str, str, Any, str, Any]] = [  # a claim, its part, and what becomes what so that it fails
    ("parameters:", "architecture", demo, "SHAPE", TINY | {"tie_weights": True}),
    ("attention: 2 heads", "architecture", demo, "untrained", edited(change_heads)),
    (
        "forward pass:",
        "architecture",
        demo,
        "untrained",
        edited(lambda model: model.layer_norm.weight.data.fill_(math.nan)),
    ),
    ("causal:", "architecture", demo, "untrained", edited(see_the_future)),
    (
        "positions:",
        "architecture",
        demo,
        "untrained",
        edited(lambda model: model.position_embedding.weight.data.zero_()),
    ),
    ("dropout:", "architecture", demo, "SHAPE", TINY | {"dropout": 0.0}),
    (
        "untrained:",
        "architecture",
        demo,
        "untrained",
        edited(lambda model: model.output_projection.weight.data.mul_(50)),
    ),
    ("generation:", "generation", engine, "draw", lambda *_: VOCAB_SIZE - 1),
    ("sampling:", "generation", engine, "draw", draw_from_all),
    ("seeds:", "generation", demo, "SEED", None),
    ("training: the average", "training", torch.optim, "AdamW", partial(torch.optim.AdamW, maximize=True)),
    ("training: every", "training", demo, "untrained", edited(lambda model: model.layer_norm.requires_grad_(False))),
    ("attention: every row", "attention", demo, "attention_weights", lambda *_: torch.eye(6).expand(2, 2, 6, 6) * 1.1),
    ("attention: no token", "attention", demo, "attention_weights", lambda *_: torch.full((2, 2, 6, 6), 1 / 6)),
]


@pytest.mark.parametrize(("claim", "part", "target", "name", "broken"), BREAKS, ids=[case[0] for case in BREAKS])
def test_a_check_that_fails_is_told(
    run_demo: Demo, monkeypatch: pytest.MonkeyPatch, claim: str, part: str, target: Any, name: str, broken: Any
) -> None:
    monkeypatch.setattr(target, name, broken)
    code, text, _ = run_demo("--only", part)
    failed = re.findall(r"^\[FAILED\] (.*)$", text, re.MULTILINE)
    assert code == 1 and failed[0].startswith(claim)
    assert len(failed) == 1 or claim == "forward pass:"  # not a number in all that follows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "argument --only: invalid choice: 'everything'"),
        (["--text", ""], "--text has 0 tokens; give 1 to 24"),
        (["--text", "a b " * 20], "--text has 41 tokens; give 1 to 24"),
    ],
)
def test_mistakes_are_one_line(run_demo: Demo, arguments: list[str], message: str) -> None:
    code, text, report = run_demo(*arguments)
    assert (code, text) == (2, "") and report.startswith(f"error: {message}") and len(report.splitlines()) == 1


def test_mlflow_is_imported_only_for_its_models() -> None:
    command = [sys.executable, "-c", "import sys, demo; sys.exit('mlflow' in sys.modules)"]
    assert subprocess.run(command, cwd=SRC, check=False).returncode == 0
