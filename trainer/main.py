"""The entry point of every recipe: `main(MyRecipe())`. Reads the command line, joins the launch, trains, leaves cleanly.

`train` is the default sub-command. A UserError becomes one line and its exit code; anything else is a bug, with a traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command_line import config as configuration
from trainer.command_line import help
from trainer.command_line.config import Parsed
from trainer.command_line.secrets import redact, without_urls
from trainer.distributed.ranks import adopt_ranks, without_local_rank
from trainer.distributed.signals import die_with_launcher, end_launcher, leave, leaving_at_signals, process_start_monotonic
from trainer.errors import BAD_INPUT, FINISHED, INTERRUPTED, UserError, path_of, text_of, user_error
from trainer.evaluate import Evaluate, evaluate
from trainer.planning.flags import PLAN_HELP, PlanFlags, take_plan_flags
from trainer.recipe import Command, Recipe
from trainer.reporting.console import Console

if TYPE_CHECKING:
    from trainer.distributed.launch import Launch
    from trainer.distributed.stopping import StopReason


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Run `recipe` as the command line says (None: `sys.argv`), and exit with a code of `trainer.errors`. Never returns."""
    with ExitStack() as stack:
        try:
            stack.enter_context(leaving_at_signals())
        except RuntimeError as error:  # the machine allows no further thread
            sys.exit(report_error(error, Console(None, is_main=True)))
        run(recipe, argv)


def run(recipe: Recipe, argv: Sequence[str] | None) -> None:
    """`main`, inside `leaving_at_signals`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a data worker, which imports the recipe's file
        raise RuntimeError("main(...) must stand below `if __name__ == '__main__':`, or data workers start the training anew")
    if argv is None:
        argv, sys.argv[1:] = sys.argv[1:], redact(sys.argv[1:])  # W&B writes sys.argv to files and to its server
    argv = without_local_rank(argv)
    adopt_ranks(os.environ)
    console = Console(None, is_rank_0())
    launch: Launch | None = None
    # Every process reads the same command line: before the launch is joined all have the same error, and only rank 0 prints it.
    code, same_on_all_ranks = FINISHED, True
    try:
        planned, argv = take_plan_flags(argv)
        command, flags = read_command_line(recipe, argv)
        if planned is not None:
            sys.exit(print_plan(recipe, flags, argv, planned, console))
        die_with_launcher()
        settings = flags.config.run if isinstance(flags, Parsed) else flags  # a sub-command has only some of these fields
        with leaving_at_the_time_limit(getattr(settings, "max_training_hours", None), console):
            from trainer.backends import backend_of
            from trainer.backends.deepspeed_config import request_zero
            from trainer.distributed.launch import connect

            if isinstance(flags, Parsed):
                request_zero(os.environ, settings.deepspeed_config)
            backend, same_on_all_ranks = backend_of(os.environ), False
            timeout_minutes = getattr(settings, "timeout_minutes", 60.0)
            launch = connect(getattr(settings, "device", "auto"), timeout_minutes, backend.before_connect)
        if isinstance(flags, Parsed) and flags.config.run.fast_dev_run:
            fast_dev_run(recipe, argv, launch, console)
        elif isinstance(flags, Parsed):
            train(recipe, flags, argv, launch, console)
        else:
            from trainer.distributed.peers import explained

            with explained(launch):
                commands_of(recipe)[command].run(recipe, flags, launch, console.log)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.error("interrupted before anything was changed")
    except Exception as error:
        code = report_error(error, console, same_on_all_ranks)
    finally:
        console.close()
    if code == BAD_INPUT:
        end_launcher()
    if launch is None:
        sys.exit(code)
    leave(code)


def is_rank_0() -> bool:
    """Whether the launcher made this process rank 0. Known before the launch is joined."""
    return int(os.environ.get("RANK") or 0) == 0


def print_plan(recipe: Recipe, flags: Any, argv: Sequence[str], planned: PlanFlags, console: Console) -> int:
    """Print what `--plan` computes, on rank 0 only. Returns the exit code. UserError for a sub-command other than `train`."""
    if not isinstance(flags, Parsed):
        raise UserError("--plan is for training; leave the sub-command out")
    if is_rank_0():
        from trainer.backends.deepspeed_config import request_zero
        from trainer.planning.plan import plan

        request_zero(os.environ, flags.config.run.deepspeed_config)
        for line in plan(recipe, flags, split_command(argv)[1], planned, os.environ):
            console.log(line)
    return FINISHED


def leaving_at_the_time_limit(hours: float | None, console: Console) -> AbstractContextManager[None]:
    """Context of the start of a launch: the process exits once it is `hours` old (None: no limit), whatever it is doing."""
    from trainer.distributed.stopping import StopRequests
    from trainer.distributed.time_limit import TimeLimit

    stops = StopRequests(TimeLimit(hours, process_start_monotonic()), None, str, console.log)

    def act(reason: StopReason) -> None:
        console.log(stops.before_the_first_step(reason))
        leave(FINISHED)

    return stops.acted_on_at_once(act)


def report_error(error: Exception, console: Console, same_on_all_ranks: bool = True) -> int:
    """Print one line for an error that the user can mend, a traceback for a bug. Returns the exit code.

    `same_on_all_ranks`: every rank has this error, so only rank 0 prints it.
    """
    known = user_error(error)
    if known is not None:
        rank_0_has_it = same_on_all_ranks or known.known_to_all
        console.error(str(known), on_any_rank=not rank_0_has_it, log_only=known.printed_by_other_rank)
        console.log_traceback(error)
        return known.exit_code
    console.log_traceback(error, on_stderr=True)
    return 1


def commands_of(recipe: Recipe) -> Mapping[str, Command]:
    """{name: sub-command} beside `train`: the default `evaluate`, which a recipe may replace, and the recipe's own."""
    return {"evaluate": Command(Evaluate, evaluate), **recipe.commands}


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(sub-command, the words after it) of a command line; one that begins with a flag is that of `train`."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    return "train", list(argv)


