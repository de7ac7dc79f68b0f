"""`--plan` and its flags, which belong to no configuration: nothing is trained with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import UserError

DEFAULT_MFU = 0.4
PLAN_HELP = {
    "--plan": "print what this run would take, and train nothing: steps, memory by launch, hours, disk",
    "--gpu NAME|GB": "with --plan: on this card (h100, a100, l40s, 4090, ...) or one of so many GB (default: what is here)",
    "--mfu X": f"with --plan: the part of the card's peak that training reaches [{DEFAULT_MFU}]",
}


@dataclass(frozen=True)
class PlanFlags:
    """What a plan assumes."""

    gpu: str | None
    """a card's name, or its gigabytes; None: what this machine has"""
    mfu: float
    """the fraction of the card's peak FLOP/s that training reaches"""


def take_plan_flags(argv: Sequence[str]) -> tuple[PlanFlags | None, list[str]]:
    """(the flags of a plan, or None without `--plan`; the rest of the command line). UserError for values out of range."""
    if "--plan" not in argv:
        return None, list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU)
    try:
        flags, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --plan --gpu h100 --mfu {DEFAULT_MFU} is the form") from error
    if not 0 < flags.mfu <= 1:
        raise UserError(f"mfu {flags.mfu:g} is a part of the peak; give a number above 0, up to 1")
    return PlanFlags(flags.gpu, flags.mfu), rest
