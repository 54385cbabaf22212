"""Generation against its peer, in one interleaved run: tokens per second of one text and of many.

python tests/benchmarks/generation.py          1 and 16 texts: ours, ours in int8, and transformers' generate
                                               (on a GPU with --device cuda, without int8)
python tests/benchmarks/generation.py --start  python src/infer.py for one token, beside import torch and the reading
python tests/benchmarks/generation.py --int8   what int8 costs: the loss on the test split
python tests/benchmarks/generation.py --serve  16 clients of `mlflow models serve` for a minute

In the first, all models have the same shape, prompt and settings, those that infer.py has by default (or, with
--greedy, temperature 0), and random weights; ours is measured with those that `dvc repro` has trained too, where there
are any, since it computes the rows of unseen tokens once. The others need what `dvc repro` has made. Each
measurement is a process of its own; nothing else should run meanwhile.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from peers import ROOT, model_config, print_circumstances, transformers_model

sys.path.insert(0, str(ROOT / "src"))

PROMPT, TOKENS, TEXTS = "The state of the union", 100, (1, 16)
CONTENDERS = ("transformers", "ours", "ours, int8", "ours, trained", "ours, trained, int8")
MODEL = ROOT / "data" / "model"
CLIENTS, CLIENT_TOKENS, PORT = 16, 50, 52440


def measure(contender: str, texts: int, greedy: bool, device: str) -> float:
    """Return the tokens per second of `texts` texts of TOKENS tokens after PROMPT, the median of three times."""
    peer = contender == "transformers"
    write = transformers(texts, greedy, device) if peer else ours(texts, greedy, device, contender)
    write()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - began)
    return texts * TOKENS / statistics.median(seconds)


def ours(texts: int, greedy: bool, device: str, contender: str) -> Callable[[], object]:
    import torch

    from gpt2.config import load_params
    from gpt2.data.tokenizer import gpt2_tokenizer
    from gpt2.generation.engine import Engine, GenerationSettings, Request
    from gpt2.model.weights import load_model
    from gpt2.training.run import build_model

    if "trained" in contender:
        model, _, seen = load_model(MODEL)
    else:
        params, seen = load_params(ROOT / "params.yaml"), None
        model = build_model(model_config(params), params.train, torch.device("cpu")).eval()
    engine = Engine(model.to(device), texts, seen, "int8" if "int8" in contender else "none")
    settings = GenerationSettings(max_tokens=TOKENS)
    settings = settings.model_copy(update={"temperature": 0.0}) if greedy else settings

    def write() -> None:
        each = [settings.model_copy(update={"seed": seed}) for seed in range(texts)]
        waiting = deque(Request(PROMPT, one, gpt2_tokenizer()) for one in each)
        assert sum(1 for _ in engine.generate(waiting)) == texts * TOKENS  # a text that ended early would seem fast

    return write


def transformers(texts: int, greedy: bool, device: str) -> Callable[[], object]:
    import torch

    from gpt2.config import load_params
    from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
    from gpt2.generation.engine import GenerationSettings

    params, settings = load_params(ROOT / "params.yaml"), GenerationSettings()
    model: Any = transformers_model(params).to(device).eval()
    prompt = torch.tensor([gpt2_tokenizer().encode(PROMPT)] * texts, device=device)
    sampling = {"do_sample": not greedy} | (
        {} if greedy else {"temperature": settings.temperature, "top_k": settings.top_k}
    )
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": VOCAB_SIZE - 1}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **sampling)


def compare(rounds: int, greedy: bool, device: str) -> None:
    print_circumstances(os.cpu_count() or 1)
    print(f"on {device}, {'greedy' if greedy else 'sampled'}, {TOKENS} tokens after {PROMPT!r}\n")
    contenders = [name for name in CONTENDERS if MODEL.exists() or "trained" not in name]
    if device != "cpu":
        contenders = [name for name in contenders if "int8" not in name]
    for texts in TEXTS:
        found: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(rounds):
            for contender, speeds in found.items():
                options = ["--contender", contender, "--texts", str(texts), "--device", device]
                speeds.append(float(run(sys.executable, __file__, *options, *(["--greedy"] if greedy else []))))
        peer = statistics.median(found["transformers"])
        for contender, speeds in found.items():
            speed = statistics.median(speeds)
            each = ", ".join(f"{one:,.0f}" for one in speeds)
            print(f"{texts:3} texts, {contender:20}{speed:8,.0f} tokens/s ({each}){speed / peer:8.2f} x", flush=True)


def start(rounds: int) -> None:
    """Print the seconds until one token is written, beside those of importing torch and reading the weights."""
    print_circumstances(os.cpu_count() or 1)
    infer = (sys.executable, str(ROOT / "src" / "infer.py"), "--prompt", "x", "--max_tokens", "1", "--device", "cpu")
    reading = f"import torch; open({str(MODEL / 'model.safetensors')!r}, 'rb').read()"
    commands = {
        "import torch, read": (sys.executable, "-c", reading),
        "infer.py, folder": (*infer, "--model", str(MODEL)),
        "infer.py, registry": infer,
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            began = time.perf_counter()
            run(*command)
            found[name].append(time.perf_counter() - began)
    least = statistics.median(found["import torch, read"])
    for name, seconds in found.items():
        print(f"{name:20}{statistics.median(seconds):6.2f} s{statistics.median(seconds) / least:8.2f} x")


def int8_cost() -> None:
    """Print the test split's perplexity by either kind of weights, over windows side by side."""
    import torch
    from torch.nn.functional import cross_entropy

    from gpt2.data.batches import load_tokens, validation_batches
    from gpt2.generation.decoder import Decoder
    from gpt2.generation.linear import Quantization
    from gpt2.model.weights import load_model

    print_circumstances(os.cpu_count() or 1)
    model, config, seen = load_model(MODEL)
    tokens = load_tokens(ROOT / "data" / "tokens" / "test.bin")
    kinds: tuple[Quantization, ...] = ("none", "int8")
    found = []
    for kind in kinds:
        decoder, losses = Decoder(model, 1, seen, kind), []
        for inputs, targets in validation_batches(tokens, 1, config.max_len):
            with torch.inference_mode():
                logits = decoder.logits(decoder.prefill_hidden_states({0: inputs[0].tolist()})[0])
                losses.append(float(cross_entropy(logits, targets[0])))
        found.append(math.exp(statistics.fmean(losses)))
        print(f"{kind:5} perplexity {found[-1]:.3f}", flush=True)
    print(f"int8 costs {found[1] / found[0] - 1:+.3%}")


