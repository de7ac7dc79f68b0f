"""Old checkpoints go, and one that will not go ends nothing."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from toy_recipe import ToyRecipe

from trainer.checkpoints import retention, saving, writing
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.command_line import config
from trainer.distributed.launch import connect
from trainer.main import train
from trainer.recipe import Report
from trainer.reporting.console import Console


def test_what_is_kept(tmp_path: Path) -> None:
    """Of ten saves all but those of steps 4 and 8 were for a new best alone; the best is that of step 7."""
    for keep_last, kept in ((1, {8, 10, 7}), (2, {4, 8, 9, 10, 7}), (3, {4, 8, 9, 10, 7}), (0, {4, 8, 9, 10, 7})):
        folder = tmp_path / str(keep_last)
        for step in range(1, 11):
            path = folder / f"step_{step}"
            path.mkdir(parents=True)
            (path / "trainer_state.json").write_text(json.dumps({"only_best": step not in (4, 8)}))
        retention.link(folder, "best_model", "step_7")
        retention.prune(folder, "step_", keep_last)
        assert {step for step, _ in retention.step_folders(folder, "step_")} == kept


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    """A file stands where checkpoint 3 has to be moved to before it is deleted; all others still go."""
    folder = tmp_path / "checkpoints"

    class ObstructedReport(Report):
        def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
            if step == 4:  # after the save of step 3, which clears that name
                (folder / ".unfinished-checkpoint_step_3").touch()
            return super().log_line(step, metrics)

    class Obstructed(ToyRecipe):
        report_class = ObstructedReport

    argv = ["--max_steps", "7", "--save_every", "1", "--keep_last", "2", "--train_rows", "640", "--save_sync"]
    argv += ["--output_dir", str(tmp_path)]
    recipe, output = Obstructed(), io.StringIO()
    with contextlib.redirect_stdout(output):
        parsed = config.parse(recipe.config_class, recipe.presets, argv, recipe.name)
        assert train(recipe, parsed, argv, connect("cpu", 1), Console(None, True)) == "last step"
    assert output.getvalue().count("an old checkpoint not removed") == 3  # after steps 5, 6 and 7
    assert ".unfinished-checkpoint_step_3" in output.getvalue()
    assert sorted(path.name for path in folder.glob("checkpoint_step_*")) == [f"checkpoint_step_{n}" for n in (3, 6, 7)]
    for path in folder.glob("checkpoint_step_*"):
        Checkpoint(path).verify()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["checkpoint/seconds"] for row in rows if "checkpoint/seconds" in row}
    assert list(seconds) == list(range(1, 8))
    assert all(0 < value < 60 for value in seconds.values())


def test_a_save_that_fails_tells_which_checkpoint_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = saving.commit

    def full(folder: Path, name: str, reports: Sequence[writing.WriteReport]) -> str | None:
        return commit(folder, name, reports) if name.endswith(("_2", "_4")) else f"checkpoint {name} could not be written"

    monkeypatch.setattr(saving, "commit", full)
    argv = ["--max_steps", "4", "--save_every", "1", "--save_sync", "--output_dir", str(tmp_path)]
    recipe, output = ToyRecipe(), io.StringIO()
    with contextlib.redirect_stdout(output):
        parsed = config.parse(recipe.config_class, recipe.presets, argv, recipe.name)
        train(recipe, parsed, argv, connect("cpu", 1), Console(None, True))
    assert "_1 could not be written. Training goes on; this run has no checkpoint yet\n" in output.getvalue()
    assert "_3 could not be written. Training goes on; that of step 2 stays\n" in output.getvalue()
