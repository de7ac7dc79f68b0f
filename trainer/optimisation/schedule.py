"""Learning-rate schedules: pure functions of the optimizer step, which is counted from 1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.command_line.sections import Optimisation


def described(o: Optimisation) -> str:
    """Peak, warm-up and floor of a schedule, as text."""
    peak = f"peak learning rate {o.learning_rate:g}"
    if o.schedule == "one_cycle":
        return f"{peak} in the middle of the run"
    return f"{peak} after {o.warmup_steps:,} steps" + ("" if o.schedule == "constant" else f", down to {o.min_lr:g}")


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts).

    Step `warmup_steps` has the peak, no step has 0, step `total_steps` has the floor, and later ones keep it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ramp_cosine(step: int, total_steps: int, warmup_steps: float, peak: float, floor: float, start_factor: float) -> float:
    """A ramp from `start_factor` x peak to the peak, then half a cosine to the floor, by the work done *before* the step.

    With n steps an epoch, 10 n of warm-up and 100 n in all, the first step of each epoch has the rate of torch's
    SequentialLR([LinearLR(start_factor, total_iters=10), CosineAnnealingLR(T_max=90)], milestones=[10]).
    """
    done = min(step - 1, total_steps)
    if done < warmup_steps:
        return peak * (start_factor + (1.0 - start_factor) * done / warmup_steps)
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def one_cycle(step: int, total_steps: int, peak: float) -> float:
    """A triangle with its peak at half: torch's OneCycleLR(peak, total_steps, pct_start=0.5, anneal_strategy="linear",
    div_factor=d, final_div_factor=d) with d = total_steps / 2 - 1 (Smith & Topin 2018). ValueError below 6 steps, where d
    would not divide the rate.
    """
    if total_steps < 6:
        raise ValueError(f"a one-cycle schedule needs at least 6 steps, not {total_steps}; give more --max_steps")
    half, first = total_steps / 2 - 1, 1.0 / (total_steps / 2 - 1)
    last = first / half
    index = min(step - 1, total_steps - 1)
    if index <= half:
        return peak * (first + (1.0 - first) * index / half)
    return peak * (1.0 + (last - 1.0) * (index - half) / (total_steps - 1 - half))


def named(
    name: str, step: int, total_steps: int, warmup_steps: int, peak: float, floor: float, cooldown_fraction: float
) -> float:
    """The learning rate of a step by the schedule that `--schedule` names.

    `one_cycle`, without warm-up and floor; or a linear warm-up, and then `constant`; or `cosine` or `linear` down to the floor
    at the last step; or `wsd`, which stays at the peak and goes down linearly over the last `cooldown_fraction` of the run (Hu
    et al. 2024, "MiniCPM", section 4.2). Later steps keep the rate of the last.
    """
    if name == "cosine":
        return warmup_cosine(step, total_steps, warmup_steps, peak, floor)
    if name == "one_cycle":
        return one_cycle(step, total_steps, peak)
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    start = {"linear": warmup_steps, "constant": total_steps, "wsd": (1 - cooldown_fraction) * total_steps}[name]
    start = max(start, warmup_steps)
    if step <= start or name == "constant":
        return peak
    return peak + (floor - peak) * min(1.0, (step - start) / max(1e-9, total_steps - start))


def warmup_for(requested: int, total_steps: int) -> tuple[int, str | None]:
    """(warm-up steps, message if they were cut) for a warm-up that was not typed: at most a tenth of the run."""
    limit = max(1, total_steps // 10)
    if requested <= limit:
        return requested, None
    return (
        limit,
        f"Warm-up cut from {requested} to {limit} steps, a tenth of this run's {total_steps} (--warmup_steps overrides)",
    )
