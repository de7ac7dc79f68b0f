"""Which run directory, which checkpoint, which configuration: decided on rank 0, the same for every process.

A flag that was not typed takes the checkpoint's value. What was typed and differs is a change: free in `run`, allowed in
`optimisation` with `--resume_from`, refused in `model`, `data`, for the seed and for the effective batch.
"""

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
from trainer.checkpoints.checkpoint import CONFIG, STATE, Checkpoint
from trainer.checkpoints.init_from import with_settings
from trainer.checkpoints.verification import Verify
from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.command_line.locations import locations, with_absolute_paths
from trainer.command_line.sections import PER_LAUNCH, Run
from trainer.distributed.launch import Launch
from trainer.distributed.stopping import StopReason, finished_reason
from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Recipe
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import SAVE_SECONDS, read_metrics


@dataclass(frozen=True)
class LaunchPlan:
    """What this launch does."""

    config: Any
    directory: RunDirectory
    checkpoint: Checkpoint | None
    same_run: bool
    """the checkpoint belongs to this run directory (False: it starts a new one)"""
    typed: frozenset[str]

    def to_json(self) -> dict[str, Any]:
        """For the other processes."""
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
    """runs/RECIPE/NAME, unless `--output_dir` or `--run_name` says otherwise."""
    run = parsed.config.run
    return Path(run.output_dir) if run.output_dir else Path("runs", recipe.name, run.run_name or configuration.run_name(parsed))


def plan_launch(recipe: Recipe, parsed: Parsed, argv: Sequence[str], launch: Launch, log: Callable[[str], None]) -> LaunchPlan:
    """Decide on rank 0, and tell the other processes. Collective. On rank 0 the directory is locked: release it at the end."""
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
    """Lock the run directory and decide what to do there. Called on rank 0 only; release the directory at the end.

    `restarted`: by a scheduler or a launcher, not by a person.
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
        directory.prepare()
        directory.lock(log)
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
    """A message if the run that is resumed has nothing left to do; nothing has been written by then. Rank 0 only."""
    saved, run = plan.checkpoint, plan.config.run
    if saved is None:
        return None
    state, folder = saved.train_state, saved.path.parent
    final = retention.links(folder).get("checkpoint_final") == saved.path.name
    later = any(step > state.step for step, _ in retention.step_folders(folder, recipe.checkpoint_prefix))
    # Its own newest without that link: a run killed after its last save, which has an end to report yet.
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
    """Before a run starts at step 0: UserError (exit 5) if its directory tells of checkpoints, which are not there."""
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
    """A value of the run section that the launch before had in this run directory."""
    config = RunDirectory(path).config
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))["run"][flag] if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError, KeyError, TypeError):
        return None


def choose(
    recipe: Recipe, run: Run, directory: RunDirectory, log: Callable[[str], None], verify: Verify, restarted: bool
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from, and whether it is this run's own."""
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
    """The checkpoint at `path`. UserError unless it is what a save left there, every byte and every value."""
    saved = Checkpoint(path)
    verify(saved)
    number = path.name.removeprefix(recipe.checkpoint_prefix)
    if number.isdigit() and int(number) != saved.train_state.step:
        raise saved.damaged(STATE, f"is of step {saved.train_state.step}, so this folder is a copy of another")
    if saved.config and saved.state["recipe"] == recipe.name:
        _config_of(recipe, saved)
    return saved


def _config_of(recipe: Recipe, saved: Checkpoint) -> Any:
    source = str(saved.path / CONFIG)
    try:
        config = configuration.from_mapping(recipe.config_class, saved.config, source)
        configuration.check(config)
    except UserError as error:
        where = "" if source in str(error) else f"{source}: "
        raise UserError(f"{where}{error}; choose another checkpoint", CHECKPOINT) from None
    return config


def merge(
    recipe: Recipe, parsed: Parsed, argv: Sequence[str], saved: Checkpoint, same_run: bool, log: Callable[[str], None]
) -> Any:
    """The checkpoint's configuration, changed by what was typed now, if it may be."""
    written_by = saved.state["recipe"]
    if written_by != recipe.name:
        raise UserError(f"{saved.path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
    original = _config_of(recipe, saved)
    typed = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name, default=original).config
    config = with_absolute_paths(typed)
    if config.run.fit_batch and parsed.config.optimisation.effective_batch_size == original.optimisation.effective_batch_size:
        split = {name: getattr(original.optimisation, name) for name in ("batch_size", "gradient_accumulation_steps")}
        config = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, **split))
    own = {name: getattr(parsed.config.run, name) for name in PER_LAUNCH}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **own))

    if original.run.mixed_precision != config.run.mixed_precision:
        log(f"mixed_precision: {original.run.mixed_precision} -> {config.run.mixed_precision}")

    way_out = "train it under another --run_name, or take the weights only: --init_from"
    others = configuration.changed(config, original, ("model", "data"))
    accepted = (
        configuration.changed(config, original, ("data",))
        if parsed.config.run.data_changed == "accept"
        else locations(type(config.data))  # where the data are, not what: the fingerprint says whether it is the same
    )
    for name in accepted:
        if name in others:
            log("{}: {} -> {}".format(name, *map(configuration.spelled, others.pop(name))))
    if others:
        each = "; ".join(f"{name}: {saved.path.name} has {old}, asked for {new}" for name, (old, new) in others.items())
        raise UserError(f"{each}; {way_out} {saved.path}")
    old, new = original.optimisation, config.optimisation
    switched = bool(old.ema) != bool(new.ema)  # a checkpoint has averages, or has none; their decay may change
    for name in ("seed", "init_from", *(["ema"] if switched else [])):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise UserError(f"{name}: {saved.path} has {before}, asked for {after}; {way_out} {saved.path}")
    if old.effective_batch_size != new.effective_batch_size:
        before, after = (f"{o.batch_size} x {o.gradient_accumulation_steps} = {o.effective_batch_size}" for o in (old, new))
        raise UserError(
            f"effective batch: {saved.path} has {before}, asked for {after}; keep the product, or {way_out} {saved.path}"
        )
    for name, (before, after) in configuration.changed(config, original, ("optimisation",)).items():
        if name in ("batch_size", "gradient_accumulation_steps"):
            continue  # the same effective batch, split otherwise
        if name == "max_epochs" and old.max_steps and new.max_steps:
            continue  # which decides: the epochs of a preset say nothing, and no checkpoint keeps them
        if same_run and not parsed.config.run.resume_from:
            raise UserError(
                f"{name}: the run has {before}, asked for {after}; to change it in mid-run add --resume_from {saved.path}, "
                "or start another with --run_name"
            )
        log(f"{name}: {before} -> {after}")
    return config
