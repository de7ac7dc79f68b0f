"""The rules of resuming, each with the message that is printed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from recipes.gpt2_wikitext import Gpt2Wikitext
from trainer.checkpoints.checkpoint import resolve
from trainer.checkpoints.network import find_checkpoint
from trainer.checkpoints.writing import RankWriter
from trainer.command_line import config as configuration
from trainer.distributed.launch import connect
from trainer.errors import BAD_INPUT, CHECKPOINT, UserError
from trainer.main import train
from trainer.recipe import Report
from trainer.reporting.console import Console

TINY = "--tokenizer train --vocab_size 300 --d_model 16 --num_layers 1 --num_heads 2 --max_length 32 --dropout 0.1"
TINY += " --batch_size 4 --max_steps 12 --warmup_steps 2 --learning_rate 1e-3 --save_every 4 --eval_every 4 --log_every 2"
TINY += " --num_workers 0 --keep_last 0 --no_use_tensorboard --device cpu"


class Quiet(Gpt2Wikitext):
    """Without the sample at the end, which takes longer than the training."""

    report_class = Report


def launch(*flags: str, recipe: Gpt2Wikitext | None = None) -> str:
    """One launch in this process; its output. Raises its UserError, with the output so far as `.output`."""
    recipe = recipe or Quiet()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            parsed = configuration.parse(recipe.config_class, recipe.presets, flags, recipe.name)
            train(recipe, parsed, flags, connect("cpu", 1), Console(None, True))
        except UserError as error:
            error.output = output.getvalue()  # type: ignore[attr-defined]
            raise
    return output.getvalue()


def refused(*flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        launch(*flags)
    assert "\n" not in str(caught.value)  # one line for a person
    return caught.value


def write_text(folder: Path, text: str = "to be or not that is the question whether tis nobler in mind suffer") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = text.split()
    for name, rows in (("train", 150), ("validation", 8), ("test", 8)):
        lines = (" ".join(words[(i * i + 3 * k) % len(words)] for k in range(12)) for i in range(rows))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def flags(data: Path, run: Path | None, *more: str) -> list[str]:
    where = [] if run is None else ["--output_dir", str(run)]
    return [*TINY.split(), "--data_dir", str(data), *where, *more]


def steps(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("checkpoint_step_")) for p in (run / "checkpoints").glob("checkpoint_step_*"))


def saved_config(run: Path, step: int) -> dict[str, dict[str, object]]:
    return yaml.safe_load((run / "checkpoints" / f"checkpoint_step_{step}" / "config.yaml").read_text())


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """{file: (content, modification time)}, except the lock, which each launch takes and empties."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            contents[str(path)] = (os.readlink(path), path.lstat().st_mtime_ns)
        elif path.is_file() and path.name != ".lock":
            contents[str(path)] = (path.read_bytes().hex(), path.stat().st_mtime_ns)
    return contents


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMECURVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; never changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    launch(*flags(data, run))
    return run


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run stopped at step 8; never changed."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    launch(*flags(data, run, "--stop_at_step", "8"))
    return run


