"""The loss of every recipe against one written out here, sample by sample, from what the sample is: text, ids, numbers, images.

The reference knows plain PyTorch and the network alone, never a recipe's batch, labels or counts: a label that is shifted
twice, or not at all, padding that counts, or a bin that is off by one, all show.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import planned, recipe_of
from tiny_runs import TINY
from torch import Tensor

from recipes.data.tokenizer import END_OF_TEXT
from trainer.checkpoints.network import build_network
from trainer.evaluation.objective import objective_weights


def tiny(name: str, folder: Path, *flags: str) -> SimpleNamespace:
    """A recipe's tiny run: recipe, config, data, and a network whose predictions differ a lot from place to place."""
    where, argv = TINY[name]
    recipe = recipe_of(where)
    settings = planned(recipe, [*argv(folder), *flags])
    data = recipe.build_data(settings)
    network = build_network(recipe, settings, data).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return SimpleNamespace(recipe=recipe, config=settings, data=data, network=network)


def nats(logits: Tensor, targets: list[int]) -> float:
    """Summed cross entropy: logits [n, classes], n targets."""
    assert len(logits) == len(targets)
    return -sum(float(row.double().log_softmax(0)[target]) for row, target in zip(logits, targets, strict=True))


def check(run: SimpleNamespace, batch: dict[str, Tensor], expected: dict[str, tuple[float, int]]) -> None:
    """The recipe's sums and counts on `batch` are {term: (sum, count)}, in training and in evaluation."""
    with torch.no_grad():
        sums, measured = run.recipe.loss(run.network, batch), run.recipe.measure(run.network, batch)
    assert run.recipe.items(batch) == {term: count for term, (_, count) in expected.items()}
    for term, (total, count) in expected.items():
        assert float(sums[term]) == pytest.approx(total, rel=1e-5), term
        own = measured[term]
        measured_total, measured_count = own if isinstance(own, tuple) else (own, count)
        assert float(measured_total) == pytest.approx(total, rel=1e-5), term
        assert float(measured_count) == count


# ------------------------------------------------------------------------------------------------------- language models


def predicted(logits_of: Any, ids: list[int]) -> float:
    """Nats of each id but the first, given those before it, by a network that sees this one row."""
    return nats(logits_of(torch.tensor([ids[:-1]]))[0], ids[1:])


def documents(ids: list[int], end_of_text: int) -> list[list[int]]:
    """Ids cut behind each end of text."""
    ends = [place + 1 for place, token in enumerate(ids) if token == end_of_text and place + 1 < len(ids)]
    return [ids[start:end] for start, end in zip([0, *ends], [*ends, len(ids)], strict=True)]


@pytest.mark.parametrize("position_flag", ["--rope", "--no_rope"])
@torch.no_grad()
def test_tinystories_by_document(position_flag: str, tmp_path: Path) -> None:
    """As if each document, or what a window has of it, were a row of its own."""
    from tokenizers import Tokenizer, models

    tiny("tinystories", tmp_path)
    with pytest.raises(ValueError, match="document_mask needs the id of"):
        tiny("tinystories", tmp_path, "--document_mask")
    Tokenizer(models.WordLevel({"word": 0, END_OF_TEXT: 4}, "word")).save(str(tmp_path / "ids" / "tokenizer.json"))
    run = tiny("tinystories", tmp_path, "--document_mask", position_flag)
    length, numbers = run.config.model.context_length, range(40)
    for name, dataset in {"train": run.data.train, "val": run.data.evaluation["val"]}.items():
        batch = dataset.__getitems__(numbers)
        windows = [[token for token in window if token >= 0] for window in batch["tokens"].tolist()]
        parts = [part for window in windows for part in documents(window, 4) if len(part) > 1]
        assert len(parts) > len(windows) + 5
        assert any(len(window) < length + 1 for window in windows) == (name == "val")
        total = sum(predicted(run.network, part) for part in parts)
        check(run, batch, {"next_token": (total, sum(len(part) - 1 for part in parts))})


