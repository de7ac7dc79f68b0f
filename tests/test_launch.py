"""Joining the other processes: ranks, refusals, the control group, precision, and leaving without an abort."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, free_port

from trainer.distributed import launch as launching
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch, _check_world, _had_threads_from_user, connect, resolve_precision
from trainer.errors import BAD_INPUT, UserError

# Two processes: each writes its results to FOLDER/{rank}.json, and exits as a recipe does.
TWO = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from trainer.errors import CHECKPOINT, UserError
from trainer.distributed.launch import connect, resolve_precision
from trainer.distributed.signals import leave

folder = Path(sys.argv[1])
launch = connect("cpu", 1.0)
control, rank = launch.control, launch.rank
results = {"rank": rank, "processes": launch.processes, "local_rank": launch.local_rank, "main": launch.is_main}
results |= {"device": launch.device.type, "backend": dist.get_backend()}

def refused(action):
    try:
        return ["passed", action()]
    except UserError as error:
        return ["refused", str(error), error.exit_code]

pending = [control.sum([rank + 1, 0.1, 2.0**53]), control.sum([1.0])]
results["sums"] = [s.wait() for s in pending]
value = {"text": "ünï\\n", "numbers": [1, 2.5, None, True], "long": "x" * 100_000}
received = control.broadcast(value if rank == 0 else None)
results["broadcast"] = received == value
results["from_1"] = control.broadcast(rank, source=1)
results["agreed"] = refused(lambda: control.raise_if_any(None))
results["one"] = refused(lambda: control.raise_if_any(UserError("disk of rank 1 is full", CHECKPOINT) if rank == 1 else None))
results["both"] = refused(lambda: control.raise_if_any(UserError(f"rank {rank} failed")))
called = []
def act():
    called.append(rank)
    return {"chosen": "checkpoint_step_7"}
results["on_main"] = refused(lambda: control.on_main(act))
results["called"] = called
def fail():
    raise UserError("only rank 0 looked")
results["on_main_refused"] = refused(lambda: control.on_main(fail))
results["after"] = control.sum([1.0]).wait()
control.barrier()
(folder / f"{rank}.json").write_text(json.dumps(results))
print(f"rank {rank} is done", flush=True)
leave(0)
"""

# Pairs of forked processes, so that the imports are paid once: each pair forms a gloo group and leaves with a code.
PAIRS = """
import os, sys
from pathlib import Path
import torch, accelerate
from recipes.gpt2_wikitext import Gpt2Wikitext
from trainer.distributed.launch import connect, resolve_precision
from trainer.distributed.signals import leave
from trainer.main import main

folder, *ports = sys.argv[1:]

def part(rank, code):
    launch = connect("cpu", 1.0)
    assert launch.control.sum([1.0]).wait() == [2.0]
    leave(code)

class Unlucky(Gpt2Wikitext):
    def build_data(self, config):
        from trainer.recipe import Data
        if os.environ["RANK"] == "1":
            raise ValueError("the text of rank 1 is missing; copy it")
        return Data(range(8), {})

def refuse(rank, code):
    os.chdir(folder)
    main(Unlucky(), ["--device", "cpu", "--output_dir", "run", "--max_steps", "1"])

def pair(port, action, code, log):
    sys.stdout.flush()
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(out, 1), os.dup2(out, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            action(rank, code)
            os._exit(77)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]

for number, port in enumerate(ports[:-2]):
    print("clean", *pair(port, part, 0, os.path.join(folder, "clean.log")))
print("five", *pair(ports[-2], part, 5, os.path.join(folder, "five.log")))
print("refused", *pair(ports[-1], refuse, None, os.path.join(folder, "refused.log")))
"""


def alone() -> Launch:
    from datetime import timedelta

    return Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta(minutes=1)))


# ------------------------------------------------------------------------------------------------------ _check_world


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_silent_copies_are_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        _check_world({name: "2"}, 0, 1, on_cpu=True)
    for word in (f"{name}=2", "rank 0 of 1", "accelerate_configs/ddp.yaml"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (ROOT / "accelerate_configs" / "ddp.yaml").is_file()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_one_process_that_is_meant_to_be_alone_passes(environ: dict[str, str]) -> None:
    _check_world(environ, 0, 1, on_cpu=True)


def test_a_rank_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.dist, "get_backend", lambda: "gloo")
    _check_world({"WORLD_SIZE": "2", "RANK": "1"}, 1, 2, on_cpu=True)
    with pytest.raises(UserError, match=r"RANK=1 .* rank 0"):
        _check_world({"WORLD_SIZE": "2", "RANK": "1"}, 0, 2, on_cpu=True)
    with pytest.raises(UserError, match="WORLD_SIZE=4"):
        _check_world({"WORLD_SIZE": "4", "RANK": "0"}, 0, 2, on_cpu=True)


