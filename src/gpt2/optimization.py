"""The learning rate at each step, and which optimizer moves which parameter: pure functions."""

from collections.abc import Sequence

import torch
from torch import nn

from gpt2.config import TrainParams
from gpt2.muon import Muon

BETAS = (0.9, 0.95)  # Brown et al. 2020, appendix B


def learning_rate_at(step: int, params: TrainParams) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, constant, then linear decay towards zero.

    The decay takes the last decay_fraction of max_steps (Hu et al. 2024, "MiniCPM", section 4).
    """
    warmup = (step + 1) / (params.warmup_steps + 1)
    decay_steps = params.decay_fraction * params.max_steps
    decay = (params.max_steps - step) / decay_steps if decay_steps else 1.0
    return params.learning_rate * min(1.0, warmup, decay)


def build_optimizers(
    model: nn.Module, name: str, weight_decay: float, precision: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Return the optimizers which together hold every parameter once; set each group's "lr" before a step.

    "muon" moves the blocks' matrices, with products in `precision`; all else is AdamW's (Loshchilov & Hutter 2019).
    Only matrices decay; embeddings, norms and biases do not.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices, decayed, kept = [], [], []
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings:
            kept.append(parameter)
        elif name == "muon" and "transformer_blocks" in parameter_name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=BETAS, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, weight_decay, precision))
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
