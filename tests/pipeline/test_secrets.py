"""No password goes where others read: into runs, artifacts, the store or what is printed."""

import subprocess
from pathlib import Path

import pytest

from pipeline.helpers import Shell, free_port, running

pytestmark = pytest.mark.slow

SECRET = "-".join(["hunter2", "c0ffee"])  # does not stand in this file, of which the checkout has a copy
IN_A_URL = f"https://user:{SECRET}@example.com/x.git"
COMMANDS = """
python src/train.py && python src/register.py && python src/register.py --show --verify --repair
python src/infer.py --prompt Roses --max_tokens 5 --device cpu
"""


def holders(*folders: Path) -> set[str]:
    """The files below folders in which the secret stands."""
    done = subprocess.run(["grep", "-rlF", SECRET, *map(str, folders)], capture_output=True, text=True)
    return set(done.stdout.splitlines())


def test_no_password_is_logged_or_printed(
    checkout: Path, shell: Shell, environment: dict[str, str], reproduced: str, tmp_path: Path
) -> None:
    shell(f"git remote add origin {IN_A_URL} && dvc remote add -q -d team {IN_A_URL} && git commit -qam 'A remote'")
    before = holders(checkout)
    port = free_port()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/team.db",
        "--artifacts-destination",
        f"{tmp_path}/artifacts",
    ]
    names = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")
    variables = (
        environment
        | dict.fromkeys(names, SECRET)
        | {
            "PIP_EXTRA_INDEX_URL": IN_A_URL,
            "MLFLOW_TRACKING_URI": f"http://user:{SECRET}@127.0.0.1:{port}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
    )

    def run(commands: str, code: int) -> str:
        done = subprocess.run(["sh", "-ec", commands], cwd=checkout, env=variables, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    with running(
        [*command, *stores],
        tmp_path,
        environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        f"http://127.0.0.1:{port}",
    ):
        told = run(COMMANDS, 0)
    assert "gpt2 version 1 is champion" in told and SECRET not in told
    assert list(tmp_path.glob("artifacts/**/model.safetensors")) and not holders(tmp_path)
    assert len(before) == 2 and holders(checkout) == before  # .git/config and .dvc/config
    told = run("python src/register.py", 2)  # the server has gone
    assert "error: MLflow's store fails" in told and SECRET not in told
