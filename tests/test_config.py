import contextlib
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from dvc.utils.hydra import apply_overrides
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import ModelConfig, Params, champion_uri, load_params
from gpt2.core.cli import fail
from gpt2.core.errors import UserError
from gpt2.core.validation import check
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import shapes_only

ErrorLine = Callable[[Callable[[], object]], str]
MISSING = object()


def changed(params: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    *parents, last = name.split(".")
    section = params
    for parent in parents:
        section = section[parent]
    if value is MISSING:
        del section[last]
    else:
        section[last] = value
    return params


@pytest.fixture
def problem(shipped: dict[str, Any], error_line: ErrorLine, tmp_path: Path) -> Callable[..., str]:
    """Write the shipped params.yaml with changes; return the error line that loading it ends in."""

    def load(**changes: Any) -> str:
        for name, value in changes.items():
            changed(shipped, name.replace("__", "."), value)
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(shipped), encoding="utf-8")
        return error_line(lambda: load_params(path))

    return load


def load_text(folder: Path, text: str | bytes) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_params(path)


def test_the_shipped_file_loads(shipped: dict[str, Any], shipped_text: str, tmp_path: Path) -> None:
    params = load_text(tmp_path, shipped_text)
    assert params.model_dump(by_alias=True, exclude_unset=True) | {"sweep": shipped["sweep"]} == shipped


def test_loaded_params_cannot_change(shipped: dict[str, Any]) -> None:
    params = check(Params, shipped, "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.train.seed = 5


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("train.learning_rat", "train.learning_rate"), ("model.d_modle", "model.d_model"), ("trian", "train")],
)
def test_unknown_name_is_answered_with_the_nearest(problem: Callable[..., str], name: str, nearest: str) -> None:
    assert f"{name} is unknown (did you mean {nearest}?)" in problem(**{name: 1})


def test_unknown_name_gets_no_far_fetched_guess(problem: Callable[..., str]) -> None:
    line = problem(zzzzzz=1, sample__settings=[{"temperature": 1, "top_kk": 5}])
    assert line.endswith("; zzzzzz is unknown\n")
    assert "sample.settings.0.top_kk is unknown (did you mean sample.settings.top_k?)" in line


def test_settings_of_several_processes_agree(problem: Callable[..., str]) -> None:
    assert "train: nproc_per_node 2 needs launcher torchrun" in problem(train__nproc_per_node=2)
    assert "train: batch_size 8 is not a multiple of nproc_per_node 3" in problem(
        train__nproc_per_node=3, train__launcher="torchrun"
    )
    assert "runtime.device cuda:1 is for one process" in problem(runtime__device="cuda:1", train__nproc_per_node=2)
    assert "train: parallel fsdp needs initialization random" in problem(
        train__nproc_per_node=1, train__parallel="fsdp"
    )


def test_all_problems_are_reported_at_once(problem: Callable[..., str]) -> None:
    line = problem(train__log_checkpoints=30, model__n_heads=5, prepare__source=MISSING, evaluate__strid=3)
    for told in (
        "train: log_checkpoints 30 is not a multiple of eval_interval 20",
        "model: d_model 384 is not a multiple of n_heads 5",
        "prepare.source is missing",
        "evaluate.strid is unknown",
    ):
        assert told in line


