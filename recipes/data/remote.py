"""Files of ids behind a URL of fsspec (s3, gs, hf): read by ranges, through a local cache of bounded size.

The bound is $SAMECURVE_REMOTE_GB gigabytes over all processes that share the cache, 20 if it is not set.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash, is_abandoned
from recipes.data.hub import one_line
from recipes.data.token_files import CHUNK_IDS, HEAD_BYTES, Facts, TokenFile, default_dtype, ids_among, parsed_sidecar, stored

BLOCK_BYTES = 1 << 17  # requested at a time, and kept in a file of its own
CHECKSUM_BYTES = 4  # behind each block that is kept
DEFAULT_CACHE_GB = 20.0


def is_url(path: str) -> bool:
    """Whether a path is a URL, to be read by fsspec."""
    return "://" in path


@functools.lru_cache
def _file_system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{protocol}:// cannot be opened ({one_line(error)})") from None


def _request(url: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the URL's file system. FileNotFoundError, or OSError that names the URL.

    The OSError is ETIMEDOUT, which is temporary: no other sample may replace one that cannot be read now.
    """
    protocol = url.partition("://")[0]
    try:
        given = getattr(_file_system(protocol), method)(*arguments, **options)
        if failed := [part for part in given if isinstance(part, Exception)] if isinstance(given, list) else []:
            raise failed[0]  # many versions of fsspec return exceptions in place of bytes, whatever `on_error` says
        return given
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist; give another URL or path") from None
    except ValueError:
        raise
    except Exception as error:  # each library raises its own
        raise OSError(errno.ETIMEDOUT, f"{url} cannot be read ({one_line(error)})") from error


def remote_files(url: str, vocab_size: int) -> tuple[TokenFile, ...]:
    """The ids of a URL, of those that a pattern matches, or of the `.ids` below it, in the order of their names.

    For any number of files this takes one request for the list, and one round of requests for the .json beside each.
    """
    protocol = url.partition("://")[0]
    _cache_bytes()
    found = _request(url, "glob" if "*" in url else "find", url, detail=True)
    names = [name for name in ids_among(found) if name.endswith(".ids") or "*" in url or len(found) == 1]
    if not names:
        raise FileNotFoundError(f"{url} has no .ids files; give the URL of one, of a folder of them, or a pattern")
    beside = [f"{name}.json" for name in names]
    if "*" not in url and len(found) > 1:  # the list is whole
        beside = [name for name in beside if name in found]
    contents = _request(url, "cat", beside, on_error="return") if beside else {}
    for name, content in contents.items():
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise OSError(errno.ETIMEDOUT, f"{protocol}://{name} cannot be read ({one_line(content)})") from content
    known = {name: content for name, content in contents.items() if isinstance(content, bytes)}
    return tuple(
        RemoteTokenFile.open_url(f"{protocol}://{name.split('://')[-1]}", found[name], known.get(f"{name}.json"), vocab_size)
        for name in names
    )


def _entry(url: str, version: str, dtype: str) -> CacheEntry:
    """The cache entry for `Facts` about the ids of a URL."""
    return CacheEntry(cache_folder() / "files" / content_hash("remote ids", url, version, dtype))


@dataclass(frozen=True)
class RemoteTokenFile(TokenFile):
    """Headerless ids behind a URL, with the .json of prepare_text beside them if there is one. Pickled by URL."""

    url: str = ""
    version: str = ""
    """of the content, as the server tells it: the cache is not used for a file that has changed"""
    beside: bytes | None = None
    """content of the .json"""

    @classmethod
    def open_url(cls, url: str, info: dict[str, Any], beside: bytes | None, vocab_size: int) -> RemoteTokenFile:
        """The ids of one URL. ValueError, FileNotFoundError or OSError, in one line, if it holds none."""
        version = " ".join(str(info.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "size"))
        sidecar = {} if beside is None else parsed_sidecar(url, beside)

        def head() -> bytes:
            checked = _entry(url, version, default_dtype(vocab_size)).read()
            return b"" if checked else _request(url, "cat_file", url, start=0, end=min(HEAD_BYTES, info["size"]))

        dtype, count = stored(url, info["size"], vocab_size, sidecar, head)
        return cls(Path(url), dtype, count, 0, url, version, beside)

    @property
    def name(self) -> str:
        """For messages."""
        return self.url

    @functools.cached_property
    def sidecar(self) -> dict[str, Any]:
        """The .json beside it; empty if there is none."""
        return {} if self.beside is None else parsed_sidecar(self.url, self.beside)

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
        return np.frombuffer(_request(self.url, "cat_file", self.url), self.dtype)

    @functools.cached_property
    def facts(self) -> Facts:
        """From the .json beside the ids; or by reading all of them, once: the cache remembers them."""
        sidecar = self.sidecar
        if "digest" in sidecar:
            return Facts(sidecar["digest"], 0, sidecar["largest_id"], False)
        entry = _entry(self.url, self.version, self.dtype)
        known = entry.read()
        if known is None:
            known = vars(self._read_facts())
            entry.write({}, known)
        return Facts(**known)

    def _chunk(self, start: int) -> np.ndarray:
        width = np.dtype(self.dtype).itemsize
        end = min(self.count, start + CHUNK_IDS)
        return np.frombuffer(_request(self.url, "cat_file", self.url, start=start * width, end=end * width), self.dtype)


