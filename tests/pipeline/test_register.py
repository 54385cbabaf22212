"""register.py on results of the pipeline: what it tells of a model, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from gpt2.core.files import sha256_of
from pipeline.helpers import Shell, assert_complete, client_of, run_scripts, runs_by_name

pytestmark = pytest.mark.slow


def test_a_version_tells_how_to_make_it_again(checkout: Path, shell: Shell, reproduced: object) -> None:
    facts, _ = shell("python src/register.py --show").stdout.split("\n\n")  # of the commands see test_init_from.py
    shown = yaml.safe_load(facts)
    made = json.loads((checkout / "data/model/config.json").read_text())["model_sha256"]
    assert shown["weights_sha256"] == made
    assert shown["git_commit"] == shell("git rev-parse HEAD").stdout.strip()
    assert shown["test_perplexity"] == json.loads((checkout / "data/metrics/evaluate.json").read_text())["perplexity"]
    assert shown["stride"] == 16
    assert shown["data_digest"] == sha256_of(checkout / "data/tokens/train.bin")[:32]
    assert shown["params"]["train"]["max_steps"] == 6 and shown["aliases"] == ["champion"]


def test_a_version_is_described(checkout: Path, shell: Shell, reproduced: object) -> None:
    (run,) = runs_by_name(checkout).values()
    client = client_of(checkout)
    version = client.get_model_version_by_alias("gpt2", "champion")
    perplexity = json.loads((checkout / "data/metrics/evaluate.json").read_text())["perplexity"]
    assert version.tags["test_perplexity"] == f"{perplexity:,.1f}" and version.tags["steps"] == "6"
    assert f"(test {perplexity:,.1f};" in str(version.description).splitlines()[0]
    assert client.get_registered_model("gpt2").description
    assert run.data.tags["mlflow.note.content"].startswith("params.yaml as it is (commit ")
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.name == run.info.run_name
    results = {name: value for name, value in run.data.metrics.items() if name.partition("/")[0] in ("test", "sample")}
    assert results.items() <= {metric.key: metric.value for metric in model.metrics or []}.items()
    address = f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning"
    assert address in shell("python src/register.py").stdout
    assert_complete(checkout, runs_by_name(checkout)[str(run.info.run_name)], max_steps=6)


def test_a_version_outlives_its_run(checkout: Path, shell: Shell, reproduced: object) -> None:
    (run,) = runs_by_name(checkout).values()
    client_of(checkout).delete_run(run.info.run_id)
    store = "sqlite:///mlflow.db"
    shell(f"MLFLOW_TRACKING_URI={store} mlflow gc --backend-store-uri {store} --run-ids {run.info.run_id}")

    def shown_run() -> str:
        return yaml.safe_load(shell("python src/register.py --show").stdout.partition("\n\n")[0])["run"]

    assert shown_run().startswith(f"{run.info.run_id} (deleted")
    shell("python src/register.py")
    (again,) = runs_by_name(checkout).values()
    assert_complete(checkout, again, max_steps=6)
    assert shown_run() == again.info.run_id != run.info.run_id


def test_weights_that_were_not_registered_are_refused(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: object
) -> None:
    assert "has the SHA-256 that was registered" in shell("python src/register.py --verify").stdout
    (weights,) = (checkout / "mlartifacts").rglob("model.safetensors")
    config = weights.with_name("config.json")
    whole, recorded = weights.read_bytes(), config.read_text()

    def assert_refused(reason: str) -> None:
        commands = ["register.py --verify", "register.py --verify models:/gpt2/1", "infer.py --prompt Roses"]
        printed = run_scripts(commands, checkout, environment, code=2)
        assert [reason in line for line in printed.splitlines()] == [True] * len(commands)

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused("is damaged")
    config.write_text(json.dumps(json.loads(recorded) | {"model_sha256": sha256_of(weights)}))
    assert_refused("does not hold the weights that were registered")
    weights.write_bytes(whole)
    config.write_text(recorded)


def test_results_that_do_not_belong_together_are_not_registered(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: object
) -> None:
    before = runs_by_name(checkout).keys()
    no_result = "s/activation_checkpointing: false/activation_checkpointing: true/"  # differs by it, so none is told
    shell(f"sed -i.saved 's/max_steps: 6/max_steps: 7/; {no_result}' params.yaml")
    refused = shell("python src/register.py", code=2).stderr
    (checkout / "params.yaml.saved").replace(checkout / "params.yaml")
    assert "the results are of other parameters (train.max_steps 6, not 7); run `dvc repro`" in refused
    for name, changed, reason in (
        ("metrics/evaluate.json", {"model": "of-older"}, "the results of stage evaluate are not of the model in"),
        ("metrics/sample.json", {"model": "of-older"}, "the results of stage sample are not of the model in"),
        ("metrics/evaluate.json", {"stride": 8}, "the results are of other parameters (evaluate.stride 8, not 16)"),
        ("lineage.json", {"prepare": {"source": "sotu"}}, "other parameters (prepare.source sotu, not data/raw; "),
        ("lineage.json", {"runtime": {"threads": 7}}, "other parameters (runtime.threads 7, not 1; "),
        ("samples/params.json", {"max_tokens": 3}, "other parameters (sample.max_tokens 3, not 9)"),
        ("report/params.json", {"heads": 64}, "other parameters (report.heads 64, not "),
        ("tokens/meta.json", {"splits": None}, "was trained on other tokens than those in"),
    ):
        file = checkout / "data" / name
        ours = file.read_text()
        file.write_text(json.dumps(json.loads(ours) | changed))
        assert reason in run_scripts(["register.py"], checkout, environment, code=2)
        file.write_text(ours)
    assert runs_by_name(checkout).keys() == before
