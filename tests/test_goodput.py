"""tools/goodput.py: a kill under torchrun, and what is said of several."""

from __future__ import annotations

from pathlib import Path

import goodput
import pytest
from goodput import Recovery
from launching import ROOT

TOY = ROOT / "tests" / "toy_recipe.py"


def test_the_report_names_the_medians_and_what_was_lost() -> None:
    recoveries = [Recovery(1, 2, 3, 9, 10, 4), Recovery(1, 2, 3, 11, 20, 0), Recovery(2, 3, 4, 11, 12, 7)]
    text = goodput.report(recoveries, 168.0)
    assert "new_step   median  12.0   at most  20.0" in text
    assert "steps done twice: 4, 0, 7" in text
    assert "made progress: 75.0%" in text


def test_a_killed_process_comes_back_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(goodput, "PAUSE_SECONDS", (0.0, 0.1))
    pace = tmp_path / "pace"
    pace.write_text("0.02")
    monkeypatch.setenv("TOY_PACE", str(pace))
    flags = ["--max_steps", "150", "--save_every", "10", "--learning_rate", "1e-2", "--warmup_steps", "4"]
    assert goodput.measure(TOY, flags, tmp_path, kills=1, seed=0) == 0
    said = capsys.readouterr().out
    assert "1 kills of one of two processes" in said
    assert "end weights: equal, bit for bit; the launcher exited with 0" in said
