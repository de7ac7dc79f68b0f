"""The entry point of every recipe: `main(MyRecipe())`. Reads the command line, joins the launch, trains, leaves cleanly.

`train` is the default sub-command. A UserError becomes one line and its exit code; anything else is a bug, with a traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.command_line.secrets import redact, without_urls
from trainer.distributed.signals import die_with_launcher, leave, leaving_at_signals, process_start_monotonic
from trainer.errors import CHECKPOINT, FINISHED, INTERRUPTED, UserError, path_of, user_error
from trainer.recipe import Recipe
from trainer.reporting.console import Console

if TYPE_CHECKING:
    from trainer.checkpoints.resume import LaunchPlan
    from trainer.distributed.launch import Launch
    from trainer.distributed.stopping import StopReason, StopRequests
    from trainer.loop import Training
    from trainer.reporting.alerts import Alerts
    from trainer.reporting.trackers import Trackers
    from trainer.setup import Session


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run `recipe` as the command line says, and leave the process with the exit code of `trainer.errors`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(leaving_at_signals())
        except RuntimeError as error:  # not one thread left
            sys.exit(report_error(error, Console(None, is_main=True)))
        run(recipe, argv)


def run(recipe: Recipe, argv: Sequence[str] | None) -> None:
    """`main`, where signals are heard already."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a data worker that imports the recipe's file
        raise RuntimeError("main(...) must stand below `if __name__ == '__main__':`, or data workers start the training anew")
    if argv is None:
        argv, sys.argv[1:] = sys.argv[1:], redact(sys.argv[1:])  # W&B copies it into files and to its server
    argv = list(argv)
    console = Console(None, int(os.environ.get("RANK") or 0) == 0)  # every process reads the command line, one prints
    launch: Launch | None = None
    code, alike = FINISHED, True
    try:
        command, flags = read_command_line(recipe, argv)
        die_with_launcher()
        run = flags.config.run if isinstance(flags, Parsed) else flags
        with leaving_at_the_time_limit(getattr(run, "max_training_hours", None), console):
            from trainer.backends import backend_of
            from trainer.distributed.launch import connect

            backend, alike = backend_of(os.environ), False  # what went wrong before is the same on all ranks: rank 0 says it
            launch = connect(getattr(run, "device", "auto"), getattr(run, "timeout_minutes", 60.0), backend.before_connect)
        if isinstance(flags, Parsed):
            train(recipe, flags, argv, launch, console)
        else:
            from trainer.distributed.peers import explained

            with explained(launch):
                recipe.commands[command].run(recipe, flags, launch, console.log)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.error("interrupted before anything was changed")
    except Exception as error:
        code = report_error(error, console, alike)
    finally:
        console.close()
    if launch is None:
        sys.exit(code)
    leave(code)


def leaving_at_the_time_limit(hours: float | None, console: Console) -> AbstractContextManager[None]:
    """While nothing is begun yet: the limit counts from the start of the process, and imports take their time."""
    from trainer.distributed.stopping import StopRequests

    stops = StopRequests(hours, process_start_monotonic(), None, str, console.log)

    def act(reason: StopReason) -> None:
        console.log(stops.before_the_first_step(reason))
        leave(FINISHED)

    return stops.acted_on_at_once(act)


def report_error(error: Exception, console: Console, alike: bool = True) -> int:
    """One line for an error that a person can mend, a traceback for a bug; the exit code. `alike`: it is so on every rank."""
    known = error if isinstance(error, UserError) else user_error(error)
    if known is not None:
        console.error(str(known), on_any_rank=not (alike or known.known_to_all), log_only=known.printed_by_other_rank)
        console.log_traceback(error)
        return known.exit_code
    console.log_traceback(error, on_stderr=True)
    return 1


def read_command_line(recipe: Recipe, argv: list[str]) -> tuple[str, Any]:
    """(sub-command, its flags): a Parsed for `train`."""
    command = argv[0] if argv and not argv[0].startswith("-") else "train"
    rest = argv[1:] if argv and not argv[0].startswith("-") else argv
    if command == "train":
        others = f"\nSub-commands: train (default), {', '.join(recipe.commands)}." if recipe.commands else ""
        return command, configuration.parse(recipe.config_class, recipe.presets, rest, recipe.name, description=others)
    if command not in recipe.commands:
        known = ", ".join(["train", *recipe.commands])
        raise UserError(f"unknown sub-command {without_urls(command)!r}; {recipe.name} has: {known}")
    chosen = recipe.commands[command]
    return command, configuration.parse_flat(chosen.flags, rest, f"{recipe.name} {command}", chosen.presets)