class _Blocks:
    """Blocks of a remote file, each in a file of the cache, from which the least recently used are removed."""

    def __init__(self, file: RemoteTokenFile) -> None:
        self.file, self.root = file, cache_folder() / "blocks"
        self.folder = self.root / content_hash(file.url, file.version)

    def read(self, wanted: list[int]) -> dict[int, bytes]:
        """{number: content} of these blocks; those that the cache lacks are requested together."""
        blocks: dict[int, bytes] = {}
        for number in wanted:
            path = self.folder / str(number)
            with contextlib.suppress(OSError):  # it is not there, or another process is removing it
                kept = path.read_bytes()
                content, checksum = kept[:-CHECKSUM_BYTES], kept[-CHECKSUM_BYTES:]
                if zlib.crc32(content).to_bytes(CHECKSUM_BYTES) == checksum:  # else it is fetched again
                    blocks[number] = content
                    os.utime(path)
        missing = [number for number in wanted if number not in blocks]
        if missing:
            url, size = self.file.url, self.file.count * np.dtype(self.file.dtype).itemsize
            starts = [number * BLOCK_BYTES for number in missing]
            ends = [min(size, start + BLOCK_BYTES) for start in starts]
            contents = _request(url, "cat_ranges", [url] * len(missing), starts, ends, on_error="raise")
            self._keep(dict(zip(missing, contents, strict=True)))
            blocks |= zip(missing, contents, strict=True)
        return blocks

    def _keep(self, blocks: dict[int, bytes]) -> None:
        """Put blocks into the cache. A failure is only logged, once: the sample itself has been read."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, content in blocks.items():
                _write(self.folder / str(number), content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES))
            _make_room(self.root, sum(len(content) + CHECKSUM_BYTES for content in blocks.values()), _cache_bytes())
        except OSError as error:
            _warn_once(f"{self.root} cannot keep what is read of URLs ({error.strerror or one_line(error)}): it is read again")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cache_bytes() -> float:
    """Bytes that the cache may hold. ValueError if $SAMECURVE_REMOTE_GB is not a number of at least 0."""
    setting = os.environ.get("SAMECURVE_REMOTE_GB") or DEFAULT_CACHE_GB
    with contextlib.suppress(ValueError):
        if (gigabytes := float(setting)) >= 0:
            return gigabytes * 1e9
    raise ValueError(f"SAMECURVE_REMOTE_GB is {setting!r}; set it to a number of gigabytes, as 20")


def _make_room(root: Path, added: int, limit: float) -> None:
    """Add to the count of bytes that all processes share; above `limit` remove the oldest blocks, down to nine tenths of it."""
    with (root / "bytes").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read()
        used = int(known) + added if known.isdecimal() else math.inf  # it was never counted, or a count was cut off
        if used > limit:
            used = _remove_oldest(root, limit)
        file.truncate(0)
        file.write(str(round(used)))


def _remove_oldest(root: Path, limit: float) -> float:
    """Remove the least recently used blocks above `limit`; the bytes that are left."""
    found = []
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.suffix != ".tmp" or is_abandoned(path):  # else it is being written
                found.append((status.st_mtime_ns, status.st_size, path))
    used = sum(size for _, size, _ in found)
    for _, size, path in sorted(found) if used > limit else ():
        if used <= 0.9 * limit:
            break
        path.unlink(missing_ok=True)
        used -= size
    return used
