"""The trained model arranged for generation: a batch of texts, to each of which a step adds a token.

Query, key and value are one matrix, and all matrices are laid out for generation (linear.py). The logits are
GPT2Model's, to rounding; bfloat16 and int8 change them a little.

Shapes: B slots, R of them in use, T positions, C d_model, H heads, D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from gpt2.core.errors import UserError
from gpt2.data.batches import SeenMask
from gpt2.generation.cache import KeyValueCache
from gpt2.generation.linear import Quantization, check_quantization, make_linear
from gpt2.model.gpt2 import GPT2Model, TransformerBlock
from gpt2.model.seen_tokens import SeenTokens
from gpt2.training.cuda_graph import Function, capture


class Decoder:
    """Gives the logits of the next token of texts in up to `slots` slots, each of at most max_len tokens.

    `seen` (V,) tells which tokens the training text had, if the rows of all others are equal: these are computed once
    (seen_tokens.py). Raises UserError if those rows differ, or if the quantization is not for this machine, the model's
    device or its weights.
    """

    def __init__(
        self, model: GPT2Model, slots: int, seen: SeenMask | None = None, quantization: Quantization = "none"
    ) -> None:
        self.slots, self._model = slots, model
        self._device = model.output_projection.weight.device
        check_quantization(model, quantization)
        self._blocks = [_Block(cast(TransformerBlock, block), quantization) for block in model.transformer_blocks]
        weight = model.output_projection.weight.detach()
        all_seen = np.ones(len(weight), dtype=bool)
        self._seen_tokens = SeenTokens(torch.tensor(all_seen if seen is None else seen, device=self._device))
        if not self._seen_tokens.are_equal(weight):
            raise UserError("the model's seen_tokens.npy does not match its weights; the model works without that file")
        self._output_projection = make_linear(self._seen_tokens.rows(weight), None, quantization)
        n_heads = self._blocks[0].n_heads
        head_size = model.token_embedding.embedding_dim // n_heads
        shape = (len(self._blocks), 2, slots, n_heads, model.max_len, head_size)
        self._cache = KeyValueCache(torch.zeros(shape, device=self._device))
        self._replay = self._capture() if self._device.type == "cuda" else None

    @torch.inference_mode()
    def prefill(self, texts: dict[int, list[int]], start: int = 0) -> Tensor:
        """Put token ids, by slot, at the positions from `start` on; return their hidden states (R, T, C).

        What the slots held before `start` stays; a text shorter than the longest has no meaning beyond its end.
        """
        longest = max(map(len, texts.values()))
        tokens = torch.zeros(len(texts), longest, dtype=torch.long)  # (R, T); nothing attends to what follows a text
        for row, text in zip(tokens, texts.values(), strict=True):
            row[: len(text)] = torch.tensor(text)
        positions = torch.arange(start, start + longest, device=self._device)[None]
        self._cache.place(positions, start + longest, torch.tensor(list(texts), device=self._device))
        return self._hidden_states(tokens.to(self._device))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to the text in each of the first slots, at these positions; return the next logits (R, V)."""
        if self._replay:
            (logits,) = self._replay(torch.tensor(tokens), torch.tensor(positions))
            return logits[: len(tokens)]
        new, new_positions = (torch.tensor(numbers, device=self._device) for numbers in (tokens, positions))
        return self._step(new, new_positions, max(positions) + 1)

    def move(self, source: int, target: int) -> None:
        """Put the text of one slot in another's place."""
        self._cache.move(source, target)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (..., C) to logits (..., V)."""
        return self._seen_tokens.all_logits(self._output_projection(hidden_states))

    def _step(self, tokens: Tensor, positions: Tensor, used: int) -> Tensor:
        self._cache.place(positions[:, None], used)
        return self.logits(self._hidden_states(tokens[:, None])[:, 0])

    def _hidden_states(self, tokens: Tensor) -> Tensor:
        """Map token ids (R, T) to hidden states (R, T, C)."""
        x = self._model.token_embedding(tokens) + self._model.position_embedding(self._cache.positions)
        for layer, block in enumerate(self._blocks):
            x = block(x, partial(self._cache.attention, layer))
        return self._model.layer_norm(x)

    @torch.inference_mode()
    def _capture(self) -> Function:
        """Return a step of all slots, of tokens and positions (B,), as a CUDA graph. It writes into the cache."""
        inputs = torch.zeros(2, self.slots, dtype=torch.long, device=self._device)
        return capture(lambda tokens, positions: (self._step(tokens, positions, self._model.max_len),), *inputs)


class _Block:
    """A TransformerBlock's forward pass without dropout, from other matrices of the same weights."""

    def __init__(self, block: TransformerBlock, quantization: Quantization) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.n_heads = attention.n_heads
        self.layer_norm1, self.layer_norm2 = block.layer_norm1, block.layer_norm2
        qkv = (attention.w_q, attention.w_k, attention.w_v)
        bias = None if attention.w_q.bias is None else torch.cat([projection.bias for projection in qkv])
        self.w_qkv = make_linear(torch.cat([projection.weight for projection in qkv]), bias, quantization)
        self.w_o = make_linear(attention.w_o.weight, attention.w_o.bias, quantization)
        first, second = feed_forward.linear1, feed_forward.linear2
        self.linear1 = make_linear(first.weight, first.bias, quantization, feed_forward.approximation)
        self.linear2 = make_linear(second.weight, second.bias, quantization)

    def __call__(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """Map (R, T, C) to (R, T, C); attention maps (R, T, 3, H, D) to (R, H, T, D)."""
        heads = attention(self.w_qkv(self.layer_norm1(x)).unflatten(-1, (3, self.n_heads, -1)))
        x = x + self.w_o(heads.transpose(1, 2).flatten(2))
        return x + self.linear2(self.linear1(self.layer_norm2(x)))
