"""Where a registered model came from, and how to make it again."""

import re
import shlex
from typing import Any

import mlflow
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from gpt2.core.errors import UserError
from gpt2.core.files import read_json
from gpt2.core.paths import LINEAGE, PARAMS
from gpt2.evaluation.perplexity import perplexity
from gpt2.tracking.champion import STRIDE, VAL_LOSS, VERDICT
from gpt2.tracking.lineage import Lineage
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.registry import NOT_THERE, RUN_ID, TEST_LOSS, artifacts_folder, open_version, uri_of
from gpt2.tracking.runs import COMMIT, ENVIRONMENT, PARENT, PARENT_SHA256, THREADS, UNCOMMITTED

MAIN_STORE = '"${MLFLOW_TRACKING_URI:-sqlite:///$OLDPWD/mlflow.db}"'


def provenance(uri: str) -> str:
    """Return where the model behind a URI came from, and the commands that make it again. Raises UserError.

    A version tells this by its own tags and files: its run may be deleted.
    """
    try:
        return _provenance(uri)
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"what {uri} was made from cannot be read: {error!r}") from None


def _provenance(uri: str) -> str:
    with open_version(uri) as version:
        client, tags, folder = mlflow.MlflowClient(), version.tags, artifacts_folder(version)
        lineage = read_json(folder / LINEAGE.name)
        aliases = client.get_registered_model(version.name).aliases
        run = _describe_run(client, tags[RUN_ID])
    facts: dict[str, Any] = {
        "model": uri_of(version),
        "aliases": [alias for alias, number in aliases.items() if number == version.version],
        "verdict": tags.get(VERDICT),
        "weights_sha256": tags[MODEL_SHA256],
        "stride": int(tags[STRIDE]),
        "val_loss": float(tags[VAL_LOSS]),
        "test_loss": float(tags[TEST_LOSS]),
        "test_perplexity": perplexity(float(tags[TEST_LOSS])),
        "run": run,
        "parent": tags.get(PARENT),
        "parent_sha256": tags.get(PARENT_SHA256),
        "git_commit": tags.get(COMMIT),
        "uncommitted": tags.get(UNCOMMITTED),
        "environment": tags[ENVIRONMENT],
        "threads": tags[THREADS],
        "corpus": lineage["prepare"]["source"],
        "data_digest": lineage["files"]["data/tokens/train.bin"][:32],
        "params": yaml.safe_load((folder / PARAMS.name).read_text(encoding="utf-8")),
    }
    shown = yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return f"{shown}\n{reproduction(version, lineage)}"


def reproduction(version: ModelVersion, lineage: Lineage) -> str:
    """Return the shell commands that make a version's weights again, in a clone beside the main checkout."""
    if not re.fullmatch("[0-9a-f]+", lineage["commit"]):  # a store may tell anything, and this goes to a shell
        return "# It was made outside git, so there is no commit to make it again from."
    parent, source = version.tags.get(PARENT, ""), lineage["prepare"]["source"]
    on_hub = source.startswith("hf:") and not source.startswith("hf:data/")
    own = [("raw", source != "sotu" and not on_hub), ("pretrained", parent.startswith("data/"))]
    clone = f"../gpt2-{version.tags[MODEL_SHA256][:8]}"
    datasets = " datasets" if source.startswith("hf:") else ""
    download = f"mlflow artifacts download --dst-path {clone} --artifact-uri {shlex.quote(uri_of(version))}/artifacts"
    apply = f"""python3 -c "import json; print(end=json.load(open('artifacts/{LINEAGE.name}'))['diff'])" | git apply"""
    lines = [
        "# To make it again, on the same machine:",
        f"git clone --quiet . {clone}",
        f"git -C {clone} checkout --quiet {lineage['commit']}",
        *([f"{download}/{LINEAGE.name}", f"(cd {clone} && {apply})"] if lineage["diff"] else []),
        f"{download}/{PARAMS.name} && cp {clone}/artifacts/{PARAMS.name} {clone}",
        *(_copy(f"data/{name}", clone, lineage["commit"]) for name, is_needed in own if is_needed),
        f"cd {clone}",
        *([f"export MLFLOW_TRACKING_URI={MAIN_STORE}  # which has its parent"] if ":/" in parent else []),
        f"python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt{datasets}",
        "dvc repro",
        "sha256sum data/model/model.safetensors",
    ]
    return "\n".join(lines)


def _copy(folder: str, clone: str, commit: str) -> str:
    """Return the commands that give a clone a folder of data: what DVC keeps as of the commit, the rest as it is."""
    kept = f"dvc get --quiet --rev {commit} . {folder} --out {clone}/{folder}"
    back = f"git -C {clone} checkout --quiet -- {folder}"
    return f"rm -r {clone}/{folder} && {kept}; cp -rn {folder} {clone}/data/; {back}"


def _describe_run(client: mlflow.MlflowClient, run_id: str) -> str:
    """Return a run's id, and whether the run has been deleted."""
    try:
        is_deleted = client.get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        is_deleted = True
    return f"{run_id} (deleted; the next `python src/register.py` makes it again)" if is_deleted else run_id
