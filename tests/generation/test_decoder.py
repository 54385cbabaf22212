from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from generation.helpers import ROUNDED, logits_after
from gpt2.generation.decoder import Decoder
from gpt2.generation.linear import Quantization
from gpt2.model.gpt2 import GPT2Model

MakeModel = Callable[..., GPT2Model]
OPENAI = {"tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}


def logits_of(model: GPT2Model, texts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])


@pytest.mark.parametrize("changes", [{}, OPENAI, {"n_heads": 1, "n_layers": 1}])
@pytest.mark.parametrize("unseen", [[], [0, 7, *range(20, 60)]])
def test_logits_are_the_models(make_model: MakeModel, changes: dict[str, Any], unseen: list[int]) -> None:
    model = make_model(random=True, **changes)
    with torch.no_grad():
        model.output_projection.weight[unseen] = torch.randn(16)
    decoder = Decoder(model, slots=3, seen=~np.isin(np.arange(61), unseen))
    texts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    found = logits_after(decoder, dict(enumerate(texts)))
    torch.testing.assert_close(found, logits_of(model, texts), atol=1e-5, rtol=1e-5)
    for new in ([7, 8, 9], [1, 1, 2], [5, 60, 0]):
        positions = [len(text) for text in texts]
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        found = decoder.step(new, positions)
        torch.testing.assert_close(found, logits_of(model, texts), atol=1e-5, rtol=1e-5)


def test_a_slot_is_filled_again_while_others_continue(make_model: MakeModel) -> None:
    model = make_model(random=True)
    decoder = Decoder(model, slots=3)
    decoder.prefill({0: [3, 1, 4], 1: [1, 5, 9, 2, 6], 2: [8]})
    found = logits_after(decoder, {1: [7, 7]})
    torch.testing.assert_close(found, logits_of(model, [[7, 7]]), atol=1e-5, rtol=1e-5)
    found = decoder.step([1, 2], [3, 2])  # the last slot waits
    torch.testing.assert_close(found, logits_of(model, [[3, 1, 4, 1], [7, 7, 2]]), atol=1e-5, rtol=1e-5)
    decoder.move(2, 0)
    torch.testing.assert_close(decoder.step([6], [1]), logits_of(model, [[8, 6]]), atol=1e-5, rtol=1e-5)


def test_a_text_is_read_in_parts_while_another_continues(make_model: MakeModel) -> None:
    model = make_model(random=True)
    decoder = Decoder(model, slots=2)
    decoder.prefill({0: [3, 1, 4]})
    decoder.prefill({1: [1, 5, 9]})
    found = decoder.step([1, 0], [3, 3])  # what the second slot gets here is written over
    torch.testing.assert_close(found[:1], logits_of(model, [[3, 1, 4, 1]]), atol=1e-5, rtol=1e-5)
    found = logits_after(decoder, {1: [2, 6]}, start=3)
    torch.testing.assert_close(found, logits_of(model, [[1, 5, 9, 2, 6]]), atol=1e-5, rtol=1e-5)


def test_texts_fill_the_context(make_model: MakeModel) -> None:
    model = make_model(random=True, max_len=4)
    decoder = Decoder(model, slots=1)
    decoder.prefill({0: [3, 1, 4]})
    found = decoder.step([1], [3])
    torch.testing.assert_close(found, logits_of(model, [[3, 1, 4, 1]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ROUNDED)
def test_rounded_weights_are_in_the_blocks_and_in_the_head(make_model: MakeModel, quantization: Quantization) -> None:
    model = make_model(random=True)
    exact, coarse = Decoder(model, 1), Decoder(model, 1, quantization=quantization)
    expected, found = (decoder.prefill({0: [3, 1, 4]}) for decoder in (exact, coarse))
    assert 1e-4 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    expected, found = (decoder.logits(expected) for decoder in (exact, coarse))
    assert 1e-4 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_int8_is_for_the_cpu(make_model: MakeModel, error_line: Callable[[Callable[[], object]], str]) -> None:
    model = make_model().to("meta")
    assert "int8 weights are for the CPU (device cpu), not meta" in error_line(
        lambda: Decoder(model, 1, quantization="int8")
    )


def test_bfloat16_is_for_hardware_that_has_it(
    make_model: MakeModel, error_line: Callable[[Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    model = make_model(random=True)
    assert "bfloat16 weights would be slow here" in error_line(lambda: Decoder(model, 1, quantization="bfloat16"))


def test_where_pytorch_has_no_int8_matmuls_none_are_used(
    make_model: MakeModel, error_line: Callable[[Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(engine="none"))
    model = make_model(random=True)
    assert "int8 is not supported on this machine" in error_line(lambda: Decoder(model, 1, quantization="int8"))
    decoder = Decoder(model, 1)
    decoder.prefill({0: [3, 1, 4]})
    assert decoder.step([1], [3]).isfinite().all()


def test_seen_tokens_of_other_weights_are_refused(
    make_model: MakeModel, error_line: Callable[[Callable[[], object]], str]
) -> None:
    line = error_line(lambda: Decoder(make_model(random=True), 1, np.arange(61) < 20))
    assert "seen_tokens.npy does not match its weights" in line
