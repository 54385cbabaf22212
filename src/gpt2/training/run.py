"""A whole training: its device, its first weights or last checkpoint, its faster parts, its signals.

Shapes: N tokens of a split, V vocabulary.
"""

import json
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from gpt2.config import ModelConfig, RuntimeParams, TrainParams
from gpt2.core.cli import stop_requests
from gpt2.core.device import check_memory, choose_micro_batch_size, choose_precision
from gpt2.core.errors import UserError
from gpt2.data.batches import Purpose, SeenMask, Tokens, seed_torch
from gpt2.model.gpt2 import GPT2Model, MultiHeadAttention
from gpt2.model.seen_tokens import SeenTokens
from gpt2.model.weights import shapes_only
from gpt2.training import distributed, parallel
from gpt2.training.attention import causal_attention
from gpt2.training.bigrams import initialize_from_bigrams
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.history import History, LogMetrics, LogWeights
from gpt2.training.loss import FusedCrossEntropy
from gpt2.training.trainer import Trainer, train, validate
from gpt2.training.training_log import TrainingLog


def build_model(config: ModelConfig, params: TrainParams, device: torch.device) -> GPT2Model:
    """Return a model with random weights on the device. Raises UserError if its training cannot fit into memory."""
    with shapes_only():
        parameters = GPT2Model(**config.model_dump()).count_parameters()
    is_sharded = params.parallel == "fsdp" and distributed.is_started()
    weights_bytes = parameters * 4 * 3  # with gradients and the least that an optimizer keeps
    weights_bytes //= distributed.world_size() if is_sharded else 1
    micro_batch_size = min(choose_micro_batch_size(params.micro_batch_size, device), params.batch_size)
    activations_bytes = micro_batch_size * params.sequence_length * config.d_model * config.n_layers * 4
    batch_bytes = params.batch_size * params.sequence_length * 8  # of int64
    check_memory(weights_bytes + activations_bytes + batch_bytes, device)
    seed_torch(params.seed, Purpose.WEIGHTS)
    if is_sharded:
        return parallel.sharded_model(config, device)
    return GPT2Model(**config.model_dump()).to(device)


def check_shape(config: ModelConfig, given: ModelConfig, name: str) -> None:
    """Raise UserError if weights of the shape `given`, which train.init_from names, do not fit a model of `config`.

    Its dropout may be another one, and its max_len less: see take_weights.
    """
    fixed = given.model_dump(exclude={"vocab_size", "dropout", "max_len"})
    if config.max_len > given.max_len:
        fixed["max_len"] = given.max_len
    changes = [f"model.{key} {json.dumps(value)}" for key, value in fixed.items() if getattr(config, key) != value]
    if changes:
        raise UserError(f"train.init_from {name} has another shape: set {', '.join(changes)}".replace('"', ""))


def take_weights(model: GPT2Model, given: GPT2Model | None) -> None:
    """Give a model the weights of one of the same shape, which the first process has; of its positions, the first."""
    for name, parameter in model.named_parameters():
        whole = given.get_parameter(name).data[: len(parameter)] if given else None
        parallel.fill(parameter, whole)


def run_training(
    model: GPT2Model,
    train_tokens: Tokens,
    val_tokens: Tokens,
    seen: SeenMask,
    params: TrainParams,
    runtime: RuntimeParams,
    checkpoints: Checkpoints,
    log_metrics: LogMetrics,
    log_weights: LogWeights = lambda step: None,
) -> tuple[dict[str, float], History]:
    """Train `model` on its device for params.max_steps optimizer steps, or until params.patience runs out.

    Return the final metrics and what was logged; the model then has the weights that params.keep names.

    `seen` (V,) tells which tokens need rows of their own in the output projection: those of the training split, and of
    what an earlier training knows (keep_rows). If there is a checkpoint, the training resumes from it, and
    log_metrics(step, metrics) first receives the logged history again. log_weights(step) is called when the model's
    weights are to be logged. On a CPU, the weights depend on the model, the tokens, params, threads and precision
    alone, not on interruptions; on a GPU, whose sums may come in another order, to rounding. Raises UserError if a
    split is too short for one window or a loss or gradient is not finite; Stopped on Ctrl-C or SIGTERM, after saving a
    checkpoint; OSError if none can be saved.
    """
    device = model.token_embedding.weight.device
    precision = choose_precision(runtime.precision, device)
    trainer = Trainer(model, train_tokens, val_tokens, params, precision, checkpoints)
    log = TrainingLog(params, device, checkpoints, log_metrics)
    seen_tokens = SeenTokens(torch.from_numpy(seen).to(device))
    if params.fused:
        use_fused_parts(model, seen_tokens, params.compile)
    if params.activation_checkpointing:
        checkpoint_activations(model)
    if params.compile:
        for block in model.transformer_blocks:
            block.compile()
    with log.paused():
        if restored := checkpoints.restore(model, trainer.optimizers, trainer.best):
            start, log_state = restored
            print(f"resuming after step {start}, from {checkpoints.folder}", flush=True)
            log.restore(log_state)
        else:
            start = 0
            print("starting at step 0: there is no checkpoint of this training", flush=True)
            initialize(model, train_tokens, seen_tokens, params)
            validate(trainer, log, 0)
        can_capture = not distributed.is_started() and not params.activation_checkpointing
        if device.type == "cuda" and can_capture and not log.is_over(start):
            trainer.capture(start)
    with stop_requests() as stop_signal:
        train(trainer, log, start, distributed.agreed_signal(stop_signal), log_weights)
    if log.steps < params.max_steps:
        print(f"stopped early after step {log.steps}: the lowest val/loss is that of step {log.best_step}", flush=True)
    model.load_state_dict(trainer.best, strict=False)  # none, if the last are kept
    return log.final_metrics(trainer.validate()) | {"parameters": model.count_parameters()}, log.history


def initialize(model: GPT2Model, train_tokens: Tokens, seen_tokens: SeenTokens, params: TrainParams) -> None:
    """Give a new model the weights that params.initialization names; its weights are random before.

    Those of params.init_from stay as they are.
    """
    if params.init_from:
        return
    if params.initialization == "bigrams":
        print("initializing from bigrams, which takes a minute or two on a CPU", flush=True)
        if distributed.is_first():
            seed_torch(params.seed, Purpose.INITIALIZATION)
            initialize_from_bigrams(model, train_tokens)
        parallel.copy_from_first(model)
    if params.fused:
        weight = parallel.whole(model.output_projection.weight)
        seen_tokens.equalize(weight)
        parallel.fill(model.output_projection.weight, weight)


def use_fused_parts(model: GPT2Model, seen_tokens: SeenTokens, compiled: bool) -> None:
    """Replace the model's loss and attention by faster ones (loss.py, attention.py)."""
    model.loss = FusedCrossEntropy(seen_tokens, compiled)
    attention = causal_attention
    if compiled and seen_tokens.ids.device.type == "cpu":  # torch.compile fails on its dropout; a GPU has PyTorch's own
        attention = torch.compiler.disable(causal_attention)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.scaled_dot_product_attention = attention


def checkpoint_activations(model: GPT2Model) -> None:
    """Let the backward pass compute each block's activations again, so that none but its input is kept."""
    for block in model.transformer_blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
