"""Causal attention with dropout on its weights, for CPUs: a block of queries at a time.

PyTorch's fused CPU kernel takes no dropout. Its plain path keeps several (T, T) matrices for each head, and drawing the
dropout takes longer than the matmuls. Here keys after the block are skipped, dropout costs a random byte a weight, and
one matrix is kept for the backward pass, in the dtype of q: the weights, those that were dropped with a minus sign.

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

BLOCK_QUERIES = 64


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
        ctx.scales = q.shape[-1] ** -0.5, 256 / (256 - dropped)
        heads = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (G, T, D)
        q, v = q * ctx.scales[0], v * ctx.scales[1]  # here, not each score and weight
        outs, kept = [], []
        for block, seen in _blocks(q.shape[1]):
            scores = q[:, block] @ k[:, seen].mT  # (G, R, S)
            last = scores[:, :, block]  # (G, R, R)
            last += last.new_full(last.shape[1:], -math.inf).triu(1)
            kept.append(torch.softmax(scores, -1, out=scores).mul_(_draw_signs(scores.shape, dropped)))
            outs.append(kept[-1].relu() @ v[:, seen])
        out = torch.cat(outs, 1)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *kept = ctx.saved_tensors
        out_gradient, dtype = gradients[0].flatten(0, 1), at_least_float32(q.dtype)
        means = (out_gradient * out).sum(-1, keepdim=True)  # (G, T, 1), added up in float32
        q_gradients, k_gradient, v_gradient = [], torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for (block, seen), signed in zip(_blocks(q.shape[1]), kept, strict=True):
            gradient, weights = out_gradient[:, block], signed.relu()  # (G, R, D), (G, R, S)
            v_gradient[:, seen] += weights.mT @ gradient
            scores_gradient = (gradient @ v[:, seen].mT).mul_(weights)
            scores_gradient.addcmul_(signed.abs(), means[:, block], value=-1)
            q_gradients.append(scores_gradient @ k[:, seen])
            k_gradient[:, seen] += scores_gradient.mT @ q[:, block]
        q_gradient = torch.cat(q_gradients, 1).mul_(ctx.scales[0])
        found = q_gradient, k_gradient.to(k.dtype), v_gradient.mul_(ctx.scales[1]).to(v.dtype)
        return *(x.unflatten(0, gradients[0].shape[:2]) for x in found), None


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys that they see."""
    for start in range(0, length, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, length)
        yield slice(start, stop), slice(0, stop)


def _draw_signs(shape: torch.Size, dropped: int) -> Tensor:
    """Return bytes: -1 with probability dropped / 256, else 1. PyTorch's own booleans take far longer."""
    count = math.prod(shape)
    draws = torch.empty(math.ceil(count / 8), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.uint8)[:count].view(shape).ge_(dropped).view(torch.int8).mul_(2).sub_(1)
