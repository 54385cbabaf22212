"""A training's progress: a bar on a terminal of 80 columns, plain lines in a pipe, the same figures in both."""

import re
import subprocess
import sys
from pathlib import Path

import pexpect

SRC = Path(__file__).parents[2] / "src"
TRAINING = """
import sys, time
from pathlib import Path
import torch
from gpt2.config import TrainParams, load_params
from gpt2.core.progress import Progress
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.training_log import TrainingLog

params = load_params(Path(sys.argv[1])).train.model_copy(update={"max_steps": 20000, "log_interval": 5})
log = TrainingLog(params, torch.device("cpu"), Checkpoints(Path("nowhere")), lambda *_: None)
log.log_validation(0, 10.825)
for step in log.progress(19980):
    time.sleep(0.06)
    log.add(torch.tensor(4.5), torch.tensor(1.0))
    if step == 19990:
        with Progress("validate", 300, brief=True, line_seconds=0.1) as progress:
            for _ in range(30):
                time.sleep(0.06)
                progress.advance(10)
        log.log_validation(step, 4.832)
    if (step + 1) % 5 == 0:
        log.log_training(step + 1)
print("the end")
"""
ARGUMENTS = ["-c", TRAINING, str(SRC.parent / "params.yaml")]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SRC), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
COUNTS = r"20000/20000 \[\d\d:\d\d<\d\d:\d\d, loss 4\.500, val 4\.832, [\d.]+k tok/s\]"


def test_bar_shows_in_80_columns_with_all_its_figures() -> None:
    child = pexpect.spawn(sys.executable, ARGUMENTS, env=ENVIRONMENT, encoding="utf-8", timeout=60, dimensions=(24, 80))
    child.expect_exact(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    shown = re.sub(r"\x1b\[A", "", child.before)  # back up from the bar of the validation
    bars = [bar for bar in re.split(r"[\r\n]+", shown) if bar.startswith(("train", "validate"))]
    assert max(map(len, bars)) <= 80
    assert re.fullmatch(rf"train +\|.*\| {COUNTS} *", bars[-1]), bars[-1]
    assert all("█████" in bar for bar in bars if bar.startswith("train"))
    assert any(re.match(r"validate \|██.*\| [12]\d0/300 \[", bar) for bar in bars)
    assert shown.rstrip().endswith("the end")


def test_without_a_terminal_each_log_interval_is_a_line() -> None:
    done = subprocess.run([sys.executable, *ARGUMENTS], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "the end\n"
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    trained = [line for line in lines if line.startswith("train ")]
    assert [line.split()[1] for line in trained] == [f"{step}/20000" for step in (19985, 19990, 19995, 20000)]
    assert "val 10.825" in trained[1] and re.fullmatch(f"train {COUNTS}", trained[-1])
    assert any(re.match(r"validate \d+/300 \[", line) for line in lines)


def test_a_computation_goes_on_when_nobody_reads_its_progress() -> None:
    with subprocess.Popen(
        [sys.executable, *ARGUMENTS], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stderr
        child.stderr.close()
        assert child.stdout.read() == b"the end\n"
