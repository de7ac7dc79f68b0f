"""What is refused before the first step, as it would show much later. Mistakes in whole recipes: test_contributing.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.init_from import own_checkpoint
from trainer.checks import check_batch_norm, warn_of_other_tokenizer
from trainer.errors import UserError


class Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@pytest.mark.parametrize(
    ("module", "refused"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.BatchNorm1d(3, track_running_stats=False), True),
        (nn.InstanceNorm1d(3, track_running_stats=True), True),
        (nn.InstanceNorm1d(3), False),
        (nn.SyncBatchNorm(3), False),
        (Frozen(3), False),
        (nn.GroupNorm(1, 3), False),
    ],
)
def test_statistics_of_a_part_of_the_batch_are_refused(module: nn.Module, refused: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(module))
    check_batch_norm(network, cast(Any, SimpleNamespace(processes=1)))
    if not refused:
        check_batch_norm(network, cast(Any, SimpleNamespace(processes=2)))
        return
    with pytest.raises(UserError, match=rf"^1\.0 is a {type(module).__name__}, whose statistics .* or train in one process$"):
        check_batch_norm(network, cast(Any, SimpleNamespace(processes=2)))


@pytest.mark.parametrize(
    ("theirs", "warned"),
    [
        ({"model": {"vocab": {"a": 0, "b": 1}}}, False),
        ({"model": {"vocab": {"b": 0, "a": 1}}}, True),
        ({"model": {}}, False),
        ([], False),
        (None, False),
    ],
)
def test_weights_of_another_tokenizer_are_named(theirs: Any, warned: bool, tmp_path: Path) -> None:
    if theirs is not None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    lines: list[str] = []
    warn_of_other_tokenizer(str(tmp_path), json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "padding": None}), lines.append)
    text = (
        f"WARNING: {tmp_path}/tokenizer.json is another tokenizer than this run's, whose ids mean other text to these weights"
    )
    assert lines == [text] * warned


def test_the_directory_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    message = f"{tmp_path} is the directory of a run; give one of its checkpoints, in {tmp_path / 'checkpoints'}"
    for opened in (own_checkpoint, lambda folder: Checkpoint(Path(folder))):
        with pytest.raises(UserError) as refused:
            opened(str(tmp_path))
        assert str(refused.value) == message
