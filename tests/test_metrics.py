"""metrics.jsonl, TensorBoard and W&B: what is written, what a resumed run keeps, and that none of them ends a run."""

import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from trainer.distributed.control import Control
from trainer.errors import UserError
from trainer.reporting import feed, wandb_run
from trainer.reporting.alerts import Alerts
from trainer.reporting.console import Console
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.reporting.trackers import Trackers, read_metrics
from trainer.reporting.wandb_run import WandbSettings, _answers
from trainer.state import TrainState


def start(folder: Path, resumed_step: int | None = None, messages: list[str] | None = None, **options: object) -> Trackers:
    options = {"tensorboard_dir": None, "wandb": None, "config": {"seed": 1}, **options}
    log = (messages if messages is not None else []).append
    return Trackers(folder / "metrics.jsonl", resumed_step=resumed_step, log=log, **options)


def losses(folder: Path) -> dict[int, float | None]:
    return {row["step"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl")}


def test_a_row_is_one_line_of_strict_json_written_at_once(tmp_path: Path) -> None:
    before = time.time()
    metrics = start(tmp_path)
    metrics.log(10, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/perplexity": 12.5, "epoch": 3})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert before - 1 < row.pop("time") < time.time() + 1
    assert row == {"step": 10, "train/loss": None, "train/grad_norm": None, "train/perplexity": 12.5, "epoch": 3}


def test_a_new_run_starts_empty_and_a_resumed_one_drops_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 9.0}\n')
    metrics = start(tmp_path)
    for step in (10, 20, 30):
        metrics.log(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train/lo')  # killed in the middle of a row
    assert losses(tmp_path) == {10: 10.0, 20: 20.0, 30: 30.0}
    start(tmp_path, resumed_step=20).log(30, {"train/loss": -1.0})
    assert losses(tmp_path) == {10: 10.0, 20: 20.0, 30: -1.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_row_of_a_save_comes_late_and_keeps_no_row_before_it(tmp_path: Path) -> None:
    """It is written when the save has ended, which took some steps."""
    metrics = start(tmp_path)
    for step in (10, 20, 21, 22):
        metrics.log(step, {"train/loss": float(step)})
    metrics.log(20, {"checkpoint/seconds": 1.5})
    metrics.log(23, {"train/loss": 23.0})
    start(tmp_path, resumed_step=20)
    assert losses(tmp_path) == {10: 10.0, 20: 20.0}
    start(tmp_path, resumed_step=20).log(20, {"checkpoint/seconds": 1.5})
    start(tmp_path, resumed_step=20)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 20]


def test_half_a_row_is_dropped_even_if_its_step_is_not_after_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 2.0}')
    start(tmp_path, resumed_step=2).log(3, {"train/loss": 3.0})
    assert losses(tmp_path) == {1: 1.0, 3: 3.0}


def test_a_full_disk_is_reported_once_and_leaves_only_whole_rows(tmp_path: Path) -> None:
    messages: list[str] = []
    metrics = start(tmp_path, messages=messages)
    metrics.log(1, {"train/loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the second row fits in part
    try:
        metrics.log(2, {"train/loss": 2.0})
        metrics.log(3, {"train/loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.log(4, {"train/loss": 4.0})
    assert losses(tmp_path) == {1: 1.0, 4: 4.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(messages) == 1
    assert "metrics.jsonl" in messages[0]
    assert "training goes on" in messages[0]


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir") as caught:
        start(tmp_path / "file")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("package", "flag"), [("wandb", "--use_wandb"), ("torch.utils.tensorboard", "--use_tensorboard")])
def test_a_missing_package_is_refused_before_a_row_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, flag: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, package, None)
    options = {"wandb": wandb_in(tmp_path)} if package == "wandb" else {"tensorboard_dir": tmp_path / "tensorboard"}
    with pytest.raises(UserError, match=f"{flag} .*pip install {package.split('.')[-1]}"):
        start(tmp_path, **options)
    assert losses(tmp_path) == {1: 1.0}


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_step, steps, loss in ((None, (10, 20, 30), 1.0), (20, (30, 40), 2.0)):
        metrics = start(tmp_path, resumed_step, tensorboard_dir=tmp_path / "tensorboard")
        for step in steps:
            metrics.log(step, {"train/loss": loss})
        metrics.close()
        time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_a_tensorboard_folder_that_cannot_be_made_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    messages: list[str] = []
    metrics = start(tmp_path, messages=messages, tensorboard_dir=tmp_path / "tensorboard")
    metrics.log(1, {"train/loss": 1.0})
    metrics.close()
    assert losses(tmp_path) == {1: 1.0}
    assert len(messages) == 1
    assert messages[0].startswith("TensorBoard: ")


def wandb_in(folder: Path) -> WandbSettings:
    return WandbSettings("a-project", "a-sweep", "a run", id_file=folder / "wandb_id", directory=folder)


@pytest.fixture
def no_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_goes_offline_by_itself_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    metrics = start(tmp_path, messages=messages, wandb=wandb_in(tmp_path))
    metrics.log(1, {"train/loss": 1.0})
    metrics.close()
    assert len(messages) == 1
    assert "no API key" in messages[0]

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        metrics = start(tmp_path, resumed_step=1, messages=messages, wandb=wandb_in(tmp_path))
        metrics.log(2, {"train/loss": 2.0})
        metrics.close()
    assert len(messages) == 2
    assert "does not answer" in messages[1]

    run_id = (tmp_path / "wandb_id").read_text()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run.name.endswith(f"-{run_id}") for run in runs)
    written = [(run / f"run-{run_id}.wandb").read_bytes() for run in runs]
    assert all(text in run for run in written for text in (b"train/loss", b"a-sweep"))


class RefuseEveryKey(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(401)
        self.end_headers()

    def do_POST(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        """Log nothing to stderr."""


@pytest.mark.usefixtures("no_wandb_account")
def test_a_key_that_wandb_refuses_makes_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), RefuseEveryKey) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        metrics = start(tmp_path, messages=messages, wandb=wandb_in(tmp_path))
        metrics.log(1, {"train/loss": 1.0})
        metrics.close()
        server.shutdown()
    assert len(messages) == 1
    assert "writing an offline run instead" in messages[0]
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/loss" in run.read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("silent", ["the server", "the look-up of its name"])
def test_a_server_that_never_answers_holds_nobody_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "REACHABLE_SECONDS", 0.3)
    if silent == "the look-up of its name":  # knows no time-out
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: threading.Event().wait())
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not _answers(f"http://127.0.0.1:{server.getsockname()[1]}")


KILLED_WANDB = """
import os, signal, subprocess, time
from pathlib import Path
from trainer.reporting.trackers import Trackers
from trainer.reporting.wandb_run import WandbSettings
settings = WandbSettings("a-project", None, None, Path("wandb_id"), Path("."))
metrics = Trackers(Path("metrics.jsonl"), tensorboard_dir=None, wandb=settings, config={}, resumed_step=None, log=print)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
killed = [int(pid) for pid in children if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()]
os.kill(*killed, signal.SIGKILL)
for step in range(1, 6):
    metrics.log(step, {"train/loss": 1.0})
    time.sleep(0.2)
metrics.close()
print("the end", flush=True)
os._exit(0)
"""


@pytest.mark.usefixtures("no_wandb_account")
def test_a_wandb_process_that_dies_is_reported_once_and_ends_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", KILLED_WANDB]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the end\n")
    assert done.stdout.count("W&B: ") == 1
    assert "training goes on without it" in done.stdout
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5]