def read_command_line(recipe: Recipe, argv: list[str]) -> tuple[str, Any]:
    """(sub-command, its flags): a `Parsed` for `train`, their flat dataclass for others. UserError if they cannot be read.

    `--help` is printed, and the process exits.
    """
    commands = commands_of(recipe)
    command, rest = split_command(argv)
    if help.asked_for(rest) and command in ("train", *commands):
        if is_rank_0():
            print(help_text(recipe, command, everything="all" in rest))
        sys.exit(0)
    if command == "train":
        return command, configuration.parse(recipe.config_class, recipe.presets, rest, recipe.name)
    if command not in commands:
        known = ", ".join(["train", *commands])
        raise UserError(f"unknown sub-command {without_urls(command)!r}; {recipe.name} has: {known}")
    chosen = commands[command]
    return command, configuration.parse_flat(chosen.flags, rest, f"{recipe.name} {command}", chosen.presets)


def help_text(recipe: Recipe, command: str, everything: bool) -> str:
    """What `--help` prints for a sub-command; `everything`: all flags of `train`, not only the usual ones."""
    file = sys.argv[0]
    train = f"{file} {recipe.needs}".strip()
    known = commands_of(recipe)
    if command != "train":
        chosen = known[command]
        return help.text(chosen.flags, f"python {file} {command}", chosen.presets)
    commands = {name: (command.flags.__doc__ or "").strip().partition("\n")[0] for name, command in known.items()}
    best = f"runs/{recipe.name}/mine/checkpoints/best_model"
    examples = [
        *(f"python {file} --preset {preset}" for preset in recipe.presets),
        f"accelerate launch --config_file {path_of('accelerate_configs/ddp.yaml')} {train} --batch_size 64",
        f"python {train} --plan --gpu h100    # what it would take; of a launch of many: tools/plan.py",
        f"python {train} --run_name mine --max_training_hours 8    # and once more, to go on",
        f"python {file} --run_name other --init_from {best} --seed 1",
        *(f"python {file} {name} --model_path {best}" for name in commands if help.takes(known[name].flags, "model_path")),
    ]
    return help.text(recipe.config_class, f"python {file}", recipe.presets, commands, examples, everything, PLAN_HELP)


def fast_dev_run(recipe: Recipe, argv: Sequence[str], launch: Launch, console: Console) -> None:
    """`--fast_dev_run`: one step, an evaluation and a save; then a second step, resumed from there. Collective.

    `--stop_at_step` ends both, so that the schedule, and all else that depends on the length of the run, is the real one.
    """

    def make_folder() -> str:
        root = Path("runs", recipe.name)
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=root, prefix="fast_dev_run-")

    folder = launch.control.on_main(make_folder)
    _, given = split_command(argv)
    quick = ["--output_dir", folder, "--resume", "auto", "--log_every", "1", "--eval_every", "1", "--eval_iters", "1"]
    quick += ["--no_use_wandb", "--no_use_tensorboard", "--log_with"]
    try:
        for step in (1, 2):
            words = [*given, *quick, "--stop_at_step", str(step)]
            train(recipe, configuration.parse(recipe.config_class, recipe.presets, words, recipe.name), words, launch, console)
        console.log("--fast_dev_run: a step, an evaluation, a save and a resume work; nothing of it is kept")
    finally:
        console.close_log()
        if launch.is_main:
            shutil.rmtree(folder)


def train(recipe: Recipe, parsed: Parsed, argv: Sequence[str], launch: Launch, console: Console) -> StopReason:
    """Train for one launch, while rank 0 holds the lock of the run directory. Returns why it ended. Collective."""
    from trainer.checkpoints.resume import default_directory, plan_launch
    from trainer.distributed.peers import explained
    from trainer.launched_run import LaunchedRun
    from trainer.reporting.alerts import open_alerts

    title = f"{recipe.name}/{default_directory(recipe, parsed).name}"
    alerts = open_alerts(parsed.webhook if launch.is_main else None, title, console.log)
    launched_run, plan = None, None
    try:
        leaving = leaving_at_the_time_limit(parsed.config.run.max_training_hours, console)
        # `explained` waits for another rank's message. If that rank has left at the limit, `leaving`, outside, ends the wait.
        with leaving, explained(launch, parsed.config.optimisation):
            plan = plan_launch(recipe, parsed, split_command(argv)[1], launch, console.log)
        launched_run = LaunchedRun(recipe, plan, argv, launch, console, alerts)
        return launched_run.run()
    except BaseException as error:
        if launched_run is None:
            alerts.send("failed", f"Did not start: {text_of(error)}")
        raise
    finally:
        if plan is not None and launch.is_main:
            plan.directory.release(used=launched_run is not None and launched_run.started)
        alerts.close()
