"""export.py as users call it, and what other programs make of its files."""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from gpt2.config import ModelConfig
from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.generation.engine import Engine, GenerationSettings, Request
from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.model.weights import WEIGHTS, save_model

Export = Callable[..., tuple[int, str, str]]

OPENAI = {"tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}
PROMPT = "The state of the Union is “naïve” 🦊.\r\n"
TOKENS = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_export(run_main: Callable[..., tuple[int, str, str]]) -> Export:
    """Run export.py with arguments; return its exit code, output and errors."""
    return partial(run_main, export.main)


@pytest.fixture(scope="module", params=[{}, OPENAI], ids=["default", "openai"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"vocab_size": VOCAB_SIZE, "max_len": 64} | request.param


@pytest.fixture(scope="module")
def model(make_model: Callable[..., GPT2Model], kind: dict[str, Any]) -> GPT2Model:
    """A random model of GPT-2's vocabulary, of logits so far apart that rounding changes no text."""
    return make_model(random=True, **kind)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    model: GPT2Model,
    make_config: Callable[..., ModelConfig],
    kind: dict[str, Any],
) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(model, make_config(**kind), path)
    return path


@pytest.fixture(scope="module")
def greedy(model: GPT2Model) -> str:
    """What infer.py writes after the prompt at temperature 0."""
    request = Request(PROMPT, GenerationSettings(temperature=0, max_tokens=20), gpt2_tokenizer())
    return Engine(model, 1).generate_all([request])[0]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", "--to", "onnx", str(path), "-m", str(folder / WEIGHTS)])
        export.main()
    return path


@torch.no_grad()
def test_transformers_opens_the_folder(
    run_export: Export, folder: Path, model: GPT2Model, greedy: str, tmp_path: Path
) -> None:
    target = tmp_path / "hf"
    assert run_export("--to", "hf", target, "-m", folder) == (0, f"{target} has {folder}\n", "")
    peer, found = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(found.values()), found
    torch.testing.assert_close(peer(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=0)
    their_tokenizer = AutoTokenizer.from_pretrained(target)
    prompt = their_tokenizer(PROMPT, return_tensors="pt")
    written = peer.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt.input_ids.shape[1] :]
    assert their_tokenizer.decode(written, skip_special_tokens=True) == greedy
    assert f"`{folder}`" in (target / "README.md").read_text()


def test_gguf_holds_the_weights(
    run_export: Export, folder: Path, model: GPT2Model, kind: dict[str, Any], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    target = tmp_path / "model.gguf"
    code, _, said = run_export("--to", "gguf", target, "-m", folder)
    assert code == 0 and ("exact gelu" in said) == (kind.get("activation") != "gelu_tanh")
    expected: dict[str, tuple[Any, ...]] = {
        "token_embd": (model.token_embedding,),
        "position_embd": (model.position_embedding,),
        "output_norm": (model.layer_norm,),
        "output": (model.output_projection,),
    }
    for i, block in enumerate(model.transformer_blocks):
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.attention, block.feed_forward
        expected |= {
            f"blk.{i}.attn_norm": (block.layer_norm1,),
            f"blk.{i}.attn_qkv": (attention.w_q, attention.w_k, attention.w_v),
            f"blk.{i}.attn_output": (attention.w_o,),
            f"blk.{i}.ffn_norm": (block.layer_norm2,),
            f"blk.{i}.ffn_up": (feed_forward.linear1,),
            f"blk.{i}.ffn_down": (feed_forward.linear2,),
        }
    if kind.get("tie_weights"):
        del expected["output"]
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(target).tensors}
    for name, layers in expected.items():
        assert torch.equal(tensors.pop(f"{name}.weight"), torch.cat([layer.weight for layer in layers])), name
        if f"{name}.bias" in tensors:
            biases = [torch.zeros(16) if layer.bias is None else layer.bias for layer in layers]
            assert torch.equal(tensors.pop(f"{name}.bias"), torch.cat(biases)), name
    assert not tensors


@torch.no_grad()
def test_llama_cpp_writes_the_text(
    run_export: Export, folder: Path, model: GPT2Model, greedy: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which compiles llama.cpp, is not installed")
    run_export("--to", "gguf", tmp_path / "model.gguf", "-m", folder)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    assert llama.tokenize(PROMPT.encode(), add_bos=False) == gpt2_tokenizer().encode(PROMPT)
    assert llama.create_completion(PROMPT, temperature=0, max_tokens=20)["choices"][0]["text"] == greedy
    llama.reset()
    llama.eval(TOKENS[0].tolist())
    logits = torch.tensor(llama.scores[: TOKENS.shape[1]])
    torch.testing.assert_close(logits, model(TOKENS)[0], atol=0.02, rtol=0)  # its gelu comes from a float16 table


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64)])
def test_onnx_runtime_gives_the_logits(onnx_file: Path, model: GPT2Model, shape: tuple[int, int]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file)
    tokens = torch.randint(VOCAB_SIZE, shape)
    (logits,) = session.run(["logits"], {"input_ids": tokens.numpy()})
    torch.testing.assert_close(torch.tensor(logits), model(tokens), atol=1e-4, rtol=0)


def test_a_target_that_exists_stays(run_export: Export, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for path in (tmp_path, tmp_path / "mine"):
        said = f"error: {path} exists; delete it, or take another name\n"
        assert run_export("--to", "hf", path, "-m", model_folder) == (2, "", said)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("to", export.FORMATS)
def test_a_failure_is_one_line_and_leaves_nothing(
    run_export: Export, folder: Path, tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]], to: str
) -> None:
    pytest.importorskip({"hf": "safetensors", "gguf": "gguf", "onnx": "onnxscript"}[to])
    with full_disk():
        code, _, error = run_export("--to", to, tmp_path / "new", "-m", folder)
    assert code == 2 and error.splitlines()[-1].startswith("error: "), error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line(
    run_export: Export, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for to, package in (("gguf", "gguf"), ("onnx", "onnxscript")):
        monkeypatch.delitem(sys.modules, f"gpt2.export.{to}", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        code, _, said = run_export("--to", to, tmp_path / "new", "-m", model_folder)
        assert code == 2 and re.fullmatch(
            rf"error: --to {to} needs {package}: run `pip install .*{package}==.*`\n", said
        )
