"""Alerts reach a webhook that works, cost nothing if it does not, and its URL, a secret, is written nowhere.

As a script: the recipe of this file, for the launches below.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, environment, free_port, run
from toy_recipe import Config, ToyRecipe

from trainer import launched_run
from trainer.command_line import config as configuration
from trainer.command_line.webhook import VARIABLE, Webhook
from trainer.distributed.launch import connect
from trainer.distributed.time_limit import EXIT_SECONDS, TimeLimit
from trainer.errors import BAD_INPUT, NOT_FINITE, UserError
from trainer.main import main, train
from trainer.recipe import Report
from trainer.reporting import alerts
from trainer.reporting.alerts import TEXT_CHARACTERS, WAITING_ALERTS, WebhookAlerts, open_alerts
from trainer.reporting.console import Console

SECRET = "q7Zt9-Xw2LmV4rKp8Hs1Bd6Ny3Gc5Ju0Fe_aToWiCx"


class WarningReport(Report):
    """Every process gives warnings in each evaluation."""

    warning_count = 1

    def warnings(self) -> list[str]:
        return ["seen by all", *(f"n = {i} on rank {os.environ.get('RANK', '0')}" for i in range(self.warning_count))]


class WarningRecipe(ToyRecipe):
    """The toy with that report. A width of 13 is a bug."""

    report_class = WarningReport

    def loss(self, network: Any, batch: Any) -> dict[str, torch.Tensor]:
        if network.embed.weight.shape[1] == 13:
            raise RuntimeError("the bug of the day")
        return super().loss(network, batch)


def leaks(content: bytes) -> bool:
    """Whether any ten characters of the secret are there: a line may have been broken inside it."""
    return any(SECRET[i : i + 10].encode() in content for i in range(len(SECRET) - 9))


class Receiver:
    """An HTTP server with prepared responses, which records its requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []  # for the next requests; 204 when they are used up
        self.received: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.go_on = threading.Event()  # a request waits for it
        self.go_on.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.times.append(time.monotonic())
                receiver.paths.append(self.path)
                assert self.headers["Content-Type"] == "application/json"
                assert "urllib" not in self.headers["User-Agent"]
                receiver.go_on.wait()
                code, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
                receiver.received.append(json.loads(body))
                with contextlib.suppress(OSError):  # the client no longer waits
                    self.send_response(code)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def do_GET(self) -> None:  # what a followed redirect may become
                receiver.paths.append(self.path)
                self.send_error(405)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/{SECRET}"

    def events(self) -> list[str]:
        return [alert["event"] for alert in self.received]

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    new_receiver = Receiver()
    yield new_receiver
    new_receiver.close()


@pytest.fixture(autouse=True)
def _no_proxy_and_times_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and time-outs so long that no busy machine meets them: a request hangs until the test ends it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == VARIABLE]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(alerts, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(alerts, "REQUEST_SECONDS", 200.0)
    monkeypatch.setattr(WebhookAlerts, "exit_seconds", 100.0)


def eventually(what: Any, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    assert what()


# What is sent


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://discord.com/api/webhooks/1/x", "discord"),
        ("https://canary.discord.com/api/webhooks/1/x", "discord"),
        ("https://discordapp.com/api/v10/webhooks/1/x?thread_id=2", "discord"),
        ("https://discord.com/api/webhooks/1/x/slack", "slack"),
        ("https://hooks.slack.com/services/T/B/x", "slack"),
        ("https://discord.com.example.org/x", "json"),
        ("https://notdiscord.com/x", "json"),
        ("http://10.0.0.7:8080/slack", "json"),
    ],
)
def test_each_host_gets_its_own_format_without_mentions(url: str, kind: str) -> None:
    webhook = Webhook(url)
    assert webhook.kind == kind
    body = json.loads(webhook.body("<!channel> a & b", {"step": 3, "loss": math.nan, "eta": math.inf}))
    assert (
        body
        == {
            "discord": {"content": "<!channel> a & b", "allowed_mentions": {"parse": []}},
            "slack": {"text": "&lt;!channel&gt; a &amp; b"},
            "json": {"text": "<!channel> a & b", "step": 3, "loss": None, "eta": None},
        }[kind]
    )