class Recording(GeneralTracker):
    """What a tracker of Accelerate is told."""

    name = "mlflow"
    requires_logging_directory = False
    told: ClassVar[list[tuple]] = []
    fails_at = 0
    answers = threading.Event()
    """whether its server does"""

    def __init__(self, project: str, **named: object) -> None:
        super().__init__(_blank=True)
        self.told[:] = [(project, named)]

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values)

    def log(self, values: dict, step: int | None = None) -> None:
        self.answers.wait()
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Recording)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.MLFLOW])
    monkeypatch.setattr(feed, "EXIT_SECONDS", 5.0)
    monkeypatch.setattr(Recording, "fails_at", 0)
    Recording.answers.set()
    return Recording


def others(folder: Path, messages: list[str], *names: str) -> Trackers:
    named = {"project": "a-project", "run_name": "a run", "config": {"seed": 1, "path": ("a", "b")}}
    return start(folder, messages=messages, others=names, **named)


def test_a_tracker_of_accelerate_gets_project_name_settings_and_rows(recording: type[Recording], tmp_path: Path) -> None:
    metrics = others(tmp_path, messages := [], "mlflow")
    metrics.log(1, {"train/loss": 2.0})
    metrics.log(2, {"train/loss": 1.0})
    metrics.close()
    rows = [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0})]
    assert recording.told == [("a-project", {"run_name": "a run"}), {"seed": 1, "path": "('a', 'b')"}, *rows, "finished"]
    assert messages == []


