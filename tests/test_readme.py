"""What the README files name is there: commands and their options, files, parameters, tests, links."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = (ROOT, ROOT / "data", ROOT / "src" / "gpt2", ROOT / "tests" / "benchmarks")
TEXTS = {folder / "README.md": (folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
ALL = "\n".join(TEXTS.values())
LONGEST = 170  # lines that a reader has patience for
OTHERS_OPTIONS = {"--queue", "--run-all", "--temp", "--timeout"}  # of DVC and MLflow
FILE_ENDINGS = {"py", "json", "csv", "bin", "safetensors", "txt", "png"}


def named_files() -> Iterator[Path]:
    yield from ROOT.glob("*.yaml")
    for folder in ("src", "tests"):
        yield from (ROOT / folder).rglob("*.py")


def test_the_readme_is_short() -> None:
    assert len(TEXTS[README].splitlines()) <= LONGEST


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^.*tests/requirements\.txt && .*pytest.*$", TEXTS[README], flags=re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == command


def test_the_files_named_exist() -> None:
    files = [f"/{file.relative_to(ROOT).as_posix()}" for file in named_files()]
    named = set(re.findall(r"[\w/.]*\w\.(?:py|yaml)\b", ALL))
    assert {"gpt2.py", "params.yaml", "src/infer.py"} <= named
    assert [name for name in named if not any(file.endswith(f"/{name.rpartition('../')[2]}") for file in files)] == []


def test_the_options_named_exist() -> None:
    commands = re.findall(r"python ((?:src|tests/benchmarks)/\w+\.py) ([^`\n]*)", ALL)
    assert {script for script, _ in commands} >= {"src/infer.py", "src/register.py"}
    for script, arguments in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [option for option in re.findall(r"--[\w-]+", arguments) if f'"{option}"' not in source] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("src/*.py"), *ROOT.glob("tests/*/*.py")))
    alone = set(re.findall(r"`(--[\w-]+)", ALL)) - OTHERS_OPTIONS
    assert alone and [option for option in alone if f'"{option}"' not in sources] == []


def test_the_parameters_named_exist() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    named = set(re.findall(rf"\b({'|'.join(params)})\.([a-z_]+)", ALL))
    parameters = {(section, name) for section, name in named if name not in FILE_ENDINGS}
    assert ("train", "max_steps") in parameters
    assert [(section, name) for section, name in parameters if name not in params[section]] == []


def test_the_tests_named_exist() -> None:
    paths = re.findall(r"tests/[\w/]+\.py", ALL)
    words = {word for chosen in re.findall(r'-k (?:"([^"]+)"|(\w+))', ALL) for word in " ".join(chosen).split()}
    names = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert paths and [path for path in paths if not (ROOT / path).is_file()] == []
    assert words and [word for word in words - {"or"} if not re.search(rf"^def test_\w*{word}", names, re.M)] == []


def test_the_links_lead_somewhere() -> None:
    links = [
        (file, *link) for file, text in TEXTS.items() for link in re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", text)
    ]
    assert links
    for file, path, heading in links:
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), (file, path)
        if heading:
            headings = re.findall(r"^#+ (.*)$", TEXTS[target], flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], heading
    pictures = re.findall(r'<img src="([^"]+)"', TEXTS[README])
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
