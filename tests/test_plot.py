"""The pictures, and the command line that draws them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from trainer.errors import UserError
from trainer.reporting.plot import _running_mean, curve, draw_runs, plot_loss, save_figure

TOOL = Path(__file__).parents[1] / "tools" / "plot_run.py"


def write_run(folder: Path, points: int = 300, final: float = 3.0) -> Path:
    """A run directory whose losses fall from about 11 to `final`; one training loss is not finite."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, points + 1):
            loss = final + 8 * math.exp(-step / 50)
            row = {"step": step, "train/loss": None if step == 7 else loss, "train/learning_rate": 1e-3 / step}
            file.write(json.dumps(row) + "\n")
            if step % 50 == 0:
                file.write(json.dumps({"step": step, "eval/val_loss": loss + 0.1}) + "\n")
        file.write('{"step": 99999, "train/lo')  # what a kill leaves
    return folder


def has_colour(picture: Path, red: float, green: float, blue: float) -> bool:
    return bool((np.abs(imread(picture)[..., :3] - [red, green, blue]) < 0.02).all(axis=-1).any())


BLUE, RED, GREEN = (0x1F / 255, 0x77 / 255, 0xB4 / 255), (0xD6 / 255, 0x27 / 255, 0x28 / 255), (0.173, 0.627, 0.173)


@pytest.mark.parametrize("points", [60, 300])
def test_one_run_shows_both_losses_and_the_learning_rate(tmp_path: Path, points: int) -> None:
    run = write_run(tmp_path / "run", points)
    plot_loss(run / "metrics.jsonl", run / "plots" / "loss.png", "a title", ("ridge", 4.0), unit="squared error")
    assert all(has_colour(run / "plots" / "loss.png", *colour) for colour in (BLUE, RED, GREEN))
    assert [path.name for path in (run / "plots").iterdir()] == ["loss.png"], "no temporary file is left"


@pytest.mark.filterwarnings("error")
def test_a_run_of_one_loss_behind_its_start_is_drawn_whole(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": loss} for step, loss in ((1, 2.0), (100, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a title")
    figure = draw_runs({"": tmp_path / "metrics.jsonl"}, "train/loss")
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5 < 2.0 < high


def test_text_of_the_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", final=2.5)
    plot_loss(run / "metrics.jsonl", tmp_path / "loss.svg", "a title", ("ridge", 4.0), unit="squared error")
    text = (tmp_path / "loss.svg").read_text()  # matplotlib writes each text as a comment beside its outline
    for part in (
        "a title",
        "ridge (4)",
        "loss (squared error)",
        "optimizer step",
        "learning rate",
        "training loss (last 2.52)",
    ):
        assert part in text
    assert "validation loss (last 2.62, best 2.62 at step 300)" in text


def test_a_run_without_losses_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/learning_rate": 0.1}\n')
    with pytest.raises(UserError, match="holds no train/loss"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "")
    assert not (tmp_path / "loss.png").exists()


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "loss.docx").write_text("old")
    with pytest.raises(ValueError, match="docx"):
        plot_loss(run / "metrics.jsonl", tmp_path / "loss.docx", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.docx", "run"]
    assert (tmp_path / "loss.docx").read_text() == "old"


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    rows = [{"step": 1, "a": 2.0}, {"step": 2, "b": 1.0}, {"step": 3, "a": None}]
    steps, values = curve(rows, "a")
    assert steps == [1, 3]
    assert values[0] == 2.0
    assert math.isnan(values[1])
    assert _running_mean([1.0, math.nan, 3.0, 5.0], window=3) == [1.0, 2.0, 4.0, 4.0]


def test_many_runs_have_a_colour_each(tmp_path: Path) -> None:
    runs = {f"run {i}": write_run(tmp_path / str(i), 50, final=i + 1) / "metrics.jsonl" for i in range(12)}
    save_figure(draw_runs(runs, "train/loss"), tmp_path / "all.svg")
    assert all(f"run {i} (last" in (tmp_path / "all.svg").read_text() for i in range(12))


def test_long_names_are_broken_and_overlap_nothing(tmp_path: Path) -> None:
    """Below the panels, whatever their number and length; the panels keep their height."""
    names = [f"gpt2_wikitext/default-{'wikitext-2-da4e-' * 8}{i}" for i in range(6)]
    runs = {name: write_run(tmp_path / str(i), 50) / "metrics.jsonl" for i, name in enumerate(names)}
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.reporting.plot.save_figure", lambda figure, out: figures.append(figure))
        figures += [draw_runs(runs, "train/loss", title=names[0]), draw_runs({"a": runs[names[0]]}, "train/loss")]
        plot_loss(runs[names[0]], tmp_path / "loss.png", names[0], (names[1], 4.0))
    for figure in figures:
        figure.canvas.draw()
        (legend,), (axis, *_) = figure.legends, figure.axes
        inside, panel, below = figure.bbox, axis.get_tightbbox(), legend.get_window_extent()
        title = figure._suptitle.get_window_extent() if figure._suptitle else None
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in (panel, below, title) if box)
        assert inside.y0 <= below.y0
        assert below.y1 <= min(a.get_tightbbox().y0 for a in figure.axes)
        assert title is None or panel.y1 <= title.y0
    heights = [figure.axes[0].get_window_extent().height for figure in figures]
    assert heights[0] > 0.8 * heights[1]


