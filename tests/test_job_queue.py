"""A queue of commands for each device, with real processes that do next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launching import ROOT, environment

from recipes.experiments import job_queue
from recipes.experiments.job_queue import Job
from trainer.distributed.signals import leaving_at_signals
from trainer.errors import INTERRUPTED, UserError

SHELL = "/bin/sh"


def job(name: str, folder: Path, script: str) -> Job:
    """A shell script as a job that is done once there is a file `done` in its directory."""
    directory = folder / name
    return Job(name, [SHELL, "-c", script.replace("HERE", str(directory))], directory, (directory / "done").exists)


def run(jobs: list[Job], queues: int = 1, **options: object) -> tuple[dict[str, job_queue.State], list[str]]:
    messages: list[str] = []
    states = job_queue.run(jobs, [{"DEVICE": str(i)} for i in range(queues)], messages.append, **options)  # type: ignore[arg-type]
    return states, messages


def test_eight_jobs_on_three_devices_go_round(tmp_path: Path) -> None:
    script = f'echo "$DEVICE HERE" >> {tmp_path}/order; touch HERE/done'
    states, _ = run([job(f"job{i}", tmp_path, script) for i in range(8)], queues=3)
    assert set(states.values()) == {"done"}
    order: dict[str, list[str]] = {}
    for line in (tmp_path / "order").read_text().splitlines():
        device, directory = line.split()
        order.setdefault(device, []).append(directory[-1])
    assert order == {"0": ["0", "3", "6"], "1": ["1", "4", "7"], "2": ["2", "5"]}


def test_a_device_has_one_job_at_a_time_and_devices_do_not_wait_for_each_other(tmp_path: Path) -> None:
    busy = f"mkdir {tmp_path}/busy$DEVICE || exit 9; sleep SECONDS; rmdir {tmp_path}/busy$DEVICE; date +%s.%N > HERE/done"
    lengths = (0.9, 0.1, 0.1, 0.1)  # the first one keeps device 0 busy
    states, _ = run([job(str(i), tmp_path, busy.replace("SECONDS", str(s))) for i, s in enumerate(lengths)], queues=2)
    assert set(states.values()) == {"done"}
    ends = [float((tmp_path / str(i) / "done").read_text()) for i in range(4)]
    assert ends[1] < ends[3] < ends[0] < ends[2]


def test_one_failing_job_is_reported_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    fails = "echo something; echo 'error: no such thing'; exit 3"
    jobs = [job("bad", tmp_path, fails), job("good", tmp_path, "touch HERE/done"), job("idle", tmp_path, "true")]
    jobs.insert(1, Job("absent", ["/no/such/program"], tmp_path / "absent", lambda: False))
    finished: list[str] = []
    states, messages = run(jobs, on_done=lambda job: finished.append(job.name))
    assert states == {"bad": "failed", "absent": "failed", "good": "done", "idle": "stopped"}
    assert finished == ["good"]
    assert any("bad: FAILED" in line and "exit code 3" in line and "error: no such thing" in line for line in messages)
    assert (tmp_path / "bad" / "job.log").read_text() == "something\nerror: no such thing\n"
    line = job_queue.summary(states)
    assert line is not None
    for part in ("3 of 4", "2 failed (bad, absent)", "1 stopped (idle)"):
        assert part in line
    assert job_queue.summary({"good": "done"}) is None


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    script = f"echo HERE >> {tmp_path}/order; [ -e {tmp_path}/broken ] && exit 1; touch HERE/done"
    jobs = [job(f"job{i}", tmp_path, script) for i in range(3)]
    run(jobs[:1])
    (tmp_path / "broken").touch()
    assert run(jobs)[0] == {"job0": "done", "job1": "failed", "job2": "failed"}
    (tmp_path / "broken").unlink()
    finished: list[str] = []
    states, _ = run(jobs, on_done=lambda job: finished.append(job.name))
    assert set(states.values()) == {"done"}
    assert finished == ["job0", "job1", "job2"]
    assert [line[-1] for line in (tmp_path / "order").read_text().splitlines()] == ["0", "1", "2", "1", "2"]


SAVES = "trap 'touch HERE/saved; exit 0' TERM; touch HERE/begun; while true; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_running_jobs_and_nothing_is_started_after_it(number: int, tmp_path: Path) -> None:
    jobs = [job(f"job{i}", tmp_path, SAVES) for i in range(4)]

    def send() -> None:
        _wait_for(tmp_path / "job0" / "begun", tmp_path / "job1" / "begun")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    with leaving_at_signals():  # as in a command: it would end this very process
        before = signal.getsignal(number)
        thread.start()
        states, messages = run(jobs, queues=2)
        thread.join()
        assert signal.getsignal(number) == before
    assert states == {"job0": "stopped", "job1": "stopped", "job2": "not started", "job3": "not started"}
    assert (tmp_path / "job0" / "saved").exists()
    assert (tmp_path / "job1" / "saved").exists()
    assert any("asking 2 running jobs to save" in line for line in messages)


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    ignoring = "trap '' TERM INT; touch HERE/begun; echo $$ > HERE/pid; while true; do sleep 0.05; done"

    def send() -> None:
        _wait_for(tmp_path / "ignoring" / "pid")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(UserError, match="interrupted twice") as caught:
        run([job("ignoring", tmp_path, ignoring)])
    assert caught.value.exit_code == INTERRUPTED
    thread.join()
    assert not Path("/proc", (tmp_path / "ignoring" / "pid").read_text().strip()).exists()


def test_jobs_of_a_killed_driver_get_sigterm(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from recipes.experiments import job_queue
directory = Path({str(tmp_path)!r})
command = ["/bin/sh", "-c", {SAVES.replace("HERE", str(tmp_path))!r}]
job_queue.run([job_queue.Job("job", command, directory, lambda: False)], [{{}}], print)
"""
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment())
    _wait_for(tmp_path / "begun")
    driver.kill()
    driver.wait()
    _wait_for(tmp_path / "saved")