def test_a_text_is_cut_and_loses_secrets_and_broken_characters(receiver: Receiver) -> None:
    sender = WebhookAlerts(Webhook(receiver.url), "toy/run", print)
    sender.send("failed", "https://me:hunter2@host/data \udcff" + "x" * 5000)
    sender.close()
    (alert,) = receiver.received
    assert alert["text"].startswith("[toy/run] *** ?xxx")
    assert len(alert["text"]) == TEXT_CHARACTERS
    assert (alert["event"], alert["run"]) == ("failed", "toy/run")


# Where it is sent


@pytest.mark.parametrize(
    "url",
    [
        "",
        f"discord.com/api/webhooks/1/{SECRET}",
        f"ftp://example.org/{SECRET}",
        f"file:///{SECRET}",
        f"https:///{SECRET}",
        f"https:/example.org/{SECRET}",
        f"https://example.org:{SECRET}/x",
        f"https://[::1/{SECRET}",
        f"https://me:{SECRET}@example.org/",
        f"https://example.org/a {SECRET}",
        f"https://example.org/a\n{SECRET}",
        f"https://exämple.org/{SECRET}",
        f"https://example.org/\udcff{SECRET}",
        f"https://example.org/\x00{SECRET}",
    ],
)
def test_a_malformed_url_is_refused_without_repeating_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as by_flag:
        configuration.parse(Config, {}, ["--alert_webhook", url], "toy")
    errors = {"--alert_webhook": by_flag.value}
    if url and "\0" not in url:  # an empty variable is none, and one with a NUL cannot be
        monkeypatch.setenv(VARIABLE, url)
        with pytest.raises(UserError) as by_environment:
            configuration.parse(Config, {}, [], "toy")
        errors[VARIABLE] = by_environment.value
    for source, error in errors.items():
        assert error.exit_code == BAD_INPUT
        assert str(error).startswith(source)
        assert "\n" not in str(error)
        assert not leaks(str(error).encode())
        assert error.__cause__ is None


def test_the_flag_wins_over_the_file_and_the_file_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def webhook(*argv: str) -> str | None:
        parsed_webhook = configuration.parse(Config, {}, argv, "toy").webhook
        return None if parsed_webhook is None else parsed_webhook.url

    (tmp_path / "run.yaml").write_text("run:\n  alert_webhook: https://file.org/x\n")
    file = ["--config", str(tmp_path / "run.yaml")]
    assert webhook() is None
    assert webhook(*file) == "https://file.org/x"
    monkeypatch.setenv(VARIABLE, "https://environment.org/x\n")
    assert webhook() == "https://environment.org/x"
    assert webhook(*file) == "https://file.org/x"
    assert webhook(*file, "--alert-webhook", "https://flag.org/x") == "https://flag.org/x"
    assert webhook(*file, "--alert_webhook=None") is None
    assert open_alerts(None, "toy/run", print).exit_seconds == 0


def test_a_parsed_configuration_holds_no_url() -> None:
    parsed = configuration.parse(Config, {}, ["--alert_webhook", f"https://example.org/{SECRET}", "--width", "8"], "toy")
    bare = configuration.parse(Config, {}, ["--width", "8"], "toy")
    assert parsed.webhook == Webhook(f"https://example.org/{SECRET}")
    assert not leaks(repr(parsed).encode())
    assert (parsed.config, parsed.unresolved, parsed.without_flags) == (bare.config, bare.unresolved, bare.without_flags)
    assert configuration.run_name(parsed) == configuration.run_name(bare) == "default-width8"
    assert yaml.safe_load(configuration.to_yaml(parsed.config))["run"]["alert_webhook"] is None


# What a webhook may do


