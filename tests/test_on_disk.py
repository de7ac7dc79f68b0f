"""What counts after a power cut: every byte and every name is brought to the disk before anything points to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints import retention, writing
from trainer.reporting.run_directory import write_text_atomic


def write(folder: Path, shard_bytes: int) -> Path:
    """A checkpoint of two tensors and a text."""
    entries = [TensorEntry(name, (4, 4), torch.float32, lambda _: torch.ones(4, 4)) for name in ("one", "two")]
    return writing.write(folder, "checkpoint_step_3", {"model": entries}, {"config.yaml": "step: 3"}, shard_bytes)


class Disk:
    """Keeps what was brought to the disk, and what was renamed, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, int]] = []
        """("sync", inode, size) or ("rename", inode of what was renamed, 0)"""
        original = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

        def fsync(descriptor: int) -> None:
            original["fsync"](descriptor)
            self.events.append(("sync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

        def rename(old: Path, new: Path, name: str) -> None:
            self.events.append(("rename", os.lstat(old).st_ino, 0))
            original[name](old, new)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", lambda old, new: rename(old, new, "rename"))
        patch.setattr(os, "replace", lambda old, new: rename(old, new, "replace"))

    def renamed(self, path: Path) -> int:
        """When `path` got its name."""
        return [event[:2] for event in self.events].index(("rename", os.lstat(path).st_ino))

    def whole(self, path: Path) -> list[int]:
        """When `path` was brought to the disk as long as it is now."""
        status = path.stat()
        size = None if path.is_dir() else status.st_size
        return [
            i
            for i, (kind, inode, n) in enumerate(self.events)
            if (kind, inode) == ("sync", status.st_ino) and size in (None, n)
        ]


@pytest.mark.parametrize("shard_bytes", [10**9, 50])  # the second is less than any tensor takes
def test_a_checkpoint_is_on_the_disk_before_it_counts_and_then_its_name(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    path = write(tmp_path, shard_bytes)
    counts = disk.renamed(path)
    files = sorted(path.iterdir())
    assert len(files) == (3 if shard_bytes > 50 else 5)
    last = 0
    for file in files:
        synced = [at for at in disk.whole(file) if at < counts]
        assert synced, f"{file.name} was not brought to the disk"
        last = max(last, synced[0])
    assert any(last < at < counts for at in disk.whole(path)), "the names of its files"
    assert any(at > counts for at in disk.whole(tmp_path)), "its own name"


def test_a_link_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    retention.link(tmp_path, "best_model", "checkpoint_step_3")
    assert any(at > disk.renamed(tmp_path / "best_model") for at in disk.whole(tmp_path))


def test_a_text_is_on_the_disk_before_it_replaces_the_old_one_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    disk = Disk(monkeypatch)
    write_text_atomic(path, "a new text")
    assert any(at < disk.renamed(path) for at in disk.whole(path))
    assert any(at > disk.renamed(path) for at in disk.whole(tmp_path))
