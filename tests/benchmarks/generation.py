"""Generation against its peers, in one interleaved run: tokens per second of one text and of many.

python tests/benchmarks/generation.py           1 and 16 texts, by each program and kind of weights
                                                (on a GPU with --device cuda: in float32 alone)
python tests/benchmarks/generation.py --prefill the first token after a prompt of PREFILL tokens: milliseconds
python tests/benchmarks/generation.py --waits   the longest that a text waits for its next token while prompts come
python tests/benchmarks/generation.py --start   python src/infer.py for one token, beside import torch and the reading
python tests/benchmarks/generation.py --quality what rounded weights cost: the loss on the test split
python tests/benchmarks/generation.py --serve   16 clients of `mlflow models serve` for a minute

The first two compare with transformers' generate and, where they are installed, CTranslate2 (`pip install ctranslate2`)
and llama.cpp (`pip install llama-cpp-python`; one text alone), through exports of the model. All have the same shape,
prompt and settings, those that infer.py has by default (or, with --greedy, temperature 0), and random weights; ours is
measured with those that `dvc repro` has trained too, where there are any, since it computes the rows of unseen tokens
once. Each takes a thread a CPU. The others need what `dvc repro` has made. Each measurement is a process of its own;
nothing else should run meanwhile. --quick takes one round and the kinds that are fastest.
"""

import argparse
import importlib
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from joblib import cpu_count

from peers import ROOT, model_config, print_circumstances, run, transformers_model

sys.path.insert(0, str(ROOT / "src"))

PROMPT, TOKENS, TEXTS = "The state of the union", 100, (1, 16)
PREFILL = 500
SHORT, LONG = 4, 12  # texts at work, and prompts of PREFILL tokens that come meanwhile
MODEL = ROOT / "data" / "model"
CLIENTS, CLIENT_TOKENS, PORT = 16, 50, 52440
THREADS = cpu_count()


def measure(contender: str, texts: int, tokens: int, prompt: str, greedy: bool, device: str) -> float:
    """Return the seconds for `texts` texts of `tokens` tokens after the prompt, the median of five times."""
    with TemporaryDirectory() as folder:
        write = CONTENDERS[contender](texts, tokens, prompt, greedy, device, Path(folder))
        write()
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            write()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def ours(
    texts: int,
    tokens: int,
    prompt: str,
    greedy: bool,
    device: str,
    folder: Path,
    quantization: Any = "none",
    trained: bool = False,
) -> Callable[[], object]:
    from gpt2.data.tokenizer import gpt2_tokenizer
    from gpt2.generation.engine import Engine, GenerationSettings, Request
    from gpt2.model.weights import load_model

    model, _, seen = load_model(MODEL) if trained else (random_model(), None, None)
    engine = Engine(model.to(device), texts, seen, quantization)
    settings = GenerationSettings(max_tokens=tokens)
    settings = settings.model_copy(update={"temperature": 0.0}) if greedy else settings

    def write() -> None:
        each = [settings.model_copy(update={"seed": seed}) for seed in range(texts)]
        waiting = deque(Request(prompt, one, gpt2_tokenizer()) for one in each)
        assert sum(1 for _ in engine.generate(waiting)) == texts * tokens  # a text that ended early would seem fast

    return write


def transformers(
    texts: int, tokens: int, prompt: str, greedy: bool, device: str, folder: Path, dtype: str = "float32"
) -> Callable[[], object]:
    import torch

    from gpt2.config import load_params
    from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer

    torch.set_num_threads(THREADS)
    model: Any = transformers_model(load_params(ROOT / "params.yaml")).to(device, getattr(torch, dtype)).eval()
    ids = torch.tensor([gpt2_tokenizer().encode(prompt)] * texts, device=device)
    temperature, top_k = sampling()
    drawn = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_k": top_k}
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": VOCAB_SIZE - 1}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **length, **drawn)


