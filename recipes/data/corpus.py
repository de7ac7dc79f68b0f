"""Text of any size as a stream of documents, a piece at a time: text files, JSONL, parquet, data sets of the hub."""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recipes.data.hub import hub_is_reachable, one_line
from recipes.data.tokenizer import END_OF_TEXT

PIECE = 16_384  # characters: what a longer document is cut into, so that no document has to fit into memory
SMALLEST_PIECE, HELD_OUT_PIECES = 1024, 32
READ_BYTES = 1 << 20
Read = Callable[[int], object]
"""called with the number of bytes read since the last call"""
HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot
NOT_TEXT = (".json", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".ids", ".bin", ".npy", ".arrow", ".pdf")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Unit(NamedTuple):
    """A document, or a piece of a long one."""

    text: str
    starts: bool
    """it is the first of its document"""
    ends: bool
    """it is the last of its document"""


class Part(NamedTuple):
    """A unit of the training or the validation stream."""

    text: str
    held_out: bool
    """it goes to validation"""
    end: bool
    """END_OF_TEXT follows it"""
    gap: bool
    """the training document before it ends here, as this piece of it was held out"""


@dataclass(frozen=True)
class Source:
    """A file, or a split of a data set of the hub (`owner/name` or `owner/name:configuration`)."""

    name: str
    split: str | None = None

    @property
    def size_bytes(self) -> int | None:
        """Size of the file; None at the hub."""
        return None if self.split else Path(self.name).stat().st_size


def find_sources(inputs: Iterable[str], hub_split: str = "train") -> list[Source]:
    """The files that paths and glob patterns match, in their order, or data sets of the hub.

    ValueError or FileNotFoundError, in one line, for what is not there.
    """
    sources: list[Source] = []
    for name in inputs:
        plain = str(Path(name).expanduser())
        paths = [plain] if Path(plain).is_file() else sorted(glob.glob(plain, recursive=True))
        files = [path for path in paths if Path(path).is_file()]
        if not paths and HUB_NAME.fullmatch(name) and not re.search(r"\.(txt|jsonl|ndjson|parquet)$", name):
            sources.append(Source(name, hub_split))
        elif not paths:
            raise FileNotFoundError(f"{name} does not exist; give a file, a pattern in quotes, or OWNER/NAME of the hub")
        elif not files:
            raise ValueError(f"{name} is a folder; give its files, such as '{name}/*.txt'")
        else:
            sources += [Source(path) for path in files]
    for source in sources:
        if source.name.lower().endswith(NOT_TEXT):
            raise ValueError(f"{source.name} is no text file; unpack it, or make it text, JSONL (a .jsonl) or parquet")
        if sources.count(source) > 1:
            raise ValueError(f"{source.name} is given twice; give each file once")
    return sources


def units(
    sources: Iterable[Source], column: str = "text", read: Read = lambda count: None, piece: int | None = None
) -> Iterator[Unit]:
    """The documents of all sources, in order.

    Text is kept as it is, but for a byte order mark and documents of white space alone. In a text file END_OF_TEXT
    separates documents, and a file without it is one. JSONL and parquet have one in `column` of every row. Raises
    ValueError or OSError, in one line that names the file.
    """
    piece = piece or PIECE
    for source in sources:
        if source.split:
            yield from _whole(_hub_rows(source, column), piece)
        elif source.name.endswith((".jsonl", ".ndjson")):
            yield from _whole(_json_rows(Path(source.name), column, read), piece)
        elif source.name.endswith(".parquet"):
            yield from _whole(_parquet_rows(Path(source.name), column, read), piece)
        else:
            yield from _text_file(Path(source.name), read, piece)


def piece_size(total_characters: int | None, share: float) -> int:
    """Characters of the pieces that long documents are cut into: PIECE, less where the text is so short that `share` of it
    would be a few pieces from a few places."""
    if total_characters is None or not share:
        return PIECE
    return int(min(PIECE, max(SMALLEST_PIECE, share * total_characters / HELD_OUT_PIECES)))


