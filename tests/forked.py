"""A few forked processes in a gloo group. A launch takes ten seconds, most of them for imports, which forks need not repeat."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(minutes=2)


def forked(processes: int, folder: Path, action: Callable[[int], Any]) -> list[Any]:
    """The results of `action(rank)`, by rank, which must be JSON values; `folder` is for files that the processes need."""

    def run(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
        (folder / f"rank{rank}.json").write_text(json.dumps(action(rank)))
        dist.barrier()
        os._exit(0)  # gloo may abort at the interpreter's exit

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run, args=(rank,)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT.total_seconds())
        child.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
