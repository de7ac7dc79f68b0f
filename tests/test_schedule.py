"""Learning rates at the steps where schedules go wrong: the first, the peak, the last, and after it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from recipes.pfn_raventos import PFNRaventos
from trainer.command_line.config import parse
from trainer.command_line.sections import Optimisation
from trainer.optimisation.schedule import described, named, one_cycle, ramp_cosine, warmup_cosine, warmup_for

TOTAL, WARMUP, PEAK, FLOOR = 10_000, 2_000, 6e-4, 6e-5


def rate(step: int, floor: float = FLOOR, total: int = TOTAL, warmup: int = WARMUP) -> float:
    return warmup_cosine(step, total, warmup, PEAK, floor)


def test_the_rate_at_step_100_as_it_is_logged() -> None:
    assert f"{rate(100):.2e}" == "3.00e-05"


def test_first_peak_middle_last_and_beyond() -> None:
    assert rate(1) == pytest.approx(PEAK / WARMUP, rel=1e-12)
    assert rate(WARMUP) == PEAK
    assert rate(WARMUP - 1) < PEAK
    assert rate(WARMUP + 1) < PEAK
    assert rate((TOTAL + WARMUP) // 2) == pytest.approx((PEAK + FLOOR) / 2, rel=1e-12)
    assert rate(TOTAL) == pytest.approx(FLOOR, rel=1e-12)
    assert rate(TOTAL - 1) > rate(TOTAL)
    for later in (TOTAL + 1, 2 * TOTAL, 100 * TOTAL):
        assert rate(later) == pytest.approx(FLOOR, rel=1e-12)


def test_only_the_last_step_may_have_no_learning_rate() -> None:
    for total, warmup in ((1, 0), (2, 1), (3, 0), (10, 1), (100, 10), (100, 99)):
        rates = [rate(step, 0.0, total, warmup) for step in range(1, total + 1)]
        assert all(value > 0 for value in rates[:-1]), (total, warmup)
        assert rates[-1] == pytest.approx(0.0, abs=1e-18), (total, warmup)
        assert all(value > 0 for value in (rate(step, FLOOR, total, warmup) for step in range(1, total + 2)))


def test_it_rises_to_the_peak_and_falls_from_it() -> None:
    rates = [rate(step, total=500, warmup=50) for step in range(1, 501)]
    assert rates[:50] == sorted(rates[:50])
    assert rates[49:] == sorted(rates[49:], reverse=True)
    assert max(rates) == PEAK


def test_the_cosine_formula() -> None:
    for step in (2_500, 4_000, 9_999):
        progress = (step - WARMUP) / (TOTAL - WARMUP)
        assert rate(step, 0.0) == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * progress)), rel=1e-12)


def test_a_typed_warmup_as_long_as_the_run_is_obeyed() -> None:
    assert rate(5, total=10, warmup=20) == pytest.approx(PEAK * 5 / 20)
    assert rate(10, total=10, warmup=10) == PEAK


def test_an_untyped_warmup_is_cut_to_a_tenth_with_a_message() -> None:
    assert warmup_for(2000, 20_000) == (2000, None)
    assert warmup_for(0, 5) == (0, None)
    cut, message = warmup_for(2000, 3000)
    assert cut == 300
    assert message is not None
    for part in ("2000", "300", "3000", "--warmup_steps"):
        assert part in message
    assert "\n" not in message
    assert warmup_for(2000, 5)[0] == 1


def test_the_recipe_follows_its_flags() -> None:
    config = Config()
    config = replace(config, optimisation=replace(config.optimisation, learning_rate=PEAK, min_lr=FLOOR))
    recipe = Gpt2Wikitext()
    for step in (1, 100, WARMUP, 7_777, TOTAL):
        assert recipe.learning_rate(step, TOTAL, config) == rate(step)


# ------------------------------------------------------------------------------------- schedules that torch has, by its own


def torchs(make: Callable[[torch.optim.Optimizer], Any], steps: int, peak: float) -> list[float]:
    """The learning rate of each step, by a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, rates = make(optimizer), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("total", [6, 7, 10, 11, 1000])
def test_one_cycle_is_torchs_value_by_value(total: int) -> None:
    factor = total / 2 - 1
    options = {"pct_start": 0.5, "anneal_strategy": "linear", "div_factor": factor, "final_div_factor": factor}
    expected = torchs(lambda o: OneCycleLR(o, PEAK, total, cycle_momentum=False, **options), total, PEAK)
    assert [one_cycle(step, total, PEAK) for step in range(1, total + 1)] == pytest.approx(expected, rel=1e-9)


