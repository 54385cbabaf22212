"""The main checkout is found from the temporary folders of experiments, and from nowhere else."""

from pathlib import Path

import pytest

from gpt2 import project

MAIN = Path("/home/user/gpt2")
CLONE = MAIN / ".dvc/tmp/exps/tmp123"


@pytest.mark.parametrize(
    ("root", "dvc_root", "expected"),
    [
        (MAIN, None, MAIN),
        (MAIN, MAIN, MAIN),
        (CLONE, MAIN, MAIN),
        (CLONE, None, MAIN),
        (MAIN, Path("/home/user/other"), MAIN),
        (CLONE, Path("/home/user/other"), MAIN),
        (CLONE / ".dvc/tmp/exps/tmp456", CLONE, CLONE),
    ],
)
def test_main_root(root: Path, dvc_root: Path | None, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "ROOT", root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if dvc_root:
        monkeypatch.setenv("DVC_ROOT", str(dvc_root))
    assert project.main_root() == expected
