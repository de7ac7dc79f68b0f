"""Token ids in one file, never loaded as a whole: how they are stored, facts about them, and windows of them."""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.cache import remembered

CHUNK_IDS = 1 << 22  # ids read and hashed at a time; digests depend on it
HEAD_BYTES = 4096
MAKE = "make it again with tools/prepare_text.py of samecurve's source repository"


@dataclass(frozen=True)
class Facts:
    """What reading all ids of a file tells."""

    digest: str
    """hex; the same however the ids are stored: the SHA-256 of those of its chunks, each as uint16 if its ids fit, or uint32"""
    smallest_id: int
    largest_id: int
    every_second_is_0: bool
    """a sign that the ids are stored in a wider type than they are read as"""


@dataclass(frozen=True)
class TokenFile:
    """Ids in a file: uint16 without a header (`.ids`, nanoGPT's `.bin`; uint32 above 65,536 entries) or a 1-D `.npy`.

    Beside a headerless file there may be NAME.json with its `dtype` and `count`, and the facts that prepare_text found when it
    wrote it. Pickled by path: workers open it anew.
    """

    path: Path
    dtype: str
    count: int
    offset: int = 0
    """bytes before the first id"""

    @classmethod
    def open(cls, path: Path, vocab_size: int) -> TokenFile:
        """Detect how the ids of `path` are stored. One-line ValueError or FileNotFoundError if it holds none."""
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}; give a .ids, .bin or .npy file of token ids, or `embedded`")
        if path.suffix == ".npy":
            return cls._open_npy(path)
        return cls(path, *stored(str(path), path.stat().st_size, vocab_size, read_sidecar(path), lambda: head_of(path)))

    @classmethod
    def _open_npy(cls, path: Path) -> TokenFile:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not a .npy array ({' '.join(str(error).split())}); save it with np.save") from None
        if not isinstance(array, np.memmap):
            raise ValueError(f"{path} is an archive of arrays (.npz), not one; save the ids with np.save")
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise ValueError(f"{path} is {array.dtype} {list(array.shape)}; it must be one row of integers")
        if not array.dtype.isnative:
            native = array.dtype.newbyteorder("=")
            raise ValueError(f"{path} is {array.dtype}, in another byte order; save ids.astype('{native}') with np.save")
        return cls(path, array.dtype.name, len(array), array.offset)

    def windows(self, length: int, starts: np.ndarray) -> np.ndarray:
        """ids[start : start + length] for each start: int32 [len(starts), length].

        Read by position, not through a memory map: mapped pages stay resident, until the whole file is in this process's
        memory, and releasing them costs a page fault a window, several times what reading one takes.
        """
        width, handle = np.dtype(self.dtype).itemsize, _opened(self.path).fileno()
        offsets = (self.offset + starts * width).tolist()
        content = b"".join(map(os.pread, repeat(handle), repeat(length * width), offsets))
        if len(content) != len(starts) * length * width:
            raise ValueError(f"{self.path} has become shorter than its {self.count} ids; restore it")
        return np.frombuffer(content, self.dtype).reshape(len(starts), length).astype(np.int32)

    def ids(self) -> np.ndarray:
        """All ids [count], read-only; mapped, not read."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    @functools.cached_property
    def sidecar(self) -> dict[str, Any]:
        """The .json beside it; empty if there is none."""
        return read_sidecar(self.path)

    @functools.cached_property
    def facts(self) -> Facts:
        """From the .json beside the ids; or by reading all of them, with every core, once: the cache remembers them."""
        sidecar = self.sidecar
        if self.path.suffix != ".npy" and "digest" in sidecar:
            return Facts(sidecar["digest"], 0, sidecar["largest_id"], False)
        return Facts(**remembered(self.path, f"ids {self.dtype} {self.offset}", lambda: vars(self._read_facts())))

    def check(self, vocab_size: int) -> str:
        """The digest of the ids. ValueError for ids of a wider type, or not below `vocab_size`: it names the first of them."""
        facts = self.facts
        if facts.largest_id >= vocab_size or facts.smallest_id < 0:
            found = next(self._outside(vocab_size), None)
            if found is None:
                raise ValueError(f"{self.name}.json says largest_id {facts.largest_id}, which is not there; make it again")
            position, token = found
            raise out_of_range(self.name, token, position, vocab_size)
        if facts.every_second_is_0 and self.path.suffix != ".npy" and self.count >= 64:
            raise ValueError(
                f"{self.path}: every second id is 0, so its ids are wider than {self.dtype}; convert it: "
                f"np.fromfile('{self.path}', '{'uint32' if self.dtype == 'uint16' else 'uint64'}').astype('{self.dtype}')"
                ".tofile('NEW.ids')"
            )
        return facts.digest

    def _read_facts(self) -> Facts:
        def of_chunk(start: int) -> tuple[bytes, int, int, bool]:
            ids = self._chunk(start)
            narrow = ids.astype(np.uint16 if ids.max() < 2**16 and ids.min() >= 0 else np.uint32, copy=False)
            return hashlib.sha256(narrow.data).digest(), int(ids.min()), int(ids.max()), not ids[(1 - start) % 2 :: 2].any()

        # Reading, hashing and numpy's sums release the GIL. More threads would only need more memory: the disk is the limit.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(16, cores)) as readers:
            digests, smallest, largest, zeros = zip(*readers.map(of_chunk, range(0, self.count, CHUNK_IDS)), strict=True)
        return Facts(hashlib.sha256(b"".join(digests)).hexdigest(), min(smallest), max(largest), all(zeros))

    def _chunk(self, start: int) -> np.ndarray:
        width, count = np.dtype(self.dtype).itemsize, min(CHUNK_IDS, self.count - start)
        return np.fromfile(self.path, self.dtype, count, offset=self.offset + start * width)

    def _outside(self, vocab_size: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self.count, CHUNK_IDS):
            ids = self._chunk(start)
            for place in np.flatnonzero((ids >= vocab_size) | (ids < 0))[:1]:
                yield start + int(place), int(ids[place])


@functools.lru_cache(maxsize=256)  # open files: a set may have many shards
def _opened(path: Path) -> io.FileIO:
    return io.FileIO(path)


class ChunkDigest:
    """`Facts.digest` and the largest of ids that are written piece by piece."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.waiting, self.digests, self.largest = np.dtype(dtype), bytearray(), hashlib.sha256(), 0

    def update(self, ids: bytes) -> None:
        """Add ids, as bytes of the dtype."""
        self.waiting += ids
        size = CHUNK_IDS * self.dtype.itemsize
        while len(self.waiting) >= size:
            self._chunk(bytes(self.waiting[:size]))
            del self.waiting[:size]

    def _chunk(self, content: bytes) -> None:
        ids = np.frombuffer(content, self.dtype)
        self.largest = max(self.largest, int(ids.max()))
        narrow = ids.astype(np.uint16 if ids.max() < 2**16 else np.uint32, copy=False)
        self.digests.update(hashlib.sha256(narrow.data).digest())

    def facts(self) -> dict[str, Any]:
        """Entries of the .json beside the file. Call it once, after the last `update`."""
        if self.waiting:
            self._chunk(bytes(self.waiting))
            self.waiting.clear()
        return {"digest": self.digests.hexdigest(), "largest_id": self.largest}


