"""A team's storage, run for real on this machine: PostgreSQL, S3, and MLflow's server with passwords."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from pipeline.helpers import Repro, Shell, clone, digests, free_port, running, stages_run, wait_for

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
PACKAGES = ("boto3", "dvc_s3", "flask_wtf", "moto", "psycopg")
MISSING = [name for name in PACKAGES if find_spec(name) is None] + ([] if POSTGRES else ["PostgreSQL"])
PASSWORD = secrets.token_hex(8)

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
    (folder / "password").write_text(PASSWORD)
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
    wait_for(lambda: subprocess.run([POSTGRES / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode == 0)
    yield f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
    server.terminate()  # it closes its connections, and ends its children
    server.wait(60)
    shutil.rmtree(folder)
