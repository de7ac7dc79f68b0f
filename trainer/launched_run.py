"""One launch of a run around its loop: the run directory's files before it, the report after it, the status of a failure."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoints import retention
from trainer.checkpoints.resume import LaunchPlan, nothing_to_do
from trainer.checkpoints.writing import check_shared
from trainer.command_line import config as configuration
from trainer.data import stream
from trainer.data.bad_samples import first_batch
from trainer.distributed.launch import Launch
from trainer.distributed.peers import explained
from trainer.distributed.signals import failing, leave, process_start_monotonic, terminating
from trainer.distributed.stopping import StopReason, StopRequests
from trainer.distributed.time_limit import EXIT_SECONDS, TimeLimit, slurm_seconds_left
from trainer.errors import CHECKPOINT, FINISHED, INTERRUPTED, UserError, path_of, text_of
from trainer.loop import Training
from trainer.recipe import Recipe
from trainer.reporting.alerts import Alerts
from trainer.reporting.console import Console
from trainer.reporting.feed import EXIT_SECONDS as TRACKER_EXIT_SECONDS
from trainer.reporting.final_report import draw_loss, draw_report, log_final_metrics, report_end
from trainer.reporting.run_directory import write_text_atomic
from trainer.reporting.trackers import BY_METRIC, Trackers
from trainer.reporting.wandb_run import WandbSettings
from trainer.setup import Session, describe, set_up

MAIN_FIRST_SECONDS = 1.0
"""How long the other ranks of a failed launch wait before they exit. The launcher kills all processes once one has exited, and
rank 0, which records the failure, may not have met the same error yet."""


class LaunchedRun:
    """One launch of a run, from its plan to its report. Every process of the launch makes one."""

    def __init__(
        self, recipe: Recipe, plan: LaunchPlan, argv: Sequence[str], launch: Launch, console: Console, alerts: Alerts
    ) -> None:
        self.recipe, self.plan, self.argv, self.launch, self.console = recipe, plan, argv, launch, console
        self.alerts = alerts
        self.started = False
        """whether the run directory has been written to"""
        self.training: Training | None = None
        """None until the session is set up"""

    def run(self) -> StopReason:
        """Set up, train, report. Returns why training ended. On an error, records it and raises it again. Collective."""
        failing.clear()
        terminating.clear()
        time_limit = TimeLimit(
            self.plan.config.run.max_training_hours,
            process_start_monotonic(),
            slurm_seconds_left(os.environ) if self.launch.is_main else None,
            EXIT_SECONDS + self.alerts.exit_seconds + self._trackers_exit_seconds(),
        )
        # From here on a signal is a request to stop; before the first step and after the last one it is obeyed at once.
        with StopRequests(
            time_limit,
            self.plan.directory if self.launch.is_main else None,
            lambda: self.training.logger.status() if self.training else "starting",
            self.console.log,
            self.plan.config.run.stop_when if self.launch.local_rank == 0 else None,
        ) as stops:
            # Inside `stops`, so that signals are caught on failure too: once one process has exited, the launcher sends them.
            try:
                with explained(self.launch, self.plan.config.optimisation):
                    return self._train(stops)
            except BaseException as error:
                failing.set()
                self._record_failure(text_of(error))
                if not self.launch.is_main:
                    time.sleep(MAIN_FIRST_SECONDS)
                raise
            finally:
                self.alerts.close()

    def _train(self, stops: StopRequests) -> StopReason:
        gc.freeze()  # the objects that imports have made: collections while the data are built need not visit them
        session = self._set_up(stops)
        if session is None:
            return StopReason.ALREADY_FINISHED
        trackers = self._open_run_directory(session)
        self.started, code = True, 1
        try:
            self.training = Training(session, self.plan, stops, trackers, self.console, self.alerts)
            self._begin(session, self.training)
            stops.signals.unsaved = True
            gc.collect()
            gc.freeze()  # what exists now lives as long as the run
            reason = self.training.run()
            stops.signals.unsaved = False
            self.launch.control.barrier()  # the last collective: the other ranks do not wait for rank 0's report
            if self.launch.is_main:
                self._report(self.training, reason)
            code = FINISHED
        finally:
            gc.unfreeze()
            if trackers is not None:
                trackers.close(code)
        if self.launch.is_main:
            self._draw(self.training, reason, stops)
        return reason

    def _set_up(self, stops: StopRequests) -> Session | None:
        """All that the loop needs, or None, and a line that says so, if the run is finished already. Collective."""
        plan, launch, log = self.plan, self.launch, self.console.log

        def leave_now(reason: StopReason) -> None:
            self._leave_before_the_first_step(stops.before_the_first_step(reason), reason)

        # `explained` waits for another rank's message. If that rank has left on a request, `leave_now`, outside, ends the wait.
        with stops.acted_on_at_once(leave_now), explained(launch, plan.config.optimisation):
            check_shared(plan.directory.checkpoints, launch)
            session = set_up(self.recipe, plan, launch, log)
            finished = launch.control.on_main(lambda: nothing_to_do(self.recipe, plan, session.total_steps))
        if finished:
            log(finished)
            return None
        return session

    def _begin(self, session: Session, training: Training) -> None:
        """Start what --debug and --profile ask for, print what is about to be trained, and send the alert of the start."""
        step = training.state.step
        if session.config.run.debug:
            self._debug(session, training)
        if session.config.run.profile and self.launch.is_main:
            self._profile(session, training)
        description = describe(session, step)
        for line in [f"Run directory: {self.plan.directory.path}", *description]:
            self.console.log(line)
        at = f"at step {step:,} of {session.total_steps:,} on {socket.gethostname()}"
        self.alerts.send("started", f"Started {at}. {description[0]}", step=step)

    def _debug(self, session: Session, training: Training) -> None:
        """Watch every value in the network, and print what the first micro-batch of this launch holds."""
        from trainer.debugging import Watch, describe_batch

        state, config = training.state, session.config
        Watch(session.network, self.console.log, lambda: state.step + 1)
        o = config.optimisation
        first = range(state.step * o.effective_batch_size, state.step * o.effective_batch_size + o.batch_size)
        numbers = stream.sample_numbers(first, o.seed, session.samples).tolist()
        batch = first_batch(session.data.train, numbers, config.run)
        lines = [f"The first micro-batch of step {state.step + 1:,}:", *describe_batch(batch)]
        if self.launch.is_main and (shown := self.recipe.report.show_batch(batch, config, session.data, self.plan.directory)):
            lines.append(shown)
        self.console.log("\n".join(lines))

    def _profile(self, session: Session, training: Training) -> None:
        """Start the profiler, unless this launch has too few steps left for it."""
        from trainer.reporting.profiling import WARM_UP_STEPS, StepProfiler

        run = session.config.run
        last = min(run.stop_at_step or session.total_steps, session.total_steps)
        if last - training.state.step < WARM_UP_STEPS + run.profile:
            steps = f"it takes {WARM_UP_STEPS} steps more than that, and step {last:,} is the last"
            self.console.log(f"--profile {run.profile} will write nothing: {steps}")
            return
        folder = self.plan.directory.path / "profile"
        training.logger.profiler = StepProfiler(run.profile, folder, self.launch.device, self.console)

    def _report(self, training: Training, reason: StopReason) -> None:
        """Print and record how the launch ended. Rank 0 only."""
        stays_rolled_back = self.plan.same_run and self.plan.config.run.resume_from is not None
        report_end(training.logger, self.plan.directory, reason, training.saver.saved_as(), stays_rolled_back)
        if reason.finished:
            log_final_metrics(training.logger, training.last_evaluation)

    def _draw(self, training: Training, reason: StopReason, stops: StopRequests) -> None:
        """The report of a finished run, or the plot for a person who has stopped one. Rank 0 only."""
        checkpoint = training.saver.saved_as()
        if reason.finished and checkpoint is not None:
            with stops.acted_on_at_once(self._cut_report_short):
                training.backend.release()  # the report loads a model of its own from the checkpoint
                training.saver.writer.release()
                draw_report(training.logger, self.plan.directory, checkpoint)
        elif reason.by_hand and training.state.train_loss is not None:
            draw_loss(training.logger, self.plan.directory, with_baseline=False)

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
        """End this process from a thread other than the main one, with the clean-up that `main` and `train` would do."""
        self.console.log(text)
        self.alerts.close()
        if self.launch.is_main:
            self.plan.directory.release()
        self.console.close()
        leave(code)

    def _open_run_directory(self, session: Session) -> Trackers | None:
        """Write the run directory's first files and open the trackers, on rank 0. Returns them there, None on other ranks.

        UserError on every rank if that fails. Collective.
        """
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
        directory, resumed = self.plan.directory, self.plan.checkpoint
        step = resumed.train_state.step if resumed is not None else 0
        directory.begin(step, self.launch.restarted)
        self.console.open_log(directory.log)
        directory.write_command([self.recipe.name, *self.argv])
        facts = {"processes": self.launch.processes, "device": str(self.launch.device), "backend": session.backend.name}
        directory.write_environment(facts)
        write_text_atomic(directory.config, configuration.to_yaml(session.config))
        if resumed is not None:
            self.console.log(f"Loading checkpoint: {resumed.path}")
            self.console.log(f"Resumed from step {step}")
            if self.plan.same_run:
                prefix = self.recipe.checkpoint_prefix
                retention.resume_at(directory.checkpoints, prefix, resumed.train_state, self.console.log)
        directory.write_status("running", None, step, resumed.path if resumed else None)

    def _open_trackers(self, session: Session) -> Trackers:
        run, directory, resumed = session.config.run, self.plan.directory, self.plan.checkpoint
        name = run.wandb_run_name or f"{self.recipe.name}-{directory.path.name}"
        id_file = directory.path / "wandb_run_id.txt"
        wandb = WandbSettings(run.wandb_project, run.wandb_group, name, id_file, directory.path) if run.use_wandb else None
        return Trackers(
            directory.metrics,
            tensorboard_dir=directory.tensorboard if run.use_tensorboard else None,
            tensorboard_tags=BY_METRIC if run.tensorboard_tags == "by_metric" else {},
            wandb=wandb,
            others=run.log_with,
            project=run.wandb_project,
            run_name=name,
            config=configuration.values(session.config),
            resumed_step=resumed.train_state.step if resumed is not None else None,
            log=self.console.log,
        )

    def _trackers_exit_seconds(self) -> float:
        """Seconds that trackers with a server may take to close."""
        run = self.plan.config.run
        return TRACKER_EXIT_SECONDS * (run.use_wandb + len(run.log_with))

    def _record_failure(self, reason: str) -> None:
        """Write the failure to status.json, if this launch has begun to write the run directory, and send it as an alert."""
        step = self.training.state.step if self.training is not None else None
        if self.started and self.launch.is_main:
            self.plan.directory.write_status("failed", reason, step, self._newest_checkpoint())
        beginning = "Did not start" if step is None else f"Failed at step {step}"
        self.alerts.send("failed", f"{beginning}: {reason}", step=step)

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint that the same command would resume: this launch's last one, else the one that it resumed, if any."""
        saved_step = self.training.saver.saved_step if self.training is not None else None
        if saved_step is not None:
            return self.plan.directory.checkpoints / f"{self.recipe.checkpoint_prefix}{saved_step}"
        return self.plan.checkpoint.path if self.plan.checkpoint else None
