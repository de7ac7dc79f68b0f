"""Which run directory, checkpoint and configuration a launch uses: decided on rank 0, and the same on every process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoints import checkpoint as checkpoints
from trainer.checkpoints import retention, verification
from trainer.checkpoints.changes import config_of, merge
from trainer.checkpoints.checkpoint import STATE, Checkpoint
from trainer.checkpoints.init_from import with_settings
from trainer.checkpoints.verification import Verify
from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.command_line.locations import with_absolute_paths
from trainer.command_line.sections import Run
from trainer.distributed.launch import Launch
from trainer.distributed.stopping import StopReason, finished_reason
from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Recipe
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import SAVE_SECONDS, read_metrics


@dataclass(frozen=True)
class LaunchPlan:
    """What this launch trains, where, and from which checkpoint."""

    config: Any
    directory: RunDirectory
    checkpoint: Checkpoint | None
    same_run: bool
    """the checkpoint belongs to this run directory (False: it starts a new one)"""
    typed: frozenset[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON, to send it to the other processes."""
        saved = self.checkpoint
        return {
            "config": configuration.to_mapping(self.config),
            "directory": [str(self.directory.path), str(self.directory.checkpoints)],
            "checkpoint": None if saved is None else [str(saved.path), saved.digest],
            "same_run": self.same_run,
            "typed": sorted(self.typed),
        }

    @classmethod
    def from_json(cls, recipe: Recipe, value: dict[str, Any], rank: int) -> LaunchPlan:
        """The plan of rank 0. UserError if this process sees another checkpoint (shared file systems lag)."""
        saved = None
        if value["checkpoint"]:
            path, digest = value["checkpoint"]
            saved = Checkpoint(Path(path))
            if saved.digest != digest:
                raise UserError(
                    f"rank {rank} sees another {path} than rank 0; is it on a shared file system? try again in a minute"
                )
        config = configuration.from_mapping(recipe.config_class, value["config"], "plan")
        directory = RunDirectory(Path(value["directory"][0]), Path(value["directory"][1]))
        return cls(config, directory, saved, value["same_run"], frozenset(value["typed"]))


def default_directory(recipe: Recipe, parsed: Parsed) -> Path:
    """The run directory: `--output_dir`, else runs/RECIPE/NAME, NAME being `--run_name` or made from the typed flags."""
    run = parsed.config.run
    return Path(run.output_dir) if run.output_dir else Path("runs", recipe.name, run.run_name or configuration.run_name(parsed))


def plan_launch(recipe: Recipe, parsed: Parsed, argv: Sequence[str], launch: Launch, log: Callable[[str], None]) -> LaunchPlan:
    """The plan of this launch: made on rank 0, sent to the others. Collective. On rank 0 it locks the run directory; the caller
    releases it."""
    plan, failure = None, None

    def decide(verify: Verify) -> dict[str, Any]:
        nonlocal plan
        plan = make_plan(recipe, parsed, argv, log, verify, launch.restarted)
        return plan.to_json()

    try:
        decision = verification.on_main(decide, launch.control)
        if plan is None:
            try:
                plan = LaunchPlan.from_json(recipe, decision, launch.rank)
            except UserError as error:
                failure = error
        launch.control.raise_if_any(failure)
    except BaseException:
        if plan is not None:
            plan.directory.release(used=False)
        raise
    assert plan is not None
    return plan


def make_plan(
    recipe: Recipe,
    parsed: Parsed,
    argv: Sequence[str],
    log: Callable[[str], None],
    verify: Verify,
    restarted: bool = False,
) -> LaunchPlan:
    """Lock the run directory, and decide what to do there. Rank 0 only; the caller releases the directory.

    `restarted`: a scheduler or launcher, not a person, has started this command again.
    """
    parsed = dataclasses.replace(parsed, config=with_absolute_paths(parsed.config))
    run = parsed.config.run
    path = default_directory(recipe, parsed)
    before = earlier_value(path, "checkpoint_dir")
    checkpoint_dir = run.checkpoint_dir or before
    directory = RunDirectory(path, Path(checkpoint_dir) if checkpoint_dir else None)
    old = Path(before) if before else path / "checkpoints"
    held = retention.step_folders(old, recipe.checkpoint_prefix)
    if held and not retention.step_folders(directory.checkpoints, recipe.checkpoint_prefix):
        raise UserError(
            f"{path} holds a run whose checkpoints are in {old}; --checkpoint_dir {checkpoint_dir} has none of them: "
            "move them there, leave the flag out, or choose another --run_name"
        )
    try:
        directory.prepare(log)
        retention.clear_unfinished(directory.checkpoints)
        saved, same_run = choose(recipe, run, directory, log, verify, restarted)
        if saved is None:
            _check_nothing_lost(directory, log)
            config = with_absolute_paths(with_settings(recipe, parsed, argv).config)
        else:
            config = merge(recipe, parsed, argv, saved, same_run, log)
    except BaseException:
        directory.release(used=False)
        raise
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_dir=checkpoint_dir))
    return LaunchPlan(config, directory, saved, same_run, parsed.typed)