def test_all_conflicts_between_sections_are_reported_at_once(problem: Callable[..., str]) -> None:
    line = problem(train__sequence_length=513, evaluate__stride=1024, model__tie_weights=True)
    for told in (
        "train.sequence_length 513 is more than model.max_len 512",
        "evaluate.stride 1024 is more than model.max_len 512",
        "train.initialization bigrams needs model.tie_weights false",
    ):
        assert told in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.max_steps", "ten"),
        ("train.max_steps", 1.5),
        ("train.max_steps", True),
        ("train.max_steps", None),
        ("train.max_steps", 0),
        ("train.max_steps", -3),
        ("train.max_steps", 2**31),
        ("train.seed", -1),
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.learning_rate", "1e999"),
        ("train.learning_rate", 0),
        ("train.learning_rate", -0.1),
        ("train.learning_rate", True),
        ("train.learning_rate", "fast"),
        ("train.optimizer", "sgd"),
        ("runtime.device", "gpu"),
        ("runtime.device", "cpu\n"),
        ("runtime.precision", 16),
        ("train.decay_fraction", 1.1),
        ("train.grad_clip", 0),
        ("runtime.threads", 0),
        ("runtime.threads", "all"),
        ("runtime.threads", True),
        ("train", None),
        ("train", [1, 2]),
        ("train.checkpoint_interval", 0),
        ("train.keep", "first"),
        ("train.patience", 0),
        ("train.warmup_steps", 2**31),
        ("train.compile", "yes"),
        ("train.compile", 1),
        ("train.fused", "auto"),
        ("train.batch_size", 2**20 + 1),
        ("train.micro_batch_size", "many"),
        ("train.micro_batch_size", 0),
        ("train.micro_batch_size", 2**20 + 1),
        ("train.micro_batch_size", 1.5),
        ("train.micro_batch_size", True),
        *[("train.init_from", name) for name in ("", "gpt2", "data/model", "data/pretrained", "models:/", 7)],
        *[("train.init_from", name) for name in ("hf:", "hf:/tmp/x", "hf:data/x/y", "hf:a@main")],
        ("train.init_from", "data/pretrained/../tokens"),
        ("model", "gpt2-smal"),
        ("model.d_model", 2**20 + 1),
        ("model.n_layers", 1001),
        ("model.n_heads", 0),
        ("model.dropout", 1),
        ("model.dropout", -0.1),
        ("model.tie_weights", 1),
        ("model.tie_weights", "yes"),
        ("model.activation", "relu"),
        *[
            ("prepare.source", source)
            for source in ("", "/etc/hosts", "data/raw/../tokens", "other/x.txt", "data", "../data/raw")
        ],
        ("prepare.source", 7),
        ("prepare.source", "hf:"),
        ("prepare.source", "hf:data/tokens"),
        ("prepare.source", "hf:../tokens"),
        ("prepare.source", "hf:data/raw/../tokens"),
        ("prepare.files", ""),
        ("prepare.files", "."),
        ("prepare.separator", ""),
        ("prepare.encoding", "utf-88"),
        ("prepare.encoding", "hex"),
        ("prepare.splits", "train*"),
        ("prepare.splits", {"trian": "train*"}),
        ("prepare.splits", {"train": ""}),
        ("prepare.max_documents", 0),
        ("prepare.min_chars", -1),
        ("prepare.unicode", "nfc"),
        ("prepare.val_fraction", 0),
        ("prepare.tokenizer", "BPE"),
        ("prepare.vocab_size", 256),
        ("prepare.vocab_size", 2**20 + 1),
        ("prepare.val_fraction", 1),
        ("sample.prompts", []),
        ("sample.prompts", ["ok", ""]),
        ("sample.prompts", "ok"),
        ("sample.prompts", ["ok", " \n"]),
        ("sample.prompts", ["ok", "\ud800"]),
        ("sample.settings", []),
        ("sample.settings", [{"top_k": 5}]),
        ("sample.settings", [{"temperature": -1}]),
        ("sample.settings", [{"temperature": 1, "top_k": 0}]),
        ("sample.settings", [{"temperature": 1, "top_p": 0}]),
        ("sample.settings", [{"temperature": 1, "top_p": 1.5}]),
        ("sample.settings", [{"temperature": 1, "repetition_penalty": 1e-300}]),
        ("register.name", "a/b"),
        ("register.alias", "../x"),
        ("register.alias", "a.b"),
        ("register.alias", "Latest"),
        ("register.alias", "v1"),
        ("register.alias", "x" * 256),
    ],
)
def test_bad_value_is_refused_by_name(problem: Callable[..., str], name: str, value: Any) -> None:
    line = problem(**{name: value})
    assert line.startswith(f"error: params.yaml: {name}") and len(line) < 300


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_name_of_a_model_of_openai_stands_for_its_shape(
    tmp_path: Path, shipped_text: str, name: str, parameters: int
) -> None:
    (tmp_path / "params.yaml").write_text(shipped_text)
    apply_overrides(tmp_path / "params.yaml", [f"model={name}", "train.initialization=random"])  # `dvc exp run -S`
    params = load_params(tmp_path / "params.yaml")
    with shapes_only():
        model = GPT2Model(**params.model.model_dump(), vocab_size=50257)
    assert model.count_parameters() == parameters
    openai = transformers.GPT2Config()  # has the sizes of gpt2
    assert (params.model.max_len, params.model.dropout) == (openai.n_positions, openai.resid_pdrop)
    assert params.model.d_model // params.model.n_heads == 64
    assert params.model.tie_weights and params.model.qkv_bias and params.model.activation == "gelu_tanh"


