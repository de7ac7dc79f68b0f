"""The table of runs, and the page with their curves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
from launching import ROOT, environment
from matplotlib.image import imread

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def write_run(folder: Path, width: int, losses: list[float], state: str | None = "finished") -> None:
    folder.mkdir(parents=True)
    rows = [{"step": i, "train/loss": loss, "train/tokens_per_sec": 1234.5} for i, loss in enumerate(losses, start=1)]
    rows += [{"step": len(losses), "eval/val_loss": losses[-1] + 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"model:\n  d_model: {width}\n  num_layers: 2\nrun:\n  log_every: {width}\n")
    if state:
        (folder / "status.json").write_text(json.dumps({"state": state}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "gpt" / "wide", 64, [4.0, 3.0])
    write_run(tmp_path / "gpt" / "<b>small", 16, [4.0, 3.5, 3.25], state=None)
    write_run(tmp_path / "vit" / "quick", 16, [1.0], "failed")
    return tmp_path


def test_the_table_has_a_line_for_each_run_and_the_flags_that_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([str(folder / "gpt")])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"run", "gpt/wide", "gpt/<b>small"}
    assert lines["gpt/wide"].split()[1:] == ["finished", "2", "3.5000", "3.0000", "1,234", "tokens", "d_model=64"]
    assert "running or killed" in lines["gpt/<b>small"]
    assert "d_model=16" in lines["gpt/<b>small"]
    assert "num_layers" not in "".join(lines.values())  # alike
    assert "log_every" not in "".join(lines.values())  # changes nothing of what is trained
    runs.main([str(folder)])
    (other,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("vit/quick"))
    assert "=" not in other  # flags are compared within a recipe


def test_a_run_that_was_killed_is_not_said_to_be_running(folder: Path) -> None:
    write_run(folder / "gpt" / "slow", 64, [4.0], "running")
    hold = "import sys; from pathlib import Path; from trainer.reporting.lock import Lock; Lock(Path(sys.argv[1])).acquire(); "
    command = [sys.executable, "-c", f"{hold}print(flush=True); sys.stdin.read()", str(folder / "gpt" / "slow")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"\n"
        assert runs.summary_of(folder / "gpt" / "slow").state == "running"
        run.kill()
    assert runs.summary_of(folder / "gpt" / "slow").state == "killed"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"]


def test_the_page_needs_no_other_file_and_has_every_run_and_curve(folder: Path) -> None:
    runs.main([str(folder), "--html", str(folder / "page.html")])
    text = (folder / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.count["tr"] == 2 + 3
    assert page.count["svg"] == 2 + 1  # of a single run both losses are in one picture
    assert page.count["h2"] == 2
    assert not page.links
    assert "<b>small" not in text
    assert "gpt/&lt;b&gt;small" in text


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, or Chrome")
def test_a_browser_shows_the_table_and_the_curves(folder: Path) -> None:
    runs.main([str(folder), "--html", str(folder / "page.html")])
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--window-size=1300,1600"]
    command = [str(BROWSER), *options, f"--screenshot={folder}/page.png", (folder / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = (imread(folder / "page.png")[..., :3] * 255).round().astype(int)
    first, second = shown[:, :650], shown[:, 650:]
    for colour in ((31, 119, 180), (255, 127, 14)):  # of the two runs of one recipe, in both of its pictures
        assert all((np.abs(half - colour).sum(-1) < 6).any() for half in (first, second)), colour
    grey, black = (np.abs(shown - 221).sum(-1) < 3).any(1), (shown.sum(-1) < 60).any(1)
    assert grey.sum() >= 5  # the lines below the rows of two tables
    assert black.sum() > 100  # text


def test_a_run_that_was_killed_while_it_wrote_a_file_spoils_no_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "gpt" / "wide" / "status.json").write_text('{"state": "fin')
    (folder / "gpt" / "wide" / "config.yaml").write_text("model:\n  d_model: [64\n")
    runs.main([str(folder)])
    lines = capsys.readouterr().out
    assert "gpt/wide" in lines
    assert "failed" in lines


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        runs.main([str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"runs: no run below {tmp_path}; give a folder that holds RECIPE/NAME/metrics.jsonl\n"
