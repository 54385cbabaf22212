"""Stage register: complete the run in MLflow, make a version of the weights, and make the best version the champion.

With --show, --verify or --repair it registers nothing.
"""

import os
from typing import Any

from gpt2.core.environment import MLFLOW_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | os.environ)

from gpt2.config import Params, champion_uri, load_params
from gpt2.core.cli import Parser, run_command
from gpt2.core.errors import UserError
from gpt2.core.files import read_json, write_json
from gpt2.core.paths import METRICS, MODEL, PARAMS, RECEIPT, TOKENS
from gpt2.model.weights import CONFIG, read_config, short_name
from gpt2.tracking.lineage import checkpoint_folder
from gpt2.tracking.provenance import provenance
from gpt2.tracking.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, promote, register, verify
from gpt2.tracking.runs import MODEL_SHA256, flatten, mirror_run
from gpt2.tracking.store import repair
from gpt2.training.checkpoints import Checkpoints


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    for name, about in (
        ("--show", "print what a model was made from, and the commands that make it again"),
        ("--verify", "read a model's weights, and compare their SHA-256 with the registered one"),
    ):
        parser.add_argument(name, nargs="?", const="", metavar="URI", help=f"{about} (default: the champion)")
    parser.add_argument("--repair", action="store_true", help="mend the paths in MLflow's store after it was moved")
    arguments = parser.parse_args()
    if arguments.repair:
        print(repair())
    if arguments.show is not None:
        print(provenance(arguments.show or champion_uri(PARAMS)))
    if arguments.verify is not None:
        print(verify(arguments.verify or champion_uri(PARAMS)))
    if not arguments.repair and arguments.show is None and arguments.verify is None:
        register_results()


def register_results() -> None:
    """Log the results of the stages before to MLflow, and register the model."""
    params = load_params(PARAMS)
    try:
        tags = result_tags(params)
    except (KeyError, TypeError) as error:
        raise UserError(f"the results cannot be read ({error!r}); run `dvc repro`") from None
    name, alias = params.register_.name, params.register_.alias
    with mirror_run(params, tags[MODEL_SHA256]) as run:
        version = register(MODEL, name, tags)
        verdict = promote(name, alias, version)
    print(f"run {run.info.run_name}: {run.info.run_id}")
    print(verdict)
    Checkpoints(checkpoint_folder(params)).remove()
    # The same results leave the same receipt, whatever ids and version numbers the store gave them.
    write_json(RECEIPT, {"name": name, "alias": alias, **tags})


def result_tags(params: Params) -> dict[str, str]:
    """Return the tags of a version: its weights, and how they were measured.

    Raises UserError if the results are not of the present parameters, KeyError or TypeError if a file is broken.
    """
    evaluated, sampled = (read_json(METRICS / f"{stage}.json") for stage in ("evaluate", "sample"))
    meta = read_json(TOKENS / "meta.json")
    results = {"prepare": {"source": meta["source"]}, "evaluate": {"stride": evaluated["stride"]}}
    recorded = flatten(read_json(MODEL / CONFIG) | results)
    compared: Any = {"prepare": {"source"}, "model": True, "train": True, "evaluate": {"stride"}}
    present = flatten(params.model_dump(include=compared))
    changes = [f"{key} {recorded.get(key)}, not {now}" for key, now in present.items() if recorded.get(key) != now]
    if changes:
        raise UserError(f"the results are of other parameters ({'; '.join(changes)}); run `dvc repro`")
    for stage, result in (("evaluate", evaluated), ("sample", sampled)):
        if result["model"] != short_name(MODEL):
            raise UserError(f"the results of stage {stage} are not of the model in {MODEL}; run `dvc repro`")
    return {
        MODEL_SHA256: read_config(MODEL)[1],
        TEST_LOSS: repr(evaluated["loss"]),
        TEST_STRIDE: str(evaluated["stride"]),
        TEST_SHA256: meta["splits"]["test"]["sha256"],
    }


if __name__ == "__main__":
    run_command(main)