def send(webhook_url: str, *texts: str, messages: list[str] | None = None, until: Callable[[], object] | None = None) -> None:
    """Send, and close (once `until` is true). Everything was sent in time then."""
    warnings = messages if messages is not None else []
    sender = WebhookAlerts(Webhook(webhook_url), "toy/run", warnings.append)
    for text in texts:
        sender.send("progress", text)
    if until is not None:
        eventually(until)
    sender.close()
    assert not any("took longer" in line for line in warnings)


def texts_of(receiver: Receiver) -> list[str]:
    return [alert["text"].removeprefix("[toy/run] ") for alert in receiver.received]


def test_alerts_arrive_in_order_before_the_close(receiver: Receiver) -> None:
    messages: list[str] = []
    send(receiver.url, *map(str, range(20)), messages=messages)
    assert texts_of(receiver) == [str(i) for i in range(20)]
    assert messages == []


@pytest.mark.parametrize(("code", "requests"), [(500, 4), (503, 4), (404, 1), (400, 1), (401, 1)])
def test_a_server_in_trouble_is_asked_again_and_a_refusal_is_final(receiver: Receiver, code: int, requests: int) -> None:
    messages: list[str] = []
    receiver.answers = [(code, {})] * (2 * requests)
    send(receiver.url, "lost", "lost too", "there", messages=messages, until=lambda: "there" in texts_of(receiver))
    assert texts_of(receiver) == ["lost"] * requests + ["lost too"] * requests + ["there"]
    assert len(messages) == 1
    assert f"HTTP {code}" in messages[0]
    assert "the run goes on" in messages[0]


def test_retry_after_is_honoured_and_bounded(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(alerts, "RETRY_AFTER_MAX_SECONDS", 0.6)
    waits: list[float | None] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(alerts, "threading", SimpleNamespace(Event=Recorded, Thread=threading.Thread))
    receiver.answers = [(429, {"Retry-After": "0.4"}), (429, {"Retry-After": "86400"}), (503, {"Retry-After": "nan"})]
    send(receiver.url, "once", messages=messages, until=lambda: len(receiver.received) == 4)
    assert texts_of(receiver) == ["once"] * 4
    assert waits == [0.4, 0.6, pytest.approx(4 * 0.05)]  # the last one is our own
    pauses = [after - before for before, after in zip(receiver.times, receiver.times[1:], strict=False)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, (0.4, 0.6, 0.2), strict=True))
    assert messages == []  # it arrived


def test_retry_after_may_be_a_date() -> None:
    before = time.time()
    in_a_minute = formatdate(before + 60, usegmt=True)  # whole seconds
    assert 59 - (time.time() - before) <= alerts._retry_after({"Retry-After": in_a_minute}) <= 60
    for nonsense in ("", "soon", "-5", formatdate(0, usegmt=True)):
        assert alerts._retry_after({"Retry-After": nonsense}) == 0


def test_at_the_end_only_what_happened_last_is_tried_once_more(receiver: Receiver) -> None:
    """The pause that the server asks for ends with the close, which does not wait for it."""
    receiver.answers = [(429, {"Retry-After": "500"})]
    send(receiver.url, "step 500", "step 1000", "crashed", until=lambda: receiver.received)
    assert texts_of(receiver) == ["step 500", "crashed"]
    receiver.answers = [(429, {"Retry-After": "500"})] * 9
    receiver.received.clear()
    send(receiver.url, "finished", until=lambda: receiver.received)
    assert texts_of(receiver) == ["finished", "finished"]


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    elsewhere, messages = Receiver(), []
    try:
        for code in (301, 302, 303, 307, 308):
            receiver.answers.append((code, {"Location": elsewhere.url}))
        send(receiver.url, *"abcde", messages=messages)
        assert texts_of(receiver) == list("abcde")
        assert elsewhere.paths == []
    finally:
        elsewhere.close()
    assert any("not followed" in line for line in messages)
    assert not leaks("".join(messages).encode())


