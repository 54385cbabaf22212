"""The learning rate at each step, and which optimizer moves which parameter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

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


def build_optimizers(model: GPT2Model, params: TrainParams, precision: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return the optimizers which together hold every parameter once; give them their learning rates before a step.

    "muon" updates the blocks' matrices, with matmuls in `precision`; all else is AdamW's (Loshchilov & Hutter 2019).
    Only matrices decay; embeddings, norms and biases do not.
    """
    embeddings = {id(model.token_embedding.weight), id(model.position_embedding.weight)}
    blocks = {id(parameter) for parameter in model.transformer_blocks.parameters()}
    groups: dict[tuple[str, str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        in_block, is_matrix = id(parameter) in blocks, parameter.dim() == 2 and id(parameter) not in embeddings
        optimizer = params.optimizer if in_block and is_matrix else "adamw"
        rate = "learning_rate" if in_block else "embedding_learning_rate"
        groups.setdefault((optimizer, rate, params.weight_decay if is_matrix else 0.0), []).append(parameter)

    def of(name: str) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "rate": rate, "weight_decay": weight_decay}
            for (optimizer, rate, weight_decay), parameters in groups.items()
            if optimizer == name
        ]

    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(of("adamw"), betas=BETAS, fused=True)]
    if params.optimizer == "muon":
        optimizers.append(Muon(of("muon"), precision))
    return optimizers


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], step: int, params: TrainParams) -> None:
    """Give every parameter group its learning rate at that step, from the parameter which its "rate" names."""
    factor = learning_rate_factor(step, params)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = getattr(params, group["rate"]) * factor
