"""What the loop adds to a step of a bare one, in exact counts: they do not depend on the machine."""

import math
import sys
from pathlib import Path

import pytest
from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from benchmarks.gpu_pieces.results import ResultFile
from benchmarks.gpu_pieces.sessions import Place, connected
from benchmarks.loop import Counts, contenders, counted


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    """Of a step: ours, a bare one, and Accelerate's."""
    folder = tmp_path_factory.mktemp("loop")
    makers = contenders(Place(connected(True), folder, ResultFile(Path(folder, "results.json")), rehearse=True))
    return {name: counted(makers[name]()) for name in ("ours", "bare", "Accelerate")}


def test_the_loop_adds_at_most_four_operations_to_a_step(counts: dict[str, Counts]) -> None:
    assert counts["bare"].operations > 500
    assert counts["ours"].operations - counts["bare"].operations <= 4
    assert counts["ours"].operations < counts["Accelerate"].operations


def test_the_host_reads_the_norm_and_nothing_else(counts: dict[str, Counts]) -> None:
    """Of a gradient on a CPU; on a GPU the optimizer skips a step that is not finite by itself."""
    assert counts["ours"].reads - counts["bare"].reads == 1


def test_the_loop_adds_few_calls_of_python(counts: dict[str, Counts]) -> None:
    added = math.ceil(counts["ours"].calls - counts["bare"].calls)
    assert added <= 45
    assert added < 0.2 * (counts["Accelerate"].calls - counts["bare"].calls)
