"""Runs a recipe as its own command does, and leaves a file there while rank 0 copies a state, which nothing else shows.

    python tools/marked_run.py MARK recipes/NAME.py ...

Used by tools/torture.py, to kill a run inside the copy.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from trainer.checkpoints import writing


def mark_copies(mark: Path) -> None:
    """From now on `mark` exists during each copy."""
    copy = writing.RankWriter.copy

    def marked(share: writing.RankWriter, tensors: writing.Tensors) -> None:
        mark.touch()
        copy(share, tensors)
        mark.unlink()

    writing.RankWriter.copy = marked  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        mark_copies(Path(sys.argv[1]))
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
