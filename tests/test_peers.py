"""Faults in one of two processes: all end the same way, the failing one is named, no good checkpoint is lost, none hangs."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launching import FAULTY, Started, command, environment, free_port
from scenarios import Finished, launch

from trainer.data.stream import sample_numbers
from trainer.distributed import peers, rendezvous
from trainer.distributed.rendezvous import Rendezvous
from trainer.distributed.signals import stat_fields
from trainer.errors import BAD_INPUT, CHECKPOINT, LOST, OUT_OF_MEMORY, UserError

RECIPE = "faulty_recipe:FaultyRecipe"
STEPS = 6
COMMON = ["--batch_size", "4", "--gradient_accumulation_steps", "1", "--max_steps", str(STEPS), "--learning_rate", "1e-2"]
COMMON += ["--warmup_steps", "0", "--save_every", "1", "--keep_last", "0", "--no_use_tensorboard"]
# No labels for rank 1 at step 2, and for no rank at step 4.
UNLABELLED = [str(number) for number in sample_numbers([6, 7, 12, 13, 14, 15], 42, 64)]
# Met in steps 3 and 5, each by another rank.
DAMAGED = [str(sample_numbers([position], 42, 64)[0]) for position in (8, 19)]
RUNS = {
    "data": ["--fault", "data", "--save_every", "0"],
    "evaluation data": ["--fault", "evaluation data", "--save_every", "0", "--eval_every", "2"],
    "skip": ["--bad_samples", "skip", "--damaged_rows", *DAMAGED],
    "order": ["--fault", "order"],
    "clock": ["--fault", "clock", "--max_training_hours", "0.5", "--save_every", "0"],
    "unlabelled": ["--unlabelled", *UNLABELLED],
    # Last: the limit on the size of files stays.
    "disk": ["--fault", "disk", "--width", "256"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Finished]]:
    """{backend: {fault: run}}, one launch for each backend."""
    runs = {name: (RECIPE, [*COMMON, *flags]) for name, flags in RUNS.items()}
    runs_by_kind = {kind: launch(kind, runs, tmp_path_factory.mktemp(kind)) for kind in ("ddp", "zero3")}
    alone = {name: (RECIPE, [*COMMON, *RUNS[name]]) for name in ("unlabelled", "skip")}
    return {**runs_by_kind, "one": launch("one", alone, tmp_path_factory.mktemp("one"))}


BACKENDS = pytest.mark.parametrize("kind", ["ddp", "zero3"])


def outcome(run: Finished) -> dict[str, object]:
    """How it ended, which is the same on both ranks."""
    first, second = run.outcomes
    assert first == second
    return first


@BACKENDS
def test_an_error_in_one_ranks_data_is_the_one_shown(kind: str, finished: dict[str, dict[str, Finished]]) -> None:
    ended = outcome(finished[kind]["data"])
    assert ended["exit_code"] == BAD_INPUT
    message = "reading data failed on rank 1: OSError: row 7 of shard 2 is damaged. Step 2 is saved; the same command goes on"
    assert str(ended["message"]).startswith(message)
    for way in ("--bad_samples skip", "--data_changed accept"):
        assert way in str(ended["message"])
    assert finished[kind]["data"].steps() == [2]  # though no save was due
    status = json.loads((finished[kind]["data"].path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", ended["message"])


@BACKENDS
def test_bad_data_in_an_evaluation_cost_no_step_either(kind: str, finished: dict[str, dict[str, Finished]]) -> None:
    ended = outcome(finished[kind]["evaluation data"])
    assert ended["exit_code"] == BAD_INPUT
    assert "rank 1: OSError: row 7 of shard 2 is damaged. Step 2 is saved" in str(ended["message"])
    assert finished[kind]["evaluation data"].steps() == [2]


@BACKENDS
def test_skipped_samples_are_the_same_under_every_launch_counted_and_named(
    kind: str, finished: dict[str, dict[str, Finished]]
) -> None:
    run, alone = finished[kind]["skip"], finished["one"]["skip"]
    assert outcome(run)["reason"] == "last step"
    for step, loss in alone.curve("train/loss").items():
        assert run.curve("train/loss")[step] == pytest.approx(loss, rel=1e-5)
    assert run.curve("train/replaced_samples") == alone.curve("train/replaced_samples") == {3: 1, 4: 1, 5: 2, 6: 2}
    log = (run.path / "train.log").read_text()
    for step, row, total in ((3, DAMAGED[0], 1), (5, DAMAGED[1], 2)):
        line = rf"WARNING: step {step} takes the next readable sample instead of these \({total} replaced so far in this run\):"
        assert re.search(rf"{line}\nsample {row}: row {row} is damaged\n", log)
    state = json.loads((run.path / "checkpoints" / f"checkpoint_step_{STEPS}" / "trainer_state.json").read_text())
    assert state["train_state"]["replaced_samples"] == 2


@BACKENDS
def test_parameters_in_another_order_on_one_rank_are_refused(kind: str, finished: dict[str, dict[str, Finished]]) -> None:
    """Their gradients would be added up crosswise."""
    ended = outcome(finished[kind]["order"])
    assert ended["exit_code"] == BAD_INPUT
    assert str(ended["message"]).startswith("rank 1 built another model")
    assert finished[kind]["order"].steps() == []


@BACKENDS
def test_a_clock_that_is_wrong_on_one_rank_makes_one_decision_and_one_save(
    kind: str, finished: dict[str, dict[str, Finished]]
) -> None:
    run = finished[kind]["clock"]
    assert outcome(run)["reason"] == "time_limit"
    assert len(run.steps()) == 1
    assert os.readlink(run.path / "checkpoints" / "checkpoint_time_limit") == f"checkpoint_step_{run.steps()[0]}"


@BACKENDS
def test_a_batch_without_any_label_is_no_nan(kind: str, finished: dict[str, dict[str, Finished]]) -> None:
    run, alone = finished[kind]["unlabelled"], finished["one"]["unlabelled"]
    assert outcome(run)["reason"] == "last step"
    losses = run.curve("train/loss")
    assert losses[4] == 0
    assert run.curve("train/bad_steps")[STEPS] == 0
    for step, loss in alone.curve("train/loss").items():
        assert loss is not None
        assert math.isfinite(loss)
        assert losses[step] == pytest.approx(loss, rel=1e-5)


@BACKENDS
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_good_ones_stay(
    kind: str, finished: dict[str, dict[str, Finished]]
) -> None:
    """From step 3 on rank 1, whose file is the optimizer's, can write no more: training goes on, until the save at the end."""
    run = finished[kind]["disk"]
    ended = outcome(run)
    assert ended["exit_code"] == CHECKPOINT
    assert f"checkpoint_step_{STEPS} could not be written: rank 1: [Errno 27] File too large" in str(ended["message"])
    saved = run.steps()
    assert saved in ([1, 2], [1])  # the save of step 2 may be under way at step 3
    assert not list((run.path / "checkpoints").glob(".unfinished-*"))
    log = run.path.parent / "log.txt"
    warned = re.findall(r"WARNING: checkpoint \S+_(\d) could not be written.*Training goes on", log.read_text())
    assert warned == [str(step) for step in range(saved[-1] + 1, STEPS)]


