"""The rows of text files and data sets, one at a time, in bounded memory, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from recipes.data.hub import one_line, open_data_set
from recipes.data.text_sources import COMPRESSED, Source

READ_BYTES = 1 << 20
OnRead = Callable[[int], object]
"""is called with the number of bytes read since the last call"""


def no_progress(count: int) -> None:
    """An OnRead that does nothing."""


HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


def rows(source: Source, column: str | None, on_read: OnRead, empty_rows: Counter[str]) -> Iterator[str]:
    """The texts in `column` of a source's rows; for None each row whole, as JSON.

    Rows without text are counted, by source, in `empty_rows`. ValueError, in one line that names the place, for what is not
    text, and for a source without any text.
    """
    return checked_texts(_rows(source, column, on_read), source.name, column, empty_rows)


def _rows(source: Source, column: str | None, on_read: OnRead) -> Iterator[Row]:
    if source.split:
        return _data_set_rows(source, column)
    read_rows = _json_rows if source.kind == "json" else _parquet_rows
    return read_rows(Path(source.name), column, on_read)


def place_of(row: str, sources: Iterable[Source]) -> str:
    """File and line of the first row with this JSON, for an error message. The sources are read again to find it."""
    for source in sources:
        if source.is_plain:
            return source.name
        for place, text, _ in _rows(source, None, no_progress):
            if text == row:
                return place
    return "a row"  # embedded rows have no source


Row = tuple[str, Any, Collection[str]]
"""(place, value of the column or None, names of the columns)"""


def checked_texts(values: Iterable[Row], name: str, column: str | None, empty_rows: Counter[str]) -> Iterator[str]:
    """The texts of rows of `name`, of which those without text are counted in `empty_rows`. ValueError as of `rows`."""
    found, names = False, ""  # whether there is text, or at least its column; the columns where it is missing
    for place, text, columns in values:
        if isinstance(text, str):
            if HALF_PAIR.search(text):
                raise ValueError(f"{place} holds half a surrogate pair, which is no character; repair the file")
            found = True
            yield text
        elif text is None:
            empty_rows[name] += 1
            found = found or column in columns
            names = names or ", ".join(columns)
        else:
            raise ValueError(f"{place}: column {column!r} holds {str(text)[:40]!r}, not text; give another with --column")
    if names and not found:
        raise ValueError(f"{name} has no text in {column!r} (it has {names}); give its name with --column")


def text_blocks(path: Path, on_read: OnRead) -> Iterator[str]:
    """The text of a file, decoded, a megabyte at a time. ValueError names the first byte that is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for block in chain(_blocks(path, on_read), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            bad = f"byte 0x{error.object[error.start]:02x} at offset {done - waiting + error.start}"
            raise ValueError(f"{path} is not UTF-8 ({bad}); convert it, for example with iconv") from None
        done += len(block)


def lines(path: Path, on_read: OnRead) -> Iterator[str]:
    """The lines of a text file, without their ends. Not splitlines(), which cuts at characters inside a line of WikiText."""
    rest: list[str] = []
    for block in text_blocks(path, on_read):
        first, *others = block.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    if last := "".join(rest):
        yield last


def _open(path: Path, raw: IO[bytes]) -> Any:
    """A file object of the uncompressed content."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(raw)
    if ending == ".bz2":
        return bz2.open(raw)
    if ending == ".xz":
        return lzma.open(raw)
    if ending == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw


def _blocks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """The bytes of a file, uncompressed, a megabyte at a time."""
    with path.open("rb") as raw:
        done = 0
        try:
            with _open(path, raw) as file:
                while block := file.read(READ_BYTES):
                    on_read(raw.tell() - done)
                    done = raw.tell()
                    yield block
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged or cut off ({one_line(error)}); restore it") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or one_line(error)}); check what it is") from None


def cell(row: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column in a row; for None the whole row, as JSON."""
    return json.dumps(row, ensure_ascii=False, default=str) if column is None else row.get(column)


def _json_rows(path: Path, column: str | None, on_read: OnRead) -> Iterator[Row]:
    # JSON escapes line ends, and a line of bytes is decoded as a whole.
    rest = b""
    number = 0
    for block in chain(_blocks(path, on_read), [b"\n"]):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON ({one_line(error)}); give one object a line") from None
            if column is None and not isinstance(row, dict):
                raise ValueError(f"{place} is no JSON object: {str(row)[:80]}; mend it")
            yield (place, cell(row, column), row) if isinstance(row, dict) else (place, row, ())


def _parquet_rows(path: Path, column: str | None, on_read: OnRead) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    compressed = path.suffix.lower() in COMPRESSED
    try:
        # Its index is at its end, so a compressed one has to be unpacked as a whole.
        file = ParquetFile(io.BytesIO(b"".join(_blocks(path, lambda count: None))) if compressed else path)
        names, count = file.schema_arrow.names, max(1, file.metadata.num_rows)
        if column is not None and column not in names:
            yield str(path), None, names
            return
        done = 0
        for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
            on_read(path.stat().st_size * len(batch) // count)
            for row in batch.to_pylist():
                done += 1
                yield f"{path}, row {done}", cell(row, column), names
    except ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file ({one_line(error)})") from None


def _data_set_rows(source: Source, column: str | None) -> Iterator[Row]:
    import datasets

    try:
        if Path(source.name).is_dir():
            saved = datasets.load_from_disk(source.name)
            data = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            data = open_data_set(source.name).splits[str(source.split)]
        for number, row in enumerate(data, start=1):
            yield f"{source.name}, {source.split}, row {number}", cell(row, column), row
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(f"{source.name} cannot be read ({one_line(error)}); give files, or another data set") from error
