"""Token ids in a file, never loaded as a whole, and windows of them to train a language model on and to measure it with."""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.text import file_of, prepare_text
from recipes.data.tokenizer import existing_tokenizer, vocabulary_size

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a label that is not trained on: the default ignore_index of torch's cross entropy
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """Ids in a file: uint16 without a header (`.ids`, nanoGPT's `.bin`; uint32 above 65,536 entries) or a 1-D `.npy`.

    Beside a headerless file there may be NAME.json with its `dtype` and `count`. Pickled by path: workers open it anew.
    """

    path: Path
    dtype: str
    offset: int
    """bytes before the first id"""
    count: int

    @classmethod
    def open(cls, path: Path, vocab_size: int) -> TokenFile:
        """Detect how the ids of `path` are stored. One-line ValueError or FileNotFoundError if it holds none."""
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}; give a .ids, .bin or .npy file of token ids, or `embedded`")
        size = path.stat().st_size
        if not size:
            raise ValueError(f"{path} is empty; make it again with tools/prepare_text.py of samecurve's source repository")
        if path.suffix == ".npy":
            return cls._open_npy(path)
        default = "uint16" if vocab_size <= 2**16 else "uint32"
        with path.open("rb") as file:
            head = file.read(4096)
        if head.startswith(b"\x93NUMPY"):
            raise ValueError(f"{path} is a .npy file under another name; rename it to {path.with_suffix('.npy').name}")
        if re.fullmatch(rb"[\s\[]*\d[\s,\d.eE+\[\]]*", head):
            read = "np.fromfile(f, sep=' ')"
            if re.search(rb"[\[,]", head):
                read = "np.fromstring(open(f).read().translate(str.maketrans('[],', '   ')), sep=' ')"
            new = str(path.with_suffix(".bin"))
            code = f"import numpy as np; f = {str(path)!r}; {read}.astype('{default}').tofile({new!r})"
            raise ValueError(f"{path} holds numbers written as text; convert it: python -c {shlex.quote(code)}")
        if not path.with_name(f"{path.name}.json").exists() and _is_text(head):
            command = f"python tools/prepare_text.py {shlex.quote(str(path))} --out data"
            raise ValueError(f"{path} is text, not ids; make them of it: {command} (in samecurve's source repository)")
        sidecar = _read_sidecar(path)
        dtype = str(sidecar.get("dtype", default))
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"{path}.json: dtype {dtype!r} is unknown; it is uint16 or uint32")
        width = np.dtype(dtype).itemsize
        if size % width:
            raise ValueError(f"{path} has {size} bytes, no whole number of {dtype} ids; it is cut off or of another kind")
        if sidecar.get("count", size // width) != size // width:
            raise ValueError(f"{path} holds {size // width} ids, its .json says {sidecar['count']}; make it again")
        return cls(path, dtype, 0, size // width)

    @classmethod
    def of_array(cls, ids: np.ndarray) -> TokenFile:
        """The file of a memory-mapped array of ids."""
        return cls(file_of(ids), ids.dtype.name, 0, len(ids))

    @classmethod
    def _open_npy(cls, path: Path) -> TokenFile:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not a .npy array ({' '.join(str(error).split())}); save it with np.save") from None
        if not isinstance(array, np.memmap):
            raise ValueError(f"{path} is an archive of arrays (.npz), not one; save the ids with np.save")
        if array.ndim != 1 or array.dtype.kind not in "ui" or not array.dtype.isnative:
            raise ValueError(f"{path} is {array.dtype} {list(array.shape)}; it must be one row of integers")
        return cls(path, array.dtype.name, array.offset, len(array))

    def windows(self, length: int, starts: np.ndarray) -> np.ndarray:
        """ids[start : start + length] for each start: int32 [len(starts), length].

        Read by position, not through a memory map: mapped pages stay resident, until the whole file is in this process's
        memory, and releasing them costs a page fault a window, several times what reading one takes.
        """
        width, handle = np.dtype(self.dtype).itemsize, self._file.fileno()
        offsets = (self.offset + starts * width).tolist()
        content = b"".join(map(os.pread, repeat(handle), repeat(length * width), offsets))
        if len(content) != len(starts) * length * width:
            raise ValueError(f"{self.path} has become shorter than its {self.count} ids; restore it")
        return np.frombuffer(content, self.dtype).reshape(len(starts), length).astype(np.int32)

    @functools.cached_property
    def _file(self) -> io.FileIO:
        return io.FileIO(self.path)

    def ids(self) -> np.ndarray:
        """All ids [count], read-only; mapped, not read."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_file"}

    def check(self, vocab_size: int, longer_than: int) -> str:
        """Check every id, a chunk at a time, and return the SHA-256 of the ids.

        ValueError naming the first id that is not below `vocab_size`, or if there are not more than `longer_than` ids.
        """
        if self.count <= longer_than:
            raise ValueError(
                f"{self.path} holds {self.count} ids, too few for windows of {longer_than - 1} inputs: it takes more than "
                f"{longer_than}; give more text or a smaller --context_length"
            )
        digest, wide = hashlib.sha256(), self.path.suffix != ".npy" and self.count >= 64
        step = CHUNK_BYTES // np.dtype(self.dtype).itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.count, step):
                ids = np.fromfile(file, self.dtype, min(step, self.count - start))
                if ids.max() >= vocab_size or ids.min() < 0:
                    place = int(np.argmax((ids >= vocab_size) | (ids < 0)))
                    raise ValueError(
                        f"{self.path}: token id {ids[place]} at position {start + place} is not below vocab_size {vocab_size}; "
                        "give the --vocab_size of the tokenizer that made it"
                    )
                wide = wide and not ids[(1 - start) % 2 :: 2].any()
                digest.update(ids.astype("uint16" if vocab_size <= 2**16 else "uint32", copy=False).data)
        if wide:
            raise ValueError(
                f"{self.path}: every second id is 0, so its ids are wider than {self.dtype}; convert it: "
                f"np.fromfile('{self.path}', '{'uint32' if self.dtype == 'uint16' else 'uint64'}').astype('{self.dtype}')"
                ".tofile('NEW.ids')"
            )
        return digest.hexdigest()


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file reads as text: UTF-8 (its last character perhaps cut off) without control characters.

    16-bit ids below 256 have a zero in every second byte; above, they are not UTF-8 for long.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= 64 and all(character.isprintable() or character in "\t\n\r\f" for character in text)


def _read_sidecar(path: Path) -> dict[str, Any]:
    """NAME.json beside a file of ids; empty if there is none."""
    try:
        sidecar = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}.json cannot be read ({error}); make it again, or remove it") from None
    if not isinstance(sidecar, dict):
        raise ValueError(f"{path}.json holds no JSON object; make it again, or remove it")
    return sidecar


@dataclass(frozen=True)
class Streams:
    """The files of ids that a language model is trained on and measured with, and their tokenizer."""

    train: TokenFile
    validation: TokenFile
    tokenizer_json: str | None
    fingerprint: str
    """hex; of the ids, however they are stored"""


def open_streams(train: str | None, validation: str | None, tokenizer: str | None, vocab_size: int, length: int) -> Streams:
    """Open and check both files of ids, for windows of `length` inputs. `embedded` prepares the text that comes with Python.

    `tokenizer`: a folder or tokenizer.json; None: the one beside `train`, if there is one. ValueError or OSError, in one line.
    """
    if not train or (not validation and train != "embedded"):
        name = "val_data_path" if train else "train_data_path"
        raise ValueError(
            f"{name} is missing: give --{name} FILE.ids (tools/prepare_text.py of samecurve's source repository makes one), "
            "or --train_data_path embedded"
        )
    validation = validation or train
    if (train == "embedded") != (validation == "embedded"):
        raise ValueError(
            f"train_data_path {train} and val_data_path {validation}: `embedded` has its own tokens; use it for both"
        )
    if train == "embedded":
        text = prepare_text("embedded", None, tokenizer or "train", vocab_size)
        tokenizer_json: str | None = text.tokenizer_json
        opened = [TokenFile.of_array(text.splits[split].ids) for split in ("train", "validation")]
    else:
        beside = Path(train).with_name("tokenizer.json")
        tokenizer = tokenizer or (str(beside) if beside.is_file() else None)
        encoder = existing_tokenizer(tokenizer) if tokenizer else None
        if encoder and (entries := vocabulary_size(encoder)) > vocab_size:
            ways_out = f"give --vocab_size {entries}, or the --tokenizer that made the ids"
            raise ValueError(f"tokenizer {tokenizer} has {entries} entries, vocab_size is {vocab_size}; {ways_out}")
        tokenizer_json = encoder.to_str() if encoder else None
        for path in (train, validation):
            _check_tokenizer(Path(path), tokenizer_json, tokenizer)
        opened = [TokenFile.open(Path(path), vocab_size) for path in (train, validation)]
    digests = [file.check(vocab_size, length + 1) for file in opened]
    return Streams(opened[0], opened[1], tokenizer_json, hashlib.sha256("".join(digests).encode()).hexdigest())


def _check_tokenizer(path: Path, tokenizer_json: str | None, name: str | None) -> None:
    """ValueError if the .json beside a file of ids names another tokenizer than this one."""
    expected = _read_sidecar(path).get("tokenizer_sha256")
    if expected and tokenizer_json and expected != hashlib.sha256(tokenizer_json.encode()).hexdigest():
        raise ValueError(
            f"tokenizer {name} is not the one that made {path}; give that one with --tokenizer, or make the ids again"
        )


class TokenWindows:
    """Windows of `length` inputs and the id after each, end to end: every id but the first is predicted once.

    The last one may be short. Windows are numbered so that the first n of them, for any n, lie evenly spread over the
    file: an evaluation of a part of them still covers the whole file. `limit` keeps only so many.
    """

    def __init__(self, file: TokenFile, length: int, limit: int | None = None) -> None:
        self.file, self.length = file, length
        self.windows = -(-(file.count - 1) // length)
        self.limit = min(limit or self.windows, self.windows)
        self.stride = _spreading_stride(self.windows)

    def __len__(self) -> int:
        return self.limit

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> {"tokens": int32 [batch, length + 1]}, IGNORED where the file has ended."""
        starts = np.asarray(numbers, dtype=np.int64) % self.limit * self.stride % self.windows * self.length
        last = self.file.count - self.length - 1
        tokens = self.file.windows(self.length + 1, np.minimum(starts, last))
        for row in np.flatnonzero(starts > last):
            real = self.file.count - int(starts[row])
            tokens[row, :real] = tokens[row, -real:].copy()
            tokens[row, real:] = IGNORED
        return _batch(tokens)


class RandomWindows:
    """An endless stream of windows: sample s starts at a hash of (seed, s), every start being equally likely.

    The hash is output s of SplitMix64 (Steele, Lea & Flood 2014, figure 17) started from the mixed seed.
    """

    def __init__(self, file: TokenFile, length: int, seed: int) -> None:
        self.file, self.length = file, length
        self.state = _mix(np.array([seed], dtype=np.uint64) * GOLDEN + GOLDEN)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> {"tokens": int32 [batch, length + 1]}: `length` inputs and the id after each."""
        return _batch(self.file.windows(self.length + 1, self.starts(numbers)))

    def starts(self, numbers: Sequence[int]) -> np.ndarray:
        """Position of the first id of each sample, int64 [batch], from 0 to count - length - 1."""
        hashes = _mix(self.state + np.asarray(numbers, dtype=np.uint64) * GOLDEN)
        # 64 random bits modulo at most 2^40 starts: no start is likelier than another by more than one in 2^24.
        return (hashes % np.uint64(self.file.count - self.length)).astype(np.int64)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _batch(tokens: np.ndarray) -> dict[str, torch.Tensor]:
    import torch

    return {"tokens": torch.from_numpy(tokens)}


def _spreading_stride(count: int) -> int:
    """A step that shares no factor with `count`, so that its multiples visit all, and whose ratio to it has the smallest
    largest partial quotient near the golden ratio, so that at any time they lie evenly (Niederreiter 1992, section 3.1)."""
    near = round(count * 0.6180339887498949)
    candidates = [step for step in range(max(1, near - 100), min(near + 101, count)) if math.gcd(step, count) == 1]
    return min(candidates, key=lambda step: (_largest_quotient(step, count), abs(step - near)), default=1)


def _largest_quotient(step: int, count: int) -> int:
    """Of the continued fraction of step / count."""
    largest = 0
    while step:
        largest = max(largest, count // step)
        step, count = count % step, step
    return largest
