"""Datasets in Hugging Face's formats: from a folder, since no hub is reached here."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2.config import PrepareParams
from gpt2.data.corpus import read_corpus

datasets = pytest.importorskip("datasets")
ErrorLine = Callable[[Callable[[], object]], str]
Make = Callable[..., PrepareParams]
SOURCE = "hf:data/raw/mine"


@pytest.fixture(params=["save_to_disk", "parquet"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dataset of two splits and one of another kind, in either of the formats."""
    rows = {
        name: datasets.Dataset.from_dict({"id": list(range(count)), "body": [f"{name} {i}" for i in range(count)]})
        for name, count in (("train", 5), ("validation", 2), ("unsupervised", 9))
    }
    folder = tmp_path / "data/raw/mine"
    if request.param == "save_to_disk":
        datasets.DatasetDict(rows).save_to_disk(folder)
    else:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n"
            + "".join(f"  - {{split: {name}, path: {name}.parquet}}\n" for name in rows)
            + "---\n"
        )
        for name, one in rows.items():
            one.to_parquet(folder / f"{name}.parquet")
    return tmp_path


def test_a_dataset_gives_its_rows_and_splits(root: Path, make_prepare_params: Make, offline: None) -> None:
    texts, left_out = read_corpus(make_prepare_params(SOURCE, text_column="body"), root)
    assert [tuple(text) for text in texts] == [
        *((f"train[{i + 1}]", f"train {i}", "train") for i in range(5)),
        *((f"validation[{i + 1}]", f"validation {i}", "val") for i in range(2)),
    ]
    assert +left_out == {"other splits": 1}


def test_splits_and_rows_can_be_chosen(root: Path, make_prepare_params: Make, error_line: ErrorLine) -> None:
    def read(**splits: str) -> list[str]:
        params = make_prepare_params(SOURCE, text_column="body", splits=splits, max_documents=3)
        return [f"{text.text}: {text.split}" for text in read_corpus(params, root)[0]]

    assert read(train="unsupervised") == [f"unsupervised {i}: train" for i in range(3)]
    chosen = read(val="unsupervised")  # train is the dataset's own
    assert Counter(text.partition(": ")[2] for text in chosen) == {"train": 3, "val": 3}
    assert "two are of one split of" in error_line(lambda: read(val="validation", test="validation"))
    assert "has no split 'tset', but train, validation, unsupervised" in error_line(lambda: read(test="tset"))


def test_a_link_is_refused(root: Path, make_prepare_params: Make, error_line: ErrorLine) -> None:
    (root / "data/raw/mine/more").symlink_to(root)
    assert "more is a link" in error_line(lambda: read_corpus(make_prepare_params(SOURCE), root))


def test_a_missing_column_gets_one_line(root: Path, make_prepare_params: Make, error_line: ErrorLine) -> None:
    line = error_line(lambda: list(read_corpus(make_prepare_params(SOURCE), root)[0]))
    assert "a row has no column 'text' (prepare.text_column), but id, body" in line


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf:data/raw/absent", "cannot be read: Couldn't find any data file"),
        ("hf:owner/name:en@main", "may change: write hf:owner/name:en@<the 40 digits of a commit"),
        ("hf:owner/name@" + "a" * 40, "without network, fetch the dataset elsewhere with `hf download"),
    ],
)
def test_what_is_not_there_gets_one_line_that_says_what_to_do(
    tmp_path: Path,
    make_prepare_params: Make,
    error_line: ErrorLine,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    told: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    if "@aaa" in source:
        monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert told in error_line(lambda: read_corpus(make_prepare_params(source), tmp_path))
