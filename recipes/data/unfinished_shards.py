"""The progress file that prepare_text keeps beside shards until all are written, so that nobody takes a part for the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROGRESS = ".progress.json"
SHARD_FOLDERS = ("train", "valid")
FIELDS = {"made_from": str, "shards": int, "train": int, "valid": int}


def read_progress(path: Path) -> dict[str, Any]:
    """The progress of a preparation of shards. ValueError, in one line, for a damaged file."""
    try:
        progress = json.loads(path.read_bytes())
        intact = all(type(progress[name]) is kind for name, kind in FIELDS.items())
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; remove it and the shards beside it, and prepare the text again")
    return progress


def check_finished(folder: Path) -> None:
    """ValueError for a folder in which prepare_text has not written all shards yet."""
    progress = folder.parent / PROGRESS
    if folder.name in SHARD_FOLDERS and progress.is_file():
        command = read_progress(progress).get("command")
        raise ValueError(f"{folder} holds a part of the shards that prepare_text was to make; go on with it: {command}")
