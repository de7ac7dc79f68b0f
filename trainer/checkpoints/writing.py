"""Checkpoint folders, written: whole or not at all.

A folder is written under a temporary name beside its place, every file is fsynced, the manifest (sizes and SHA-256 of all
others) comes last, and a rename makes it count. Recurring names (`best_model`, `checkpoint_epoch_3`) are relative links to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints.checkpoint import FORMAT, MANIFEST, TEMPORARY
from trainer.checkpoints.tensor_file import TensorFile, in_file_order
from trainer.distributed.control import Control
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.run_directory import fsync_directory

T = TypeVar("T")

SHARD_BYTES = 5_000_000_000


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