def out_of_range(name: str, token: int, position: int, vocab_size: int) -> ValueError:
    """The error for an id that the embedding has no row for."""
    return ValueError(
        f"{name}: token id {token} at position {position} is not below vocab_size {vocab_size}; "
        "give the --vocab_size of the tokenizer that made it"
    )


def ids_among(names: Iterable[str]) -> list[str]:
    """The names, sorted, without the .json that stand beside a file of ids."""
    found = set(names)
    return sorted(name for name in found if name.removesuffix(".json") not in found - {name})


def default_dtype(vocab_size: int) -> str:
    """The type of the ids in a headerless file without a .json."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def stored(name: str, size: int, vocab_size: int, sidecar: dict[str, Any], head: Callable[[], bytes]) -> tuple[str, int]:
    """(type, number) of the ids in a headerless file of `size` bytes that begins with `head`. ValueError if it holds none."""
    if not size:
        raise ValueError(f"{name} is empty; {MAKE}")
    default = default_dtype(vocab_size)
    if not sidecar:
        _check_head(name, head(), default)
    dtype = str(sidecar.get("dtype", default))
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"{name}.json: dtype {dtype!r} is unknown; it is uint16 or uint32")
    count, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        raise ValueError(f"{name} has {size} bytes, no whole number of {dtype} ids; it is cut off or of another kind")
    if sidecar.get("count", count) != count:
        raise ValueError(f"{name} holds {count} ids, its .json says {sidecar['count']}; make it again")
    return dtype, count


def read_sidecar(path: Path) -> dict[str, Any]:
    """NAME.json beside a file of ids; empty if there is none."""
    try:
        return parsed_sidecar(str(path), path.with_name(f"{path.name}.json").read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}.json cannot be read ({error}); make it again, or remove it") from None


def parsed_sidecar(name: str, content: bytes) -> dict[str, Any]:
    """NAME.json, from its content. ValueError, in one line, if that is not what prepare_text writes."""
    try:
        sidecar = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name}.json cannot be read ({error}); make it again, or remove it") from None
    if not isinstance(sidecar, dict):
        raise ValueError(f"{name}.json holds no JSON object; make it again, or remove it")
    known = {"dtype": str, "count": int, "digest": str, "largest_id": int}
    wrong = [key for key, kind in known.items() if key in sidecar and type(sidecar[key]) is not kind]
    wrong += ["largest_id"] if "digest" in sidecar and "largest_id" not in sidecar else []
    if wrong:
        raise ValueError(f"{name}.json has {wrong[0]} {sidecar.get(wrong[0])!r}; make it again, or remove it")
    return sidecar


def head_of(path: Path) -> bytes:
    """The first HEAD_BYTES of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def holds_numbers(head: bytes) -> bool:
    """Whether a file that begins so holds numbers written as text."""
    return bool(re.fullmatch(rb"[\s\[]*\d[\s,\d.eE+\[\]]*", head))