def started(kind: str, directory: Path, *flags: str) -> Started:
    argv = [*COMMON, "--max_steps", "1000000", "--save_every", "50", "--keep_last", "2", "--log_every", "10", *flags]
    return Started(command(kind, FAULTY, *argv, "--output_dir", str(directory)), directory.with_suffix(".log"))


def ended(process: Started, seconds: float) -> str:
    """The output of a launch that fails by itself and leaves no process."""
    try:
        assert process.wait(timeout=seconds) != 0
        assert process.orphans(10) == []
    finally:
        process.kill_all()
    return process.log.read_text(errors="replace")


@pytest.mark.parametrize("fault", ["memory", "bug"])
def test_one_rank_fails_and_all_end_with_its_message_and_status(fault: str, tmp_path: Path) -> None:
    """Out of memory: one message for the launch, with the arithmetic and the remedies. A bug: one traceback."""
    kind = "ddp" if fault == "memory" else "zero3"
    directory = tmp_path / "run"
    output = ended(started(kind, directory, "--fault", fault), 90)
    status = json.loads((directory / "status.json").read_text())
    assert status["state"] == "failed"
    ours = output.partition("elastic")[0]  # the launcher adds its own report
    if fault == "memory":
        message = "out of memory with batch_size 4 x 1 accumulation = 4 samples a step; try, in this order: half --batch_size"
        assert re.findall("^error: .*", ours, re.MULTILINE) == [f"error: {status['reason'].removeprefix('rank 1: ')}"]
        assert f"rank 1: {message}" in status["reason"]
        remedies = ["--gradient_accumulation_steps", "shorter", "--gradient_checkpointing", "expandable_segments:True"]
        assert [part for part in remedies if part in status["reason"]] == remedies
        assert set(re.findall(r"exitcode *: (-?\d+)", output)) == {str(OUT_OF_MEMORY)}
        assert "Traceback" not in ours
    else:
        assert status["reason"] == "rank 1: KeyError: 'weights_of_nothing'"
        assert ours.count("Traceback") == 1
        assert "error: " not in ours


