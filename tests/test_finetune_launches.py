"""Fine-tuned models under launches that cut them: the same curve, and each resumes the other's checkpoints."""

from __future__ import annotations

import pytest
from scenarios import Finished, launch
from tiny_models import FAMILIES, model_folder, rows_folder
from tiny_runs import NOT_AT_EPOCHS, QUIET

WAYS = {"": [], "adapted": ["--lora_rank", "4"], "last": ["--train_last", "1", "--gradient_checkpointing"]}
RUNS = [*FAMILIES, "llama adapted", "mixtral adapted", "qwen3 last"]
HALF, STEPS = 4, 8
COMMON = ["--max_length", "32", "--samples", "0", *QUIET, *NOT_AT_EPOCHS, "--warmup_steps", "2"]
COMMON += ["--batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "12", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Finished], dict[str, Finished]]:
    """Each run in one process; and begun under FSDP2, and gone on with under ZeRO-3."""
    root = tmp_path_factory.mktemp("models")
    models = {family: model_folder(family, root / family) for family in FAMILIES}
    data = ["--data_dir", str(rows_folder(root / "rows"))]

    def runs(step: int) -> dict[str, tuple[str, list[str]]]:
        parts = {name: name.partition(" ") for name in RUNS}
        return {
            name: (
                "recipes.finetune_lm:FinetuneLM",
                ["--init_from", str(models[family]), *data, *COMMON, *WAYS[way], "--stop_at_step", str(step)],
            )
            for name, (family, _, way) in parts.items()
        }

    whole = launch("one", runs(STEPS), tmp_path_factory.mktemp("whole"))
    handed_on = tmp_path_factory.mktemp("handed_on")
    launch("fsdp", runs(HALF), tmp_path_factory.mktemp("fsdp"), handed_on)
    return whole, launch("zero3", runs(STEPS), tmp_path_factory.mktemp("zero3"), handed_on)


@pytest.mark.parametrize("name", RUNS)
def test_every_launch_follows_the_curve_of_one_process(
    name: str, finished: tuple[dict[str, Finished], dict[str, Finished]]
) -> None:
    whole, handed_on = (runs[name] for runs in finished)
    assert handed_on.steps() == [HALF, STEPS], handed_on.outcomes
    for key in ("train/loss", "train/grad_norm"):
        expected = {step: pytest.approx(value, rel=1e-5) for step, value in whole.curve(key).items()}
        assert list(expected) == list(range(1, STEPS + 1))
        assert handed_on.curve(key) == expected, key
    assert handed_on.tensors("model", STEPS).keys() == whole.tensors("model", STEPS).keys()


@pytest.mark.parametrize("name", [name for name in RUNS if " " in name])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(
    name: str, finished: tuple[dict[str, Finished], dict[str, Finished]]
) -> None:
    for run in finished:
        first, last = (run[name].tensors("model", step) for step in (run[name].steps()[0], STEPS))
        state = {key.partition(".")[2] for key in run[name].tensors("optimizer", STEPS) if key.startswith("exp_avg.")}
        moved = {key for key, tensor in last.items() if not tensor.equal(first[key])}
        assert 0 < len(state) < len(last)
        assert run is finished[0] or moved == state