def test_one_cycle_by_the_values_of_its_paper_experiment() -> None:
    rates = [one_cycle(step, 1000, 1e-3) for step in range(1, 1001)]
    assert (rates[0], rates[499], rates[-1]) == pytest.approx((2.004008e-6, 1e-3, 4.016048e-9), rel=1e-6)
    rates = [one_cycle(step, 10, 1e-3) for step in range(1, 11)]
    assert (rates[0], rates[4], rates[-1]) == pytest.approx((2.5e-4, 1e-3, 6.25e-5), rel=1e-12)
    assert one_cycle(11, 10, 1e-3) == rates[-1]


@pytest.mark.parametrize("total", [1, 4, 5])
def test_one_cycle_refuses_runs_too_short_for_it(total: int) -> None:
    with pytest.raises(ValueError, match=f"at least 6 steps, not {total}"):
        one_cycle(1, total, 1e-3)


def test_without_warmup_the_ramp_and_cosine_are_torchs_cosine_annealing() -> None:
    def annealed(step: int, total_steps: int) -> float:
        return ramp_cosine(step, total_steps, 0, 1e-4, 1e-6, start_factor=1.0)

    expected = torchs(lambda o: CosineAnnealingLR(o, 200, eta_min=1e-6), 200, 1e-4)
    assert [annealed(step, 200) for step in range(1, 201)] == pytest.approx(expected, rel=1e-9)
    assert f"{annealed(100_000, 1_000_000):.2e}" == "9.76e-05"
    assert annealed(10**7, 10**6) == pytest.approx(1e-6)


def test_a_ramp_and_a_cosine_are_torchs_two_schedulers_at_the_start_of_each_epoch() -> None:
    def both(optimizer: torch.optim.Optimizer) -> SequentialLR:
        ramp = LinearLR(optimizer, start_factor=0.1, total_iters=10)
        return SequentialLR(optimizer, [ramp, CosineAnnealingLR(optimizer, T_max=90)], milestones=[10])

    expected, steps = torchs(both, 100, 1e-3), 7
    ours = [ramp_cosine(1 + epoch * steps, 100 * steps, 10 * steps, 1e-3, 0.0, 0.1) for epoch in range(100)]
    assert ours == pytest.approx(expected, rel=1e-6)


def by_name(name: str, total: int = 100, warmup: int = 10, cooldown: float = 0.2) -> list[float]:
    return [named(name, step, total, warmup, 1.0, 0.1, cooldown) for step in range(1, total + 21)]


def test_schedules_by_name_warm_up_and_end_at_the_floor() -> None:
    for name in ("cosine", "linear", "constant", "wsd"):
        rates = by_name(name)
        assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert rates[99:] == pytest.approx([1.0 if name == "constant" else 0.1] * 21)
    assert by_name("cosine") == [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(1, 121)]
    assert by_name("linear")[54] == pytest.approx(0.55)
    assert by_name("wsd")[9:80] == [1.0] * 71
    assert by_name("wsd")[89] == pytest.approx(0.55)
    assert by_name("wsd", cooldown=0.0)[:100] == by_name("constant")[:100]
    assert by_name("wsd", warmup=95)[95:100] == pytest.approx([1 - 0.9 * part / 5 for part in range(1, 6)])
    assert by_name("one_cycle") == [one_cycle(step, 100, 1.0) for step in range(1, 121)]


def test_every_recipe_takes_a_schedule_by_name_and_has_its_own_without() -> None:
    for recipe in (Gpt2Wikitext(), PFNRaventos()):
        argv = ["--schedule", "linear", "--warmup_steps", "10", "--lr", "1", "--min_lr", "0.1", "--max_steps", "100"]
        typed = parse(recipe.config_class, {}, argv, recipe.name).config
        assert [recipe.scheduled_rate(step, 100, typed) for step in range(1, 121)] == by_name("linear")
        own = replace(typed, optimisation=replace(typed.optimisation, schedule="recipe"))
        assert recipe.scheduled_rate(30, 100, own) == recipe.learning_rate(30, 100, own) != by_name("linear")[29]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cosine", "peak learning rate 0.01 after 5 steps, down to 0.001"),
        ("constant", "peak learning rate 0.01 after 5 steps"),
        ("one_cycle", "peak learning rate 0.01 in the middle of the run"),
    ],
)
def test_a_schedule_is_described_as_it_is(name: str, text: str) -> None:
    assert described(Optimisation(learning_rate=0.01, warmup_steps=5, min_lr=0.001, schedule=name)) == text