def test_a_tracker_that_fails_is_named_once_and_ends_nothing(recording: type[Recording], tmp_path: Path) -> None:
    recording.fails_at = 2
    metrics = others(tmp_path, messages := [], "mlflow")
    for step in range(1, 5):
        metrics.log(step, {"train/loss": 1.0})
    metrics.close()
    assert messages == ["mlflow: the server is gone; training goes on without it"]
    assert list(losses(tmp_path)) == [1, 2, 3, 4]


def test_a_tracker_whose_server_never_answers_stalls_neither_a_step_nor_the_end(
    recording: type[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "EXIT_SECONDS", 0.2)
    recording.answers.clear()
    metrics = others(tmp_path, messages := [], "mlflow")
    steps = threading.Thread(target=lambda: [metrics.log(step, {"train/loss": 1.0}) for step in range(1, 5)], daemon=True)
    steps.start()
    steps.join(30)
    assert not steps.is_alive(), "a step waits for the server"
    metrics.close()
    assert messages == ["mlflow did not finish in time; metrics.jsonl has all"]
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    recording.answers.set()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="--log_with comet_ml needs a package: pip install comet-ml"):
        others(tmp_path, [], "comet_ml")


def test_importing_metrics_imports_nothing_heavy() -> None:
    code = "import sys, trainer.reporting.trackers; print([m for m in ('torch', 'wandb', 'tensorboard') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_throughput_counts_the_items_of_this_launch_alone() -> None:
    """A launch that resumes in the middle of a log interval means its loss over all items, and times its own."""

    class Report:
        def step_metrics(self, step: int) -> dict[str, float]:
            return {}

        def log_line(self, step: int, metrics: dict[str, float]) -> str:
            rows.append(metrics)
            return ""

    rows: list[dict[str, float]] = []
    session = SimpleNamespace(
        recipe=SimpleNamespace(throughput=("tokens", "next_token"), monitored=(), derive=lambda _: {}, report=Report()),
        launch=SimpleNamespace(
            is_main=True, device=torch.device("cpu"), processes=1, control=Control(0, 1, timedelta(seconds=1))
        ),
        backend=SimpleNamespace(precision="no"),
        config=SimpleNamespace(optimisation=SimpleNamespace(effective_batch_size=2)),
        loss_weights={"next_token": 1.0},
        samples=None,
    )
    state = TrainState(step=5, loss_sums=[60.0], item_counts=[30.0])
    logger = MetricsLogger(cast(Any, session), state, None, Console(None, is_main=False), Alerts())
    for step in (6, 7):
        logger.add_losses([torch.tensor([10.0])])
        logger.add_items([10.0])
        state.step = step
        logger.log_step(0.1, torch.tensor(1.0), {}, 0, math.inf)
    assert [row["train/loss"] for row in rows] == [(60 + 10) / (30 + 10), 10 / 10]
    counted = [row["train/tokens_per_sec"] * row["train/interval_seconds"] for row in rows]
    assert counted == pytest.approx([10, 10])
