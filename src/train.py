"""Stage train: a GPT-2 learns the training split; its weights go to data/model, its curves to data/plots."""

import os
from functools import partial
from pathlib import Path

from gpt2.core.environment import MLFLOW_DEFAULTS, OPENMP_DEFAULTS

os.environ.update(MLFLOW_DEFAULTS | OPENMP_DEFAULTS | os.environ)

import numpy as np
import torch

from gpt2.config import ModelConfig, Params, load_params
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import use_threads
from gpt2.core.errors import UserError
from gpt2.core.files import file_lock, read_json, write_json
from gpt2.core.paths import CHECKOUT_LOCK, LINEAGE, METRICS, MODEL, PARAMS, PLOTS, TOKENIZER_FILE, TOKENS
from gpt2.data.batches import SeenMask, load_seen, load_tokens
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.seen_tokens import keep_rows
from gpt2.model.weights import SEEN_TOKENS, save_model
from gpt2.tracking.lineage import (
    Lineage,
    checkpoint_folder,
    checkpoint_to_extend,
    collect_lineage,
    describe_saved_trainings,
    first_lineage,
    with_parent,
)
from gpt2.tracking.named_models import NamedModel, load_parent
from gpt2.tracking.runs import NO_LOG, training_run
from gpt2.training.checkpoints import Checkpoints
from gpt2.training.distributed import first_only, from_first, is_first, is_launcher, launch, process_group
from gpt2.training.history import write_curves
from gpt2.training.optimizers import steps_before_decay
from gpt2.training.parallel import gathered
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
    with process_group(params.runtime.device) as device:
        train_model(params, device)


def train_model(params: Params, device: torch.device) -> None:
    """Train, in one process or in several, of which the first alone writes files and logs."""
    threads = use_threads(params.runtime.threads)
    config = ModelConfig(**params.model.model_dump(), vocab_size=read_json(TOKENS / "meta.json")["vocab_size"])
    lineage, seen, parent = read_inputs(params, config, threads) if is_first() else ({}, np.empty(0, bool), None)
    lineage, seen = from_first(lambda: (lineage, seen))
    model = build_model(config, params.train, device)
    if params.train.init_from:
        print(f"starting from {params.train.init_from}, weights {lineage['parent_sha256'][:12]}", flush=True)
        take_weights(model, parent.model if parent else None)
        del parent  # it takes memory
    print(f"{model.count_parameters():,} parameters", flush=True)
    train_tokens, val_tokens = (load_tokens(TOKENS / f"{split}.bin") for split in ("train", "val"))
    checkpoints = Checkpoints(checkpoint_folder(lineage["train_key"]), steps_before_decay(params.train))

    def write_model(whole: GPT2Model, folder: Path) -> str:
        mask = seen if params.train.fused else None
        return save_model(whole, config, folder, params.train, mask, TOKENS / TOKENIZER_FILE)

    # One that DVC has left behind when it was killed may still run here, perhaps with other parameters.
    alone = file_lock(CHECKOUT_LOCK, "another training writes to this checkout")
    with first_only(alone, None), first_only(checkpoints.locked(), None):
        if is_first():
            lineage = take_saved_steps(lineage, checkpoints)
        with first_only(training_run(params, lineage), NO_LOG) as (log_metrics, log_model):

            def log_weights(step: int) -> None:
                log_model(step, partial(write_model, gathered(model, config)))

            metrics, history = run_training(
                model,
                train_tokens,
                val_tokens,
                seen,
                params.train,
                params.runtime,
                checkpoints,
                log_metrics,
                log_weights,
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


def read_inputs(params: Params, config: ModelConfig, threads: int) -> tuple[Lineage, SeenMask, NamedModel | None]:
    """Return what the training is made from, which tokens have rows of their own (V,), and the model to start from.

    Raises UserError if that model does not fit.
    """
    lineage = collect_lineage(params, threads)  # of the code as it is imported, not as it may be edited meanwhile
    seen = load_seen(TOKENS / SEEN_TOKENS, config.vocab_size)
    name = params.train.init_from
    if name is None:
        return lineage, seen, None
    parent = load_parent(name)
    if parent.tokenizer.name != read_json(TOKENS / "meta.json")["tokenizer"]:
        raise UserError(f"train.init_from {name} has another tokenizer than data/tokens")
    check_shape(config, parent.config, name)
    seen = keep_rows(seen, parent.model.output_projection.weight, parent.seen)
    return with_parent(lineage, parent.sha256), seen, parent


def take_saved_steps(lineage: Lineage, checkpoints: Checkpoints) -> Lineage:
    """Take the first steps of a shorter training that had them too, if none are saved; return the first lineage."""
    lineage = first_lineage(lineage)
    for line in describe_saved_trainings(lineage):
        print(f"{line}; `python src/train.py --remove-checkpoints` deletes them", flush=True)
    if checkpoints.is_empty() and (path := checkpoint_to_extend(lineage)):
        print(f"going on from {path}, which has the same first steps", flush=True)
        checkpoints.go_on_from(path)
    return lineage


if __name__ == "__main__":
    run_command(main)