def test_the_proxy_of_the_environment_is_obeyed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", receiver.url.partition("/hooks")[0])
    send("http://discord.com/api/webhooks/1/x", "hello")
    assert receiver.paths == ["http://discord.com/api/webhooks/1/x"]
    assert receiver.received == [{"content": "[toy/run] hello", "allowed_mentions": {"parse": []}}]


@pytest.mark.parametrize("webhook", ["hangs", "is not there", "has no name", "talks nonsense"])
def test_a_dead_webhook_costs_nothing(receiver: Receiver, webhook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WebhookAlerts, "exit_seconds", 1.0)
    messages: list[str] = []
    receiver.go_on.clear()
    receiver.answers = [(999999, {})] * 99
    url = {
        "hangs": receiver.url,
        "is not there": f"http://127.0.0.1:{free_port()}/{SECRET}",
        "has no name": f"http://{SECRET}.invalid/",
        "talks nonsense": receiver.url,
    }[webhook]
    if webhook == "talks nonsense":
        receiver.go_on.set()
    sender = WebhookAlerts(Webhook(url), "toy/run", messages.append)
    durations = []
    for i in range(500):
        before = time.perf_counter()
        sender.send("progress", f"step {i}", step=i, loss=1.0)
        durations.append(time.perf_counter() - before)
    # The median: a few of them may meet other processes that use the core.
    assert statistics.median(durations) < 500e-6, f"{1e6 * statistics.median(durations):.0f} microseconds"
    sender.close()
    if webhook == "hangs":
        assert sender._thread.is_alive()  # with its request: the close did not wait for that
        assert any("took longer than 1 s" in line for line in messages)
    assert len(messages) <= 3  # dropped, not sent, not closed: each once
    assert sum("dropped" in line for line in messages) == 1
    assert not leaks("".join(messages).encode())


