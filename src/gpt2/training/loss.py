"""The next-token loss, fused with the output projection: logits exist a chunk of rows at a time.

At GPT-2's vocabulary the softmax is bound by memory, not arithmetic. A chunk's gradient takes its logits' place in the
forward pass and is used up there (Hsu et al. 2024, "Liger Kernel"); the backward pass only scales.

Shapes: B batch, T positions, N = B * T rows, C d_model, V vocabulary, M rows of weights that tell tokens apart
(seen_tokens.py), R rows of a chunk.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.core.device import ALIGNED_COLUMNS, at_least_float32
from gpt2.model.seen_tokens import SeenTokens

CHUNK_BYTES = 2**28  # of logits at most: enough rows for fast matmuls, few enough for little memory
CACHED_ROWS = 32  # whose softmax stays in a processor's cache


class FusedCrossEntropy:
    """The mean cross-entropy of all tokens, as GPT2Model.loss gives it, in less time and memory.

    The weight's rows of unseen tokens must be equal. Gradients are computed in the forward pass where they are enabled.
    Matmuls run in autocast's dtype where it is on; the softmax and the sums never below float32. If `compiled`, a
    CUDA device computes the softmax by torch.compile, which reads the logits less often.
    """

    def __init__(self, seen_tokens: SeenTokens, compiled: bool = False) -> None:
        device = seen_tokens.ids.device
        self.seen_tokens = seen_tokens
        self.softmax = torch.compile(_softmax_) if compiled and device.type == "cuda" else _softmax_
        # One for all steps: allocating it in each would fragment the memory, and a captured CUDA graph writes there.
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the loss () in nats of targets (B, T), given (B, T, C) and the output projection (V, C)."""
        inputs, with_gradient = hidden_states.flatten(0, 1), torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(inputs, weight, targets.flatten(), self, with_gradient)

    def logits_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return memory for a chunk's logits (R, M), with N rows split into as few equal chunks as fit there."""
        buffer = self._buffer.view(dtype)
        # MPS before macOS 15 writes no product into rows that are apart.
        stride = columns if buffer.device.type == "mps" else math.ceil(columns / ALIGNED_COLUMNS) * ALIGNED_COLUMNS
        chunks = math.ceil(rows / (len(buffer) // stride))
        chunk = math.ceil(rows / chunks)
        return buffer[: chunk * stride].view(chunk, stride)[:, :columns]


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy () of targets (N,) under the logits hidden_states (N, C) @ weight (V, C).T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        fused: FusedCrossEntropy,
        with_gradient: bool,
    ) -> Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        inputs, matrix = hidden_states.to(dtype), fused.seen_tokens.rows(weight).to(dtype)
        labels = fused.seen_tokens.row_of[targets]
        logits_buffer = fused.logits_buffer(len(inputs), len(matrix), dtype)
        total = inputs.new_zeros((), dtype=at_least_float32(dtype))
        gradients: list[Tensor] = []
        rows_gradient: Tensor | None = None
        with torch.autocast(device, enabled=False):
            chunks = zip(inputs.split(len(logits_buffer)), labels.split(len(logits_buffer)), strict=True)
            for rows, chunk_labels in chunks:
                logits = torch.mm(rows, matrix.T, out=logits_buffer[: len(rows)])  # (R, M)
                total += fused.softmax(logits, chunk_labels, fused.seen_tokens.last_count, 1 / len(inputs))
                if with_gradient:
                    gradients.append((logits @ matrix).to(hidden_states.dtype))
                    part = logits.T @ rows
                    rows_gradient = part.to(weight.dtype) if rows_gradient is None else rows_gradient.add_(part)
        if with_gradient:
            ctx.save_for_backward(torch.cat(gradients), rows_gradient)
            ctx.seen_tokens = fused.seen_tokens
        return total / len(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_states_gradient, rows_gradient = ctx.saved_tensors
        weight_gradient = ctx.seen_tokens.weight_gradient(rows_gradient * gradients[0])
        return hidden_states_gradient * gradients[0], weight_gradient, None, None, None


def _softmax_(logits: Tensor, labels: Tensor, last_count: int, scale: float) -> Tensor:
    """Return the summed loss () of logits (R, M), and overwrite them with its gradient times scale.

    The last column counts last_count times.
    """
    cached = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    total = logits.new_zeros((), dtype=at_least_float32(logits.dtype))
    for rows, label in zip(logits.split(cached), labels[:, None].split(cached), strict=True):
        values = rows.to(total.dtype)  # the same memory if the logits are as exact
        largest, label_logits = values.amax(1, keepdim=True), values.gather(1, label)
        values.sub_(largest).exp_()
        values[:, -1] *= last_count
        sums = values.sum(1, keepdim=True)
        total += (sums.log() + largest - label_logits).sum()
        factors = scale / sums
        label_gradients = values.gather(1, label) * factors - scale
        torch.mul(values, factors, out=rows).scatter_(1, label, label_gradients.to(rows.dtype))
    return total
