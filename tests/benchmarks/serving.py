"""serve.py under load, beside the bare engine with the same requests: tokens per second, waits, memory, answers lost.

python tests/benchmarks/serving.py             64 clients for two minutes, half of them streaming
python tests/benchmarks/serving.py --model DIR --clients 64 --seconds 20

Each client asks again as soon as it has its answer. The engine alone is measured before and after, in a process of its
own; clients and server share the machine, and nothing else should run meanwhile.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

from peers import ROOT, print_circumstances

sys.path.insert(0, str(ROOT / "src"))

from gpt2.core.environment import OPENMP_DEFAULTS

PROMPT, TOKENS = "The state of the union", 50
SETTINGS: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "max_tokens": TOKENS}


def bare(model: str, clients: int, seconds: float) -> None:
    """Print the tokens per second, and per second of a CPU, of the engine alone with so many requests, repeatedly."""

    from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
    from gpt2.tracking.named_models import load_named

    named = load_named(model)
    engine, tokenizer, written = Engine(named.model, MAX_SLOTS, named.seen), named.tokenizer, 0
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        requests = [Request(PROMPT, GenerationSettings(**SETTINGS, seed=seed), tokenizer) for seed in range(clients)]
        engine.generate_all(requests)
        written += sum(request.generated for request in requests)
    print(written / (time.perf_counter() - began), written / (time.process_time() - used))


def served(model: str, clients: int, seconds: float) -> tuple[float, float]:
    """Print how the server does; return its tokens per second, and per second of a CPU."""
    command = [sys.executable, str(ROOT / "src" / "serve.py"), "--model", model, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    port = next(int(found[1]) for line in server.stderr if (found := re.match(r"listens on .*:(\d+)$", line)))
    process = psutil.Process(server.pid)

    def ask(connection: http.client.HTTPConnection, seed: int, stream: bool) -> None:
        body = {"prompt": PROMPT, "seed": seed, "stream": stream, **SETTINGS}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200 and (text.endswith(b"data: [DONE]\n\n") if stream else json.loads(text)["usage"])

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while time.perf_counter() < end:
            began = time.perf_counter()
            try:
                ask(connection, number, number % 2 == 0)
                waits.append(time.perf_counter() - began)
            except Exception as error:
                lost.append(error)
        connection.close()

    def tokens() -> float:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        found = re.search(rb"^gpt2_completion_tokens_total (\S+)$", connection.getresponse().read(), re.MULTILINE)
        assert found
        return float(found[1])

    waits: list[float] = []
    lost: list[Exception] = []
    ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), 0, True)
    before, began, used = tokens(), time.perf_counter(), sum(process.cpu_times()[:2])
    end = began + seconds
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while time.perf_counter() < end:
        time.sleep(seconds / 5)
        memory.append(process.memory_info().rss / 1e6)
    for thread in threads:
        thread.join()
    written = tokens() - before
    speeds = written / (time.perf_counter() - began), written / (sum(process.cpu_times()[:2]) - used)
    server.terminate()
    assert server.wait(60) == 143
    p50, *_, p95 = statistics.quantiles(waits, n=20)[9::9]
    print(f"{clients} clients: {len(waits)} answers, {len(lost)} lost, p50 {p50:.2f} s, p95 {p95:.2f} s")
    print(f"memory of the server over time: {', '.join(f'{one:,.0f}' for one in memory)} MB")
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data" / "model"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.model, arguments.clients, arguments.seconds)
        return
    print_circumstances(os.cpu_count() or 1)
    os.environ.update(OPENMP_DEFAULTS | os.environ)  # as in serve.py
    command = [sys.executable, __file__, "--bare", "--model", arguments.model, "--clients", str(arguments.clients)]

    def alone() -> list[float]:
        return [*map(float, subprocess.check_output([*command, "--seconds", str(arguments.seconds / 4)]).split())]

    first, ours, last = alone(), served(arguments.model, arguments.clients, arguments.seconds), alone()
    for unit, *speeds in zip(("second", "CPU second"), first, ours, last, strict=True):
        before, speed, after = speeds
        ratio = 2 * speed / (before + after)
        print(f"tokens a {unit}: {speed:,.0f}, the engine alone {before:,.0f} and {after:,.0f}: {ratio:.2f}")


if __name__ == "__main__":
    main()
