"""Time of the communication beside gradients, by number of processes: start-up, sum, agreement, barrier, a failed rank.

python tools/benchmark.py control --processes 2 4 8 16 --simulated 64 1024

Processes are forked on this host and connected by gloo. Simulated ranks are threads; for them only communication through the
launch's store is measured: meeting at the start, and finding out which rank was lost. Milliseconds of the clock include the
wait for a core on a busy machine; milliseconds of the processor, over all processes, are the work itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from fault_injector import free_port

TIMES = 200
TIMEOUT = timedelta(minutes=5)
CONNECTIONS = 64  # to the store, shared by the simulated ranks
COLUMNS = ("start", "sum sent off", "sum", "agree", "barrier")


def main(arguments: Sequence[str]) -> None:
    """Print a line for each number of processes, and for each number of simulated ones."""
    parser = argparse.ArgumentParser(prog="benchmark control", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--simulated", type=int, nargs="*", default=[64, 1024])
    flags = parser.parse_args(arguments)
    print(f"{os.cpu_count()} cores. Milliseconds of the clock / of the processor, over all processes")
    print(f"{'processes':10}" + "".join(f"{column:>20}" for column in COLUMNS))
    for number in flags.processes:
        cells = (f"{clock:,.2f} / {processor:,.2f}" for clock, processor in measure(number).values())
        print(f"{number:<10}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    for number in flags.simulated:
        met, named, requests = simulate(number)
        print(
            f"{number} ranks as threads over one store: {met:.2f} s until all have met; one lost: {named:.2f} s until the last "
            f"knows which, at most {requests} requests of a rank but the one that looks",
            flush=True,
        )


def measure(processes: int) -> dict[str, tuple[float, float]]:
    """{column: (milliseconds of the clock in the slowest process, of the processor over all processes)}."""
    importlib.import_module("trainer.distributed.peers")  # before the fork, so that torch is imported once
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [context.Process(target=_rank, args=(r, processes, port, Path(folder))) for r in range(processes)]
        for child in children:
            child.start()
        for child in children:
            child.join(TIMEOUT.total_seconds())
        results = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(processes)]
    return {column: (max(each[column][0] for each in results), sum(each[column][1] for each in results)) for column in COLUMNS}


def _rank(rank: int, processes: int, port: int, folder: Path) -> None:
    """One process of `measure`; writes {column: (milliseconds of the clock, of the processor)} to `folder`."""
    import torch.distributed as dist

    from trainer.distributed import peers, rendezvous
    from trainer.distributed.control import Control, PendingSum

    environ = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    results: dict[str, tuple[float, float]] = {}

    def timed(column: str, action: Callable[[], Any], times: int = 1) -> Any:
        clock, processor, value = time.perf_counter(), time.process_time(), None
        for _ in range(times):
            value = action()
        results[column] = (1e3 * (time.perf_counter() - clock) / times, 1e3 * (time.process_time() - processor) / times)
        return value

    def start() -> Control:
        meeting = rendezvous.meet({name: str(value) for name, value in environ.items()}, TIMEOUT)
        assert meeting is not None
        met = peers.wait_for_all(meeting, TIMEOUT)
        dist.init_process_group("gloo", store=met.store, rank=rank, world_size=processes, timeout=TIMEOUT)
        return Control(rank, processes, TIMEOUT)

    control = timed("start", start)
    control.barrier()
    votes = [0.0] * 14
    pending: list[PendingSum] = []
    timed("sum sent off", lambda: pending.append(control.sum(votes)), TIMES)
    for each in pending:
        each.wait()
    timed("sum", lambda: control.sum(votes).wait(), TIMES)
    timed("agree", lambda: control.raise_if_any(None), TIMES)
    timed("barrier", control.barrier, TIMES // 10)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    control.barrier()
    os._exit(0)  # gloo may abort at the interpreter's exit


def simulate(ranks: int) -> tuple[float, float, int]:
    """Ranks as threads over one store, the last of which is lost after the start.

    Returns (seconds until all have met, seconds until all others know who was lost, requests to the store for that by the
    second busiest rank; the busiest is the one that checks all others).
    """
    import torch.distributed as dist

    from trainer.distributed import peers
    from trainer.distributed.rendezvous import Rendezvous

    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    clients = [dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False) for _ in range(min(CONNECTIONS, ranks))]
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    met: dict[int, tuple[Rendezvous, float]] = {}
    named: dict[int, float] = {}
    counts = [0] * ranks

    def meet(rank: int) -> None:
        meeting = peers.wait_for_all(Rendezvous(rank, ranks, clients[rank % len(clients)]), TIMEOUT)
        met[rank] = (meeting, time.perf_counter())

    def look(rank: int) -> None:
        cause = peers.root_cause(broken, rank, ranks, _Counting(met[rank][0].store, counts, rank))
        assert f"rank {ranks - 1} of {ranks} gave no answer" in str(cause), cause
        named[rank] = time.perf_counter()

    began = time.perf_counter()
    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(meet, range(ranks)))
        lost = time.perf_counter()
        list(threads.map(look, range(ranks - 1)))
    del server
    return max(at for _, at in met.values()) - began, max(named.values()) - lost, sorted(counts)[-2]


class _Counting:
    """A store that counts the requests of a rank in `counts`."""

    def __init__(self, store: Any, counts: list[int], rank: int) -> None:
        self._store, self._counts, self._rank = store, counts, rank

    def __getattr__(self, name: str) -> Any:
        self._counts[self._rank] += 1
        return getattr(self._store, name)
