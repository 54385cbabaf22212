"""Where a registered model came from, and how to make it again."""

import mlflow
import yaml
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from gpt2.evaluation.perplexity import perplexity
from gpt2.tracking.registry import TEST_LOSS, TEST_STRIDE, open_version, uri_of
from gpt2.tracking.runs import COMMIT, ENVIRONMENT, MODEL_SHA256, THREADS


def provenance(uri: str) -> str:
    """Return where the model behind a URI came from, and the commands that make it again. Raises UserError."""
    with open_version(uri) as version:
        client = mlflow.MlflowClient()
        run = client.get_run(str(version.run_id))
        aliases = client.get_registered_model(version.name).aliases
        params = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config/params.yaml"))
    assert run.inputs  # logged before a version is made
    loss, corpus = float(version.tags[TEST_LOSS]), run.inputs.dataset_inputs[0].dataset
    facts = {
        "model": uri_of(version),
        "aliases": [alias for alias, number in aliases.items() if number == version.version],
        "weights_sha256": version.tags[MODEL_SHA256],
        "test_stride": int(version.tags[TEST_STRIDE]),
        "test_loss": loss,
        "test_perplexity": perplexity(loss),
        "run": run.info.run_id,
        "git_commit": run.data.tags.get(COMMIT),
        "environment": run.data.tags.get(ENVIRONMENT),
        "threads": run.data.tags.get(THREADS),
        "corpus": corpus.name,
        "data_digest": corpus.digest,
        "params": params,
    }
    shown = yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return f"{shown}\n{reproduction(version, run, params['prepare']['source'])}"


def reproduction(version: ModelVersion, run: Run, source: str) -> str:
    """Return the shell commands that make a version's weights again, in a clone beside the main checkout."""
    commit, _, dirty = run.data.tags.get(COMMIT, "").partition("-")
    if not commit:
        return "# It was made outside git, so there is no commit to make it again from."
    clone = f"../gpt2-{version.tags[MODEL_SHA256][:8]}"
    lines = [
        "# To make it again, on the same machine:",
        f"git clone --quiet . {clone}",
        f"git -C {clone} checkout --quiet {commit}",
        f"mlflow artifacts download --artifact-uri runs:/{run.info.run_id}/config/params.yaml --dst-path {clone}",
        *([f"cp -r data/raw {clone}/data/"] if source != "sotu" else []),
        f"cd {clone}",
        "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt",
        "dvc repro",
        "sha256sum data/model/model.safetensors",
    ]
    if dirty:
        lines.insert(1, f"# Not all of its code was committed; the library that it used is {uri_of(version)}/code.")
    return "\n".join(lines)
