"""Causal attention with dropout on its weights, computed on a CPU a block of queries at a time.

PyTorch's fast CPU kernel takes no dropout; its plain path keeps several (T, T) matrices for each head and spends longer
on drawing the dropout than on the products. Here a block's weights stay in the cache and are computed again in the
backward pass (Dao et al. 2022, "FlashAttention"), keys later than the block are left out, and a dropped weight costs
one random byte.

Shapes: B batch, H heads, T positions, D head size, G = B * H, R queries of a block, S keys up to the block's end.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.core.device import exact_format
from gpt2.training.dropout import draw_mask, keep_scale

BLOCK_QUERIES = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v (B, H, T, D) of q, k, v (B, H, T, D), each position seeing none after it.

    `dropout` is the part of the weights that is left out (Vaswani et al. 2017, section 3.2.1; Zehui et al. 2019).
    """
    if dropout == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return _DropoutAttention.apply(q, k, v, dropout)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        heads, scale = q.shape[:2], keep_scale(dropout)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (G, T, D)
        outs, masks = [], []
        for _, seen, weights in _blocks(q, k):
            masks.append(draw_mask(weights.shape, dropout))
            outs.append(weights.mul_(masks[-1]).mul_(scale).to(v.dtype) @ v[:, seen])
        out = torch.cat(outs, 1)
        ctx.save_for_backward(q, k, v, out, *masks)
        ctx.scale = scale
        return out.unflatten(0, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *masks = ctx.saved_tensors
        out_gradient, exact = gradients[0].flatten(0, 1), exact_format(q)
        q_gradients, k_gradient, v_gradient = [], torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for (block, seen, weights), mask in zip(_blocks(q, k), masks, strict=True):
            gradient = out_gradient[:, block]  # (G, R, D)
            kept = (weights * mask).mul_(ctx.scale)
            mean = (gradient * out[:, block]).sum(-1, keepdim=True, dtype=exact)
            scores_gradient = (gradient @ v[:, seen].mT).to(exact).mul_(kept).addcmul_(weights, mean, value=-1)
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
        scores = (q[:, block] @ k[:, seen].mT).to(exact_format(q)).mul_(q.shape[-1] ** -0.5)
        last = scores[:, :, block]  # (G, R, R)
        last += last.new_full(last.shape[1:], -math.inf).triu(1)
        yield block, seen, scores.softmax(-1)
