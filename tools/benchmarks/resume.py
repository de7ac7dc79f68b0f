"""Seconds to read and verify a checkpoint, by number of processes, in three ways that take turns: each process hashes a share
of the files and reads its own rows; rank 0 hashes all files and each process reads all tensors; and
torch.distributed.checkpoint, which checks no hashes. On one host, with the files in its cache.

python tools/benchmark.py resume --parameters 100000000 --processes 1 2 4
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.verification import verify_together
from trainer.distributed.control import Control

ROWS, WIDTH = 1000, 1000
FILE_BYTES = 50_000_000
TIMEOUT = timedelta(minutes=10)


def main(arguments: Sequence[str]) -> None:
    """Print a line for each number of processes: for each way the median seconds until the last process is done."""
    parser = argparse.ArgumentParser(prog="benchmark resume", description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000, help="fp32 numbers in the checkpoint: 0.4 GB by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=flags.folder) as place:
        folder = Path(place)
        write_checkpoints(folder, max(1, flags.parameters // (ROWS * WIDTH)))
        for processes in flags.processes:
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(flags.rounds):
                for way in WAYS:
                    seconds[way].append(slowest(way, processes, folder))
            cells = ", ".join(f"{way} {statistics.median(rounds):.2f} s" for way, rounds in seconds.items())
            print(f"{4e-9 * flags.parameters:.2f} GB, {processes} processes: {cells}", flush=True)


def write_checkpoints(folder: Path, tensors: int) -> None:
    """Write the same tensors in our format and in that of torch.distributed.checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    from trainer.backends.tensors import whole_entries
    from trainer.checkpoints import writing

    weights = {f"layer.{i}.weight": torch.randn(ROWS, WIDTH) for i in range(tensors)}
    writing.write(folder, "ours", {"model": whole_entries(weights)}, {}, FILE_BYTES)
    dcp.save(weights, checkpoint_id=folder / "theirs", no_dist=True)


def slowest(way: str, processes: int, folder: Path) -> float:
    """Seconds of one restoration until the last process has its tensors."""
    context = multiprocessing.get_context("spawn")
    (folder / "store").unlink(missing_ok=True)
    children = [context.Process(target=restore, args=(way, rank, processes, folder)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return max(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes))


def restore(way: str, rank: int, processes: int, folder: Path) -> None:
    """In each process: restore once, and write the seconds to `folder`."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
    control = Control(rank, processes, TIMEOUT)
    dist.barrier()
    started = time.monotonic()
    WAYS[way](folder, control)
    (folder / f"rank{rank}.json").write_text(json.dumps(time.monotonic() - started))
    dist.barrier()
    os._exit(0)  # gloo may abort at the interpreter's exit


def in_shares(folder: Path, control: Control) -> None:
    """Each process hashes its share of the files, and reads its own rows."""
    saved = verify_together(folder / "ours", control)
    size = -(-ROWS // control.processes)
    for name in sorted(saved.names("model")):
        saved.tensor("model", name, rows=slice(size * control.rank, min(ROWS, size * (control.rank + 1))))


def all_of_it(folder: Path, control: Control) -> None:
    """Rank 0 hashes every file while the others wait, and each process reads every tensor."""
    saved = Checkpoint(folder / "ours")
    control.on_main(saved.verify)
    for name in sorted(saved.names("model")):
        saved.tensor("model", name)


def distributed_checkpoint(folder: Path, control: Control) -> None:
    """torch.distributed.checkpoint, into DTensors sharded by rows in the same way."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, zeros

    mesh = init_device_mesh("cpu", (control.processes,))
    names = dcp.FileSystemReader(folder / "theirs").read_metadata().state_dict_metadata
    state: dict[str, Any] = {name: zeros(ROWS, WIDTH, device_mesh=mesh, placements=[Shard(0)]) for name in names}
    with torch.no_grad():
        dcp.load(state, checkpoint_id=folder / "theirs")


WAYS = {
    "in shares": in_shares,
    "all on each": all_of_it,
    "torch.distributed.checkpoint": distributed_checkpoint,
}
