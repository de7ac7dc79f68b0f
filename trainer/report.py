"""After the loop: what is said and written of a launch that ended well. Rank 0 only."""

from __future__ import annotations

from trainer.loop import Training
from trainer.metrics import Metrics
from trainer.run_directory import RunDirectory
from trainer.stopping import REASONS

REPORT_SECONDS = 60.0  # a finished run with less than this to its time limit leaves without plot and report


def report(
    loop: Training, directory: RunDirectory, reason: str, metrics: Metrics, seconds_left: float, rolled_back: bool
) -> None:
    """The last words: status.json, the alert, final metrics, the plot, and what the recipe has to show."""
    recipe, session, say, step = loop.recipe, loop.session, loop.console.say, loop.progress.step
    stopped = reason in REASONS or reason == "stop_at_step"
    state = "stopped" if stopped else "finished"
    last = directory.checkpoints / f"{recipe.checkpoint_prefix}{step}"
    directory.write_status(state, reason, step, last)
    ending = f"{state.capitalize()} at step {step:,}: {reason}. Checkpoint: {last}"
    if reason == "target loss":
        say("Target loss reached!")
    say(ending)
    loop.logbook.alerts.send(state, ending, step=step, reason=reason, loss=loop.progress.train_loss)
    if stopped:
        say(f"{'Without --resume_from the' if rolled_back else 'The'} same command continues this run.")
        return
    final = {key.replace("eval/", "final/"): value for key, value in loop.last_evaluation.items()}
    if loop.progress.train_loss is not None:
        final.setdefault("final/train_loss", loop.progress.train_loss)
    metrics.log(step, final)
    if seconds_left < REPORT_SECONDS:
        say("No time left for the plot and the report; tools/plot_run.py and `evaluate` make them")
        return
    try:
        from trainer.plot import plot_loss

        directory.plots.mkdir(exist_ok=True)
        picture, title = directory.plots / "loss.png", f"{recipe.name}: {directory.path.name}"
        baseline = recipe.baseline(session.config, session.data)
        plot_loss(directory.metrics, picture, title, baseline, unit=recipe.loss_unit)
        say(f"Plot: {picture}")
    except Exception as error:  # the run is finished, whatever becomes of its picture
        loop.console.log_traceback(error)
        say(f"WARNING: no plot: {error}")
    try:
        recipe.after_training(session.config, session.data, directory, last, say)
    except Exception as error:
        loop.console.log_traceback(error)
        say(f"WARNING: the report after training failed: {type(error).__name__}: {error}")
