"""Stage register: the run is completed in MLflow, the weights become a version, the best version the champion."""

from gpt2.checkpoints import Checkpoints
from gpt2.cli import run_command
from gpt2.config import load_params
from gpt2.files import read_json, write_json
from gpt2.lineage import train_key
from gpt2.project import METRICS, MODEL, PARAMS, RECEIPT, TOKENS, training_state
from gpt2.registry import TEST_LOSS, TEST_SHA256, promote, register
from gpt2.tracking import MODEL_SHA256, mirror_run
from gpt2.weights import read_config


def main() -> None:
    params = load_params(PARAMS)
    name, alias = params.register_.name, params.register_.alias
    _, model_sha256 = read_config(MODEL)
    tags = {
        MODEL_SHA256: model_sha256,
        TEST_LOSS: repr(read_json(METRICS / "evaluate.json")["loss"]),
        TEST_SHA256: read_json(TOKENS / "meta.json")["splits"]["test"]["sha256"],
    }
    with mirror_run(params, model_sha256) as run:
        version = register(MODEL, name, tags)
        print(f"run {run.info.run_name}: {run.info.run_id}")
        print(promote(name, alias, version))
    Checkpoints(training_state(train_key(params))).remove()
    # The same results leave the same receipt, whatever ids and version numbers the store gave them.
    write_json(RECEIPT, {"name": name, "alias": alias, **tags})


if __name__ == "__main__":
    run_command(main)
