"""Search the parameters that sweep.space in params.yaml names for the lowest validation loss, trial by trial.

A trial is an experiment of DVC (prepare and train) and a run in MLflow. Started again, a search that was interrupted
goes on; several may work on one search at once.
"""

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpt2.core.environment import MLFLOW_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | os.environ)

import psutil
from filelock import BaseFileLock, FileLock

from gpt2.config import Params, load_params
from gpt2.core.cli import Parser, fail, run_command
from gpt2.core.errors import UserError
from gpt2.core.paths import METRICS, PARAMS, ROOT
from gpt2.tracking.lineage import git
from gpt2.tracking.store import STORE_ERRORS

if not find_spec("optuna"):
    sys.exit(fail("src/sweep.py needs the library optuna: run `pip install optuna`"))

from optuna import Study, Trial
from optuna.exceptions import OptunaError
from optuna.trial import TrialState

from gpt2.tracking import sweeps

POLL_SECONDS = 1
TRAINED = (METRICS / "train.json").relative_to(ROOT)
PROCESS = "process"  # attribute of a trial: the id of its process and when that began
BUSY, BUSY_SECONDS = "Unable to acquire lock", 10  # DVC, while the user runs another command of its; try again then
FAILED = r"train\.py, exited with (2|-9|137)\b"  # DVC: a training that told its error, or was killed for its memory


@dataclass
class Running:
    """A trial at work: its process is `dvc exp run`, its lock tells other searches that it has one."""

    name: str
    trial: Trial
    lock: BaseFileLock
    log: Path
    process: psutil.Process | None = None  # None if the results are there


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run so many trials at once (default: 1)")
    jobs = parser.parse_args().jobs
    if jobs < 1:
        raise UserError("--jobs should be at least 1")
    params = load_params(PARAMS)
    sweeps.check_space(params)
    study, name = sweeps.open_study(params), params.sweep.name
    try:
        if not study.get_trials(deepcopy=False) and experiments(rf"{re.escape(name)}-\d+"):
            raise UserError(f"experiments {name}-N are there: change sweep.name, or `dvc exp remove` them")
        search(study, params, jobs)
    except OptunaError as error:
        raise UserError(f"{sweeps.sweep_folder(name) / 'study.db'} fails ({error.__cause__ or error})") from None
    except STORE_ERRORS as error:
        raise UserError(f"MLflow's store fails ({error}); start again when it is back") from None


def search(study: Study, params: Params, jobs: int) -> None:
    """Run the trials that are missing, `jobs` at a time. Raises UserError or one of STORE_ERRORS."""
    parent = sweeps.open_parent(study)
    running: list[Running] = []
    try:
        while True:
            while len(running) < jobs and start(study, params, parent, running):
                pass
            if not running:
                break
            for one in running[:]:
                if has_ended(one, params, parent):
                    running.remove(one)
                    one.lock.release()
                    sweeps.mirror(study, params, parent)
            time.sleep(POLL_SECONDS)
    except BaseException:
        interrupt(*(one.process for one in running))
        with suppress(*STORE_ERRORS):
            sweeps.stop_parent(parent)
        raise
    print(sweeps.mirror(study, params, parent))
    try:
        best = f"{study.study_name}-{study.best_trial.number}"
    except ValueError:
        folder = sweeps.sweep_folder(study.study_name)
        raise UserError(f"no trial is complete: see {folder}, and give the next search another sweep.name") from None
    print(f"`dvc exp apply {best}` takes its parameters and its model; then `dvc repro` measures and registers it")


def start(study: Study, params: Params, parent: str, running: list[Running]) -> bool:
    """Start the next trial, or follow a process that an earlier search has left; return whether there is one."""
    if not (taken := sweeps.take_trial(study, params)):
        return False
    trial, lock = taken
    name = f"{study.study_name}-{trial.number}"
    running.append(one := Running(name, trial, lock, sweeps.sweep_folder(study.study_name) / f"{name}.log"))
    print(f"{name}: {sweeps.show(trial.params)}", flush=True)
    launch(one, params, parent)
    return True


