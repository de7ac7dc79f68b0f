"""A cache of files by content: an entry is whole and intact, or it is written again."""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.hub import one_line

CACHE_FORMAT = "1"  # part of every cache key: raise it whenever the same input would give other files


def cache_folder(chosen: str | Path | None = None) -> Path:
    """`chosen`, else $SAMECURVE_CACHE, else ~/.cache/samecurve. ValueError for a user without a home."""
    try:
        return Path(chosen or os.environ.get("SAMECURVE_CACHE") or "~/.cache/samecurve").expanduser()
    except RuntimeError as error:
        raise ValueError(f"no folder for the cache ({one_line(error)}); set SAMECURVE_CACHE to one") from error


@dataclass(frozen=True)
class CacheEntry:
    """A folder of files and, written last, `index.json` with their hashes.

    Each file replaces its predecessor atomically and its content follows from the folder's name alone, so neither a
    kill nor two processes writing at once can leave anything but a good entry or one that is written again.
    """

    folder: Path

    def read(self) -> dict[str, Any] | None:
        """Return the facts given to `write` if the index and every file are there and intact, else None."""
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
            files, facts = index["files"], index["facts"]
            intact = index["facts_sha256"] == content_hash(json.dumps(facts, sort_keys=True))
            intact &= all(_file_hash(self.folder / name) == expected for name, expected in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return facts if intact else None

    def write(self, files: dict[str, bytes], facts: dict[str, Any] | None = None) -> None:
        """Write `files` {name: content} and `facts` (JSON). Raises ValueError if the folder cannot be written."""
        facts = facts or {}
        index = {
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "facts": facts,
            "facts_sha256": content_hash(json.dumps(facts, sort_keys=True)),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**files, "index.json": json.dumps(index).encode()}.items():
                _write_atomically(self.folder / name, content)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise ValueError(
                f"cannot write the cache {self.folder} ({reason}); set SAMECURVE_CACHE to a folder with space"
            ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(*parts: str) -> str:
    """sha256 (hex) of the cache format and the parts, each after its length so that moving a border changes it."""
    digest = hashlib.sha256()
    for part in (CACHE_FORMAT, *parts):
        content = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()
