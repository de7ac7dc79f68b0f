"""Text of any size as a stream of documents, a piece at a time; a part of it can be held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.data.text_files import OnRead, no_progress, rows, text_blocks
from recipes.data.text_sources import Source
from recipes.data.tokenizer import END_OF_TEXT

PIECE = 16_384  # characters: longer documents are cut into such pieces, so that no document has to fit into memory
SMALLEST_PIECE, HELD_OUT_PIECES = 1024, 32


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
    """the training document ends before it, as this piece was held out"""


def units(
    sources: Iterable[Source],
    column: str = "text",
    on_read: OnRead = no_progress,
    piece: int | None = None,
    empty_rows: Counter[str] | None = None,
) -> Iterator[Unit]:
    """The documents of all sources, in order.

    Text is kept as it is, but for a byte order mark and documents of white space alone. In a text file END_OF_TEXT
    separates documents, and a file without it is one. The others have one in `column` of every row; rows without text are
    counted, by source, in `empty_rows`. Raises ValueError or OSError, in one line that names the file.
    """
    piece = piece or PIECE
    empty_rows = Counter() if empty_rows is None else empty_rows
    for source in sources:
        if source.is_plain:
            yield from _text_file(Path(source.name), on_read, piece)
        else:
            for document in rows(source, column, on_read, empty_rows):
                yield from pieces(document, True, piece)


def piece_size(total_characters: int | None, share: float) -> int:
    """Characters of the pieces that long documents are cut into: PIECE, or less for a short text, so that the held-out `share`
    is about HELD_OUT_PIECES from all over it."""
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


def pieces(text: str, starts: bool, piece: int) -> Iterator[Unit]:
    """A document, or (`starts` False) the rest of one, in pieces of about `piece` characters."""
    text, starts = yield from _full_pieces(text, starts, piece)
    if text and not (starts and text.isspace()):
        yield Unit(text, starts, True)


def _full_pieces(text: str, starts: bool, piece: int) -> Generator[Unit, None, tuple[str, bool]]:
    """Pieces of a text that may go on. Returns what is left, at most two pieces long, and whether it starts its document."""
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


def _text_file(path: Path, on_read: OnRead, piece: int) -> Iterator[Unit]:
    text, starts = "", True
    for block in text_blocks(path, on_read):
        text += block
        *documents, text = text.split(END_OF_TEXT)
        for document in documents:
            yield from pieces(document, starts, piece)
            starts = True
        # The rest of the last document, which may continue, includes any incomplete separator.
        text, starts = yield from _full_pieces(text, starts, piece)
    yield from pieces(text, starts, piece)
