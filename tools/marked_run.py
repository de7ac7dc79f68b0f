"""Runs a recipe as its own command does; while rank 0 copies a state to be saved, a file MARK exists.

    python tools/marked_run.py MARK recipes/NAME.py ...

tools/torture.py uses it to kill a run inside the copy, of which no other file tells.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from trainer.checkpoints import writing


def mark_copies(mark: Path) -> None:
    """Patch the copy of a state in this process, so that the file `mark` exists while it lasts."""
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