def _wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 100
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def test_queues_have_a_gpu_each_or_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    environments = job_queue.environments
    assert environments(False, None, 3, 5, {}) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert environments(True, None, 3, 5, {}) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert environments(True, 2, 3, 5, {"CUDA_VISIBLE_DEVICES": "4, 6,7"}) == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "6"},
    ]
    assert environments(False, None, 0, 5, {}) == [{"OMP_NUM_THREADS": "8"}]
    assert environments(True, None, 0, 5, {}) == [{"OMP_NUM_THREADS": "1"}] * 5
    assert environments(True, None, 0, 20, {}) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert environments(True, 3, 0, 5, {}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments(True, 9, 0, 5, {}) == [{"OMP_NUM_THREADS": "1"}] * 9
    assert environments(True, 3, 0, 5, {"OMP_NUM_THREADS": "1"}) == [{"OMP_NUM_THREADS": "1"}] * 3
    by_launcher = {"OMP_NUM_THREADS": "1", "ACCELERATE_DYNAMO_MODE": "default"}
    assert environments(True, 3, 0, 5, by_launcher) == [{"OMP_NUM_THREADS": "2"}] * 3
    for parallel, count, gpus, message in (
        (False, 2, 3, "needs --parallel"),
        (True, 4, 3, "gpus 4: there are 3 GPUs"),
        (True, 0, 3, "gpus 0"),
        (True, -1, 0, "gpus -1"),
    ):
        with pytest.raises(UserError, match=message):
            environments(parallel, count, gpus, 5, {})


def test_a_job_is_a_launch_of_its_own(tmp_path: Path) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_DYNAMO_MODE": "no"}
    kept = {"PATH": "/bin", "ACCELERATE_MIXED_PRECISION": "bf16", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "3"}
    assert job_queue.without_launcher(launched | kept) == kept


def test_only_the_error_of_this_start_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "job.log").write_text("error: the disk was full then\n")
    _, messages = run([job("bad", tmp_path, "echo 'a new bug'; exit 1")])
    assert any("exit code 1: a new bug" in line for line in messages)
    assert not any("disk" in line for line in messages)


def test_a_job_that_cannot_save_on_sigterm_has_failed(tmp_path: Path) -> None:
    script = "trap 'echo \"error: no space left\"; exit 5' TERM; touch HERE/begun; while true; do sleep 0.05; done"

    def send() -> None:
        _wait_for(tmp_path / "full" / "begun")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    states, messages = run([job("full", tmp_path, script)])
    thread.join()
    assert states == {"full": "failed"}
    assert any("exit code 5: error: no space left" in line for line in messages)


def test_a_job_keeps_the_users_variables_and_loses_the_launchers() -> None:
    given = {"LOCAL_SCRATCH": "/nvme", "MASTER_KEY": "x", "LOCAL_RANK": "1", "PET_RDZV": "y", "ACCELERATE_USE_CPU": "true"}
    assert job_queue.without_launcher(given).keys() == {"LOCAL_SCRATCH", "MASTER_KEY", "ACCELERATE_USE_CPU"}
