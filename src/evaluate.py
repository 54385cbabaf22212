"""Stage evaluate: the trained model's perplexity on the validation and test splits; with an option, another model's."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

from gpt2.config import load_params
from gpt2.core.cli import Parser, run_command
from gpt2.core.device import autocast, choose_device, choose_precision, use_threads
from gpt2.core.errors import UserError
from gpt2.core.files import read_json, write_json
from gpt2.core.paths import METRICS, MODEL, PARAMS, TOKENS
from gpt2.data.batches import load_tokens
from gpt2.evaluation.perplexity import format_summary, mean_loss, summarize
from gpt2.model.weights import short_name
from gpt2.tracking.named_models import load_named


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    about = (
        "measure the model that a path, models:/, runs:/ or hf: names, e.g. before it is trained further; only print"
    )
    parser.add_argument("--model", help=about)
    name = parser.parse_args().model
    params = load_params(PARAMS)
    use_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    meta = read_json(TOKENS / "meta.json")
    splits = meta["splits"]
    named = load_named(name or str(MODEL))
    if named.tokenizer.name != meta["tokenizer"]:
        raise UserError(f"data/tokens was not made with the model's tokenizer, {named.tokenizer.name}")
    model = named.model.to(device)
    figures: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        tokens = load_tokens(TOKENS / f"{split}.bin")
        with autocast(device, choose_precision(params.runtime.precision, device)):
            loss = mean_loss(model, tokens, params.evaluate.stride, params.evaluate.batch_size, f"evaluate {split}")
        figures[split] = summarize(loss, len(tokens), splits[split]["bytes"])
        print(f"{split:4} {format_summary(figures[split])}", flush=True)
    if name:
        return
    # The test split's figures have the plain names. Models are selected by val_loss.
    test = {name: figures["test"][name] for name in ("loss", "perplexity", "bits_per_byte", "tokens")}
    measured = {"val_loss": figures["val"]["loss"], "stride": params.evaluate.stride, "model": short_name(MODEL)}
    write_json(METRICS / "evaluate.json", test | measured)


if __name__ == "__main__":
    run_command(main)
