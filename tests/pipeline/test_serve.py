"""The registered model behind MLflow's server."""

import csv
import json
import re
import shlex
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gpt2.generation.repl import ESCAPES
from pipeline.helpers import Shell, free_port, running

pytestmark = pytest.mark.slow


def test_mlflow_serves_the_text_that_infer_and_sample_write(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: str
) -> None:
    (sample,) = csv.DictReader((checkout / "data" / "samples" / "samples.csv").open())
    prompt, sampled, seed = sample["prompt"], sample["text"], int(sample["seed"])

    def post(address: str, **params: Any) -> tuple[int, Any]:
        body = json.dumps({"inputs": {"prompt": [prompt]}, "params": params}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    port = free_port()
    command = ["mlflow", "models", "serve", "-m", "models:/gpt2@champion", "--env-manager", "local", "-p", str(port)]
    with running(command, checkout, environment, f"http://127.0.0.1:{port}") as address:
        status, answer = post(address, temperature=0.7, top_k=40, max_tokens=9, seed=seed)
        assert (status, answer) == (200, {"predictions": [{"text": sampled}]})
        for params, reason in (
            ({"temperatur": 1.0}, "temperatur"),
            ({"top_p": 1.5}, "top_p should be less than or equal to 1"),
            ({"max_tokens": "many"}, "max_tokens"),
        ):
            status, answer = post(address, **params)
            assert status == 400 and reason in answer, answer
    run_id = re.search(r"run repro-\w+: (\w+)", reproduced)
    assert run_id is not None
    infer = f"python src/infer.py --prompt {shlex.quote(prompt)} --max_tokens 9 --seed {seed} --device cpu"
    for options in ("", f"--temperature 0.7 --top_k 40 --model runs:/{run_id[1]}/model"):  # or the defaults
        written = shell(f"{infer} {options}")
        assert sampled and written.stdout == f"{prompt}{sampled.translate(ESCAPES)}\n"
        assert "d_model 16" in written.stderr and "tokens/s" in written.stderr
