"""Files of ids behind a URL of fsspec (s3, gs, hf): read by ranges, through a local cache of bounded size.

The bound is $SAMECURVE_REMOTE_GB gigabytes, 20 if it is not set.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.hub import one_line
from recipes.data.token_files import CHUNK_IDS, Facts, TokenFile

BLOCK_BYTES = 1 << 17  # asked for at a time, and kept in a file of its own
DEFAULT_CACHE_GB = 20.0


def is_url(path: str) -> bool:
    """Whether a path is for fsspec."""
    return "://" in path


@functools.lru_cache
def _file_system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be opened ({one_line(error)})") from None


def _asked(url: str, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of the file system of a URL gives. FileNotFoundError, or OSError that names the URL.

    Such an error passes: no other sample may take the place of one that could not be read now.
    """
    protocol = url.partition("://")[0]
    try:
        return getattr(_file_system(protocol), method)(*arguments, **options)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist; give another URL or path") from None
    except ValueError:
        raise
    except Exception as error:  # each library raises its own
        raise OSError(errno.ETIMEDOUT, f"{url} cannot be read ({one_line(error)})") from error


def remote_files(url: str, vocab_size: int) -> tuple[TokenFile, ...]:
    """The ids of a URL, of those that a pattern matches, or of the `.ids` below it, in the order of their names."""
    protocol = url.partition("://")[0]
    found = _asked(url, "glob" if "*" in url else "find", url)
    names = sorted(name for name in found if name.endswith(".ids") or "*" in url or len(found) == 1)
    if not names:
        raise FileNotFoundError(f"{url} has no .ids files; give the URL of one, of a folder of them, or a pattern")
    return tuple(RemoteTokenFile.open_url(f"{protocol}://{name.split('://')[-1]}", vocab_size) for name in names)


@dataclass(frozen=True)
class RemoteTokenFile(TokenFile):
    """Headerless ids behind a URL, with the .json of prepare_text beside them if there is one. Pickled by URL."""

    url: str = ""
    version: str = ""
    """of the content, as the server tells it: a changed file is not read from the cache"""

    @classmethod
    def open_url(cls, url: str, vocab_size: int) -> RemoteTokenFile:
        """ValueError, FileNotFoundError or OSError, in one line, if it holds no ids."""
        info = _asked(url, "info", url)
        version = " ".join(str(info.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "size"))
        file = cls(Path(url), "uint16" if vocab_size <= 2**16 else "uint32", 0, 0, url, version)
        dtype = file.sidecar().get("dtype", file.dtype)
        count, rest = divmod(info["size"], np.dtype(dtype).itemsize)
        if rest or not count:
            raise ValueError(f"{url} has {info['size']} bytes, no whole number of {dtype} ids; it is cut off, or another kind")
        return cls(Path(url), dtype, 0, count, url, version)

    @property
    def name(self) -> str:
        """For messages."""
        return self.url

    def sidecar(self) -> dict[str, Any]:
        """The .json beside it; empty if there is none."""
        try:
            return json.loads(_asked(f"{self.url}.json", "cat_file", f"{self.url}.json"))
        except FileNotFoundError:
            return {}

    def windows(self, length: int, starts: np.ndarray) -> np.ndarray:
        """ids[start : start + length] for each start: int32 [len(starts), length]."""
        size = length * np.dtype(self.dtype).itemsize
        offsets = (starts * np.dtype(self.dtype).itemsize).tolist()
        wanted = sorted({block for o in offsets for block in range(o // BLOCK_BYTES, (o + size - 1) // BLOCK_BYTES + 1)})
        blocks = _Blocks(self).read(wanted)
        parts = []
        for offset in offsets:
            first = offset // BLOCK_BYTES
            content = b"".join(blocks[n] for n in range(first, (offset + size - 1) // BLOCK_BYTES + 1))
            parts.append(content[offset - first * BLOCK_BYTES :][:size])
        content = b"".join(parts)
        if len(content) != len(starts) * size:
            raise ValueError(f"{self.url} has become shorter than its {self.count} ids; restore it")
        return np.frombuffer(content, self.dtype).reshape(len(starts), length).astype(np.int32)

    def ids(self) -> np.ndarray:
        """All ids [count], in memory."""
        return np.frombuffer(_asked(self.url, "cat_file", self.url), self.dtype)

    def facts(self) -> Facts:
        """What is known of the ids: by the .json beside them, or found out by reading all of them, once."""
        sidecar = self.sidecar()
        if "digest" in sidecar:
            return Facts(sidecar["digest"], 0, sidecar["largest_id"], False)
        entry = CacheEntry(cache_folder() / "files" / content_hash("remote ids", self.url, self.version, self.dtype))
        known = entry.read()
        if known is None:
            known = vars(self._find_out())
            entry.write({}, known)
        return Facts(**known)

    def _chunk(self, start: int) -> np.ndarray:
        width = np.dtype(self.dtype).itemsize
        end = min(self.count, start + CHUNK_IDS)
        return np.frombuffer(_asked(self.url, "cat_file", self.url, start=start * width, end=end * width), self.dtype)


class _Blocks:
    """Pieces of a remote file, each in a file of the cache; those not used for longest make room for new ones."""

    def __init__(self, file: RemoteTokenFile) -> None:
        self.file, self.root = file, cache_folder() / "blocks"
        self.folder = self.root / content_hash(file.url, file.version)

    def read(self, wanted: list[int]) -> dict[int, bytes]:
        """The blocks of these numbers: what is not here is asked for at once."""
        blocks: dict[int, bytes] = {}
        for number in wanted:
            path = self.folder / str(number)
            with contextlib.suppress(FileNotFoundError):  # another process may make room just now
                blocks[number] = path.read_bytes()
                os.utime(path)
        missing = [number for number in wanted if number not in blocks]
        if missing:
            url, size = self.file.url, self.file.count * np.dtype(self.file.dtype).itemsize
            starts = [number * BLOCK_BYTES for number in missing]
            ends = [min(size, start + BLOCK_BYTES) for start in starts]
            contents = _asked(url, "cat_ranges", [url] * len(missing), starts, ends, on_error="raise")
            self._keep(dict(zip(missing, contents, strict=True)))
            blocks |= zip(missing, contents, strict=True)
        return blocks

    def _keep(self, blocks: dict[int, bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, content in blocks.items():
            temporary = self.folder / f"{number}.{secrets.token_hex(8)}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, self.folder / str(number))
        limit = float(os.environ.get("SAMECURVE_REMOTE_GB") or DEFAULT_CACHE_GB) * 1e9
        _room.used += sum(map(len, blocks.values()))
        if _room.used > limit or not _room.counted:
            _room.make(self.root, limit)


class _Room:
    """What the blocks of all files take, counted when it may be too much, since other processes add to it too."""

    used, counted = 0.0, False

    def make(self, root: Path, limit: float) -> None:
        """Remove the oldest blocks down to nine tenths of the limit, if they are above it."""
        found = []
        for path in root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        self.used, self.counted = float(sum(size for _, size, _ in found)), True
        if self.used > limit:
            for _, size, path in sorted(found):
                if self.used <= 0.9 * limit:
                    break
                path.unlink(missing_ok=True)
                self.used -= size


_room = _Room()
