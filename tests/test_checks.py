"""What is refused before the first step, as it would show much later. Mistakes in whole recipes: test_contributing.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from trainer.checks import check_batch_norm
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