def nothing_to_do(recipe: Recipe, plan: LaunchPlan, total_steps: int) -> str | None:
    """A message if the resumed run has nothing left to do, else None. Called before anything is written. Rank 0 only."""
    saved, run = plan.checkpoint, plan.config.run
    if saved is None:
        return None
    state, folder = saved.train_state, saved.path.parent
    final = retention.links(folder).get("checkpoint_final") == saved.path.name
    later = any(step > state.step for step, _ in retention.step_folders(folder, recipe.checkpoint_prefix))
    # Not where this run's newest checkpoint lacks that link: the run was killed after its last save, before its final report.
    if run.resume_from and state.step >= total_steps and (final or later or not plan.same_run):
        return f"{saved.path} is at step {state.step:,} of {total_steps:,}, nothing to do; give a larger --max_steps"
    if not plan.same_run or run.resume_from:
        return None
    reason = finished_reason(state, total_steps, run)
    if reason is None or not final:
        return None
    change = {StopReason.PATIENCE: "--patience 0", StopReason.TARGET_LOSS: "a lower --target_loss"}.get(reason)
    way_on = f"to go on: {change or f'--max_steps N --resume_from {saved.path}'}"
    return f"Already finished ({reason}) at step {state.step:,}, nothing to do; {way_on}"


def _check_nothing_lost(directory: RunDirectory, log: Callable[[str], None]) -> None:
    """Before a run starts at step 0: UserError (exit 5) if its directory tells of checkpoints that are gone."""
    rows = list(read_metrics(directory.metrics)) if directory.metrics.is_file() else []
    saved_steps = [row["step"] for row in rows if SAVE_SECONDS in row]
    try:
        known = json.loads(directory.status.read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = None
    if saved_steps or known:
        what = f"saved step {saved_steps[-1]:,}" if saved_steps else f"had {known}"
        raise UserError(
            f"{directory.path} holds a run that {what}, and no checkpoint of it is in {directory.checkpoints}: is its disk "
            "mounted? Bring them back, give --resume_from a copy, or start anew in a new directory (--run_name NAME)",
            CHECKPOINT,
        )
    if rows and rows[-1]["step"]:
        log(f"{directory.path}: ended before its first save, at about step {rows[-1]['step']:,}; starting at step 0")


def earlier_value(path: Path, flag: str) -> str | None:
    """The value that a flag of the `run` section had in the previous launch in this run directory; None if there is none."""
    config = RunDirectory(path).config
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))["run"][flag] if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError, KeyError, TypeError):
        return None


def choose(
    recipe: Recipe, run: Run, directory: RunDirectory, log: Callable[[str], None], verify: Verify, restarted: bool
) -> tuple[Checkpoint | None, bool]:
    """(the checkpoint to start from, or None; whether it is this run's own)."""
    folder = directory.checkpoints
    existing = retention.step_folders(folder, recipe.checkpoint_prefix)
    if run.resume == "never":
        if run.resume_from:
            raise UserError("--resume never and --resume_from contradict each other; keep one")
        if existing:
            raise UserError(
                f"{folder} holds a run at step {existing[0][0]}; to start anew choose another --run_name or --output_dir"
            )
        return None, True
    if run.resume_from and not (existing and restarted):
        path = checkpoints.resolve(run.resume_from, {str(directory.path): folder})
        inside = path.parent == folder.resolve()
        if inside or not existing:
            return _read(recipe, path, verify), inside
        if not restarted and earlier_value(directory.path, "resume_from") != run.resume_from:
            raise UserError(
                f"{folder} holds another run, at step {existing[0][0]}, which did not start from {run.resume_from}; leave "
                "--resume_from out to continue it, or choose another --run_name"
            )
        log(f"{folder} already holds a run: continuing it (--resume_from {run.resume_from} was its start)")
    return retention.newest_good(folder, recipe.checkpoint_prefix, lambda path: _read(recipe, path, verify), log), True


def _read(recipe: Recipe, path: Path, verify: Verify) -> Checkpoint:
    """The checkpoint at `path`, verified. UserError if a file is damaged, or a value is not one that a run could have saved."""
    saved = Checkpoint(path)
    verify(saved)
    number = path.name.removeprefix(recipe.checkpoint_prefix)
    if number.isdigit() and int(number) != saved.train_state.step:
        raise saved.damaged(STATE, f"is of step {saved.train_state.step}, so this folder is a copy of another")
    if saved.config and saved.state["recipe"] == recipe.name:
        config_of(recipe, saved)
    return saved
