"""Stage report: pictures of the training and of what the model predicts, their numbers, and a page that shows them."""

import os
from typing import Any

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

import pandas as pd
import torch
import vl_convert

from gpt2.config import ReportParams, load_params
from gpt2.core.cli import run_command
from gpt2.core.device import autocast, choose_device, choose_precision, use_threads
from gpt2.core.errors import UserError
from gpt2.core.files import atomic_write, read_json, write_json, write_text
from gpt2.core.paths import LINEAGE, METRICS, MODEL, PARAMS, PLOTS, REPORT, SAMPLES, TOKENS
from gpt2.data.batches import load_tokens
from gpt2.data.tokenizer import TextStream, Tokenizer, load_tokenizer
from gpt2.evaluation.attention_weights import attention_weights
from gpt2.evaluation.perplexity import summarize
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model, read_config
from gpt2.report import tables
from gpt2.report.attention import draw_heads, token_labels
from gpt2.report.figures import draw_all, png, same_style
from gpt2.report.page import Results, page

PASSAGE_TOKENS = 250  # coloured by surprise
ATTENTION_TOKENS = 32  # more cannot be read
VEGA_LITE = "5.20"  # that DVC's plots are written in


def main() -> None:
    params = load_params(PARAMS)
    use_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    tokens = load_tokens(TOKENS / "test.bin")
    model, config, _ = load_model(MODEL)
    tokenizer = load_tokenizer(MODEL, config.vocab_size)
    model.to(device)
    sha256 = read_config(MODEL)[1]
    try:
        lineage, evaluated, sampled, documents, samples = read_results(sha256[:8])
        trained = lineage["train"]
        curves = tables.training(PLOTS, trained["batch_size"] * trained["sequence_length"])
        kept = curves.nsmallest(1, "val_loss") if trained["keep"] == "best" else curves.tail(1)
        is_sotu = lineage["prepare"]["source"] == "sotu"
        groups = tables.sotu_groups(documents) if is_sotu else pd.DataFrame()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the results cannot be read ({error!r}); run `dvc repro`") from None

    with autocast(device, choose_precision(params.runtime.precision, device)):
        batch_size = params.evaluate.batch_size
        predicted = tables.predict(model, tokens, params.evaluate.stride, batch_size, "predict the test split")
        by_window = tables.predict(model, tokens, model.max_len, batch_size, "in windows side by side")

    is_test = documents["split"] == "test"
    by_document = tables.by_document(documents[is_test], predicted.losses)
    numbers = {
        "training": curves,
        "loss_by_position": tables.by_position(by_window.losses, model.max_len),
        "calibration": tables.calibration(predicted),
        "perplexity_by_document": by_document,
        **{f"perplexity_by_{name}": tables.grouped(by_document, group[is_test]) for name, group in groups.items()},
    }
    pictures: dict[str, str | bytes] = {**draw_all(numbers), **draw_attention(model, tokenizer, params.report)}
    last = documents[is_test].iloc[-1]
    passage = slice(last["first_token"], last["first_token"] + min(last["tokens"], PASSAGE_TOKENS))
    texts = map(TextStream(tokenizer).push, tokens[passage].tolist())  # a character's last token has all of it
    report = page(
        Results(
            model_sha256=sha256,
            parameters=model.count_parameters(),
            steps=int(kept["step"].iloc[0]),
            vocab_size=config.vocab_size,
            lineage=lineage,
            evaluated=evaluated,
            sampled=sampled,
            accuracy=predicted.hits.mean(),
            samples=samples,
            passage=list(zip(texts, predicted.losses[passage].tolist(), strict=True)),
            passage_name=last["document"],
            pictures=pictures,
        )
    )
    with atomic_write(REPORT) as folder:
        folder.mkdir()
        for name, table in numbers.items():
            write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        for name, picture in pictures.items():
            if isinstance(picture, bytes):
                (folder / f"{name}.png").write_bytes(picture)
            else:
                write_text(folder / f"{name}.svg", picture)
        write_text(folder / "index.html", report)
        write_json(folder / "params.json", params.report.model_dump())
        script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", VEGA_LITE)
        write_text(folder / "vega.js", script)  # for .dvc/plots.html
    print("open data/report/index.html in a browser")


def read_results(model: str) -> tuple[Any, Any, Any, pd.DataFrame, pd.DataFrame]:
    """Return lineage.json, evaluate.json, sample.json, documents.csv and samples.csv (as text).

    Raises UserError if one is missing or of another model than `model`, KeyError, TypeError or ValueError if one is
    broken.
    """
    lineage, evaluated, sampled = (
        read_json(path) for path in (LINEAGE, METRICS / "evaluate.json", METRICS / "sample.json")
    )
    for stage, result in (("evaluate", evaluated), ("sample", sampled)):
        if result["model"] != model:
            raise UserError(f"the results of stage {stage} are not of the model in {MODEL}; run `dvc repro`")
    documents = pd.read_csv(TOKENS / "documents.csv", dtype={"document": str}, keep_default_na=False)
    tokens, text_bytes = documents.loc[documents["split"] == "val", ["tokens", "bytes"]].sum()
    val = summarize(evaluated["val_loss"], int(tokens), int(text_bytes))
    evaluated |= {f"val_{name}": value for name, value in val.items()}
    samples = pd.read_csv(SAMPLES / "samples.csv", dtype=str, keep_default_na=False)
    return lineage, evaluated, sampled, documents, samples


def draw_attention(model: GPT2Model, tokenizer: Tokenizer, params: ReportParams) -> dict[str, bytes]:
    """Return the picture of attention on a text, of heads spread over the layers."""
    tokens = tokenizer.encode(params.text)[: min(model.max_len, ATTENTION_TOKENS)]
    weights = attention_weights(model, torch.tensor(tokens, device=model.output_projection.weight.device))
    layers, heads = weights.shape[:2]
    count = min(params.heads, layers * heads)
    chosen = [divmod(i * layers * heads // count, heads) for i in range(count)]
    labels = token_labels([tokenizer.decode([token]) for token in tokens])
    with same_style():
        return {"attention": png(draw_heads(weights.float().cpu(), labels, chosen))}


if __name__ == "__main__":
    run_command(main)
