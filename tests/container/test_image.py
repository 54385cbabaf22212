"""The image: any user runs the pipeline in it, stopping it saves a training, and a killed one blocks no other.

GPT2_IMAGE names an image that was built before: docker:gpt2 by `docker build -t gpt2 .`, buildah:gpt2 by
tests/container/build, which needs no Docker; it then runs in a chroot, without namespaces.
"""

import json
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator

import psutil
import pytest

from pipeline.helpers import TINY

ENGINE, _, IMAGE = os.environ.get("GPT2_IMAGE", "").partition(":")
USER = "1234"  # whom the image does not know
# A tiny pipeline, and DVC's lock file as process 1 of a killed container has left it.
PREPARE = f"""
import json, pathlib, yaml
params = yaml.safe_load(open("params.yaml"))
for section, values in {TINY!r}.items():
    params[section] |= values
params["train"] |= {{"max_steps": 300, "log_interval": 50, "eval_interval": 50, "initialization": "random"}}
yaml.safe_dump(params, open("params.yaml", "w"))
poem = "".join(f"Roses number {{i}} are red,\\nviolets number {{i * i}} are blue.\\n\\n" for i in range(300))
open("data/raw/poems.txt", "w").write(poem)
pathlib.Path(".dvc/tmp").mkdir(exist_ok=True)
holder = {{"pid": 1, "cmd": "dvc exp run"}}
json.dump({{"write": {{str(pathlib.Path("data/tokens").resolve()): holder}}}}, open(".dvc/tmp/rwlock", "w"))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="GPT2_IMAGE names no image (building one takes minutes)"),
]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command in a container; all containers share the project's volume."""
    name = f"gpt2-test-{uuid.uuid4().hex[:8]}"
    if ENGINE == "docker":
        options = ["--rm", "--name", name, "--user", USER, "--read-only", "--tmpfs", "/tmp", "-v", f"{name}:/project"]
        command = ["docker", "run", *options, IMAGE]
    else:
        subprocess.run(["buildah", "from", "--pull-never", "--name", name, IMAGE], check=True)
        described = subprocess.run(["buildah", "inspect", name], check=True, capture_output=True, text=True).stdout
        entrypoint = json.loads(described)["OCIv1"]["config"]["Entrypoint"]
        command = ["buildah", "run", "--isolation", "chroot", "--user", USER, name, "--", *entrypoint]
    yield lambda *arguments: subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    subprocess.run(
        ["docker", "volume", "rm", "--force", name] if ENGINE == "docker" else ["buildah", "rm", name], check=True
    )


def stop(process: subprocess.Popen[str]) -> str:
    """Stop a container as `docker stop` does; return what is left of its output."""
    if ENGINE == "docker":
        name = process.args[process.args.index("--name") + 1]
        subprocess.run(["docker", "stop", "--time", "60", name], check=True)
    else:  # what the image names as its signal goes to its first process
        children = psutil.Process(process.pid).children(recursive=True)
        (tini,) = [child for child in children if child.name() == "tini"]
        tini.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)[0]


def test_a_stopped_pipeline_is_completed_by_the_next_container(start: Start) -> None:
    assert start("python", "-c", PREPARE).wait(120) == 0
    stopped = start("dvc", "repro")
    assert stopped.stdout
    for line in stopped.stdout:
        if re.match(r"train +\d+/300", line):  # the lock file of process 1 has not made it wait
            break
    output = stop(stopped)
    (step,) = re.findall(r"stopped after step (\d+), which is saved", output)
    completed = start("dvc", "repro").communicate(timeout=600)[0]
    assert f"resuming after step {step}, from" in completed and "gpt2 version 1 is champion" in completed
    texts, _ = start("python", "src/infer.py", "--prompt", "Roses", "--max_tokens", "5").communicate(timeout=120)
    assert "models:/gpt2@champion: GPT-2" in texts and "5 tokens in" in texts
