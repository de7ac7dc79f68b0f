"""What two processes do in each micro-step of one DDP launch: their dropout masks, their counts, and when gradients travel."""

from __future__ import annotations

import itertools

import pytest
from scenarios import Finished, launch, recipe_of
from test_same_maths import reference
from watched_recipe import rows

RECIPE = "watched_recipe:WatchedRecipe"
STEPS, ACCUMULATION = 4, 4
CUT = ["--batch_size", "2", "--gradient_accumulation_steps", str(ACCUMULATION), "--max_steps", str(STEPS + 4)]
CUT += ["--stop_at_step", str(STEPS), "--warmup_steps", "0"]
RUNS = {
    "maths": [*CUT, "--learning_rate", "1e-2"],
    # One sample again and again, by weights that stand still: losses differ where dropout masks do, and nowhere else.
    "masks": [*CUT, "--learning_rate", "1e-12", "--min_lr", "0", "--train_rows", "1", "--dropout", "0.5"],
    "no dropout": [*CUT, "--learning_rate", "1e-12", "--min_lr", "0", "--train_rows", "1"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """{name: run} of one DDP launch."""
    return launch("ddp", {name: (RECIPE, argv) for name, argv in RUNS.items()}, tmp_path_factory.mktemp("ddp"))


def losses(run: Finished, rank: int) -> list[float]:
    """A rank's own loss by micro-step."""
    return [row["losses"]["token"] for row in rows(run.path, rank)]


def test_dropout_masks_differ_between_ranks_steps_and_micro_batches(finished: dict[str, Finished]) -> None:
    without = losses(finished["no dropout"], 0) + losses(finished["no dropout"], 1)
    assert len(without) == 2 * STEPS * ACCUMULATION
    assert without == pytest.approx([without[0]] * len(without), rel=1e-6)
    masked = losses(finished["masks"], 0) + losses(finished["masks"], 1)
    assert len(set(masked)) == len(masked) == len(without)


def test_the_losses_are_divided_by_the_items_of_all_ranks_and_micro_batches(finished: dict[str, Finished]) -> None:
    right = reference(recipe_of("toy_recipe:ToyRecipe"), RUNS["maths"], STEPS)
    for name, values in right.items():
        assert list(finished["maths"].curve(name).values()) == pytest.approx(values, rel=1e-5)


def test_gradients_are_reduced_in_the_last_micro_step_alone(finished: dict[str, Finished]) -> None:
    """Else a step with accumulation would send as much as so many steps."""
    for rank in (0, 1):
        before = [row["reductions"] for row in rows(finished["maths"].path, rank)]
        sent = [after - earlier for earlier, after in itertools.pairwise(before)]  # all but the last one's
        assert len(sent) == STEPS * ACCUMULATION - 1
        assert [bool(count) for count in sent] == [micro % ACCUMULATION == 0 for micro in range(1, STEPS * ACCUMULATION)]