def test_of_too_many_the_oldest_are_dropped(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.go_on.clear()
    sender = WebhookAlerts(Webhook(receiver.url), "toy/run", lambda _: None)
    sender.send("progress", "first")
    eventually(lambda: receiver.paths)
    for i in range(2 * WAITING_ALERTS):
        sender.send("progress", str(i))
    receiver.go_on.set()
    eventually(lambda: len(receiver.received) == 1 + WAITING_ALERTS)
    sender.close()
    assert texts_of(receiver) == ["first", *map(str, range(WAITING_ALERTS, 2 * WAITING_ALERTS))]


# In training


def trained(folder: Path, *argv: str, recipe: ToyRecipe | None = None) -> str:
    """One launch in this process; why it ended."""
    recipe = recipe or WarningRecipe()
    command_line = ["--output_dir", str(folder / "run"), "--device", "cpu", "--batch_size", "2", "--max_steps", "10", *argv]
    parsed = configuration.parse(recipe.config_class, recipe.presets, command_line, recipe.name)
    return train(recipe, parsed, command_line, connect("cpu", 1), Console(None, True))


def test_a_run_sends_its_events(receiver: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(
        tmp_path, "--alert_webhook", receiver.url, "--alert_every", "4", "--log_every", "2", "--eval_every", "5",
        "--nan_samples", "47",
    )  # fmt: skip
    assert receiver.events() == ["started", "bad step", "progress", "noticed", "progress", "noticed", "finished"]
    started, bad, progress, warning_alert, *_, finished = receiver.received
    assert all(alert["run"] == "toy/run" for alert in receiver.received)
    assert "Started at step 0 of 10" in started["text"]
    assert "the gradient of step 2 was not finite" in bad["text"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 4)
    assert (progress["step"], progress["loss_step"], progress["total_steps"]) == (4, 4, 10)
    assert progress["loss"] == pytest.approx(row["train/loss"])
    assert progress["samples_per_sec"] == pytest.approx(row["train/samples_per_sec"])
    assert f"loss {row['train/loss']:.4f} in the log interval to step 4" in progress["text"]
    assert warning_alert["text"] == "[toy/run] Noticed at step 5:\nseen by all\nn = 0 on rank 0"
    assert "Noticed at step 5:\nseen by all\nn = 0 on rank 0\n" in capsys.readouterr().out
    assert (finished["reason"], finished["step"]) == ("last step", 10)
    receiver.received.clear()
    assert trained(tmp_path, "--alert_webhook", receiver.url) == "already finished"
    assert receiver.received == []


def test_a_stop_gives_its_reason_and_0_means_no_progress(receiver: Receiver, tmp_path: Path) -> None:
    trained(tmp_path, "--alert_webhook", receiver.url, "--alert_every", "0", "--stop_at_step", "6")
    assert receiver.events() == ["started", "stopped"]
    assert receiver.received[-1]["reason"] == "stop_at_step"
    trained(tmp_path, "--stop_at_step", "8")  # without the flag there are no alerts
    assert len(receiver.received) == 2


def test_the_warnings_of_a_recipe_are_bounded(receiver: Receiver, tmp_path: Path) -> None:
    recipe = WarningRecipe()
    recipe.report.warning_count = 5000
    trained(tmp_path, "--alert_webhook", receiver.url, recipe=recipe)
    (warning_alert,) = [alert for alert in receiver.received if alert["event"] == "noticed"]
    lines = warning_alert["text"].splitlines()
    assert lines[1:3] == ["seen by all", "n = 0 on rank 0"]
    assert len(lines) < 20
    assert lines[-1] == "... and 4991 more"


@pytest.mark.parametrize(
    ("argv", "failure", "text"),
    [
        (["--nan_samples", *map(str, range(64)), "--max_bad_steps", "3"], UserError, "Failed at step 4: the gradient was not"),
        (["--width", "13"], RuntimeError, "Failed at step 0: RuntimeError: the bug of the day"),
        (["--train_rows", "0"], UserError, "Did not start: the train set is empty"),
        (["--resume_from", "nowhere"], UserError, "Did not start: "),
    ],
)
def test_a_failure_is_reported(receiver: Receiver, tmp_path: Path, argv: list[str], failure: type, text: str) -> None:
    with pytest.raises(failure) as caught:
        trained(tmp_path, "--alert_webhook", receiver.url, *argv)
    assert getattr(caught.value, "exit_code", 1) in (1, BAD_INPUT, NOT_FINITE)
    assert receiver.events()[-1] == "failed"
    assert text in receiver.received[-1]["text"]


@pytest.mark.timeout(120)
def test_a_webhook_that_hangs_slows_nothing_and_delays_the_end_a_little(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WebhookAlerts, "exit_seconds", 1.0)
    receiver.go_on.clear()
    assert trained(tmp_path, "--alert_every", "1", "--max_steps", "60", "--alert_webhook", receiver.url) == "last step"
    assert len(receiver.paths) == 1  # the run is over while the first of 62 requests still hangs
    assert receiver.received == []


def test_the_time_limit_counts_the_last_alerts(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the end of the process may take is what `test_time_limit.py` sees the limit leave room for."""
    monkeypatch.setattr(WebhookAlerts, "exit_seconds", 2.0)
    exit_seconds: list[float] = []

    def record_exit_seconds(hours: float, started: float, slurm_seconds: float | None, seconds: float) -> TimeLimit:
        exit_seconds.append(seconds)
        return TimeLimit(hours, started, slurm_seconds, seconds)

    monkeypatch.setattr(launched_run, "TimeLimit", record_exit_seconds)
    assert trained(tmp_path, "--max_training_hours", "1", "--stop_at_step", "1") == "stop_at_step"
    assert trained(tmp_path, "--max_training_hours", "1", "--alert_webhook", receiver.url) == "last step"
    assert exit_seconds == [EXIT_SECONDS, EXIT_SECONDS + 2.0]


# The secret


def secrets_in(folder: Path) -> list[str]:
    """Files below `folder` that hold a part of the secret, in their content or name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5
    return [str(path) for path in files if leaks(path.read_bytes()) or leaks(str(path).encode())]


def test_the_url_is_in_no_file_and_no_output(receiver: Receiver, tmp_path: Path) -> None:
    """Runs with every tracker, one that crashes, and one resumed: as a user's commands, one after another in a process."""
    first, again, crash = "--stop_at_step 3 --use_wandb --alert_webhook", "--alert_every 2 --alert-webhook", "--width 13"
    runs = [
        ["train", *first.split(), receiver.url, "--output_dir", str(tmp_path / "run")],
        [*again.split(), receiver.url, "--output_dir", str(tmp_path / "run")],
        [*crash.split(), f"--alert_webhook={receiver.url}", "--output_dir", str(tmp_path / "crash")],
    ]
    runs = [[*argv, "--max_steps", "6", "--use_tensorboard"] for argv in runs]
    command = [sys.executable, __file__, json.dumps(runs)]
    env = environment(WANDB_MODE="offline", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120, check=False)
    assert re.findall(rb"exit code (\d)", done.stdout) == [b"0", b"0", b"1"], done
    # W&B sends it to its server.
    assert re.findall(rb"sys.argv holds .* (--alert\S+)", done.stdout) == [
        b"--alert_webhook",
        b"--alert-webhook",
        b"--alert_webhook=***",
    ]
    assert b"the bug of the day" in done.stderr
    assert receiver.events().count("started") == 3
    assert receiver.events()[-1] == "failed"
    assert not leaks(done.stdout + done.stderr)
    assert secrets_in(tmp_path) == []
    assert list(tmp_path.rglob("*.wandb"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert b"--alert_webhook '***'" in (tmp_path / "run" / "command.txt").read_bytes()


@pytest.mark.parametrize(
    "argv",
    [
        ["--alert_webhook", "{url}", "--d_model", "wide"],
        ["--alert_webhook", "{url}", "{url}"],
        ["--alert_webhok", "{url}"],
        ["--d_model", "{url}"],
        ["--device={url}"],
        ["--config", "wrong.yaml"],
        ["--config", "list.yaml"],
        ["--config", "key.yaml"],
        ["{url}"],
        ["train", "{url}"],
        ["--lr", "1", "\u2014alert_webhook", "{url}"],  # a dash pasted from a document
    ],
)
def test_an_error_in_the_command_line_does_not_repeat_it(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"https://chat.example.org/hooks/{SECRET}?wait=true&{SECRET}={SECRET}"
    (tmp_path / "wrong.yaml").write_text(f"alert_webhook: {url}\nd_model: wide\n")
    (tmp_path / "list.yaml").write_text(f"alert_webhook:\n  - {url}\n")
    (tmp_path / "key.yaml").write_text(f"alert_webhook:{url}:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(WarningRecipe(), [word.format(url=url) for word in argv])
    out, err = capfd.readouterr()
    assert caught.value.code == BAD_INPUT
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not leaks((out + err).encode())


def test_two_processes_send_each_event_once_with_the_warnings_of_both(receiver: Receiver, tmp_path: Path) -> None:
    flags = ["--alert_webhook", receiver.url, "--max_steps", "6", "--eval_every", "3", "--alert_every", "4"]
    flags += ["--batch_size", "2", "--output_dir", str(tmp_path / "run")]
    output = run("ddp", Path(__file__), *flags, log=tmp_path / "log")
    assert receiver.events() == ["started", "noticed", "progress", "noticed", "finished"]
    assert receiver.received[1]["text"] == "[toy/run] Noticed at step 3:\nseen by all\nn = 0 on rank 0\nn = 0 on rank 1"
    assert not leaks(output.encode())
    assert secrets_in(tmp_path) == []


if __name__ == "__main__":
    if not sys.argv[1].startswith("["):
        main(WarningRecipe())
    sys.modules[main.__module__].leave = sys.exit  # it would end the process
    for argv in json.loads(sys.argv[1]):
        sys.argv[1:] = argv
        try:
            main(WarningRecipe())
        except SystemExit as end:
            print("exit code", end.code, "and sys.argv holds", *sys.argv, flush=True)
