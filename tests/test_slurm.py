"""The batch scripts of tools/slurm under a real Slurm: its controller and two nodes, all on this machine, all in one folder."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_injector import curve, environment, free_port, reached, send
from launching import ROOT, run

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.reporting.run_directory import write_text_atomic

TOY = ROOT / "tests" / "toy_recipe.py"
SCRIPTS = ROOT / "tools" / "slurm"
NODES = ("127.0.0.1", "127.0.0.2")  # their names are what they are reached by
STEPS, PACE = 60, 1.0  # seconds a step at first: Slurm, which looks every 30 s, is to meet the run in the middle
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
FLAGS = ["--device", "cpu", "--learning_rate", "1e-2", "--warmup_steps", "4", "--save_minutes", "60"]
FLAGS += ["--train_rows", "6400"]  # an epoch, whose end saves, is far away
START_SECONDS = 90.0


class Cluster:
    """munged, slurmctld and two slurmd in the foreground, with ports, keys and state of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, folder / "jobs"
        self.jobs.mkdir()
        self.conf = folder / "slurm.conf"
        paths = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]  # Debian keeps the daemons there
        self.env = environment(SLURM_CONF=str(self.conf), PATH=":".join(paths), RUNS=str(folder / "runs"))

    def start(self) -> None:
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        user, shared = getpass.getuser(), "State=UNKNOWN CPUs=8 NodeHostname=localhost"
        lines = [
            "ClusterName=test",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={socket}",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",  # more CPUs than there are
            "ReturnToService=2",
            *(f"NodeName={node} NodeAddr={node} Port={free_port()} {shared}" for node in NODES),
            "PartitionName=all Nodes=ALL Default=YES State=UP",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        files = ("key", "socket", "pid", "log", "seed")
        munge = [
            word for file in files for word in (f"--{file}{'' if file == 'socket' else '-file'}", f"{self.folder}/munge.{file}")
        ]
        self._daemon("munged", "munged", "--foreground", *munge)
        self.until(socket.exists, 20, "no munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        self.until(
            lambda: self.run_command("sinfo", "-h", "-N", "-o", "%T", fails="").split() == ["idle", "idle"], 60, "no nodes"
        )

    def _daemon(self, name: str, *argv: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            subprocess.Popen(argv, env=self.env, cwd=self.folder, start_new_session=True, **streams)  # type: ignore[call-overload]

    def stop(self) -> None:
        """Kill whatever knows this cluster: daemons, jobs and what they started."""
        for _ in range(50):
            mark = f"SLURM_CONF={self.conf}".encode()
            pids = []
            for entry in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                        pids.append(int(entry))
                except OSError:
                    continue
            if not pids:
                return
            send(pids, signal.SIGKILL)
            time.sleep(0.1)

    def run_command(self, *argv: str, fails: str | None = None) -> str:
        """The output of a Slurm command; `fails` if it fails."""
        done = subprocess.run(argv, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode and fails is not None:
            return fails
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def until(self, holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{otherwise} within {seconds} s\n{self.log_ends()}"
            time.sleep(0.2)

    def log_ends(self) -> str:
        """The ends of all logs."""
        logs = [*self.jobs.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def submit(self, script: str, name: str, *arguments: str, options: tuple[str, ...] = (), pace: float = 0.0) -> str:
        """The job's number. Its log is `log(name)`, its pace can be changed later."""
        self.pace(name, pace)
        argv = ["sbatch", "--parsable", f"--job-name={name}", "--gpus-per-node=0", "--cpus-per-task=1", *options]
        argv += [f"--output={self.jobs / name}.out", str(SCRIPTS / script), *arguments]
        self.env["TOY_PACE"] = str(self.folder / f"{name}.pace")
        return self.run_command(*argv).strip()

    def pace(self, name: str, seconds: float) -> None:
        write_text_atomic(self.folder / f"{name}.pace", str(seconds))

    def log(self, name: str) -> str:
        return (self.jobs / f"{name}.out").read_text(errors="replace")

    def job(self, number: str) -> dict[str, str]:
        """The fields that scontrol shows."""
        return dict(
            word.split("=", 1) for word in self.run_command("scontrol", "-o", "show", "job", number).split() if "=" in word
        )

    def wait_for(self, number: str, state: str, seconds: float, restarts: int) -> dict[str, str]:
        """Until the job has been requeued so often and is in this state; at once if it ends otherwise."""
        wanted = (state, str(restarts))

        def now() -> tuple[str, str]:
            job = self.job(number)
            return job["JobState"], job["Restarts"]

        self.until(lambda: now() == wanted or now()[0] in OVER, seconds, f"job {number} not {wanted}")
        assert now() == wanted, self.log_ends()
        return self.job(number)

    def start_now(self, number: str) -> None:
        """A requeued job waits for two minutes otherwise. A node refuses one that begins in the second in which it ended."""
        time.sleep(2)
        self.run_command("scontrol", "update", f"JobId={number}", "StartTime=now")

    def seconds(self, number: str, fact: str) -> float:
        """A time of a job, in seconds since 1970."""
        return datetime.fromisoformat(self.job(number)[fact]).timestamp()

    def run_directory(self, *names: str) -> Path:
        return Path(self.env["RUNS"], TOY.stem, *names)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = [
        name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets have short names, and munged wants every user to get to its own
    folder.chmod(0o755)
    new_cluster = Cluster(folder)
    try:
        new_cluster.start()
        yield new_cluster
    finally:
        new_cluster.stop()
        shutil.rmtree(folder)


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def check_stopped(directory: Path, reason: str, before: float) -> int:
    """Saved, and over, before Slurm would have ended the job (seconds since 1970); the step."""
    stopped = status(directory)
    assert (stopped["state"], stopped["reason"]) == ("stopped", reason)
    assert datetime.fromisoformat(stopped["time"]).timestamp() < before
    Checkpoint(Path(stopped["checkpoint"])).verify()
    assert stopped["step"] > 0
    return stopped["step"]


@dataclass(frozen=True)
class Job:
    number: str
    end: float
    """when Slurm would end it, in seconds since 1970"""


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, Job]:
    """Two jobs side by side: one on two nodes that Slurm signals, one of a minute, on one node, that it does not."""
    commands = {
        "wide": ("multi_node.sbatch", str(STEPS), ("--signal=B:USR1@90", "--time=10"), PACE),
        "alone": ("single_node.sbatch", "1000000", ("--signal=B:USR1@0", "--time=1"), 0.2),
    }
    (cluster.folder / "data").mkdir()
    (cluster.folder / "data" / "rows.txt").write_text("some\n")
    cluster.env |= {"STAGE": f"{cluster.folder}/data", "STAGED": f"{cluster.folder}/local/data"}
    numbers = {
        name: cluster.submit(script, name, str(TOY), *FLAGS, "--max_steps", steps, options=options, pace=pace)
        for name, (script, steps, options, pace) in commands.items()
    }
    cluster.wait_for(numbers["alone"], "RUNNING", START_SECONDS, restarts=0)
    cluster.until(lambda: reached(3)(cluster.run_directory("wide"), 0.0), START_SECONDS, "wide does not train")
    # Now that it trains, however long that took to begin: a limit that Slurm has to signal when it looks next.
    minutes = int(time.time() - cluster.seconds(numbers["wide"], "StartTime")) // 60 + 2
    cluster.run_command("scontrol", "update", f"JobId={numbers['wide']}", f"TimeLimit={minutes}")
    return {name: Job(number, cluster.seconds(number, "EndTime")) for name, number in numbers.items()}


def test_a_run_reads_its_limit_from_slurm_stops_before_it_and_is_requeued(cluster: Cluster, jobs: dict[str, Job]) -> None:
    cluster.wait_for(jobs["alone"].number, "PENDING", 120, restarts=1)
    cluster.run_command("scancel", jobs["alone"].number)
    directory = cluster.run_directory("alone")
    step = check_stopped(directory, "time_limit", jobs["alone"].end)
    assert (directory / "checkpoints" / "checkpoint_time_limit").is_symlink()
    assert "asked to stop" not in cluster.log("alone")  # it was not signalled
    assert f"Requeued at step {step} of {directory}" in cluster.log("alone")


def test_a_run_on_two_nodes_is_signalled_before_its_limit_saved_requeued_and_finished(
    cluster: Cluster, jobs: dict[str, Job], tmp_path: Path
) -> None:
    number, directory = jobs["wide"].number, cluster.run_directory("wide")
    cluster.wait_for(number, "PENDING", 150, restarts=1)
    step = check_stopped(directory, "stop_file", jobs["wide"].end)
    assert step < STEPS
    assert not (directory / "stop").exists()
    for message in ("Signalled: asked to stop", f"Requeued at step {step} of {directory}"):
        assert message in cluster.log("wide")

    cluster.pace("wide", 0)
    cluster.run_command("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    cluster.start_now(number)
    assert cluster.wait_for(number, "COMPLETED", START_SECONDS, restarts=1)["ExitCode"] == "0:0"
    assert f"Resumed from step {step}\n" in cluster.log("wide")
    assert status(directory)["state"] == "finished"
    assert (cluster.folder / "local" / "data" / "rows.txt").read_text() == "some\n"
    assert json.loads((directory / "environment.json").read_text())["processes"] == len(NODES)

    run("one", TOY, *FLAGS, "--max_steps", str(STEPS), "--output_dir", str(tmp_path / "run"), log=tmp_path / "log")
    expected, actual = curve(tmp_path / "run"), curve(directory)
    assert list(actual["train/loss"]) == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/grad_norm", "eval/val_loss"):
        assert actual[name] == {step: pytest.approx(value, rel=1e-5) for step, value in expected[name].items()}, name


def test_a_finished_run_ends_at_once_when_requeued(cluster: Cluster, jobs: dict[str, Job]) -> None:
    number = jobs["wide"].number
    cluster.run_command("scontrol", "requeue", number)
    cluster.wait_for(number, "PENDING", 30, restarts=2)
    cluster.start_now(number)
    assert cluster.wait_for(number, "COMPLETED", START_SECONDS, restarts=2)["ExitCode"] == "0:0"
    assert f"Already finished (last step) at step {STEPS}, nothing to do" in cluster.log("wide")
    assert cluster.log("wide").count("Requeued at step") == 1


def test_an_array_trains_a_run_for_each_line_of_a_file(cluster: Cluster, tmp_path: Path) -> None:
    lines = tmp_path / "rates.txt"
    lines.write_text("--learning_rate 1e-3\n--learning_rate 2e-3 --seed 7\n")
    argv = [str(TOY), str(lines), "--device", "cpu", "--max_steps", "3"]
    number = cluster.submit("array_sweep.sbatch", "rates", *argv, options=("--array=1-3", "--time=5", "--signal=B:USR1@0"))

    def states() -> dict[str, str]:
        job_lines = cluster.run_command("scontrol", "-o", "show", "job", number).splitlines()
        facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in job_lines]
        return {job.get("ArrayTaskId", ""): f"{job['JobState']} {job['ExitCode']}" for job in facts}

    cluster.until(lambda: len(states()) == 3 and all(s.split()[0] in OVER for s in states().values()), 150, "array not over")
    assert states() == {"1": "COMPLETED 0:0", "2": "COMPLETED 0:0", "3": "FAILED 2:0"}
    settings = {}
    for index in ("1", "2"):
        directory = cluster.run_directory("rates", index)
        assert status(directory)["state"] == "finished"
        optimisation = yaml.safe_load((directory / "config.yaml").read_text())["optimisation"]
        settings[index] = (optimisation["learning_rate"], optimisation["seed"])
    assert settings == {"1": (1e-3, 42), "2": (2e-3, 7)}
    assert f"error: {lines} has no flags in line 3" in cluster.log("rates")


def test_the_tasks_of_srun_are_the_ranks_of_a_launch(cluster: Cluster, tmp_path: Path) -> None:
    argv = [sys.executable, str(TOY), *FLAGS, "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    cluster.run_command("srun", "--nodes=2", "--ntasks=3", "--quiet", *argv)  # two on one of them
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 3
    assert status(tmp_path / "run")["state"] == "finished"


def test_a_second_name_for_the_run_is_refused(cluster: Cluster) -> None:
    number = cluster.submit("single_node.sbatch", "named", str(TOY), "--output_dir", "elsewhere")
    cluster.until(lambda: cluster.job(number)["JobState"] == "FAILED", START_SECONDS, "not failed")
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert "use sbatch --job-name=NAME" in cluster.log("named")


@pytest.mark.parametrize(
    ("written", "code", "expected", "said"),
    [
        ({"state": "running", "checkpoint": "step_4"}, 137, 1, "Requeued at step 9 of RUN: it ended with 137"),
        ({"state": "failed", "checkpoint": "step_4"}, 4, 1, "Requeued at step 9 of RUN: it ended with 4"),
        (
            {"state": "stopped", "checkpoint": "step_4", "reason": "time_limit"},
            0,
            1,
            "Requeued at step 9 of RUN: its time was up",
        ),
        ({"state": "stopped", "checkpoint": "step_2", "reason": "time_limit"}, 0, 1, "error: RUN has nothing new since step_2"),
        ({"state": "running", "checkpoint": "step_2"}, 137, 137, "error: RUN has nothing new since step_2: not requeued"),
        ({"state": "stopped", "checkpoint": "step_4", "reason": "SIGTERM"}, 1, 1, ""),
        ({"state": "finished", "checkpoint": "step_4"}, 0, 0, ""),
    ],
)
def test_what_a_launch_leaves_decides_whether_its_job_is_requeued(
    written: dict[str, Any], code: int, expected: int, said: str, tmp_path: Path
) -> None:
    """Without Slurm: a command that writes a status, and a `scontrol` that writes down what it was asked for."""
    directory, asked = tmp_path / "run", tmp_path / "asked"
    directory.mkdir()
    for name, text in (("scontrol", f'echo "$@" >{asked}'), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    now = {"state": "stopped", "reason": None, "step": 9, "checkpoint": "step_2"}
    (directory / "status.json").write_text(json.dumps(now, indent=2))
    (tmp_path / "new.json").write_text(json.dumps({**now, **written}, indent=2))
    train = f"cp {tmp_path / 'new.json'} {directory / 'status.json'}; exit {code}"
    script = f"source tools/slurm/train_until_finished.sh; train_until_finished {directory} bash -c '{train}' train"
    env = environment(SLURM_JOB_ID="7", PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == expected
    assert said.replace("RUN", str(directory)) in done.stdout + done.stderr
    assert asked.exists() == said.startswith("Requeued")


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_bash_reads_every_script(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
