"""The trained model arranged for generation: a batch of texts, each of which grows by a token a step.

Generation is bound by reading the weights. Here they are packed for the processor, those of query, key and value in one
matrix, and on request in int8. The logits are GPT2Model's, to rounding; int8 changes them a little.

Shapes: B texts, each in a row; R of these rows; T positions, C d_model, H heads, D head size, V vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.generation.cache import KeyValueCache
from gpt2.generation.int8 import Map, Shortlist, int8_linear
from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.model.seen_tokens import TextVocabulary
from gpt2.training.cuda_graph import Function, record

Quantization = Literal["none", "int8"]
SHORTLIST_AFTER = 128  # steps; to make it takes as long as it saves on some 200
EXACT_ENGINES = ("x86", "fbgemm", "onednn")  # of PyTorch's int8 products, that round x as Shortlist's bound supposes


class Decoder:
    """Gives the logits of the next token of up to B texts, each of at most max_len tokens.

    Raises UserError if int8 is asked for and the model is not on the CPU, this PyTorch has no int8 products, or the
    weights are not finite.
    """

    def __init__(self, model: GPT2Model, rows: int, quantization: Quantization = "none") -> None:
        self.rows, self._model = rows, model
        self._device = model.output_projection.weight.device
        if quantization == "int8":
            if self._device.type != "cpu":
                raise UserError(f"int8 weights are for the CPU (device cpu), not {self._device.type}")
            if torch.backends.quantized.engine == "none":
                raise UserError("int8 weights are not for this machine: its PyTorch has no products for them")
            for name, weight in model.named_parameters():
                if not weight.sum().isfinite():
                    raise UserError(f"the model's weights are ruined: {name} is not finite")
        self._blocks = [
            _Block(block, quantization) for block in model.transformer_blocks if isinstance(block, TransformerBlock)
        ]
        self._vocabulary = TextVocabulary.of_weight(model.output_projection.weight)
        self._head = self._vocabulary.rows(model.output_projection.weight.detach())  # (M + 1, C)
        self._project = fast_linear(self._head, quantization=quantization)
        self._may_shortlist = (
            quantization == "none" and self._device.type == "cpu" and torch.backends.quantized.engine in EXACT_ENGINES
        )
        self._steps = 0
        n_heads = self._blocks[0].n_heads
        head_size = model.token_embedding.embedding_dim // n_heads
        shape = (len(self._blocks), 2, rows, n_heads, model.max_len, head_size)
        self._cache = KeyValueCache(torch.zeros(shape, device=self._device))
        self._replay = self._record() if self._device.type == "cuda" else None

    @torch.inference_mode()
    def prefill(self, texts: dict[int, list[int]]) -> Tensor:
        """Put texts of token ids, by row, in place of what the rows held; return the logits after them (R, V)."""
        features = self.prefill_features(texts)
        return self.project(features[range(len(texts)), [len(text) - 1 for text in texts.values()]])

    @torch.inference_mode()
    def prefill_features(self, texts: dict[int, list[int]]) -> Tensor:
        """Do what `prefill` does; return what the logits of all positions are projected from (R, T, C)."""
        longest = max(map(len, texts.values()))
        tokens = torch.zeros(len(texts), longest, dtype=torch.long)  # (R, T); what follows a text, none looks at
        for row, text in zip(tokens, texts.values(), strict=True):
            row[: len(text)] = torch.tensor(text)
        self._cache.prefill(torch.tensor(list(texts), device=self._device), longest)
        return self._features(tokens.to(self._device))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int], wanted: int | None = None) -> Tensor:
        """Append a token to the text in each of the first rows, at these positions; return the next logits (R, V).

        If only the `wanted` largest logits are needed, the others may be -inf.
        """
        if self._replay:
            (logits,) = self._replay(torch.tensor(tokens), torch.tensor(positions))
            return logits[: len(tokens)]
        new, new_positions = (torch.tensor(numbers, device=self._device) for numbers in (tokens, positions))
        self._steps += 1
        shortlisted = self._may_shortlist and self._steps > SHORTLIST_AFTER
        return self._forward(new, new_positions, max(positions) + 1, wanted if shortlisted else None)

    def move(self, source: int, target: int) -> None:
        """Put the text of one row in another's place."""
        self._cache.move(source, target)

    def _forward(self, tokens: Tensor, positions: Tensor, used: int, wanted: int | None = None) -> Tensor:
        self._cache.step(positions, used)
        features = self._features(tokens[:, None])[:, 0]
        if wanted is None:
            return self.project(features)
        return self._vocabulary.all_logits(self._shortlist(features, wanted))

    def project(self, features: Tensor) -> Tensor:
        """Map features (..., C) to logits (..., V)."""
        return self._vocabulary.all_logits(self._project(features))

    @cached_property
    def _shortlist(self) -> Shortlist:
        return Shortlist(self._head, self._project)

    def _features(self, tokens: Tensor) -> Tensor:
        """Map token ids (R, T) to what the output projection reads (R, T, C)."""
        x = self._model.token_embedding(tokens) + self._model.position_embedding(self._cache.positions)
        for layer, block in enumerate(self._blocks):
            x = block(x, partial(self._cache.attention, layer))
        return self._model.layer_norm(x)

    @torch.inference_mode()
    def _record(self) -> Function:
        """Return a step of all rows, of tokens and positions (B,), as a CUDA graph. It writes into the cache."""
        inputs = torch.zeros(2, self.rows, dtype=torch.long, device=self._device)
        return record(lambda tokens, positions: (self._forward(tokens, positions, self._model.max_len),), *inputs)


class _Block:
    """A TransformerBlock's forward pass without dropout, from other matrices of the same weights."""

    def __init__(self, block: TransformerBlock, quantization: Quantization) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.n_heads = attention.n_heads
        self.layer_norm1, self.layer_norm2 = block.layer_norm1, block.layer_norm2
        qkv = (attention.w_q, attention.w_k, attention.w_v)
        bias = None if attention.w_q.bias is None else torch.cat([projection.bias for projection in qkv])
        self.w_qkv = fast_linear(torch.cat([projection.weight for projection in qkv]), bias, quantization)
        self.w_o = fast_linear(attention.w_o.weight, attention.w_o.bias, quantization)
        first, second = feed_forward.linear1, feed_forward.linear2
        self.linear1 = fast_linear(first.weight, first.bias, quantization, feed_forward.approximation)
        self.linear2 = fast_linear(second.weight, second.bias, quantization)

    def __call__(self, x: Tensor, attention: Map) -> Tensor:
        """Map (R, T, C) to (R, T, C); attention maps (R, T, 3, H, D) to (R, H, T, D)."""
        heads = attention(self.w_qkv(self.layer_norm1(x)).unflatten(-1, (3, self.n_heads, -1)))
        x = x + self.w_o(heads.transpose(1, 2).flatten(2))
        return x + self.linear2(self.linear1(self.layer_norm2(x)))


def fast_linear(
    weight: Tensor, bias: Tensor | None = None, quantization: Quantization = "none", gelu: str | None = None
) -> Map:
    """Return the map of x (..., in) to x @ weight (out, in).T + bias (..., out), its weight packed for the device.

    `gelu` is the approximation of a GELU behind it, if there is one.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if quantization == "none" and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        attached, approximation = ("none", "") if gelu is None else ("gelu", gelu)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, attached, [], approximation)
    linear: Map = partial(F.linear, weight=weight, bias=bias) if quantization == "none" else int8_linear(weight, bias)
    return linear if gelu is None else lambda x: F.gelu(linear(x), approximate=gelu)
