"""The image: any user runs the pipeline in it, stopping it saves a training, and a killed one blocks no other.

GPT2_IMAGE names an image that was built before: docker:gpt2 by `docker build -t gpt2 .`, buildah:gpt2 by
tests/container/build, which needs no Docker; it then runs in a chroot, without namespaces.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from pipeline.helpers import TINY

ENGINE, _, IMAGE = os.environ.get("GPT2_IMAGE", "").partition(":")
NAME = f"gpt2-test-{os.getpid()}"
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


@pytest.fixture
def command() -> Iterator[list[str]]:
    """What runs the words after it in a container; all containers of a test share the project's volume, called NAME."""
    if ENGINE == "docker":
        options = ["--rm", "--name", NAME, "--user", USER, "--read-only", "--tmpfs", "/tmp", "-v", f"{NAME}:/project"]
        command, remove = ["docker", "run", *options, IMAGE], ["docker", "volume", "rm", "--force"]
    else:
        subprocess.run(["buildah", "from", "--pull-never", "--name", NAME, IMAGE], check=True)
        described = subprocess.run(["buildah", "inspect", NAME], check=True, capture_output=True, text=True).stdout
        entrypoint = json.loads(described)["OCIv1"]["config"]["Entrypoint"]
        command = ["buildah", "run", "--isolation", "chroot", "--user", USER, NAME, "--", *entrypoint]
        remove = ["buildah", "rm"]
    yield command
    subprocess.run([*remove, NAME], check=True)


def stop(process: subprocess.Popen[str]) -> str:
    """Stop a container as `docker stop` does; return what is left of its output."""
    if ENGINE == "docker":
        subprocess.run(["docker", "stop", "--time", "60", NAME], check=True)
    else:  # the image's STOPSIGNAL, to the container's first process
        children = psutil.Process(process.pid).children(recursive=True)
        (tini,) = [child for child in children if child.name() == "tini"]
        tini.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[0]


def test_a_stopped_pipeline_is_completed_by_the_next_container(command: list[str]) -> None:
    def run(*words: str) -> str:
        return subprocess.run([*command, *words], check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout

    run("python", "-c", PREPARE)
    started = subprocess.Popen([*command, "dvc", "repro"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert started.stdout
    found = next((line for line in started.stdout if re.match(r"train +\d+/300", line)), None)
    assert found  # the lock of process 1 has not refused it
    (step,) = re.findall(r"stopped after step (\d+), which is saved", stop(started))
    output = run("dvc", "repro")
    assert f"resuming after step {step}, from" in output and "gpt2 version 1 is champion" in output
    assert "Roses" in run("python", "src/infer.py", "--prompt", "Roses", "--max_tokens", "5")
