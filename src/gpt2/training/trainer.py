"""The training loop, and what one step of it does. It knows batches and a loss; not attention or MLflow.

Shapes: B batch, T positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import TrainParams
from gpt2.core.device import autocast, choose_micro_batch_size
from gpt2.core.errors import Stopped
from gpt2.core.progress import Progress
from gpt2.data.batches import Purpose, Tokens, TrainingBatches, seed_torch, validation_batches
from gpt2.model.gpt2 import GPT2Model
from gpt2.training import distributed, parallel
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.cuda_graph import capture
from gpt2.training.history import LogWeights
from gpt2.training.optimizers import build_optimizers, set_learning_rates, steps_before_decay
from gpt2.training.training_log import TrainingLog


class Trainer:
    """A model on its device, its optimizers and its batches.

    Raises UserError if a split is too short for one window, or the processes cannot share a batch.
    """

    def __init__(
        self,
        model: GPT2Model,
        train_tokens: Tokens,
        val_tokens: Tokens,
        params: TrainParams,
        precision: torch.dtype,
        checkpoints: Checkpoints,
    ) -> None:
        self.model, self.params, self.precision, self.checkpoints = model, params, precision, checkpoints
        self.device = model.token_embedding.weight.device
        self.micro_batch_size = choose_micro_batch_size(params.micro_batch_size, self.device)
        self.batches = TrainingBatches(train_tokens, params.batch_size, params.sequence_length, params.seed)
        self.val_batches = partial(validation_batches, val_tokens, self.micro_batch_size, params.sequence_length)
        self.val_batches()  # raises now, not at the first validation
        self.val_windows = (len(val_tokens) - 1) // params.sequence_length
        self.parallel = parallel.data_parallel(model, params.batch_size)  # the model itself in a single process
        self.rows = distributed.own_rows(params.batch_size)
        self.optimizers = build_optimizers(model, params, precision)
        self.best: dict[str, Tensor] = {}  # the weights of the lowest val/loss, if they are to be kept
        self.gradients: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]] = self.compute_gradients

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Do optimizer step `step` (from 0); return the loss () and the gradient norm () before clipping."""
        set_learning_rates(self.optimizers, step, self.params)
        loss, grad_norm = self.gradients(*self.batches(step, self.rows), step)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss, grad_norm

    def compute_gradients(self, inputs: Tensor, targets: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute the clipped gradients of a batch (B, T), a micro-batch at a time; return loss () and norm ().

        Dropout is a pure function of the seed, the step, if that is given, and a micro-batch's place in the batch.
        """
        self.model.zero_grad()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(inputs), self.micro_batch_size):
            x, y = (tensor[start : start + self.micro_batch_size].to(self.device) for tensor in (inputs, targets))
            if step is not None:
                seed_torch(self.params.seed, Purpose.DROPOUT, step, self.rows.start + start)
            with parallel.synchronized(self.parallel, now=start + len(x) == len(inputs)):
                with autocast(self.device, self.precision):
                    loss = self.parallel(x, y) * (len(x) / len(inputs))
                loss.backward()
            total += loss.detach()
        norm = parallel.whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.params.grad_clip))
        return distributed.mean(total), norm

    def capture(self, step: int) -> None:
        """Let a CUDA graph compute the gradients, of batches like that of `step`. Its dropout is drawn once a step."""
        graph = capture(self.compute_gradients, *(tensor.to(self.device) for tensor in self.batches(step)))

        def gradients(inputs: Tensor, targets: Tensor, step: int) -> tuple[Tensor, ...]:
            seed_torch(self.params.seed, Purpose.DROPOUT, step)
            return graph(inputs, targets)

        self.gradients = gradients

    @torch.no_grad()
    def validate(self, max_windows: int | None = None) -> float:
        """Return the mean loss, without dropout, of the validation split or of `max_windows` of its windows."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # of losses, and of tokens
        with Progress("validate", min(self.val_windows, max_windows or self.val_windows), brief=True) as progress:
            for (x, y), counts in distributed.own_share(self.val_batches(max_windows)):
                with autocast(self.device, self.precision):
                    loss = self.model(x.to(self.device), y.to(self.device)).cpu().double()
                sums += torch.stack([loss, torch.ones_like(loss)]) * (y.numel() * counts)
                progress.advance(len(x) * distributed.world_size())
        self.model.train()
        parallel.reshard(self.model)
        loss, tokens = distributed.mean(sums)
        return float(loss / tokens)

    def save(self, step: int, log_state: dict[str, Any]) -> None:
        """Write a checkpoint of the state after `step` steps. Raises OSError; the one before is intact then."""
        self.checkpoints.save(step, self.model, self.optimizers, log_state, self.best)


def validate(trainer: Trainer, log: TrainingLog, step: int) -> None:
    """Log val/loss after `step` steps, always of the same windows; keep the weights of the lowest if that is asked."""
    log.log_validation(step, trainer.validate(trainer.params.eval_windows))
    if trainer.params.keep == "best" and log.best_step == step:
        trainer.best = {name: weight.detach().cpu().clone() for name, weight in trainer.model.named_parameters()}


def train(
    trainer: Trainer, log: TrainingLog, start: int, stop_signal: Callable[[], int], log_weights: LogWeights
) -> None:
    """Do all steps from `start` on: the loop.

    stop_signal() returns the number of the signal that asked to stop, or 0. Raises Stopped then, after saving;
    UserError if a loss or gradient is not finite; OSError if a checkpoint cannot be saved.
    """
    params = trainer.params
    trainer.model.train()
    for step in log.progress(start):
        loss, grad_norm = trainer.step(step)
        done, stopping = step + 1, stop_signal() != 0
        log.add(loss, grad_norm)

        if done == params.max_steps or done % params.eval_interval == 0:
            with log.paused():
                validate(trainer, log, done)
                if params.log_checkpoints and done % params.log_checkpoints == 0:
                    log_weights(done)
        last = log.is_over(done)
        if last or done % params.log_interval == 0:
            log.log_training(done)
        if last or stopping or done % params.checkpoint_interval == 0 or done == steps_before_decay(params):
            with log.paused():
                trainer.save(done, log.state())
        if stopping or (last and stop_signal()):  # also one that came while the last step was saved
            raise Stopped(stop_signal(), f"stopped after step {done}, which is saved; the same command resumes it")
