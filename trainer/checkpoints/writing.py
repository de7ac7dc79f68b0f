"""Writing checkpoint folders: a whole one or none.

All ranks write into a folder with a temporary name, each its own files, and fsync them. Then rank 0 writes the manifest (size
and SHA-256 of every other file), and a rename commits the folder. Recurring names (`best_model`) are relative links to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints.checkpoint import FORMAT, MANIFEST, TEMPORARY
from trainer.checkpoints.tensor_file import TensorFile, header_of, in_file_order
from trainer.distributed.launch import Launch, alone
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.run_directory import fsync_directory

SHARD_BYTES = 1_000_000_000
"""maximum size of a file (a larger tensor has one to itself): small enough to share out over many ranks"""
POLL_SECONDS = 0.02
LAG_SECONDS = 10.0
"""how long a file that one host has made may take to appear on another"""
Tensors = Mapping[str, Sequence[TensorEntry]]
"""{stem of the file name, such as `model` or `optimizer`: its tensors}"""
WriteReport = dict[str, Any]
"""what a rank wrote, as JSON: `files` {name: size and hash, as in the manifest}, `failure` (None: none), `seconds`"""


class RankWriter:
    """Writes one rank's share of each checkpoint: file number f belongs to rank f modulo the number of ranks.

    Which files there are, and every byte of them, depends on the tensors alone. `copy` copies a state into host memory that
    is reused; `write` then writes it, possibly in a thread while training goes on. Each ends before the other starts.
    """

    def __init__(self, launch: Launch, shard_bytes: int = SHARD_BYTES) -> None:
        self.launch, self.shard_bytes = launch, shard_bytes
        self._files: dict[str, TensorFile] = {}
        self._indexes: dict[str, str] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: Tensors) -> None:
        """Copy the tensors of this rank's files. Collective.

        Copies from a GPU are only queued, before its next kernels: training may go on, and `write` waits for them.
        """
        rank, pinned = self.launch.rank, self.launch.device.type == "cuda"
        files, self._indexes = files_of(tensors, self.shard_bytes)
        kept, self._files = self._files, {}
        for number, (name, entries) in enumerate(files.items()):
            writer = number % self.launch.processes
            if writer == rank:
                fits = name in kept and kept[name].header == header_of(entries)
                self._files[name] = kept[name] if fits else TensorFile(entries, pinned)
            for entry in entries:
                tensor = entry.read(writer)
                if writer == rank:
                    assert tensor is not None, entry.name
                    self._files[name].fill(entry.name, tensor)
        if pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def release(self) -> None:
        """Free the host memory; the next `copy` allocates it again."""
        self._files.clear()

    def write(self, folder: Path, name: str, texts: Mapping[str, str]) -> WriteReport:
        """Write and fsync this rank's files of checkpoint `folder/name`; rank 0 also writes `texts`, {file name: content}."""
        temporary, started = _temporary(folder, name), time.monotonic()
        if self._copied is not None:
            self._copied.synchronize()
        files: dict[str, Any] = {}
        failure = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            for file, tensor_file in self._files.items():
                files[file] = tensor_file.write(temporary / file)
            for file, text in {**self._indexes, **texts}.items() if self.launch.is_main else ():
                files[file] = _write_text(temporary / file, text)
        except OSError as error:
            failure = f"rank {self.launch.rank}: {error}" if self.launch.rank else str(error)
        return {"files": files, "failure": failure, "seconds": time.monotonic() - started}


def commit(folder: Path, name: str, reports: Sequence[WriteReport]) -> str | None:
    """Commit checkpoint `folder/name`, on one rank, once every rank has written and reported: write its manifest, rename it.

    Returns None, or why it failed; nothing is left of the folder then.
    """
    temporary = _temporary(folder, name)
    failure = next((report["failure"] for report in reports if report["failure"]), None)
    if failure is None:
        try:
            _commit(temporary, folder / name, {file: entry for report in reports for file, entry in report["files"].items()})
            return None
        except OSError as error:
            failure = str(error)
    remove(temporary)
    return f"checkpoint {folder / name} could not be written: {failure}; make room, or give the right to write there"


def write(folder: Path, name: str, tensors: Tensors, texts: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> Path:
    """Write checkpoint `folder/name` from this process alone, which has all tensors whole. UserError (exit 5) if that fails."""
    writer = RankWriter(alone(), shard_bytes)
    writer.copy(tensors)
    failure = commit(folder, name, [writer.write(folder, name, texts)])
    if failure is not None:
        raise UserError(failure, CHECKPOINT)
    return folder / name


def _temporary(folder: Path, name: str) -> Path:
    return folder / f"{TEMPORARY}{name}"


def check_shared(folder: Path, launch: Launch) -> None:
    """UserError, before anything is trained, unless all ranks can write into the same `folder`. Collective."""
    if launch.processes == 1:
        return
    probe = folder / launch.control.on_main(lambda: _make_probe(folder))
    failure, end = _touch(probe / str(launch.rank)), time.monotonic() + LAG_SECONDS
    while isinstance(failure, FileNotFoundError) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        failure = _touch(probe / str(launch.rank))
    way_out = "give --output_dir (and --checkpoint_dir) on a file system that all hosts share, which every rank may write to"
    message = f"rank {launch.rank} on {socket.gethostname()} cannot write where rank 0 does, {folder}: {failure}; {way_out}"
    try:
        launch.control.raise_if_any(None if failure is None else UserError(message, CHECKPOINT))
    finally:
        if launch.is_main:
            remove(probe)


def _touch(path: Path) -> OSError | None:
    try:
        path.touch()
    except OSError as error:
        return error
    return None


def _make_probe(folder: Path) -> str:
    """Make a new folder in `folder`; its name."""
    name = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
    (folder / name).mkdir()
    return name


def files_of(tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> tuple[dict[str, list[TensorEntry]], dict[str, str]]:
    """({file: its tensors, in the order of the file}, {index file: its content}); an index where a stem takes several files."""
    files: dict[str, list[TensorEntry]] = {}
    indexes: dict[str, str] = {}
    for stem, entries in tensors.items():
        shards = _shards(entries, shard_bytes)
        if len(shards) == 1:
            files[f"{stem}.safetensors"] = shards[0]
            continue
        named = {f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}
        weight_map = {entry.name: file for file, shard in named.items() for entry in shard}
        total = sum(entry.size_bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files |= named
        indexes[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=1)
    return files, indexes


def _shards(entries: Sequence[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """The entries of each file, in the order of the file."""
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
    """Write and fsync a text file; its size and hash, as in the manifest."""
    content = text.encode()
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def remove(path: Path) -> None:
    """Delete a folder; of a link the link alone, not its target. Errors are ignored."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
