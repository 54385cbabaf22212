"""Stage register: the run is completed in MLflow, the weights become a version, the best version the champion.

With --show or --verify it registers nothing, and tells where a registered model came from.
"""

from gpt2.checkpoints import Checkpoints
from gpt2.cli import Parser, UserError, run_command
from gpt2.config import Params, champion_uri, load_params
from gpt2.files import read_json, write_json
from gpt2.lineage import checkpoint_folder
from gpt2.project import METRICS, MODEL, PARAMS, RECEIPT, TOKENS
from gpt2.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, promote, provenance, register, verify
from gpt2.tracking import MODEL_SHA256, flatten, mirror_run
from gpt2.weights import CONFIG, read_config


def main() -> None:
    champion = champion_uri(PARAMS)
    parser = Parser(description=__doc__, allow_abbrev=False)
    for name, about in (
        ("--show", "print what a model was made from, and the commands that make it again"),
        ("--verify", "read a model's weights, and compare their SHA-256 with the registered one"),
    ):
        parser.add_argument(name, nargs="?", const=champion, metavar="URI", help=f"{about} (default: {champion})")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(provenance(arguments.show))
    if arguments.verify is not None:
        print(verify(arguments.verify))
    if arguments.show is None and arguments.verify is None:
        register_results()


def register_results() -> None:
    """Bring what the stages before have written into MLflow."""
    params = load_params(PARAMS)
    check_parameters(params)
    name, alias = params.register_.name, params.register_.alias
    _, model_sha256 = read_config(MODEL)
    evaluated = read_json(METRICS / "evaluate.json")
    tags = {
        MODEL_SHA256: model_sha256,
        TEST_LOSS: repr(evaluated["loss"]),
        TEST_STRIDE: str(evaluated["stride"]),
        TEST_SHA256: read_json(TOKENS / "meta.json")["splits"]["test"]["sha256"],
    }
    with mirror_run(params, model_sha256) as run:
        version = register(MODEL, name, tags)
        verdict = promote(name, alias, version)
    print(f"run {run.info.run_name}: {run.info.run_id}")
    print(verdict)
    Checkpoints(checkpoint_folder(params)).remove()
    # The same results leave the same receipt, whatever ids and version numbers the store gave them.
    write_json(RECEIPT, {"name": name, "alias": alias, **tags})


def check_parameters(params: Params) -> None:
    """Raise UserError if the model was trained with other parameters, whose run this would pass for."""
    saved, present = flatten(read_json(MODEL / CONFIG)), flatten(params.model_dump(include={"model", "train"}))
    changes = [f"{name} {saved.get(name)}, not {value}" for name, value in present.items() if saved.get(name) != value]
    if changes:
        raise UserError(f"{MODEL} was trained with other parameters ({'; '.join(changes)}); run `dvc repro`")


if __name__ == "__main__":
    run_command(main)
