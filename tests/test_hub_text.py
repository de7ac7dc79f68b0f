"""Text of the Hugging Face hub: streamed, held out of, known again. The builders and streams are those of `datasets`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.packaged_modules.json.json import Json

from recipes.data import hub
from recipes.data.text import prepare_text
from recipes.data.text_corpus import Reading, find_corpus

MakeSet = Callable[..., Any]


def one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)


@pytest.fixture
def hub_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeSet]:
    """Makes owner/stories of the hub hold these rows, by split, at a commit; its builder, which is one of `datasets`."""

    def make(commit: str, **splits: list[dict[str, Any]]) -> Any:
        files = {split: str(tmp_path / f"{split}-{commit}.jsonl") for split in splits}
        for split, rows in splits.items():
            Path(files[split]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        builder = Json(cache_dir=str(tmp_path / "datasets"), data_files=files, hash=commit)
        hub.open_data_set.cache_clear()
        monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, configuration: builder)
        return builder

    yield make
    hub.open_data_set.cache_clear()


STORIES = [{"text": f"Row {n} of a data set."} for n in range(4000)]


def test_a_data_set_of_the_hub_is_streamed_and_a_part_held_out(tmp_path: Path, hub_of: MakeSet) -> None:
    builder = hub_of("a" * 40, train=[*STORIES, {"text": None}])
    corpus = find_corpus("owner/stories", [], Reading(), tmp_path)
    assert "owner/stories has no validation text: 5.00% of it" in corpus.notes[0]
    without: Counter[str] = Counter()
    rows = list(corpus.rows(without))
    counts = Counter(split for split, *_ in rows)
    assert 0.04 < counts["validation"] / len(STORIES) < 0.06
    assert (counts.total(), without) == (len(STORIES), {"owner/stories": 1})
    assert not list(tmp_path.rglob("*.arrow"))  # nothing is stored

    builder.download_and_prepare()  # as somebody's `load_dataset` does
    hub.open_data_set.cache_clear()
    Path(tmp_path / f"train-{'a' * 40}.jsonl").unlink()  # it is the stored one that is read now
    stored = find_corpus("owner/stories", [], Reading(), tmp_path)
    assert (stored.digest, list(stored.rows(Counter()))) == (corpus.digest, rows)

    hub_of("b" * 40, train=STORIES, validation=STORIES[:9], test=STORIES[:7])
    another = find_corpus("owner/stories", [], Reading(), tmp_path)
    assert (another.notes, another.digest == corpus.digest) == ([], False)
    assert Counter(split for split, *_ in another.rows(Counter())) == {"train": 4000, "validation": 9, "test": 7}


def test_of_a_data_set_that_is_streamed_a_known_size_is_not_counted(tmp_path: Path, hub_of: MakeSet) -> None:
    builder = hub_of("a" * 40, train=STORIES)
    builder.info.splits = datasets.splits.SplitDict.from_split_dict(
        [{"name": "train", "num_bytes": 10**9, "num_examples": 4000}]
    )
    assert "1.00% of it" in find_corpus("owner/stories", [], Reading(), tmp_path).notes[0]


def test_text_of_the_hub_that_was_tokenized_needs_no_hub(
    tmp_path: Path, hub_of: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_of("a" * 40, train=STORIES[:400])
    first = prepare_text("owner/stories", [], "train", 300, tmp_path / "cache")

    def nowhere(*_: object) -> None:
        raise ConnectionError("no network")

    hub.open_data_set.cache_clear()
    monkeypatch.setattr("datasets.load_dataset_builder", nowhere)
    again = prepare_text("owner/stories", [], "train", 300, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.notes[0] == (
        f"cannot load owner/stories from the hub (no network): it is taken to be as it was, at commit {'a' * 12}"
    )
    with pytest.raises(ValueError, match=r"owner/stories cannot be read \(cannot load .* \(no network\)\)") as error:
        prepare_text("owner/stories", [], "train", 290, tmp_path / "cache")
    one_line(error)


def test_errors_of_a_data_set_of_the_hub_name_the_place(tmp_path: Path, hub_of: MakeSet) -> None:
    hub_of("a" * 40, train=[{"text": ["a list"]}], validation=[{"text": ["a list"]}])
    with pytest.raises(ValueError, match=r"owner/stories, train, row 1: column 'text' holds .* not text") as error:
        list(find_corpus("owner/stories", [], Reading(), tmp_path).rows(Counter()))
    one_line(error)
    with pytest.raises(ValueError, match=r"the columns text: train and story \(--column\) are needed"):
        find_corpus("owner/stories", [], Reading("story"), tmp_path)
