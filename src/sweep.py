"""Search the parameters that sweep.space in params.yaml names for the lowest validation loss, trial by trial.

A trial is an experiment of DVC (prepare and train) and a run in MLflow. Started again, a search that was interrupted
goes on; several may work on one search at once.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt2.core.environment import MLFLOW_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | os.environ)

import psutil
from filelock import BaseFileLock, FileLock

from gpt2.config import Params, load_params
from gpt2.core.cli import Parser, fail, run_command
from gpt2.core.errors import UserError
from gpt2.core.paths import METRICS, PARAMS, ROOT
from gpt2.tracking.store import STORE_ERRORS

try:
    from optuna import Study, Trial

    from gpt2.tracking import sweeps
except ModuleNotFoundError as error:
    sys.exit(fail(f"src/sweep.py needs the library {error.name}: run `pip install optuna`"))

POLL_SECONDS = 1
TRAINED = (METRICS / "train.json").relative_to(ROOT)
PROCESS = "process"  # attribute of a trial: the id of its process and when that began
BUSY = "Unable to acquire lock"  # DVC, while the user runs another command of its


@dataclass
class Running:
    """A trial at work: its process is `dvc exp run`, its lock tells other searches that it has one."""

    name: str
    trial: Trial
    values: sweeps.Values
    lock: BaseFileLock
    log: Path
    process: psutil.Process | None  # None if the results are there


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run so many trials at once (default: 1)")
    jobs = parser.parse_args().jobs
    if jobs < 1:
        raise UserError("--jobs should be at least 1")
    params = load_params(PARAMS)
    sweeps.check_space(params)
    study = sweeps.open_study(params)
    if not study.get_trials(deepcopy=False) and experiments(f"{study.study_name}-[0-9]*"):
        raise UserError(f"experiments {study.study_name}-N are there: change sweep.name, or `dvc exp remove` them")
    try:
        search(study, params, jobs)
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
                if has_ended(one, parent):
                    running.remove(one)
                    one.lock.release()
                    sweeps.mirror(study, params, parent)
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            interrupt(one.process)
    print(sweeps.mirror(study, params, parent))
    try:
        best = f"{study.study_name}-{study.best_trial.number}"
    except ValueError:
        raise UserError(f"no trial is complete; see {sweeps.sweep_folder(study.study_name)}") from None
    print(f"`dvc exp apply {best}` takes its parameters and its model; then `dvc repro` measures and registers it")


def start(study: Study, params: Params, parent: str, running: list[Running]) -> bool:
    """Start the next trial, or follow a process that an earlier search has left; return whether there is one."""
    folder = sweeps.sweep_folder(study.study_name)
    with FileLock(folder / "lock"):  # two experiments that DVC starts at once may take each other's parameters
        if not (taken := sweeps.take_trial(study, params)):
            return False
        trial, values, lock = taken
        name = f"{study.study_name}-{trial.number}"
        log = folder / f"{name}.log"
        print(f"{name}: {sweeps.show(values)}", flush=True)
        process = left_process(trial)
        if not process and trained_loss(name) is None:
            process = run_experiment(name, values, log, sweeps.child_context(parent))
            trial.set_user_attr(PROCESS, [process.pid, process.create_time()])
        running.append(Running(name, trial, values, lock, log, process))
        while process and not is_over(process) and not re.search("[Ss]tage '", read(log)):
            time.sleep(0.1)  # until it runs in a folder of its own
    return True


def run_experiment(name: str, values: sweeps.Values, log: Path, context: dict[str, str]) -> psutil.Popen:
    """Start an experiment of DVC in a folder of its own, in the background; return its process."""
    settings = [f"-S{key}={json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-n", name, *settings, "train"]
    with log.open("w") as file:
        return psutil.Popen(command, cwd=ROOT, env=os.environ | context, stdout=file, stderr=file, process_group=0)


def left_process(trial: Trial) -> psutil.Process | None:
    """Return the process of a trial whose search was killed, if it still runs."""
    with suppress(KeyError, psutil.NoSuchProcess):
        number, began = trial.user_attrs[PROCESS]
        process = psutil.Process(number)
        if process.create_time() == began:
            return process
    return None


def has_ended(one: Running, parent: str) -> bool:
    """Look at a trial: end it if it is hopeless, and write down how it has ended; return whether it has.

    Raises UserError if it failed, but not in its training.
    """
    ended = one.process is None or is_over(one.process)
    child = sweeps.find_child(parent, one.name)
    hopeless = child is not None and sweeps.is_hopeless(one.trial, child)
    if hopeless and not ended:
        interrupt(one.process)
    elif not ended:
        return False
    loss, child = trained_loss(one.name), sweeps.find_child(parent, one.name)
    failed = child is not None and child.info.status == "FAILED"
    if loss is None and not failed and not hopeless:
        if BUSY in read(one.log):
            return True  # to be taken again
        raise UserError(
            f"{one.name} was stopped: {last_error(one.log)} (see {one.log}); start again, and the search goes on"
        )
    state: sweeps.State = "COMPLETE" if loss is not None else "FAIL" if failed else "PRUNED"
    sweeps.settle(one.trial, one.name, one.values, parent, state, loss)
    told = {"COMPLETE": f"val loss {loss}", "PRUNED": "pruned", "FAIL": f"failed: {last_error(one.log)}"}
    print(f"{one.name}: {told[state]}", flush=True)
    return True


def experiments(pattern: str) -> list[str]:
    """Return the git references of DVC's experiments whose names match a glob, the newest first."""
    command = ["git", "for-each-ref", "--sort=-creatordate", "--format=%(refname)", f"refs/exps/*/*/{pattern}"]
    return subprocess.check_output(command, cwd=ROOT, text=True).split()


def trained_loss(name: str) -> float | None:
    """Return the validation loss of an experiment; None if there is none of that name."""
    for reference in experiments(name):
        return json.loads(subprocess.check_output(["git", "show", f"{reference}:./{TRAINED}"], cwd=ROOT))["val_loss"]
    return None


def last_error(log: Path) -> str:
    """Return the last error in a log: a script's own, else DVC's."""
    lines = read(log).splitlines()
    return next((one for mark in ("error: ", "ERROR: ") for one in lines[::-1] if one.startswith(mark)), "no error")


def read(log: Path) -> str:
    """Return what is in a log; nothing if there is none."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def is_over(process: psutil.Process) -> bool:
    """Tell whether a process, a child of this one or not, has ended."""
    try:
        process.wait(0)
    except psutil.TimeoutExpired:
        return False
    return True


def interrupt(process: psutil.Process | None) -> None:
    """Let an experiment save its training and stop, and wait until it has."""
    if process:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait()


if __name__ == "__main__":
    run_command(main)
