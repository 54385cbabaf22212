import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2.config import ModelConfig, RuntimeParams, TrainParams
from gpt2.core.errors import Stopped
from gpt2.data.batches import SeenMask, TrainingBatches, validation_batches
from gpt2.model.gpt2 import GPT2Model, PositionwiseFeedForward
from gpt2.model.seen_tokens import SeenTokens, keep_rows
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.history import LogWeights
from gpt2.training.optimizers import steps_before_decay
from gpt2.training.run import build_model, check_shape, initialize, run_training, take_weights, use_fused_parts
from gpt2.training.trainer import Trainer
from gpt2.training.training_log import TrainingLog

ErrorLine = Callable[[Callable[[], object]], str]
MakeModel = Callable[..., GPT2Model]
MakeTrainParams = Callable[..., TrainParams]
History = list[tuple[int, dict[str, float]]]
CPU = torch.device("cpu")
TOKENS = (np.arange(400) * 7 % 53).astype(np.uint16)  # each token tells the next; of 61, 8 never occur
SEEN = np.arange(61) < 53


@pytest.fixture
def run(make_model: MakeModel, make_train_params: MakeTrainParams, tmp_path: Path) -> Callable[..., Any]:
    """Train a tiny model; return it, its metrics and what was logged. Without `checkpoints` it starts anew."""

    def run(
        model: GPT2Model | None = None,
        checkpoints: Checkpoints | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        seen: SeenMask = SEEN,
        log_weights: LogWeights = lambda step: None,
        **changes: Any,
    ) -> tuple[GPT2Model, dict[str, float], History]:
        model = model or make_model(dropout=0.2)
        history: History = []
        params = make_train_params(**{"max_steps": 6, "warmup_steps": 2} | changes)
        runtime = RuntimeParams(threads=1, device="cpu", precision=precision)
        checkpoints = checkpoints or Checkpoints(Path(tempfile.mkdtemp(dir=tmp_path)))
        metrics, returned = run_training(
            model,
            TOKENS,
            TOKENS[:90],
            seen,
            params,
            runtime,
            checkpoints,
            lambda *point: history.append(point),
            log_weights,
        )
        assert returned == history
        return model, metrics, history

    return run


def same_weights(one: GPT2Model, two: GPT2Model) -> bool:
    states = one.state_dict(), two.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_model_that_cannot_fit_into_memory_is_refused_at_once(
    make_config: Callable[..., ModelConfig], make_train_params: MakeTrainParams, error_line: ErrorLine
) -> None:
    config = make_config(d_model=2**20, n_layers=1000)
    line = error_line(lambda: build_model(config, make_train_params(), CPU))
    assert "this model and batch need at least" in line


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(run: Callable[..., Any], optimizer: str) -> None:
    _, metrics, history = run(optimizer=optimizer, max_steps=60, learning_rate=0.02)
    assert history[0] == (0, {"val/loss": pytest.approx(math.log(61), abs=0.1)})
    assert metrics["train_loss"] < 2 and metrics["val_loss"] < 1


def test_training_improves_on_its_start_from_bigrams(run: Callable[..., Any]) -> None:
    _, _, history = run(initialization="bigrams", max_steps=40, learning_rate=0.02)
    losses = [logged["val/loss"] for _, logged in history if "val/loss" in logged]
    assert math.log(61) - 1 > losses[0] > losses[-1] + 0.05


@pytest.mark.parametrize("tie_weights", [False, True])
def test_tokens_that_never_occur_stay_alike(run: Callable[..., Any], make_model: MakeModel, tie_weights: bool) -> None:
    model, _, _ = run(make_model(tie_weights=tie_weights), learning_rate=0.02)
    rows = model.output_projection.weight.detach()
    torch.testing.assert_close(rows[53:], rows[53].expand(8, -1))
    assert (rows[53] - rows[:53]).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("of_ours", [False, True])  # whose rows of tokens that their text lacks are equal
