"""A cache of files by content: an entry is whole and intact, or it is written again. Facts about a file are found only once."""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.hub import one_line

CACHE_FORMAT = "2"  # part of every cache key: raise it whenever the same input would give other files


def cache_folder(chosen: str | Path | None = None) -> Path:
    """`chosen`, else $SAMECURVE_CACHE, else ~/.cache/samecurve. ValueError for a user without a home."""
    try:
        return Path(chosen or os.environ.get("SAMECURVE_CACHE") or "~/.cache/samecurve").expanduser()
    except RuntimeError as error:
        raise ValueError(f"no folder for the cache ({one_line(error)}); set SAMECURVE_CACHE to one") from error


@dataclass(frozen=True)
class CacheEntry:
    """A folder of files and, written last, `index.json` with their hashes, and their sizes and times.

    Each file replaces its predecessor atomically and its content follows from the folder's name alone, so neither a
    kill nor two processes writing at once can leave anything but a good entry or one that is written again.
    """

    folder: Path

    def read(self) -> dict[str, Any] | None:
        """Return the facts given to `write` if the index and every file are there and intact, else None.

        A file whose size and times are those it was left with is not read.
        """
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
            files, facts = index["files"], index["facts"]
            intact = index["facts_sha256"] == content_hash(json.dumps(facts, sort_keys=True))
            for name, (digest, *times) in files.items():
                intact &= signature(self.folder / name) == times or file_hash(self.folder / name) == digest
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return facts if intact else None

    def temporary(self, name: str) -> Path:
        """Where to write a large file before it is given to `write`. Leftovers of killed processes are removed first."""
        self._to_write(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        for left in self.folder.glob("*.tmp"):
            if is_abandoned(left):
                left.unlink(missing_ok=True)
        return self.folder / f"{name}.{secrets.token_hex(8)}.tmp"

    def write(self, files: Mapping[str, bytes | Path], facts: dict[str, Any] | None = None) -> None:
        """Write `files` {name: content, or a `temporary` file of it} and `facts` (JSON). ValueError if that is not possible."""
        facts = facts or {}
        index: dict[str, Any] = {"files": {}, "facts": facts, "facts_sha256": content_hash(json.dumps(facts, sort_keys=True))}

        def write_all() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                path = self.folder / name
                _write_atomically(path, content)
                index["files"][name] = [file_hash(path), *signature(path)]
            _write_atomically(self.folder / "index.json", json.dumps(index).encode())

        self._to_write(write_all)

    def _to_write(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise ValueError(
                f"cannot write the cache {self.folder} ({reason}); set SAMECURVE_CACHE to a folder with space"
            ) from error


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file is a leftover: it was not written to for a day."""
    with contextlib.suppress(FileNotFoundError):  # it has just been renamed
        return path.suffix == ".tmp" and path.stat().st_mtime < time.time() - 24 * 3600
    return False


def remembered(path: Path, what: str, compute: Callable[[], dict[str, Any]], cache: Path | None = None) -> dict[str, Any]:
    """The result of `compute`, the facts called `what` about a file: computed again only when its size or times change."""
    entry = CacheEntry((cache or cache_folder()) / "files" / content_hash(what, str(path.resolve())))
    known, found = entry.read(), signature(path)
    if known is None or known["signature"] != found:
        known = {"path": str(path), "signature": found, "facts": compute()}
        entry.write({}, known)
    return known["facts"]


def remembered_hash(path: Path, cache: Path | None = None) -> str:
    """sha256 (hex) of the bytes of a file, which is read again only when its size or times change."""
    return remembered(path, "sha256", lambda: {"sha256": file_hash(path)}, cache)["sha256"]


def signature(path: Path) -> list[int]:
    """Size and times of a file: [bytes, mtime, ctime]. Programs that restore mtime cannot set ctime."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _write_atomically(path: Path, content: bytes | Path) -> None:
    temporary = content if isinstance(content, Path) else path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("rb+" if isinstance(content, Path) else "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """sha256 (hex) of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: str) -> str:
    """sha256 (hex) of the cache format and the parts, each after its length so that moving a border changes it."""
    digest = hashlib.sha256()
    for part in (CACHE_FORMAT, *parts):
        content = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()
