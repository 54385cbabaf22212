"""Each format gives the same texts, plain or compressed; what is broken or too large gets one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.data import readers
from gpt2.data.readers import DECOMPRESSORS, READERS, read_file

ErrorLine = Callable[[Callable[[], object]], str]
Make = Callable[..., PrepareParams]
TEXTS = ['one, "two"\r\nthree\tü 日本 👧', "a\u2028b", "", "x" * 200_000]


def as_csv(texts: list[str], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def as_parquet(texts: Any, column: str = "text", **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), file, **options)
    return file.getvalue()


def as_jsonl(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=bool(text)) for text in texts).encode()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".txt": lambda texts: "<END>".join(texts).encode(),
    ".md": lambda texts: "<END>".join(texts).encode(),
    ".jsonl": as_jsonl,
    ".csv": as_csv,
    ".tsv": lambda texts: as_csv(texts, "\t"),
    ".parquet": as_parquet,
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(path: Path, data: bytes, params: PrepareParams) -> list[str]:
    path.write_bytes(data)
    return list(read_file(path, params))


@pytest.mark.parametrize("compression", ["", *DECOMPRESSORS])
@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_texts(
    tmp_path: Path, make_prepare_params: Make, suffix: str, compression: str
) -> None:
    data = COMPRESSORS[compression](WRITERS[suffix](TEXTS))
    params = make_prepare_params("data/raw", separator="<END>")
    assert read(tmp_path / f"a{suffix.upper()}{compression}", data, params) == TEXTS


@given(text=st.text(st.sampled_from("a日\n|-"), max_size=60), largest=st.integers(3, 9), chunk=st.integers(1, 7))
def test_plain_text_is_whole_whatever_is_read_at_once(
    text: str, largest: int, chunk: int, make_prepare_params: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", chunk)
        separated = read(path, text.encode(), make_prepare_params("data/raw", separator="|-|"))
        assert separated == [*text.split("|-|")[:-1], *[last for last in text.split("|-|")[-1:] if last.strip()]]
        patch.setattr(readers, "LARGEST", largest)
        parts = read(path, text.encode(), make_prepare_params("data/raw"))
        assert "".join(parts) == text and all(len(part) <= largest for part in parts)
        assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])
        separated = read(path, text.encode(), make_prepare_params("data/raw", separator="|-|"))
        assert "".join(separated).strip() == text.replace("|-|", "").strip()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_byte_order_mark_is_no_text(tmp_path: Path, make_prepare_params: Make, suffix: str, encoding: str) -> None:
    data = WRITERS[suffix](["one é\r\n", "two"]).decode()
    marked = data if encoding in ("utf-8-sig", "utf-16", "utf-32") else f"\ufeff{data}"
    params = make_prepare_params("data/raw", separator="<END>", encoding=encoding)
    assert read(tmp_path / f"a{suffix}", marked.encode(encoding), params) == ["one é\r\n", "two"]


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@pytest.mark.parametrize(("data", "offset"), [(b"\xff\xfe", 0), (b"cut \xe6\x97", 4), (b"caf\xe9 au lait", 3)])
def test_bad_encoding_is_refused_by_its_place(
    tmp_path: Path,
    make_prepare_params: Make,
    error_line: ErrorLine,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    offset: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    before = "日本 é\n".encode() * 9
    line = error_line(lambda: read(tmp_path / "a.txt", before + data, make_prepare_params("data/raw")))
    assert "a.txt cannot be read: it is not utf-8 (prepare.encoding): " in line
    assert line.endswith(f" at byte {len(before) + offset}\n")


def test_other_encodings_are_read(tmp_path: Path, make_prepare_params: Make) -> None:
    params = make_prepare_params("data/raw", encoding="shift_jis")
    assert read(tmp_path / "a.txt", "日本".encode("shift_jis"), params) == ["日本"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"Text": "y", "id": 3}',
            "line 3 has no column 'text' (prepare.text_column), but",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}', "the column 'text' of line 2 holds a int, not text"),
        ("a.jsonl", b'{"text": ["x"]}', "the column 'text' of line 1 holds a list, not text"),
        ("a.jsonl", b'"text"', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON: Expecting value"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: "),
        ("a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", "line 1 is not JSON: Exceeds the limit"),
        ("a.csv", b"id,Text\n1,x\n", "line 2 has no column 'text' (prepare.text_column), but id, Text"),
        ("a.csv", b"id,text\n1,x\n2\n", "line 3 has no column 'text'"),
        ("a.csv", b'id,text\n1,"x\n2,y\n', "line 3: unexpected end of data"),
        ("a.csv", b'id,text\n1,"x"y\n', "line 2: ',' expected after"),
        ("a.csv", b"text\nMy fellow citizens, I come\n", "line 2: 2 fields, not 1; a text with ',' needs quotes"),
        ("a.parquet", as_parquet(["x"], "Text"), "it has no column 'text' (prepare.text_column), but id, Text"),
        ("a.parquet", as_parquet([["x"]]), "the column 'text' is list<element: string>, not text"),
        ("a.parquet", as_parquet([{"x": "y"}]), "the column 'text' is struct<x: string>, not text"),
        ("a.parquet", as_parquet([1, 2]), "the column 'text' is int64, not text"),
        ("a.parquet", as_parquet([b"x"]), "the column 'text' is binary, not text"),
        ("a.parquet", as_parquet(TEXTS)[:-9], "Parquet magic bytes not found"),
        ("a.parquet", b"", "Parquet file size is 0 bytes"),
        ("a.parquet", b"PAR1" + struct.pack("<I", 2**31) + b"PAR1", "cannot be read: "),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "ended before the end-of-stream marker"),
        ("a.txt.gz", b"plain text", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 20, "Error -3 while decompressing"),
        ("a.txt.bz2", bz2.compress(b"x" * 9999)[:-9], "ended before the end-of-stream marker"),
        ("a.txt.bz2", b"plain text", "Invalid data stream"),
        ("a.txt.xz", lzma.compress(b"x" * 9999)[:-9], "ended before the end-of-stream marker"),
        ("a.txt.xz", b"plain text", "format not supported"),
        ("a.txt.zst", COMPRESSORS[".zst"](b"x" * 9999)[:-5], "Truncated compressed stream"),
        ("a.txt.zst", b"plain text", "ZSTD decompress failed"),
        (
            "a.jsonl.gz",
            gzip.compress(b"\xff", mtime=0),
            "it is not utf-8 (prepare.encoding): invalid start byte at byte 0",
        ),
    ],
)
def test_what_is_broken_gets_one_line(
    tmp_path: Path, make_prepare_params: Make, error_line: ErrorLine, name: str, data: bytes, told: str
) -> None:
    line = error_line(lambda: read(tmp_path / name, data, make_prepare_params("data/raw")))
    assert f"{name} cannot be read: " in line and told in line and len(line) < 700


def test_a_damaged_parquet_file_gets_one_line_or_its_texts(tmp_path: Path, make_prepare_params: Make) -> None:
    whole, path = as_parquet([f"text {i}" for i in range(50)]), tmp_path / "a.parquet"
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 0xFF
        try:
            read(path, bytes(data), make_prepare_params("data/raw"))
        except UserError as error:
            assert len(str(error).splitlines()) == 1


def test_rows_without_text_are_empty(tmp_path: Path, make_prepare_params: Make) -> None:
    params = make_prepare_params("data/raw")
    assert read(tmp_path / "a.jsonl", b'{"text": null}\n \n{"text": ""}', params) == ["", ""]
    assert read(tmp_path / "a.parquet", as_parquet([None, "x"], row_group_size=1), params) == ["", "x"]
    assert read(tmp_path / "b.parquet", as_parquet(pa.array(["x", None]).dictionary_encode()), params) == ["x", ""]
    assert read(tmp_path / "a.csv", b"", params) == []


SRC = str(Path(__file__).parents[2] / "src")
HUGE = 200 << 20  # bytes that the files claim to hold
HOSTILE: dict[str, Callable[[Path], object]] = {
    "field.csv": lambda path: _repeat(path, open, b'id,text\n1,"', b"x,".ljust(99) + b"\n"),
    "line.jsonl.gz": lambda path: _repeat(path, gzip.open, b'{"text": "', b"x" * 3),
    "quoted.tsv.bz2": lambda path: _repeat(path, bz2.open, b'id\ttext\n"', b"x" * 3),
    "value.parquet": lambda path: pq.write_table(pa.table({"text": ["x" * (80 << 20)]}), path),
    "line.txt.gz": lambda path: _repeat(path, gzip.open, b"", b"x" * 3),
    "claim.xz": lambda path: path.write_bytes(_claim_of_4_gb()),
}


def _repeat(path: Path, opener: Callable[..., Any], start: bytes, part: bytes) -> None:
    with opener(path, "wb") as file:
        file.write(start)
        for _ in range(HUGE >> 20):
            file.write(part * ((1 << 20) // len(part)))


def _claim_of_4_gb() -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(b"text " * 100, filters=filters))
    data[data.index(b"\x21\x01") + 2] = 40  # the dictionary's size in the block's header
    header = data[12 : 12 + (data[12] + 1) * 4 - 4]
    data[12 + len(header) : 16 + len(header)] = struct.pack("<I", zlib.crc32(header))
    return bytes(data)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_large_gets_one_line_in_bounded_memory(
    tmp_path: Path, make_prepare_params: Make, name: str
) -> None:
    HOSTILE[name](tmp_path / name)
    params = make_prepare_params("data/raw").model_dump()
    code = f"""
import pathlib, re, pyarrow.parquet
from gpt2.config import PrepareParams
from gpt2.core.errors import UserError
from gpt2.data.readers import read_file
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
try:
    texts = read_file(pathlib.Path({str(tmp_path / name)!r}), PrepareParams(**{params!r}))
    print("the longest text:", max(map(len, texts)))
except UserError as error:
    print(error)
print(peak() - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": SRC}
    )
    message, kilobytes = ran.stdout.splitlines()
    told = {"claim.xz": "Memory usage limit exceeded", "line.txt.gz": f"the longest text: {readers.LARGEST}"}
    assert told.get(name, f"longer than {readers.LARGEST:,} characters") in message
    assert int(kilobytes) < 150 << 10