def train(recipe: Recipe, parsed: Parsed, argv: Sequence[str], launch: Launch, console: Console) -> StopReason:
    """One launch of a training run; the reason it ended. Collective. Rank 0 holds the lock of the run directory."""
    from trainer.checkpoints.resume import default_directory, plan_launch
    from trainer.distributed.peers import explained
    from trainer.reporting.alerts import open_alerts

    title = f"{recipe.name}/{default_directory(recipe, parsed).name}"
    alerts = open_alerts(parsed.webhook if launch.is_main else None, title, console.log)
    launched_run, plan = None, None
    try:
        with explained(launch, parsed.config.optimisation):
            arguments = list(argv[1:]) if argv and argv[0] == "train" else list(argv)
            with leaving_at_the_time_limit(parsed.config.run.max_training_hours, console):
                plan = plan_launch(recipe, parsed, arguments, launch, console.log)
        launched_run = LaunchedRun(recipe, plan, argv, launch, console, alerts)
        return launched_run.run()
    except BaseException as error:
        if launched_run is None:
            alerts.send("failed", f"Did not start: {_text_of(error)}")
        raise
    finally:
        if plan is not None and launch.is_main:
            plan.directory.release(used=launched_run is not None and launched_run.started)
        alerts.close()


class LaunchedRun:
    """What surrounds the loop: the files of the run directory before it, the report after it, the status if it fails."""

    def __init__(
        self, recipe: Recipe, plan: LaunchPlan, argv: Sequence[str], launch: Launch, console: Console, alerts: Alerts
    ) -> None:
        self.recipe, self.plan, self.argv, self.launch, self.console = recipe, plan, argv, launch, console
        self.alerts = alerts
        self.started = False  # whether the run directory has been written to
        self.training: Training | None = None

    def run(self) -> StopReason:
        """Set up, train, report."""
        from trainer.distributed.peers import explained
        from trainer.distributed.stopping import EXIT_SECONDS, StopRequests, slurm_seconds_left
        from trainer.reporting.trackers import WANDB_EXIT_SECONDS

        left = slurm_seconds_left(os.environ) if self.launch.is_main else None
        # From here on a signal is a request. Before the first step, and after the last, it is obeyed at once.
        with StopRequests(
            self.plan.config.run.max_training_hours,
            process_start_monotonic(),
            self.plan.directory if self.launch.is_main else None,
            lambda: self.training.logger.status() if self.training else "starting",
            self.console.log,
            None if left is None else time.monotonic() + left,
            EXIT_SECONDS + self.alerts.exit_seconds + (WANDB_EXIT_SECONDS if self.plan.config.run.use_wandb else 0.0),
        ) as stops:
            # Signals are still caught where it fails: a launcher ends all its processes when one of them does.
            try:
                with explained(self.launch, self.plan.config.optimisation):
                    return self._train(stops)
            except BaseException as error:
                self._record_failure(_text_of(error))
                raise
            finally:
                self.alerts.close()

    def _train(self, stops: StopRequests) -> StopReason:
        from trainer.checkpoints.resume import nothing_to_do
        from trainer.distributed.peers import explained
        from trainer.distributed.stopping import StopReason
        from trainer.loop import Training
        from trainer.reporting.final_report import draw_report, log_final_metrics, report_end
        from trainer.setup import describe, set_up

        plan, launch, log = self.plan, self.launch, self.console.log
        words = stops.before_the_first_step
        leaving = stops.acted_on_at_once(lambda reason: self._leave_before_the_first_step(words(reason), reason))
        with leaving, explained(launch, plan.config.optimisation):  # which waits: another rank may be gone for the same reason
            session = set_up(self.recipe, plan, launch, log)
            message = launch.control.on_main(lambda: nothing_to_do(self.recipe, plan, session.total_steps))
        if message:
            log(message)
            return StopReason.ALREADY_FINISHED
        trackers = self._open_run_directory(session)
        self.started, code = True, 1
        try:
            self.training = Training(session, plan, stops, trackers, self.console, self.alerts)
            step = self.training.state.step
            description = describe(session, step)
            for line in [f"Run directory: {plan.directory.path}", *description]:
                log(line)
            at = f"at step {step:,} of {session.total_steps:,} on {socket.gethostname()}"
            self.alerts.send("started", f"Started {at}. {description[0]}", step=step)
            stops.unsaved = True
            reason = self.training.run()
            stops.unsaved = False
            launch.control.barrier()  # the last thing the processes do together: none waits for the report of rank 0
            checkpoint = self.training.saver.saved_as()
            if launch.is_main:
                stays_rolled_back = plan.same_run and plan.config.run.resume_from is not None
                report_end(self.training.logger, plan.directory, reason, checkpoint, stays_rolled_back)
                if reason.finished:
                    log_final_metrics(self.training.logger, self.training.last_evaluation)
            code = FINISHED
        finally:
            if trackers is not None:
                trackers.close(code)
        if launch.is_main and reason.finished and checkpoint is not None:
            with stops.acted_on_at_once(self._cut_report_short):
                draw_report(self.training.logger, plan.directory, checkpoint)
        return reason

    def _leave_before_the_first_step(self, text: str, reason: StopReason) -> None:
        if self.launch.is_main:
            saved = self.plan.checkpoint if self.plan.same_run else None
            step = saved.train_state.step if saved else 0
            self.plan.directory.write_status("stopped", reason, step, saved.path if saved else None)
            self.alerts.send("stopped", text, step=step, reason=reason)
        self._leave(text, FINISHED if reason == reason.TIME_LIMIT else INTERRUPTED)

    def _cut_report_short(self, reason: StopReason) -> None:
        plot = path_of("tools/plot_run.py")
        self._leave(f"{reason}: the report is cut short; all is saved, and {plot} and `evaluate` make it", FINISHED)

    def _leave(self, text: str, code: int) -> None:
        """End this process from a thread, whatever the main thread does: what `main` and `train` do at their ends."""
        self.console.log(text)
        self.alerts.close()
        if self.launch.is_main:
            self.plan.directory.release()
        self.console.close()
        leave(code)

    def _open_run_directory(self, session: Session) -> Trackers | None:
        """The files of the run directory, and the trackers, on rank 0; UserError on every rank where that fails."""
        trackers, failure = None, None
        if self.launch.is_main:
            try:
                self._write_first_files(session)
                trackers = self._open_trackers(session)
            except UserError as error:
                failure = error
            except OSError as error:
                failure = UserError(f"{self.plan.directory.path}: {error}; choose another --output_dir", CHECKPOINT)
        self.launch.control.raise_if_any(failure)
        return trackers

    def _write_first_files(self, session: Session) -> None:
        from trainer.checkpoints import retention
        from trainer.reporting.run_directory import write_text_atomic

        directory, resumed = self.plan.directory, self.plan.checkpoint
        self.console.open_log(directory.log)
        directory.write_command([self.recipe.name, *self.argv])
        facts = {"processes": self.launch.processes, "device": str(self.launch.device), "backend": session.backend.name}
        directory.write_environment(facts)
        write_text_atomic(directory.config, configuration.to_yaml(session.config))
        step = 0
        if resumed is not None:
            step = resumed.train_state.step
            self.console.log(f"Loading checkpoint: {resumed.path}")
            self.console.log(f"Resumed from step {step}")
            if self.plan.same_run:
                prefix = self.recipe.checkpoint_prefix
                retention.resume_at(directory.checkpoints, prefix, resumed.train_state, self.console.log)
        directory.write_status("running", None, step, resumed.path if resumed else None)

    def _open_trackers(self, session: Session) -> Trackers:
        from trainer.reporting.trackers import Trackers, WandbSettings

        run, directory, resumed = session.config.run, self.plan.directory, self.plan.checkpoint
        wandb = None
        if run.use_wandb:
            name = run.wandb_run_name or f"{self.recipe.name}-{directory.path.name}"
            wandb = WandbSettings(run.wandb_project, name, directory.path / "wandb_run_id.txt", directory.path)
        return Trackers(
            directory.metrics,
            tensorboard_dir=directory.tensorboard if run.use_tensorboard else None,
            wandb=wandb,
            config=configuration.values(session.config),
            resumed_step=resumed.train_state.step if resumed is not None else None,
            log=self.console.log,
        )

    def _record_failure(self, reason: str) -> None:
        """In status.json, if there is one, and to the webhook."""
        step = self.training.state.step if self.training is not None else None
        if self.started and self.launch.is_main:
            self.plan.directory.write_status("failed", reason, step, self._newest_checkpoint())
        beginning = "Did not start" if step is None else f"Failed at step {step}"
        self.alerts.send("failed", f"{beginning}: {reason}", step=step)

    def _newest_checkpoint(self) -> Path | None:
        """What the same command goes on from: this launch's last save, else what it has resumed from."""
        saved_step = self.training.saver.saved_step if self.training is not None else None
        if saved_step is not None:
            return self.plan.directory.checkpoints / f"{self.recipe.checkpoint_prefix}{saved_step}"
        return self.plan.checkpoint.path if self.plan.checkpoint else None


def _text_of(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