def test_a_rank_that_hangs_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = started("ddp", directory, "--timeout_minutes", "0.1")
    try:
        deadline = time.monotonic() + 200
        while "Step     50" not in process.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        hung = process.rank(1)
        os.kill(hung, signal.SIGSTOP)
        since = time.monotonic()
        while json.loads((directory / "status.json").read_text())["state"] == "running" and time.monotonic() < since + 200:
            time.sleep(0.05)
        assert time.monotonic() - since > 4  # six seconds, but for what it had waited before: no other reason ended it
        os.kill(hung, signal.SIGKILL)  # as torchrun does 30 s after the other has failed
        output = ended(process, 30)
    finally:
        process.kill_all()
    status = json.loads((directory / "status.json").read_text())
    assert status["state"] == "failed"
    assert "rank 1 of 2 gave no answer: killed, or hung" in status["reason"]
    assert f"error: {status['reason']}" in output
    assert "same command" in output


def test_a_stop_is_obeyed_though_the_data_workers_hang(tmp_path: Path) -> None:
    """As they do where the server of their files is gone."""
    directory = tmp_path / "run"
    process = started("one", directory, "--num_workers", "2")
    try:
        deadline = time.monotonic() + 100
        while "Step     50" not in process.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        family = [pid for pid in process.family() if pid != process.pid]
        workers = [pid for pid in family if int(stat_fields(pid)[1]) != process.pid]  # children of the fork server
        assert len(workers) >= 2
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.orphans(10) == []
    finally:
        process.kill_all()
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert (Path(status["checkpoint"]) / "manifest.json").is_file()


class Cut:
    """A store behind a cut cable."""

    def set(self, *_: object) -> None:
        threading.Event().wait()


@pytest.mark.timeout(60)
def test_a_store_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.2)
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41234")
    cause = peers.root_cause(broken, 0, 2, Cut())  # comes back, though the store never does
    assert isinstance(cause, UserError)
    assert "the first host gives no answer" in str(cause)
    assert not cause.printed_by_other_rank
    assert peers.root_cause(broken, 0, 1, None) is broken
    error = UserError("all know", known_to_all=True)
    assert peers.root_cause(error, 0, 2, Cut()) is error


def test_a_rank_that_never_starts_is_named_without_a_launcher_to_watch(tmp_path: Path) -> None:
    """Started by hand: rank 0 holds the store, and waits for rank 1."""
    by_hand = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    argv = [*COMMON, "--device", "cpu", "--timeout_minutes", "0.01", "--output_dir", str(tmp_path / "run")]
    output = ended(Started(command("one", FAULTY, *argv), tmp_path / "log.txt", by_hand), 60)
    expected = "error: rank 1 of 2 gave no answer: killed, or hung; the same command goes on from the newest checkpoint"
    assert output.splitlines() == [f"{expected} (not started within --timeout_minutes 0.01)"]


def test_a_rank_that_writes_elsewhere_is_refused_at_its_start(tmp_path: Path) -> None:
    """As on a host where the run directory is on a disk of its own."""
    elsewhere = f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", elsewhere, "sh", "true"], capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    argv = command("one", FAULTY, *COMMON, "--device", "cpu", "--output_dir", str(tmp_path / "run"))
    other = Started(["unshare", "-rm", "sh", "-c", elsewhere, "sh", *argv], tmp_path / "1.txt", ranks[1])
    try:
        output = ended(Started(argv, tmp_path / "0.txt", ranks[0]), 100)
        assert other.wait(timeout=60) == CHECKPOINT
    finally:
        other.kill_all()
    assert "error: rank 1 on " in output
    assert f"cannot write where rank 0 does, {tmp_path / 'run' / 'checkpoints'}: " in output
    assert "a file system that all hosts share" in output
    assert not (tmp_path / "run").exists()  # a refused start leaves nothing


def meet(rank: int, port: int, host: str = "127.0.0.1", processes: int = 2, seconds: float = 20.0) -> Rendezvous:
    """Of a rank that is started by hand."""
    environ = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    meeting = rendezvous.meet(environ, timedelta(seconds=seconds))
    assert meeting is not None
    return meeting


