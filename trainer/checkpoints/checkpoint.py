"""Checkpoint folders: safetensors and JSON, written whole or not at all, and only read back if their manifest matches.

A folder is written under a temporary name beside its place, every file is fsynced, the manifest (sizes and SHA-256 of all
others) comes last, and a rename makes it count. Recurring names (`best_model`, `checkpoint_epoch_3`) are relative links to it.
No pickle is written or read: the readers below open the files the manifest names, as safetensors or JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints.tensor_file import TensorFile, in_file_order
from trainer.distributed.control import Control
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.run_directory import fsync_directory
from trainer.state import TrainState

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"
SHARD_BYTES = 5_000_000_000
TEMPORARY = ".unfinished-"
"""how the name of a folder begins that is not (or no longer) a checkpoint"""
ENDINGS = r"\.(pth?|safetensors)$"
"""what people write behind the names of checkpoints, which are folders here"""


def write(
    folder: Path,
    name: str,
    tensors: Mapping[str, Sequence[TensorEntry]],
    texts: Mapping[str, str],
    control: Control,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write checkpoint `folder/name`. Collective: every process calls it, and all return or all raise UserError (exit 5).

    `tensors` maps a stem (`model`, `optimizer`) to its entries; `texts` a file name to its content. Rank 0 writes, one
    tensor in memory at a time. Where that fails the others go on gathering to the end, so that nobody hangs, and the
    temporary folder is removed.
    """
    temporary = folder / f"{TEMPORARY}{name}"
    failure: UserError | None = None

    def attempt(action: Callable[..., T], *arguments: Any) -> T | None:
        nonlocal failure
        if control.rank == 0 and failure is None:
            try:
                return action(*arguments)
            except OSError as error:
                failure = UserError(
                    f"checkpoint {folder / name} could not be written: {error}; is there space, and the right to write?",
                    CHECKPOINT,
                )
        return None

    attempt(remove, temporary)
    attempt(partial(temporary.mkdir, parents=True))
    files: dict[str, Any] = {}
    for stem, entries in tensors.items():
        shards = _shards(entries, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            tensor_file = attempt(TensorFile, temporary / file, shard)
            for entry in shard:
                if entry.collective or (tensor_file is not None and failure is None):
                    tensor = entry.read()
                    if tensor_file is not None:
                        attempt(tensor_file.add, entry, tensor)
            if tensor_file is not None:
                files[file] = attempt(tensor_file.finish)
                tensor_file.close()
            weight_map |= {entry.name: file for entry in shard}
        if len(shards) > 1:
            total = sum(entry.size_bytes for entry in entries)
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
            texts = {**texts, f"{stem}.safetensors.index.json": index}
    for file, text in texts.items():
        files[file] = attempt(_write_text, temporary / file, text)
    attempt(_commit, temporary, folder / name, files)
    if failure is not None:
        remove(temporary)
    control.raise_if_any(failure)
    control.barrier()
    return folder / name


def _shards(entries: Sequence[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """The entries of each file, in its order."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in in_file_order(entries):
        if shards[-1] and size + entry.size_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size_bytes
    return shards


def _commit(temporary: Path, final: Path, files: Mapping[str, Any]) -> None:
    _write_text(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1))
    fsync_directory(temporary)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def _write_text(path: Path, text: str) -> dict[str, Any]:
    """Bring a file to the disk; its size and hash, as a manifest has them."""
    content = text.encode()
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def remove(path: Path) -> None:
    """Delete a folder of ours; never through a link."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


class Checkpoint:
    """A committed checkpoint folder. Making one checks the manifest's form; `verify` checks every byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = self._json(MANIFEST)
        version = manifest.get("format")
        if not isinstance(version, int) or not isinstance(manifest.get("files"), dict):
            raise self._damaged(MANIFEST, "is not a manifest")
        if version != FORMAT:
            way_out = "update samecurve" if version > FORMAT else "use the version that wrote it"
            raise UserError(f"{path} has checkpoint format {version}, this version reads {FORMAT}; {way_out}", CHECKPOINT)
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in self.files.items():
            if Path(name).name != name:
                raise self._damaged(MANIFEST, f"names {name!r}, which is not a file in this folder")
            if not (isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)):
                raise self._damaged(MANIFEST, f"has no size and hash for {name!r}")
        self.digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        self._file_of: dict[str, dict[str, str]] = {}
        self._open: dict[str, Any] = {}

    def _damaged(self, file: str, what: str) -> UserError:
        return UserError(f"checkpoint {self.path}: {file} {what}; choose another checkpoint", CHECKPOINT)

    def _json(self, file: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._damaged(file, "is missing") from None
        except (OSError, ValueError) as error:
            raise self._damaged(file, f"cannot be read ({error})") from None
        if not isinstance(value, dict):
            raise self._damaged(file, "holds no JSON object")
        return value

    def verify(self) -> None:
        """Raise UserError (exit 5), naming the file, unless every file has the size and hash of the manifest."""
        for name, recorded in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise self._damaged(name, "is missing")
            if path.stat().st_size != recorded["size"]:
                raise self._damaged(name, f"has {path.stat().st_size} bytes instead of {recorded['size']}")
            try:
                with path.open("rb") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._damaged(name, f"cannot be read ({error})") from None
            if actual != recorded["sha256"]:
                raise self._damaged(name, "does not match its hash (damaged)")

    @property
    def state(self) -> dict[str, Any]:
        """trainer_state.json."""
        if "trainer_state.json" not in self.files:
            raise self._damaged("trainer_state.json", "is missing")
        return self._json("trainer_state.json")

    @property
    def train_state(self) -> TrainState:
        """What the run remembered at this step."""
        return TrainState(**self.state["train_state"])

    def text(self, file: str) -> str:
        """A text file of the checkpoint."""
        if file not in self.files:
            raise self._damaged(file, "is missing")
        return (self.path / file).read_text(encoding="utf-8")

    def _files_of(self, stem: str) -> dict[str, str]:
        """{tensor name: file} of `model` or `optimizer`; only files the manifest names are opened."""
        if stem not in self._file_of:
            single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
            if single in self.files:
                self._file_of[stem] = dict.fromkeys(self._tensors(single).keys(), single)
            elif index in self.files:
                mapping = self._json(index).get("weight_map")
                if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
                    raise self._damaged(index, "has no weight_map")
                stray = sorted(set(mapping.values()) - set(self.files))
                if stray:
                    raise self._damaged(index, f"points to {stray[0]!r}, which is not in the manifest")
                self._file_of[stem] = mapping
            else:
                raise self._damaged(single, "is missing")
        return self._file_of[stem]

    def _tensors(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, f"is not a safetensors file ({error})") from None
        return self._open[file]

    def names(self, stem: str) -> set[str]:
        """Names of the tensors of `model` or `optimizer`."""
        return set(self._files_of(stem))

    def shape(self, stem: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        file = self._files_of(stem)[name]
        try:
            return tuple(self._tensors(file).get_slice(name).get_shape())
        except SafetensorError as error:
            raise self._damaged(file, f"lacks {name} ({error})") from None

    def tensor(self, stem: str, name: str) -> Tensor:
        """One tensor, on the host."""
        return self._tensors(self._files_of(stem)[name]).get_tensor(name)


def resolve(path: str, below: Sequence[Path]) -> Path:
    """The checkpoint folder a user means: as given, then below each of `below`; `.pt` and `.pth` endings are ignored."""
    plain = re.sub(ENDINGS, "", path)
    for root in (Path(), *below):
        candidate = (root / plain).expanduser()
        if candidate.is_dir():
            return candidate.resolve()
    tried = ", ".join(dict.fromkeys(str(root / plain) for root in (Path(), *below)))
    near = sorted({str(p.parent) for root in below if root.is_dir() for p in root.glob(f"**/{MANIFEST}")})
    hint = f"; there are: {', '.join(near[:5])}" if near else ""
    raise UserError(f"no checkpoint folder at {tried}{hint}")
