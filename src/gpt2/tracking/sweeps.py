"""A search over parameters: an Optuna study below .cache, and its mirror in MLflow, the parent of the trials' runs."""

import difflib
import json
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from optuna import Study, Trial
from optuna.exceptions import OptunaError
from optuna.trial import TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from gpt2.config import Params
from gpt2.core.errors import UserError
from gpt2.core.files import write_text
from gpt2.core.paths import PARAMS, ROOT, main_root
from gpt2.core.validation import check
from gpt2.report.figures import draw_all
from gpt2.tracking.lineage import checkpoint_folder, differences, file_hashes, flatten, hash_of
from gpt2.tracking.runs import EXPERIMENT_NAME, STATE, TRAIN_KEY
from gpt2.tracking.store import open_store
from gpt2.training.checkpoints import Checkpoints

VAL_LOSS = "val/full_loss"  # of the whole split, in the end: what is searched for
BEST = "gpt2.best_trial"  # a tag of the parent
MADE_OF, PARENT_RUN = "made_of", "mlflow_run"  # attributes of the study
ENDS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}  # MLflow's words
Values = dict[str, Any]  # of the searched parameters, by name


def check_space(params: Params) -> None:
    """Raise UserError if sweep.space has what is no parameter of model or train, or values that these refuse."""
    space = params.sweep.space
    known = [f"{name}.{key}" for name in ("model", "train") for key in getattr(params, name).model_dump()]
    for name in space.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"sweep.space: {name} is no parameter of model or train{hint}")
    is_preset = isinstance(yaml.safe_load(PARAMS.read_text(encoding="utf-8"))["model"], str)
    if is_preset and any(name.startswith("model.") for name in space):
        raise UserError("sweep.space: to search model.*, params.yaml should have a section model, not a model's name")
    extremes = {name: searched.extremes() for name, searched in space.items()}
    first = {name: values[0] for name, values in extremes.items()}
    tried = [first | {name: value} for name, values in extremes.items() for value in values]
    tried += (dict(zip(extremes, one, strict=True)) for one in islice(product(*extremes.values()), 1000))
    for values in tried:
        raw = params.model_dump(by_alias=True) | {"sweep": params.sweep}
        for name, value in values.items():
            section, key = name.split(".")
            raw[section][key] = value
        check(Params, raw, "sweep.space")


def sweep_folder(name: str) -> Path:
    """Return the folder of the search of that name: its study, its logs and its pictures."""
    return main_root() / ".cache" / "sweeps" / name


def open_study(params: Params) -> Study:
    """Open the study of params.sweep, or make it. Raises UserError if its trials are of other parameters or code."""
    folder, database = sweep_folder(params.sweep.name), sweep_folder(params.sweep.name) / "study.db"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    median = optuna.pruners.MedianPruner(_explored(params), n_warmup_steps=params.train.warmup_steps + 1)
    pruner = median if params.sweep.prune else optuna.pruners.NopPruner()
    storage = URL.create("sqlite", database=str(database)).render_as_string()
    with FileLock(folder / "lock"):  # processes that make a database at once would break it
        try:
            study = optuna.create_study(
                storage=storage, study_name=params.sweep.name, pruner=pruner, load_if_exists=True
            )
        except (OptunaError, RuntimeError, SQLAlchemyError) as error:
            raise UserError(f"{database} cannot be opened ({error}): delete it, or change sweep.name") from None
        check_same(study, params)
        study.set_user_attr(MADE_OF, _made_of(params))
    return study


def check_same(study: Study, params: Params) -> None:
    """Raise UserError if the study's trials are of other parameters or code than the present ones."""
    made_of, way_out = _made_of(params), f"change sweep.name, or delete {sweep_folder(study.study_name)}"
    if changes := "; ".join(differences(study.user_attrs.get(MADE_OF, made_of), made_of)):
        raise UserError(f"sweep {study.study_name} has trials of others ({changes}): {way_out}")