def together(*meetings: Rendezvous) -> list[Rendezvous]:
    """What each has once all are there."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda each: peers.wait_for_all(each, timedelta(seconds=20)), meetings))


def test_the_store_of_rank_0_listens_on_the_given_address_alone() -> None:
    port = free_port()
    first, second = meet(0, port), meet(1, port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)  # this host too, and what a name or 0.0.0.0 would answer on
    assert not together(first, second)[0].restarted
    with pytest.raises(UserError, match="RANK=1 was given to two processes"):
        peers.wait_for_all(second, timedelta(seconds=1))
    with pytest.raises(UserError, match=rf"MASTER_PORT {port} on 127.0.0.1: .*another free port"):
        meet(0, port)


def test_what_ends_one_rank_at_its_start_is_what_the_others_report() -> None:
    port = free_port()
    first, second, third = together(*(meet(rank, port, processes=3) for rank in range(3)))
    with pytest.raises(UserError, match="no GPU here"), peers.explained(second):
        raise UserError("no GPU here")
    for other in (first, third):
        with pytest.raises(UserError, match="rank 1: no GPU here") as caught, peers.explained(other):
            raise RuntimeError("connection closed")
        assert caught.value.printed_by_other_rank
        assert caught.value.exit_code == BAD_INPUT


def test_a_restart_meets_anew_whatever_is_left_in_the_store_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a host, which counts the restarts for itself, has counted another number of them."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    port = free_port()
    first, second = meet(0, port), meet(1, port)
    before = together(first, second)
    before[0].store.set("left", "over")
    again = together(first, second)
    assert again[0].restarted
    assert not again[0].store.check(["left"])
    with ThreadPoolExecutor() as threads:  # one is early, and answers the call of the start before
        early = threads.submit(peers.wait_for_all, second, timedelta(seconds=20))
        time.sleep(0.5)
        peers.wait_for_all(first, timedelta(seconds=20)).store.set("key", "value")
        assert early.result().store.get("key") == b"value"


def test_who_is_missing_is_known_to_all_who_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PAUSES_SECONDS", (0.1,))
    port = free_port()
    here = [meet(rank, port, processes=4) for rank in (0, 2)]
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(peers.wait_for_all, each, timedelta(seconds=0.5)) for each in here]
        for each in waiting:
            with pytest.raises(UserError, match=r"^ranks 1, 3 of 4 gave no answer: .*not started within") as caught:
                each.result()
            assert caught.value.known_to_all  # so that one of them prints it
            assert caught.value.exit_code == LOST


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "2"}, "RANK is 2; give a whole number from 0 to 1"),
        ({"RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; give a whole number from 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "rank 0: no answer from no-such-host.invalid"),
        ({"RANK": "1"}, "rank 1: no answer from 127.0.0.1:.*within --timeout_minutes 0.0"),
    ],
)
def test_an_environment_that_leads_nowhere_is_one_line(changed: dict[str, str], message: str) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **changed}
    with pytest.raises(UserError, match=message) as caught:
        rendezvous.meet(environ, timedelta(seconds=0.6))
    assert "\n" not in str(caught.value)


def test_a_process_alone_needs_no_store() -> None:
    assert rendezvous.meet({}, timedelta(seconds=1)) is None
    assert rendezvous.meet({"WORLD_SIZE": "1", "RANK": "0"}, timedelta(seconds=1)) is None


class Counting:
    """A store that counts requests and the keys they name."""

    def __init__(self, store: Any) -> None:
        self.store, self.keys = store, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*arguments: Any) -> Any:
            self.keys += len(arguments[0]) if isinstance(arguments[0], list) else 1
            return getattr(self.store, name)(*arguments)

        return request


def test_of_many_ranks_that_lose_one_each_asks_for_little_and_none_is_named_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 2.0)
    server = dist.TCPStore("127.0.0.1", free_port(), None, True, wait_for_workers=False)
    stores = [Counting(dist.PrefixStore("round", server)) for _ in range(64)]
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41234")
    with ThreadPoolExecutor(64) as threads:
        causes = list(threads.map(lambda rank: peers.root_cause(broken, rank, 64, stores[rank]), range(63)))
    assert all("rank 63 of 64 gave no answer" in str(cause) for cause in causes)
    assert sum(getattr(cause, "printed_by_other_rank", False) for cause in causes) == 62
    assert sorted(store.keys for store in stores)[-2] < 20  # one of them has looked for all