@pytest.fixture
def halfway(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


@pytest.fixture
def complete(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


# The same command


def test_the_same_command_continues_to_the_same_weights(data: Path, halfway: Path, finished: Path) -> None:
    output = launch(*flags(data, halfway))
    assert "Resumed from step 8" in output
    assert steps(halfway) == [4, 8, 12]
    assert same_weights(halfway / "checkpoints" / "checkpoint_final", finished / "checkpoints" / "checkpoint_final")
    assert json.loads((halfway / "status.json").read_text())["state"] == "finished"


def test_the_same_command_continues_where_steps_were_typed_over_a_files_epochs(data: Path, tmp_path: Path) -> None:
    """As over the epochs of a preset."""
    (tmp_path / "epochs.yaml").write_text("max_epochs: 90\n")
    command = flags(data, tmp_path / "run", "--config", str(tmp_path / "epochs.yaml"))
    launch(*command, "--stop_at_step", "4")
    assert "Finished at step 12" in launch(*command)


def test_what_is_not_typed_comes_from_the_checkpoint_not_from_the_defaults(data: Path, halfway: Path) -> None:
    launch("--output_dir", str(halfway))  # no model flag, no data flag
    assert steps(halfway) == [4, 8, 12]
    for section in ("model", "data", "optimisation"):
        assert saved_config(halfway, 12)[section] == saved_config(halfway, 4)[section]
    assert saved_config(halfway, 12)["run"]["save_every"] == 4
    assert saved_config(halfway, 12)["model"]["d_model"] == 16
    assert saved_config(halfway, 12)["data"]["data_dir"] == [str(data)]


def test_flags_of_one_launch_are_not_taken_over(data: Path, halfway: Path) -> None:
    """`--stop_at_step 8` ended the launch that wrote the checkpoint; it must not end the next one."""
    assert "Finished at step 12" in launch("--output_dir", str(halfway))


def test_flags_of_the_run_section_are_free(data: Path, halfway: Path) -> None:
    output = launch(*flags(data, halfway, "--log_every", "1", "--save_every", "2", "--num_workers", "1", "--patience", "9"))
    assert "Resumed from step 8" in output
    assert steps(halfway) == [4, 8, 10, 12]
    assert "->" not in output


def test_a_finished_run_reports_it_and_writes_nothing(data: Path, finished: Path) -> None:
    before = content(finished)
    output = launch(*flags(data, finished))
    assert "Already finished (last step) at step 12, nothing to do" in output
    assert "--max_steps" in output  # the way on
    assert content(finished) == before


@pytest.mark.parametrize(("flag", "reason"), [(("--target_loss", "100"), "target loss"), (("--patience", "1"), "patience")])
def test_a_run_that_finished_early_is_finished_too(data: Path, tmp_path: Path, flag: tuple[str, str], reason: str) -> None:
    worse = ("--learning_rate", "3.0", "--warmup_steps", "0") if reason == "patience" else ()  # evaluation never improves
    argv = flags(data, tmp_path, "--eval_every", "1", *flag, *worse)
    launch(*argv)
    reached = steps(tmp_path)[-1]
    assert reached < 12
    before = content(tmp_path)
    assert f"Already finished ({reason}) at step {reached}" in launch(*argv)
    assert content(tmp_path) == before


def test_patience_may_wait_for_another_metric_than_the_best(data: Path, tmp_path: Path) -> None:
    """The loss falls throughout, and every better one is the best model; what patience waits for never rises."""

    class Waiting(Quiet):
        patience_metric = ("val_perplexity", "higher")

    argv = flags(data, tmp_path, "--eval_every", "1", "--patience", "2")
    output = launch(*argv, recipe=Waiting())
    assert "Finished at step 3: patience" in output
    assert os.readlink(tmp_path / "checkpoints" / "best_model") == "checkpoint_step_3"
    assert "Already finished (patience) at step 3" in launch(*argv, recipe=Waiting())


def test_a_finished_run_is_finished_whatever_becomes_of_its_picture(data: Path, tmp_path: Path) -> None:
    class UnluckyReport(Report):
        def baseline(self, *_: object) -> tuple[str, float]:
            raise ValueError("no baseline today")

    class Unlucky(Quiet):
        report_class = UnluckyReport

    output = launch(*flags(data, tmp_path), recipe=Unlucky())
    assert "WARNING: no plot: no baseline today" in output
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_the_report_needs_no_more_memory_than_there_is(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP and ZeRO the model may fit into the memory of no host; for more than there is the system kills."""
    monkeypatch.setattr("trainer.reporting.final_report.virtual_memory", lambda: SimpleNamespace(available=100))
    output = launch(*flags(data, tmp_path), recipe=Gpt2Wikitext())
    assert "No report: it would take the model's 0.0 GiB in one process" in output
    assert "Sample: " not in output
    assert (tmp_path / "plots" / "loss.png").exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_a_resumed_run_lets_go_of_the_files_it_was_read_from(data: Path, tmp_path: Path) -> None:
    """A deleted checkpoint that is mapped would keep its room on the disk until the run ends."""
    mapped: list[bool] = []

    class Watching(Quiet):
        def learning_rate(self, *arguments: Any) -> float:
            mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text())
            return super().learning_rate(*arguments)

    launch(*flags(data, tmp_path, "--stop_at_step", "2"))
    launch(*flags(data, tmp_path), recipe=Watching())
    assert mapped
    assert not any(mapped)


def test_the_copies_of_saves_are_let_go_before_the_report(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[RankWriter] = []
    made = RankWriter.__init__

    def make(share: RankWriter, *arguments: Any) -> None:
        made(share, *arguments)
        shares.append(share)

    class Looking(Report):
        def after_training(self, *_: Any) -> None:
            held.append(len(shares[0]._files))
            raise UserError("no answer fits; shorten it")

    class Looked(Gpt2Wikitext):
        report_class = Looking

    held: list[int] = []
    monkeypatch.setattr(RankWriter, "__init__", make)
    output = launch(*flags(data, tmp_path), recipe=Looked())
    assert held == [0]
    assert "WARNING: the report after training failed: no answer fits; shorten it\n" in output  # and the run ends well


def test_a_run_that_reached_its_target_before_any_evaluation_ends_well(data: Path, tmp_path: Path) -> None:
    argv = flags(data, tmp_path, "--target_loss", "100", "--eval_every", "0")
    output = launch(*argv, recipe=Gpt2Wikitext())
    assert "Finished at step 1: target loss" in output
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_a_run_killed_just_before_its_last_link_is_finished_by_the_same_command(data: Path, complete: Path) -> None:
    (complete / "checkpoints" / "checkpoint_final").unlink()
    launch(*flags(data, complete), recipe=Gpt2Wikitext())
    assert os.readlink(complete / "checkpoints" / "checkpoint_final") == "checkpoint_step_12"
    assert json.loads((complete / "status.json").read_text())["state"] == "finished"


def test_a_launch_with_stop_at_step_at_the_last_step_finishes_the_run(data: Path, tmp_path: Path) -> None:
    launch(*flags(data, tmp_path, "--stop_at_step", "12"))
    assert (tmp_path / "checkpoints" / "checkpoint_final").is_dir()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_a_run_stopped_at_a_step_goes_on(data: Path, stopped: Path, halfway: Path) -> None:
    status = json.loads((stopped / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("stopped", "stop_at_step", 8)
    assert "Finished at step 12" in launch(*flags(data, halfway))


def test_resume_never_refuses_a_directory_that_holds_a_run(data: Path, halfway: Path, tmp_path: Path) -> None:
    before = content(halfway)
    error = refused(*flags(data, halfway, "--resume", "never"))
    assert error.exit_code == BAD_INPUT
    assert "holds a run at step 8" in str(error)
    assert "--run_name" in str(error)
    assert content(halfway) == before
    assert "Finished at step 4" in launch(*flags(data, tmp_path / "new", "--resume", "never", "--max_steps", "4"))


@pytest.mark.parametrize(
    "argv", [["--resume_from", "nowhere"], ["--data_dir", "nowhere"], ["--batch_size", "7", "--num_heads", "3"]]
)
def test_a_refused_start_leaves_no_directory_behind(data: Path, tmp_path: Path, argv: list[str]) -> None:
    refused(*flags(data, tmp_path / "runs" / "gpt2" / "run", *argv))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    refused(*flags(data, tmp_path / "mine", *argv))
    assert (tmp_path / "mine").is_dir()


def test_resume_never_and_resume_from_contradict(data: Path, halfway: Path) -> None:
    source = str(halfway / "checkpoints" / "checkpoint_step_4")
    assert "contradict" in str(refused(*flags(data, halfway, "--resume", "never", "--resume_from", source)))


# Changes


@pytest.mark.parametrize(
    ("change", "name", "old", "new"),
    [
        (("--learning_rate", "5e-4"), "learning_rate", "0.001", "0.0005"),
        (("--max_steps", "16"), "max_steps", "12", "16"),
        (("--max_steps", "10"), "max_steps", "12", "10"),
        (("--weight_decay", "0.2"), "weight_decay", "0.01", "0.2"),
        (("--beta2", "0.99"), "beta2", "0.95", "0.99"),
    ],
)
def test_changes_to_the_optimisation_need_resume_from(
    data: Path, halfway: Path, change: tuple[str, str], name: str, old: str, new: str
) -> None:
    before = content(halfway)
    error = refused(*flags(data, halfway, *change))
    assert error.exit_code == BAD_INPUT
    assert f"{name}: the run has {old}, asked for {new}" in str(error)
    assert "--resume_from" in str(error)
    assert content(halfway) == before

    output = launch(*flags(data, halfway, *change, "--resume_from", str(halfway / "checkpoints" / "checkpoint_step_8")))
    assert f"{name}: {old} -> {new}" in output
    last = steps(halfway)[-1]
    assert last == (int(new) if name == "max_steps" else 12)
    assert str(saved_config(halfway, last)["optimisation"][name]) == new


def test_a_typed_default_counts_as_typed(data: Path, halfway: Path) -> None:
    """3e-4 is the default of --learning_rate, but the run has another: requesting it is a change."""
    assert "learning_rate: the run has 0.001, asked for 0.0003" in str(refused(*flags(data, halfway, "--lr", "3e-4")))


@pytest.mark.parametrize("explicitly", [False, True])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("--d_model", "32"), ("d_model: ", "has 16, asked for 32")),
        (("--dropout", "0.2"), ("dropout: ", "has 0.1, asked for 0.2")),
        (("--packing", "rows"), ("packing: ", "has blocks, asked for rows")),
        (("--seed", "7"), ("seed: ", "has 42, asked for 7")),
        (("--batch_size", "8"), ("effective batch: ", "has 4 x 1 = 4, asked for 8 x 1 = 8")),
        (("--gradient_accumulation_steps", "3"), ("effective batch: ", "has 4 x 1 = 4, asked for 4 x 3 = 12")),
    ],
)
def test_another_model_data_seed_or_effective_batch_is_refused(
    data: Path, halfway: Path, change: tuple[str, str], parts: tuple[str, str], explicitly: bool
) -> None:
    before = content(halfway)
    how = ("--resume_from", "checkpoint_step_8") if explicitly else ()
    error = refused(*flags(data, halfway, *change, *how))
    assert error.exit_code == BAD_INPUT
    for part in (*parts, "--run_name", "--init_from"):  # both values and the way out
        assert part in str(error)
    assert content(halfway) == before


def test_the_same_effective_batch_may_be_split_otherwise(data: Path, halfway: Path) -> None:
    output = launch(*flags(data, halfway, "--batch_size", "2", "--gradient_accumulation_steps", "2"))
    assert "Resumed from step 8" in output
    assert steps(halfway) == [4, 8, 12]
    assert saved_config(halfway, 12)["optimisation"]["batch_size"] == 2


def test_other_data_under_the_same_name_is_refused(data: Path, halfway: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "text"))
    run = tmp_path / "other"
    launch(*flags(copy, run, "--stop_at_step", "4"))
    write_text(copy, "entirely different words now stand in the very same place of this disk so that")
    before = content(run)
    error = refused(*flags(copy, run))
    assert error.exit_code == BAD_INPUT
    assert "data fingerprint" in str(error)
    assert "--init_from" in str(error)
    assert content(run) == before


def test_a_run_goes_on_with_other_data_where_that_is_asked_for_and_remembers_it(data: Path, tmp_path: Path) -> None:
    copy, run = Path(shutil.copytree(data, tmp_path / "text")), tmp_path / "other"
    launch(*flags(copy, run, "--stop_at_step", "4"))

    def state(step: int) -> dict[str, Any]:
        return json.loads((run / "checkpoints" / f"checkpoint_step_{step}" / "trainer_state.json").read_text())

    write_text(copy, "that to be or not is the question whether tis nobler in mind suffer")
    output = launch(*flags(copy, run, "--stop_at_step", "8", "--data_changed", "accept"))
    assert re.search(r"WARNING: data fingerprint: \S+ was trained on \w+, this is \w+; going on with these", output)
    assert "Resumed from step 4" in output
    assert state(8)["data_fingerprint"] != state(4)["data_fingerprint"]
    assert state(8)["train_state"]["data_changes"] == [[4, state(4)["data_fingerprint"]]]
    write_text(copy, "nobler to be or not that is the question whether tis in mind suffer")
    assert "--data_changed accept" in str(refused(*flags(copy, run)))  # the choice was of one launch


def test_other_settings_of_the_data_may_be_asked_for_too(data: Path, halfway: Path) -> None:
    output = launch(*flags(data, halfway, "--stop_at_step", "9", "--packing", "rows", "--data_changed", "accept"))
    assert "packing: blocks -> rows" in output
    assert "d_model: checkpoint_step_9" in str(refused(*flags(data, halfway, "--d_model", "32", "--data_changed", "accept")))


def test_the_same_data_may_lie_elsewhere(data: Path, halfway: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "moved"))
    output = launch(*flags(copy, halfway), "--stop_at_step", "9")
    assert f"data_dir: {data} -> {copy}" in output
    assert "Resumed from step 8" in output


def test_other_settings_of_the_data_are_refused_naming_both(data: Path, halfway: Path) -> None:
    error = refused(*flags(data, halfway), "--packing", "rows")
    assert "packing: checkpoint_step_8 has blocks, asked for rows" in str(error)


# --resume_from


def test_resume_from_inside_the_run_rolls_it_back(data: Path, complete: Path) -> None:
    output = launch(*flags(data, complete, "--resume_from", str(complete / "checkpoints" / "checkpoint_step_4")))
    assert "Resumed from step 4" in output
    assert "Rolled back: set aside" in output
    rolled_back = complete / "checkpoints" / "rolled_back_1"
    assert {p.name for p in rolled_back.iterdir() if not p.is_symlink()} == {"checkpoint_step_8", "checkpoint_step_12"}
    assert same_weights(rolled_back / "checkpoint_step_12", complete / "checkpoints" / "checkpoint_step_12")
    at = [json.loads(line) for line in (complete / "metrics.jsonl").read_text().splitlines()]
    logged = [row["step"] for row in at if "train/loss" in row]
    assert logged == [1, 2, 4, 6, 8, 10, 12]


def test_a_roll_back_survives_a_kill_before_the_next_save(data: Path, complete: Path) -> None:
    """The later checkpoints are set aside at once: the same command without --resume_from must not take them up again."""
    launch(*flags(data, complete, "--resume_from", "checkpoint_step_4", "--stop_at_step", "4"))
    assert steps(complete) == [4]
    assert "Resumed from step 4" in launch(*flags(data, complete, "--stop_at_step", "5"))


def test_resume_from_of_the_last_checkpoint_of_a_finished_run(data: Path, complete: Path) -> None:
    before = content(complete)
    output = launch(*flags(data, complete, "--resume_from", "checkpoint_final"), recipe=Gpt2Wikitext())
    assert "is at step 12 of 12, nothing to do; give a larger --max_steps" in output
    assert content(complete) == before


def test_a_kill_between_the_last_save_and_its_final_link_is_made_good(data: Path, complete: Path) -> None:
    """Also where the command, given again, names a checkpoint."""
    (complete / "checkpoints" / "checkpoint_final").unlink()
    output = launch(*flags(data, complete, "--resume_from", "checkpoint_step_12"), recipe=Gpt2Wikitext())
    assert "Finished at step 12" in output
    assert (complete / "checkpoints" / "checkpoint_final").resolve().name == "checkpoint_step_12"


def test_a_new_run_from_a_checkpoint_past_its_last_step_is_none(data: Path, complete: Path, tmp_path: Path) -> None:
    source = str(complete / "checkpoints" / "checkpoint_final")
    output = launch(*flags(data, tmp_path / "new", "--resume_from", source, "--max_steps", "7"), recipe=Gpt2Wikitext())
    assert "is at step 12 of 7, nothing to do" in output
    assert not (tmp_path / "new").exists()


def test_resume_from_another_run_starts_a_new_run_directory(data: Path, finished: Path, tmp_path: Path) -> None:
    before = content(finished)
    source = finished / "checkpoints" / "checkpoint_step_8"
    argv = flags(data, tmp_path / "branch", "--resume_from", str(source))
    output = launch(*argv, "--stop_at_step", "10")
    assert "Resumed from step 8" in output
    assert content(finished) == before
    # The very same command again, as a scheduler would: it goes on from its own checkpoint.
    output = launch(*argv)
    assert "already holds a run" in output
    assert "Resumed from step 10" in output
    assert same_weights(tmp_path / "branch" / "checkpoints" / "checkpoint_final", finished / "checkpoints" / "checkpoint_final")


@pytest.mark.parametrize("ending", ["", ".pt", ".pth"])
@pytest.mark.parametrize("below", ["", "checkpoints/", "absolute"])
def test_file_endings_of_checkpoints_are_ignored(data: Path, halfway: Path, ending: str, below: str) -> None:
    below = f"{halfway}/checkpoints/" if below == "absolute" else below
    output = launch(*flags(data, halfway, "--resume_from", f"{below}checkpoint_step_4{ending}", "--stop_at_step", "5"))
    assert "Resumed from step 4" in output


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(data: Path, halfway: Path) -> None:
    error = refused(*flags(data, halfway, "--resume_from", "checkpoint_step_999"))
    assert "checkpoint_step_999" in str(error)
    assert str(halfway / "checkpoints" / "checkpoint_step_8") in str(error)


def test_a_command_takes_the_checkpoint_of_the_latest_run_or_none(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--stop_at_step", "1"]
    launch(*flags(data, None, "--run_name", "first", *short))
    launch(*flags(data, None, "--run_name", "second", "--checkpoint_dir", "elsewhere", *short))
    Path("runs/gpt2_wikitext/plan_learning_rate.png").touch()  # as --plan leaves it

    def found(model_path: str) -> Path:
        return find_checkpoint(Quiet(), model_path, connect("cpu", 1))[0].path

    for path in ("checkpoints/checkpoint_step_1", "checkpoint_step_1.pt", "elsewhere/checkpoint_step_1"):
        assert found(path) == tmp_path / "elsewhere" / "checkpoint_step_1"
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(UserError) as caught:
        found("checkpoints/checkpoint_step_1")
    missing, other = tmp_path / "elsewhere" / "checkpoint_step_1", "runs/gpt2_wikitext/first/checkpoints/checkpoint_step_1"
    assert str(caught.value) == (
        "no checkpoint folder at checkpoints/checkpoint_step_1, and the latest run (runs/gpt2_wikitext/second) has no "
        f"{missing}; there are: {other}"
    )


def test_of_many_checkpoints_three_are_named_those_beside_the_typed_path_first(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("typed", "latest", "older")}
    for folder in runs.values():
        for name in ("best_model", "checkpoint_step_1"):
            (folder / name).mkdir(parents=True)
            (folder / name / "manifest.json").touch()
    del runs["typed"]
    with pytest.raises(UserError) as caught:
        resolve(f"{tmp_path}/typed/best_modle", runs)
    named = [f"{tmp_path}/{name}" for name in ("typed/best_model", "typed/checkpoint_step_1", "latest/best_model")]
    assert str(caught.value) == f"no checkpoint folder at {tmp_path}/typed/best_modle; there are: {', '.join(named)}"


def test_another_recipes_checkpoint_is_refused(data: Path, halfway: Path) -> None:
    class Other(Quiet):
        name = "another_recipe"

    with pytest.raises(UserError, match="was written by recipe 'gpt2_wikitext', not 'another_recipe'"):
        launch(*flags(data, halfway), recipe=Other())


# --init_from


def test_init_from_takes_the_weights_only(data: Path, finished: Path, tmp_path: Path) -> None:
    source = finished / "checkpoints" / "checkpoint_step_8"
    argv = flags(data, tmp_path, "--init_from", str(source), "--seed", "7")
    output = launch(*argv, "--learning_rate", "1e-30", "--weight_decay", "0", "--max_steps", "1", "--warmup_steps", "0")
    assert "Resumed" not in output
    assert steps(tmp_path) == [1]
    assert same_weights(tmp_path / "checkpoints" / "checkpoint_step_1", source)
    moments = load_file(tmp_path / "checkpoints" / "checkpoint_step_1" / "optimizer.safetensors")
    assert float(moments["step"]) == 1


def test_a_run_begun_by_init_from_resumes_with_the_same_command(data: Path, finished: Path, tmp_path: Path) -> None:
    argv = flags(data, tmp_path, "--init_from", str(finished / "checkpoints" / "checkpoint_final"))
    launch(*argv, "--stop_at_step", "4")
    assert "Resumed from step 4" in launch(*argv, "--stop_at_step", "5")


def test_another_models_weights_are_refused_with_each_difference(data: Path, finished: Path, tmp_path: Path) -> None:
    init_from = ["--init_from", str(finished / "checkpoints" / "checkpoint_final")]
    error = refused(*flags(data, tmp_path / "run", *init_from, "--d_model", "32", "--num_layers", "2"))
    assert error.exit_code == BAD_INPUT
    assert "d_model: " in str(error)
    assert "has 16, asked for 32" in str(error)
    assert "has 1, asked for 2" in str(error)
    error = refused(*flags(data, tmp_path / "run", *init_from, "--vocab_size", "290"))
    assert error.exit_code == CHECKPOINT
    assert "holds another model" in str(error)
    assert "(300, 16) instead of (290, 16)" in str(error)
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("damage", ["manifest", "byte"])
def test_init_from_a_damaged_checkpoint_is_refused(data: Path, complete: Path, tmp_path: Path, damage: str) -> None:
    source = complete / "checkpoints" / "checkpoint_step_8"
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    if damage == "manifest":  # unfinished or tampered with: it must not pass for a folder of transformers' instead
        (source / "manifest.json").unlink()
    refused(*flags(data, tmp_path / "new", "--init_from", str(source), "--max_steps", "1"))


# Names


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "default"),
        (["--preset", "quick"], "quick"),
        (["--d_model", "512"], "default-d_model512"),
        (["--preset", "quick", "--lr", "1e-3"], "quick-learning_rate0.001"),
        (["--d_model", "512", "--log_every", "7", "--num_workers", "0", "--max_training_hours", "1"], "default-d_model512"),
        (["--max_epochs", "3", "--n_layers", "2"], "default-num_layers2-max_epochs3"),
        (["--d_model", "768"], "default"),  # the default, typed
    ],
)
def test_default_run_names(argv: list[str], name: str) -> None:
    recipe = Gpt2Wikitext()
    assert configuration.run_name(configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name)) == name


def test_without_a_name_the_same_command_finds_its_run_and_another_gets_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = flags(data, None, "--stop_at_step", "2")
    launch(*small)
    assert "Resumed from step 2" in launch(*small, "--stop_at_step", "3")
    launch(*small, "--d_model", "32")
    runs = {p.name for p in (tmp_path / "runs" / "gpt2_wikitext").iterdir()}
    assert len(runs) == 2
    assert all(name.startswith("default-d_model") for name in runs)


def test_a_yaml_file_names_the_run_and_flags_win_over_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = iter(TINY.replace("--no_use_tensorboard", "--use_tensorboard false").split())
    pairs = {flag.removeprefix("--"): next(argv) for flag in argv}
    (tmp_path / "mine.yaml").write_text("\n".join(f"{k}: {v}" for k, v in {**pairs, "data_dir": data}.items()))
    output = launch("--config", "mine.yaml", "--stop_at_step", "2")
    assert str(Path("runs", "gpt2_wikitext", "mine")) in output
    assert "Resumed from step 2" in launch("--config", "mine.yaml", "--stop_at_step", "3")
    assert "max_steps: the run has 12, asked for 20" in str(
        refused("--config", "mine.yaml", "--max_steps", "20", "--run_name", "mine")
    )


# What is left behind


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00garbage"),
        lambda run: (run / "config.yaml").write_text("run: [unclosed"),
        lambda run: (run / "config.yaml").unlink(),
        lambda run: (run / "status.json").write_text("{"),
        lambda run: (run / "metrics.jsonl").write_bytes(b'{"step": 2, "train/loss": 1.0}\n{"step": 99, "tr'),
        lambda run: (run / "metrics.jsonl").unlink(),
    ],
    ids=["config-bytes", "config-yaml", "config-missing", "status", "metrics-cut", "metrics-missing"],
)
def test_a_damaged_file_of_the_run_directory_does_not_stop_a_resume(
    data: Path, halfway: Path, damage: Callable[[Path], object]
) -> None:
    """Kills and full disks leave such files; the checkpoint alone decides."""
    damage(halfway)
    assert "Resumed from step 8" in launch(*flags(data, halfway))
    rows = [json.loads(line) for line in (halfway / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 12


# Checkpoints that are not where they were


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(data: Path, halfway: Path, tmp_path: Path) -> None:
    """A scratch disk that is not mounted: it once started at step 0 and emptied metrics.jsonl."""
    elsewhere = tmp_path / "elsewhere"
    os.rename(halfway / "checkpoints", elsewhere)
    before = content(halfway)
    for more in ([], ["--resume", "never"]):
        error = refused(*flags(data, halfway, *more))
        assert error.exit_code == CHECKPOINT
        for part in (f"{halfway} holds a run that saved step 8", f"in {halfway / 'checkpoints'}", "--resume_from"):
            assert part in str(error)
        assert content(halfway) == before
    rows = (halfway / "metrics.jsonl").read_text().splitlines()
    output = launch(*flags(data, halfway, "--resume_from", str(elsewhere / "checkpoint_step_8"), "--stop_at_step", "9"))
    assert "Resumed from step 8" in output
    assert (halfway / "metrics.jsonl").read_text().splitlines()[: len(rows)] == rows


@pytest.mark.parametrize("file", ["status.json", "metrics.jsonl"])
def test_either_file_tells_that_checkpoints_are_gone(data: Path, halfway: Path, file: str) -> None:
    shutil.rmtree(halfway / "checkpoints")
    (halfway / file).unlink()
    assert refused(*flags(data, halfway)).exit_code == CHECKPOINT


def test_a_run_killed_before_its_first_save_starts_again_and_says_so(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 2, "train/loss": 5.0}\n')
    (run / "status.json").write_text('{"state": "running", "step": 0, "checkpoint": null}')
    output = launch(*flags(data, run, "--stop_at_step", "2"))
    assert "ended before its first save, at about step 2; starting at step 0" in output


def test_paths_of_a_run_hold_in_any_working_directory(
    data: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative --checkpoint_dir, --output_dir and --data_dir, then the run's own config.yaml from somewhere else."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    relative = os.path.relpath(data, here)
    launch(*flags(Path(relative), Path("run"), "--checkpoint_dir", "kept", "--stop_at_step", "8"))
    monkeypatch.chdir(there)
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["run"]["checkpoint_dir"] == str(here / "kept")
    output = launch("--config", str(here / "run" / "config.yaml"), "--stop_at_step", "0")
    assert "Resumed from step 8" in output
    assert same_weights(here / "kept" / "checkpoint_step_12", finished / "checkpoints" / "checkpoint_step_12")
    assert list(there.iterdir()) == []


# Files that are whole, with a matching hash, and wrong


def deep(depth: int = 100_000) -> str:
    return "[" * depth


def edit_json(key: str, value: object) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        state = json.loads(path.read_text())
        *outer, last = key.split(".")
        inner = state
        for name in outer:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(state))

    return edit


MALFORMED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "python-tag": ("config.yaml", lambda path: path.write_text("!!python/object/apply:os.system ['true']\n")),
    "empty": ("config.yaml", lambda path: path.write_text("")),
    "a-list": ("config.yaml", lambda path: path.write_text("- model\n")),
    "a-tab": ("config.yaml", lambda path: path.write_text("model:\n\td_model: 16\n")),
    "no-utf8": ("config.yaml", lambda path: path.write_bytes(b"model: \xff\xfe")),
    "deep-yaml": ("config.yaml", lambda path: path.write_text(deep(5000))),
    "wrong-type": ("config.yaml", lambda path: path.write_text(path.read_text().replace("d_model: 16", "d_model: wide"))),
    "unknown-flag": ("config.yaml", lambda path: path.write_text(path.read_text().replace("d_model: 16", "width: 16"))),
    "impossible": ("config.yaml", lambda path: path.write_text(path.read_text().replace("batch_size: 4", "batch_size: -4"))),
    "state-missing": ("trainer_state.json", edit_json("loss_scale", None)),
    "train-state-missing": ("trainer_state.json", edit_json("train_state.step", None)),
    "newer-field": ("trainer_state.json", edit_json("train_state.epochs_of_tomorrow", 1)),
    "step-of-type": ("trainer_state.json", edit_json("train_state.step", "8")),
    "state-a-list": ("trainer_state.json", lambda path: path.write_text("[]")),
    "deep-json": ("trainer_state.json", lambda path: path.write_text(deep())),
    "loss-scale": ("trainer_state.json", edit_json("loss_scale", {"scale": -1.0, "growth": 0})),
    "loss-scale-no-fp32": ("trainer_state.json", edit_json("loss_scale", {"scale": 1e300, "growth": 0})),
    "another-step": ("trainer_state.json", edit_json("train_state.step", 7)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_with_a_matching_hash_is_passed_over(data: Path, halfway: Path, case: str) -> None:
    """And refused, in one line, where that checkpoint was asked for."""
    file, damage = MALFORMED[case]
    folder = halfway / "checkpoints" / "checkpoint_step_8"
    damage(folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / file).read_bytes()
    manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    error = refused(*flags(data, halfway, "--resume_from", str(folder)))
    assert error.exit_code == CHECKPOINT
    assert file in str(error)
    output = launch(*flags(data, halfway, "--stop_at_step", "5"))
    assert "WARNING: skipping a damaged checkpoint" in output
    assert "Resumed from step 4" in output


@pytest.mark.parametrize(
    "manifest",
    [
        deep(),
        json.dumps({"format": 2, "files": {"a" * 5000: {"size": 1, "sha256": ""}}}),
        json.dumps({"format": 2, "files": {"\ud800": {"size": 1, "sha256": ""}}}),
        json.dumps({"format": 2, "files": {"nul\0": {"size": 1, "sha256": ""}}}),
    ],
    ids=["deep", "long-name", "surrogate", "nul"],
)
def test_a_malformed_manifest_is_passed_over(data: Path, halfway: Path, manifest: str) -> None:
    (halfway / "checkpoints" / "checkpoint_step_8" / "manifest.json").write_text(manifest)
    assert "Resumed from step 4" in launch(*flags(data, halfway, "--stop_at_step", "5"))


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "config.yaml"])
def test_a_pipe_in_place_of_a_file_is_passed_over(data: Path, halfway: Path, file: str) -> None:
    """To read it would take for ever."""
    path = halfway / "checkpoints" / "checkpoint_step_8" / file
    path.unlink()
    os.mkfifo(path)
    output = launch(*flags(data, halfway, "--stop_at_step", "5"))
    assert f"{file} is not a regular file" in output
    assert "Resumed from step 4" in output


def test_a_copy_of_an_older_checkpoint_is_not_the_newest(data: Path, halfway: Path) -> None:
    """`cp -a checkpoint_step_4 checkpoint_step_9`: it would resume from 4, and set the good 8 aside."""
    folder = halfway / "checkpoints"
    shutil.copytree(folder / "checkpoint_step_4", folder / "checkpoint_step_9")
    output = launch(*flags(data, halfway, "--stop_at_step", "9"))
    assert "is of step 4, so this folder is a copy of another" in output
    assert "Resumed from step 8" in output
