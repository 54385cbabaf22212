"""The learning rate at each step, and which optimizer moves which parameter."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from gpt2.config import TrainParams
from gpt2.model.gpt2 import GPT2Model
from gpt2.training.muon import Muon

BETAS = (0.9, 0.95)  # Brown et al. 2020, appendix B


def learning_rate_factor(step: int, params: TrainParams) -> float:
    """Return what learning rates are multiplied by at step `step` (from 0): linear warm-up, 1, linear decay to zero.

    The decay takes the last decay_fraction of max_steps (Hu et al. 2024, "MiniCPM", section 4).
    """
    warmup = (step + 1) / (params.warmup_steps + 1)
    decay_steps = params.decay_fraction * params.max_steps
    decay = (params.max_steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, warmup, decay)


def steps_before_decay(params: TrainParams) -> int:
    """Return the number of first steps that a longer training has too: those before the decay, without the last."""
    return params.max_steps - max(1, math.ceil(params.decay_fraction * params.max_steps))


def build_optimizers(model: GPT2Model, params: TrainParams, precision: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return the optimizers which together hold every parameter once; give them their learning rates before a step.

    "muon" updates the blocks' matrices, with matmuls in `precision`; all else is AdamW's (Loshchilov & Hutter 2019).
    Only matrices decay; embeddings, norms and biases do not.
    """
    blocks = list(model.transformer_blocks.parameters())
    matrices, vectors = ([p for p in blocks if p.dim() == dim] for dim in (2, 1))
    embeddings = [model.token_embedding.weight, model.position_embedding.weight, *model.layer_norm.parameters()]
    is_tied = model.output_projection.weight is model.token_embedding.weight
    projection = [] if is_tied else [model.output_projection.weight]
    of_matrices: dict[str, Any] = {"params": matrices, "rate": "learning_rate", "weight_decay": params.weight_decay}
    of_others: list[dict[str, Any]] = [
        {"params": vectors, "rate": "learning_rate", "weight_decay": 0.0},
        {"params": projection, "rate": "embedding_learning_rate", "weight_decay": params.weight_decay},
        {"params": embeddings, "rate": "embedding_learning_rate", "weight_decay": 0.0},
    ]
    if params.optimizer == "muon":
        return [torch.optim.AdamW(of_others, betas=BETAS, fused=True), Muon([of_matrices], precision)]
    return [torch.optim.AdamW([of_matrices, *of_others], betas=BETAS, fused=True)]


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], step: int, params: TrainParams) -> None:
    """Give every parameter group its learning rate at that step, from the parameter that its "rate" names."""
    factor = learning_rate_factor(step, params)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = getattr(params, group["rate"]) * factor
