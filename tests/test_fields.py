"""What a file may hold for the fields of a dataclass."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

import pytest

from trainer.fields import is_a, problem_of
from trainer.state import TrainState

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3, 10**20], [1.0, True, "1", None, 10**400]),
        (float, [0, 1.5, -2], [True, "1", None, NAN, INFINITY, 10**400]),
        (bool, [True, False], [0, "no", None]),
        (str, ["", "a"], [0, None, b"a", ["a"]]),
        (float | None, [None, 1], ["x", NAN]),
        (Annotated[int, "positive"], [1], ["1"]),
        (Literal["a", "b"], ["a"], ["c", 1, ["a"]]),
        (list[float | None], [[], [1, None]], [1, ["a"], None]),
        (tuple[int, ...], [[1, 2], (1,), []], [[1, "a"], 1]),
        (tuple[int, str], [[1, "a"]], [[1], ["a", 1], [1, "a", 2]]),
        (dict[str, float], [{}, {"a": 1}], [{"a": "b"}, {1: 1}, []]),
        (Any, [None, 1, "a"], []),
    ],
)
def test_values_of_a_type(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not is_a(hint, value)] == []
    assert [value for value in bad if is_a(hint, value)] == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1], "is [1], not a mapping"),
        ({"a": 1}, "lacks 'b'"),
        ({"a": 1, "b": "x", "c" * 90: 1}, "has an unknown"),
        ({"a": "one", "b": "x"}, "has a 'one'"),
        ({"a": 1, "b": "x"}, None),
    ],
)
def test_problems_are_named(value: Any, problem: str | None) -> None:
    found = problem_of({"a": int, "b": str}, value)
    assert found is None if problem is None else found is not None and found.startswith(problem) and len(found) < 120


def test_values_that_have_no_end_are_shown_short() -> None:
    """A few lines of YAML hold a list of lists of ... 10^20 words, and a number that Python refuses to print."""
    bomb: list[Any] = ["x"] * 100
    for _ in range(10):
        bomb = [bomb] * 100
    for value in (bomb, {"b": bomb}, 16**9000):
        for found in (problem_of({"a": int}, {"a": value}), problem_of({"a": int}, value)):
            assert found is not None
            assert len(found) < 120


def test_what_may_be_missing() -> None:
    assert problem_of({"a": int}, {}, whole=False) is None


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 1.5},
        {"hours": NAN},
        {"loss_sums": 3},
        {"loss_sums": [1.0]},
        {"best_metric": "low"},
        {"more": 1},
    ],
)
def test_a_train_state_that_no_run_has_written_is_refused(change: dict[str, Any]) -> None:
    import dataclasses

    good = TrainState(step=3, loss_sums=[1.0, None], item_counts=[4.0, 0.0])
    state = dataclasses.asdict(good)
    assert TrainState.from_json(state) == good
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainState.from_json(state | change)
    missing = next(iter(typing.get_type_hints(TrainState)))
    with pytest.raises(ValueError, match=f"lacks '{missing}'"):
        TrainState.from_json({key: value for key, value in state.items() if key != missing})
