"""Seconds and memory of writing a checkpoint, compared with the safetensors library: all tensors copied, written, read again
for their hashes. Each in a process of its own, the two in turn: `python tools/benchmark.py save --parameters 250000000`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.command_line.locations import argument_path

if TYPE_CHECKING:
    from trainer.backends.tensors import TensorEntry

PIECE = 1_000_000


def main(arguments: Sequence[str]) -> None:
    """Print a line for each way: median seconds, gigabytes a second, and the memory it took beside the tensors themselves."""
    parser = argparse.ArgumentParser(prog="benchmark save", description=__doc__)
    parser.add_argument("--parameters", type=int, default=250_000_000, help="fp32 numbers in the checkpoint: 1 GB by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=argument_path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.only:
        print(*measure(flags.only, flags.parameters, flags.folder))
        return
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(flags.rounds):
        for way in WAYS:
            command = [sys.executable, *sys.argv[:2], "--parameters", str(flags.parameters), "--folder", str(flags.folder)]
            output = subprocess.run([*command, "--only", way], check=True, capture_output=True, text=True).stdout
            seconds, megabytes = map(float, output.split())
            results[way].append((seconds, megabytes))
    size = 4 * flags.parameters / 1e9
    for way, rounds in results.items():
        seconds, megabytes = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"{way:12} {size:.2f} GB in {seconds:.2f} s ({size / seconds:.2f} GB/s), {megabytes:.0f} MB of memory more")


def measure(way: str, parameters: int, folder: Path) -> tuple[float, float]:
    """(seconds, peak memory above that of the tensors in MB) of one save."""
    import torch

    from trainer.backends.tensors import TensorEntry

    sizes = [min(PIECE, parameters - start) for start in range(0, parameters, PIECE)]
    weights = {f"layer.{i}.weight": torch.randn(size) for i, size in enumerate(sizes)}

    def entry(name: str, tensor: torch.Tensor) -> TensorEntry:
        return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    entries = [entry(name, tensor) for name, tensor in weights.items()]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, started = _peak_megabytes(), time.monotonic()
        WAYS[way](Path(place), entries)
        return time.monotonic() - started, _peak_megabytes() - before


def _peak_megabytes() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000


def _samecurve(folder: Path, entries: Sequence[TensorEntry]) -> None:
    from trainer.checkpoints import writing
    from trainer.distributed.control import Control

    writing.write(folder, "checkpoint_step_1", {"model": entries}, {}, Control(0, 1, timedelta(minutes=1)))


def _safetensors(folder: Path, entries: Sequence[TensorEntry]) -> None:
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({entry.name: entry.read().clone() for entry in entries}, path)
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())


WAYS = {"samecurve": _samecurve, "safetensors": _safetensors}
