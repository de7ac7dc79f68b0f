"""Mixtures of sets of ids, as the recipes train on them: what is drawn, measured and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import planned
from tiny_runs import gpt2_mixture
from tokenizers import Tokenizer

from recipes.data.token_samples import IGNORED
from recipes.gpt2_wikitext import Gpt2Wikitext
from trainer.recipe import Data

STEPS = ["--max_steps", "100", "--batch_size", "4"]


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of GPT-2 on two folders of ids."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    return [*gpt2_mixture(tmp_path), *STEPS]


def built(argv: list[str], *more: str) -> tuple[Gpt2Wikitext, Data]:
    recipe = Gpt2Wikitext()
    return recipe, recipe.build_data(planned(recipe, [*argv, *more]))


def test_gpt2_draws_blocks_of_each_set_by_the_number_of_the_sample(argv: list[str], tmp_path: Path) -> None:
    recipe, data = built(argv, "--no_document_mask")
    ids = [np.fromfile(tmp_path / name / "train.ids", np.uint16) for name in ("web", "books")]
    batch = data.train.__getitems__(range(400))
    sets, starts = data.train.places(range(400))
    for row, (number, start) in enumerate(zip(sets, starts, strict=True)):
        assert batch["input_ids"][row].tolist() == ids[number][start : start + 12].tolist()
        assert batch["labels"][row].tolist() == ids[number][start + 1 : start + 13].tolist()
    assert batch["input_ids"].dtype == torch.int64
    assert recipe.report.step_metrics(100) == pytest.approx({"share/web": 1 - sets.mean(), "share/books": sets.mean()})
    assert 0.2 < sets.mean() < 0.3
    assert "Samples are drawn from web 75.00%, books 25.00%" in data.notes
    assert data.train.__getitems__([399])["input_ids"].tolist() == batch["input_ids"][399:].tolist()


def test_a_mixture_of_gpt2_keeps_to_documents(argv: list[str]) -> None:
    _, data = built(argv)
    batch = data.train.__getitems__(range(100))
    ends = batch["input_ids"] == 0
    assert ends.any()
    assert (batch["labels"][ends] == IGNORED).all()
    assert (batch["positions"][:, 1:][ends[:, :-1]] == 0).all()


def test_each_set_of_gpt2_is_measured_and_its_weight_is_known_again(argv: list[str], tmp_path: Path) -> None:
    _, data = built(argv)
    counts = {name: len(np.fromfile(tmp_path / name / "valid.ids", np.uint16)) for name in ("web", "books")}
    predicted = {name: int(part.split.ids.count) for name, part in data.evaluation.items()}
    assert predicted == {"val": sum(counts.values()), "val_web": counts["web"], "val_books": counts["books"]}
    other = built(argv, "--data_dir", f"{tmp_path}/web=2", f"{tmp_path}/books=1")[1]
    assert other.fingerprint != data.fingerprint == built(argv)[1].fingerprint


def test_folders_of_ids_without_weights_are_one_set(argv: list[str], tmp_path: Path) -> None:
    folders = [f"{tmp_path}/web", f"{tmp_path}/books"]
    for packing in ("blocks", "rows"):
        _, data = built(argv, "--no_document_mask", "--packing", packing, "--data_dir", *folders)
        assert data.evaluation.keys() == {"val"}
        split = data.train.split
        ids = np.concatenate([np.fromfile(f"{folder}/train.ids", np.uint16) for folder in folders])
        assert np.asarray(split.ids).tolist() == ids.tolist()
        if packing == "rows":
            assert split.row_ends.tolist() == (np.flatnonzero(ids == 0) + 1).tolist()


def test_what_is_no_mixture_is_refused_by_name(argv: list[str], tmp_path: Path) -> None:
    web = f"{tmp_path}/web"
    with pytest.raises(ValueError, match="packing rows visits every row once an epoch"):
        built(argv, "--packing", "rows", "--no_document_mask")
    cases: list[tuple[list[Any], str]] = [
        ([f"{tmp_path}/text=2", f"{tmp_path}/text=1"], "text is text with a weight; make ids of each part"),
        ([f"{web}=2", f"{tmp_path}/text=1"], "text has no .ids files, and what is beside it"),
        ([f"{web}=2", "s3://texts/web=1"], "s3://texts/web is a URL, and data_dir takes what is here"),
        ([f"{web}=2", f"{tmp_path}/books=0"], "books has the weight 0 in its mixture"),
    ]
    for paths, problem in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=problem) as error:
            built(argv, "--data_dir", *paths)
        assert "\n" not in str(error.value)
    other = Tokenizer.from_file(f"{web}/tokenizer.json")
    other.add_tokens(["another"])
    other.save(str(tmp_path / "books/tokenizer.json"))
    with pytest.raises(ValueError, match=r"books is of another tokenizer than .*web; make the ids of both with one"):
        built(argv)