def test_training_from_given_weights_keeps_what_they_know_of_all_tokens(
    run: Callable[..., Any], make_model: MakeModel, tie_weights: bool, of_ours: bool
) -> None:
    """The loss starts where the weights are, and training is that of the whole vocabulary, fused or not."""
    given, seen_before = make_model(tie_weights=tie_weights, random=True, max_len=20), np.arange(61) < 30
    if of_ours:
        SeenTokens(torch.from_numpy(seen_before)).equalize(given.output_projection.weight)
    kept = keep_rows(SEEN, given.output_projection.weight, seen_before if of_ours else None)
    with torch.no_grad():
        losses = [float(given(inputs, targets)) for inputs, targets in validation_batches(TOKENS[:90], 1, 8)]
    trained = {}
    for fused in (False, True):
        take_weights(model := make_model(tie_weights=tie_weights), given)
        trained[fused], _, history = run(model, seen=kept, init_from="hf:gpt2", initialization="bigrams", fused=fused)
        assert history[0] == (0, {"val/loss": pytest.approx(np.mean(losses), rel=1e-5)})
    for one, other in zip(trained[True].parameters(), trained[False].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    rows = trained[True].output_projection.weight
    assert torch.equal(rows[53], rows[54]) == of_ours


def test_weights_of_another_shape_are_refused_with_what_to_set(
    make_config: Callable[..., ModelConfig], error_line: ErrorLine
) -> None:
    def line(**given: Any) -> str:
        return error_line(lambda: check_shape(make_config(), make_config(**given), "hf:gpt2"))

    check_shape(make_config(), make_config(dropout=0.5, max_len=99), "hf:gpt2")
    changes = {"n_layers": 3, "n_heads": 4, "d_ff": 8, "tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}
    told = ", ".join(f"model.{name} {value}" for name, value in (changes | {"max_len": 7}).items()).replace(
        "True", "true"
    )
    assert f"train.init_from hf:gpt2 has another shape: set {told}\n" in line(**changes, max_len=7)


def test_bfloat16_trains_too_and_leaves_float32_weights(run: Callable[..., Any], make_model: MakeModel) -> None:
    model, formats = make_model(dropout=0.2), set()
    for module in model.modules():
        if isinstance(module, PositionwiseFeedForward):
            module.linear1.register_forward_hook(lambda *call: formats.add(call[-1].dtype))
    _, metrics, _ = run(model, precision="bfloat16", max_steps=60, learning_rate=0.02)
    assert metrics["val_loss"] < 1 and formats == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def loss_of_logits(model: GPT2Model, inputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@pytest.fixture
def make_trainer(make_model: MakeModel, make_train_params: MakeTrainParams, tmp_path: Path) -> Callable[..., Trainer]:
    """Build a trainer of a tiny model, with the fused parts unless told otherwise."""

    def make(model: GPT2Model | None = None, fused: bool = True, **changes: Any) -> Trainer:
        model = model or make_model(random=True)
        seen_tokens = SeenTokens(torch.from_numpy(SEEN))
        seen_tokens.equalize(model.output_projection.weight)
        if fused:
            use_fused_parts(model, seen_tokens, compiled=False)
        params = make_train_params(**{"grad_clip": 1e9} | changes)
        return Trainer(model, TOKENS, TOKENS[:90], params, torch.float32, Checkpoints(tmp_path))

    return make


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])  # 3 leaves a smaller last one
def test_accumulated_gradient_is_that_of_the_whole_batch(
    make_trainer: Callable[..., Trainer], make_model: MakeModel, micro_batch_size: int, fused: bool
) -> None:
    whole, parts = make_model(random=True), make_trainer(micro_batch_size=micro_batch_size, fused=fused)
    whole.load_state_dict(parts.model.state_dict())
    batch = parts.batches(0)
    loss = loss_of_logits(whole, *batch)
    loss.backward()
    total, norm = parts.compute_gradients(*batch)
    torch.testing.assert_close(total, loss.detach())
    for expected, found in zip(whole.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        norm, torch.nn.utils.get_total_norm(one.grad for one in whole.parameters() if one.grad is not None)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_validation_weighs_tokens_alike_and_leaves_no_trace(
    make_trainer: Callable[..., Trainer], make_model: MakeModel, fused: bool
) -> None:
    trainer = make_trainer(make_model(random=True, dropout=0.5).train(), fused=fused)
    batches = [TrainingBatches(TOKENS, size, 8, seed=1)(0) for size in (3, 1)]
    batches[1][1][0, :2] = torch.tensor([54, 60])  # which the text lacks
    trainer.val_batches = lambda _=None: iter(batches)  # type: ignore[assignment]
    found = trainer.validate(None)
    assert trainer.model.training and all(parameter.grad is None for parameter in trainer.model.parameters())
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert found == pytest.approx(loss_of_logits(trainer.model.eval(), inputs, targets).item(), rel=1e-5)


def test_fused_parts_train_as_the_model_itself_does(run: Callable[..., Any], make_model: MakeModel) -> None:
    (_, fused, _), (_, plain, _) = (run(make_model(), fused=fused, learning_rate=0.02) for fused in (True, False))
    assert fused["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_same_arguments_give_the_same_weights(run: Callable[..., Any], make_model: MakeModel, optimizer: str) -> None:
    runs = []
    for global_seed in (1, 2):
        model = make_model(dropout=0.2)
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        runs.append(run(model, optimizer=optimizer)[0])
    assert same_weights(*runs)
    assert not same_weights(runs[0], run(optimizer=optimizer, seed=99)[0])


def test_activation_checkpointing_computes_blocks_again_and_changes_no_weights(
    run: Callable[..., Any], make_model: MakeModel
) -> None:
    trained, calls = [], []
    for on in (False, True):
        model, seen = make_model(dropout=0.2), list[int]()
        model.get_submodule("transformer_blocks.0.layer_norm1").register_forward_hook(
            lambda module, *_, seen=seen: seen.append(1) if module.training else None
        )
        trained.append(run(model, activation_checkpointing=on)[0])
        calls.append(len(seen))
    assert same_weights(*trained) and calls == [6, 12]


def test_looking_more_often_changes_no_weights(run: Callable[..., Any]) -> None:
    often, seldom = ({"log_interval": i, "eval_interval": i, "eval_windows": i} for i in (1, 5))
    assert same_weights(run(**often)[0], run(**seldom)[0])


def test_metrics_are_logged_at_the_due_steps(run: Callable[..., Any]) -> None:
    _, metrics, history = run(max_steps=7, log_interval=3, eval_interval=2, learning_rate=0.1, decay_fraction=0)
    train_names = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"}
    assert [step for step, logged in history if set(logged) == train_names] == [3, 6, 7]
    assert [step for step, logged in history if "val/loss" in logged] == [0, 2, 4, 6, 7]
    assert len(history) == 8
    assert history[2][1]["train/learning_rate"] == pytest.approx(0.1)
    assert history[-1][1]["train/loss"] == metrics["train_loss"]


def test_logged_train_loss_is_the_mean_since_the_last(run: Callable[..., Any]) -> None:
    losses = [
        [logged["train/loss"] for _, logged in run(log_interval=interval)[2] if "train/loss" in logged]
        for interval in (1, 4)
    ]
    assert losses[1] == pytest.approx([sum(losses[0][:4]) / 4, sum(losses[0][4:]) / 2])


def test_validation_takes_the_same_windows_each_time_and_all_at_the_end(
    run: Callable[..., Any], make_model: MakeModel
) -> None:
    model, batches = make_model(), []
    model.register_forward_hook(lambda module, inputs, _: None if module.training else batches.append(inputs[0]))
    run(model, max_steps=4, eval_interval=2, eval_windows=5)
    assert [len(batch) for batch in batches] == [4, 1, 4, 1, 4, 1, 4, 4, 3]
    assert all(torch.equal(one, two) for one, two in zip(batches[:4], batches[2:6], strict=True))
    assert sum(len(batch) for batch in batches[6:]) == 89 // 8


def test_final_metrics_hold_what_the_contract_names(run: Callable[..., Any]) -> None:
    model, metrics, _ = run()
    assert metrics["steps"] == metrics["kept_step"] == 6
    assert metrics["tokens"] == 6 * 4 * 8
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("eval_interval", [6, 5])  # noticed when it is logged, or before a pause
def test_loss_that_is_not_finite_ends_training_and_is_not_saved(
    run: Callable[..., Any], make_model: MakeModel, error_line: ErrorLine, tmp_path: Path, eval_interval: int
) -> None:
    model, checkpoints = make_model(), Checkpoints(tmp_path)
    make_nan(model, 4)
    rates = {"learning_rate": 0.25, "warmup_steps": 0, "decay_fraction": 0}
    line = error_line(
        lambda: run(model, checkpoints, log_interval=6, eval_interval=eval_interval, checkpoint_interval=3, **rates)
    )
    assert "the loss or gradient norm is not finite at step 4, learning rate 0.25" in line
    assert f"the last good checkpoint is that of step 3, in {tmp_path}" in line
    assert saved_steps(tmp_path) == [3]


def test_gradient_that_is_not_finite_ends_training(
    run: Callable[..., Any], make_model: MakeModel, error_line: ErrorLine
) -> None:
    model = make_model()
    model.layer_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    line = error_line(lambda: run(model))
    assert "is not finite at step 1" in line and "no checkpoint has been saved yet" in line


def test_last_update_that_makes_the_model_nan_is_noticed(run: Callable[..., Any], error_line: ErrorLine) -> None:
    line = error_line(lambda: run(max_steps=1, learning_rate=1e38, warmup_steps=0))
    assert "the validation loss is not finite at step 1" in line


@pytest.mark.parametrize(
    ("train_count", "val_count", "short"), [(15, 90, "train split has 15"), (90, 8, "val split has 8")]
)
def test_too_short_split_is_refused_before_training(
    make_model: MakeModel,
    make_train_params: MakeTrainParams,
    error_line: ErrorLine,
    train_count: int,
    val_count: int,
    short: str,
    tmp_path: Path,
) -> None:
    splits, last = (TOKENS[:train_count], TOKENS[:val_count]), (torch.float32, Checkpoints(tmp_path))
    assert short in error_line(lambda: Trainer(make_model(), *splits, make_train_params(), *last))


def test_dropout_differs_at_each_step_and_seed(run: Callable[..., Any], make_model: MakeModel) -> None:
    def masks(seed: int = 1234) -> list[Tensor]:
        model, seen = make_model(dropout=0.5), []
        model.dropout.register_forward_hook(
            lambda module, _, output: seen.append(output == 0) if module.training else None
        )
        run(model, max_steps=3, micro_batch_size=2, seed=seed)
        return seen

    first, again, other = masks(), masks(), masks(seed=1235)
    assert len(first) == 3 * 2  # each micro-batch has its own
    assert all(0.4 < mask.float().mean() < 0.6 for mask in first)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations([*first, *other], 2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_gradients_are_clipped(run: Callable[..., Any]) -> None:
    model, _, history = run(grad_clip=0.01)
    assert history[1][1]["train/grad_norm"] > 0.1  # before clipping
    assert torch.nn.utils.get_total_norm(one.grad for one in model.parameters()).item() == pytest.approx(0.01, rel=1e-3)


def test_tokens_per_second_skip_the_initialization_and_validation(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def take(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return slow

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "compute_gradients", take(1, Trainer.compute_gradients))
    monkeypatch.setattr(Trainer, "validate", take(100, Trainer.validate))
    monkeypatch.setattr("gpt2.training.run.initialize", take(100, initialize))
    _, metrics, history = run(log_interval=2, eval_interval=1)
    found = [logged["train/tokens_per_second"] for _, logged in history if "train/tokens_per_second" in logged]
    assert [*found, metrics["tokens_per_second"]] == [4 * 8] * 4


def test_log_skips_pauses_and_resumes_from_its_state(
    make_train_params: MakeTrainParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    params = make_train_params(max_steps=3)  # of 32 tokens each

    def make() -> TrainingLog:
        log = TrainingLog(params, CPU, Checkpoints(tmp_path), lambda *_: None)
        next(log.progress(0))
        return log

    log = make()
    for loss in (1.0, 3.0):
        now[0] += 1
        log.add(torch.tensor(loss), torch.tensor(5.0))
    with log.paused():
        now[0] += 100
    state = json.loads(json.dumps(log.state()))
    log.log_training(2)
    restored = make()
    with restored.paused():  # as long as loading the checkpoint takes
        now[0] += 1000
        restored.restore(state)
        now[0] += 1000
    restored.log_training(2)
    for one in (log, restored):
        metrics = one.history[-1][1]
        assert (metrics["train/loss"], metrics["train/grad_norm"], metrics["train/tokens_per_second"]) == (2, 5, 32)
    now[0] += 4
    restored.add(torch.tensor(5.0), torch.tensor(0.0))
    restored.log_training(3)
    restored.log_validation(3, 1.0)
    assert restored.history[-2][1]["train/tokens_per_second"] == 8
    assert restored.final_metrics(1.0)["tokens_per_second"] == 3 * 32 / 6


def make_nan(model: GPT2Model, bad_step: int) -> None:
    """Make the hidden states, and so the loss, of one step of a training NaN."""
    steps = itertools.count(1)

    def hook(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        return output * math.nan if module.training and next(steps) == bad_step else output

    model.layer_norm.register_forward_hook(hook)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[0]) for path in folder.glob("*-*"))


def untimed(history: History) -> History:
    """A history without what depends on the clock."""
    return [
        (step, {name: value for name, value in logged.items() if "per_second" not in name}) for step, logged in history
    ]


class Death(BaseException):
    """Stands for SIGKILL where a test cannot die: nobody handles it."""


@pytest.mark.parametrize("kind", [{"optimizer": "adamw", "initialization": "bigrams"}, {"optimizer": "muon"}], ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_or_stopped_and_resumed_equals_unbroken(
    run: Callable[..., Any], make_model: MakeModel, tmp_path: Path, kind: dict[str, str], number: signal.Signals
) -> None:
    """A training that ends early, in its eighth step, and another that resumes: the same weights and curves."""
    changes = {"max_steps": 9, "checkpoint_interval": 2, "log_interval": 5, "eval_interval": 4} | kind
    unbroken, metrics, history = run(**changes)
    model, steps, handler = make_model(dropout=0.2), itertools.count(1), signal.getsignal(number)

    def end(module: torch.nn.Module, _: Any) -> None:
        if module.training and next(steps) == 8:
            if number == signal.SIGKILL:
                raise Death
            os.kill(os.getpid(), number)

    model.layer_norm.register_forward_pre_hook(end)
    with pytest.raises((Death, Stopped)) as ended:
        run(model, Checkpoints(tmp_path), **changes)
    if number == signal.SIGKILL:
        assert saved_steps(tmp_path) == [4, 6]
    else:
        assert isinstance(ended.value, Stopped) and ended.value.exit_code == 128 + number
        assert "stopped after step 8, which is saved" in str(ended.value) and saved_steps(tmp_path) == [6, 8]
    assert signal.getsignal(number) is handler
    resumed, metrics_again, history_again = run(None, Checkpoints(tmp_path), **changes)
    assert same_weights(resumed, unbroken)
    assert untimed(history_again) == untimed(history)
    clock = {"tokens_per_second", "peak_memory_bytes"}
    assert {**metrics, **dict.fromkeys(clock)} == {**metrics_again, **dict.fromkeys(clock)}


def test_stop_signal_while_the_last_step_is_saved_still_stops(
    run: Callable[..., Any], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_stop(self: Checkpoints, step: int, *arguments: Any) -> None:
        save(self, step, *arguments)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after step 6, which is saved"):
        patch.setattr(Checkpoints, "save", save_and_stop)
        run(make_model(dropout=0.2), Checkpoints(tmp_path))
    resumed, _, history = run(make_model(dropout=0.2), Checkpoints(tmp_path))
    unbroken, _, expected = run()
    assert same_weights(resumed, unbroken) and untimed(history) == untimed(expected)


LOSSES = {0: 4.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 3.0, 12: 2.2}  # lowest, and first so low, after step 4
VALIDATED = {"max_steps": 12, "eval_interval": 2, "decay_fraction": 0}


@pytest.fixture
def given_losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Let val/loss after each step be given; that of the whole split stays what it is."""
    losses, do_step, do_validate = dict(LOSSES), Trainer.step, Trainer.validate

    def step(trainer: Trainer, step: int) -> tuple[Tensor, Tensor]:
        trainer.done = step + 1  # type: ignore[attr-defined]
        return do_step(trainer, step)

    def validate(trainer: Trainer, max_windows: int | None = None) -> float:
        return losses[getattr(trainer, "done", 0)] if max_windows else do_validate(trainer)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "validate", validate)
    return losses


@pytest.mark.parametrize("tie_weights", [False, True])
def test_weights_of_the_lowest_validation_loss_are_kept(
    run: Callable[..., Any], make_model: MakeModel, given_losses: dict[int, float], tie_weights: bool
) -> None:
    (best, metrics, _), (last, at_end, _), (then, at_best, _) = (
        run(make_model(tie_weights=tie_weights), **VALIDATED | changes)
        for changes in ({"keep": "best"}, {"keep": "last"}, {"keep": "last", "max_steps": 4})
    )
    assert same_weights(best, then) and not same_weights(best, last)
    assert (metrics["kept_step"], at_end["kept_step"], at_best["kept_step"]) == (4, 12, 4)
    assert metrics["val_loss"] == at_best["val_loss"] != at_end["val_loss"]
    for name in ("train_loss", "steps", "tokens"):
        assert metrics[name] == at_end[name]


def test_training_that_only_harms_keeps_its_first_weights(
    run: Callable[..., Any], make_model: MakeModel, given_losses: dict[int, float]
) -> None:
    given_losses[0] = 1.0
    model, metrics, _ = run(make_model(), **VALIDATED, keep="best", fused=False)
    assert metrics["kept_step"] == 0 and same_weights(model, make_model())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_patience_ends_a_training_early(
    run: Callable[..., Any], given_losses: dict[int, float], capsys: pytest.CaptureFixture[str], keep: str
) -> None:
    model, metrics, history = run(**VALIDATED, patience=3, log_interval=7, keep=keep)
    assert metrics["steps"] == history[-1][0] == 10 and metrics["tokens"] == 10 * 4 * 8
    assert [step for step, logged in history if "train/loss" in logged] == [7, 10]
    assert metrics["tokens_per_second"] > 0 and metrics["kept_step"] == {"last": 10, "best": 4}[keep]
    assert "stopped early after step 10: the lowest val/loss is that of step 4" in capsys.readouterr().out
    assert same_weights(model, run(**VALIDATED | {"max_steps": metrics["kept_step"]})[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 4, 5, 6, 8, 10])
def test_kept_weights_and_patience_outlive_an_end_at_any_step(
    run: Callable[..., Any],
    make_model: MakeModel,
    given_losses: dict[int, float],
    tmp_path: Path,
    number: signal.Signals,
    at: int,
) -> None:
    changes = VALIDATED | {"keep": "best", "patience": 3, "checkpoint_interval": 3}
    unbroken, metrics, history = run(**changes)
    model, steps = make_model(dropout=0.2), itertools.count(1)

    def end(module: torch.nn.Module, _: Any) -> None:
        if module.training and next(steps) == at:
            if number == signal.SIGKILL:
                raise Death
            os.kill(os.getpid(), number)

    model.layer_norm.register_forward_pre_hook(end)
    with pytest.raises((Death, Stopped)):
        run(model, Checkpoints(tmp_path), **changes)
    for _ in range(2):  # a finished one is read again
        resumed, metrics_again, history_again = run(None, Checkpoints(tmp_path), **changes)
        assert same_weights(resumed, unbroken) and untimed(history_again) == untimed(history)
        for name in ("kept_step", "val_loss", "steps", "train_loss"):
            assert metrics_again[name] == metrics[name]


@pytest.mark.parametrize(
    "kind",
    [
        {"optimizer": "muon", "decay_fraction": 0.5},
        {"optimizer": "adamw", "initialization": "bigrams", "decay_fraction": 0},
        {"keep": "best", "decay_fraction": 0.25},
        {"keep": "best", "decay_fraction": 0.25, "patience": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", ["never", "killed", "stopped"])
def test_extended_training_equals_an_unbroken_one(
    run: Callable[..., Any],
    make_model: MakeModel,
    make_train_params: MakeTrainParams,
    given_losses: dict[int, float],
    tmp_path: Path,
    kind: dict[str, Any],
    ends: str,
) -> None:
    """Its first 7 steps, or 5, are those of a shorter training, which may end early as well."""
    long = {"eval_interval": 2, "log_interval": 3, "checkpoint_interval": 100, "max_steps": 12} | kind
    short = long | {"max_steps": 7}
    given_losses[7] = 1.0
    unbroken, metrics, history = run(**long)
    first, second = (
        Checkpoints(tmp_path / str(one["max_steps"]), steps_before_decay(make_train_params(**one)))
        for one in (short, long)
    )
    model, steps = make_model(dropout=0.2), itertools.count(1)

    def end(module: torch.nn.Module, _: Any) -> None:
        if module.training and next(steps) == 7 and ends != "never":
            if ends == "killed":
                raise Death
            os.kill(os.getpid(), signal.SIGTERM)

    model.layer_norm.register_forward_pre_hook(end)
    with first.locked(), contextlib.suppress(Death, Stopped):
        run(model, first, **short)
    if ends == "never":
        first.finish()
        first = Checkpoints(tmp_path / "finished", first.steps_before_decay)
    shared = first.before_decay()
    assert (
        shared
        and saved_steps(shared.parent)[0] == first.steps_before_decay == {0: 6, 0.25: 5, 0.5: 3}[kind["decay_fraction"]]
    )
    with second.locked():
        second.go_on_from(shared)
        extended, metrics_again, history_again = run(None, second, **long)
    assert same_weights(extended, unbroken) and untimed(history_again) == untimed(history)
    for name in ("kept_step", "val_loss", "steps", "train_loss"):
        assert metrics_again[name] == metrics[name]


def test_weights_are_logged_at_the_due_steps_and_those_of_a_resumed_training_alike(
    run: Callable[..., Any], make_model: MakeModel, tmp_path: Path
) -> None:
    changes = {"max_steps": 8, "eval_interval": 2, "log_checkpoints": 4, "checkpoint_interval": 5}
    logged: list[tuple[int, Tensor]] = []
    model = make_model(dropout=0.2)

    def log(step: int) -> None:
        logged.append((step, model.layer_norm.weight.detach().clone()))
        if step == 8 and len(logged) == 2:
            raise Death

    with pytest.raises(Death):
        run(model, Checkpoints(tmp_path), log_weights=log, **changes)
    run(model, Checkpoints(tmp_path), log_weights=log, **changes)
    assert [step for step, _ in logged] == [4, 8, 8] and torch.equal(logged[1][1], logged[2][1])
    assert same_weights(model, run(**changes | {"log_checkpoints": None})[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes a C++ compiler")
def test_compiled_blocks_train_alike(run: Callable[..., Any], make_model: MakeModel) -> None:
    for dropout, tolerance in ((0.0, 1e-4), (0.2, 0.05)):  # whose draws are others when compiled
        choices = (True, False)
        (compiled, found, _), (plain, expected, _) = (run(make_model(dropout=dropout), compile=one) for one in choices)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=tolerance)
        assert compiled.state_dict().keys() == plain.state_dict().keys()