def test_another_backend_than_gloo_on_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.dist, "get_backend", lambda: "nccl")
    with pytest.raises(UserError, match=r"nccl.*gloo"):
        _check_world({"WORLD_SIZE": "2", "RANK": "0"}, 0, 2, on_cpu=True)
    _check_world({"WORLD_SIZE": "2", "RANK": "0"}, 0, 2, on_cpu=False)


# ------------------------------------------------------------------------------------------- device, precision, alone


def test_cuda_without_a_gpu_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu") as caught:
        connect("cuda", 1.0)
    assert caught.value.exit_code == BAD_INPUT


def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with pytest.raises(UserError, match=r"fp16.*bf16 or no"):
        resolve_precision("fp16", alone())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16"):
        resolve_precision("auto", alone())


@pytest.mark.parametrize(
    ("flag", "environment_value", "expected"),
    [
        ("auto", None, "no"),
        ("auto", "no", "no"),
        ("auto", "bf16", "bf16"),
        ("bf16", None, "bf16"),
        ("no", "bf16", "no"),
        ("bf16", "fp16", "bf16"),
    ],
)
def test_precision_on_a_cpu(flag: str, environment_value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if environment_value is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment_value)
    assert resolve_precision(flag, alone()) == expected


def test_alone_every_call_returns_at_once() -> None:
    control = alone().control
    assert control.sum([1.5, 2]).wait() == [1.5, 2.0]
    assert control.broadcast({"a": [1]}) == {"a": [1]}
    assert control.on_main(lambda: 7) == 7
    control.barrier()
    control.raise_if_any(None)
    with pytest.raises(UserError, match="disk"):
        control.raise_if_any(UserError("disk", 5))
    with pytest.raises(UserError, match="mine"):
        control.on_main(lambda: (_ for _ in ()).throw(UserError("mine")))


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """The results of two processes under torchrun, and their output."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, str(folder / "two.py"), str(folder)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], done.stdout + done.stderr


def test_torchrun_gives_two_ranks_on_gloo(two: tuple[list[dict], str]) -> None:
    results, _ = two
    assert [f["rank"] for f in results] == [f["local_rank"] for f in results] == [0, 1]
    assert [f["main"] for f in results] == [True, False]
    for f in results:
        assert (f["processes"], f["backend"], f["device"]) == (2, "gloo", "cpu")


def test_sums_are_exact_and_may_be_on_the_way_together(two: tuple[list[dict], str]) -> None:
    for f in two[0]:
        assert f["sums"] == [[3.0, 0.2, 2.0**54], [2.0]]
        assert f["after"] == [2.0]


def test_a_broadcast_reaches_everybody(two: tuple[list[dict], str]) -> None:
    for f in two[0]:
        assert f["broadcast"] is True
        assert f["from_1"] == 1


def test_a_refusal_of_one_is_that_of_all(two: tuple[list[dict], str]) -> None:
    for f in two[0]:
        assert f["agreed"] == ["passed", None]
        assert f["one"] == ["refused", "disk of rank 1 is full", 5]
        assert f["both"] == ["refused", "rank 0 failed", 2]


def test_on_main_happens_once_and_everybody_has_the_result(two: tuple[list[dict], str]) -> None:
    for f in two[0]:
        assert f["on_main"] == ["passed", {"chosen": "checkpoint_step_7"}]
        assert f["on_main_refused"] == ["refused", "only rank 0 looked", 2]
        assert f["called"] == ([0] if f["rank"] == 0 else [])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], Path]:
    """The lines of PAIRS, and its folder."""
    folder = tmp_path_factory.mktemp("pairs")
    ports = [str(free_port()) for _ in range(12)]
    done = subprocess.run(
        [sys.executable, "-c", PAIRS, str(folder), *ports],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()], folder


def test_gloo_processes_leave_cleanly_ten_times_in_a_row(pairs: tuple[list[list[str]], Path]) -> None:
    lines, folder = pairs
    assert [line for line in lines if line[0] == "clean"] == [["clean", "0", "0"]] * 10
    assert "terminate" not in (folder / "clean.log").read_text()


def test_the_exit_code_is_the_requested_one(pairs: tuple[list[list[str]], Path]) -> None:
    assert ["five", "5", "5"] in pairs[0]


def test_a_refusal_on_rank_1_is_shown_once(pairs: tuple[list[list[str]], Path]) -> None:
    lines, folder = pairs
    text = (folder / "refused.log").read_text()
    assert ["refused", "2", "2"] in lines, text
    assert text.count("the text of rank 1 is missing") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize("threads", [{}, {"OMP_NUM_THREADS": "1"}])
def test_threads_that_a_user_sets_are_told_from_those_that_a_launcher_sets(threads: dict[str, str]) -> None:
    """A launcher that sets the variable for its children does not have it from its own start."""
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    script = "import os; os.environ['OMP_NUM_THREADS'] = '1'; print('ready', flush=True); input()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], env={**alone, **threads}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None
    launcher.stdout.readline()
    assert _had_threads_from_user(launcher.pid) == bool(threads)
    launcher.communicate(b"\n")
    assert not _had_threads_from_user(launcher.pid)
