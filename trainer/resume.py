"""Which run directory, which checkpoint, which configuration: decided on rank 0, the same for every process.

A flag that was not typed takes the checkpoint's value. What was typed and differs is a change: free in `run`, allowed in
`optimisation` with `--resume_from`, refused in `model`, `data`, for the seed and for the effective batch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer import checkpoint as checkpoints
from trainer import config as configuration
from trainer import retention
from trainer.checkpoint import Checkpoint
from trainer.config import Parsed
from trainer.errors import Refusal
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory
from trainer.sections import PER_LAUNCH, Run


@dataclass(frozen=True)
class Plan:
    """What this launch does."""

    config: Any
    directory: RunDirectory
    checkpoint: Checkpoint | None
    same_run: bool
    """the checkpoint belongs to this run directory (False: it starts a new one)"""
    typed: frozenset[str]

    def to_json(self) -> dict[str, Any]:
        """For the other processes."""
        found = self.checkpoint
        return {
            "config": configuration.to_mapping(self.config),
            "directory": [str(self.directory.path), str(self.directory.checkpoints)],
            "checkpoint": None if found is None else [str(found.path), found.digest],
            "same_run": self.same_run,
            "typed": sorted(self.typed),
        }

    @classmethod
    def from_json(cls, recipe: Recipe, value: dict[str, Any], rank: int) -> Plan:
        """The plan of rank 0. Refusal if this process sees another checkpoint (shared file systems lag)."""
        found = None
        if value["checkpoint"]:
            path, digest = value["checkpoint"]
            found = Checkpoint(Path(path))
            if found.digest != digest:
                raise Refusal(
                    f"rank {rank} sees another {path} than rank 0; is it on a shared file system? try again in a minute"
                )
        config = configuration.from_mapping(recipe.Config, value["config"], "plan")
        directory = RunDirectory(Path(value["directory"][0]), Path(value["directory"][1]))
        return cls(config, directory, found, value["same_run"], frozenset(value["typed"]))


def default_directory(recipe: Recipe, parsed: Parsed) -> Path:
    """runs/RECIPE/NAME, unless `--output_dir` or `--run_name` says otherwise."""
    run = parsed.config.run
    return Path(run.output_dir) if run.output_dir else Path("runs", recipe.name, run.run_name or configuration.run_name(parsed))


def make_plan(recipe: Recipe, parsed: Parsed, argv: Sequence[str], say: Callable[[str], None]) -> Plan:
    """Lock the run directory and decide what to do there. Called on rank 0 only; release the directory at the end."""
    run = parsed.config.run
    path = default_directory(recipe, parsed)
    before = _previous(path, "checkpoint_dir")
    checkpoint_dir = run.checkpoint_dir or before
    directory = RunDirectory(path, Path(checkpoint_dir) if checkpoint_dir else None)
    old = Path(before) if before else path / "checkpoints"
    held = retention.step_folders(old, recipe.checkpoint_prefix)
    if held and not retention.step_folders(directory.checkpoints, recipe.checkpoint_prefix):
        raise Refusal(
            f"{path} holds a run whose checkpoints are in {old}; --checkpoint_dir {checkpoint_dir} has none of them: "
            "move them there, leave the flag out, or choose another --run_name"
        )
    try:
        directory.prepare()
        directory.lock(say)
        retention.clear_unfinished(directory.checkpoints)
        found, same_run = _choose(recipe, run, directory, say)
        config = parsed.config if found is None else _merge(recipe, parsed, argv, found, same_run, say)
    except BaseException:
        directory.release(used=False)
        raise
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_dir=checkpoint_dir))
    return Plan(config, directory, found, same_run, parsed.typed)


def _previous(path: Path, flag: str) -> str | None:
    """A value of the run section that the launch before had in this run directory."""
    try:
        return yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))["run"][flag]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def _restarted(environ: Any = os.environ) -> bool:
    """Whether a scheduler or torchrun, not a person, started this command again."""
    return any(int(environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _choose(recipe: Recipe, run: Run, directory: RunDirectory, say: Callable[[str], None]) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from, and whether it is this run's own."""
    folder = directory.checkpoints
    existing = retention.step_folders(folder, recipe.checkpoint_prefix)
    if run.resume == "never":
        if run.resume_from:
            raise Refusal("--resume never and --resume_from contradict each other; keep one")
        if existing:
            raise Refusal(
                f"{folder} holds a run at step {existing[0][0]}; to start anew choose another --run_name or --output_dir"
            )
        return None, True
    if run.resume_from and not (existing and _restarted()):
        path = checkpoints.resolve(run.resume_from, [folder, directory.path])
        inside = path.parent == folder.resolve()
        if inside or not existing:
            asked = Checkpoint(path)
            asked.verify()
            return asked, inside
        if not _restarted() and _previous(directory.path, "resume_from") != run.resume_from:
            raise Refusal(
                f"{folder} holds another run, at step {existing[0][0]}, which did not start from {run.resume_from}; leave "
                "--resume_from out to continue it, or choose another --run_name"
            )
        say(f"{folder} already holds a run: continuing it (--resume_from {run.resume_from} was its start)")
    return retention.newest_good(folder, recipe.checkpoint_prefix, say), True


def _merge(
    recipe: Recipe, parsed: Parsed, argv: Sequence[str], found: Checkpoint, same_run: bool, say: Callable[[str], None]
) -> Any:
    """The checkpoint's configuration with what was asked for on top, if it may be."""
    written_by = found.state.get("recipe")
    if written_by != recipe.name:
        raise Refusal(f"{found.path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
    saved = configuration.from_mapping(
        recipe.Config, yaml.safe_load(found.text("config.yaml")), str(found.path / "config.yaml")
    )
    config = configuration.parse(recipe.Config, recipe.presets, argv, recipe.name, default=saved).config
    own = {name: getattr(parsed.config.run, name) for name in PER_LAUNCH}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **own))

    if saved.run.mixed_precision != config.run.mixed_precision:
        say(f"mixed_precision: {saved.run.mixed_precision} -> {config.run.mixed_precision}")

    way_out = "train it under another --run_name, or take the weights only: --init_from"
    others = configuration.changed(config, saved, ("model", "data"))
    for name in recipe.paths:
        if name in others:
            say("{}: {} -> {}".format(name, *others.pop(name)))
    if others:
        each = "; ".join(f"{name}: {found.path.name} has {old}, asked for {new}" for name, (old, new) in others.items())
        raise Refusal(f"{each}; {way_out} {found.path}")
    old, new = saved.optimisation, config.optimisation
    if old.seed != new.seed or old.init_from != new.init_from:
        name = "seed" if old.seed != new.seed else "init_from"
        raise Refusal(f"{name}: {found.path} has {getattr(old, name)}, asked for {getattr(new, name)}; {way_out} {found.path}")
    if old.effective_batch_size != new.effective_batch_size:
        before, after = (f"{o.batch_size} x {o.gradient_accumulation_steps} = {o.effective_batch_size}" for o in (old, new))
        raise Refusal(
            f"effective batch: {found.path} has {before}, asked for {after}; keep the product, or {way_out} {found.path}"
        )
    for name, (before, after) in configuration.changed(config, saved, ("optimisation",)).items():
        if name in ("batch_size", "gradient_accumulation_steps"):
            continue  # the same effective batch, split otherwise
        if same_run and not parsed.config.run.resume_from:
            raise Refusal(
                f"{name}: the run has {before}, asked for {after}; to change it in mid-run add --resume_from {found.path}, "
                "or start another with --run_name"
            )
        say(f"{name}: {before} -> {after}")
    return config