def test_weights_to_start_from_take_the_place_of_an_initialization(shipped: dict[str, Any]) -> None:
    names = ("models:/gpt2/2", "runs:/0123/model", "hf:gpt2", "hf:owner/gpt2", "data/pretrained/a/b.pt")
    for name in names:  # tied weights, which bigrams could not initialize
        params = check(Params, changed(shipped, "train.init_from", name) | {"model": "gpt2"}, "params.yaml")
        assert params.train.init_from == name


def test_the_champion_is_known_whatever_else_is_wrong(
    tmp_path: Path, shipped: dict[str, Any], error_line: ErrorLine
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"train": 7, "register": shipped["register"]}))
    assert champion_uri(path) == "models:/gpt2@champion"
    for wrong, told in ({"name": "a/b", "alias": "x"}, "register: name"), (None, "register"):
        path.write_text(yaml.safe_dump(shipped | {"register": wrong}))
        assert error_line(lambda: champion_uri(path)).startswith(f"error: params.yaml: {told}")


def test_a_source_that_dvc_does_not_watch_is_told_so(problem: Callable[..., str]) -> None:
    assert "should be sotu, hf:owner/dataset, or lie below data/raw, where DVC sees changes (/etc/hosts)" in problem(
        prepare__source="/etc/hosts"
    ).replace("'", "")
    assert "should have ** only as the whole name of a folder" in problem(prepare__source="data/raw/**.txt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.d_model": 2, "model.n_heads": 1}, "train.initialization bigrams needs model.d_model 3 or more (2)"),
        ({"prepare.val_fraction": 0.5, "prepare.test_fraction": 0.5}, "leave nothing to train on"),
        ({"prepare.val_fraction": "6e-1", "prepare.test_fraction": "6e-1"}, "leave nothing to train on"),
        ({"prepare.tokenizer": "bpe"}, "prepare: tokenizer bpe needs a vocab_size, e.g. 4096; that of gpt2 is null"),
        ({"prepare.vocab_size": 4096}, "prepare: tokenizer bpe needs a vocab_size, e.g. 4096; that of gpt2 is null"),
    ],
)
def test_impossible_values_together_are_refused(
    problem: Callable[..., str], changes: dict[str, Any], words: str
) -> None:
    assert words in problem(**changes)


@pytest.mark.parametrize("section", ["prepare", "model", "train", "evaluate", "sample", "register"])
def test_missing_section_is_named(problem: Callable[..., str], section: str) -> None:
    assert f"{section} is missing" in problem(**{section: MISSING})


@pytest.mark.parametrize("number", ["6e-4", "0.0006", "6.0e-4", "6E-4", "+6e-4", "6.e-4"])
def test_every_way_to_write_a_number_is_one(tmp_path: Path, shipped_text: str, number: str) -> None:
    text = re.sub(r"(?m)^  learning_rate: \S+", f"  learning_rate: {number}", shipped_text)
    assert load_text(tmp_path, text).train.learning_rate == 6e-4


