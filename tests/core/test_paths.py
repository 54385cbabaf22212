"""The main checkout is found from the temporary folders of experiments, and from nowhere else."""

from pathlib import Path

import pytest

from gpt2.core import paths as project

MAIN = Path("/home/user/gpt2")
CLONE = MAIN / ".dvc/tmp/exps/tmp123"


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (MAIN, MAIN),
        (CLONE, MAIN),
        (MAIN / ".dvc/tmp/exps/standalone/tmp123", MAIN),
        (CLONE / ".dvc/tmp/exps/tmp456", CLONE),
        (CLONE / "gpt2", MAIN),
    ],
)
def test_main_root(root: Path, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "ROOT", root)
    assert project.main_root() == expected
