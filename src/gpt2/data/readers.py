"""Files become texts: a registry of readers by suffix, and one of decompressors.

A new format is a function that yields the texts in a stream, and a line in READERS. Each streams, so memory is bounded:
a text has at most LARGEST characters. A longer plain text is cut at a line end, a longer row is an error.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from gpt2.config import PrepareParams
from gpt2.core.errors import UserError

LARGEST = 1 << 24  # characters of a text
CHUNK = 1 << 20  # bytes read at once
XZ_MEMORY = 1 << 28  # bytes; a header may claim 4 GB
PARQUET_ROWS = 16  # decoded at once; each may be of any size


def read_text(stream: BinaryIO, params: PrepareParams) -> Iterator[str]:
    """Yield what stands between separators, or the whole; line ends stay as they are."""
    held, separator = "", params.separator or ""
    for piece in _decode(stream, params.encoding):
        held += piece
        if separator:
            *whole, held = held.split(separator)
            yield from whole
        while len(held) >= LARGEST + len(separator):  # whose beginning may be at the end
            cut = held.rfind("\n", 0, LARGEST) + 1 or LARGEST
            yield held[:cut]
            held = held[cut:]
    if held.strip() or not separator:
        yield held


def read_jsonl(stream: BinaryIO, params: PrepareParams) -> Iterator[str]:
    """Yield the text column of each line, which is a JSON object."""
    for number, line in enumerate(_lines(stream, params.encoding), start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield text_of(row, params.text_column, f"line {number}")


def read_csv(stream: BinaryIO, params: PrepareParams, delimiter: str = ",") -> Iterator[str]:
    """Yield the text column of each row; the first row names the columns."""
    csv.field_size_limit(LARGEST)
    size = 0

    def limited() -> Iterator[str]:
        nonlocal size
        for line in _lines(stream, params.encoding):
            size += len(line)
            if size > LARGEST:
                raise ValueError(f"a row is longer than {LARGEST:,} characters; it ends after line {rows.line_num}")
            yield line

    rows = csv.reader(limited(), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            size = 0
            if len(row) > len(header):
                raise csv.Error(f"{len(row)} fields, not {len(header)}; a text with {delimiter!r} needs quotes")
            if row:
                yield text_of(dict(zip(header, row, strict=False)), params.text_column, f"line {rows.line_num}")
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None


def read_parquet(stream: BinaryIO, params: PrepareParams) -> Iterator[str]:
    """Yield the text column of each row."""
    from pyarrow.parquet import ParquetFile

    with tempfile.TemporaryFile() as unpacked:
        if not isinstance(stream, io.BufferedReader):  # it is compressed as a whole; a table's end is read first
            shutil.copyfileobj(stream, unpacked, CHUNK)
            stream = unpacked
        file = ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK)
        _check_table(file, params.text_column)
        for batch in file.iter_batches(PARQUET_ROWS, columns=[params.text_column], use_threads=False):
            for value in batch.column(0):
                yield text_of({params.text_column: value.as_py()}, params.text_column, "a row")


def _check_table(file: Any, column: str) -> None:
    """Raise ValueError if a Parquet file has no such column of text, or one whose rows are far too large to unpack."""
    if column not in file.schema_arrow.names:
        text_of(dict.fromkeys(file.schema_arrow.names), column, "it")
    kind = file.schema_arrow.field(column).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(plain) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(f"the column {column!r} is {kind}, not text")
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size = chunk.total_uncompressed_size if chunk.path_in_schema == column else 0
            if size > 4 * LARGEST * group.num_rows:  # a character has up to four bytes
                raise ValueError(
                    f"{size:,} bytes in {group.num_rows} rows: texts are longer than {LARGEST:,} characters"
                )


def open_xz(path: Path) -> lzma.LZMAFile:
    """Open a file that claims no more than XZ_MEMORY."""
    with path.open("rb") as file:
        lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress(file.read(CHUNK), max_length=1)
    return lzma.open(path)


Reader = Callable[[BinaryIO, PrepareParams], Iterator[str]]
READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": open_xz,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
}


def reader_of(path: Path) -> Reader | None:
    """Return the reader for a file's suffix, without that of a compressed file."""
    return READERS.get(format_of(path))


def format_of(path: Path) -> str:
    """Return the suffix of a file in small letters, without that of a compressed file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in DECOMPRESSORS else suffix


def read_file(path: Path, params: PrepareParams) -> Iterator[str]:
    """Yield the texts of a file, "" for a row without one; a file of no known format is plain text.

    Raises UserError if it cannot be read, names the place where it can, or if it does not hold what its suffix says.
    """
    opener = DECOMPRESSORS.get(path.suffix.lower(), partial(open, mode="rb"))
    try:
        with opener(path) as stream:
            yield from (reader_of(path) or read_text)(stream, params)
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def unreadable(name: object, error: Exception) -> UserError:
    """Return a UserError of one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} cannot be read: {reason:.300}")


def text_of(row: dict[Any, Any], column: str, where: str) -> str:
    """Return the text of a row, "" for null. Raises ValueError if it has none."""
    if column not in row:
        names = ", ".join(map(str, row))
        raise ValueError(f"{where} has no column {column!r} (prepare.text_column), but {names:.200}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the column {column!r} of {where} holds a {type(text).__name__}, not text")
    if text and len(text) > LARGEST:
        raise ValueError(f"the text of {where} is longer than {LARGEST:,} characters")
    return text or ""


def _decode(stream: BinaryIO, encoding: str) -> Iterator[str]:
    """Yield the stream's text in pieces, without a byte-order mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done, is_start, data = 0, True, b"_"
    while data:
        data = stream.read(CHUNK)
        held = len(decoder.getstate()[0])  # bytes of a character that the next ones complete
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = done - held + error.start
            raise ValueError(f"it is not {encoding} (prepare.encoding): {error.reason} at byte {place}") from None
        done += len(data)
        yield text.removeprefix("\ufeff") if is_start else text
        is_start &= not text


def _lines(stream: BinaryIO, encoding: str) -> Iterable[str]:
    number, held = 1, ""
    for piece in _decode(stream, encoding):
        *lines, held = (held + piece).split("\n")
        number += len(lines)
        yield from (f"{line}\n" for line in lines)
        if len(held) > LARGEST:
            raise ValueError(f"line {number} is longer than {LARGEST:,} characters")
    if held:
        yield held