def test_whole_number_serves_as_a_fraction(shipped: dict[str, Any]) -> None:
    assert check(Params, changed(shipped, "train.grad_clip", 1), "").train.grad_clip == 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("", "42", "[1, 2]", "text", "a: [", "a: 1\n\tb: 2", "\0", b"\xff\xfe\xfa", "{[1]: 2}", "&a [*a]", "1: 2"),
        *("train: !!bool maybe", "train: !!int ''", "train: !!float ''", "train: !!timestamp noon"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, error_line: ErrorLine, text: str | bytes) -> None:
    assert "params.yaml" in error_line(lambda: load_text(tmp_path, text))


def aliases(value: str, item: str) -> str:
    """YAML of a few hundred characters for a value with 9 to the 10th parts."""
    lines = [f"a: &a {value}"]
    for before, name in itertools.pairwise("abcdefghijk"):
        lines.append(f"{name}: &{name} {item.format(', '.join(f'k{i}: *{before}' for i in range(9)))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 900 + "1" + "}" * 900,
        "train: !!python/object/apply:os.system [exit]",
        "train: {seed: 1" + "0" * 5000 + "}",
        "train: {seed: 0x" + "f" * 5000 + "}",
        "prepare: {val_fraction: 1" + "0" * 400 + ", test_fraction: 0.1}",
        "model: {d_model: 1" + "0" * 400 + ", n_heads: 6.5}",
        "model: {d_model: 0x" + "f" * 4100 + ", n_heads: 2}",
        "model: &m {d_model: *m}",
        aliases("{x: 1}", "{{{}}}") + "\nmodel: *k\ntrain: *k",
        aliases("[1]", "[{}]") + "\nmodel: *k\ntrain: {seed: *k}",
    ],
    ids=[
        "deep list",
        "deep mapping",
        "tag",
        "long number",
        "long hexadecimal",
        "huge fraction",
        "huge width",
        "unprintable width",
        "itself",
        "mappings",
        "lists",
    ],
)
def test_hostile_text_is_refused_in_a_line(tmp_path: Path, error_line: ErrorLine, text: str) -> None:
    assert len(error_line(lambda: load_text(tmp_path, text))) < 5000


def test_file_that_cannot_be_read_is_named(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "absent.yaml does not exist" in error_line(lambda: load_params(tmp_path / "absent.yaml"))
    assert f"{tmp_path} cannot be read" in error_line(lambda: load_params(tmp_path))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
VALUES = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=9), one, max_size=3), max_leaves=6
)


@given(data=st.data())
def test_any_text_loads_or_gives_one_line(
    data: st.DataObject, shipped_text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shipped = yaml.safe_load(shipped_text)
    names = [*shipped, *(f"{section}.{key}" for section in shipped for key in shipped[section]), "new", "train.new"]
    kind = data.draw(st.sampled_from(["text", "value", "changed", "cut"]))
    if kind == "text":
        text = data.draw(st.text(st.characters(exclude_categories=["Cs"])) | st.text("a: \n-[]{}&*!#'\"|>%@`1e.~"))
    elif kind == "value":
        text = yaml.safe_dump(data.draw(VALUES))
    elif kind == "changed":
        text = yaml.safe_dump(changed(shipped, data.draw(st.sampled_from(names)), data.draw(VALUES)))
    else:
        at = data.draw(st.integers(0, len(shipped_text)))
        text = shipped_text[:at] + data.draw(st.text("a: \n-[]{}&*!1", max_size=3)) + shipped_text[at + 1 :]
    try:
        load_text(tmp_path_factory.getbasetemp(), text)
    except UserError as error:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            fail(error)
        line = printed.getvalue()
        assert len(line.splitlines()) == 1 and line.startswith("error: ")


def test_model_config_is_the_model_section_and_a_vocabulary(shipped: dict[str, Any], error_line: ErrorLine) -> None:
    assert check(ModelConfig, shipped["model"] | {"vocab_size": 5}, "config.json").vocab_size == 5
    assert "vocab_size is missing" in error_line(lambda: check(ModelConfig, shipped["model"], "config.json"))
