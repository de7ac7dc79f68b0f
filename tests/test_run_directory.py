import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.errors import BAD_INPUT, CHECKPOINT, UserError
from trainer.reporting import lock as locking
from trainer.reporting import run_directory
from trainer.reporting.lock import Lock
from trainer.reporting.run_directory import RunDirectory, write_text_atomic

HOLD = """
import sys, time
from pathlib import Path
from trainer.reporting.lock import Lock
Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(path: Path, age: float, **changes: object) -> None:
    """A lock file as a run on another machine leaves it."""
    content = {"host": "node7", "machine": "other", "pid": 4711, "job_id": "12", "started": "2024-05-01T10:00:00+00:00"}
    (path / ".lock").write_text(json.dumps({**content, "heartbeat": int(time.time() - age), **changes}))


def test_a_second_process_is_refused_and_the_holder_is_named(tmp_path: Path, holder: subprocess.Popen) -> None:
    for _ in range(2):  # being refused does not harm the holder's lock
        with pytest.raises(UserError, match=rf"process {holder.pid} on .*started 20.*--run_name") as refused:
            Lock(tmp_path).acquire()
        assert refused.value.exit_code == BAD_INPUT


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    messages: list[str] = []
    lock = Lock(tmp_path, messages.append)
    lock.acquire()
    lock.release()
    assert len(messages) == 1
    assert f"process {holder.pid}" in messages[0]


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As a DataLoader worker that outlives its killed trainer for a moment."""
    script = HOLD.replace("time.sleep(60)", "import os\nchild = os.fork()\nif child: print(child, flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)  # it lives, with the descriptor open
        lock = Lock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_cannot_hold_it_twice_and_trying_does_not_drop_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            Lock(tmp_path / ".." / tmp_path.name).acquire()
        tried = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()}" in tried.stderr
    finally:
        lock.release()


def test_release_leaves_no_stale_name_and_lets_the_next_in(tmp_path: Path) -> None:
    messages: list[str] = []
    for _ in range(2):
        lock = Lock(tmp_path, messages.append)
        lock.acquire()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        lock.release()
        assert (tmp_path / ".lock").read_bytes() == b""
        lock.release()  # twice is no error
    assert messages == []


