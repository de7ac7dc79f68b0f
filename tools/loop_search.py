"""Searches a range of integers for cycles of n -> n/2 or multiplier x n + addend, exactly, on all cores.

python tools/loop_search.py                                         3n+1 from 2^71, the end of what is verified
python tools/loop_search.py --start=-1000 --count 1000              3n+1 on negative numbers
python tools/loop_search.py --multiplier 5 --start 1 --count 10000  another map
python tools/loop_search.py --from-training runs/collatz/NAME &     beside a training, until it ends

"Covered" means that the outcome for a number is known, not that it was followed. Of 3n+1 above 2^24, 98.3 % of all numbers
fall below themselves by a proof that reads their last 24 bits only (a sieve), and 44 % of the others come after a smaller
number of the same path (those that are 2 mod 3 or 4 mod 9): 0.95 % are followed, until they are below themselves. The numbers
below 2^71 all reach 1 (Barina 2025), so from a start up to 2^71 that proves that every covered number reaches 1; from a
start above it, that none is the smallest of a cycle, and only the sieve is used. All other numbers and maps are followed into
a cycle by Brent's algorithm. A number that meets a limit (--max_steps, --max_bits) is reported as unresolved: most numbers of
5n+1 are. tools/loops/coverage.py has the argument.

The state file is the cursor and the report so far. The same command goes on from it, after Ctrl-C or a kill.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from loops.beside_training import lower_priority, training_ended
from loops.exact import Map
from loops.record import VERIFIED_BITS, Record, SearchConfig
from loops.sieve import MAX_BITS

from trainer.command_line.locations import argument_path
from trainer.command_line.secrets import without_urls
from trainer.command_line.webhook import VARIABLE, find_webhook
from trainer.distributed.hardware import cores
from trainer.errors import CHECKPOINT, FINISHED, UserError
from trainer.reporting.alerts import open_alerts
from trainer.reporting.console import Console, format_duration

if TYPE_CHECKING:
    from tqdm import tqdm

SIEVE_BITS = 24
MAX_SIZE_BITS = 1 << 16  # of a number to start from, and of --max_bits


def main(arguments: list[str] | None = None) -> None:
    """Run the search of the command line. Exits with 0 when done or interrupted, else with a code of `trainer.errors`."""
    options = _parser().parse_args(arguments)
    console, code = Console(None, True), FINISHED
    try:
        run(options, console)
    except UserError as error:
        code = error.exit_code
        console.error(str(error))
    sys.exit(code)


def run(options: argparse.Namespace, console: Console) -> None:
    """Resume or begin the search, cover the range, print the report. Raises UserError."""
    config, beside_training = config_from_options(options), options.from_training is not None
    workers = options.workers if options.workers is not None else 1 if beside_training else cores()
    for name, value, low, high in (("workers", workers, 1, 1024), ("sieve_bits", options.sieve_bits, 8, MAX_BITS)):
        if not low <= value <= high:
            raise UserError(f"{name} {value} is outside {low} to {high}")
    webhook = find_webhook(options.alert_webhook, os.environ)
    state = options.state or default_state(config)
    with _lock(state), _stop_signals() as stop_requested, _Bar(config.count, shown=not beside_training) as bar:
        log = bar.above(console.log)
        record = Record.read(state, config)
        if not record.complete:
            for path in (state, options.report):  # so that an unwritable file fails now, not after the search
                if path:
                    record.write(path)
            log(f"{config.rule} from {config.start}, {config.count:,} numbers; workers: {workers}; state: {state}")
            if record.tally.covered:
                log(f"resuming at {record.next}: {record.tally.covered:,} are covered")
            stopped = stop_requested
            if beside_training:
                lower_priority()
                ended = training_ended(options.from_training)
                stopped = lambda: stop_requested() or ended()  # noqa: E731
            alerts = open_alerts(webhook, f"loop search {config.rule}", log)

            def on_find(text: str) -> None:
                log(text)
                alerts.send("found", text)

            try:
                from loops.search import search  # numba: --help need not wait for it

                bar.show(record)
                reason = search(record, options.sieve_bits, workers, stopped, on_find, bar.show, lambda: record.write(state))
            finally:
                alerts.close()
            if reason:
                log(f"{reason}: saved; the same command goes on at {record.next}")
        for line in summary(record):
            log(line)
        if options.report:
            record.write(options.report)


def summary(record: Record) -> Iterator[str]:
    """The lines of the printed report."""
    from loops.search import describe

    tally = record.tally
    rate = f", {tally.covered / record.seconds:.3g} numbers/s" if record.seconds > 0 else ""
    yield f"covered {tally.covered:,} of {record.config.count:,} numbers in {format_duration(record.seconds)}{rate}"
    yield (
        f"  {tally.by_sieve:,} by the sieve, {tally.by_predecessor:,} by a smaller number before them, "
        f"{tally.followed:,} followed ({tally.redone_exactly:,} in big integers)"
    )
    for cycle, reached in sorted(tally.reached.items(), key=lambda item: abs(item[0].smallest)):
        suffix = " (trivial)" if cycle.trivial else ""
        yield f"  {describe(cycle, str(record.config.rule))}{suffix}; {reached:,} followed numbers enter it"
    for limit, count in tally.unresolved.items():
        yield f"  unresolved, {limit}: {count:,}"
    if tally.unresolved_numbers:
        first = ", ".join(map(str, tally.unresolved_numbers[:5]))
        yield f"  the first unresolved: {first}"
    yield record.conclusion()


def config_from_options(options: argparse.Namespace) -> SearchConfig:
    """The search that the options describe. UserError if they are invalid."""
    rule = Map(options.multiplier, options.addend)
    if rule.multiplier == 0 or (rule.multiplier + rule.addend) % 2:
        raise UserError(f"{rule} keeps odd numbers odd, or forgets them; multiplier and addend must be odd both, or even both")
    if abs(rule.multiplier) >= 1 << 31 or abs(rule.addend) >= 1 << 62:
        raise UserError(f"{rule} is too large; multiplier must be below 2^31, addend below 2^62")
    config = SearchConfig(rule, options.start, options.count, options.max_steps, options.max_bits)
    if config.count < 1:
        raise UserError(f"count {config.count} leaves nothing to search; give at least 1")
    if not 1000 <= config.max_steps <= 10**7:
        raise UserError(f"max_steps {config.max_steps} is outside 1000 to 10000000")
    if not 128 <= config.max_bits <= MAX_SIZE_BITS:
        raise UserError(f"max_bits {config.max_bits} is outside 128 to {MAX_SIZE_BITS}")
    largest = max(abs(config.start), abs(config.stop - 1)).bit_length()
    if largest >= config.max_bits:
        raise UserError(f"the range has numbers of {largest} bits, max_bits is {config.max_bits}; give a higher --max_bits")
    return config


def default_state(config: SearchConfig) -> Path:
    """The state file if --state is not given: named after the search."""
    limits = "" if (config.max_steps, config.max_bits) == (100_000, 256) else f"_{config.max_steps}_{config.max_bits}"
    return Path("runs", "loop_search", f"{config.rule}_from_{config.start}_count_{config.count}{limits}.json")


def integer(text: str) -> int:
    """`123`, `-5`, `1_000`, `2^71` or `2^71+1`. Raises ValueError."""
    match = re.fullmatch(r"([+-]?)(\d[\d_]*)(?:(?:\^|\*\*)(\d{1,5}))?(?:([+-])(\d[\d_]*))?", text.strip())
    if match is None or len(text) > 10_000:
        raise ValueError
    sign, base, exponent, plus, rest = match.groups()
    if exponent and int(base).bit_length() * int(exponent) > 2 * MAX_SIZE_BITS:
        raise ValueError
    value = int(base) ** int(exponent or 1)
    return (-value if sign == "-" else value) + int(f"{plus or '+'}{rest or 0}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Remove URLs from the message: a mistyped flag may be followed by that of a webhook, which is a secret."""
        super().error(without_urls(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--multiplier", type=int, default=3)
    add("--addend", type=int, default=1)
    add("--start", type=integer, default=1 << VERIFIED_BITS, help="first number; 2^71 may be written so (--start=-5 below 0)")
    add("--count", type=integer, default=1 << 50, help="how many numbers (default: 2^50, more than a day on one core)")
    add("--workers", type=int, help="threads (default: one per core)")
    add("--max_steps", type=integer, default=100_000, help="steps after which a number is unresolved (default: %(default)s)")
    add("--max_bits", type=integer, default=256, help="size at which a number is unresolved (default: %(default)s)")
    add(
        "--sieve_bits",
        type=int,
        default=SIEVE_BITS,
        help=f"bits of the sieve for 3n+1, 8 to {MAX_BITS} (default: %(default)s)",
    )
    add(
        "--state",
        type=argument_path,
        help="cursor and report so far (default: a file in runs/loop_search, named after the search)",
    )
    add(
        "--alert_webhook",
        "--alert-webhook",
        metavar="URL",
        help=f"send finds to this webhook (or {VARIABLE} in the environment)",
    )
    add("--report", type=argument_path, metavar="FILE.json", help="write the report there too, at the end")
    add(
        "--from_training",
        "--from-training",
        type=argument_path,
        metavar="RUN_DIR",
        help="run beside this training: lowest priority, one worker, until its status.json is no longer `running`; "
        "one that is not yet running is given two minutes",
    )
    return parser


@contextmanager
def _lock(state: Path) -> Iterator[None]:
    """Lock the state against a second search; the kernel releases the lock however this process ends. UserError if locked."""
    path = state.with_name(f".{state.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --state", CHECKPOINT) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another search is working on {state}; wait for it, or choose another --state") from None
    finally:
        os.close(descriptor)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """Yield a function that returns the reason after Ctrl-C or SIGTERM, else None; a second one ends the process at once."""
    received: list[str] = []

    def record(number: int, _: FrameType | None) -> None:
        received.append("interrupted" if number == signal.SIGINT else "stopped by SIGTERM")
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Bar:
    """A progress bar with numbers/s; shown only if stderr is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown = total, shown
        self._bar: tqdm | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, record: Record) -> None:
        """Set the bar to the progress of the record. Its rate counts this launch only."""
        from tqdm import tqdm

        covered = record.tally.covered
        if self._bar is None:
            disable = None if self._shown else True  # None: off where there is no terminal
            self._bar = tqdm(total=self._total, initial=covered, unit=" numbers", unit_scale=True, disable=disable, leave=False)
        self._bar.update(covered - self._bar.n)

    def above(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """`log`, with the bar cleared while it prints."""

        def log_above(text: str) -> None:
            if self._bar is not None:
                self._bar.clear()
            log(text)
            if self._bar is not None:
                self._bar.refresh()

        return log_above


if __name__ == "__main__":
    main()
