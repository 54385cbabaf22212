"""The champion: the version with the lowest validation loss. It holds the alias by which infer.py finds it.

Losses are compared as they stand where both were measured alike: on the same validation tokens, at the same stride.
Otherwise both models are scored again in bits per byte, which compare across tokenizers, on the documents of the
present validation split that neither was trained on.
The test split is only reported: who chooses by it has no fair figure left.
"""

import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from gpt2.config import Params
from gpt2.core.device import autocast, choose_device, choose_precision
from gpt2.core.errors import UserError
from gpt2.core.paths import MODEL, TOKENS
from gpt2.data.batches import load_tokens
from gpt2.data.splits import SECTION
from gpt2.data.tokenizer import load_tokenizer
from gpt2.evaluation.perplexity import mean_loss, summarize
from gpt2.model.weights import load_model
from gpt2.tracking.local_registry import MODEL_SHA256
from gpt2.tracking.registry import DOCUMENTS, NOT_THERE, artifacts_folder, fetch_model, find_version, is_lost
from gpt2.tracking.runs import PARENT, PARENT_SHA256
from gpt2.tracking.store import STORE_ERRORS, open_store, store_lock

VAL_LOSS, VERDICT = "gpt2.val_loss", "gpt2.verdict"
BY_HAND = "promoted by hand"
VAL_SHA256, STRIDE, TOKENIZER = "gpt2.val_sha256", "gpt2.stride", "gpt2.tokenizer"
MEASURE = (VAL_SHA256, STRIDE, TOKENIZER)  # where they are equal, so is what VAL_LOSS means


def choose_champion(version: ModelVersion, params: Params) -> str:
    """Give the alias to `version` if it is better than its holder, or than all others if it has none.

    Return what was done and why, which the version keeps as a tag.
    """
    with store_lock():
        return _choose(mlflow.MlflowClient(), version, params)


def _choose(client: mlflow.MlflowClient, version: ModelVersion, params: Params) -> str:
    name, alias, policy = params.register_.name, params.register_.alias, params.register_.promote
    held_by = client.get_registered_model(name).aliases.get(alias)
    holder = _find(client, name, held_by) if held_by else None
    if holder and _is_same(holder, version):
        return f"{name} version {version.version} is {alias}: it holds it already"
    reasons = [f"version {held_by}, which held it, is lost"] if held_by and not holder else []
    best: ModelVersion | None
    if policy == "if_better":
        best, compared = _best(client, version, holder, params)
        reasons += compared
    else:
        best = version if policy == "always" else holder
        reasons.append(f"register.promote is {policy}")
    if client.get_registered_model(name).aliases.get(alias) != held_by:  # another machine has given it meanwhile
        return _choose(client, version, params)
    if best and not (holder and _is_same(best, holder)):
        client.set_registered_model_alias(name, alias, best.version)
    verdict = "; ".join(reasons) or "there is no other version"
    client.set_model_version_tag(name, version.version, VERDICT, verdict)
    is_champion = best and _is_same(best, version)
    return f"{name} version {version.version} {'is' if is_champion else 'is not'} {alias}: {verdict}"


def _best(
    client: mlflow.MlflowClient, version: ModelVersion, holder: ModelVersion | None, params: Params
) -> tuple[ModelVersion, list[str]]:
    """Return the better of a version and the alias's holder, or the best of all if there is none, and the reasons."""
    rivals = [holder] if holder else []
    if not holder:
        found = client.search_model_versions(f"name = '{version.name}'")
        whole = [one for one in found if not _is_same(one, version) and VAL_LOSS in one.tags and not is_lost(one)]
        whole.sort(key=lambda one: float(one.tags[VAL_LOSS]), reverse=True)
        # Of those that were measured alike, the last is the best.
        rivals = list({tuple(one.tags.get(tag) for tag in MEASURE): one for one in whole}.values())
    best, reasons = version, []
    for rival in rivals:
        is_better, reason = compare(best, rival, params)
        reasons.append(reason)
        if is_better is False or (is_better is None and holder):
            best = rival
    return best, reasons


def compare(challenger: ModelVersion, rival: ModelVersion, params: Params) -> tuple[bool | None, str]:
    """Return whether the challenger has the lower loss, and a reason; None if they cannot be compared."""
    pair = (challenger, rival)
    alike = all(challenger.tags[tag] == rival.tags.get(tag) for tag in MEASURE)
    started = any(PARENT_SHA256 in version.tags for version in pair)  # perhaps from what has seen this split
    try:
        new, count = _new_documents(pair) if started or not alike else (pd.DataFrame(), 0)
        if alike and len(new) == count:
            losses, measured = [float(version.tags[VAL_LOSS]) for version in pair], "validation loss"
        else:
            losses = _score_again(pair, new, params)
            measured = f"scored again on {len(new)} of {count} validation documents, bits per byte"
    except UserError as error:
        hint = f"`python src/register.py --promote {challenger.version}` makes it the champion"
        return None, f"it cannot be compared with version {rival.version} ({error}); {hint}"
    is_better = losses[0] < losses[1]
    relation = "below" if is_better else "not below"
    return is_better, f"{measured} {losses[0]:.4f} is {relation} the {losses[1]:.4f} of version {rival.version}"


