"""The training loop. It knows batches, a loss, checkpoints and a place to log to; not attention, files or MLflow.

Shapes: B batch, T positions.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpt2.config import ModelConfig, RuntimeParams, TrainParams
from gpt2.core.cli import stop_requests
from gpt2.core.device import (
    autocast,
    check_memory,
    choose_device,
    choose_micro_batch_size,
    choose_precision,
    peak_memory_bytes,
)
from gpt2.core.errors import Stopped, UserError
from gpt2.data.batches import Tokens, TrainingBatches, validation_batches
from gpt2.model.gpt2 import GPT2Model, shapes_only
from gpt2.model.seen_tokens import TextVocabulary
from gpt2.training.bigrams import start_from_bigrams
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.cuda_graph import Function, record
from gpt2.training.history import History, LogMetrics
from gpt2.training.loss import linear_cross_entropy, perplexity, token_cross_entropy
from gpt2.training.optimizers import build_optimizers, schedule, set_learning_rates


def build_model(config: ModelConfig, params: TrainParams, device: torch.device) -> GPT2Model:
    """Return the model before its first step. Raises UserError if its training cannot fit into memory."""
    with shapes_only():
        parameters = GPT2Model(**config.model_dump()).count_parameters()
    weights_bytes = parameters * 4 * 3  # with gradients and the least that an optimizer keeps
    micro_batch_size = choose_micro_batch_size(params.micro_batch_size, device)
    micro_batch_tokens = min(micro_batch_size, params.batch_size) * params.sequence_length
    activations_bytes = micro_batch_tokens * config.d_model * config.n_layers * 4
    batch_bytes = params.batch_size * params.sequence_length * 8  # of int64
    check_memory(weights_bytes + activations_bytes + batch_bytes, device)
    torch.manual_seed(params.seed)
    return GPT2Model(**config.model_dump())


def train(
    model: GPT2Model,
    train_tokens: Tokens,
    val_tokens: Tokens,
    params: TrainParams,
    runtime: RuntimeParams,
    checkpoints: Checkpoints,
    log_metrics: LogMetrics,
) -> tuple[dict[str, float], History]:
    """Train `model` in place for params.max_steps optimizer steps; return the final metrics and all that was logged.

    If there is a checkpoint, training goes on from it, and log_metrics first gets again what was logged before it.
    log_metrics(step, metrics) gets "train/..." every log_interval steps and "val/loss" every eval_interval steps, on
    eval_windows windows; after the last step it gets both, "val/loss" on the whole split. (It gets no "train/..." where
    all steps since the last time were left out as bad.) A metric's step counts the steps done, bad ones too. Losses are
    nats per token. The resulting weights depend on the model, the tokens, params and the kind of device alone, not on
    interruptions; on a GPU, whose sums may come in another order, to rounding.
    Raises UserError if a split is too short for one window, what params ask for is not available here, the validation
    loss is not finite, or the loss or gradient of more than max_bad_steps steps is not; Stopped on Ctrl-C or SIGTERM,
    after saving a checkpoint; OSError if none can be saved.
    """
    device = choose_device(runtime.device)
    precision = choose_precision(runtime.precision, device)
    micro_batch_size = choose_micro_batch_size(params.micro_batch_size, device)
    compiled = params.compile
    if compiled:
        for block in model.transformer_blocks:
            block.compile()
    batches = TrainingBatches(train_tokens, params.batch_size, params.sequence_length, params.seed)
    vocabulary = TextVocabulary.of_text(train_tokens, model.token_embedding.num_embeddings, device)
    optimizers = build_optimizers(model.to(device), params, precision)
    meter = Meter(batch_tokens=params.batch_size * params.sequence_length)
    history: History = []
    val_batches = partial(validation_batches, val_tokens, micro_batch_size, params.sequence_length)
    val_batches()  # raises now, not at the first validation

    def log(step: int, metrics: dict[str, float]) -> None:
        history.append((step, metrics))
        log_metrics(step, metrics)

    def validate(max_windows: int | None) -> float:
        with meter.paused(), autocast(device, precision):
            return mean_loss(model, vocabulary, val_batches(max_windows))

    def clipped_gradients(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss () and the gradient's norm () before it is clipped."""
        model.zero_grad()
        with autocast(device, precision):
            loss = accumulate_gradients(model, vocabulary, inputs, targets, micro_batch_size, compiled)
        return loss, nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip)

    def check_finite(name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {step}, learning rate "
                f"{params.learning_rate * schedule(step - 1, params):g}; "
                f"{checkpoints.last()}; try a lower train.learning_rate"
            )

    def check_steps() -> None:
        for step, loss, norm in meter.unread():
            check_finite("loss", loss, step)
            check_finite("gradient's norm", norm, step)

    def peak_bytes() -> int:
        return max(earlier_peak_bytes, peak_memory_bytes(device))

    def save(step: int) -> None:
        with meter.paused():
            notes = {"history": history, "meter": meter.state(), "peak_memory_bytes": peak_bytes()}
            checkpoints.save(step, model, optimizers, notes)

    start, earlier_peak_bytes = 0, 0
    if restored := checkpoints.restore(model, optimizers):
        start, notes = restored
        print(f"going on after step {start}, restored from {checkpoints.folder}", flush=True)
        meter.restore(notes["meter"])
        earlier_peak_bytes = notes["peak_memory_bytes"]
        for step, metrics in notes["history"]:
            log(step, metrics)
    else:
        with meter.paused():
            if params.initialization == "bigrams":
                print("computing the start from bigrams; on a CPU this takes a minute or two", flush=True)
                torch.manual_seed(params.seed)
                start_from_bigrams(model, train_tokens)
            vocabulary.make_unseen_equal(model.output_projection.weight)

    model.train()
    compute: Function = clipped_gradients
    if device.type == "cuda" and start < params.max_steps:
        with meter.paused():
            compute = record(clipped_gradients, *(tokens.to(device) for tokens in batches(start)))
    done, steps = start, range(start, params.max_steps)
    progress = tqdm(steps, "train", params.max_steps, initial=start, unit="step", dynamic_ncols=True, mininterval=1)
    with stop_requests() as stop_signal:
        for step in progress:
            torch.manual_seed(params.seed + step)  # dropout too is a pure function of (seed, step)
            set_learning_rates(optimizers, step, params)
            loss, norm = compute(*batches(step))
            done = step + 1
            progress.disable = stop_signal() != 0  # Ctrl-C may have ended its reader too; now saving matters
            for optimizer in optimizers:
                optimizer.step()
            meter.add(done, loss, norm)

            last = done == params.max_steps
            if (last or done % params.log_interval == 0) and meter.unread():
                check_steps()
                train_loss, tokens_per_second = meter.read()
                progress.set_postfix(loss=f"{train_loss:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
                log(
                    done,
                    {
                        "train/loss": train_loss,
                        "train/learning_rate": params.learning_rate * schedule(step, params),
                        "train/tokens_per_second": tokens_per_second,
                    },
                )
            if last or done % params.eval_interval == 0:
                check_steps()
                if last:
                    progress.write("validating on the whole split")
                val_loss = validate(None if last else params.eval_windows)
                check_finite("validation loss", val_loss, done)
                log(done, {"val/loss": val_loss})
            stopping = stop_signal()
            if last or stopping or done % params.checkpoint_interval == 0:
                check_steps()
                save(done)
            if stopping:
                break
        if stopping := stop_signal():  # also while the last step was saved
            progress.close()
            raise Stopped(stopping, f"stopped after step {done}, which is saved: the same command goes on from it")

    final = {name: value for _, metrics in history for name, value in metrics.items()}
    metrics = {
        "train_loss": final["train/loss"],
        "val_loss": final["val/loss"],
        "val_perplexity": perplexity(final["val/loss"]),
        "steps": params.max_steps,
        "tokens": params.max_steps * meter.batch_tokens,
        "tokens_per_second": meter.tokens_per_second(),
        "peak_memory_bytes": peak_bytes(),
        "parameters": model.count_parameters(),
    }
    return metrics, history


def accumulate_gradients(
    model: GPT2Model,
    vocabulary: TextVocabulary,
    inputs: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    compiled: bool = False,
) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters, a micro-batch at a time; return that loss ().

    inputs and targets are (B, T); every target occurs in the training text.
    """
    device = vocabulary.ids.device
    total = torch.zeros((), device=device)
    weight_rows = vocabulary.rows(model.output_projection.weight)
    rows = weight_rows.detach().requires_grad_()  # whose gradient goes on to the whole weight only once, in the end
    for micro_batch in zip(inputs.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
        x, y = (tokens.to(device) for tokens in micro_batch)
        features = model.features(x).flatten(0, 1)
        loss = linear_cross_entropy(features, rows, vocabulary.row_of[y.flatten()], vocabulary.last_count, compiled)
        loss = loss * (len(x) / len(inputs))
        loss.backward()
        total += loss.detach()
    weight_rows.backward(rows.grad)
    return total


@torch.no_grad()
def mean_loss(model: GPT2Model, vocabulary: TextVocabulary, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss of all tokens in batches of inputs and targets (B, T), without dropout."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    device, rows = vocabulary.ids.device, vocabulary.rows(model.output_projection.weight)
    for x, y in batches:
        features, targets = model.features(x.to(device)).flatten(0, 1), vocabulary.row_of[y.to(device).flatten()]
        losses = token_cross_entropy(features, rows, targets, vocabulary.last_count)
        total += losses.cpu().double().sum()
        count += len(losses)
    model.train(was_training)
    return float(total / count)


class Meter:
    """Mean loss since the last reading; tokens per second since then, and over all. Pauses do not count."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._on_device: list[tuple[int, Tensor, Tensor]] = []
        self._unread: list[tuple[int, float, float]] = []
        self._steps, self._seconds = 0, 0.0
        self._started = time.perf_counter()

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Count one step. Loss and norm () stay on their device: reading them would wait for it."""
        self._on_device.append((step, loss, norm))

    def unread(self) -> list[tuple[int, float, float]]:
        """Return step, loss and gradient norm of the steps since the last reading; wait for the device once."""
        if self._on_device:
            steps, losses, norms = zip(*self._on_device, strict=True)
            values = torch.stack([*losses, *norms]).tolist()
            self._unread += zip(steps, values[: len(steps)], values[len(steps) :], strict=True)
            self._on_device = []
        return self._unread

    def read(self) -> tuple[float, float]:
        """Return the mean loss and the tokens per second of the steps added since the last reading."""
        losses = [loss for _, loss, _ in self.unread()]
        seconds = time.perf_counter() - self._started
        self._steps, self._seconds = self._steps + len(losses), self._seconds + seconds
        self._unread, self._started = [], time.perf_counter()
        return math.fsum(losses) / len(losses), len(losses) * self.batch_tokens / seconds

    def tokens_per_second(self) -> float:
        """Return the tokens per second of all steps read so far."""
        return self._steps * self.batch_tokens / self._seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        self.unread()  # waits for a GPU's steps, whose time counts
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON can hold it."""
        return {
            "unread": self.unread(),
            "seconds_unread": time.perf_counter() - self._started,
            "steps": self._steps,
            "seconds": self._seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._unread = [(step, loss, norm) for step, loss, norm in state["unread"]]
        self._started = time.perf_counter() - state["seconds_unread"]
        self._steps, self._seconds = state["steps"], state["seconds"]
