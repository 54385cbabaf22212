"""What a training reports: its history, its speed, its progress bar, and whether its numbers are finite."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gpt2.config import TrainParams
from gpt2.core.device import peak_memory_bytes
from gpt2.core.errors import UserError
from gpt2.core.progress import Progress
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.history import History, LogMetrics
from gpt2.training.optimizers import learning_rate_factor


class TrainingLog:
    """Takes each step's loss and gradient norm; keeps the history of what is due, and passes it to log_metrics.

    Losses are nats per token; pauses do not count in tokens per second. Methods that read the losses wait for the
    device, and raise UserError if a loss or gradient norm is not finite.
    """

    def __init__(
        self, params: TrainParams, device: torch.device, checkpoints: Checkpoints, log_metrics: LogMetrics
    ) -> None:
        self.history: History = []
        self.best_step, self._best_loss, self._validations_since = 0, math.inf, 0  # of the lowest val/loss
        self._last: dict[str, float] = {}  # value of each metric
        self._params, self._device, self._checkpoints, self._log_metrics = params, device, checkpoints, log_metrics
        # Since the last logged step: the sums of losses and norms, and the number of steps until one is not finite.
        self._sums = torch.zeros(3, device=device)
        self._logged_step, self._started = 0, time.perf_counter()
        self._earlier_peak_bytes = 0

    def progress(self, start: int) -> Iterator[int]:
        """Yield the steps from `start` on, and show how far they have come."""
        with Progress("train", self._params.max_steps, start, line_seconds=math.inf) as self._progress:
            for step in range(start, self._params.max_steps):
                if self.is_over(step):
                    return
                yield step

    def is_over(self, step: int) -> bool:
        """Tell whether step `step` is the last: by max_steps, or since patience has run out."""
        patience = self._params.patience
        return step == self._params.max_steps or (patience is not None and self._validations_since >= patience)

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Add the loss and the norm () of one step. They stay on their device: reading them would wait for it."""
        self._sums[:2] += torch.stack([loss, grad_norm])
        self._sums[2] += self._sums[:2].isfinite().all()
        self._progress.advance()

    def log_training(self, step: int) -> None:
        """Log the means since the last time: loss, gradient norm and speed; and the learning rate of step `step`."""
        loss, grad_norm, steps = self._read()
        tokens_per_second = steps * self._batch_tokens / (time.perf_counter() - self._started)
        self._sums.zero_()
        self._logged_step, self._started = step, time.perf_counter()
        self._log(
            step,
            {
                "train/loss": loss / steps,
                "train/grad_norm": grad_norm / steps,
                "train/learning_rate": self._learning_rate(step),
                "train/tokens_per_second": tokens_per_second,
            },
        )
        self._progress.show(self._figures())

    def log_validation(self, step: int, loss: float) -> None:
        """Log the validation loss after `step` steps."""
        self._check_finite("validation loss", step, loss)
        self._log(step, {"val/loss": loss})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the speed."""
        self._read()  # a GPU's steps, whose time counts
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def final_metrics(self, val_loss: float) -> dict[str, float]:
        """Return the metrics for train.json, except the parameter count.

        `val_loss`, of the whole split, and kept_step are of the weights that are kept, the others of all steps done.
        """
        self._check_finite("validation loss", self.steps, val_loss)
        return {
            "train_loss": self._last["train/loss"],
            "val_loss": val_loss,
            "steps": self.steps,
            "kept_step": self.best_step if self._params.keep == "best" else self.steps,
            "tokens": self.steps * self._batch_tokens,
            "tokens_per_second": self._tokens_per_second(),
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON can hold it."""
        return {
            "history": self.history,
            "sums": self._read(),
            "logged_step": self._logged_step,
            "seconds": time.perf_counter() - self._started,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state, and log its history again."""
        for step, metrics in state["history"]:
            self._log(step, metrics)
        self._sums.copy_(torch.tensor(state["sums"]))
        self._logged_step = state["logged_step"]
        self._started -= state["seconds"]  # no step has been done yet
        self._earlier_peak_bytes = state["peak_memory_bytes"]

    def _figures(self) -> str:
        """Return the last figures, short enough for a bar in 80 columns."""
        names = {"loss": "train/loss", "val": "val/loss"}
        losses = [f"{short} {self._last[name]:.3f}" for short, name in names.items() if name in self._last]
        return ", ".join([*losses, f"{tqdm.format_sizeof(self._last['train/tokens_per_second'])} tok/s"])

    @property
    def steps(self) -> int:
        """The last logged step: in the end, the number of steps done."""
        return self.history[-1][0]

    @property
    def _batch_tokens(self) -> int:
        return self._params.batch_size * self._params.sequence_length

    def _tokens_per_second(self) -> float:
        """Return the mean over all steps, from the means that were logged."""
        name = "train/tokens_per_second"
        speeds = [(0, 0.0), *((step, metrics[name]) for step, metrics in self.history if name in metrics)]
        return self.steps / sum((step - before) / speed for (before, _), (step, speed) in pairwise(speeds))

    def _peak_memory_bytes(self) -> int:
        return max(self._earlier_peak_bytes, peak_memory_bytes(self._device))

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append((step, metrics))
        self._last |= metrics
        if (loss := metrics.get("val/loss")) is not None:
            self._validations_since += 1
            if loss < self._best_loss:
                self.best_step, self._best_loss, self._validations_since = step, loss, 0
        self._log_metrics(step, metrics)

    def _read(self) -> list[float]:
        """Return the sums from the device, waiting for it."""
        loss, grad_norm, finite_steps = self._sums.tolist()
        self._check_finite("loss or gradient norm", self._logged_step + int(finite_steps) + 1, loss, grad_norm)
        return [loss, grad_norm, finite_steps]

    def _check_finite(self, name: str, step: int, *values: float) -> None:
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"the {name} is not finite at step {step}, learning rate {self._learning_rate(step):g}; "
                f"{self._checkpoints.last()}; try lower learning rates"
            )

    def _learning_rate(self, step: int) -> float:
        return self._params.learning_rate * learning_rate_factor(step - 1, self._params)
