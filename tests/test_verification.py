"""A checkpoint is hashed once over a launch: three processes, started without a launcher."""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from small_checkpoints import trainer_state

from trainer.backends.tensors import whole_entries
from trainer.checkpoints import retention, verification, writing
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.distributed.control import Control
from trainer.errors import CHECKPOINT, UserError

PROCESSES = 3
LATE = 2  # the process that does not see the older checkpoint, as where a shared file system lags
PREFIX = "checkpoint_step_"


def choose(folder: Path, rank: int) -> dict[str, Any]:
    """What one process does: choose the newest good checkpoint, then verify one that all know; what came of it."""
    control = Control(rank, PROCESSES, timedelta(minutes=1))
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        hashed.append(str(Path(file.name).relative_to(folder)))
        return digest(file, kind)

    hashlib.file_digest = counted

    def lagging(path: Path) -> Checkpoint:
        if path.name == f"{PREFIX}1":
            raise UserError("not there yet")
        return Checkpoint(path)

    if rank == LATE:
        verification.Checkpoint = lagging
    log: list[str] = []

    def newest(verify: verification.Verify) -> str:
        def read(path: Path) -> Checkpoint:
            saved = Checkpoint(path)
            verify(saved)
            return saved

        found = retention.newest_good(folder, PREFIX, read, log.append)
        assert found is not None
        return found.path.name

    outcome: dict[str, Any] = {}
    try:
        outcome["chosen"] = verification.on_main(newest, control)
        verification.verify_together(folder / f"{PREFIX}2", control)
    except UserError as error:
        outcome |= {"error": str(error), "code": error.exit_code}
    return outcome | {"hashed": hashed, "log": log}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, where one byte is wrong in a file of the newer of two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        tensors = {stem: whole_entries({"w": torch.full((9,), float(step))}) for stem in ("model", "optimizer")}
        texts = {"trainer_state.json": trainer_state(step), "config.yaml": "{}"}
        writing.write(folder, f"{PREFIX}{step}", tensors, texts, Control(0, 1, timedelta(minutes=1)))
    damaged = folder / f"{PREFIX}2" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    return forked(PROCESSES, folder, lambda rank: choose(folder, rank))


def test_each_file_is_hashed_by_one_process_that_sees_it(outcomes: list[dict[str, Any]]) -> None:
    files = ("config.yaml", "model.safetensors", "optimizer.safetensors", "trainer_state.json")
    hashed = Counter(file for outcome in outcomes for file in outcome["hashed"])
    assert hashed == {f"{PREFIX}{step}/{file}": step for step in (1, 2) for file in files}  # the newer one is tried twice
    assert all(outcome["hashed"] for outcome in outcomes)
    assert not any(file.startswith(f"{PREFIX}1/") for file in outcomes[LATE]["hashed"])


def test_a_damaged_file_that_any_process_meets_is_passed_over_by_all(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["chosen"] for outcome in outcomes] == [f"{PREFIX}1"] * PROCESSES
    assert len(outcomes[0]["log"]) == 1
    assert "model.safetensors does not match its hash" in outcomes[0]["log"][0]


def test_all_hear_of_it_in_the_same_words_where_there_is_no_other(outcomes: list[dict[str, Any]]) -> None:
    assert len({outcome["error"] for outcome in outcomes}) == 1
    assert "model.safetensors does not match its hash" in outcomes[0]["error"]
    assert {outcome["code"] for outcome in outcomes} == {CHECKPOINT}
