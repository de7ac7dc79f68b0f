"""Several hosts: two network namespaces joined by a cable that can be cut. Nothing but the run directory is shared."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_injector import curve, reached, rows
from launching import ROOT, Started, environment, run

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.reporting.run_directory import write_text_atomic

TOY = ROOT / "tests" / "toy_recipe.py"
KINDS = ("multi_node_ddp", "multi_node_zero3")
STEPS, CUT_AT = 30, 10
TIMEOUT_MINUTES = 0.1
RUN = ["--device", "cpu", "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--warmup_steps", "4"]
RUN += ["--batch_size", "4", "--gradient_accumulation_steps", "2", "--save_every", "4"]
RUN += ["--timeout_minutes", str(TIMEOUT_MINUTES)]
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True, timeout=30)


class Hosts:
    """Two hosts whose own name, as on many real ones, stands for loopback."""

    def __init__(self) -> None:
        self.names = [f"samecurve-{uuid.uuid4().hex[:8]}-{number}" for number in (0, 1)]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("netns", "exec", name, "true")
        first, second = self.names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def cable(self, state: str) -> None:
        """`up`, or `down` at one end, which cuts it for both."""
        ip("-n", self.names[0], "link", "set", "cable", state)

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.SubprocessError, FileNotFoundError):
                ip("netns", "delete", name)

    def launch(self, kind: str, directory: Path, restarts: int = 0, ranks: tuple[int, ...] = (0, 1)) -> list[Started]:
        """The same command on each, but for --machine_rank."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{kind}.yaml"]
        launcher += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", ADDRESSES[0]]
        launcher += ["--main_process_port", str(29500 + KINDS.index(kind))]
        launcher += ["--max_restarts", str(restarts)]
        argv = [str(TOY), *RUN, "--output_dir", str(directory)]
        env = {
            k: v
            for k, v in environment(TOY_PACE=str(directory.with_suffix(".pace"))).items()
            if k not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        }
        return [
            Started(
                ["ip", "netns", "exec", self.names[rank], *launcher, "--machine_rank", str(rank), *argv],
                directory.with_suffix(f".{rank}.log"),
                env,
            )
            for rank in ranks
        ]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    new_hosts = Hosts()
    try:
        new_hosts.build()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        new_hosts.remove()
        pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
    yield new_hosts
    new_hosts.remove()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[float, float]]:
    """The curve of the same run in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone")
    run("one", TOY, *RUN, "--output_dir", str(folder / "run"), log=folder / "log")
    return curve(folder / "run")


def set_pace(directory: Path, seconds: float) -> None:
    """How long reading a micro-batch takes in this run, from now on."""
    write_text_atomic(directory.with_suffix(".pace"), str(seconds))


def wait(launches: list[Started], seconds: float) -> list[int]:
    """The exit statuses; nothing of the launches is left."""
    end = time.monotonic() + seconds
    try:
        codes = [each.wait(timeout=max(0.1, end - time.monotonic())) for each in launches]
        assert not [pid for each in launches for pid in each.orphans(5)]
        return codes
    except subprocess.TimeoutExpired:
        output = "\n".join(each.log.read_text(errors="replace")[-3000:] for each in launches)
        raise AssertionError(f"not ended within {seconds} s:\n{output}") from None
    finally:
        for each in launches:
            each.kill_all()


@dataclass
class Cut:
    """A run whose hosts lost each other: what its launchers gave, its status, and the checkpoints it left."""

    directory: Path
    codes: list[int]
    logs: list[str]
    status: dict[str, Any]
    saved: list[Path]


@pytest.fixture(scope="module")
def cut(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cut]:
    """Both kinds of launch side by side on the two hosts, cut off once, in mid-training."""
    folder = tmp_path_factory.mktemp("cut")
    launches: dict[str, list[Started]] = {}
    try:
        for kind in reversed(KINDS):  # DeepSpeed takes longer to start
            set_pace(folder / kind, 0.1)
            launches[kind] = hosts.launch(kind, folder / kind)
        processes = [each for pair in launches.values() for each in pair]
        end, waiting = time.monotonic() + 150, set(KINDS)
        while waiting:
            for kind in [kind for kind in waiting if reached(CUT_AT)(folder / kind, 0.0)]:
                set_pace(folder / kind, 2.0)  # it must not finish before the cable is cut
                waiting.remove(kind)
            for each in processes:
                assert each.poll() is None, each.log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < end, "no training"
            time.sleep(0.02)
        hosts.cable("down")
        since = time.monotonic()
        # The time-out, the look around for who is gone, and the launchers' own leaving.
        wait(processes, 60 * TIMEOUT_MINUTES + 40)
        assert time.monotonic() - since >= 60 * TIMEOUT_MINUTES, "something else than the cut cable ended them"
    finally:
        for each in (each for pair in launches.values() for each in pair):
            each.kill_all()
        hosts.cable("up")
    cuts = {}
    for kind, pair in launches.items():
        checkpoints = folder / kind / "checkpoints"
        cuts[kind] = Cut(
            folder / kind,
            [each.returncode for each in pair],
            [each.log.read_text() for each in pair],
            json.loads((folder / kind / "status.json").read_text()),
            [path for path in checkpoints.glob("checkpoint_step_*") if not path.is_symlink()],
        )
    return cuts


@pytest.fixture(scope="module")
def resumed(hosts: Hosts, cut: dict[str, Cut]) -> dict[str, list[int]]:
    """The same commands again, with the cable whole: their exit statuses.

    Under DDP the second host dies once more, and another one takes its place; nobody touches the first.
    """
    for kind in KINDS:
        set_pace(cut[kind].directory, 0.0 if kind != "multi_node_ddp" else 0.2)
    since = time.time()
    launches = {kind: hosts.launch(kind, cut[kind].directory, restarts=3) for kind in KINDS}
    pair, directory = launches["multi_node_ddp"], cut["multi_node_ddp"].directory
    try:
        end = time.monotonic() + 150
        while not rows(directory, since):
            assert time.monotonic() < end, pair[0].log.read_text(errors="replace")[-3000:]
            time.sleep(0.02)
        pair[1].kill_all()
        set_pace(directory, 0.0)
        pair[1:] = hosts.launch("multi_node_ddp", directory, restarts=3, ranks=(1,))
    finally:
        wait([each for pair in launches.values() for each in pair], 240)
    return {kind: [each.returncode for each in pair] for kind, pair in launches.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_cable_ends_both_hosts_and_they_report_why(kind: str, cut: dict[str, Cut]) -> None:
    run = cut[kind]
    assert all(run.codes), run.codes
    assert run.status["state"] == "failed"
    assert "rank 1 of 2 gave no answer" in run.status["reason"]
    assert "error: rank 1 of 2 gave no answer" in run.logs[0]
    assert "error: the first host " in run.logs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cut_cable_leaves_under_a_checkpoints_name_is_whole(kind: str, cut: dict[str, Cut]) -> None:
    assert len(cut[kind].saved) >= 2
    for path in cut[kind].saved:
        Checkpoint(path).verify()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_commands_then_follow_the_curve_of_one_process(
    kind: str, cut: dict[str, Cut], resumed: dict[str, list[int]], alone: dict[str, dict[float, float]]
) -> None:
    directory = cut[kind].directory
    assert resumed[kind] == [0, 0]
    launches = 2 if kind == "multi_node_ddp" else 1
    assert directory.with_suffix(".0.log").read_text().count("Resumed from step ") == launches
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    assert not list((directory / "checkpoints").glob(".unfinished-*"))  # of a save that the cut ended
    actual = curve(directory)
    assert list(actual["train/loss"]) == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/grad_norm", "eval/val_loss"):
        assert actual[name] == {step: pytest.approx(value, rel=1e-5) for step, value in alone[name].items()}, name