def hold_out(stream: Iterable[Unit], share: float) -> Iterator[Part]:
    """The units with about `share` of the text, spread evenly over it, held out; the first unit never is.

    A held-out piece becomes a document of its own, and training continues after it with a new one.
    """
    total = held = 0
    held_before = False
    for unit in stream:
        held_out = total > 0 and held < share * total
        total += len(unit.text)
        held += len(unit.text) if held_out else 0
        yield Part(unit.text, held_out, held_out or unit.ends, held_out and not (unit.starts or held_before))
        held_before = held_out


def _whole(documents: Iterable[str], piece: int) -> Iterator[Unit]:
    for document in documents:
        yield from _pieces(document, True, piece)


def _pieces(text: str, starts: bool, piece: int) -> Iterator[Unit]:
    """The rest of a document, in pieces."""
    text, starts = yield from _full_pieces(text, starts, piece)
    if text and not (starts and text.isspace()):
        yield Unit(text, starts, True)


def _full_pieces(text: str, starts: bool, piece: int) -> Generator[Unit, None, tuple[str, bool]]:
    """Pieces of a text that may go on; returns what is left, one to two pieces of a long one, and `starts` for it."""
    begin = 0
    while len(text) - begin > 2 * piece:
        end = _border(text, begin, piece)
        yield Unit(text[begin:end], starts, False)
        begin, starts = end, False
    return text[begin:], starts


def _border(text: str, begin: int, piece: int) -> int:
    """Where to end the piece that starts at `begin`: before the white space after a line or a word.

    GPT-2's pre-tokenizer cuts there too, so the ids are those of the whole text.
    """
    for blank in ("\n", " "):
        at = text.rfind(blank, begin + piece // 2, begin + piece)
        while at > begin and text[at - 1].isspace():
            at -= 1
        if at > begin:
            return at
    return begin + piece


def _text_file(path: Path, read: Read, piece: int) -> Iterator[Unit]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, starts, done = "", True, 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            text += _decoded(decoder, block, path, done)
            done += len(block)
            read(len(block))
            *documents, text = text.split(END_OF_TEXT)
            for document in documents:
                yield from _pieces(document, starts, piece)
                starts = True
            # The rest of the last document, which may continue, includes any incomplete separator.
            text, starts = yield from _full_pieces(text, starts, piece)
    _decoded(decoder, b"", path, done)
    yield from _pieces(text, starts, piece)


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at offset {offset - waiting + error.start}"
        raise ValueError(f"{path} is not UTF-8 ({bad}); convert it, for example with iconv") from None


def _json_rows(path: Path, column: str, read: Read) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            read(len(line))
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({one_line(error)}); give one object a line") from None
            text = row.get(column) if isinstance(row, dict) else row
            if not isinstance(text, str):
                keys = ", ".join(row) if isinstance(row, dict) else "no columns"
                raise ValueError(
                    f"{path}, line {number} has no text in {column!r} (it has {keys}); give its name with --column"
                )
            if HALF_PAIR.search(text):
                raise ValueError(f"{path}, line {number} holds half a surrogate pair, which is no character; repair the file")
            yield text


def _parquet_rows(path: Path, column: str, read: Read) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        if column not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path} has no column {column!r} (it has {columns}); give its name with --column")
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            read(path.stat().st_size * len(batch) // rows)
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise ValueError(f"{path}: column {column!r} holds {text!r}, not text; give another with --column")
                if text:
                    yield text
    except ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file ({one_line(error)})") from None


def _hub_rows(source: Source, column: str) -> Iterator[str]:
    import datasets

    name, _, configuration = source.name.partition(":")
    row, text = {}, ""
    try:
        if not hub_is_reachable():
            raise ConnectionError("it does not answer")
        for row in datasets.load_dataset(name, configuration or None, split=source.split, streaming=True):
            text = row.get(column)
            if not isinstance(text, str):
                break
            yield text
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(
            f"{source.name} is no file here, and cannot be read from the hub ({one_line(error)}); give a file, or a data set"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"{source.name} has no text in {column!r}, but {', '.join(row)}; give its name with --column")
