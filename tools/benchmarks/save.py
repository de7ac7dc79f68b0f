"""Seconds and memory of a checkpoint by the number of processes that write it, beside `torch.distributed.checkpoint.async_save`
and, with one process, the safetensors library's `save_file`: `python tools/benchmark.py save --writers 1 2 4`.

Every process holds its part of each tensor, as under FSDP2. The ways take turns, round by round, in the same processes, so that
a slow minute affects all. All of them sync their files to disk; only samecurve computes hashes, and writes files that do not
depend on the number of processes. `stands still` is the time that training would wait. CPU seconds are those of all processes,
and more telling on a busy machine. The first round, which allocates the memory, does not count for the seconds. Memory is the
peak of a process beyond the tensors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fault_injector import environment, free_port

from trainer.command_line.locations import argument_path

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.distributed.launch import Launch

    Way = Callable[[Path], Callable[[], object]]
    """begins a save to a folder, and returns a function that waits for its end"""

ROWS, COLUMNS = 1024, 1024
"""of a tensor: 4 MiB"""


def main(arguments: Sequence[str]) -> None:
    """Print a line for each number of processes and each way."""
    parser = argparse.ArgumentParser(prog="benchmark save", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1536, help="MiB of fp32 weights and two moments, over all processes")
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=4, help="the first takes the memory")
    parser.add_argument("--folder", type=argument_path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    flags = parser.parse_args(arguments)
    if "RANK" in os.environ:
        measure(flags.megabytes, flags.rounds, flags.folder)
        return
    for writers in flags.writers:
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            shared = {"WORLD_SIZE": str(writers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            command = [sys.executable, *sys.argv[:2], "--megabytes", str(flags.megabytes), "--rounds", str(flags.rounds)]
            ranks = [environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(writers)]
            processes = [subprocess.Popen([*command, "--folder", folder], env=env) for env in ranks]
            for process in processes:
                if process.wait():
                    raise SystemExit("benchmark save: a process failed, as said above")


def measure(megabytes: int, rounds: int, folder: Path) -> None:
    """In each process of a launch: save `rounds` times in each way; rank 0 prints the figures."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from trainer.distributed.launch import connect
    from trainer.distributed.signals import leave

    launch = connect("cpu", 10.0)
    torch.manual_seed(launch.rank)
    rows = ROWS // launch.processes
    weights: dict[str, Tensor] = {f"layer.{i}.weight": torch.randn(rows, COLUMNS) for i in range(megabytes // 4)}
    if launch.processes > 1:
        mesh = init_device_mesh("cpu", (launch.processes,))
        weights = {name: DTensor.from_local(own, mesh, [Shard(0)]) for name, own in weights.items()}
    found: dict[str, list[list[float]]] = {}
    ways = ways_to_save(weights, launch)
    for _ in range(rounds):
        for name, begin in ways.items():
            reports = one_save(begin, folder / "checkpoint", launch)
            if launch.is_main:
                stalls, seconds, memory, cpu_stalls, cpus = zip(*reports, strict=True)
                figures = [max(stalls), max(seconds), max(memory), sum(cpu_stalls), sum(cpus)]
                found.setdefault(name, []).append(figures)
                shutil.rmtree(folder / "checkpoint")
    for name, rounds_of_it in found.items():
        stall, total, _, cpu_stall, cpu = (statistics.median(values) for values in zip(*rounds_of_it[1:], strict=True))
        most = max(figures[2] for figures in rounds_of_it)
        print(
            f"{launch.processes} processes  {name:38} stands still {stall:6.2f} s ({cpu_stall:5.2f} CPU s), written after "
            f"{total:6.2f} s ({cpu:5.2f} CPU s), {most:6.0f} MB of memory more",
            flush=True,
        )
    leave(0)


def one_save(begin: Way, folder: Path, launch: Launch) -> list[list[float]]:
    """Do one save. Returns on rank 0, by rank: [seconds of the stall, seconds in all, MB at the peak above those before, CPU
    seconds of the stall, CPU seconds in all]; an empty list elsewhere."""
    launch.control.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, cpu_started = peak_megabytes(), time.perf_counter(), time.process_time()
    wait = begin(folder)
    stall, cpu_stall = time.perf_counter() - started, time.process_time() - cpu_started
    wait()
    cpu = time.process_time() - cpu_started
    launch.control.barrier()
    return launch.control.gather([stall, time.perf_counter() - started, peak_megabytes() - before, cpu_stall, cpu])


def ways_to_save(weights: Mapping[str, Tensor], launch: Launch) -> dict[str, Way]:
    """{name: way}; each way keeps its buffers from save to save."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    from trainer.backends.tensors import whole_entries
    from trainer.checkpoints.writing import RankWriter, commit

    share, entries = RankWriter(launch), whole_entries(weights)
    cut = len(entries) // 3

    def samecurve(folder: Path) -> Callable[[], object]:
        share.copy({"model": entries[:cut], "optimizer": entries[cut:]})
        return lambda: finish(folder)

    def finish(folder: Path) -> None:
        reports = launch.control.gather(share.write(folder, "checkpoint_step_1", {}))
        if launch.is_main:
            assert commit(folder, "checkpoint_step_1", reports) is None

    def async_save(folder: Path, stager: DefaultStager | None = None) -> Callable[[], object]:
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        saving = dcp.async_save(dict(weights), storage_writer=writer, async_stager=stager)
        return saving.result  # type: ignore[union-attr]

    nothing_of_a_gpu = dict.fromkeys(("use_pinned_memory", "use_async_staging", "use_non_blocking_copy"), False)
    stager = DefaultStager(StagingOptions(use_shared_memory=False, **nothing_of_a_gpu))

    def plain(folder: Path) -> Callable[[], object]:
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        return lambda: None

    ways: dict[str, Way] = {
        "samecurve": samecurve,
        "async_save": async_save,
        "async_save with a stager that is kept": partial(async_save, stager=stager),
    }
    return ways if launch.processes > 1 else {**ways, "save_file": plain}


def peak_megabytes() -> float:
    """Peak resident memory of this process since the last reset, in MB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000