def test_an_accuracy_has_its_training_curve_and_an_axis_within_0_and_1(tmp_path: Path) -> None:
    rows = [{"step": i, "train/accuracy": i / 10, "eval/val_accuracy": 1.0} for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (axis,) = draw_runs({"": tmp_path / "metrics.jsonl"}, "eval/val_accuracy").axes
    assert [line.get_label() for line in axis.get_lines()] == ["training accuracy (last 1)", "validation accuracy (last 1)"]
    assert axis.get_ylim() == (pytest.approx(0.055), 1.0)
    assert axis.get_ylabel() == "accuracy"


def test_hours_and_items_along_the_bottom(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "train/loss": 3.0, "train/interval_seconds": 1800.0, "train/images_per_sec": 2.0},
        {"step": 10, "eval/val_loss": 3.5},
        {"step": 20, "train/loss": 2.0, "train/interval_seconds": 3600.0, "train/images_per_sec": 3.0},
    ]
    assert curve(rows, "train/loss", "hours") == ([0.5, 1.5], [3.0, 2.0])
    assert curve(rows, "train/loss", "items") == ([3600.0, 14400.0], [3.0, 2.0])
    assert curve(rows, "eval/val_loss", "items") == ([3600.0], [3.5])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--along", "items", "--unit", "nats", "--baseline", "a=b=4.5", "--out", tmp_path / "x.svg"]
    assert run_tool(tmp_path / "run", *arguments).returncode == 0
    text = (tmp_path / "x.svg").read_text()
    assert all(part in text for part in ("images trained on", "loss (nats)", "a=b (4.5)"))


def test_losses_are_drawn_on_a_logarithmic_scale_and_shares_on_a_linear_one(tmp_path: Path) -> None:
    rows = [{"step": i, "eval/val_loss": i / 10, "eval/val_accuracy": i / 10} for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ticks = {}
    for name in ("loss", "accuracy"):
        save_figure(draw_runs({"run": tmp_path / "metrics.jsonl"}, f"eval/val_{name}"), tmp_path / f"{name}.svg")
        ticks[name] = re.findall(r"<!-- (0\.\d+|1\.0) -->", (tmp_path / f"{name}.svg").read_text())
    assert "0.15" in ticks["loss"]
    assert [float(tick) for tick in ticks["accuracy"]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_first_loss_far_above_all_others_does_not_flatten_them(tmp_path: Path) -> None:
    losses = {1: 9.0} | {step: 0.5 + (step % 200) / 1000 for step in range(100, 2000, 100)}
    rows = [{"step": step, "train/loss": loss} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (axis,) = draw_runs({"run": tmp_path / "metrics.jsonl"}, "train/loss").axes
    assert axis.get_ylim() == (pytest.approx(0.49), pytest.approx(0.61))
    assert axis.get_yscale() == "linear"


def run_tool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {"PYTHONPATH": str(TOOL.parents[1]), "HOME": "/nonexistent"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_tool_draws_one_run_into_its_plots_folder_and_several_to_out(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "gpt" / "a"), write_run(tmp_path / "gpt" / "b", final=2.0)
    assert run_tool(a).stdout.strip().endswith(str(a / "plots" / "loss.png"))
    assert (a / "plots" / "loss.png").stat().st_size > 10_000
    done = run_tool(a, b, "--out", tmp_path / "both.svg")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "both.svg").read_text()
    assert "gpt/a (last 3.12)" in text
    assert "gpt/b (last 2.12)" in text
    assert "validation loss" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "holds no metrics.jsonl"),
        (["{}/run", "--metric", "eval/loss"], "it has eval/val_loss, train/learning"),
        (["{}/run", "--out", "x.docx"], "docx"),
        (["{}/run", "--baseline", "bigram"], "--baseline 'bigram': give NAME=VALUE"),
        (["{}/run", "--out", "{}/run/metrics.jsonl/x.png"], "metrics.jsonl"),
    ],
)
def test_errors_of_the_tool_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_run(tmp_path / "run")
    done = run_tool(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
