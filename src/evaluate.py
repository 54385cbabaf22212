"""Stage evaluate: the trained model's perplexity on the test split."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

from gpt2.config import load_params
from gpt2.core.cli import run_command
from gpt2.core.device import autocast, choose_device, choose_precision, use_threads
from gpt2.core.files import read_json, write_json
from gpt2.core.paths import METRICS, MODEL, PARAMS, TOKENS
from gpt2.data.batches import load_tokens
from gpt2.evaluation.perplexity import format_summary, mean_loss, summarize, token_losses
from gpt2.model.weights import load_model, short_name


def main() -> None:
    params = load_params(PARAMS)
    use_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    tokens = load_tokens(TOKENS / "test.bin")
    text_bytes = read_json(TOKENS / "meta.json")["splits"]["test"]["bytes"]
    model, _, _ = load_model(MODEL)
    with autocast(device, choose_precision(params.runtime.precision, device)):
        losses = token_losses(model.to(device), tokens, params.evaluate.stride, params.evaluate.batch_size)
        val_loss = mean_loss(model, load_tokens(TOKENS / "val.bin"), params.evaluate.stride, params.evaluate.batch_size)
    summary = summarize(losses, text_bytes) | {"val_loss": val_loss}
    write_json(METRICS / "evaluate.json", summary | {"stride": params.evaluate.stride, "model": short_name(MODEL)})
    print(f"test {format_summary(summary)}")


if __name__ == "__main__":
    run_command(main)