@torch.no_grad()
def test_tinystories(tmp_path: Path) -> None:
    run = tiny("tinystories", tmp_path)
    length = run.config.model.context_length
    rows = [[5, 9, 1, 1, 59, 0], [7, 3, 2], [40, 41]]
    tokens = torch.full((3, length + 1), -100, dtype=torch.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    total = sum(predicted(run.network, ids) for ids in rows)
    check(run, {"tokens": tokens}, {"next_token": (total, 5 + 2 + 1)})

    ids = np.fromfile(run.config.data.val_data_path[0], np.uint16).astype(int).tolist()
    windows = [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
    everything = run.data.evaluation["val"].__getitems__(range(len(windows)))
    assert len(windows[-1]) < length + 1
    check(run, everything, {"next_token": (sum(predicted(run.network, w) for w in windows), len(ids) - 1)})

    ids = np.fromfile(run.config.data.train_data_path[0], np.uint16).astype(int).tolist()
    batch = run.data.train.__getitems__([3, 1000])
    starts = run.data.train.places([3, 1000])[1].tolist()
    total = sum(predicted(run.network, ids[start : start + length + 1]) for start in starts)
    check(run, batch, {"next_token": (total, 2 * length)})


@pytest.mark.parametrize("packing", ["rows", "blocks", "blocks by document"])
@torch.no_grad()
def test_gpt2(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own model and attention, one row or block at a time; and by transformers' own loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    by_document = ["--document_mask"] if packing == "blocks by document" else []
    run = tiny("gpt2", tmp_path, "--packing", packing.split()[0], *by_document)
    length, text = run.config.model.max_length, run.data.extra["text"]
    sizes = json.loads(run.network.config.to_json_string())
    plain = GPT2LMHeadModel(GPT2Config(**{**sizes, "attn_implementation": "eager", "activation_function": "gelu_new"})).eval()
    plain.load_state_dict(run.network.state_dict())

    lines = (tmp_path / "text" / "train.txt").read_text().splitlines()
    encoder = text.tokenizer()
    rows = [[*encoder.encode(line, add_special_tokens=False).ids, text.end_of_text] for line in lines]
    stream = [token for row in rows for token in row]
    blocks = [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]
    samples = [row[: length + 1] for row in rows] if packing == "rows" else blocks
    assert len(samples) == len(run.data.train)
    chosen = [0, 1, 2, 7, len(samples) - 1]
    assert len({len(samples[i]) for i in chosen}) > 1  # some of them are padded

    rows_alone = [documents(samples[i], text.end_of_text) if by_document else [samples[i]] for i in chosen]
    seen_alone = [ids for rows in rows_alone for ids in rows if len(ids) > 1]
    assert (len(seen_alone) > 2 * len(chosen)) == bool(by_document)
    total = sum(predicted(lambda ids: plain(input_ids=ids).logits, ids) for ids in seen_alone)
    count = sum(len(ids) - 1 for ids in seen_alone)
    check(run, run.data.train.__getitems__(chosen), {"next_token": (total, count)})
    ids = torch.tensor([samples[0][:length]])
    theirs = float(plain(input_ids=ids, labels=ids).loss)  # a mean, and it shifts inside
    alone = run.recipe.loss(run.network, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    assert float(alone["next_token"]) == pytest.approx(theirs * (ids.shape[1] - 1), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- the others


@torch.no_grad()
def test_pfn(tmp_path: Path) -> None:
    """16 bins on [-2, 2], the outer ones taking all beyond; what stands at a query's own y, or after it, is not looked at."""
    run = tiny("pfn", tmp_path, "--y_range", "2")
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(3, 7, 3, generator=generator), 1.5 * torch.randn(3, 7, generator=generator)
    y[0, :6] = torch.tensor([-2.0, -1.76, -1.74, 1.99, 2.0, 0.0])
    y[1, :3] = torch.tensor([-50.0, 50.0, 0.249])
    total = 0.0
    for sequence in range(3):
        for query in range(7):
            unknown = y[sequence, : query + 1].clone()
            unknown[query] = 99.0
            logits = run.network(x[sequence : sequence + 1, : query + 1], unknown[None])[0, query:]
            place = min(15, max(0, math.floor((float(y[sequence, query]) + 2) / 0.25)))
            total += nats(logits, [place])
    check(run, {"x": x, "y": y[:, None], "mean": y[:, None]}, {"model_1": (total, 21)})


@torch.no_grad()
def test_vit(tmp_path: Path) -> None:
    run = tiny("vit", tmp_path, "--mixup", "0", "--label_smoothing", "0.1")
    classes = 20
    batch = run.data.train.__getitems__([0, 3, 61, 119])
    labels = batch["labels"].tolist()
    logs = [row.double().log_softmax(0) for row in run.network(batch["images"])]
    smoothed = sum(-0.9 * float(row[label]) - 0.1 * float(row.mean()) for row, label in zip(logs, labels, strict=True))
    right = sum(int(row.argmax()) == label for row, label in zip(logs, labels, strict=True))
    sums = run.recipe.loss(run.network, batch)
    assert float(sums["class"]) == pytest.approx(smoothed, rel=1e-5)
    assert float(sums["accuracy"]) == right
    assert run.recipe.items(batch) == {"class": 4, "accuracy": 4}
    assert objective_weights(run.recipe, run.config, sums) == {"class": 1.0, "accuracy": 0.0}

    # Mixed by hand: 0.7 of the label, 0.3 of the class after it, then smoothed.
    mixed = torch.full((4, classes), 0.1 / classes)
    total = 0.0
    for target, row, label in zip(mixed, logs, labels, strict=True):
        other = (label + 1) % classes
        target[label] += 0.9 * 0.7
        target[other] += 0.9 * 0.3
        total -= 0.63 * float(row[label]) + 0.27 * float(row[other]) + 0.1 * float(row.mean())
    assert float(run.recipe.loss(run.network, {**batch, "targets": mixed})["class"]) == pytest.approx(total, rel=1e-5)

    plain = run.data.evaluation["val"].__getitems__(range(9))
    assert "targets" not in plain
    logits, labels = run.network(plain["images"]), plain["labels"].tolist()
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    measured = run.recipe.measure(run.network, plain)
    assert float(measured["class"][0]) == pytest.approx(nats(logits, labels), rel=1e-5)
    assert float(measured["accuracy"][0]) == ranks.count(0)
    assert float(measured["top5"][0]) == sum(rank < 5 for rank in ranks)
    assert {count for _, count in measured.values()} == {9}


def parities(n: int) -> list[int]:
    """Of each number before each step, until 1 is reached."""
    bits = []
    while n != 1:
        bits.append(n % 2)
        n = 3 * n + 1 if n % 2 else n // 2
    return bits


@torch.no_grad()
def test_collatz(tmp_path: Path) -> None:
    """27 takes 111 steps, more than are shown; 7 and 9 end within what is shown, 8 within what its time is predicted from.

    17 ends exactly there.
    """
    run = tiny("collatz", tmp_path)
    shown, prefix = run.config.model.max_len, run.config.model.prefix_len
    numbers = [27, 7, 8, 17, 9]
    vectors = [parities(n) for n in numbers]
    assert [len(vector) > prefix for vector in vectors] == [True, True, False, False, True]
    assert len(vectors[0]) > shown
    assert len(vectors[3]) == prefix
    batch = {
        "tokens": torch.full((len(numbers), shown), 2, dtype=torch.uint8),
        "steps": torch.tensor([len(vector) for vector in vectors]),
        "scored": torch.tensor([len(vector) > prefix for vector in vectors]),
    }
    stop, seq, count = 0.0, 0.0, 0
    for row, vector in zip(batch["tokens"], vectors, strict=True):
        seen = vector[:shown]
        row[: len(seen)] = torch.tensor(seen, dtype=torch.uint8)
        alone = torch.tensor([seen[: shown - 1]], dtype=torch.uint8)
        log_steps, logits = run.network(alone, torch.zeros_like(alone, dtype=torch.bool))
        seq, count = seq + nats(logits[0, : len(seen) - 1], seen[1:]), count + len(seen) - 1
        if len(vector) > prefix:
            error = abs(float(log_steps) - math.log(len(vector) + 1))
            stop += error**2 / 2 if error < 1 else error - 0.5
    with torch.no_grad():
        sums = run.recipe.loss(run.network, batch)
    assert float(sums["stop"]) == pytest.approx(stop, rel=1e-5)
    assert float(sums["seq"]) == pytest.approx(seq, rel=1e-5)
    assert run.recipe.items(batch) == {"stop": 3, "seq": count}
    assert count == 59 + 15 + 2 + 11 + 18

    from recipes.data.trajectories import to_words  # the samples of a run hold the same

    drawn = run.data.train.layout.batch(to_words(numbers), np.zeros(len(numbers), np.uint8))
    assert all(drawn[name].equal(tensor) for name, tensor in batch.items())


@torch.no_grad()
def test_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example by itself: nats of what it says given all before it, and nothing for what it is given."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    run = tiny("finetune", tmp_path)
    split = run.data.train.split
    total, count = 0.0, 0
    for example in range(len(split.row_ends)):
        given, said = run.data.train.text_of(example)
        ids = [*given, *said][: run.config.model.max_length + 1]
        logits = run.network(input_ids=torch.tensor([ids[:-1]])).logits[0]
        total, count = total + nats(logits[len(given) - 1 :], ids[len(given) :]), count + len(ids) - len(given)
    check(run, run.data.train.__getitems__(range(len(run.data.train))), {"next_token": (total, count)})
