"""Environments in which the commands work all the same, or say in one line what they lack."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gpt2.core.files import read_json
from pipeline.helpers import COMMIT_RESULTS, Shell

pytestmark = pytest.mark.slow

INFER = "python src/infer.py --prompt Roses --max_tokens 5 --seed 1 --device cpu"
REGISTER = "python src/register.py"
IS_CHAMPION = "gpt2 version 1 is champion: it holds it already\n"
WITHOUT_NAME = "unshare --user --map-user=1234 --map-group=1234"
READ_ONLY = """unshare --map-root-user --mount sh -ec '
mount --make-rprivate / && mount --bind . . && mount -o remount,bind,ro / && cd "$PWD"
! touch /x 2> /dev/null && {}'"""


@pytest.fixture(scope="module")
def text(shell: Shell, reproduced: str) -> str:
    return shell(INFER).stdout


@pytest.mark.parametrize(
    ("command", "code", "output", "errors"),
    [
        pytest.param(f"env -i PATH=$PATH LANG=C TERM=dumb {INFER}", 0, "TEXT", "tokens/s", id="LANG=C"),
        pytest.param(f"env -i PATH=$PATH LC_ALL=POSIX {INFER} -p é", 0, "é", "tokens/s", id="POSIX, no HOME"),
        pytest.param(f"{INFER} <&-", 0, "TEXT", "tokens/s", id="standard input is closed"),
        pytest.param("python src/infer.py <&-", 2, "", "error: standard input is closed", id="no prompt either"),
        pytest.param(f"{INFER} >&-", 0, "", "tokens/s", id="standard output is closed"),
        pytest.param("echo Roses | python src/infer.py >&-", 0, "", "tokens/s", id="that of a session is closed"),
        pytest.param(f"{INFER} 2>&-", 0, "TEXT", "", id="standard error is closed"),
        pytest.param(f"TIKTOKEN_CACHE_DIR=/proc/x {INFER}", 2, "", "error: tiktoken cannot use its cache", id="cache"),
        pytest.param(
            f"MLFLOW_RUN_ID=5 MLFLOW_EXPERIMENT_NAME=x MLFLOW_TRACKING_URI= {REGISTER}",
            0,
            IS_CHAMPION,
            "",
            id="another program's run",
        ),
        pytest.param(f"{WITHOUT_NAME} env -u USER HOME=/tmp {INFER}", 0, "TEXT", "tokens/s", id="a user without name"),
        pytest.param(f"{WITHOUT_NAME} env -u USER HOME=/tmp {REGISTER}", 0, IS_CHAMPION, "", id="who registers"),
        pytest.param(READ_ONLY.format(INFER), 0, "TEXT", "tokens/s", id="a read-only root"),
        pytest.param(
            READ_ONLY.format("DVC_SITE_CACHE_DIR=.cache/dvc dvc repro -f -s register"),
            0,
            IS_CHAMPION,
            "",
            id="in which DVC runs",
        ),
    ],
)
def test_an_environment(shell: Shell, text: str, command: str, code: int, output: str, errors: str) -> None:
    if (namespace := command.partition(" sh ")[0]).startswith("unshare"):
        words = namespace.partition(" env ")[0].split()
        if subprocess.run([*words, "true"], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("this system makes no namespaces")
    done = shell(command, code=code)
    assert output.replace("TEXT", text) in done.stdout and (output or not done.stdout), done.stdout
    assert errors in done.stderr and "Traceback" not in done.stderr and "warning" not in done.stderr.lower()
    if output == "TEXT":
        assert done.stdout == text
    if code == 2:
        assert len(done.stderr.splitlines()) == 1


def test_a_repository_of_another_user(checkout: Path, shell: Shell, reproduced: str) -> None:
    shell("GIT_TEST_ASSUME_DIFFERENT_OWNER=1 dvc repro -f -s train")
    assert read_json(checkout / "data/lineage.json")["commit"] == shell("git rev-parse HEAD").stdout.strip()


def test_a_shallow_clone_with_crlf_in_a_folder_of_an_odd_name(
    checkout: Path, shell: Shell, text: str, tmp_path: Path
) -> None:
    clone = tmp_path / "a b%20?#é日"
    shell(COMMIT_RESULTS)
    shell(f"git clone -q --depth 1 -c core.autocrlf=true 'file://{checkout}' '{clone}'")
    shutil.copy(checkout / "data/raw/poems.txt", clone / "data/raw")
    shell(f"cd '{clone}' && dvc cache dir -q --local '{checkout}/.dvc/cache' && dvc checkout -q")
    assert "gpt2 version 1 is champion: there is no other version" in shell(f"cd '{clone}' && dvc repro").stdout
    assert shell(f"cd '{clone}' && {INFER}").stdout == text


def test_a_folder_of_a_larger_repository(checkout: Path, shell: Shell, text: str, tmp_path: Path) -> None:
    part = tmp_path / "projects" / "gpt2"
    shutil.copytree(checkout, part, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    shell(f"cd {tmp_path} && git init -q && git add -A && git commit -qm 'Many projects'")
    shell(f"echo '# changed' >> {part}/src/sample.py")
    lines = shell(f"cd {part} && dvc repro").stdout
    assert "Running stage 'sample'" in lines and "Running stage 'train'" not in lines
    assert IS_CHAMPION in shell(f"cd {part} && {REGISTER}").stdout
    assert shell(f"cd {part} && {INFER}").stdout == text
