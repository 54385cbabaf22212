"""What a training reports: its history, its speed, its progress bar, and whether its numbers are finite."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gpt2.config import TrainParams
from gpt2.core.device import peak_memory_bytes
from gpt2.training.history import History, LogMetrics
from gpt2.training.optimizers import learning_rate_factor


class NonFiniteError(Exception):
    """A loss or gradient norm that is NaN or infinite; the message names its step."""


class TrainingLog:
    """Takes each step's loss and gradient norm; keeps the history of what is due, and passes it to log_metrics.

    Losses are nats per token; pauses do not count in tokens per second. Methods that read the losses wait for the
    device, and raise NonFiniteError.
    """

    def __init__(self, params: TrainParams, device: torch.device, log_metrics: LogMetrics) -> None:
        self.history: History = []
        self._params, self._device, self._log_metrics = params, device, log_metrics
        self._on_device: list[tuple[int, Tensor, Tensor]] = []
        self._unlogged: list[tuple[int, float, float]] = []
        self._steps, self._seconds, self._earlier_peak_bytes = 0, 0.0, 0
        self._started = time.perf_counter()

    def progress(self, start: int) -> "tqdm[int]":
        """Return the steps from `start` on, with a progress bar."""
        steps, total = range(start, self._params.max_steps), self._params.max_steps
        self._bar = tqdm(steps, "train", total, initial=start, unit="step", dynamic_ncols=True, mininterval=1)
        return self._bar

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Count one step. Loss and norm () stay on their device: reading them would wait for it."""
        self._on_device.append((step, loss, grad_norm))

    def log_training(self, step: int) -> None:
        """Log the means since the last time: loss, gradient norm and speed; and the learning rate of step `step`."""
        self._read()
        _, losses, grad_norms = zip(*self._unlogged, strict=True)
        seconds, steps = time.perf_counter() - self._started, len(losses)
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._unlogged, self._started = [], time.perf_counter()
        loss, tokens_per_second = math.fsum(losses) / steps, steps * self._batch_tokens / seconds
        self._bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
        self._log(
            step,
            {
                "train/loss": loss,
                "train/grad_norm": math.fsum(grad_norms) / steps,
                "train/learning_rate": self._learning_rate(step),
                "train/tokens_per_second": tokens_per_second,
            },
        )

    def log_validation(self, step: int, loss: float) -> None:
        """Log the validation loss after `step` steps."""
        self._check_finite("validation loss", loss, step)
        self._log(step, {"val/loss": loss})

    def silence(self) -> None:
        """Print no more: a signal may have ended the process that reads it."""
        self._bar.disable = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the speed."""
        self._read()  # a GPU's steps, whose time counts
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def final_metrics(self) -> dict[str, float]:
        """Return the metrics for train.json, except the parameter count."""
        last = {name: value for _, metrics in self.history for name, value in metrics.items()}
        return {
            "train_loss": last["train/loss"],
            "val_loss": last["val/loss"],
            "val_perplexity": torch.tensor(last["val/loss"], dtype=torch.float64).exp().item(),  # inf if too large
            "steps": self._params.max_steps,
            "tokens": self._params.max_steps * self._batch_tokens,
            "tokens_per_second": self._steps * self._batch_tokens / self._seconds,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON can hold it."""
        self._read()
        return {
            "history": self.history,
            "unlogged": self._unlogged,
            "seconds_unlogged": time.perf_counter() - self._started,
            "steps": self._steps,
            "seconds": self._seconds,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state, and log its history again."""
        for step, metrics in state["history"]:
            self._log(step, metrics)
        self._unlogged = [(step, loss, grad_norm) for step, loss, grad_norm in state["unlogged"]]
        self._started -= state["seconds_unlogged"]  # no step has been done yet
        self._steps, self._seconds = state["steps"], state["seconds"]
        self._earlier_peak_bytes = state["peak_memory_bytes"]

    @property
    def _batch_tokens(self) -> int:
        return self._params.batch_size * self._params.sequence_length

    def _peak_memory_bytes(self) -> int:
        return max(self._earlier_peak_bytes, peak_memory_bytes(self._device))

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append((step, metrics))
        self._log_metrics(step, metrics)

    def _read(self) -> None:
        """Bring the losses and norms from the device, waiting for it once."""
        if not self._on_device:
            return
        steps, losses, grad_norms = zip(*self._on_device, strict=True)
        values = torch.stack([*losses, *grad_norms]).tolist()
        self._on_device = []
        for step, loss, grad_norm in zip(steps, values[: len(steps)], values[len(steps) :], strict=True):
            self._check_finite("loss", loss, step)
            self._check_finite("gradient norm", grad_norm, step)
            self._unlogged.append((step, loss, grad_norm))

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(f"the {name} is {value} at step {step}, learning rate {self._learning_rate(step):g}")

    def _learning_rate(self, step: int) -> float:
        return self._params.learning_rate * learning_rate_factor(step - 1, self._params)
