"""The pipeline with a training in several processes."""

import csv
from pathlib import Path

import pytest
import yaml

from pipeline.helpers import Repro, assert_complete, clone, run_scripts, runs_by_name

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((folder / "data/plots/val_loss.csv").open())]


def test_repro_trains_in_two_processes_as_in_one(
    checkout: Path, environment: dict[str, str], tmp_path: Path, repro: Repro
) -> None:
    alone, shared = (
        clone(checkout, tmp_path / name / "gpt2", initialization="random", log_checkpoints=3)  # type: ignore[arg-type]
        for name in ("alone", "shared")
    )
    run_scripts(["prepare.py", "train.py"], alone, environment)
    params = yaml.safe_load((shared / "params.yaml").read_text())
    params["train"] |= {"launcher": "torchrun", "nproc_per_node": 2, "parallel": "fsdp"}
    (shared / "params.yaml").write_text(yaml.safe_dump(params))
    assert repro(shared, "").wait(600) == 0
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    (run,) = runs_by_name(shared).values()
    assert_complete(shared, run, max_steps=6)
    assert [path.name for path in (shared / ".cache/train").iterdir()] == ["finished"]
