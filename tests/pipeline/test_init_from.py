"""A training that starts from given weights, in the pipeline: its start, its lineage, and what makes it run again."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.helpers import COMMIT_RESULTS, Shell, assert_complete, run_scripts, runs_by_name

pytestmark = pytest.mark.slow


def test_a_training_starts_from_a_version_and_tells_so(
    checkout: Path, shell: Shell, environment: dict[str, str], tmp_path: Path, reproduced: object
) -> None:
    digest = json.loads((checkout / "data/model/config.json").read_text())["model_sha256"]
    measured = (checkout / "data/metrics/evaluate.json").read_text()
    shown = shell("python src/evaluate.py --model models:/gpt2/1").stdout
    assert f"test loss {json.loads(measured)['loss']:.4f}" in shown
    assert (checkout / "data/metrics/evaluate.json").read_text() == measured

    shutil.copytree(checkout / "data/model", checkout / "data/pretrained/mine")
    assert "data/pretrained" in shell("dvc status train").stdout  # so it would train again
    shutil.rmtree(checkout / "data/pretrained/mine")
    shell(f"dvc add data/raw/poems.txt && {COMMIT_RESULTS}")
    losses = list(csv.DictReader((checkout / "data/plots/val_loss.csv").open()))
    refused = shell("dvc exp run --temp -S train.init_from=models:/gpt2@champion", code=255).stderr
    assert "train.init_from models:/gpt2@champion may name another version tomorrow: write models:/gpt2/1" in refused
    shell("dvc exp run -n tuned -S train.init_from=models:/gpt2/1 -S model.max_len=32 -S train.learning_rate=0.00001")
    started = list(csv.DictReader((checkout / "data/plots/val_loss.csv").open()))
    assert started[0]["step"] == "0" and losses[-1]["step"] == "6"
    assert float(started[0]["loss"]) == pytest.approx(float(losses[-1]["loss"]), rel=1e-5)

    run = runs_by_name(checkout)["tuned"]
    assert_complete(checkout, run, max_steps=6)
    assert (run.data.tags["gpt2.parent"], run.data.tags["gpt2.parent_sha256"]) == ("models:/gpt2/1", digest)
    facts, commands = shell("python src/register.py --show models:/gpt2/2").stdout.split("\n\n")
    told = yaml.safe_load(facts)
    assert (told["parent"], told["parent_sha256"]) == ("models:/gpt2/1", digest)
    all_installed = "\n".join(line for line in commands.splitlines() if "pip install" not in line)
    assert shell(f"set -e\n{all_installed}").stdout.splitlines()[-1].split()[0] == told["weights_sha256"]

    runs = set(runs_by_name(checkout))
    mistakes = {"model.d_ff": 64, "train.init_from": "models:/gpt2/9"}
    params = (checkout / "params.yaml").read_text()
    for name, value in mistakes.items():
        section, key = name.split(".")
        changed = yaml.safe_load(params)
        changed[section][key] = value
        (checkout / "params.yaml").write_text(yaml.safe_dump(changed))
        line = run_scripts(["train.py"], checkout, environment, code=2)
        assert {"d_ff": "set model.d_ff 32\n", "init_from": "no model at models:/gpt2/9"}[key] in line
    assert set(runs_by_name(checkout)) == runs
