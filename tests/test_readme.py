"""The README's commands are those that run: the test command in .ci/run, options and files as they are."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^.*tests/requirements\.txt && .*pytest.*$", README, flags=re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == command


def test_the_files_named_exist() -> None:
    library = re.findall(r"\b(\w+\.py)\b", README[README.index("## How it fits together") :])
    assert library
    for name in library:
        assert (ROOT / "src" / name).is_file() or (ROOT / "src" / "gpt2" / name).is_file(), name


def test_infer_takes_the_options_shown() -> None:
    source = (ROOT / "src" / "infer.py").read_text(encoding="utf-8")
    commands = re.findall(r"python src/infer\.py (--.*)$", README, flags=re.MULTILINE)
    assert commands
    for command in commands:
        for option in (word for word in shlex.split(command) if word.startswith("--")):
            assert f'"{option}"' in source, option


def test_the_parameters_named_exist() -> None:
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    named = re.findall(r"-S (\w+)\.(\w+)=", README)
    assert named
    for section, name in named:
        assert re.search(rf"^{section}:\n(?:  .*\n)*?  {name}:", params, flags=re.MULTILINE), name


def test_the_tests_named_exist() -> None:
    paths = re.findall(r"tests/[\w/]+\.py", README)
    words = {word for chosen in re.findall(r'-k (?:"([^"]+)"|(\w+))', README) for word in " ".join(chosen).split()}
    names = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert paths and all((ROOT / path).is_file() for path in paths)
    assert words and all(re.search(rf"^def test_\w*{word}", names, flags=re.MULTILINE) for word in words - {"or"})
