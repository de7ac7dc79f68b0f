"""Learning-rate schedules: pure functions of the optimizer step, which is counted from 1."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts).

    Step `warmup_steps` has the peak, no step has 0, step `total_steps` has the floor, and later ones keep it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_for(requested: int, total_steps: int) -> tuple[int, str | None]:
    """The warm-up for a value that nobody typed: at most a tenth of the run. With the sentence that says it was cut."""
    limit = max(1, total_steps // 10)
    if requested <= limit:
        return requested, None
    return (
        limit,
        f"Warm-up cut from {requested} to {limit} steps, a tenth of this run's {total_steps} (--warmup_steps overrides)",
    )
