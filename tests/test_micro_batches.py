"""Micro-batches that are fitted to memory: the curve is that of any other split, in one process and under DDP.

Memory has an end here: a forward pass of more samples than fit raises what torch raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from scenarios import Finished, launch

from trainer.errors import OUT_OF_MEMORY

SMALL = "faulty_recipe:FaultyRecipe"
COMMON = ["--batch_size", "12", "--max_steps", "8", "--learning_rate", "1e-2", "--save_every", "4", "--eval_every", "4"]
ONE = ["--fault", "small memory", "--fault_rank", "0"]
OTHER = ["--fault", "small memory", "--fault_rank", "1"]
RUNS = {
    "plain": COMMON,
    "fitted": [*COMMON, *ONE, "--fit_batch", "--fits", "4"],
    "later": [*COMMON, *ONE, "--fit_batch", "--fits", "6", "--fits_later", "2"],
    "stopped": [*COMMON, *ONE, "--fit_batch", "--fits", "4", "--stop_at_step", "4"],
    "nothing fits": [*COMMON, *ONE, "--fit_batch", "--fits", "0"],
    "not asked for": [*COMMON, *ONE, "--fits", "4"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """A launch of one process, and one of two under DDP, where one rank alone has little memory."""
    folder = tmp_path_factory.mktemp("one")
    from_there = ["--resume_from", str(folder / "stopped" / "checkpoints" / "checkpoint_step_4")]
    runs = RUNS | {"resumed": [*RUNS["fitted"], *from_there]}
    results = launch("one", {name: (SMALL, argv) for name, argv in runs.items()}, folder)
    ddp = {"ddp": (SMALL, [*COMMON, *OTHER, "--fit_batch", "--fits", "2"])}
    return results | launch("ddp", ddp, tmp_path_factory.mktemp("ddp"))


def split_of(run: Finished, step: int) -> tuple[int, int]:
    """(batch_size, gradient_accumulation_steps) that a checkpoint keeps."""
    config = yaml.safe_load((run.path / "checkpoints" / f"checkpoint_step_{step}" / "config.yaml").read_text())
    return config["optimisation"]["batch_size"], config["optimisation"]["gradient_accumulation_steps"]


@pytest.mark.parametrize(
    ("name", "split"), [("fitted", (4, 3)), ("ddp", (4, 3)), ("later", (2, 6)), ("resumed", (4, 3)), ("plain", (12, 1))]
)
def test_the_largest_that_fits_is_found_and_kept_and_the_curve_is_the_same(name: str, split: Any, finished: Any) -> None:
    run, plain = finished[name], finished["plain"]
    assert run.outcomes[0]["reason"] == "last step", run.outcomes
    assert split_of(run, 8) == split
    for metric in ("train/loss", "train/grad_norm", "eval/val_loss"):
        own, expected = run.curve(metric), plain.curve(metric)
        assert set(own) == {step for step in expected if step > 4 or name != "resumed"}
        assert own == pytest.approx({step: expected[step] for step in own}, rel=1e-5)


def test_it_is_said(finished: dict[str, Finished]) -> None:
    said = {name: (finished[name].path / "train.log").read_text() for name in ("fitted", "ddp", "later", "plain")}
    for name in ("fitted", "ddp"):
        assert "Fitted to memory: 4 samples x 3 accumulation = 12" in said[name]
        assert "Out of memory" not in said[name]
    assert "Fitted to memory: 6 samples x 2 accumulation = 12" in said["later"]
    for size, accumulation in ((4, 3), (3, 4), (2, 6)):  # 4 samples do not fit either, nor 3
        begins = (
            f"Out of memory in step 4 (CUDA out of memory. Tried to allocate 2.00 GiB); it begins again with {size} samples x"
        )
        assert f"{begins} {accumulation} accumulation = 12" in said["later"]
    assert "memory" not in said["plain"]


@pytest.mark.parametrize("name", ["nothing fits", "not asked for"])
def test_what_cannot_be_split_ends_as_ever(name: str, finished: dict[str, Finished]) -> None:
    (outcome,) = finished[name].outcomes
    assert outcome["exit_code"] == OUT_OF_MEMORY
    assert outcome["message"].startswith("out of memory with batch_size 12 x 1 accumulation")
    assert "--fit_batch" in outcome["message"]