def _check_head(name: str, head: bytes, dtype: str) -> None:
    """ValueError if a file without a .json begins like an array, numbers written as text, or text."""
    path = Path(name)
    if head.startswith(b"\x93NUMPY"):
        if path.suffix == ".npy":
            raise ValueError(
                f"{name} is a .npy array, and read where it is local alone; copy it, or make .ids of it with tofile"
            )
        raise ValueError(f"{name} is a .npy file under another name; rename it to {path.with_suffix('.npy').name}")
    if holds_numbers(head):
        read = "np.fromfile(f, sep=' ')"
        if re.search(rb"[\[,]", head):
            read = "np.fromstring(open(f).read().translate(str.maketrans('[],', '   ')), sep=' ')"
        new = str(path.with_suffix(".bin"))
        code = f"import numpy as np; f = {str(path)!r}; {read}.astype('{dtype}').tofile({new!r})"
        raise ValueError(f"{name} holds numbers written as text; convert it: python -c {shlex.quote(code)}")
    if _is_text(head):
        command = f"python tools/prepare_text.py {shlex.quote(name)} --out data"
        raise ValueError(f"{name} is text, not ids; make them of it: {command} (in samecurve's source repository)")


def _is_text(head: bytes) -> bool:
    """Whether a file that begins so holds text: UTF-8 (the last character may be cut off) without control characters.

    16-bit ids do not look so: those below 256 have a zero in every second byte, and larger ones are soon no valid UTF-8.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= 64 and all(character.isprintable() or character in "\t\n\r\f" for character in text)
