"""A search over parameters: an Optuna study below .cache, and its mirror in MLflow, the parent of the trials' runs."""

import difflib
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

import mlflow
import optuna
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from optuna import Study, Trial
from optuna.trial import TrialState
from sqlalchemy import URL

from gpt2.config import Params
from gpt2.core.errors import UserError
from gpt2.core.files import write_text
from gpt2.core.paths import ROOT, main_root
from gpt2.core.validation import check
from gpt2.report.figures import draw_all
from gpt2.tracking.lineage import checkpoint_folder, differences, file_hashes, flatten, hash_of
from gpt2.tracking.runs import EXPERIMENT_NAME, TRAIN_KEY
from gpt2.tracking.store import open_store
from gpt2.training.checkpoints import Checkpoints

VAL_LOSS = "val/full_loss"  # of the whole split, in the end: what is searched for
STATE, BEST = "optuna.state", "gpt2.best_trial"  # tags of a trial's run, and of the parent
MADE_OF, PARENT_RUN = "made_of", "mlflow_run"  # attributes of the study
State = Literal["COMPLETE", "PRUNED", "FAIL"]
Values = dict[str, Any]  # of the searched parameters, by name


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """Return parameters with other values, by dotted name. Raises UserError if they are refused."""
    raw = params.model_dump(by_alias=True) | {"sweep": params.sweep}
    for name, value in values.items():
        section, key = name.split(".")
        raw[section][key] = value
    return check(Params, raw, "sweep.space")


def check_space(params: Params) -> None:
    """Raise UserError if sweep.space has what is no parameter of model or train, or values that these refuse."""
    space = params.sweep.space
    known = [f"{name}.{key}" for name in ("model", "train") for key in getattr(params, name).model_dump()]
    for name in space.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"sweep.space: {name} is no parameter of model or train{hint}")
    for values in product(*(searched.extremes() for searched in space.values())):
        with_values(params, dict(zip(space, values, strict=True)))


def sweep_folder(name: str) -> Path:
    """Return the folder of the search of that name: its study, its logs and its pictures."""
    return main_root() / ".cache" / "sweeps" / name


