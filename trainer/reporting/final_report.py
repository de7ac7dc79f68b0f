"""After the loop: what is printed and written of a launch that ended well. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainer.distributed.stopping import StopReason
from trainer.errors import path_of
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.reporting.run_directory import RunDirectory

REPORT_SECONDS = 60.0  # a finished run with less than this to its time limit leaves without plot and report


def report_end(
    logger: MetricsLogger, directory: RunDirectory, reason: StopReason, checkpoint: Path, stays_rolled_back: bool
) -> None:
    """status.json, a line and an alert: how the launch ended, and how to go on."""
    log, step = logger.console.log, logger.state.step
    state: Literal["finished", "stopped"] = "finished" if reason.finished else "stopped"
    directory.write_status(state, reason, step, checkpoint)
    ending = f"{state.capitalize()} at step {step:,}: {reason}. Checkpoint: {checkpoint}"
    if reason == StopReason.TARGET_LOSS:
        log("Target loss reached!")
    log(ending)
    logger.alerts.send(state, ending, step=step, reason=reason, loss=logger.state.train_loss)
    if not reason.finished:
        log(f"{'Without --resume_from the' if stays_rolled_back else 'The'} same command continues this run.")


def report_finished_run(
    logger: MetricsLogger,
    directory: RunDirectory,
    last_evaluation: Mapping[str, float],
    checkpoint: Path,
    seconds_left: float,
) -> None:
    """Final metrics, the loss plot, and the recipe's own report. Neither plot nor report can fail a finished run."""
    session, console, report = logger.session, logger.console, logger.recipe.report
    final = {key.replace("eval/", "final/"): value for key, value in last_evaluation.items()}
    if logger.state.train_loss is not None:
        final.setdefault("final/train_loss", logger.state.train_loss)
    logger.write(final)
    if seconds_left < REPORT_SECONDS:
        console.log(f"No time left for the plot and the report; {path_of('tools/plot_run.py')} and `evaluate` make them")
        return
    try:
        from trainer.reporting.plot import plot_loss

        directory.plots.mkdir(exist_ok=True)
        picture, title = directory.plots / "loss.png", f"{logger.recipe.name}: {directory.path.name}"
        baseline = report.baseline(session.config, session.data)
        plot_loss(directory.metrics, picture, title, baseline, unit=report.loss_unit)
        console.log(f"Plot: {picture}")
    except Exception as error:
        console.log_traceback(error)
        console.log(f"WARNING: no plot: {error}")
    try:
        report.after_training(session.config, session.data, directory, checkpoint, console.log)
    except Exception as error:
        console.log_traceback(error)
        console.log(f"WARNING: the report after training failed: {type(error).__name__}: {error}")