def test_heartbeat_of_another_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is watched: moving, it is the proof of life that no clock is."""
    messages: list[str] = []
    monkeypatch.setattr(locking, "WATCH_SECONDS", 0.01)
    moving = threading.Timer(0.3, lambda: elsewhere(tmp_path, age=59))
    elsewhere(tmp_path, age=60)
    moving.start()
    with pytest.raises(UserError, match=r"process 4711 on node7, job 12, started 2024.*last seen [56]\d s ago"):
        Lock(tmp_path, messages.append).acquire()
    moving.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 4711
    assert re.match(r"Waiting, (59|60) s at most, for a sign of life of process 4711 on node7", messages[0])
    # Silent, or from a clock that is ahead: until it would be stale. Silent for longer, or released meanwhile: no more.
    for age, wait, stale in ((117, True, 120), (-300, True, 1), (121, False, 120)):
        monkeypatch.setattr(locking, "STALE_SECONDS", stale)
        elsewhere(tmp_path, age=age)
        said: list[str] = []
        lock = Lock(tmp_path, said.append)
        lock.acquire()
        lock.release()
        assert [line.split(",")[0].split()[0] for line in said] == ["Waiting", "taking"][not wait :]
        assert "node7" in said[-1]
    # Without locks in the kernel the heartbeat decides on one machine too.
    monkeypatch.setattr(locking.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks")))
    elsewhere(tmp_path, age=0, machine=locking._machine())
    released = threading.Timer(0.3, lambda: (tmp_path / ".lock").write_text(""))
    released.start()
    monkeypatch.setattr(locking, "STALE_SECONDS", 120)
    lock = Lock(tmp_path, messages.append)
    lock.acquire()
    lock.release()
    released.join()


def test_launches_that_get_no_further_are_counted_and_the_third_restart_refused(tmp_path: Path) -> None:
    def begin(step: int, restarted: bool) -> int:
        run = RunDirectory(tmp_path)
        run.begin(step, restarted)
        run.write_status("running", None, step)
        return json.loads(run.status.read_text())["standstills"]

    assert [begin(0, False), begin(0, True), begin(0, True)] == [0, 1, 2]
    assert [begin(4, True), begin(4, True), begin(4, True)] == [0, 1, 2]
    assert begin(4, False) == 0  # a person has
    assert [begin(4, True), begin(4, True)] == [1, 2]
    RunDirectory(tmp_path).write_status("failed", "rank 1: no memory", 5)
    assert begin(4, True) == 0  # written by a launch that had not begun: nothing is known
    for _ in range(2):
        begin(4, True)
    again = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="3 launches in a row saved nothing after step 4; the last one ended so: it was killed"):
        again.begin(4, True)
    with pytest.raises(UserError, match="4 launches in a row"):
        RunDirectory(tmp_path).begin(4, True)
    (tmp_path / "status.json").write_text("[]")
    assert begin(4, True) == 0


def test_heartbeat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "HEARTBEAT_SECONDS", 0.1)
    lock = Lock(tmp_path)
    lock.acquire()
    os.pwrite(lock._descriptor, b"x" * 500, 0)
    began, deadline = time.time(), time.monotonic() + 60
    while b"x" in os.pread(lock._descriptor, 500, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    content = json.loads(os.pread(lock._descriptor, 500, 0))
    lock.release()
    assert int(began) <= content["heartbeat"] <= time.time()
    time.sleep(0.3)
    assert (tmp_path / ".lock").read_bytes() == b""  # it ended with the lock


@pytest.mark.parametrize("odd", ["link", "hard link", "fifo", "folder", "no directory"])
def test_odd_lock_file_is_refused_and_nothing_outside_is_written(tmp_path: Path, odd: str) -> None:
    outside, directory = tmp_path / "outside", tmp_path / "run"
    outside.write_text("precious")
    if odd != "no directory":
        directory.mkdir()
    make = {
        "link": lambda lock: lock.symlink_to(outside),
        "hard link": lambda lock: lock.hardlink_to(outside),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "no directory": lambda lock: None,
    }
    make[odd](directory / ".lock")
    threads = threading.active_count()
    with pytest.raises(UserError, match=r"\.lock") as refused:
        Lock(directory).acquire()
    assert refused.value.exit_code == CHECKPOINT
    assert outside.read_text() == "precious"
    assert threading.active_count() == threads


def test_garbage_in_the_lock_file_is_not_a_holder(tmp_path: Path) -> None:
    for garbage in (b"\xff\x00", b"[1]", b'{"heartbeat": "soon"}', b'{"pid": 1', b"[" * 4096, b'{"a":' * 800):
        (tmp_path / ".lock").write_bytes(garbage)
        lock = Lock(tmp_path)
        lock.acquire()
        lock.release()


def test_files_of_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "run", tmp_path / "big")
    run.prepare(print)
    assert run.checkpoints == tmp_path / "big"
    assert run.checkpoints.is_dir()
    run.release()
    assert [*run.path.iterdir(), *run.checkpoints.iterdir()] == [run.path / ".lock", run.checkpoints / ".lock"]

    run.write_command(["train.py", "--run_name", "two words", "--hf_token", "hunter2"])
    run.write_command(["train.py"])
    assert run.command.read_text() == "train.py --run_name 'two words' --hf_token '***'\ntrain.py\n"

    assert run.write_status("stopped", "SIGTERM", 12, run.checkpoints / "checkpoint_step_12")
    status = json.loads(run.status.read_text())
    assert (status["state"], status["reason"], status["step"], status["pid"]) == ("stopped", "SIGTERM", 12, os.getpid())
    assert status["checkpoint"].endswith("checkpoint_step_12")
    assert set(status) == {"state", "reason", "step", "checkpoint", "time", "pid", "host"}

    run.write_environment({"world_size": 2, "path": tmp_path, "url": "http://u:hunter2@h"})
    environment = json.loads(run.environment.read_text())
    assert environment["world_size"] == 2
    assert environment["path"] == str(tmp_path)
    assert environment["torch"]
    assert "hunter2" not in "".join(file.read_text() for file in run.path.iterdir())


def test_an_unused_directory_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run = RunDirectory(tmp_path / "runs" / "toy" / "run", tmp_path / "big" / "checkpoints")
    run.prepare(print)
    run.release(used=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    assert list((tmp_path / "runs").iterdir()) == []

    (tmp_path / "link").symlink_to("runs")
    linked = RunDirectory(tmp_path / "link" / "toy" / "run")
    linked.prepare(print)
    linked.release(used=False)
    assert list((tmp_path / "runs").iterdir()) == []

    run.prepare(print)
    (run.checkpoints / "precious").write_text("mine")
    run.release(used=False)
    assert not (tmp_path / "runs" / "toy").exists()
    assert (run.checkpoints / "precious").read_text() == "mine"

    for used in (True, False):  # a directory that was there before stays
        again = RunDirectory(run.checkpoints)
        again.prepare(print)
        again.release(used)
        assert (run.checkpoints / ".lock").read_bytes() == b""


def test_whoever_gets_no_lock_removes_nothing(tmp_path: Path, holder: subprocess.Popen) -> None:
    """The folders may be those of a run that was faster. Nor does it leave any."""
    run = RunDirectory(tmp_path, tmp_path / "big")
    run._made.append(tmp_path)  # as if it had been made by us a moment before the holder locked it
    with pytest.raises(UserError, match="in use"):
        run.prepare(print)
    run.release(used=False)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run = RunDirectory(tmp_path / "other", tmp_path)
    with pytest.raises(UserError, match="in use"):
        run.prepare(print)
    run.release(used=False)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_file_that_is_removed_in_this_moment_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def removed_first(descriptor: int) -> str:
        (tmp_path / ".lock").unlink()
        return kernel(descriptor)

    kernel = locking._record_lock
    monkeypatch.setattr(locking, "_record_lock", removed_first)
    with pytest.raises(UserError, match="try again"):
        Lock(tmp_path).acquire()


def test_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for run, flag in (
        (RunDirectory(blocked / "run"), "--output_dir"),
        (RunDirectory(tmp_path / "run", blocked), "--checkpoint_dir"),
    ):
        with pytest.raises(UserError, match=f"{blocked}.*{flag}") as refused:
            run.prepare(print)
        assert refused.value.exit_code == CHECKPOINT
        run.release()
    run = RunDirectory(tmp_path / "run2")
    run.path.mkdir()
    run.checkpoints.write_text("")
    with pytest.raises(UserError, match=r"checkpoints.*--output_dir"):
        run.prepare(print)
    run.release()


def test_a_link_to_nowhere_is_named_with_its_target(tmp_path: Path) -> None:
    """A scratch disk that is not mounted: to make the folder would fill the disk below the mount point."""
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "runs")
    (tmp_path / "loop").symlink_to("loop")
    for path, flag in ((tmp_path / "link", "--output_dir"), (tmp_path / "link" / "deeper", "--output_dir")):
        with pytest.raises(UserError, match=f"{tmp_path}/link is a link to {tmp_path}/scratch/runs.*{flag}") as refused:
            RunDirectory(path).prepare(print)
        assert refused.value.exit_code == CHECKPOINT
    run = RunDirectory(tmp_path / "run", tmp_path / "link")
    with pytest.raises(UserError, match=r"link is a link.*--checkpoint_dir"):
        run.prepare(print)
    run.release()
    with pytest.raises(UserError, match=r"loop is a link.*--output_dir"):
        RunDirectory(tmp_path / "loop").prepare(print)
    assert not (tmp_path / "scratch").exists()


def test_a_folder_whose_name_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    """safetensors writes there, and does not read it again."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    for run, flag in ((RunDirectory(odd), "--output_dir"), (RunDirectory(tmp_path / "run", odd), "--checkpoint_dir")):
        with pytest.raises(UserError, match=rf"caf\\udce9.* is not UTF-8; choose another folder with {flag}") as refused:
            run.prepare(print)
        assert refused.value.exit_code == CHECKPOINT
        run.release()
    assert not odd.exists()


def test_a_pipe_or_folder_in_place_of_a_file_is_refused_instead_of_waiting_for_a_reader(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    os.mkfifo(run.command)
    with pytest.raises(UserError, match=r"command.txt is not an ordinary file.*--output_dir") as refused:
        run.prepare(print)
    assert refused.value.exit_code == CHECKPOINT
    run.release()
    run.command.unlink()
    run.status.mkdir()
    with pytest.raises(UserError, match=r"status.json is not an ordinary file"):
        run.prepare(print)
    run.release()
    run.status.rmdir()
    run.log.symlink_to("/dev/null")
    run.prepare(print)
    run.release()


def test_atomic_write_respects_the_umask_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, outside = tmp_path / "status.json", tmp_path / "outside"
    outside.write_text("precious")
    target.symlink_to(outside)
    umask = os.umask(0o027)
    try:
        write_text_atomic(target, "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.lstat().st_mode) == 0o640
    assert (target.read_text(), outside.read_text()) == ("new", "precious")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(target, "newer")
    assert target.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [outside, target]
    assert RunDirectory(tmp_path).write_status("failed") is False


def test_checkpoints_may_lie_in_the_run_directory_itself(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", tmp_path / "run")
    directory.prepare(print)
    directory.release()
