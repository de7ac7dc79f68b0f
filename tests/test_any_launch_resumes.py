"""Any launch resumes any other: a run handed from backend to backend follows the curve of one that was never
stopped. Each part is a launch of its own; it carries on several runs, so that one chain tries several states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from scenarios import TOY, Finished, launch
from test_same_maths import sample
from toy_recipe import InManyFiles

from trainer.backends.tensors import whole_entries
from trainer.checkpoints import writing
from trainer.checkpoints.checkpoint import Checkpoint

KINDS = ("one", "fsdp", "zero3", "ddp:3", "hsdp", "zero1", "fsdp_offload", "fsdp:3", "zero2:3", "one")
CHAIN = tuple((kind, 3 * number) for number, kind in enumerate(KINDS, start=1))
STEPS = CHAIN[-1][1]
# A micro-batch that neither 2, 3 nor 4 processes share evenly.
BATCH, ACCUMULATION = 5, 2
COMMON = ["--max_steps", "32", "--learning_rate", "1e-2", "--warmup_steps", "4", "--save_every", "3", "--keep_last", "0"]
COMMON += ["--batch_size", str(BATCH), "--gradient_accumulation_steps", str(ACCUMULATION)]
# Skipped steps in the middle of a part, as the last before a hand-over, and as the first after one; on one rank alone.
BAD_STEPS = (2, 6, 7, 14, 25)
NAN = ["--nan_samples", *(sample(step, 3 if step % 2 else 4, BATCH * ACCUMULATION) for step in BAD_STEPS)]
RUNS = {
    "adamw": (TOY, COMMON),
    "adamw after skipped steps": (TOY, [*COMMON, *NAN]),
    "averaged after skipped steps": (TOY, [*COMMON, *NAN, "--ema", "0.8"]),
    # Log intervals that run across the hand-overs: their sums are in the checkpoint.
    "sgd with momentum": (TOY, [*COMMON, "--optimizer", "sgd", "--log_every", "3"]),
    # Signs of momenta near 0 differ by rounding: a small rate keeps what follows from them small.
    "the recipe's own optimizer": ("lion_recipe:LionRecipe", [*COMMON, *NAN, "--learning_rate", "1e-4"]),
    "some weights frozen": (TOY, [*COMMON, "--frozen"]),
    "adam, recomputed": (TOY, [*COMMON, "--optimizer", "adam", "--weight_decay", "0.1", "--gradient_checkpointing"]),
}


# No step after the first part changes anything.
SKIPPED = ["--nan_samples", *(sample(step, step % 2, BATCH * ACCUMULATION) for step in range(4, STEPS + 1))]
STANDING = {"standing still": ("toy_recipe:InManyFiles", [*COMMON, *SKIPPED, "--max_bad_steps", "100"])}


def until(step: int, runs: dict[str, tuple[str, list[str]]] = RUNS) -> dict[str, tuple[str, list[str]]]:
    """The runs, stopped at `step`."""
    return {name: (recipe, [*argv, "--stop_at_step", str(step)]) for name, (recipe, argv) in runs.items()}


def plant_negative_zeros(path: Path) -> None:
    """In every tensor of a checkpoint: added up over ranks that hold nothing they would become 0.0."""
    saved = Checkpoint(path)
    tensors = {}
    for stem in ("model", "optimizer"):
        values = {name: saved.tensor(stem, name) for name in saved.names(stem)}
        for value in values.values():
            if value.ndim:
                value.view(-1)[::3] = -0.0
        files = sorted(path.glob(f"{stem}*.safetensors"))
        tensors[stem] = whole_entries({name: values[name] for file in files for name in saved_order(file) if name in values})
    texts = {name: saved.text(name) for name in saved.files if ".safetensors" not in name}
    shutil.rmtree(path)
    writing.write(path.parent, path.name, tensors, texts, InManyFiles.shard_bytes)


def saved_order(path: Path) -> list[str]:
    """The names of a file's tensors, as they follow each other in it."""
    with path.open("rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """The runs in one piece, in one process."""
    return launch("one", until(STEPS), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """The runs handed along CHAIN."""
    runs = tmp_path_factory.mktemp("chained")
    for number, (kind, step) in enumerate(CHAIN):
        folder = tmp_path_factory.mktemp(f"part_{number}")
        finished = launch(kind, until(step, RUNS | STANDING), folder, runs)
        for name, run in finished.items():
            assert {outcome["reason"] for outcome in run.outcomes} == {"stop_at_step"}, (name, kind, run.outcomes)
            assert run.steps()[-1] == step
        resumed = (folder / "log.txt").read_text().count(f"Resumed from step {CHAIN[number - 1][1]}\n")
        assert resumed == (len(RUNS | STANDING) if number else 0)
        if not number:
            plant_negative_zeros(runs / "standing still" / "checkpoints" / f"checkpoint_step_{step}")
    return finished


@pytest.mark.parametrize("name", RUNS)
def test_a_run_handed_from_launch_to_launch_follows_the_whole_one(
    name: str, whole: dict[str, Finished], chained: dict[str, Finished]
) -> None:
    reference, run = whole[name], chained[name]
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/bad_steps", "eval/val_loss"):
        expected = {s: v if v is None else pytest.approx(v, rel=1e-5) for s, v in reference.curve(key).items()}
        assert len(expected) >= 2
        assert run.curve(key) == expected, key


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [step for _, step in CHAIN])
def test_every_checkpoint_of_the_chain_holds_what_the_whole_run_had(
    step: int, name: str, whole: dict[str, Finished], chained: dict[str, Finished]
) -> None:
    for stem in ("model", "optimizer"):
        expected, actual = whole[name].tensors(stem, step), chained[name].tensors(stem, step)
        assert set(actual) == set(expected)
        for tensor_name, tensor in expected.items():
            apart = float((actual[tensor_name] - tensor).norm() / tensor.norm().clamp_min(1e-9))
            assert actual[tensor_name].shape == tensor.shape
            assert apart < 1e-4, (stem, tensor_name, apart)
    assert any(tensor.numel() == 1 for tensor in whole[name].tensors("model", step).values())


def test_the_tensor_files_of_one_state_are_the_same_bytes_whichever_launch_wrote_them(chained: dict[str, Finished]) -> None:
    folders = [chained["standing still"].path / "checkpoints" / f"checkpoint_step_{step}" for _, step in CHAIN]
    hashes = [
        {name: entry["sha256"] for name, entry in Checkpoint(folder).files.items() if name.endswith(".safetensors")}
        for folder in folders
    ]
    assert all(sum(name.startswith(stem) for name in hashes[0]) > 4 for stem in ("model", "optimizer"))
    assert dict(zip(KINDS, hashes, strict=True)) == dict.fromkeys(KINDS, hashes[0])
    planted = Checkpoint(folders[-1]).tensor("optimizer", "exp_avg.embed.weight").view(-1)[::3]
    assert torch.signbit(planted).all()


def test_the_count_of_adam_falls_behind_at_skipped_steps_on_every_backend(chained: dict[str, Finished]) -> None:
    for _, step in CHAIN:
        skipped = sum(bad <= step for bad in BAD_STEPS)
        assert chained["adamw after skipped steps"].tensors("optimizer", step)["step"] == torch.tensor(float(step - skipped))
        assert chained["adamw"].tensors("optimizer", step)["step"] == torch.tensor(float(step))
