"""Stage register: the run is completed in MLflow, the weights become a version, the best version the champion.

With --show or --verify it registers nothing, and tells where a registered model came from.
"""

from typing import Any

from gpt2.checkpoints import Checkpoints
from gpt2.cli import Parser, UserError, run_command
from gpt2.config import Params, champion_uri, load_params
from gpt2.files import read_json, write_json
from gpt2.lineage import checkpoint_folder
from gpt2.project import METRICS, MODEL, PARAMS, RECEIPT, TOKENS
from gpt2.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, promote, provenance, register, verify
from gpt2.tracking import MODEL_SHA256, flatten, mirror_run
from gpt2.weights import CONFIG, read_config, short_name


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    for name, about in (
        ("--show", "print what a model was made from, and the commands that make it again"),
        ("--verify", "read a model's weights, and compare their SHA-256 with the registered one"),
    ):
        parser.add_argument(name, nargs="?", const="", metavar="URI", help=f"{about} (default: the champion)")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(provenance(arguments.show or champion_uri(PARAMS)))
    if arguments.verify is not None:
        print(verify(arguments.verify or champion_uri(PARAMS)))
    if arguments.show is None and arguments.verify is None:
        register_results()


def register_results() -> None:
    """Bring what the stages before have written into MLflow."""
    params = load_params(PARAMS)
    evaluated, sampled = (read_json(METRICS / f"{stage}.json") for stage in ("evaluate", "sample"))
    meta = read_json(TOKENS / "meta.json")
    check_results(params, evaluated, sampled, meta)
    name, alias = params.register_.name, params.register_.alias
    _, model_sha256 = read_config(MODEL)
    tags = {
        MODEL_SHA256: model_sha256,
        TEST_LOSS: repr(evaluated["loss"]),
        TEST_STRIDE: str(evaluated["stride"]),
        TEST_SHA256: meta["splits"]["test"]["sha256"],
    }
    with mirror_run(params, model_sha256) as run:
        version = register(MODEL, name, tags)
        verdict = promote(name, alias, version)
    print(f"run {run.info.run_name}: {run.info.run_id}")
    print(verdict)
    Checkpoints(checkpoint_folder(params)).remove()
    # The same results leave the same receipt, whatever ids and version numbers the store gave them.
    write_json(RECEIPT, {"name": name, "alias": alias, **tags})


def check_results(params: Params, evaluated: dict[str, Any], sampled: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raise UserError if the files are not results of the present parameters, under which they would be recorded."""
    recorded = {"prepare": {"source": meta["source"]}, "evaluate": {"stride": evaluated["stride"]}}
    made = flatten(read_json(MODEL / CONFIG) | recorded)
    compared: Any = {"prepare": {"source"}, "model": True, "train": True, "evaluate": {"stride"}}
    present = flatten(params.model_dump(include=compared))
    changes = [f"{name} {made.get(name)}, not {value}" for name, value in present.items() if made.get(name) != value]
    if changes:
        raise UserError(f"the results are of other parameters ({'; '.join(changes)}); run `dvc repro`")
    for stage, result in (("evaluate", evaluated), ("sample", sampled)):
        if result.get("model") != short_name(MODEL):
            raise UserError(f"the results of stage {stage} are not of the model in {MODEL}; run `dvc repro`")


if __name__ == "__main__":
    run_command(main)
