"""A team's storage, run for real on this machine: PostgreSQL, S3, and MLflow's server with passwords."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from sqlalchemy import create_engine, text

from gpt2.tracking.local_registry import MODEL_SHA256
from pipeline.helpers import (
    COMMIT_RESULTS,
    STAGES,
    Shell,
    clone,
    digests,
    free_port,
    run_scripts,
    running,
    stages_run,
    wait_for,
)

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
PACKAGES = ("boto3", "dvc_s3", "flask_wtf", "moto", "psycopg")
MISSING = [name for name in PACKAGES if find_spec(name) is None] + ([] if POSTGRES else ["PostgreSQL"])
SECRET = secrets.token_hex(8)
Server = Callable[[], AbstractContextManager[str]]
Member = tuple[Path, dict[str, str]]  # a clone, and the environment of its owner
REPRO_AND_PUSH = "dvc pull data/raw/poems.txt.dvc && dvc repro && dvc push"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL database of our own; yields its URI, with the password."""
    assert POSTGRES
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL does not run as root
    port, folder = free_port(), Path(tempfile.mkdtemp())
    (folder / "password").write_text(SECRET)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    data = folder / "data"
    setup = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    subprocess.run([POSTGRES / "initdb", data, *setup], user=user, cwd=folder, check=True, capture_output=True)
    server = psutil.Popen(
        [POSTGRES / "postgres", "-D", data, "-p", str(port), *options], user=user, cwd=folder, stderr=subprocess.DEVNULL
    )
    wait_for(
        lambda: subprocess.run([POSTGRES / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode == 0
    )
    yield f"postgresql://mlflow:{SECRET}@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)  # a fast shutdown, whoever is connected
    server.wait(60)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def team(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a team, whose S3 service runs."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "gpt2", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, Path.cwd(), environment, address, "moto-api/data.json"):
        server = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
        yield environment | keys | server | {"AWS_ENDPOINT_URL": address, "AWS_MAX_ATTEMPTS": "1"}


@pytest.fixture(scope="module")
def store(team: dict[str, str]) -> Any:
    """The bucket for MLflow's artifacts, which is made beside the one for DVC."""
    import boto3

    session = boto3.Session(team["AWS_ACCESS_KEY_ID"], team["AWS_SECRET_ACCESS_KEY"])
    s3 = session.resource("s3", team["AWS_DEFAULT_REGION"], endpoint_url=team["AWS_ENDPOINT_URL"])
    s3.create_bucket(Bucket="dvc")
    return s3.create_bucket(Bucket="mlflow")


@pytest.fixture(scope="module")
def server(database: str, team: dict[str, str], store: Any, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Return what runs MLflow's server, which knows Ada and Bob."""
    folder, address = tmp_path_factory.mktemp("server"), team["MLFLOW_TRACKING_URI"]
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = MANAGE\ndatabase_uri = {database}\nadmin_username = admin\n"
        f"admin_password = {SECRET}\nauth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    variables = team | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = ["mlflow", "server", "--app-name", "basic-auth", "--workers", "1", "--port", address.rpartition(":")[2]]
    command += ["--no-serve-artifacts", "--default-artifact-root", "s3://mlflow"]
    with running(command, folder, variables, address):
        for user in ("ada", "bob"):
            body = json.dumps({"username": user, "password": SECRET}).encode()
            request = Request(f"{address}/api/2.0/mlflow/users/create", body, {"Content-Type": "application/json"})
            request.add_header("Authorization", f"Basic {b64encode(f'admin:{SECRET}'.encode()).decode()}")
            urlopen(request).close()
    return lambda: running(command, folder, variables, address)


@pytest.fixture(scope="module")
def members(
    checkout: Path, shell: Shell, team: dict[str, str], server: Server, tmp_path_factory: pytest.TempPathFactory
) -> list[Member]:
    """The clones of Ada and Bob, whose parameters differ. Their text is in DVC's remote alone."""
    shell("dvc remote add --default team s3://dvc && dvc add data/raw/poems.txt")
    shell("git add -A && git commit -qm 'A remote'")
    subprocess.run(["dvc", "push"], cwd=checkout, env=team, check=True)
    found = []
    for name, max_steps in (("ada", 6), ("bob", 9)):
        folder = clone(checkout, tmp_path_factory.mktemp("clones") / name, max_steps=max_steps)
        (folder / "data/raw/poems.txt").unlink()
        found.append((folder, team | {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": SECRET}))
    return found


@pytest.fixture
def client(members: list[Member], monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Ada's client of the server."""
    variables = members[0][1]
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, variables[name])
    return MlflowClient(variables["MLFLOW_TRACKING_URI"])


def run(command: str, member: Member, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a member's clone, and check its exit code."""
    folder, variables = member
    done = subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def sha256_of_model(member: Member) -> str:
    return str(json.loads((member[0] / "data/model/config.json").read_text())["model_sha256"])


def champion(client: MlflowClient) -> tuple[str, set[str]]:
    """The SHA-256 of the champion's weights, and those of all versions, which differ."""
    found = client.search_model_versions("name = 'gpt2'")
    assert len({version.tags[MODEL_SHA256] for version in found}) == len(found)
    held = client.get_model_version_by_alias("gpt2", "champion").tags[MODEL_SHA256]
    return held, {version.tags[MODEL_SHA256] for version in found}


def test_a_team_shares_results_versions_and_champion(
    members: list[Member], server: Server, store: Any, client: MlflowClient
) -> None:
    ada, bob = members
    with server(), ThreadPoolExecutor() as pool:  # both begin on a store that has nothing yet
        for done in pool.map(partial(run, REPRO_AND_PUSH), members):
            assert stages_run(done.stdout) == list(STAGES) and "warning" not in done.stderr
        trained = {json.loads((one[0] / "data/metrics/evaluate.json").read_text())["val_loss"]: one for one in members}
        assert champion(client) == (sha256_of_model(trained[min(trained)]), set(map(sha256_of_model, members)))

        run(COMMIT_RESULTS, ada)
        take_hers = f"git fetch -q {ada[0]} && git checkout -qf FETCH_HEAD && dvc pull --force && dvc repro"
        assert stages_run(run(take_hers, bob).stdout) == ["register"]
        assert digests(bob[0]) == digests(ada[0])
        texts = [run("python src/infer.py --prompt Roses --max_tokens 9 --seed 1", one).stdout for one in members]
        assert texts[0] == texts[1] and len(champion(client)[1]) == 2
        assert all(SECRET.encode() not in one.get()["Body"].read() for one in store.objects.all())
        assert all(SECRET not in str(run.data) for run in client.search_runs(["1"]))


def test_what_fails_ends_with_one_line_and_is_completed_later(
    members: list[Member], server: Server, store: Any, database: str, client: MlflowClient
) -> None:
    (folder, variables), _ = members
    write = ["infer.py --prompt Roses --max_tokens 3"]

    def fails(commands: list[str], reason: str, **settings: str) -> None:
        errors = run_scripts(commands, folder, variables | settings, 2)
        assert re.fullmatch(f"(error: .*{reason}.*\n){{{len(commands)}}}", errors), errors

    def completes() -> None:
        assert stages_run(run("dvc repro", members[0]).stdout) == ["register"]
        assert sha256_of_model(members[0]) in champion(client)[1]

    with server():
        run(REPRO_AND_PUSH, members[0])
        fails(["register.py", *write], "not authenticated", MLFLOW_TRACKING_PASSWORD="wrong")
        fails(["register.py"], "Could not connect", AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
        fails(
            ["register.py", *write],
            "password authentication failed",
            MLFLOW_TRACKING_URI=database.replace(SECRET, "no"),
        )

        shutil.rmtree(folder / ".cache/models", ignore_errors=True)
        store.objects.delete()
        fails(write, "lost the files")
        store.delete()
        fails(["register.py", *write], "bucket does not exist")
        store.create()
        completes()

        with create_engine(database).begin() as connection:  # MLflow deletes a version's aliases with it
            connection.execute(text("UPDATE registered_model_aliases SET version = 99"))
        fails(write, "version=99. not found")
        completes()

        for version in client.search_model_versions("name = 'gpt2'"):
            client.delete_model_version("gpt2", version.version)
        for one in client.search_runs(["1"]):
            client.delete_run(one.info.run_id)
        client.delete_experiment("1")
        fails(write, "alias champion not found")
        completes()

        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["train"]["max_steps"] = 7
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        known = len(list(store.objects.filter(Prefix="1/models/")))
        cut = psutil.Popen(
            ["dvc", "repro"], cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_for(lambda: len(list(store.objects.filter(Prefix="1/models/"))) > known, cut)
    output = cut.communicate(timeout=300)[0]
    assert cut.returncode == 255 and stages_run(output)[-1] == "register"
    assert len(re.findall("^error: MLflow's store fails", output, flags=re.MULTILINE)) == 1
    assert "Traceback" not in output
    before = digests(folder)
    with server():
        completes()
        run_scripts(write, folder, variables)
    assert digests(folder) == before