def promote(name: str, alias: str, number: str) -> str:
    """Give the alias to a version by hand; return what was done. Raises UserError if there is none, or it is lost."""
    if not re.fullmatch("[0-9]+", number):
        raise UserError(f"--promote takes the number of a version, not {number}")
    fetch_model(f"models:/{name}/{number}")
    try:
        open_store()
        with store_lock():
            client = mlflow.MlflowClient()
            client.set_registered_model_alias(name, alias, number)
            client.set_model_version_tag(name, number, VERDICT, BY_HAND)
    except STORE_ERRORS as error:
        raise UserError(f"MLflow's store fails ({error})") from None
    return f"{name} version {number} is {alias}: {BY_HAND}"


def _new_documents(pair: tuple[ModelVersion, ModelVersion]) -> tuple[pd.DataFrame, int]:
    """Return the validation documents that are new to both models, and how many documents the split has.

    Raises UserError if none is new, or this is not known.
    """
    new = validation = _read_documents(DOCUMENTS).query("split == 'val'")
    for known in _known_documents(pair[0]) + _known_documents(pair[1]):
        new = new[_is_new(new, known)]
    if new.empty:
        raise UserError("no validation document is surely new to both")
    return new, len(validation)


def _is_new(documents: pd.DataFrame, known: pd.DataFrame) -> "pd.Series[bool]":
    """Tell which documents are new to a model that was trained on the train split of `known`, a documents.csv.

    A document is known by its SHA-256. A section is new if it was held out as it is, or no section of the text of this
    name was trained on, nor all of it: the text may be cut elsewhere.
    """
    trained = known[known["split"] == "train"]
    held_out = documents["sha256"].isin(known.loc[known["split"] != "train", "sha256"])
    texts, trained_texts = (one["document"].str.replace(SECTION, "", regex=True) for one in (documents, trained))
    is_section, is_trained_section = (one["document"].str.contains(SECTION) for one in (documents, trained))
    overlaps = texts.isin(trained_texts[is_trained_section]) | (is_section & texts.isin(trained_texts))
    return ~documents["sha256"].isin(trained["sha256"]) & (held_out | ~overlaps)


def _read_documents(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"document": str}, keep_default_na=False)


def _known_documents(version: ModelVersion) -> list[pd.DataFrame]:
    """Return the documents.csv of a model and of the registered ones that it started from.

    Raises UserError if what they were trained on is not known.
    """
    known: list[pd.DataFrame] = []
    line: set[str] = set()
    parent: ModelVersion | None = version
    while parent:
        version = parent
        path = artifacts_folder(version) / DOCUMENTS.name
        if not path.exists():
            raise UserError("what it was trained on is not known")
        known.append(_read_documents(path))
        line.add(version.tags[MODEL_SHA256])
        started_from = version.tags.get(PARENT_SHA256, "")
        if started_from in line:  # training changed nothing
            return known
        parent = find_version(mlflow.MlflowClient(), started_from)
    if version.tags.get(PARENT, "").startswith(("models:", "runs:")):
        raise UserError("what the model that it started from was trained on is not known")
    return known


def _score_again(pair: tuple[ModelVersion, ModelVersion], new: pd.DataFrame, params: Params) -> list[float]:
    """Return the bits per byte of both models on documents of the validation split, whatever their tokens are."""
    split, present = load_tokens(TOKENS / "val.bin"), load_tokenizer(TOKENS)
    spans = zip(new["first_token"], new["tokens"], strict=True)
    texts = [present.decode(split[first : first + count - 1].tolist()) for first, count in spans]
    folders = [artifacts_folder(version) / MODEL.name for version in pair]
    models = [load_model(folder)[:2] for folder in folders]
    device = choose_device(params.runtime.device)
    stride = min(params.evaluate.stride, *(model.max_len for model, _ in models))
    found = []
    for version, folder, (model, config) in zip(pair, folders, models, strict=True):
        tokenizer = load_tokenizer(folder, config.vocab_size)
        tokens = np.concatenate([tokenizer.encode_document(text) for text in texts])
        with autocast(device, choose_precision(params.runtime.precision, device)):
            name = f"score version {version.version}"
            loss = mean_loss(model.to(device), tokens, stride, params.evaluate.batch_size, name)
        found.append(summarize(loss, len(tokens), sum(len(text.encode()) for text in texts))["bits_per_byte"])
    return found


def _find(client: mlflow.MlflowClient, name: str, number: str) -> ModelVersion | None:
    """Return a version, if the store still has it and its files."""
    try:
        version = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None
    return None if is_lost(version) else version


def _is_same(version: ModelVersion, other: ModelVersion) -> bool:
    return str(version.version) == str(other.version)  # a search gives numbers, everything else text
