"""Stage train: a GPT-2 learns the training split; its weights go to data/model, its curves to data/plots."""

import os
from functools import partial
from pathlib import Path

from gpt2.core.environment import MLFLOW_DEFAULTS, OPENMP_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | OPENMP_DEFAULTS | os.environ)

from gpt2.config import ModelConfig, Params, load_params
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import choose_device, use_threads
from gpt2.core.errors import UserError
from gpt2.core.files import file_lock, read_json, write_json
from gpt2.core.paths import CHECKOUT_LOCK, LINEAGE, METRICS, MODEL, PARAMS, PLOTS, TOKENIZER_FILE, TOKENS
from gpt2.data.batches import load_seen, load_tokens
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.seen_tokens import keep_rows
from gpt2.model.weights import SEEN_TOKENS, save_model
from gpt2.tracking.lineage import (
    checkpoint_folder,
    collect_lineage,
    describe_saved_trainings,
    first_lineage,
    shared_checkpoint,
    with_parent,
)
from gpt2.tracking.named_models import load_parent
from gpt2.tracking.runs import NO_LOG, training_run
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.distributed import first_only, from_first, gathered, is_first, is_launcher, launch, process_group
from gpt2.training.history import write_curves
from gpt2.training.optimizers import shared_steps
from gpt2.training.run import build_model, check_shape, run_training, take_weights


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    about = "delete the checkpoints of all trainings that are not running, and train nothing"
    parser.add_argument("--remove-checkpoints", action="store_true", help=about)
    if parser.parse_args().remove_checkpoints:
        for folder in checkpoint_folder("").glob("*/"):
            Checkpoints(folder).remove()
        return
    params = load_params(PARAMS)
    if is_launcher(params.train):
        launch(params.train.nproc_per_node)
    with process_group(choose_device(params.runtime.device)):
        train_model(params)


def train_model(params: Params) -> None:
    """Train, in one process or in several, of which the first alone writes files and logs."""
    threads = use_threads(params.runtime.threads)
    # Of the code as it is imported, not as it may be edited meanwhile.
    lineage = collect_lineage(params, threads) if is_first() else {}
    meta = read_json(TOKENS / "meta.json")
    config = ModelConfig(**params.model.model_dump(), vocab_size=meta["vocab_size"])
    seen = load_seen(TOKENS / SEEN_TOKENS, config.vocab_size)
    parent_name = params.train.init_from
    parent = load_parent(parent_name) if parent_name and is_first() else None
    if parent:
        if parent.tokenizer.name != meta["tokenizer"]:
            raise UserError(f"train.init_from {parent_name} has another tokenizer than data/tokens")
        check_shape(config, parent.config, str(parent_name))
        lineage = with_parent(lineage, parent.sha256)
        seen = keep_rows(seen, parent.model.output_projection.weight, parent.seen)
    lineage, seen = from_first(lambda: (lineage, seen))
    model = build_model(config, params.train, choose_device(params.runtime.device))
    if parent_name:
        print(f"starting from {parent_name}, weights {lineage['parent_sha256'][:12]}", flush=True)
        take_weights(model, parent.model if parent else None)
        del parent  # it takes memory
    print(f"{model.count_parameters():,} parameters", flush=True)
    train_tokens, val_tokens = (load_tokens(TOKENS / f"{split}.bin") for split in ("train", "val"))
    checkpoints = Checkpoints(checkpoint_folder(lineage["train_key"]), shared_steps(params.train))

    def write_model(whole: GPT2Model, folder: Path) -> str:
        shared = seen if params.train.fused else None
        return save_model(whole, config, folder, params.train, shared, TOKENS / TOKENIZER_FILE)

    # One that DVC has left behind when it was killed may still run here, perhaps with other parameters.
    alone = file_lock(CHECKOUT_LOCK, "another training writes to this checkout")
    with first_only(alone, None), first_only(checkpoints.locked(), None):
        if is_first():
            lineage = first_lineage(lineage)
            for line in describe_saved_trainings(lineage):
                print(f"{line}; `python src/train.py --remove-checkpoints` deletes them", flush=True)
            if checkpoints.is_empty() and (path := shared_checkpoint(lineage)):
                print(f"going on from {path}, which has the same first steps", flush=True)
                checkpoints.go_on_from(path)
        with first_only(training_run(params, lineage), NO_LOG) as (log_metrics, log_weights):
            metrics, history = run_training(
                model,
                train_tokens,
                val_tokens,
                seen,
                params.train,
                params.runtime,
                checkpoints,
                log_metrics,
                lambda step: log_weights(step, partial(write_model, gathered(model, config))),
            )
        whole = gathered(model, config)
        if is_first():
            digest = write_model(whole, MODEL)
            write_json(LINEAGE, lineage)
            write_curves(history, PLOTS)
            write_json(METRICS / "train.json", metrics)
            # The checkpoints stay until register has run: DVC may be killed before it has taken note of these results.
            # Then one stays, for a longer training.
            print(f"val loss {metrics['val_loss']:.4f}; weights {digest[:12]}")


if __name__ == "__main__":
    run_command(main)
