"""Training goes on while a checkpoint is written; what becomes of that is known before anything depends on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_recipe import ToyRecipe

from trainer.backends.tensors import whole_entries
from trainer.checkpoints import retention
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.tensor_file import TensorFile
from trainer.checkpoints.writing import RankWriter, commit
from trainer.command_line import config
from trainer.distributed.launch import Launch, alone, connect
from trainer.errors import UserError
from trainer.main import train
from trainer.recipe import Batch, Report
from trainer.reporting.console import Console

COMMON = ["--train_rows", "640", "--warmup_steps", "0", "--keep_last", "0"]


class StepReport(Report):
    recipe: Stepped

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        self.recipe.step = step
        self.recipe.on_step(step)
        return super().log_line(step, metrics)


class Stepped(ToyRecipe):
    """Calls `on_step` after each step; `script` says what is measured after which step."""

    report_class = StepReport
    patience_metric = None
    step = 0

    def __init__(self, on_step: Callable[[int], object] = lambda step: None, script: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self.on_step, self.script = on_step, script or {}
        if script:
            self.best_metric = "val_script"

    def measure(self, network: nn.Module, batch: Batch) -> dict[str, tuple[Tensor | float, float]]:
        return {**super().measure(network, batch), "script": (self.script.get(self.step, 0.0), 1.0)}


def run(recipe: Stepped, directory: Path, *flags: str, timeout_minutes: float = 1.0) -> str:
    """One launch in this process; its output."""
    argv, output = [*COMMON, "--output_dir", str(directory), *flags], io.StringIO()
    parsed = config.parse(recipe.config_class, recipe.presets, argv, recipe.name)
    with contextlib.redirect_stdout(output):
        train(recipe, parsed, argv, connect("cpu", timeout_minutes), Console(None, True))
    return output.getvalue()


def steps(directory: Path) -> list[int]:
    return sorted(step for step, _ in retention.step_folders(directory / "checkpoints", "checkpoint_step_"))


def tensor_hashes(directory: Path, step: int) -> dict[str, str]:
    files = Checkpoint(directory / "checkpoints" / f"checkpoint_step_{step}").files
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def instead_of_writing(patch: pytest.MonkeyPatch, act: Callable[[Path], object]) -> None:
    """From now on `act(path)` comes before each tensor file is written."""
    write = TensorFile.write

    def acting(file: TensorFile, path: Path) -> dict[str, Any]:
        act(path)
        return write(file, path)

    patch.setattr(TensorFile, "write", acting)


def fail_at(step: int) -> Callable[[Path], None]:
    def fail(path: Path) -> None:
        if path.parent.name.endswith(f"_{step}"):
            raise OSError(28, "No space left on device", str(path))

    return fail


def write_together(folder: Path, processes: int, tensors: Mapping[str, Tensor]) -> str | None:
    """Checkpoint `folder/one`, in files of two tensors, by so many ranks, one after the other here; why there is none."""
    entries, reports = whole_entries(tensors), []
    for rank in range(processes):
        share = RankWriter(Launch(rank, processes, rank, torch.device("cpu"), alone().control), shard_bytes=800)
        share.copy({"model": entries, "optimizer": entries[:1]})
        reports.append(share.write(folder, "one", {"config.yaml": "a: 1"}))
    return commit(folder, "one", reports)


def test_any_number_of_ranks_writes_the_same_folder(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(7)}  # 400 bytes each: four files, and one more
    folders = []
    for processes in (1, 2, 3, 8):
        assert write_together(tmp_path / str(processes), processes, tensors) is None
        folders.append(tmp_path / str(processes) / "one")
    names = {path.name for path in folders[0].iterdir()}
    assert {"model-00004-of-00004.safetensors", "model.safetensors.index.json", "optimizer.safetensors"} <= names
    for folder in folders:
        Checkpoint(folder).verify()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: (folders[0] / n).read_bytes() for n in names}


def test_a_rank_that_cannot_write_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        if path.name == "model-00003-of-00004.safetensors":
            raise OSError(28, "No space left on device")

    instead_of_writing(monkeypatch, fail)
    failure = write_together(tmp_path, 3, {f"layer{i}": torch.randn(10, 10) for i in range(7)})
    assert failure is not None
    assert "one could not be written: rank 2: [Errno 28] No space left on device" in failure
    assert list(tmp_path.iterdir()) == []


def test_steps_are_taken_while_a_checkpoint_is_written_and_it_holds_what_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 2 ends after step 4, where the next one waits for it."""
    flags = ["--max_steps", "6", "--save_every", "2"]
    run(Stepped(), tmp_path / "sync", *flags, "--save_sync")
    trained = threading.Event()
    in_time: list[bool] = []
    instead_of_writing(monkeypatch, lambda path: in_time.append(trained.wait(60)))
    output = run(Stepped(lambda step: step == 4 and trained.set()), tmp_path / "run", *flags)
    assert all(in_time)
    assert output.index("Step      4") < output.index("checkpoint_step_2") < output.index("Step      5")
    assert steps(tmp_path / "run") == [2, 4, 6]
    for step in (2, 4, 6):
        assert tensor_hashes(tmp_path / "run", step) == tensor_hashes(tmp_path / "sync", step)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = {row["step"]: row for row in rows if "checkpoint/seconds" in row}
    assert list(saves) == [2, 4, 6]
    assert saves[2]["checkpoint/stall_seconds"] < saves[2]["checkpoint/seconds"]


