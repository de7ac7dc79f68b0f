"""Baselines and metrics of the Collatz recipe, counted by hand; and that the honest task cannot be cheated in practice."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.baselines.collatz import MAX_ANOMALIES, beside_baselines, held_out_with_baselines
from recipes.collatz import Collatz, Config, next_token_loss, stopping_loss
from recipes.data.collatz import KINDS, CollatzStream, HeldOutNumbers, Layout
from recipes.data.trajectories import from_words
from recipes.models.collatz import CollatzTransformer, predict_batch
from trainer.command_line import config
from trainer.errors import UserError
from trainer.evaluation.objective import summarise
from trainer.recipe import Data

SHOWN = Layout(max_len=130, prefix_len=50)


@pytest.fixture(scope="module")
def dataset() -> HeldOutNumbers:
    return held_out_with_baselines("val", 300, 10, 2**29, SHOWN)


def settings(*argv: str) -> Config:
    return config.parse(Config, {}, argv, "collatz").config


class Fixed(torch.nn.Module):
    """A network with fixed outputs."""

    def __init__(self, stopping: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.outputs = stopping, logits

    def forward(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.outputs


def means(recipe: Collatz, network: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """As evaluation divides."""
    metrics = recipe.measure(network, batch)
    return {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}


# ------------------------------------------------------------------------------------------------------------- baselines


def test_the_first_order_rule_is_counted_per_kind_on_the_same_numbers(dataset: HeldOutNumbers) -> None:
    batch = dataset.as_batch()
    for kind in range(len(KINDS)):
        pairs: Counter[tuple[int, int]] = Counter()
        for row in batch["tokens"][batch["kind"] == kind].tolist():
            real = row[: row.index(2)] if 2 in row else row
            pairs.update(pairwise(real))
        ends = {before: sum(n for pair, n in pairs.items() if pair[0] == before) for before in (0, 1)}
        nats = -sum(n * math.log(n / ends[before]) for (before, _), n in pairs.items())
        right = sum(max(pairs[before, 0], pairs[before, 1]) for before in (0, 1))
        rows = batch["kind"] == kind
        assert batch["rule_nats"][rows].sum().item() == pytest.approx(nats, rel=1e-12)
        assert batch["rule_right"][rows].sum().item() == right


def test_on_hard_numbers_the_rule_has_the_known_values() -> None:
    batch = held_out_with_baselines("val", 3000, 10, 2**29, Layout(400, 64)).as_batch()
    hard = (batch["kind"] == 1) | (batch["kind"] == 2)
    predicted = (batch["steps"].clamp(max=400) - 1)[hard].sum()
    assert (batch["rule_nats"][hard].sum() / predicted).item() == pytest.approx(2 / 3 * math.log(2), abs=0.005)
    assert (batch["rule_right"][hard].sum() / predicted).item() == pytest.approx(0.669, abs=0.01)


def test_the_mean_of_the_magnitude_is_that_of_other_scored_numbers_of_the_size(dataset: HeldOutNumbers) -> None:
    batch = dataset.as_batch()
    digits = [n.bit_length() for n in from_words(dataset.words)]
    scored, steps = batch["scored"].tolist(), batch["steps"].tolist()
    widest = 0
    for i, own in enumerate(digits):
        others = [(abs(own - size), j) for j, size in enumerate(digits) if scored[j]]
        reach = sorted(others)[16][0]  # the 17 nearest, itself among them if it is scored
        logs = [math.log1p(steps[j]) for away, j in others if away <= reach and j != i]
        assert batch["magnitude"][i].item() == pytest.approx(sum(logs) / len(logs)), i
        widest = max(widest, reach)
    assert widest > 1
    formula = [math.log1p(10.43 * math.log(n)) for n in from_words(dataset.words)]
    assert batch["formula"].tolist() == pytest.approx(formula)


# --------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_the_means_they_name(dataset: HeldOutNumbers) -> None:
    recipe, batch = Collatz(), dataset.as_batch()
    torch.manual_seed(0)
    stopping, logits = 4 + torch.rand(300), torch.randn(300, 129, 3)
    metrics = means(recipe, Fixed(stopping, logits), batch)
    steps, scored = batch["steps"].tolist(), batch["scored"].tolist()
    off = [abs(math.expm1(log_steps) - n) for log_steps, n in zip(stopping.tolist(), steps, strict=True)]
    whole = [e for e, n, used in zip(off, steps, scored, strict=True) if used and n <= 130]
    cut = [e for e, n, used in zip(off, steps, scored, strict=True) if used and n > 130]
    assert len(whole) > 10
    assert len(cut) > 10
    assert metrics["mae"] == pytest.approx(sum(whole) / len(whole), rel=1e-5)
    assert metrics["mae_cut"] == pytest.approx(sum(cut) / len(cut), rel=1e-5)
    assert metrics["unscored"] == pytest.approx(1 - sum(scored) / 300)
    assert metrics["unscored"] > 0
    assert metrics["cut"] == pytest.approx(len(cut) / sum(scored))
    log_probabilities = logits.log_softmax(-1)
    nats: dict[int, list[float]] = {kind: [] for kind in range(4)}
    right = []
    for row, kind, row_log_probabilities in zip(
        batch["tokens"].tolist(), batch["kind"].tolist(), log_probabilities, strict=True
    ):
        for place, token in enumerate(row[1:]):
            if token != 2:
                nats[kind].append(-row_log_probabilities[place, token].item())
                right.append(row_log_probabilities[place].argmax().item() == token)
    for number, kind in enumerate(KINDS):
        assert metrics[f"seq_{kind}"] == pytest.approx(np.mean(nats[number]), rel=1e-5)
    assert metrics["seq"] == pytest.approx(np.mean([n for part in nats.values() for n in part]), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    counts = recipe.items(batch)
    assert counts == {"stop": sum(scored), "seq": len(right)}
    losses = recipe.loss(Fixed(stopping, logits), batch)
    for term, count in counts.items():
        assert float(losses[term]) / count == pytest.approx(metrics[term], rel=1e-5)
    huber = [min(abs(d), 1) * (abs(d) - min(abs(d), 1) / 2) for d in (stopping - batch["steps"].log1p()).tolist()]
    assert metrics["stop"] == pytest.approx(np.mean([h for h, used in zip(huber, scored, strict=True) if used]), rel=1e-5)


def test_a_baseline_measured_as_a_model_gives_the_baselines_figures(dataset: HeldOutNumbers) -> None:
    recipe, batch = Collatz(), dataset.as_batch()
    for name in ("magnitude", "formula"):
        metrics = means(recipe, Fixed(batch[name].float(), torch.zeros(300, 129, 3)), batch)
        for key in ("stop", "mae", "mae_cut"):
            assert metrics[key] == pytest.approx(metrics[f"{key}_{name}"])
            assert metrics[key] > 0
    weights = recipe.loss_weights(settings("--stopping_weight", "2", "--sequence_weight", "0.5"))
    data = Data(None, {"val": dataset})
    _, loss = recipe.report.baseline(settings("--stopping_weight", "2", "--sequence_weight", "0.5"), data)
    assert weights == {"stop": 2.0, "seq": 0.5}
    assert loss == pytest.approx(2 * metrics["stop_magnitude"] + 0.5 * metrics["rule"], rel=1e-5)


def test_the_report_shows_each_figure_beside_its_baselines(dataset: HeldOutNumbers) -> None:
    recipe, batch = Collatz(), dataset.as_batch()
    metrics = means(recipe, Fixed(batch["formula"].float(), torch.zeros(300, 129, 3)), batch)
    text = beside_baselines(summarise(recipe, metrics, {"stop": 1.0, "seq": 1.0}))
    for name in ("stop_magnitude", "stop_formula", "rule", *(f"rule_{kind}" for kind in KINDS)):
        assert f"{metrics[name]:.4f}" in text
    for name in ("mae", "mae_magnitude", "mae_cut", "mae_cut_formula"):
        assert f"{metrics[name]:.1f}" in text
    for share, expected in ((0.0, "off by"), (1.0, "where the vector is cut")):
        part = beside_baselines(summarise(recipe, {**metrics, "cut": share}, {"stop": 1.0, "seq": 1.0}))
        assert [way for way in ("off by", "where the vector is cut") if way in part] == [expected]


# ------------------------------------------------------------------------------------------------------------- anomalies


def test_numbers_far_off_are_reported_once_and_no_more_than_a_few(dataset: HeldOutNumbers) -> None:
    recipe, batch = Collatz(), dataset.as_batch()
    truth, logits = batch["steps"].float().log1p(), torch.zeros(300, 129, 3)
    recipe.measure(Fixed(truth + 2.9, logits), batch)
    assert recipe.report.warnings() == []
    off = truth.clone()
    row, ended = int(batch["scored"].nonzero()[3]), int((~batch["scored"]).nonzero()[0])
    off[[row, ended]] += torch.tensor([3.1, 9.0])
    for _ in range(2):  # a process that has run out of samples reads the first again
        recipe.measure(Fixed(off, logits), batch)
    n, steps = from_words(dataset.words)[row], batch["steps"][row].item()
    (text,) = recipe.report.warnings()
    assert f"n = {n}: {steps} steps, predicted {math.expm1(off[row].item()):.0f} " in text
    assert recipe.report.warnings() == []
    recipe.measure(Fixed(torch.full((300,), math.nan), logits), batch)
    texts = recipe.report.warnings()
    assert len(texts) == MAX_ANOMALIES + 1
    assert texts[-1] == f"and {int(batch['scored'].sum()) - MAX_ANOMALIES} more numbers"


# ---------------------------------------------------------------------------------------------------------- the whole task


def train_briefly(mode: str) -> float:
    """Train a small network on hard numbers for a moment; its cross entropy minus the rule's, on held-out hard numbers.

    The vectors are short, so that it takes no time to learn where to look.
    """
    torch.manual_seed(0)
    shown = Layout(24, 10, whole=mode == "guide")
    stream = CollatzStream(3, 10, 1.0, 0, shown)
    network = CollatzTransformer(32, 1, 4, 64, 0.0, 24, mode=mode, prefix_len=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(300):
        batch = stream.__getitems__(range(64 * step, 64 * (step + 1)))
        stopping, logits = predict_batch(network, batch)
        (stopping_loss(stopping, batch).mean() + next_token_loss(logits, batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    test = held_out_with_baselines("brief", 800, 10, 2**29, shown).as_batch()
    hard = test["kind"] > 0
    with torch.no_grad():
        nats = next_token_loss(predict_batch(network, test)[1], test).sum(1)[hard].sum()
    assert hard.sum() == 400
    return float(nats - test["rule_nats"][hard].sum()) / (400 * 23)


def test_trained_briefly_the_honest_model_knows_the_rule_and_no_more() -> None:
    assert abs(train_briefly("honest")) < 0.02


def test_trained_briefly_in_guide_mode_it_reads_the_answer() -> None:
    assert train_briefly("guide") < -0.3


# ---------------------------------------------------------------------------------------------------------------- recipe


def test_the_learning_rate_is_torchs_cosine_annealing() -> None:
    o = settings("--steps", "50")
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-6)
    for step in range(1, 52):
        assert Collatz().learning_rate(step, 50, o) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step <= 50:
            theirs.step()
    # At step 100,000 of a million.
    assert f"{Collatz().learning_rate(100_001, 1_000_000, o):.2e}" == "9.76e-05"
    warm = settings("--steps", "50", "--warmup_steps", "4")
    rates = [Collatz().learning_rate(step, 50, warm) for step in range(1, 51)]
    assert rates[:5] == pytest.approx([2.5e-5, 4.375e-5, 6.25e-5, 8.125e-5, 1e-4])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_the_console_line() -> None:
    metrics = {"train/loss": 0.36984, "train/loss_stop": 0.0003, "train/loss_seq": 0.3695}
    metrics |= {"train/learning_rate": 9.757e-5, "train/interval_seconds": 26.829, "train/grad_norm": 0.51}
    line = "Step 100000 | Loss: 0.3698 (Stop: 0.0003, Seq: 0.3695) | LR: 9.76e-05 | Time: 26.83s | Grad norm: 0.510"
    assert Collatz().report.log_line(100_000, metrics) == line


def test_defaults() -> None:
    c = settings()
    m, o = c.model, c.optimisation
    assert (m.d_model, m.num_layers, m.num_heads, m.dropout, m.max_len, m.prefix_len) == (128, 4, 4, 0.1, 500, 64)
    assert (o.batch_size, o.max_steps, o.learning_rate, o.min_lr, o.grad_clip, o.optimizer) == (
        512,
        1_000_000,
        1e-4,
        1e-6,
        1.0,
        "adamw",
    )
    assert (c.run.save_every, c.run.prefetch_factor, c.data.start, c.data.hard_fraction) == (1000, 4, 10, 0.5)
    assert 0 <= c.run.num_workers <= 20
    assert settings("--nhead", "8", "--batch", "256", "--steps", "9").model.num_heads == 8
    assert Collatz().build_model(c, None).layers[0].linear1.out_features == 512


def test_weights_that_mean_nothing_are_refused() -> None:
    for flags in (("--stopping_weight", "-1"), ("--stopping_weight", "0", "--sequence_weight", "0")):
        with pytest.raises(UserError, match="stopping_weight"):
            Collatz().loss_weights(settings(*flags))


def test_the_data_follow_the_flags() -> None:
    recipe = Collatz()
    honest = recipe.build_data(settings("--max_len", "40", "--prefix_len", "12", "--val_numbers", "20"))
    assert honest.train.__getitems__([0])["tokens"].shape == (1, 40)
    assert honest.notes == []
    leaking = recipe.build_data(settings("--mode", "guide", "--val_numbers", "20"))
    assert len(leaking.notes) == 1
    assert "leaks" in leaking.notes[0]
    assert leaking.evaluation["val"].as_batch()["scored"].all()
    seeds = [recipe.build_data(settings("--seed", seed, "--val_numbers", "20")) for seed in ("1", "2", "1")]
    assert seeds[0].fingerprint == seeds[2].fingerprint != seeds[1].fingerprint
    ramp = recipe.build_data(settings("--curriculum", "--steps", "100", "--batch", "8", "--val_numbers", "20")).train
    assert ramp.curriculum_samples == 800


def test_the_quick_presets_numbers_to_analyse_are_none_of_those_that_chose_its_best_model() -> None:
    recipe = Collatz()
    settings = config.parse(recipe.config_class, recipe.presets, ["--preset", "quick"], recipe.name).config
    data, layout = settings.data, Layout.of(settings.model)
    measured = held_out_with_baselines("val", data.val_numbers, data.start, data.val_span, layout).words
    count = min(512, data.val_span // 8192)
    analysed = held_out_with_baselines("analysis", count, data.start, data.val_span, layout, measured).words
    assert len(analysed) == count
    assert not {bytes(word) for word in measured} & {bytes(word) for word in analysed}
    without = held_out_with_baselines("analysis", count, data.start, data.val_span, layout).words
    assert {bytes(word) for word in measured} & {bytes(word) for word in without}
