"""After the loop: what is printed and written of a launch that ended well. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from psutil import virtual_memory

from trainer.distributed.stopping import StopReason
from trainer.errors import text_of
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.reporting.run_directory import RunDirectory, write_text_atomic

MOST_OF_MEMORY = 0.8
"""of what is free on the host, that the model of the report may take"""


def report_end(
    logger: MetricsLogger, directory: RunDirectory, reason: StopReason, checkpoint: Path | None, stays_rolled_back: bool
) -> None:
    """status.json, a line and an alert: how the launch ended, and how to go on."""
    log, step = logger.console.log, logger.state.step
    state: Literal["finished", "stopped"] = "finished" if reason.finished else "stopped"
    directory.write_status(state, reason, step, checkpoint)
    ending = f"{state.capitalize()} at step {step:,}: {reason}. Checkpoint: {checkpoint or 'none, nothing was trained'}"
    if reason == StopReason.TARGET_LOSS:
        log("Target loss reached!")
    log(ending)
    logger.alerts.send(state, ending, step=step, reason=reason, loss=logger.state.train_loss)
    if not reason.finished and not logger.session.config.run.fast_dev_run:  # whose folder is thrown away
        flags = ("--resume_from", stays_rolled_back), ("--stop_at_step", reason == StopReason.STOP_AT_STEP)
        without = " and ".join(flag for flag, applies in flags if applies)
        log(f"{f'Without {without} the' if without else 'The'} same command continues this run.")


def log_final_metrics(logger: MetricsLogger, last_evaluation: Mapping[str, float]) -> None:
    """The last evaluation and training loss as `final/...`."""
    final = {key.replace("eval/", "final/"): value for key, value in last_evaluation.items()}
    if logger.state.train_loss is not None:
        final.setdefault("final/train_loss", logger.state.train_loss)
    logger.write(final)


def draw_loss(logger: MetricsLogger, directory: RunDirectory, with_baseline: bool) -> None:
    """plots/loss.png, which cannot fail the run; the baseline takes reading the data. Without a logged loss, nothing."""
    session, console, report = logger.session, logger.console, logger.recipe.report
    try:
        from trainer.reporting.plot import plot_loss

        directory.plots.mkdir(exist_ok=True)
        picture, title = directory.plots / "loss.png", f"{logger.recipe.name}: {directory.path.name}"
        baseline = report.baseline(session.config, session.data) if with_baseline else None
        plot_loss(directory.metrics, picture, title, baseline, unit=report.loss_unit)
        console.log(f"Plot: {picture}")
        if baseline:
            known = {"name": baseline[0], "loss": baseline[1]}
            write_text_atomic(picture.with_name("baseline.json"), json.dumps(known) + "\n")
    except Exception as error:
        console.log_traceback(error)
        console.log(f"WARNING: no plot: {error}")


def draw_report(logger: MetricsLogger, directory: RunDirectory, checkpoint: Path) -> None:
    """The loss plot, and the recipe's own report, of a finished run, which neither can fail; they may be cut short."""
    draw_loss(logger, directory, with_baseline=True)
    session, console = logger.session, logger.console
    if not (session.config.run.eval_every or session.config.run.eval_epochs):
        return console.log("Never evaluated, so no comparison with baselines; `evaluate` makes one")
    if session.data.evaluation and logger.state.evaluated_metric is None:
        return console.log(
            f"No report: eval/{logger.recipe.best_metric} is not finite; lower --learning_rate, or look at the data"
        )
    weights, free = sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors")), virtual_memory().available
    if weights > MOST_OF_MEMORY * free:  # the system would end this process for it, and the launch with it
        sizes = f"the model's {weights / 2**30:,.1f} GiB in one process, and {free / 2**30:,.1f} GiB are free here"
        return console.log(
            f"No report: it would take {sizes}; `evaluate` measures under any launch, in shares under FSDP and ZeRO"
        )
    try:
        logger.recipe.report.after_training(session.config, session.data, directory, checkpoint, console.log)
    except Exception as error:
        console.log_traceback(error)
        console.log(f"WARNING: the report after training failed: {text_of(error)}")
