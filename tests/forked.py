"""A few processes in a gloo group without a launcher, forked, so that nothing is imported again: a launch takes ten seconds."""

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
    """What `action(rank)` gives in each of them, by rank, as JSON can hold it; `folder` is theirs."""

    def run(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
        (folder / f"rank{rank}.json").write_text(json.dumps(action(rank)))
        dist.barrier()
        os._exit(0)  # gloo may abort where the interpreter ends

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run, args=(rank,)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT.total_seconds())
        child.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