def ctranslate2(
    texts: int, tokens: int, prompt: str, greedy: bool, device: str, folder: Path, compute_type: str
) -> Callable[[], object]:
    from ctranslate2 import Generator  # type: ignore[import-not-found]
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

    from gpt2.data.tokenizer import gpt2_tokenizer

    export("hf", folder / "hf")
    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    generator = Generator(str(folder / "ct2"), device="cpu", compute_type=compute_type, intra_threads=THREADS)
    vocabulary = json.loads((folder / "hf" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    ids = [[names[token] for token in gpt2_tokenizer().encode(prompt)]] * texts
    temperature, top_k = (1.0, 1) if greedy else sampling()

    def write() -> None:
        found = generator.generate_batch(
            ids,
            max_length=tokens,
            min_length=tokens,
            sampling_temperature=temperature,
            sampling_topk=top_k,
            include_prompt_in_result=False,
        )
        assert sum(len(each.sequences_ids[0]) for each in found) == texts * tokens

    return write


def llama_cpp(
    texts: int, tokens: int, prompt: str, greedy: bool, device: str, folder: Path, kind: str
) -> Callable[[], object]:
    import llama_cpp as program

    export("gguf", folder / "float32.gguf")
    options = program.llama_model_quantize_default_params()
    options.ftype = getattr(program, f"LLAMA_FTYPE_MOSTLY_{kind}")
    source, target = str(folder / "float32.gguf").encode(), str(folder / "model.gguf").encode()
    assert program.llama_model_quantize(source, target, options) == 0
    model = program.Llama(target.decode(), n_ctx=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    ids = model.tokenize(prompt.encode(), add_bos=False)
    temperature, top_k = (0.0, 1) if greedy else sampling()

    def write() -> None:
        written = model.generate(ids, temp=temperature, top_k=top_k, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        assert sum(1 for _ in zip(range(tokens), written, strict=False)) == tokens

    return write


CONTENDERS: dict[str, Callable[..., Callable[[], object]]] = {
    "transformers": transformers,
    "transformers, bfloat16": partial(transformers, dtype="bfloat16"),
    "CTranslate2": partial(ctranslate2, compute_type="float32"),
    "CTranslate2, bfloat16": partial(ctranslate2, compute_type="bfloat16"),
    "CTranslate2, int8": partial(ctranslate2, compute_type="int8"),
    "llama.cpp, F16": partial(llama_cpp, kind="F16"),
    "llama.cpp, Q8_0": partial(llama_cpp, kind="Q8_0"),
    "ours": ours,
    "ours, bfloat16": partial(ours, quantization="bfloat16"),
    "ours, int8": partial(ours, quantization="int8"),
    "ours, trained": partial(ours, trained=True),
    "ours, trained, bfloat16": partial(ours, trained=True, quantization="bfloat16"),
    "ours, trained, int8": partial(ours, trained=True, quantization="int8"),
}


def random_model() -> Any:
    import torch

    from gpt2.config import load_params
    from gpt2.training.run import build_model

    params = load_params(ROOT / "params.yaml")
    return build_model(model_config(params), params.train, torch.device("cpu")).eval()


def export(kind: str, path: Path) -> None:
    """Write a model with random weights as export.py does."""
    from gpt2.config import load_params
    from gpt2.data.tokenizer import gpt2_tokenizer

    config = model_config(load_params(ROOT / "params.yaml"))
    module = importlib.import_module(f"gpt2.export.{kind}")
    module.write(random_model(), config, gpt2_tokenizer().encoding, "Random weights.", path)


def sampling() -> tuple[float, int]:
    """Return the temperature and top_k that infer.py has by default."""
    from gpt2.generation.engine import GenerationSettings

    settings = GenerationSettings()
    assert settings.top_k
    return settings.temperature, settings.top_k


def contenders(texts: int, device: str, quick: bool) -> list[str]:
    """Return which contenders can be measured here."""
    names = list(CONTENDERS)
    if not MODEL.exists():
        names = [name for name in names if "trained" not in name]
    if device != "cpu":
        names = [name for name in names if name in ("transformers", "ours", "ours, trained")]
    if quick:
        names = [name for name in names if name not in ("transformers", "CTranslate2", "llama.cpp, F16")]
    if not find_spec("ctranslate2"):
        names = [name for name in names if "CTranslate2" not in name]
    elif "bfloat16" not in importlib.import_module("ctranslate2").get_supported_compute_types("cpu"):
        names = [name for name in names if name != "CTranslate2, bfloat16"]
    if not find_spec("llama_cpp") or texts > 1:
        names = [name for name in names if "llama.cpp" not in name]
    if not has_bfloat16():
        names = [name for name in names if "bfloat16" not in name]
    return names


def compare(rounds: int, greedy: bool, device: str, quick: bool, prefill: bool) -> None:
    print_circumstances(THREADS)
    prompt = " ".join(["union"] * PREFILL) if prefill else PROMPT  # one token a word
    tokens, what = (1, f"a prompt of {PREFILL} tokens") if prefill else (TOKENS, repr(PROMPT))
    print(f"on {device}, {'greedy' if greedy else 'sampled'}, {tokens} tokens after {what}\n")
    for texts in (1,) if prefill else TEXTS:
        found: dict[str, list[float]] = {contender: [] for contender in contenders(texts, device, quick)}
        for _ in range(rounds):
            for contender, seconds in found.items():
                options = ["--texts", str(texts), "--tokens", str(tokens), "--prompt", prompt, "--device", device]
                options += ["--greedy"] if greedy else []
                seconds.append(float(run(sys.executable, __file__, "--contender", contender, *options).split()[-1]))
        base = next(iter(found))
        peer = statistics.median(found[base])
        for contender, seconds in found.items():
            median = statistics.median(seconds)
            rate = f"{median * 1000:8.1f} ms" if prefill else f"{texts * tokens / median:8,.0f} tokens/s"
            spread = f"{min(seconds) / median - 1:+.0%} to {max(seconds) / median - 1:+.0%}"
            print(f"{texts:3} texts, {contender:24}{rate} (time {spread}){peer / median:8.2f} x {base}", flush=True)


def waits(rounds: int) -> None:
    """Print the milliseconds between two tokens of SHORT texts, alone and while LONG prompts of PREFILL tokens come."""
    from gpt2.data.tokenizer import gpt2_tokenizer
    from gpt2.generation.engine import Engine, GenerationSettings, Request

    print_circumstances(THREADS)
    engine = Engine(random_model(), SHORT + LONG)
    short, long = (GenerationSettings(max_tokens=tokens, seed=1) for tokens in (TOKENS, TOKENS // 4))
    for coming in (0, LONG):
        seconds: list[float] = []
        for _ in range(rounds):
            waiting = deque(Request(PROMPT, short, gpt2_tokenizer()) for _ in range(SHORT))
            first = waiting[0]
            began = time.perf_counter()
            for request, _ in engine.generate(waiting):
                if request is first:
                    now = time.perf_counter()
                    seconds.append(now - began)
                    began = now
                    if first.generated == TOKENS // 4:
                        prompt = " ".join(["union"] * PREFILL)
                        waiting.extend(Request(prompt, long, gpt2_tokenizer()) for _ in range(coming))
                if first.finished:
                    break
        median, longest = statistics.median(seconds) * 1000, max(seconds) * 1000
        print(f"{coming:3} prompts come: {median:.1f} ms between two tokens, at most {longest:.1f}")


def start(rounds: int) -> None:
    """Print the seconds until one token is written, beside those of importing torch and reading the weights."""
    print_circumstances(THREADS)
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


def quality() -> None:
    """Print the test split's perplexity by each kind of weights, over windows side by side."""
    import torch
    from torch.nn.functional import cross_entropy

    from gpt2.data.batches import load_tokens, validation_batches
    from gpt2.generation.decoder import Decoder
    from gpt2.generation.linear import Quantization
    from gpt2.model.weights import load_model

    print_circumstances(THREADS)
    model, config, seen = load_model(MODEL)
    tokens = load_tokens(ROOT / "data" / "tokens" / "test.bin")
    kinds: tuple[Quantization, ...] = ("none", "bfloat16", "int8") if has_bfloat16() else ("none", "int8")
    exact = 0.0
    for kind in kinds:
        decoder, losses = Decoder(model, 1, seen, kind), []
        for inputs, targets in validation_batches(tokens, 1, config.max_len):
            with torch.inference_mode():
                logits = decoder.logits(decoder.prefill({0: inputs[0].tolist()})[0])
                losses.append(float(cross_entropy(logits, targets[0])))
        perplexity = math.exp(statistics.fmean(losses))
        exact = exact or perplexity
        print(f"{kind:10} perplexity {perplexity:.3f} ({perplexity / exact - 1:+.3%})", flush=True)


def has_bfloat16() -> bool:
    import torch

    from gpt2.core.device import choose_precision

    return choose_precision("auto", torch.device("cpu")) == torch.bfloat16


def serve(seconds: float) -> None:
    """Print how long clients wait for their answers, alone and CLIENTS at once, and the server's memory."""
    import psutil

    print_circumstances(THREADS)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--device", default="cpu", help="of the first two: cpu or cuda")
    for name in ("--prefill", "--waits", "--start", "--quality", "--serve"):
        parser.add_argument(name, action="store_true")
    for name, kind in {"--contender": str, "--texts": int, "--tokens": int, "--prompt": str}.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    rounds = given.rounds or (1 if given.quick else 5)
    if given.contender:
        print(measure(given.contender, given.texts, given.tokens, given.prompt, given.greedy, given.device))
    elif given.waits:
        waits(rounds)
    elif given.start:
        start(rounds)
    elif given.quality:
        quality()
    elif given.serve:
        serve(60)
    else:
        compare(rounds, given.greedy, given.device, given.quick, given.prefill)


if __name__ == "__main__":
    main()
