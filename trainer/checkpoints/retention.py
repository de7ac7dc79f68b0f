"""The folder of a run's checkpoints: which there are, links to them, and which are deleted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoints.checkpoint import TEMPORARY, Checkpoint
from trainer.checkpoints.writing import remove
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.run_directory import fsync_directory
from trainer.state import TrainState

ROLLED_BACK = "rolled_back"


def step_folders(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """(step, path) of the step checkpoints in `folder`, newest first; links and other names do not count."""
    folders = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(re.escape(prefix) + r"(\d+)", path.name)
        if match and path.is_dir() and not path.is_symlink():
            folders.append((int(match[1]), path))
    return sorted(folders, reverse=True)


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished folders that killed saves have left."""
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def newest_good(folder: Path, prefix: str, read: Callable[[Path], Checkpoint], log: Callable[[str], None]) -> Checkpoint | None:
    """The newest step checkpoint that `read` accepts; damaged ones are skipped with a warning. None if there are none at all.

    UserError (exit 5) if all are damaged: a fresh start would bury what might still be rescued.
    """
    folders = step_folders(folder, prefix)
    for _, path in folders:
        try:
            return read(path)
        except UserError as reason:
            log(f"WARNING: skipping a damaged checkpoint: {reason}")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {folder} can be used, as said above; mend what keeps one from being "
            "read, go on from a copy with --resume_from, or start anew under another --run_name",
            CHECKPOINT,
        )
    return None


def link(folder: Path, name: str, target: str) -> None:
    """Point `folder/name` at its sibling `target`, atomically."""
    temporary = folder / f"{TEMPORARY}{name}.link"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    os.replace(temporary, folder / name)
    fsync_directory(folder)


def links(folder: Path) -> dict[str, str]:
    """{link name: target name} of the links in `folder`."""
    return {p.name: os.readlink(p) for p in folder.iterdir() if p.is_symlink()} if folder.is_dir() else {}


def prune(folder: Path, prefix: str, keep_last: int) -> None:
    """Delete old step checkpoints. Kept are the targets of links; the newest `keep_last` (0: 2); and the newest `keep_last`
    (0: all) of those that were not saved just for a new best, so that a series of new bests does not push them out.

    Raises OSError for one that could not be deleted, after deleting the rest.
    """
    folders = [path for _, path in step_folders(folder, prefix)]
    older, failure = folders[keep_last or 2 :], None
    counted = [path for path in folders if not _only_best(path)] if older else []
    kept = {*links(folder).values(), *(path.name for path in counted[: keep_last or None])}
    for path in older:
        if path.name not in kept:
            # Renamed first: a kill in the middle must not leave a folder that looks like a checkpoint.
            deleting = folder / f"{TEMPORARY}{path.name}"
            try:
                os.rename(path, deleting)
                shutil.rmtree(deleting)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def _only_best(path: Path) -> bool:
    """Whether a checkpoint was saved only because it was a new best; False if it cannot be read."""
    try:
        return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["only_best"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def roll_back(folder: Path, prefix: str, step: int) -> list[str]:
    """Move the step checkpoints after `step`, newest first, to a folder where nothing resumes them. Returns their new paths."""
    later = [path for at, path in step_folders(folder, prefix) if at > step]
    if not later:
        return []
    number = 1
    while (rolled_back := folder / f"{ROLLED_BACK}_{number}").exists():
        number += 1
    rolled_back.mkdir()
    names = {path.name for path in later}
    for name, target in links(folder).items():
        if target in names:
            (rolled_back / name).symlink_to(target)
            (folder / name).unlink()
    for path in later:
        os.rename(path, rolled_back / path.name)
    return [str(rolled_back / path.name) for path in later]


def resume_at(folder: Path, prefix: str, state: TrainState, log: Callable[[str], None]) -> None:
    """Restore the folder of a run that is resumed at `state` to what it was at that step. Rank 0 only."""
    for path in roll_back(folder, prefix, state.step):
        log(f"Rolled back: set aside {path}")
    best = f"{prefix}{state.best_step}"
    # A kill between a save and its links has left the old link.
    if state.best_step and links(folder).get("best_model") != best and (folder / best).is_dir():
        link(folder, "best_model", best)