def test_with_save_sync_no_step_is_taken_meanwhile(tmp_path: Path) -> None:
    output = run(Stepped(), tmp_path, "--max_steps", "3", "--save_every", "2", "--save_sync")
    assert output.index("Step      2") < output.index("Saved checkpoint to") < output.index("Step      3")


def test_a_best_model_whose_save_fails_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 would be the best; then it is step 3, which comes while nobody knows yet."""
    instead_of_writing(monkeypatch, fail_at(2))
    script = {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0}
    output = run(Stepped(script=script), tmp_path, "--max_steps", "4", "--save_every", "0", "--eval_every", "1")
    assert "WARNING: checkpoint" in output
    assert "No space left on device" in output
    assert steps(tmp_path) == [3, 4]  # step 1 went when step 3 was the best
    assert os.readlink(tmp_path / "checkpoints" / "best_model") == "checkpoint_step_3"
    assert Checkpoint(tmp_path / "checkpoints" / "checkpoint_final").train_state.best_step == 3


def test_without_saves_for_the_best_alone_it_is_the_best_of_those_saved(tmp_path: Path) -> None:
    script = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 6.0}
    flags = ["--max_steps", "5", "--save_every", "3", "--eval_every", "1", "--no_save_best"]
    run(Stepped(script=script), tmp_path, *flags)
    assert steps(tmp_path) == [3, 5]
    assert os.readlink(tmp_path / "checkpoints" / "best_model") == "checkpoint_step_3"


def test_an_error_elsewhere_loses_no_save_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    instead_of_writing(monkeypatch, lambda path: failed.wait(60))

    def fail(step: int) -> None:
        if step == 3:
            threading.Timer(0.2, failed.set).start()  # when the loop has been left
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Stepped(fail), tmp_path, "--max_steps", "5", "--save_every", "2")
    assert steps(tmp_path) == [2]
    assert json.loads((tmp_path / "status.json").read_text())["checkpoint"].endswith("checkpoint_step_2")


def test_an_error_of_the_thread_that_is_no_fault_of_the_disk_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_writing(monkeypatch, lambda path: [][0])
    with pytest.raises(IndexError):
        run(Stepped(), tmp_path, "--max_steps", "5", "--save_every", "2")
    assert steps(tmp_path) == []


def test_a_disk_that_hangs_is_named_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    instead_of_writing(monkeypatch, lambda path: hanging.wait(60))
    try:
        with pytest.raises(UserError, match=r"step_2 is still being written after --timeout_minutes 0\.01, by ranks 0"):
            run(Stepped(), tmp_path, "--max_steps", "5", "--save_every", "2", timeout_minutes=0.01)
    finally:
        hanging.set()
