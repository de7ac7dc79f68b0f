"""Translates the variables of `srun`, OpenMPI's `mpirun` and `deepspeed` into those of torch."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, MutableMapping, Sequence

from trainer.distributed.signals import launched


def adopt_ranks(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as far as they are missing.

    Does nothing for a single process, nor where torchrun or another launcher, which `srun` or `mpirun` may have started, has
    set them. OpenMPI does not say where rank 0 is: on several hosts the user has to set MASTER_ADDR.
    """
    if "CROSS_RANK" in environ:  # started by `deepspeed`, which sets all but this one
        given = {"LOCAL_WORLD_SIZE": environ["LOCAL_SIZE"]}
    elif launched(environ) or "WORLD_SIZE" in environ:
        return
    elif int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        given = _of_open_mpi(environ)
    elif int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        given = _of_slurm(environ)
    else:
        return
    for name, value in given.items():
        environ.setdefault(name, value)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """A command line without the `--local_rank=N` that `deepspeed` puts in front; LOCAL_RANK has the number too."""
    return [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]


def _of_open_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a process that `mpirun` started; on several hosts without MASTER_ADDR."""
    names = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "WORLD_SIZE": "SIZE", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    given = {ours: environ[f"OMPI_COMM_WORLD_{theirs}"] for ours, theirs in names.items()}
    given["MASTER_PORT"] = _port(environ.get("PMIX_NAMESPACE", ""))
    if given["WORLD_SIZE"] == given["LOCAL_WORLD_SIZE"]:
        given["MASTER_ADDR"] = "127.0.0.1"
    return given


def _of_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task that `srun` started. Slurm writes nodes as `a[1-3,7],b`, and their tasks as `2(x4),1`."""
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).partition(",")[0]
    tasks: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [number] * int(times or 1)
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": tasks[int(environ["SLURM_NODEID"])],
        "MASTER_ADDR": first if len(tasks) > 1 else "127.0.0.1",
        "MASTER_PORT": _port(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"),
    }


def _port(job: str) -> str:
    """A port number from a hash of the job, so that all its processes have the same one and other jobs most likely another. It
    is below the range that systems give to outgoing connections."""
    return str(10000 + zlib.crc32(job.encode()) % 20000)
