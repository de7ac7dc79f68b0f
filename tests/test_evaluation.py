"""Evaluation is exact: 9 samples give the same numbers on any number of processes and in batches of any size; and
neither evaluating nor saving more often changes what is trained."""

from __future__ import annotations

import pytest
import torch
from scenarios import TOY, Finished, launch
from torch import nn
from toy_recipe import ToyRecipe

from trainer.checkpoints.network import build_network
from trainer.command_line import config
from trainer.evaluation.objective import Objective
from trainer.recipe import Batch

KINDS = ("one", "ddp", "zero3")
STEPS = 6
# No epoch ends in these runs, which would be an occasion to evaluate and to save.
COMMON = ["--train_rows", "1000", "--max_steps", "10", "--stop_at_step", str(STEPS), "--learning_rate", "1e-2"]
COMMON += ["--warmup_steps", "1"]
# 9 samples are one whole batch and a bit; on two processes rank 1 gets less than rank 0 in the end, or nothing.
SIZES = {f"batch {size}": ["--batch_size", size, "--gradient_accumulation_steps", str(8 // int(size))] for size in ("2", "8")}
# Dropout, because disturbed generators are how evaluation changes training.
DISTURBED = [*COMMON, "--batch_size", "4", "--dropout", "0.2"]
RUNS = {name: (TOY, [*COMMON, *flags, "--eval_every", str(STEPS)]) for name, flags in SIZES.items()}
RUNS |= {f"part {name}": (recipe, [*argv, "--eval_iters", "1"]) for name, (recipe, argv) in RUNS.items()}  # 8 of the 9
RUNS |= {
    "in peace": (TOY, DISTURBED),
    "evaluating": (TOY, [*DISTURBED, "--eval_every", "1"]),
    "saving": (TOY, [*DISTURBED, "--save_every", "1"]),
    "both, with workers": (TOY, [*DISTURBED, "--eval_every", "2", "--save_every", "3", "--num_workers", "1"]),
}


def test_terms_meet_their_own_counts_in_whatever_order_loss_gives_them() -> None:
    class Reversed(ToyRecipe):
        def loss(self, network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return dict(reversed(super().loss(network, batch).items()))

    settings = config.parse(ToyRecipe.config_class, {}, COMMON, "toy").config
    data = ToyRecipe().build_data(settings)
    network, batch = build_network(ToyRecipe(), settings, data), data.train.__getitems__(range(4))
    terms = list(ToyRecipe().items(batch))
    sums = [Objective(network, recipe, terms)(batch) for recipe in (ToyRecipe(), Reversed())]
    assert len(terms) == 2
    assert torch.equal(sums[0], sums[1])
    assert sums[0][0] != sums[0][1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Finished]]:
    """{kind of launch: {name: run}}."""
    return {kind: launch(kind, RUNS, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def measured_by_hand(run: Finished) -> dict[str, float]:
    """The metrics that evaluation should give for a run's last weights: the plain network, each sample on its own."""
    recipe = ToyRecipe()
    settings = config.parse(recipe.config_class, {}, COMMON, recipe.name).config
    data = recipe.build_data(settings)
    network = build_network(recipe, settings, data).eval()
    network.load_state_dict(run.tensors("model", STEPS), strict=False)
    network.head.weight = network.embed.weight  # saved once, under the first name
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    with torch.no_grad():
        for number in range(9):
            batch = data.evaluation["val"].__getitems__([number])
            for name, value in recipe.measure(network, batch).items():
                total, count = value if isinstance(value, tuple) else (value, recipe.items(batch)[name])
                sums[name] = sums.get(name, 0.0) + float(total)
                counts[name] = counts.get(name, 0.0) + count
    means = {name: sums[name] / counts[name] for name in sums}
    weights = recipe.loss_weights(settings)
    loss = sum(weights.get(term, 1.0) * means[term] for term in ("token", "value"))
    metrics = {"loss": loss, "accuracy": means["accuracy"], "loss_token": means["token"], "loss_value": means["value"]}
    return {f"eval/val_{name}": value for name, value in metrics.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_nine_samples_give_the_same_numbers_everywhere(kind: str, size: str, finished: dict[str, dict[str, Finished]]) -> None:
    run, alone = finished[kind][size], finished["one"]["batch 8"]
    for name, value in measured_by_hand(run).items():
        assert run.curve(name) == {STEPS: pytest.approx(value, rel=1e-6)}, name
        assert run.curve(name)[STEPS] == pytest.approx(alone.curve(name)[STEPS], rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["evaluating", "saving", "both, with workers"])
def test_evaluating_and_saving_more_often_change_no_bit(kind: str, name: str, finished: dict[str, dict[str, Finished]]) -> None:
    run, in_peace = finished[kind][name], finished[kind]["in peace"]
    happened = len(run.curve("eval/val_loss")) + len(run.steps())
    assert happened > len(in_peace.curve("eval/val_loss")) + len(in_peace.steps())
    assert run.curve("train/loss") == in_peace.curve("train/loss")
    for stem in ("model", "optimizer"):
        right = in_peace.tensors(stem, STEPS)
        for tensor_name, tensor in run.tensors(stem, STEPS).items():
            assert torch.equal(tensor, right[tensor_name]), (stem, tensor_name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_set_is_the_same_however_the_step_is_split(kind: str, finished: dict[str, dict[str, Finished]]) -> None:
    right = finished["one"]["part batch 8"].curve("eval/val_loss")[STEPS]
    assert right != pytest.approx(finished["one"]["batch 8"].curve("eval/val_loss")[STEPS], rel=1e-4)
    for size in SIZES:
        assert finished[kind][f"part {size}"].curve("eval/val_loss")[STEPS] == pytest.approx(right, rel=1e-5)
