"""Shared by all tests: a model, parameters and texts so small that the whole suite takes seconds."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings

from gpt2.config import ModelConfig, PrepareParams, TrainParams
from gpt2.core.cli import fail, run_command
from gpt2.core.environment import MLFLOW_DEFAULTS
from gpt2.core.errors import UserError
from gpt2.core.validation import check

if TYPE_CHECKING:  # PyTorch takes seconds, also in the process that only hands out the tests
    from gpt2.model.gpt2 import GPT2Model

os.environ.update(MLFLOW_DEFAULTS | os.environ)
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("quick")

REPOSITORY = Path(__file__).parents[1]
TINY_VOCABULARY = 61
TINY: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 32,
    "max_len": 12,
    "dropout": 0.0,
    "tie_weights": False,
    "qkv_bias": False,
    "activation": "gelu",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests first, those that need `reproduced` last of them: two that run tests then end together."""

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is None, "reproduced" in getattr(item, "fixturenames", ())

    items.sort(key=order)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shipped_text() -> str:
    return (REPOSITORY / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def shipped(shipped_text: str) -> dict[str, Any]:
    return yaml.safe_load(shipped_text)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    return lambda **changes: check(ModelConfig, {"vocab_size": TINY_VOCABULARY} | TINY | changes, "tiny")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GPT2Model]:
    """Build a tiny model; with `random`, every weight, bias and norm is far from its usual first value."""
    import torch

    from gpt2.model.gpt2 import GPT2Model

    def make(*, seed: int = 0, random: bool = False, **changes: Any) -> GPT2Model:
        torch.manual_seed(seed)
        model = GPT2Model(**{"vocab_size": TINY_VOCABULARY} | TINY | changes)
        if random:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, mean=0.1, std=0.4)
        return model.eval()

    return make


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> Path:
    """The folder of a tiny model of GPT-2's vocabulary."""
    from gpt2.data.tokenizer import VOCAB_SIZE
    from gpt2.model.weights import save_model

    folder = tmp_path_factory.mktemp("model")
    save_model(make_model(vocab_size=VOCAB_SIZE), make_config(vocab_size=VOCAB_SIZE), folder)
    return folder


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a vocabulary of 300 tokens, of Greek and code, beside no model."""
    from gpt2.core.paths import TOKENIZER_FILE
    from gpt2.data.bpe import train_bpe

    file = tmp_path_factory.mktemp("bpe") / TOKENIZER_FILE
    train_bpe(["Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν.\n", "    return self.λόγος\n"] * 9, 300, file)
    return file


@pytest.fixture(scope="session")
def make_train_params(shipped_text: str) -> Callable[..., TrainParams]:
    section = yaml.safe_load(shipped_text)["train"]
    tiny = {"batch_size": 4, "micro_batch_size": 4, "sequence_length": 8}

    def make(**changes: Any) -> TrainParams:
        rate = changes.get("learning_rate", section["learning_rate"])
        return check(
            TrainParams,
            section | tiny | {"initialization": "random", "embedding_learning_rate": rate} | changes,
            "tiny",
        )

    return make


@pytest.fixture(scope="session")
def make_prepare_params(shipped_text: str) -> Callable[..., PrepareParams]:
    section = yaml.safe_load(shipped_text)["prepare"]
    return lambda source, **changes: check(PrepareParams, section | {"source": source} | changes, "tiny")


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the main of a script with arguments; return its exit code, output and errors."""

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def error_line() -> Callable[[Callable[[], object]], str]:
    """Do what a user should not; return the one line that a command prints for it."""

    def run(mistake: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            mistake()
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            assert fail(caught.value) == 2
        line = printed.getvalue()
        assert line.startswith("error: ") and line.endswith("\n") and len(line.splitlines()) == 1, line
        return line

    return run


@pytest.fixture(scope="session")
def full_disk() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """A context in which no file can grow beyond a kilobyte, or so many bytes."""

    @contextlib.contextmanager
    def limit(most_bytes: int = 1000) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a checkout with an empty MLflow store, which tracking takes for its own."""
    import mlflow

    from gpt2.tracking import local_registry, runs, store

    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_EXP_NAME", raising=False)
        for module in (store, local_registry):
            patch.setattr(module, "main_root", lambda: root)
        patch.setattr(store, "ROOT", root)
        for writer in (store, runs):
            patch.setattr(writer, "RECEIPT", root / "mlartifacts" / "receipt.json")
        yield root
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # back to the default


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