def open_study(params: Params) -> Study:
    """Open the study of params.sweep, or make it. Raises UserError if its trials are of other parameters or code."""
    sweep, folder, made_of = params.sweep, sweep_folder(params.sweep.name), _made_of(params)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    median = optuna.pruners.MedianPruner(_explored(params), n_warmup_steps=params.train.warmup_steps + 1)
    with FileLock(folder / "lock"):  # processes that make a database at once would break it
        study = optuna.create_study(
            storage=URL.create("sqlite", database=str(folder / "study.db")).render_as_string(),
            study_name=sweep.name,
            pruner=median if sweep.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        if changes := differences(study.user_attrs.get(MADE_OF, made_of), made_of):
            changed = "; ".join(changes)
            raise UserError(
                f"sweep {sweep.name} has trials of others ({changed}): change sweep.name, or delete {folder}"
            )
        study.set_user_attr(MADE_OF, made_of)
    return study


def take_trial(study: Study, params: Params) -> tuple[Trial, Values, FileLock] | None:
    """Take a trial whose process has died, else a new one; return it, its values, and a lock to be held meanwhile.

    Return None if there are enough. One process at a time may call this.
    """
    trials, folder = study.get_trials(deepcopy=False), sweep_folder(study.study_name)
    for one in trials:
        if one.state == TrialState.RUNNING:
            try:
                (lock := FileLock(folder / f"{one.number}.lock")).acquire(blocking=False)
            except Timeout:
                continue
            trial = Trial(study, one._trial_id)
            return trial, _values(trial, params), lock
    if len(trials) >= params.sweep.trials:
        return None
    # By its number, so that a search that was interrupted does not draw the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=params.sweep.seed + len(trials), n_startup_trials=_explored(params))
    trial = study.ask()
    (lock := FileLock(folder / f"{trial.number}.lock")).acquire()
    return trial, _values(trial, params), lock


def open_parent(study: Study) -> str:
    """Return the id of the search's run in MLflow, which is made where it is missing. Raises one of STORE_ERRORS."""
    experiment_id, client = open_store(), mlflow.MlflowClient()
    try:
        run_id = client.get_run(study.user_attrs.get(PARENT_RUN, "")).info.run_id
        client.update_run(run_id, status="RUNNING")
    except MlflowException:  # it is new, or the store is
        run_id = client.create_run(experiment_id, run_name=study.study_name).info.run_id
        client.log_batch(run_id, params=_as_params(flatten(study.user_attrs[MADE_OF])))
        study.set_user_attr(PARENT_RUN, run_id)
    return run_id


def child_context(parent: str) -> dict[str, str]:
    """Return the variables with which a new run of MLflow's, in another process, becomes a child of `parent`."""
    return {"MLFLOW_RUN_CONTEXT": json.dumps({MLFLOW_PARENT_RUN_ID: parent})}


def find_child(parent: str, name: str) -> Run | None:
    """Return the run of the trial of that name, if its training has begun. Raises one of STORE_ERRORS."""
    client = mlflow.MlflowClient()
    tags = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' AND tags.`{EXPERIMENT_NAME}` = '{name}'"
    return next(iter(client.search_runs([client.get_run(parent).info.experiment_id], tags)), None)


def is_hopeless(trial: Trial, child: Run) -> bool:
    """Tell Optuna the validation losses of a trial's run so far; return whether it prunes the trial."""
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    points = mlflow.MlflowClient().get_metric_history(child.info.run_id, "val/loss")
    hopeless = False
    for point in sorted(points, key=lambda point: point.step):
        if point.step not in known:
            trial.report(point.value, point.step)
            hopeless |= trial.should_prune()
    return hopeless or trial.should_prune()  # as it was told before the search was interrupted


def settle(trial: Trial, name: str, values: Values, parent: str, state: State, loss: float | None = None) -> None:
    """Write down how a trial has ended, in its run and then in the study, and delete its checkpoints."""
    client, child = mlflow.MlflowClient(), find_child(parent, name)
    if child is None:  # DVC had the results of equal parameters, so nothing was trained
        tags = {MLFLOW_PARENT_RUN_ID: parent, EXPERIMENT_NAME: name}
        child = client.create_run(client.get_run(parent).info.experiment_id, run_name=name, tags=tags)
        client.log_batch(child.info.run_id, params=_as_params(values))
        client.set_terminated(child.info.run_id)
    if loss is not None:
        client.log_metric(child.info.run_id, VAL_LOSS, loss, step=0)
    client.set_tag(child.info.run_id, STATE, state)
    if train_key := child.data.tags.get(TRAIN_KEY):
        Checkpoints(checkpoint_folder(train_key)).remove()
    trial.study.tell(trial, loss, TrialState[state])


def mirror(study: Study, params: Params, parent: str) -> str:
    """Draw the search so far into its folder and its run; return in words how it stands."""
    client, folder, trials = mlflow.MlflowClient(), sweep_folder(study.study_name), study.get_trials()
    counts = {state: sum(one.state == state for one in trials) for state in TrialState}
    summary = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    if counts[TrialState.COMPLETE]:
        best, loss = study.best_trial, study.best_value
        name = f"{study.study_name}-{best.number}"
        summary = f"best: {name}, val loss {loss:.4f} ({show(best.params)}); of {len(trials)} trials {summary}"
        client.set_tag(parent, BEST, name)
        client.log_metric(parent, "sweep/best_val_loss", loss, step=len(trials) - counts[TrialState.RUNNING])
        rows = [
            {"trial": one.number, "state": one.state.name, "val_loss": _loss(one), **one.params}
            for one in trials
            if _loss(one) is not None
        ]
        table = pd.DataFrame(rows)
        write_text(folder / "trials.csv", table.to_csv(index=False, lineterminator="\n"))
        for picture, svg in draw_all({"sweep": table}).items():
            write_text(folder / f"{picture}.svg", svg)
        for file in (*folder.glob("*.csv"), *folder.glob("*.svg")):
            client.log_artifact(parent, str(file), "sweep")
    client.set_tag(parent, MLFLOW_RUN_NOTE, summary)
    if len(trials) >= params.sweep.trials and not counts[TrialState.RUNNING]:
        client.set_terminated(parent)
    return summary


def show(values: Values) -> str:
    """Return values in words."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _values(trial: Trial, params: Params) -> Values:
    """Return the trial's values; those that it lacks, as a new one does, are drawn."""
    return {
        name: trial.suggest_categorical(name, one.choices)
        if one.choices is not None
        else trial.suggest_float(name, one.low, one.high, log=one.log)  # type: ignore[arg-type]
        for name, one in params.sweep.space.items()
    }


def _explored(params: Params) -> int:
    """Return how many trials come before any is pruned, and before values are drawn other than at random."""
    return max(1, params.sweep.trials // 3)


def _loss(trial: optuna.trial.FrozenTrial) -> float | None:
    """Return the validation loss of a trial: its value, or of one that is not complete the last that is known."""
    return trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step or 0)


def _made_of(params: Params) -> dict[str, Any]:
    """Return what the trials share: parameters that are not searched, the space, and the files of the training."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    deps = {path for stage in ("prepare", "train") for path in stages[stage]["deps"]} - {"data/tokens"}
    fixed = flatten(params.model_dump(include={"prepare", "model", "train", "runtime"}))
    return {
        **{name: value for name, value in fixed.items() if name not in params.sweep.space},
        "sweep": params.sweep.model_dump(include={"seed", "prune", "space"}, exclude_none=True),
        "files": hash_of([pair for path in sorted(deps) for pair in file_hashes(path)])[:12],
    }


def _as_params(values: Values) -> list[Param]:
    return [Param(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]
