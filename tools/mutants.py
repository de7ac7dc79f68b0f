"""Breaks the code on purpose, in one place at a time, and checks that a test notices.

    python tools/mutants.py --list
    python tools/mutants.py                       # all of them; --only NAME ... for some

The tests that should notice a mutant are run in a copy of the repository: first without the mutant, when all must pass, then
with it, when one must fail. Exits with 1 if a mutant survives or could not be tried.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from fault_injector import ROOT, Started, environment

TIMEOUT_SECONDS = 600.0
FAILED = 1  # exit code of pytest


@dataclass(frozen=True)
class Mutant:
    """A change of one place in the code that some test should notice."""

    name: str
    what: str
    """the fault that it causes, in words"""
    file: str
    old: str
    """text that occurs exactly once in the file"""
    new: str
    """what replaces it"""
    tests: tuple[str, ...]
    """pytest arguments: files or node ids"""


def read_mutants() -> tuple[Mutant, ...]:
    """The mutants of mutants.yaml, in which tests are named without the folder tests/."""
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(
        Mutant(name, **{**entry, "tests": tuple(f"tests/{test}" for test in entry["tests"])}) for name, entry in entries.items()
    )


MUTANTS = read_mutants()


@dataclass(frozen=True)
class Outcome:
    """Whether a mutant was killed: a test noticed it."""

    killed: bool
    how: str
    """the test that failed; or why the mutant could not be tried; empty if it survived"""


class Copy:
    """A copy of the repository with its own caches, so that mutants never touch the repository itself."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "plots", "build", "dist")
        shutil.copytree(ROOT, self.root, ignore=skipped)
        self.log = folder / "log.txt"
        self.environment = environment(
            PYTHONPATH=str(self.root), PYTHONDONTWRITEBYTECODE="1", SAMECURVE_CACHE=str(folder / "cache"), PYTEST_ADDOPTS=""
        )

    def test(self, tests: Sequence[str], seconds: float) -> int | None:
        """Run pytest up to the first failure. Returns its exit code; None if it takes longer than `seconds`."""
        self.log.unlink(missing_ok=True)
        words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", "-rfE", *tests]
        process = Started(words, self.log, self.environment, cwd=self.root)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill_all()

    def said(self) -> str:
        """The end of the output of the last tests."""
        return self.log.read_text(errors="replace")[-3000:]


def mutated(mutant: Mutant, root: Path) -> str:
    """The text of the mutant's file with the mutant in place. ValueError unless `old` occurs exactly once."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"the old text is {found} times in {mutant.file}; give text that is there once")
    return text.replace(mutant.old, mutant.new)


def attempt(mutant: Mutant, copy: Copy, seconds: float) -> Outcome:
    """Run the tests of a mutant with it in place, then restore the file."""
    path = copy.root / mutant.file
    try:
        text = mutated(mutant, copy.root)
    except ValueError as error:
        return Outcome(False, str(error))
    before = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    try:
        code = copy.test(mutant.tests, seconds)
    finally:
        path.write_bytes(before)
    if code is None:
        return Outcome(True, f"hung for {seconds:g} s")
    if code == 0:
        return Outcome(False, "")
    # A failure in a test or its fixtures, which "::" shows: that a mutant cannot even be imported says nothing about the tests.
    failed = [line for line in copy.said().splitlines() if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    if code != FAILED or not failed:
        return Outcome(False, f"pytest ended with {code}:\n{copy.said()}")
    return Outcome(True, failed[-1].partition(" - ")[0])


def run(chosen: Sequence[Mutant], seconds: float) -> int:
    """Try the chosen mutants and print each outcome. Returns how many were not killed."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, healthy = Copy(Path(folder)), {}
        for mutant in chosen:
            started = time.monotonic()
            if mutant.tests not in healthy:
                code = copy.test(mutant.tests, seconds)
                healthy[mutant.tests] = code == 0
                if code != 0:
                    print(f"{' '.join(mutant.tests)} must pass without a mutant, and ends with {code}:\n{copy.said()}")
            outcome = attempt(mutant, copy, seconds) if healthy[mutant.tests] else Outcome(False, "its tests fail without it")
            bad += not outcome.killed
            verdict = "killed  " if outcome.killed else "SURVIVED"
            print(f"{verdict} {mutant.name} ({time.monotonic() - started:.0f} s): {mutant.what} {outcome.how}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return bad


def main(arguments: Sequence[str]) -> int:
    """Try mutants or list them, as the command line says. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Breaks the product on purpose and looks whether a test notices.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to try (default: all)")
    parser.add_argument("--list", action="store_true", help="names and descriptions, and try none")
    parser.add_argument("--timeout_seconds", type=float, default=TIMEOUT_SECONDS, help="for the tests of one mutant")
    flags = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in flags.only or () if name not in known]
    if unknown:
        parser.error(f"unknown mutant {unknown[0]}; --list shows all {len(known)}")
    chosen = [known[name] for name in flags.only or known]
    if flags.list:
        for mutant in chosen:
            print(f"{mutant.name:40s} {mutant.file}: {mutant.what}")
        return 0
    return min(1, run(chosen, flags.timeout_seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
