"""Launchers that say ranks in words of their own: `deepspeed`, OpenMPI's `mpirun`, and `srun` (a real one: test_slurm.py)."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from fault_injector import curve, rows
from launching import ROOT, Started, environment, free_port, run

from trainer.backends.deepspeed_config import VARIABLE, request_zero
from trainer.distributed.ranks import adopt_ranks, without_local_rank
from trainer.errors import UserError

TOY = ROOT / "tests" / "toy_recipe.py"
ZERO2 = "ds_configs/zero2.json"
RUN = ["--device", "cpu", "--learning_rate", "1e-2", "--warmup_steps", "0", "--max_steps", "20"]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu-[07-09]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "a"}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    """What is set, and was not before."""
    after = dict(environ)
    adopt_ranks(after)
    return {name: value for name, value in after.items() if name not in environ}


def test_slurms_tasks_are_ranks_and_the_first_node_is_the_master() -> None:
    given = adopted(SLURM)
    port = given.pop("MASTER_PORT")
    assert given == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu-07"}
    assert 10000 <= int(port) < 30000
    assert adopted({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"] == port
    assert adopted({**SLURM, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != port
    assert "MASTER_PORT" not in adopted({**SLURM, "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("nodes", "tasks", "first"),
    [("b,a[1-3]", "1(x4)", "b"), ("a[3,7-9]-ib,b", "2(x4),1", "a3-ib"), ("one", "4", "127.0.0.1")],
)
def test_node_lists_of_slurm(nodes: str, tasks: str, first: str) -> None:
    environ = {**SLURM, "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert adopted(environ)["MASTER_ADDR"] == first


def test_openmpi_says_where_its_ranks_are_but_not_where_the_first_one_is() -> None:
    one_host = adopted({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert (
        one_host.pop("MASTER_PORT") != adopted({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "b"})["MASTER_PORT"]
    )
    assert one_host == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert "MASTER_ADDR" not in adopted({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty`, or one launcher on each node
        {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NTASKS": "5"},  # a batch script
        {**SLURM, "WORLD_SIZE": "2", "RANK": "0"},  # each task a launcher
        {**SLURM, "ACCELERATE_DYNAMO_MODE": "default"},  # of one process: five copies, refused later
    ],
)
def test_what_is_no_rank_stays_alone(environ: dict[str, str]) -> None:
    assert adopted(environ) == {}


def test_deepspeed_puts_a_rank_in_front_of_the_command_line() -> None:
    assert without_local_rank(["--local_rank=1", "evaluate", "--local-rank=0", "--local_rank", "x"]) == [
        "evaluate",
        "--local_rank",
        "x",
    ]
    assert adopted({"CROSS_RANK": "0", "LOCAL_SIZE": "4", "WORLD_SIZE": "8"}) == {"LOCAL_WORLD_SIZE": "4"}


def test_a_deepspeed_file_asks_for_zero_and_nothing_else_may_be_asked_for() -> None:
    environ = {"WORLD_SIZE": "2"}
    request_zero(environ, None)
    assert environ == {"WORLD_SIZE": "2"}
    request_zero(environ, ZERO2)
    assert environ == {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", VARIABLE: ZERO2}
    request_zero(environ, ZERO2)  # of the launcher too
    for launcher, file, problem in (
        (environ, "ds_configs/zero3.json", f"the launcher asks for {ZERO2}; keep one"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, ZERO2, "the launcher asks for FSDP; keep one"),
        ({}, ZERO2, "was started alone; start it with torchrun"),
        ({"WORLD_SIZE": "2", "CROSS_RANK": "0"}, None, "without a DeepSpeed file; add --deepspeed_config"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            request_zero(launcher, file)
        assert "\n" not in str(caught.value)


def test_deepspeeds_launcher_trains_with_zero_and_a_sigterm_to_it_saves(tmp_path: Path) -> None:
    directory, pace = tmp_path / "run", tmp_path / "pace"
    pace.write_text("1")
    argv = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), str(TOY), *RUN, "--deepspeed_config", ZERO2]
    paths = f"{Path(sys.executable).parent}:{environment()['PATH']}"  # which `deepspeed` looks for its Python in
    env = environment(PATH=paths, TOY_PACE=str(pace), PYTHONPATH=str(ROOT))
    launcher = Started(
        [f"{Path(sys.executable).parent}/{argv[0]}", *argv[1:], "--output_dir", str(directory)], tmp_path / "log", env
    )
    try:
        end = time.monotonic() + 120
        while not rows(directory) and time.monotonic() < end:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
        assert launcher.orphans(10) == []
    finally:
        launcher.kill_all()
    log = launcher.log.read_text()
    assert "Launch: DeepSpeed ZeRO, 2 x cpu" in log, log
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert (Path(status["checkpoint"]) / "manifest.json").is_file()


def test_processes_of_mpirun_are_one_launch(tmp_path: Path) -> None:
    if not shutil.which("mpirun"):
        pytest.skip("no mpirun here; on Debian: apt-get install openmpi-bin")
    log, directories = tmp_path / "log", [tmp_path / "two", tmp_path / "one"]
    argv = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(TOY), *RUN]
    process = Started([*argv, "--output_dir", str(directories[0])], log)
    try:
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill_all()
    assert "Launch: DDP, 2 x cpu" in log.read_text()
    run("one", TOY, *RUN, "--output_dir", str(directories[1]), log=log)
    two, alone = map(curve, directories)
    assert len(two["train/loss"]) == 20
    assert two["train/loss"] == {step: pytest.approx(value, rel=1e-5) for step, value in alone["train/loss"].items()}
