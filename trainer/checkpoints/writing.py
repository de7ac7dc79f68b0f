"""Checkpoint folders, written: whole or not at all.

A folder is written under a temporary name beside its place, by all ranks at once, each its own files; every file is fsynced,
the manifest (sizes and SHA-256 of all others) comes last, and a rename makes it count. Recurring names (`best_model`,
`checkpoint_epoch_3`) are relative links to it.
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
"""most of a file, but for a tensor that is larger: small enough to spread over many writers"""
POLL_SECONDS = 0.02
LAG_SECONDS = 10.0
"""how long a name that one host has made may take to show on another"""
Tensors = Mapping[str, Sequence[TensorEntry]]
"""by stem of the file name: `model`, `optimizer`"""
Report = dict[str, Any]
"""JSON: a rank's `files`, each with size and hash as a manifest has them, `failure` (None: it wrote them all), and `seconds`"""


class Share:
    """What one rank writes of each checkpoint: of all files, numbered from 0, every number that is its rank modulo the ranks.

    Which files there are, and every byte of them, follows from the tensors alone. `copy` takes a state into host memory, which
    is kept for the next; `write` brings it to the disk, and may do so in a thread while training goes on. One after the other.
    """

    def __init__(self, launch: Launch, shard_bytes: int = SHARD_BYTES) -> None:
        self.launch, self.shard_bytes = launch, shard_bytes
        self._files: dict[str, TensorFile] = {}
        self._indexes: dict[str, str] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: Tensors) -> None:
        """Copy this rank's files. Collective. What a GPU copies is there before its next kernel runs: training may go on."""
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
        """Let go of the memory; the next copy takes it anew."""
        self._files.clear()

    def write(self, folder: Path, name: str, texts: Mapping[str, str]) -> Report:
        """Bring this rank's files of checkpoint `folder/name` to the disk, on rank 0 `texts` too, by file name."""
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


def commit(folder: Path, name: str, reports: Sequence[Report]) -> str | None:
    """Give checkpoint `folder/name` its manifest and its name, once each rank has written and reported; on one rank. Why there
    is no such checkpoint, if there is none: then nothing of it is left."""
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
    """Write checkpoint `folder/name`, of tensors that are whole on this process, by it alone. UserError (exit 5) where that
    fails."""
    share = Share(alone(), shard_bytes)
    share.copy(tensors)
    failure = commit(folder, name, [share.write(folder, name, texts)])
    if failure is not None:
        raise UserError(failure, CHECKPOINT)
    return folder / name


def _temporary(folder: Path, name: str) -> Path:
    return folder / f"{TEMPORARY}{name}"


def check_shared(folder: Path, launch: Launch) -> None:
    """Refuse a launch whose ranks do not all write into the same `folder`, before anything is trained. Collective."""
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
    """A new folder in it."""
    name = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
    (folder / name).mkdir()
    return name


def files_of(tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> tuple[dict[str, list[TensorEntry]], dict[str, str]]:
    """({file: its tensors, in its order}, {index file: its content} of what takes several files)."""
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
