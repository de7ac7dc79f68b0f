"""Several hosts: two network namespaces joined by a cable that can be cut. Nothing but the run directory is shared."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_injector import curve, reached
from launching import TOY, Started, environment, run

from trainer.checkpoint import Checkpoint

STEPS, CUT_AT = 60, 20
TIMEOUT_MINUTES = 0.1
RUN = ["--device", "cpu", "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--warmup_steps", "4"]
RUN += [
    "--batch_size",
    "4",
    "--gradient_accumulation_steps",
    "2",
    "--save_every",
    "7",
    "--timeout_minutes",
    str(TIMEOUT_MINUTES),
]
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


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

    def launch(self, kind: str, directory: Path, *more: str) -> list[Started]:
        """The same command on each, but for --machine_rank."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{kind}.yaml"]
        launcher += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", ADDRESSES[0]]
        words = [str(TOY), *RUN, "--output_dir", str(directory), *more]
        env = {k: v for k, v in environment().items() if k not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return [
            Started(
                ["ip", "netns", "exec", name, *launcher, "--machine_rank", str(rank), *words],
                directory.with_suffix(f".{rank}.log"),
                env,
            )
            for rank, name in enumerate(self.names)
        ]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        made.build()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        made.remove()
        pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[float, float]]:
    """The curve of the same run in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone")
    run("one", TOY, *RUN, "--output_dir", str(folder / "run"), log=folder / "log")
    return curve(folder / "run")


def ended(launches: list[Started], seconds: float) -> list[int]:
    """The exit statuses; nothing of them is left."""
    end = time.monotonic() + seconds
    try:
        codes = [each.wait(timeout=max(0.1, end - time.monotonic())) for each in launches]
        assert not [pid for each in launches for pid in each.orphans(5)]
        return codes
    except subprocess.TimeoutExpired:
        said = "\n".join(each.log.read_text(errors="replace")[-3000:] for each in launches)
        raise AssertionError(f"not ended within {seconds} s:\n{said}") from None
    finally:
        for each in launches:
            each.kill_all()


@pytest.mark.parametrize("kind", ["multi_node_ddp", "multi_node_zero3"])
def test_a_cut_cable_ends_both_hosts_and_the_same_commands_follow_the_same_curve(
    kind: str, hosts: Hosts, alone: dict[str, dict[float, float]], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    launches = hosts.launch(kind, directory, "--read_seconds", "0.05")
    try:
        end, met = time.monotonic() + 120, reached(CUT_AT)
        while not met(directory, 0.0):
            assert all(each.poll() is None for each in launches), launches[0].log.read_text()[-3000:]
            assert time.monotonic() < end, "no training within two minutes"
            time.sleep(0.02)
        hosts.cable("down")
        cut = time.monotonic()
        # The time-out, the look around for who is gone, and the launchers' own leaving.
        codes = ended(launches, 60 * TIMEOUT_MINUTES + 40)
        took = time.monotonic() - cut
    finally:
        for each in launches:
            each.kill_all()
        hosts.cable("up")
    assert all(codes), codes
    assert took >= 60 * TIMEOUT_MINUTES  # it was the cut cable that ended them
    status = json.loads((directory / "status.json").read_text())
    assert status["state"] == "failed"
    assert "gave no answer" in status["reason"]
    for each in launches:
        assert "the same command goes on from the newest checkpoint" in each.log.read_text()
    checkpoints = directory / "checkpoints"
    assert not list(checkpoints.glob(".unfinished-*"))
    saved = [path for path in checkpoints.glob("checkpoint_step_*") if not path.is_symlink()]
    assert saved
    for path in saved:
        Checkpoint(path).verify()

    assert ended(hosts.launch(kind, directory, "--read_seconds", "0.05"), 120) == [0, 0]
    assert "Resumed from step " in launches[0].log.read_text()
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    found = curve(directory)
    for name in ("train/loss", "train/grad_norm", "eval/val_loss"):
        assert found[name] == {step: pytest.approx(value, rel=1e-5) for step, value in alone[name].items()}, name
    assert list(found["train/loss"]) == list(range(1, STEPS + 1))
