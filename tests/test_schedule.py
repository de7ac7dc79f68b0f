"""Learning rates at the steps where schedules go wrong: the first, the peak, the last, and after it."""

import math
from dataclasses import replace

import pytest

from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from trainer.schedule import warmup_cosine, warmup_for

TOTAL, WARMUP, PEAK, FLOOR = 10_000, 2_000, 6e-4, 6e-5


def rate(step: int, floor: float = FLOOR, total: int = TOTAL, warmup: int = WARMUP) -> float:
    return warmup_cosine(step, total, warmup, PEAK, floor)


def test_the_guides_line_at_iteration_100() -> None:
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


def test_the_guides_formula() -> None:
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
    for word in ("2000", "300", "3000", "--warmup_steps"):
        assert word in message
    assert "\n" not in message
    assert warmup_for(2000, 5)[0] == 1


def test_the_recipe_follows_its_flags() -> None:
    config = Config()
    config = replace(config, optimisation=replace(config.optimisation, learning_rate=PEAK, min_lr=FLOOR))
    recipe = Gpt2Wikitext()
    for step in (1, 100, WARMUP, 7_777, TOTAL):
        assert recipe.learning_rate(step, TOTAL, config) == rate(step)