def serve(seconds: float) -> None:
    """Print how long clients wait for their answers, alone and CLIENTS at once, and the server's memory."""
    import psutil

    print_circumstances(os.cpu_count() or 1)
    command = ["mlflow", "models", "serve", "-m", "models:/gpt2@champion", "--env-manager", "local", "-p", str(PORT)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def memory() -> float:
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 1e6

    def ask(seed: int) -> float:
        body = {"inputs": {"prompt": [PROMPT]}, "params": {"max_tokens": CLIENT_TOKENS, "seed": seed}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["predictions"][0]["text"]
        return time.perf_counter() - began

    def client(number: int) -> None:
        while time.perf_counter() < end:
            try:
                waits.append(ask(number))
            except Exception as error:
                lost.append(error)

    try:
        for _ in range(120):
            with suppress(OSError):
                ask(0)
                break
            time.sleep(1)
        alone = statistics.median(ask(seed) for seed in range(10))
        print(f"1 client: {alone:.2f} s for {CLIENT_TOKENS} tokens; the server holds {memory():,.0f} MB", flush=True)
        waits: list[float] = []
        lost: list[Exception] = []
        end = time.perf_counter() + seconds
        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        waits.sort()
        middle, most = waits[len(waits) // 2], waits[len(waits) * 95 // 100]
        print(f"{CLIENTS} clients: {len(waits)} answers, {len(lost)} lost, p50 {middle:.2f} s, p95 {most:.2f} s")
        print(f"{len(waits) * CLIENT_TOKENS / seconds:,.0f} tokens/s; then the server holds {memory():,.0f} MB")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--device", default="cpu", help="of the first: cpu or cuda")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(measure(arguments.contender, arguments.texts, arguments.greedy, arguments.device))
    elif arguments.start:
        start(arguments.rounds)
    elif arguments.int8:
        int8_cost()
    elif arguments.serve:
        serve(60)
    else:
        compare(arguments.rounds, arguments.greedy, arguments.device)


if __name__ == "__main__":
    main()
