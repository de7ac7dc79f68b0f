"""The entry point of every recipe: `main(MyRecipe())`. Reads the command line, joins the launch, trains, leaves cleanly.

`train` is the default sub-command. A Refusal becomes one line and its exit code; anything else is a bug, with a traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer import config as configuration
from trainer.config import Parsed
from trainer.console import Console
from trainer.errors import CHECKPOINT, FINISHED, INTERRUPTED, Refusal
from trainer.recipe import Recipe
from trainer.redaction import redact, redact_text, without_urls
from trainer.signals import die_with_launcher, leaving_at_signals, process_start_monotonic

if TYPE_CHECKING:
    from trainer.alerts import Alerts
    from trainer.launch import Launch
    from trainer.resume import Plan
    from trainer.setup import Session
    from trainer.stopping import StopRequests


@leaving_at_signals()
def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run `recipe` as the command line says, and leave the process with the exit code of `trainer.errors`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a data worker that imports the recipe's file
        raise RuntimeError("main(...) must stand below `if __name__ == '__main__':`, or data workers start the training anew")
    if argv is None:
        argv, sys.argv[1:] = sys.argv[1:], redact(sys.argv[1:])  # W&B copies it into files and to its server
    argv = list(argv)
    console = Console(None, int(os.environ.get("RANK") or 0) == 0)  # every process reads the command line, one speaks
    launch: Launch | None = None
    flags, code = None, FINISHED
    try:
        command, flags = _command_line(recipe, argv)
        from trainer.launch import connect

        die_with_launcher()
        run = flags.config.run if isinstance(flags, Parsed) else flags
        launch = connect(getattr(run, "device", "auto"), getattr(run, "timeout_minutes", 60.0))
        if isinstance(flags, Parsed):
            train(recipe, flags, argv, launch, console)
        else:
            from trainer.peers import explained

            with explained(launch):
                recipe.commands[command].run(recipe, flags, launch, console.say)
    except Refusal as refusal:
        code = refusal.exit_code
        alone = launch is not None and not refusal.known_to_all
        console.complain(str(refusal), everywhere=alone, aloud=not refusal.said_elsewhere)
        console.log_traceback(refusal)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.complain("interrupted before anything was changed")
    except Exception as error:
        import traceback

        code = 1
        console.log_traceback(error)
        print(redact_text(traceback.format_exc()), end="", file=sys.stderr)
    finally:
        console.close()
    if launch is None:
        sys.exit(code)
    from trainer.launch import shut_down

    shut_down(launch, code)


def _command_line(recipe: Recipe, argv: list[str]) -> tuple[str, Any]:
    """(sub-command, its flags): a Parsed for `train`."""
    command = argv[0] if argv and not argv[0].startswith("-") else "train"
    rest = argv[1:] if argv and not argv[0].startswith("-") else argv
    if command == "train":
        others = f"\nSub-commands: train (default), {', '.join(recipe.commands)}." if recipe.commands else ""
        return command, configuration.parse(recipe.Config, recipe.presets, rest, recipe.name, description=others)
    if command not in recipe.commands:
        known = ", ".join(["train", *recipe.commands])
        raise Refusal(f"unknown sub-command {without_urls(command)!r}; {recipe.name} has: {known}")
    chosen = recipe.commands[command]
    return command, configuration.parse_flat(chosen.flags, rest, f"{recipe.name} {command}", chosen.presets)


def train(recipe: Recipe, parsed: Parsed, argv: Sequence[str], launch: Launch, console: Console) -> str:
    """One launch of a training run; the reason it ended. Collective.

    The lock of the run directory is held, and its status.json kept, by rank 0.
    """
    from trainer.alerts import open_alerts
    from trainer.peers import explained
    from trainer.resume import Plan, default_directory, make_plan

    title = f"{recipe.name}/{default_directory(recipe, parsed).name}"
    alerts = open_alerts(parsed.webhook if launch.is_main else None, title, console.say)
    arguments = [word for i, word in enumerate(argv) if (i, word) != (0, "train")]
    directory = None

    def decide() -> dict[str, Any]:
        nonlocal directory
        plan = make_plan(recipe, parsed, arguments, console.say)
        directory = plan.directory
        return plan.to_json()

    training = None
    try:
        with explained(launch, parsed.config.optimisation):
            told = launch.control.on_main(decide)
            plan, error = None, None
            try:
                plan = Plan.from_json(recipe, told, launch.rank)
            except Refusal as refusal:
                error = refusal
            launch.control.agree(error)
            assert plan is not None
        training = _Launch(recipe, plan, argv, launch, console, alerts)
        return training.run()
    except BaseException as error:
        if training is None:
            alerts.send("failed", f"Did not start: {_in_words(error)}")
        raise
    finally:
        if directory is not None:
            directory.release(used=training is not None and training.started)
        alerts.close()


class _Launch:
    """What surrounds the loop: the checks before it, the files of the run directory, the words after it."""

    def __init__(
        self, recipe: Recipe, plan: Plan, argv: Sequence[str], launch: Launch, console: Console, alerts: Alerts
    ) -> None:
        self.recipe, self.plan, self.argv, self.launch, self.console = recipe, plan, argv, launch, console
        self.alerts = alerts
        self.started, self.loop = False, None

    @property
    def step(self) -> int | None:
        """The step reached."""
        return self.loop.progress.step if self.loop is not None else None

    def run(self) -> str:
        """Assemble, train, report."""
        from trainer.metrics import WANDB_EXIT_SECONDS
        from trainer.peers import explained
        from trainer.stopping import EXIT_SECONDS, StopRequests, slurm_seconds_left

        left = slurm_seconds_left(os.environ) if self.launch.is_main else None
        # From here on a signal is a request: one that comes while the data are prepared is obeyed at the first step.
        with StopRequests(
            self.plan.config.run.max_training_hours,
            process_start_monotonic(),
            self.plan.directory if self.launch.is_main else None,
            lambda: self.loop.logbook.status() if self.loop else "starting",
            self.console.say,
            None if left is None else time.monotonic() + left,
            EXIT_SECONDS + self.alerts.exit_seconds + (WANDB_EXIT_SECONDS if self.plan.config.run.use_wandb else 0.0),
        ) as stops:
            # Signals are still caught where it fails: a launcher ends all its processes when one of them does.
            try:
                with explained(self.launch, self.plan.config.optimisation):
                    return self._train(stops)
            except BaseException as error:
                self._fail(_in_words(error))
                raise
            finally:
                self.alerts.close()

    def _fail(self, reason: str) -> None:
        """Leave word of a failure: in status.json, if there is one, and to the webhook."""
        if self.started and self.launch.is_main:
            self.plan.directory.write_status("failed", reason, self.step)
        beginning = f"Failed at step {self.step}" if self.loop is not None else "Did not start"
        self.alerts.send("failed", f"{beginning}: {reason}", step=self.step)

    def _train(self, stops: StopRequests) -> str:
        from trainer.loop import Training
        from trainer.report import report
        from trainer.setup import assemble, describe

        plan, launch, say = self.plan, self.launch, self.console.say
        session = assemble(self.recipe, plan, launch, say)
        over = launch.control.on_main(lambda: self._already_finished(session))
        if over:
            say(over)
            return "already finished"
        metrics, error = None, None
        if launch.is_main:
            try:
                self._open(session)
                metrics = self._metrics(session)
            except Refusal as refusal:
                error = refusal
            except OSError as reason:
                error = Refusal(f"{plan.directory.path}: {reason}; choose another --output_dir", CHECKPOINT)
        launch.control.agree(error)
        self.started = True
        description = describe(session, plan.checkpoint.state["progress"]["step"] if plan.checkpoint else 0)
        for line in [f"Run directory: {plan.directory.path}", *description]:
            say(line)
        code = 1
        try:
            self.loop = Training(session, plan, stops, metrics, self.console, self.alerts)
            at = f"at step {self.step:,} of {session.total_steps:,} on {socket.gethostname()}"
            self.alerts.send("started", f"Started {at}. {description[0]}", step=self.step)
            reason = self.loop.run()
            if metrics is not None:
                rolled_back = plan.same_run and plan.config.run.resume_from is not None
                report(self.loop, plan.directory, reason, metrics, stops.seconds_left(), rolled_back)
            code = FINISHED
        finally:
            if metrics is not None:
                metrics.close(code)
        return reason

    def _already_finished(self, session: Session) -> str | None:
        """A sentence if the run has nothing left to do; nothing has been written by then."""
        from trainer import retention
        from trainer.logbook import Progress
        from trainer.stopping import finished_reason

        found, run = self.plan.checkpoint, session.config.run
        if found is None:
            return None
        p, folder = Progress(**found.state["progress"]), found.path.parent
        final = retention.links(folder).get("checkpoint_final") == found.path.name
        later = any(step > p.step for step, _ in retention.step_folders(folder, self.recipe.checkpoint_prefix))
        # Its own newest without that link: a run killed after its last save, which has an end to report yet.
        if run.resume_from and p.step >= session.total_steps and (final or later or not self.plan.same_run):
            return f"{found.path} is at step {p.step:,} of {session.total_steps:,}, nothing to do; give a larger --max_steps"
        if not self.plan.same_run or run.resume_from:
            return None
        reason = finished_reason(
            p.step, session.total_steps, p.evaluations_without_better, run.patience, p.train_loss, run.target_loss
        )
        if reason is None or not final:
            return None
        change = {"patience": "--patience 0", "target loss": "a lower --target_loss"}.get(reason)
        way_on = f"to go on: {change or f'--max_steps N --resume_from {found.path}'}"
        return f"Already finished ({reason}) at step {p.step:,}, nothing to do; {way_on}"

    def _open(self, session: Session) -> None:
        """On rank 0: the files of the run directory, and the checkpoints that a roll-back sets aside."""
        from trainer import retention
        from trainer.run_directory import write_text_atomic

        directory, found, say = self.plan.directory, self.plan.checkpoint, self.console.say
        self.console.open_log(directory.log)
        directory.write_command([self.recipe.name, *self.argv])
        directory.write_environment(
            {"processes": self.launch.processes, "device": str(self.launch.device), "deepspeed": self.launch.deepspeed}
        )
        write_text_atomic(directory.config, configuration.to_yaml(session.config))
        if found is not None:
            step = found.state["progress"]["step"]
            say(f"Loading checkpoint: {found.path}")
            say(f"Resumed from step {step}")
            if self.plan.same_run:
                for path in retention.roll_back(directory.checkpoints, self.recipe.checkpoint_prefix, step):
                    say(f"Rolled back: set aside {path}")
                best = f"{self.recipe.checkpoint_prefix}{found.state['progress']['best_step']}"
                # A kill between a save and its links leaves the old ones.
                stale = retention.links(directory.checkpoints).get("best_model") != best
                if stale and found.state["progress"]["best_step"] and (directory.checkpoints / best).is_dir():
                    retention.link(directory.checkpoints, "best_model", best)
        directory.write_status("running", None, found.state["progress"]["step"] if found else 0, found.path if found else None)

    def _metrics(self, session: Session) -> Any:
        from trainer.metrics import Metrics, WandbSettings

        run, directory, found = session.config.run, self.plan.directory, self.plan.checkpoint
        wandb = None
        if run.use_wandb:
            name = run.wandb_run_name or f"{self.recipe.name}-{directory.path.name}"
            wandb = WandbSettings(run.wandb_project, name, directory.path / "wandb_run_id.txt", directory.path)
        resumed = found.state["progress"]["step"] if found is not None and self.plan.same_run else None
        board = directory.tensorboard if run.use_tensorboard else None
        values = configuration.values(session.config)
        return Metrics(
            directory.metrics,
            tensorboard_dir=board,
            wandb=wandb,
            config=values,
            resumed_step=resumed,
            say=self.console.say,
        )


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
