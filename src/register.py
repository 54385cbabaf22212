"""Stage register: complete the run in MLflow, make a version of the weights, and make the best version the champion.

With an option it registers nothing.
"""

import os
from typing import Any

from gpt2.core.environment import MLFLOW_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | os.environ)

from gpt2.config import Params, champion_uri, load_params
from gpt2.core.cli import Parser, run_command
from gpt2.core.errors import UserError
from gpt2.core.files import read_json, sha256_of, write_json
from gpt2.core.paths import LINEAGE, METRICS, MODEL, PARAMS, RECEIPT, REPORT, SAMPLES, TOKENS
from gpt2.model.weights import read_config, short_name
from gpt2.tracking.card import describe, read_card
from gpt2.tracking.champion import STRIDE, TOKENIZER, VAL_LOSS, VAL_SHA256, choose_champion, promote
from gpt2.tracking.lineage import HOW_TO_COMPUTE, Lineage, checkpoint_folder, differences
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.provenance import provenance
from gpt2.tracking.registry import TEST_LOSS, register, unchanged_parent, uri_of, verify
from gpt2.tracking.runs import lineage_tags, mirror_run
from gpt2.tracking.store import charts_address, repair
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.optimizers import steps_before_decay


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    for name, about in (
        ("--show", "print what a model was made from, and the commands that make it again"),
        ("--verify", "read a model's weights, and compare their SHA-256 with the registered one"),
    ):
        parser.add_argument(name, nargs="?", const="", metavar="URI", help=f"{about} (default: the champion)")
    parser.add_argument("--promote", metavar="VERSION", help="make a version the champion, whatever its loss")
    parser.add_argument("--repair", action="store_true", help="mend the paths in MLflow's store after it was moved")
    arguments = parser.parse_args()
    if arguments.repair:
        print(repair())
    if arguments.promote is not None:
        name, _, alias = champion_uri(PARAMS).removeprefix("models:/").partition("@")
        print(promote(name, alias, arguments.promote))
    if arguments.show is not None:
        print(provenance(arguments.show or champion_uri(PARAMS)))
    if arguments.verify is not None:
        print(verify(arguments.verify or champion_uri(PARAMS)))
    if not arguments.repair and arguments.promote == arguments.show == arguments.verify is None:
        register_results()


def register_results() -> None:
    """Log the results of the stages before to MLflow, and register the model."""
    params = load_params(PARAMS)
    try:
        lineage = read_json(LINEAGE)
        check_parameters(params, lineage)
        measured = measured_tags()
        made_from = lineage_tags(lineage) | {MODEL_SHA256: read_config(MODEL)[1]}
        card = read_card(params, lineage)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"the results cannot be read ({error!r}); run `dvc repro`") from None
    name, alias = params.register_.name, params.register_.alias
    with mirror_run(params, lineage, made_from[MODEL_SHA256]) as run:
        if parent := unchanged_parent(made_from):  # which stays what it is
            verdict = f"training improved nothing: these are the weights of {uri_of(parent)}, from which it started"
        else:
            version = register(name, run, made_from, measured, card.tags)
            verdict = choose_champion(version, params)
            describe(version, card, alias)
        charts = charts_address(run.info.experiment_id)
    print(f"run {run.info.run_name}: {run.info.run_id}")
    print(f"charts of all runs: {charts}")
    print(verdict)
    Checkpoints(checkpoint_folder(lineage["train_key"]), steps_before_decay(params.train)).finish()
    # The same results leave the same receipt, whatever ids and version numbers the store gave them.
    write_json(RECEIPT, {"name": name, "alias": alias, **made_from, **measured})


def check_parameters(params: Params, lineage: Lineage) -> None:
    """Raise UserError if the results are of other parameters than the present ones, or of several models.

    Raises KeyError or TypeError if a file of results is broken.
    """
    evaluated, sampled = (read_json(METRICS / f"{stage}.json") for stage in ("evaluate", "sample"))
    recorded = {name: lineage[name] for name in ("prepare", "model", "train", "runtime")}
    recorded |= {"sample": read_json(SAMPLES / "params.json"), "report": read_json(REPORT / "params.json")}
    recorded["evaluate"] = {"stride": evaluated["stride"]}
    compared: Any = dict.fromkeys(recorded, True) | {"evaluate": {"stride"}}
    compared["train"] = recorded["train"].keys() - HOW_TO_COMPUTE
    recorded["train"] = {name: recorded["train"][name] for name in compared["train"]}
    changes = differences(recorded, params.model_dump(include=compared))
    if changes:
        raise UserError(f"the results are of other parameters ({'; '.join(changes)}); run `dvc repro`")
    for stage, result in (("evaluate", evaluated), ("sample", sampled)):
        if result["model"] != short_name(MODEL):
            raise UserError(f"the results of stage {stage} are not of the model in {MODEL}; run `dvc repro`")
    if lineage["files"]["data/tokens/meta.json"] != sha256_of(TOKENS / "meta.json"):
        raise UserError(f"the model in {MODEL} was trained on other tokens than those in {TOKENS}; run `dvc repro`")


def measured_tags() -> dict[str, str]:
    """Return the tags of a version that tell how its weights were measured. Raises KeyError or TypeError."""
    evaluated, meta = read_json(METRICS / "evaluate.json"), read_json(TOKENS / "meta.json")
    return {
        VAL_LOSS: repr(evaluated["val_loss"]),
        VAL_SHA256: meta["splits"]["val"]["sha256"],
        STRIDE: str(evaluated["stride"]),
        TOKENIZER: meta["tokenizer"],
        TEST_LOSS: repr(evaluated["loss"]),
    }


if __name__ == "__main__":
    run_command(main)