def launch(one: Running, params: Params, parent: str) -> None:
    """Start a trial's experiment, unless it runs or has its results.

    Raises UserError if it would be of other parameters or code than the trials before.
    """
    with FileLock(one.log.parent / "lock"):  # two that DVC starts at once may take each other's parameters
        one.process = left_process(one.trial)
        if not one.process and trained_loss(one.name) is None:
            sweeps.check_same(one.trial.study, load_params(PARAMS).model_copy(update={"sweep": params.sweep}))
            one.process = run_experiment(one.name, one.trial.params, one.log, parent)
            one.trial.set_user_attr(PROCESS, [one.process.pid, one.process.create_time()])
        while one.process and not is_over(one.process) and not re.search("[Ss]tage '", read(one.log)):
            time.sleep(0.1)  # until it runs in a folder of its own


def run_experiment(name: str, values: sweeps.Values, log: Path, parent: str) -> psutil.Popen:
    """Start an experiment of DVC in a folder of its own, in the background; return its process."""
    settings = [f"-S{key}={json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-n", name, *settings, "train"]
    environment = os.environ | sweeps.as_child_of(parent)
    with log.open("w") as file:
        return psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, process_group=0)


def left_process(trial: Trial) -> psutil.Process | None:
    """Return the process of a trial whose search was killed, if it still runs."""
    with suppress(KeyError, psutil.NoSuchProcess):
        number, began = trial.user_attrs[PROCESS]
        process = psutil.Process(number)
        if process.create_time() == began and not is_over(process):
            return process
    return None


def has_ended(one: Running, params: Params, parent: str) -> bool:
    """Look at a trial: end it if it is hopeless, and write down how it has ended; return whether it has.

    Raises UserError if it failed, but not in its training.
    """
    ended = one.process is None or is_over(one.process)
    child = sweeps.find_child(parent, one.name)
    hopeless = child is not None and sweeps.is_hopeless(one.trial, child)
    if not ended and not hopeless:
        return False
    interrupt(one.process)  # and a training that DVC, killed, has left
    loss, log = trained_loss(one.name), read(one.log)
    if loss is not None:
        state, told = TrialState.COMPLETE, f"val loss {loss}"
    elif re.search(FAILED, log):
        state, told = TrialState.FAIL, f"failed: {last_error(log)}"
    elif hopeless:
        state, told = TrialState.PRUNED, "pruned"
    elif BUSY in log:
        time.sleep(BUSY_SECONDS)
        launch(one, params, parent)
        return False
    else:
        way_out = "start again, and the search goes on with it, or give the search another sweep.name"
        raise UserError(f"{one.name} was stopped: {last_error(log)} (see {one.log}); {way_out}")
    sweeps.settle(one.trial, one.name, parent, child, state, loss)
    print(f"{one.name}: {told}", flush=True)
    return True


def experiments(pattern: str) -> list[str]:
    """Return the git references of DVC's experiments whose names match a regular expression, the newest first."""
    listed = git("for-each-ref", "--sort=-creatordate", "--format=%(refname)", "refs/exps/*/*/*").split()
    return [one for one in listed if re.fullmatch(pattern, one.rpartition("/")[2])]


def trained_loss(name: str) -> float | None:
    """Return the validation loss of an experiment; None if there is none of that name."""
    for reference in experiments(re.escape(name)):
        return json.loads(git("show", f"{reference}:./{TRAINED}"))["val_loss"]
    return None


def last_error(log: str) -> str:
    """Return the last error in a log: a script's own, else DVC's."""
    lines = log.splitlines()
    return next((one for mark in ("error: ", "ERROR: ") for one in lines[::-1] if one.startswith(mark)), "no error")


def read(log: Path) -> str:
    """Return what is in a log; nothing if there is none."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def is_over(process: psutil.Process) -> bool:
    """Tell whether a process has ended, also one whose end nobody asks for, as in containers without an init."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def interrupt(*processes: psutil.Process | None) -> None:
    """Let experiments save their trainings and stop, and wait until they have."""
    begun = [one for one in processes if one]
    for one in begun:
        with suppress(ProcessLookupError, PermissionError):  # it has ended: macOS says the second of a zombie
            os.killpg(one.pid, signal.SIGINT)
    while not all(map(is_over, begun)):
        time.sleep(0.1)


if __name__ == "__main__":
    run_command(main)
