"""Kills a run at random moments, restarts it with the same command, and checks that nothing was lost.

    python tools/torture.py gpt2_wikitext --kills 100 --launch cpu
    python tools/torture.py recipes/my_recipe.py --kills 20 --launch zero3 -- --d_model 32 --max_steps 50
    python tools/torture.py gpt2_wikitext --goodput --kills 5

Each run is resumed until it finishes between two kills. It must then equal an uninterrupted run bit for bit.
Exits with 1 if a checkpoint was lost, a bit differs, a process hung or was left behind, or nothing was killed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import goodput
from fault_injector import (
    COPYING,
    ROOT,
    Moment,
    Started,
    after,
    between_commit_and_links,
    both,
    command,
    curve,
    different_tensors,
    environment,
    inside_a_save,
    inside_an_evaluation,
    inside_the_copy,
    kill_at_moment,
    rows,
)

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.retention import ROLLED_BACK
from trainer.command_line.locations import argument_path
from trainer.errors import UserError

LAUNCHES = {"cpu": "one", "ddp2": "ddp", "zero3": "zero3", "fsdp2": "fsdp"}
EVAL_EVERY, KEEP_LAST = 6, 2
EVERY_RUN = f"--log_every 1 --save_every 4 --eval_every {EVAL_EVERY} --keep_last {KEEP_LAST} --device cpu --no_use_tensorboard"
TINY = {
    "gpt2_wikitext": "--dataset embedded --tokenizer train --vocab_size 512 --d_model 96 --num_layers 3 --num_heads 2 "
    "--max_length 32 --dropout 0.1 --batch_size 4 --max_steps 100 --warmup_steps 10 --eval_iters 30"
}
GOODPUT = {name: flags.replace("--max_steps 100", "--max_steps 6000 --save_every 100") for name, flags in TINY.items()}
SAVING: dict[str, Moment] = {
    "inside the copy": inside_the_copy,
    "while it is written": inside_a_save,
    "before its links": between_commit_and_links,
}
"""phases of a save, as the report names them"""
PHASES = ("start-up", "step", *SAVING, "inside an evaluation", "after the last step")
NEVER = after(float("inf"))
ORPHAN_SECONDS, HANG_SECONDS = 15.0, 90.0


@dataclass
class Tally:
    """Counts of a campaign, and the problems found, each described in a line."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """number of kills by (phase, "everyone" or "one rank")"""
    launches: int = 0
    runs: int = 0
    resumed: list[int] = field(default_factory=list)
    """steps that launches resumed from"""
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of kills."""
        return sum(self.kills.values())

    def has_problems(self) -> bool:
        """Whether anything was lost, differed, hung, failed or was left behind."""
        return bool(self.lost or self.different or self.hung or self.failed or self.orphans)

    def table(self) -> str:
        """The report that is printed."""
        who = sorted({who for _, who in self.kills}) or ["everyone"]
        lines = [f"{'killed':24}" + "".join(f"{name:>12}" for name in who)]
        for phase in PHASES:
            lines.append(f"  {phase:22}" + "".join(f"{self.kills[phase, name]:12}" for name in who))
        steps = f", from steps {min(self.resumed)} to {max(self.resumed)}" if self.resumed else ""
        lines.append(f"{self.total} kills, {self.launches} launches, {len(self.resumed)} of them resumed{steps}")
        for name in ("lost", "different", "hung", "failed", "orphans"):
            problems = getattr(self, name)
            lines += [f"  {name:22}{len(problems):12}", *(f"    {each}" for each in problems)]
        lines.append(f"{self.runs} runs came to their end and were compared with the uninterrupted one, bit for bit")
        return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the campaign of the command line. Returns the exit status."""
    separator = argv.index("--") if "--" in argv else len(argv)
    recipe_flags = argv[separator + 1 :]
    parser = argparse.ArgumentParser(prog="torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of recipes/, or a path")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--launch", choices=LAUNCHES, default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--goodput", action="store_true", help="under torchrun, a process each 30 to 60 s: how soon is it back?"
    )
    parser.add_argument(
        "--folder", type=argument_path, help="where the runs go (default: a temporary folder, removed if all is well)"
    )
    flags = parser.parse_args(argv[:separator])
    # Absolute, since the launches run in the repository's root.
    script = Path(flags.recipe).resolve() if flags.recipe.endswith(".py") else ROOT / "recipes" / f"{flags.recipe}.py"
    if not script.is_file() or flags.kills < 1:
        print(f"torture: {script if flags.kills > 0 else '--kills ' + str(flags.kills)}: give a recipe and kills above 0")
        return 2
    if not recipe_flags and script.stem not in TINY:
        print(f"torture: {script.stem} has no tiny run here; give flags for one after `--`")
        return 2
    folder = flags.folder.resolve() if flags.folder else Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    if flags.goodput:
        return goodput.measure(script, recipe_flags or GOODPUT.get(script.stem, "").split(), folder, flags.kills, flags.seed)
    campaign = Campaign(script, LAUNCHES[flags.launch], recipe_flags or TINY[script.stem].split(), folder, flags.seed)
    started = time.monotonic()
    campaign.run(flags.kills)
    print(f"torture {script.stem}, {flags.launch}, seed {flags.seed}: {time.monotonic() - started:.0f} s")
    print(campaign.tally.table())
    if campaign.tally.has_problems() or not campaign.tally.total:
        print(f"the runs are in {folder}")
        return 1
    if not flags.folder:
        shutil.rmtree(folder)
    return 0


class Campaign:
    """Runs of one recipe under one launch, and their results."""

    def __init__(self, script: Path, kind: str, flags: Sequence[str], folder: Path, seed: int) -> None:
        self.script, self.kind, self.flags, self.folder = script, kind, flags, folder
        self.random, self.tally = random.Random(seed), Tally()
        self.reference, self.seconds = folder / "uninterrupted", 0.0

    def start(self, directory: Path) -> Started:
        """Start the training command, the same one each time."""
        arguments = [*self.flags, *EVERY_RUN.split(), "--output_dir", str(directory)]
        env = environment(SAMECURVE_CACHE=str(self.folder / "cache"), PYTHONPATH=str(ROOT))
        self.tally.launches += 1
        marked = [str(directory / COPYING), str(self.script), *arguments]
        return Started(command(self.kind, ROOT / "tools" / "marked_run.py", *marked), directory.with_suffix(".log"), env)

    def run(self, kills: int) -> None:
        """Do the uninterrupted run, whose duration bounds the moments of the kills; then runs until there are enough kills."""
        started = time.monotonic()
        if self.start(self.reference).wait() != 0:
            self.tally.failed.append(f"the uninterrupted run: {_tail(self.reference)}")
            return
        self.seconds = time.monotonic() - started
        while self.tally.total < kills and not self.tally.hung:
            self.run_with_kills(self.folder / f"run_{self.tally.runs + 1}", kills)
            self.tally.runs += 1
            print(f"run {self.tally.runs}: {self.tally.total} of {kills} kills so far", file=sys.stderr)

    def run_with_kills(self, directory: Path, kills: int) -> None:
        """One run, killed and restarted until it finishes; after each launch the checkpoints are checked."""
        committed: dict[int, str] = {}
        saved_in_all = 0
        killed, code = True, 0
        while killed:
            resumes_before = len(_resumed(directory))
            try:
                killed, code = self.launch(directory, *(self.choose() if self.tally.total < kills else (NEVER, None)))
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                self.tally.hung.append(f"{directory.name}: {type(error).__name__}: {_tail(directory)}")
                return
            resumed = _resumed(directory)[resumes_before:]
            self.tally.resumed += resumed
            if resumed and committed and resumed[0] != max(committed):
                self.tally.lost.append(f"{directory.name}: resumed from {resumed[0]}, not from {max(committed)}")
            checkpoints, problems = inspect_checkpoints(directory)
            self.tally.lost += [f"{directory.name}: {each}" for each in problems]
            saved_in_all += len(checkpoints.keys() - committed.keys())
            if committed and max(checkpoints, default=0) < max(committed):
                self.tally.lost.append(f"{directory.name}: checkpoint {max(committed)} is gone")
            if len(checkpoints) < min(saved_in_all, KEEP_LAST):
                self.tally.lost.append(f"{directory.name}: {len(checkpoints)} checkpoints left of {saved_in_all}")
            committed = checkpoints
        self.compare(directory, code)

    def launch(self, directory: Path, moment: Moment, rank: int | None) -> tuple[bool, int]:
        """One launch, of which `rank` (None: all) is killed at `moment`. Returns (whether it was, exit code); TimeoutError or
        TimeoutExpired, once all are killed, if it hangs."""
        process, phases = self.start(directory), list[str]()

        def observed_moment(place: Path, since: float) -> bool:
            if not moment(place, since):
                return False
            phases.append(phase(place, since))  # the last check is made while all processes are suspended
            return True

        try:
            killed = kill_at_moment(process, directory, observed_moment, self.seconds + HANG_SECONDS, rank)
            code = process.wait(timeout=HANG_SECONDS)
            self.tally.orphans += [f"{directory.name}: process {pid}" for pid in process.orphans(ORPHAN_SECONDS)]
        finally:
            process.kill_all()
        if killed:
            self.tally.kills[phases[-1], "everyone" if rank is None else "one rank"] += 1
            if code == 0:
                self.tally.failed.append(f"{directory.name}: killed, and yet it ended with 0")
        return killed, code

    def choose(self) -> tuple[Moment, int | None]:
        """(when to kill, the rank to kill or None for all): a time uniform over the duration of a run; in 70 % of the cases not
        before the next evaluation or phase of a save. With two processes, a third of the kills hit one rank alone."""
        moment = after(self.random.uniform(0, self.seconds))
        inside = self.random.choices([None, *SAVING.values(), inside_an_evaluation(EVAL_EVERY)], [30, 20, 20, 20, 10])[0]
        alone = self.kind != "one" and self.random.random() < 1 / 3
        return (both(moment, inside) if inside else moment), (self.random.randrange(2) if alone else None)

    def compare(self, directory: Path, code: int) -> None:
        """Compare the final tensors and the curves of a run that has ended by itself with those of the uninterrupted run."""
        final = Path("checkpoints", "checkpoint_final")
        if code != 0 or not (directory / final).is_dir():
            self.tally.failed.append(f"{directory.name}: exit {code}: {_tail(directory)}")
            return
        names = different_tensors(directory / final, self.reference / final)
        try:
            names += [key for key, values in curve(self.reference).items() if curve(directory).get(key) != values]
        except ValueError as error:
            names.append(str(error))
        if names:
            self.tally.different.append(f"{directory.name}: {', '.join(names)}")
        elif not self.tally.has_problems():
            shutil.rmtree(directory)


def phase(directory: Path, since: float) -> str:
    """The phase, one of PHASES, that a launch is in according to its files."""
    for name, inside in SAVING.items():
        if inside(directory, since):
            return name
    status = directory / "status.json"
    if status.is_file() and status.stat().st_mtime >= since and json.loads(status.read_text())["state"] == "finished":
        return "after the last step"
    if not rows(directory, since):
        return "start-up"
    return "inside an evaluation" if inside_an_evaluation(EVAL_EVERY)(directory, since) else "step"


def inspect_checkpoints(directory: Path) -> tuple[dict[int, str], list[str]]:
    """Verify all checkpoints of a run. Returns ({step: digest of its manifest} of the good ones, problems)."""
    folder = directory / "checkpoints"
    good: dict[int, str] = {}
    problems: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        step = re.fullmatch(r"\w+_(\d+)", path.name)
        if path.name.startswith(ROLLED_BACK):
            problems.append(f"{path.name}: checkpoints were set aside")
        elif path.is_symlink() or step:
            try:
                checkpoint = Checkpoint(path)
                checkpoint.verify()
                if not path.is_symlink() and step:
                    good[int(step[1])] = checkpoint.digest
            except UserError as reason:
                problems.append(str(reason))
    return good, problems


def _resumed(directory: Path) -> list[int]:
    """Steps that the launches of a run have resumed from, according to its log."""
    log = directory.with_suffix(".log")
    steps = re.findall(r"^Resumed from step (\d+)$", log.read_text(errors="replace") if log.exists() else "", re.MULTILINE)
    return [int(step) for step in steps]


def _tail(directory: Path) -> str:
    return directory.with_suffix(".log").read_text(errors="replace")[-2000:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
