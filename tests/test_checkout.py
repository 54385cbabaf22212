"""What git does with the files of this repository."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_checkout_has_the_same_bytes_where_git_writes_crlf(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    code = tmp_path / "code.py"
    for text in (b"one\n", b"one\r\n"):
        code.write_bytes(text)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
        code.unlink()
        subprocess.run(["git", "-c", "core.autocrlf=true", "checkout", "-q", "code.py"], cwd=tmp_path, check=True)
        assert code.read_bytes() == b"one\n"
