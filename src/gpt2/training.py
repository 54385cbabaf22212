"""The training loop. It knows batches, a loss and a place to log to; not attention, files or MLflow.

Shapes: B batch, T positions, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import trange

from gpt2.batches import Tokens, TrainingBatches, validation_batches
from gpt2.cli import UserError
from gpt2.config import TrainParams
from gpt2.loss import linear_cross_entropy, perplexity
from gpt2.model import GPT2Model
from gpt2.optimization import build_optimizers, learning_rate_at, set_learning_rate
from gpt2.runtime import autocast, choose_device, choose_precision, peak_memory_bytes

LogMetrics = Callable[[int, dict[str, float]], None]


def train(
    model: GPT2Model, train_tokens: Tokens, val_tokens: Tokens, params: TrainParams, log_metrics: LogMetrics
) -> dict[str, float]:
    """Train `model` in place for params.max_steps optimizer steps and return the final metrics.

    log_metrics(step, metrics) gets "train/..." every log_interval steps and "val/loss" every eval_interval steps, on
    eval_windows windows; after the last step it gets both, "val/loss" on the whole split. A metric's step counts the
    optimizer steps done. Losses are nats per token. The resulting weights depend on the arguments alone.
    Raises UserError if a split is too short for one window or the loss is not finite.
    """
    device = choose_device(params.device)
    precision = choose_precision(params.precision, device)
    batches = TrainingBatches(train_tokens, params.batch_size, params.sequence_length, params.seed)
    optimizers = build_optimizers(model.to(device), params.optimizer, params.weight_decay)
    meter = Meter(batch_tokens=params.batch_size * params.sequence_length)

    def validate(max_windows: int | None) -> float:
        with meter.paused(), autocast(device, precision):
            windows = validation_batches(val_tokens, params.micro_batch_size, params.sequence_length, max_windows)
            return mean_loss(model, windows, device)

    model.train()
    progress = trange(params.max_steps, desc="train", unit="step", dynamic_ncols=True, mininterval=1)
    for step in progress:
        torch.manual_seed(params.seed + step)  # dropout too is a pure function of (seed, step)
        rate = learning_rate_at(step, params)
        set_learning_rate(optimizers, rate)
        with autocast(device, precision):
            loss = accumulate_gradients(model, *batches(step), params.micro_batch_size, device)
        nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        meter.add(loss)

        done = step + 1
        last = done == params.max_steps
        if last or done % params.log_interval == 0:
            train_loss, tokens_per_second = meter.read()
            check_finite(train_loss, done, rate)
            progress.set_postfix(loss=f"{train_loss:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
            log_metrics(
                done,
                {
                    "train/loss": train_loss,
                    "train/learning_rate": rate,
                    "train/tokens_per_second": tokens_per_second,
                },
            )
        if last or done % params.eval_interval == 0:
            val_loss = validate(None if last else params.eval_windows)
            check_finite(val_loss, done, rate)
            log_metrics(done, {"val/loss": val_loss})
    return {
        "train_loss": train_loss,
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "steps": params.max_steps,
        "tokens": params.max_steps * meter.batch_tokens,
        "tokens_per_second": meter.tokens_per_second(),
        "peak_memory_bytes": peak_memory_bytes(device),
        "parameters": model.count_parameters(),
    }


def accumulate_gradients(
    model: GPT2Model, inputs: Tensor, targets: Tensor, micro_batch_size: int, device: torch.device
) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters, a micro-batch at a time; return that loss ().

    inputs and targets are (B, T) on the CPU.
    """
    total = torch.zeros((), device=device)
    for x, y in zip(inputs.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
        loss = next_token_loss(model, x.to(device), y.to(device)) * (len(x) / len(inputs))
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: GPT2Model, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Return the mean loss of all tokens in batches of inputs and targets (B, T), without dropout."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x, y in batches:
        total += next_token_loss(model, x.to(device), y.to(device)).double().cpu() * y.numel()
        count += y.numel()
    model.train(was_training)
    return float(total / count)


def next_token_loss(model: GPT2Model, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy () in nats of targets (B, T)."""
    features = model.features(inputs)
    return linear_cross_entropy(features.flatten(0, 1), model.output_projection.weight, targets.flatten())


def check_finite(loss: float, step: int, rate: float) -> None:
    """Raise UserError if the loss seen after `step` steps is not a number to go on with."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}, learning rate {rate:g}: try a lower train.learning_rate")


class Meter:
    """Mean loss and tokens per second since the last reading, and over all; time spent paused does not count."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._losses: list[Tensor] = []
        self._steps, self._seconds = 0, 0.0
        self._started = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Count one step. The loss () stays on its device, unread: reading it would wait for the device."""
        self._losses.append(loss)

    def read(self) -> tuple[float, float]:
        """Return the mean loss and the tokens per second of the steps added since the last reading."""
        loss, steps = float(torch.stack(self._losses).mean()), len(self._losses)
        seconds = time.perf_counter() - self._started
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._losses, self._started = [], time.perf_counter()
        return loss, steps * self.batch_tokens / seconds

    def tokens_per_second(self) -> float:
        """Return the tokens per second of all steps read so far."""
        return self._steps * self.batch_tokens / self._seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began
