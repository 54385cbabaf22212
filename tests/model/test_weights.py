import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.config import ModelConfig
from gpt2.core.errors import UserError
from gpt2.data.tokenizer import load_tokenizer
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model, read_config, save_model

ErrorLine = Callable[[Callable[[], object]], str]
MakeModel = Callable[..., GPT2Model]
MakeConfig = Callable[..., ModelConfig]
OPENAI = {"tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}
TOKENS = torch.arange(24).reshape(2, 12)


def logits(model: GPT2Model) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


@pytest.fixture
def saved(tmp_path: Path, make_model: MakeModel, make_config: MakeConfig) -> Path:
    save_model(make_model(random=True), make_config(), tmp_path)
    return tmp_path


def rewrite(folder: Path, data: bytes | None = None, **model: Any) -> Path:
    """Change the weights or the configuration of a saved model, and record the right SHA-256 for it."""
    if data is not None:
        (folder / "model.safetensors").write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= model
    config["model_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", [{}, OPENAI])
def test_saved_model_comes_back(
    tmp_path: Path, make_model: MakeModel, make_config: MakeConfig, kind: dict[str, Any]
) -> None:
    model = make_model(random=True, dropout=0.5, **kind)
    digest = save_model(model.train(), make_config(dropout=0.5, **kind), tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, config, _ = load_model(path)
        assert not loaded.training
        assert torch.equal(logits(loaded), logits(model.eval()))
        assert config.model_dump() == make_config(dropout=0.5, **kind).model_dump()
    assert digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert read_config(tmp_path) == (config, digest)


def test_a_tokenizer_is_kept_beside_the_weights_and_checked(
    tmp_path: Path, make_model: MakeModel, make_config: MakeConfig, bpe_file: Path, error_line: ErrorLine
) -> None:
    own, gpt2s = tmp_path / "own", tmp_path / "gpt2s"
    save_model(make_model(vocab_size=300), make_config(vocab_size=300), own, tokenizer=bpe_file)
    save_model(make_model(), make_config(), gpt2s, tokenizer=tmp_path / "none")
    kept = own / bpe_file.name
    assert load_model(own)[1].vocab_size == load_tokenizer(own / "model.safetensors", 300).vocab_size == 300
    assert kept.read_bytes() == bpe_file.read_bytes() and not (gpt2s / bpe_file.name).exists()
    assert "has a vocabulary of 61, not its tokenizer's 300" in error_line(lambda: load_tokenizer(own, 61))
    shutil.copy(kept, gpt2s)
    kept.write_text(f"{kept.read_text()}\n")
    for folder in (own, gpt2s):
        assert "is missing, damaged or not that of its config.json" in error_line(partial(load_model, folder))
    kept.unlink()
    assert "is missing" in error_line(lambda: load_model(own))


def test_same_weights_give_the_same_bytes(tmp_path: Path, make_model: MakeModel, make_config: MakeConfig) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        save_model(make_model(random=True), make_config(), folder)
    for name in ("model.safetensors", "config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_seen_tokens_come_back(tmp_path: Path, make_model: MakeModel, make_config: Callable[..., ModelConfig]) -> None:
    seen = np.arange(61) < 50
    save_model(make_model(), make_config(), tmp_path, seen=seen)
    loaded = load_model(tmp_path)[2]
    assert loaded is not None and np.array_equal(loaded, seen)
    np.save(tmp_path / "seen_tokens.npy", seen[:-1])
    with pytest.raises(UserError, match="is not a mask of 61 tokens"):
        load_model(tmp_path)


def test_tied_weights_are_saved_once(tmp_path: Path, make_model: MakeModel, make_config: MakeConfig) -> None:
    model = make_model(**OPENAI)
    save_model(model, make_config(**OPENAI), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(model.state_dict()) - {"output_projection.weight"}
    loaded, _, _ = load_model(tmp_path)
    assert loaded.output_projection.weight is loaded.token_embedding.weight


def test_weights_that_are_not_the_recorded_ones_are_refused(saved: Path, error_line: ErrorLine) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for shown in (saved, path):
        assert "model.safetensors is damaged" in error_line(partial(load_model, shown))


def lying_header(data: bytes, **changes: Any) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["layer_norm.weight"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: b"\xff" * 7 + b"\x7f" + data[8:],
        lambda data: data[:8] + b"[" * 500 + data[508:],
        lambda data: b"{}".ljust(64),
        lambda data: lying_header(data, shape=[2**40]),
        lambda data: lying_header(data, data_offsets=[0, 2**50]),
        lambda data: lying_header(data, data_offsets=[-4, 60]),
        lambda data: lying_header(data, dtype="F99"),
        lambda data: lying_header(data, shape="many"),
    ],
)
def test_broken_weights_are_refused(saved: Path, error_line: ErrorLine, damage: Callable[[bytes], bytes]) -> None:
    rewrite(saved, damage((saved / "model.safetensors").read_bytes()))
    assert "is not a safetensors file" in error_line(lambda: load_model(saved))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@pytest.fixture(scope="module")
def saved_once(
    tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, make_config: MakeConfig
) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    save_model(make_model(random=True), make_config(), folder)
    return folder, (folder / "model.safetensors").read_bytes()


@given(position=st.integers(0, 3000), junk=st.binary(min_size=1, max_size=30))
def test_any_damage_to_the_header_raises_nothing_but_a_user_error(
    saved_once: tuple[Path, bytes], position: int, junk: bytes
) -> None:
    folder, data = saved_once
    with suppress(UserError):
        load_model(rewrite(folder, data[:position] + junk + data[position + len(junk) :]))


@given(key=st.sampled_from(["shape", "data_offsets", "dtype"]), value=JSON)
def test_any_lie_in_the_header_is_refused(saved_once: tuple[Path, bytes], key: str, value: Any) -> None:
    folder, data = saved_once
    with pytest.raises(UserError):
        load_model(rewrite(folder, lying_header(data, **{key: value})))


def test_weights_of_another_shape_are_refused(saved: Path, error_line: ErrorLine) -> None:
    line = error_line(lambda: load_model(rewrite(saved, d_ff=64)))
    assert "does not hold the weights of its configuration" in line and "linear1.weight" in line


def test_configuration_too_large_for_any_memory_is_refused(saved: Path, error_line: ErrorLine) -> None:
    error_line(lambda: load_model(rewrite(saved, vocab_size=2**31 - 1, d_model=2**30)))


@pytest.mark.parametrize(("name", "tied"), [("layer_norm.bias", False), ("token_embedding.weight", True)])
def test_missing_and_unknown_weights_are_named(
    tmp_path: Path, make_model: MakeModel, make_config: MakeConfig, error_line: ErrorLine, name: str, tied: bool
) -> None:
    save_model(make_model(tie_weights=tied), make_config(tie_weights=tied), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["surplus"] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors")
    line = error_line(lambda: load_model(rewrite(tmp_path)))
    assert name in line and "surplus" in line


def test_missing_configuration_is_named(saved: Path, error_line: ErrorLine) -> None:
    (saved / "config.json").unlink()
    for path in (saved, saved / "model.safetensors"):
        line = error_line(partial(load_model, path))
        assert f"{path} is no model" in line and "config.json does not exist" in line


def test_weights_may_be_read_by_whoever_may_read_their_configuration(saved: Path) -> None:
    weights, config = (saved / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode & 0o777 == config.stat().st_mode & 0o777


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0", '{"model_sha256": "' + "0" * 64 + '", "model": []}'])
def test_broken_configuration_is_refused(saved: Path, error_line: ErrorLine, text: str) -> None:
    (saved / "config.json").write_text(text)
    assert "config.json" in error_line(lambda: load_model(saved))


@pytest.mark.parametrize("digest", [None, 5, "", "../x", "0" * 63, "g" * 64, "0" * 64 + "\n"])
def test_configuration_without_a_sha256_is_refused(saved: Path, error_line: ErrorLine, digest: Any) -> None:
    config = json.loads((saved / "config.json").read_text()) | {"model_sha256": digest}
    (saved / "config.json").write_text(json.dumps(config))
    assert "has no SHA-256 of weights" in error_line(lambda: read_config(saved))


def test_bad_values_of_the_configuration_are_named(saved: Path, error_line: ErrorLine) -> None:
    line = error_line(lambda: load_model(rewrite(saved, n_heads=3, d_modle=1, vocab_size="many")))
    assert "d_modle is unknown (did you mean d_model?)" in line and "vocab_size" in line


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "absent.pt", "absent/model.safetensors"])
def test_missing_model_is_named(tmp_path: Path, error_line: ErrorLine, name: str) -> None:
    assert f"{name} does not exist" in error_line(lambda: load_model(tmp_path / name))


def test_folder_without_weights_is_refused(saved: Path, error_line: ErrorLine) -> None:
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in error_line(lambda: load_model(saved))


ORIGINAL_CONFIG = {"vocab_size": 61, "d_model": 16, "max_len": 12, "n_heads": 2, "n_layers": 2, "d_ff": 32}


def later_name(name: str) -> str:
    for present, later in (
        (".attention.", ".attn."),
        (".feed_forward.linear1.", ".mlp.c_fc."),
        (".feed_forward.linear2.", ".mlp.c_proj."),
    ):
        name = name.replace(present, later)
    return name


def save_original(path: Path, state: object, **config: Any) -> Path:
    torch.save({"model_state_dict": state, "model_config": ORIGINAL_CONFIG | config}, path)
    return path


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("name_of", [str, later_name])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_checkpoint_of_the_original_project_loads(
    tmp_path: Path, make_model: MakeModel, name_of: Callable[[str], str], qkv_bias: bool, suffix: str
) -> None:
    model = make_model(random=True, qkv_bias=qkv_bias)
    state = {name_of(name): weight for name, weight in model.state_dict().items()}
    assert (set(state) == set(model.state_dict())) == (name_of is str)
    loaded, config, _ = load_model(save_original(tmp_path / f"model{suffix}", state))
    assert not loaded.training and torch.equal(logits(loaded), logits(model))
    assert config.qkv_bias == qkv_bias and not config.tie_weights and config.vocab_size == 61


class Payload:
    """Runs os.mkdir where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["state", "config", "whole", "plain pickle"])
def test_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, make_model: MakeModel, error_line: ErrorLine, place: str
) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the payload works

    path, payload = tmp_path / "model.pt", Payload(tmp_path / "target")
    state = make_model().state_dict()
    if place == "plain pickle":
        path.write_bytes(pickle.dumps({"model_state_dict": payload, "model_config": ORIGINAL_CONFIG}))
    else:
        config = ORIGINAL_CONFIG | ({"d_model": payload} if place == "config" else {})
        checkpoint = {"model_state_dict": payload if place == "state" else state, "model_config": config}
        torch.save(payload if place == "whole" else checkpoint, path)
    assert "is refused" in error_line(lambda: load_model(path))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoint_is_refused(
    tmp_path: Path, make_model: MakeModel, error_line: ErrorLine, zipped: bool
) -> None:
    path = tmp_path / "model.pt"
    checkpoint = {"model_state_dict": make_model().state_dict(), "model_config": ORIGINAL_CONFIG}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for broken in (b"# text", data[: len(data) // 2], data[:-50], *(data[:size] for size in range(0, 2000, 7))):
        path.write_bytes(broken)
        assert "model.pt" in error_line(lambda: load_model(path))


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"model_state_dict": {}}, *({"model_state_dict": s, "model_config": {}} for s in (5, ["a"], "a"))],
)
def test_checkpoint_of_something_else_is_refused(tmp_path: Path, error_line: ErrorLine, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert "is not a checkpoint with" in error_line(lambda: load_model(tmp_path / "model.pt"))


def test_checkpoint_of_another_shape_is_refused(tmp_path: Path, make_model: MakeModel, error_line: ErrorLine) -> None:
    path = save_original(tmp_path / "model.pt", make_model().state_dict(), d_ff=64)
    assert "does not hold the weights of its configuration" in error_line(lambda: load_model(path))
