"""Causal attention with dropout on its weights, for CPUs: a block of queries at a time.

PyTorch's fused CPU kernel takes no dropout. Its plain path keeps several (T, T) matrices for each head, and drawing the
dropout takes longer than the matmuls. Here a block's weights fit in the cache and are computed again in the backward
pass (Dao et al. 2022, "FlashAttention"), keys after the block are skipped, and dropout costs a random byte a weight.

Shapes: B batch, H heads, T positions, D head size, G = B * H, R queries of a block, S keys up to the block's end.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.core.device import at_least_float32

BLOCK_QUERIES = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = True) -> Tensor:
    """Do what F.scaled_dot_product_attention does for q, k and v (B, H, T, D) with is_causal.

    On a CPU, dropout_p is rounded to a multiple of 1/256.
    """
    assert is_causal
    if dropout_p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    return _DropoutAttention.apply(q, k, v, dropout_p)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        dropped = min(round(dropout_p * 256), 255)  # of the 256 values of a random byte
        ctx.scale = 256 / (256 - dropped)
        heads = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (G, T, D)
        outs, masks = [], []
        for _, seen, weights in _blocks(q, k):
            masks.append(_draw_mask(weights.shape, dropped))
            outs.append(weights.mul_(masks[-1]).mul_(ctx.scale).to(v.dtype) @ v[:, seen])
        out = torch.cat(outs, 1)
        ctx.save_for_backward(q, k, v, out, *masks)
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *masks = ctx.saved_tensors
        out_gradient, dtype = gradients[0].flatten(0, 1), at_least_float32(q.dtype)
        q_gradients, k_gradient, v_gradient = [], torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for (block, seen, weights), mask in zip(_blocks(q, k), masks, strict=True):
            gradient = out_gradient[:, block]  # (G, R, D)
            kept = (weights * mask).mul_(ctx.scale)
            mean = (gradient * out[:, block]).sum(-1, keepdim=True, dtype=dtype)
            scores_gradient = (gradient @ v[:, seen].mT).to(dtype).mul_(kept).addcmul_(weights, mean, value=-1)
            scores_gradient = scores_gradient.mul_(q.shape[-1] ** -0.5).to(q.dtype)
            q_gradients.append(scores_gradient @ k[:, seen])
            k_gradient[:, seen] += scores_gradient.mT @ q[:, block]
            v_gradient[:, seen] += kept.to(v.dtype).mT @ gradient
        found = torch.cat(q_gradients, 1), k_gradient.to(k.dtype), v_gradient.to(v.dtype)
        return *(x.unflatten(0, gradients[0].shape[:2]) for x in found), None


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield for each block its queries, the keys that they see, and their weights (G, R, S) in at least float32."""
    for start in range(0, q.shape[1], BLOCK_QUERIES):
        block = slice(start, min(start + BLOCK_QUERIES, q.shape[1]))
        seen = slice(0, block.stop)
        scores = (q[:, block] @ k[:, seen].mT).to(at_least_float32(q.dtype)).mul_(q.shape[-1] ** -0.5)
        last = scores[:, :, block]  # (G, R, R)
        last += last.new_full(last.shape[1:], -math.inf).triu(1)
        yield block, seen, scores.softmax(-1)


def _draw_mask(shape: torch.Size, dropped: int) -> Tensor:
    """Return a mask of bytes: 0 with probability dropped / 256, else 1. PyTorch's own booleans take far longer."""
    count = math.prod(shape)
    draws = torch.empty(math.ceil(count / 8), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.uint8)[:count].view(shape).ge_(dropped)
