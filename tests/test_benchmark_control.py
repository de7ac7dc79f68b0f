"""tools/benchmark.py control, small: every number is measured, and of many ranks only one looks for all the others."""

from __future__ import annotations

import pytest
from benchmarks import control

from trainer.distributed import peers


def test_it_measures_every_kind_of_talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 2.0)
    control.main(["--processes", "2", "--simulated", "8"])
    lines = capsys.readouterr().out.splitlines()
    numbers = [float(word.replace(",", "")) for word in lines[2].replace("/", " ").split()]
    assert numbers[0] == 2
    assert len(numbers) == 1 + 2 * len(control.COLUMNS)
    assert min(numbers) > 0
    assert lines[3].startswith("8 ranks as threads over one store: ")