def take_trial(study: Study, params: Params) -> tuple[Trial, FileLock] | None:
    """Take a trial whose process has died, else a new one; return it with its values, and a lock to be held meanwhile.

    Return None if there are enough.
    """
    folder = sweep_folder(study.study_name)
    with FileLock(folder / "lock"):
        trials = study.get_trials(deepcopy=False)
        numbers = [one.number for one in trials if one.state == TrialState.RUNNING]
        for number in (*numbers, *range(len(trials), params.sweep.trials)[:1]):
            try:
                (lock := FileLock(folder / f"{number}.lock")).acquire(blocking=False)
            except Timeout:
                continue
            # By its number, so that a search that was interrupted does not draw the same values again.
            seed = params.sweep.seed + number
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_explored(params))
            trial = Trial(study, trials[number]._trial_id) if number < len(trials) else study.ask()
            for name, one in params.sweep.space.items():
                if one.choices is not None:
                    trial.suggest_categorical(name, one.choices)
                else:
                    trial.suggest_float(name, one.low, one.high, log=one.log)  # type: ignore[arg-type]
            return trial, lock
    return None


def open_parent(study: Study) -> str:
    """Return the id of the search's run in MLflow, which is made where it is missing. Raises one of STORE_ERRORS."""
    experiment_id, client = open_store(), mlflow.MlflowClient()
    with FileLock(sweep_folder(study.study_name) / "lock"):
        if run_id := study.user_attrs.get(PARENT_RUN):
            try:
                if client.get_run(run_id).info.lifecycle_stage == "active":
                    client.update_run(run_id, status="RUNNING")
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        run_id = client.create_run(experiment_id, run_name=study.study_name).info.run_id
        client.log_batch(run_id, params=_as_params(flatten(study.user_attrs[MADE_OF])))
        study.set_user_attr(PARENT_RUN, run_id)
    return run_id


def as_child_of(parent: str) -> dict[str, str]:
    """Return the variables that make the runs of a process children of the search's run."""
    return {"MLFLOW_RUN_CONTEXT": json.dumps({MLFLOW_PARENT_RUN_ID: parent})}


def stop_parent(run_id: str) -> None:
    """Write down that the search has been interrupted. Raises one of STORE_ERRORS."""
    mlflow.MlflowClient().set_terminated(run_id, "KILLED")


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


def settle(trial: Trial, name: str, parent: str, child: Run | None, state: TrialState, loss: float | None) -> None:
    """Write down how a trial has ended, in its run and then in the study, and delete its checkpoints."""
    client = mlflow.MlflowClient()
    if child is None:  # nothing was trained: DVC had the results of equal parameters, or the training failed at once
        tags = {MLFLOW_PARENT_RUN_ID: parent, EXPERIMENT_NAME: name}
        child = client.create_run(client.get_run(parent).info.experiment_id, run_name=name, tags=tags)
        client.log_batch(child.info.run_id, params=_as_params(trial.params))
    if loss is not None:
        client.log_metric(child.info.run_id, VAL_LOSS, loss, step=0)
    client.set_tag(child.info.run_id, STATE, state.name)
    if child.info.status == "RUNNING":  # as after a kill
        client.set_terminated(child.info.run_id, ENDS[state])
    if train_key := child.data.tags.get(TRAIN_KEY):
        Checkpoints(checkpoint_folder(train_key)).remove()
    trial.study.tell(trial, loss, state)


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
    else:
        client.update_run(parent, status="RUNNING")  # another search, which was interrupted, may have ended it
    return summary


def show(values: Values) -> str:
    """Return values in words."""
    return ", ".join(f"{name} {f'{one:.4g}' if isinstance(one, float) else one}" for name, one in values.items())


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
        "files": hash_of([(_data if one.startswith("data/") else _code)(one) for one in sorted(deps)])[:12],
    }


def _code(path: str) -> list[tuple[str, str]]:
    return list(file_hashes(path))


_data = cache(_code)  # which may be large, so it is read once


def _as_params(values: Values) -> list[Param]:
    return [Param(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items()]
