"""Sets of token ids: shards as one stream, mixtures, and what is refused of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_token_files import VOCABULARY, ids_file, one_line

from recipes.data.token_files import ChunkDigest, TokenFile
from recipes.data.token_sets import Mixture, TokenSet, find_files
from recipes.data.token_streams import Streams, _mixture, open_streams


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))


def opened(train: str | None, validation: str | None, vocab_size: int = VOCABULARY, length: int = 8) -> Streams:
    sources = [[(path, None)] if path else [] for path in (train, validation)]
    return open_streams(sources[0], sources[1], None, vocab_size, length)


def test_streams_are_refused_with_the_flag_to_give(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ids")
    ids_file(Path(path), 18)
    for train, validation, length, problem in (
        (None, path, 4, "train_data_path is missing: give --train_data_path FILE.ids"),
        (path, None, 4, "val_data_path is missing: give --val_data_path FILE.ids"),
        (path, "embedded", 4, "give it alone, as --train_data_path"),
        (path, path, 17, "holds 18 ids, too few for windows of 17 inputs"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            opened(train, validation, length=length)
        message = one_line(error)
        assert "embedded" in message or "--context_length" in message
    assert opened(path, path, length=16).train.count == 18


def test_the_fingerprint_follows_the_ids_of_both(tmp_path: Path) -> None:
    one, two = (str(tmp_path / name) for name in ("a.ids", "b.ids"))
    ids_file(Path(one), 200)
    ids_file(Path(two), 201)
    fingerprints = {opened(*pair).fingerprint for pair in itertools.product((one, two), repeat=2)}
    assert len(fingerprints) == 4
    mixtures = [open_streams([(one, 1.0), (two, weight)], [(one, None)], None, VOCABULARY, 8) for weight in (1.0, 2.0)]
    assert mixtures[0].fingerprint != mixtures[1].fingerprint


def test_a_tokenizer_that_did_not_make_the_ids_is_refused(tmp_path: Path) -> None:
    from recipes.data.tokenizer import train_tokenizer

    tokenizers = [train_tokenizer(["one and two", "three"], size).to_str() for size in (259, 260)]
    path = tmp_path / "a.ids"
    ids_file(path)
    (tmp_path / "tokenizer.json").write_text(tokenizers[0])
    sidecar = {"dtype": "uint16", "tokenizer_sha256": hashlib.sha256(tokenizers[0].encode()).hexdigest()}
    (tmp_path / "a.ids.json").write_text(json.dumps(sidecar))
    assert opened(str(path), str(path)).tokenizer_json == tokenizers[0]
    with pytest.raises(ValueError, match=r"tokenizer\.json has 259 entries, vocab_size is 200"):
        opened(str(path), str(path), 200)
    (tmp_path / "tokenizer.json").write_text(tokenizers[1])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the one that made .*a\.ids") as error:
        opened(str(path), str(path))
    one_line(error)


def shards(folder: Path, ids: np.ndarray, *cuts: int) -> TokenSet:
    """The same ids in several files."""
    folder.mkdir()
    for number, part in enumerate(np.split(ids, cuts)):
        part.tofile(folder / f"{number:03d}.ids")
    return find_files(str(folder), VOCABULARY)


def test_however_ids_are_cut_into_files_the_windows_are_the_same(tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", 500)
    starts = np.array([0, 90, 99, 100, 101, 103, 480, 495, 99])
    expected = find_files(str(tmp_path / "a.ids"), VOCABULARY).windows(5, starts)
    for name, cuts in (("two", (100,)), ("many", (100, 101, 102, 480)), ("few", (3, 499))):
        cut = shards(tmp_path / name, ids, *cuts)
        assert cut.count == 500
        assert np.array_equal(cut.windows(5, starts), expected)
        assert np.array_equal(cut.ids(), ids)
        assert np.array_equal(find_files(f"{tmp_path}/{name}/*.ids", VOCABULARY).windows(5, starts), expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is a folder without \.ids files") as error:
        find_files(str(tmp_path / "empty"), VOCABULARY)
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"x\.ids does not exist"):
        find_files(str(tmp_path / "x.ids"), VOCABULARY)


def test_an_id_that_came_later_is_found_in_the_batch_that_holds_it_by_name(tmp_path: Path) -> None:
    """A .json beside it says what was there when it was written."""
    ids = ids_file(tmp_path / "a.ids", 500)
    cut = shards(tmp_path / "cut", ids, 200)
    ids[200 + 77] = VOCABULARY + 5
    ids[200:].tofile(tmp_path / "cut" / "001.ids")
    assert len(cut.windows(5, np.array([0, 200]))) == 2
    for start in (273, 277, 199 + 75):
        with pytest.raises(ValueError, match=r"001\.ids: token id 1005 at position 77 is not below vocab_size 1000") as error:
            cut.windows(5, np.array([0, start]))
        one_line(error)


def test_a_set_with_known_shards_is_opened_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_file(tmp_path / "a.ids", 500)
    cut = shards(tmp_path / "cut", ids, 200)
    first = opened(str(tmp_path / "cut"), str(tmp_path / "a.ids"))
    digest = first.train.sets[0].check(9)
    monkeypatch.setattr(TokenFile, "_chunk", None)  # no id is read again
    assert opened(str(tmp_path / "cut"), str(tmp_path / "a.ids")).fingerprint == first.fingerprint
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    for file in cut.files:
        writer = ChunkDigest("uint16")
        writer.update(file.ids().tobytes())
        facts = {"dtype": "uint16", "count": file.count, **writer.facts()}
        file.path.with_name(f"{file.path.name}.json").write_text(json.dumps(facts))
    # What was written beside them is what reading them had found.
    assert opened(str(tmp_path / "cut"), str(tmp_path / "cut")).train.sets[0].check(9) == digest
    with pytest.raises(TypeError):  # nothing is known of this one any more
        opened(str(tmp_path / "a.ids"), str(tmp_path / "cut"))


def test_the_sets_of_a_mixture_have_short_names_of_their_own() -> None:
    names = (
        "data/web/train",
        "books/train.ids",
        "s3://texts/code/*.ids",
        "old/web/valid/*.ids",
        "data/Wiki-train.ids",
        "train.ids",
    )
    mixture = Mixture(tuple(TokenSet(name, (), VOCABULARY) for name in names), (1.0,) * len(names))
    assert mixture.labels == ("web", "books", "code", "web_4", "Wiki_train", "ids")


def test_labels_of_sets_are_never_alike(tmp_path: Path) -> None:
    for name in ("x.ids", "x_3.ids", "d/x.ids", "e/x.ids"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.arange(40, dtype=np.uint16).tofile(tmp_path / name)
    paths = [(str(tmp_path / name), 1.0) for name in ("x.ids", "x_3.ids", "d/x.ids", "e/x.ids")]
    assert _mixture(paths, 50, one_set=True).labels == ("x", "x_3", "x_4", "x_5")
    for weight in (0.0, -1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"x\.ids has the weight {weight:g} in its mixture; give it one above 0"):
            _mixture([paths[0], (paths[1][0], 1.0), (paths[2][0], weight)], 50, one_set=True)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_an_id_out_of_the_vocabulary_is_named_in_its_batch_whatever_the_json_says(tmp_path: Path, dtype: type) -> None:
    """An id of 2^31 is no negative number."""
    ids = np.zeros(40, dtype=dtype)
    ids[7] = wrong = 2**31 + 5 if dtype is np.uint32 else 60_000
    ids.tofile(tmp_path / "a.ids")
    known = {"digest": "0", "largest_id": 9, "dtype": ids.dtype.name, "count": 40}
    (tmp_path / "a.ids.json").write_text(json.dumps(known))
    tokens = find_files(str(tmp_path / "a.ids"), 300)
    said = rf"a\.ids: token id {wrong} at position 7 is not below vocab_size 300"
    with pytest.raises(ValueError, match=said):
        tokens.windows(4, np.array([0, 5]))
    assert tokens.windows(4, np.array([0, 20])).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("sidecar", [{"digest": "abc"}, {"digest": "abc", "largest_id": "9"}, {"dtype": 16}, {"count": None}])
def test_a_json_that_says_nonsense_is_named(tmp_path: Path, sidecar: dict[str, Any]) -> None:
    np.zeros(40, dtype=np.uint16).tofile(tmp_path / "a.ids")
    (tmp_path / "a.ids.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=r"a\.ids\.json has \w+ .*; make it again, or remove it"):
        find_files(str(tmp_path / "a.ids"), 300).check(4)


def test_a_largest_id_that_is_not_there_is_named(tmp_path: Path) -> None:
    np.zeros(40, dtype=np.uint16).tofile(tmp_path / "a.ids")
    (tmp_path / "a.ids.json").write_text(json.dumps({"digest": "0", "largest_id": 9999}))
    with pytest.raises(ValueError, match="says largest_id 9999, which is not there; make it again"):
        find_files(str(tmp_path / "a.ids"), 300).check(4)


def test_several_paths_without_weights_are_one_set(tmp_path: Path) -> None:
    """As a shell makes several of a pattern that is not quoted."""
    ids = ids_file(tmp_path / "a.ids", 500)
    paths = [(str(file.path), None) for file in shards(tmp_path / "cut", ids, 100, 130).files]
    (whole,) = _mixture(paths, VOCABULARY, one_set=True).sets
    assert np.array_equal(whole.ids(), ids)
    assert len(_mixture(paths, VOCABULARY, one_set=False).sets) == 3  # of validation each is measured
    weighted = open_streams([(paths[0][0], 3.0), paths[1]], [(str(tmp_path / "a.ids"), None)], None, VOCABULARY, 8)
    assert weighted.train.shares == (0.75, 0.25)
    assert "Samples are drawn from 000 75.00%, 001 25.00%" in weighted.notes


def test_a_pattern_does_not_match_what_is_known_of_a_file(tmp_path: Path) -> None:
    files = shards(tmp_path / "cut", ids_file(tmp_path / "a.ids", 500), 100).files
    for file in files:
        file.path.with_name(f"{file.path.name}.json").write_text(json.dumps({"dtype": "uint16", "count": file.count}))
    assert [file.path for file in find_files(f"{tmp_path}/cut/*", VOCABULARY).files] == [file.path for file in files]


def test_validation_ids_that_are_training_ids_are_said(tmp_path: Path) -> None:
    one, copy = str(tmp_path / "a.ids"), str(tmp_path / "b.ids")
    ids_file(Path(one), 200)
    for path in (one, copy):
        Path(copy).write_bytes(Path(one).read_bytes())
        assert opened(one, path).notes[-1] == f"{path} holds the ids of {one}: the validation loss is that of training text"
    ids_file(Path(copy), 201)
    assert not any("training text" in note for note in opened(one, copy).notes)


def test_a_tokenizer_one_folder_up_is_taken_if_it_made_the_ids(tmp_path: Path) -> None:
    from recipes.data.tokenizer import train_tokenizer

    made_by = train_tokenizer(["one and two", "three"], 260).to_str()
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "0.ids"
    ids_file(path)
    (tmp_path / "tokenizer.json").write_text(made_by)
    assert opened(str(path), str(path)).tokenizer_json is None  # it may be anybody's
    path.with_name("0.ids.json").write_text(json.dumps({"tokenizer_sha256": hashlib.sha256(made_by.encode()).hexdigest()}))
    assert opened(str(path), str(path)).tokenizer_json == made_by
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["four"], 257).to_str())
    assert opened(str(path), str(path)).tokenizer_json is None


def test_text_is_made_into_ids_as_prepare_text_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.data.text import Text
    from recipes.data.tokenizer import END_OF_TEXT

    stories = [f"Story {n}.\n\nIt ends here.\n" for n in range(3000)]
    (tmp_path / "s-train.txt").write_text(END_OF_TEXT.join(stories))
    (tmp_path / "s-valid.txt").write_text("One more.\nOf two lines.\n")

    def texts(streams: Streams) -> list[str]:
        assert streams.tokenizer_json is not None
        tokenizer = Text.without_data(streams.tokenizer_json).tokenizer()
        both = (streams.train.whole.ids().tolist(), streams.validation.whole.ids().tolist())
        return [tokenizer.decode(ids, skip_special_tokens=False) for ids in both]

    expected = ["".join(story + END_OF_TEXT for story in stories), f"One more.\nOf two lines.\n{END_OF_TEXT}"]
    train, validation = (str(tmp_path / f"s-{name}.txt") for name in ("train", "valid"))
    for both in ((train, validation), (f"{tmp_path}/s-*.txt", None)):
        assert texts(opened(*both)) == expected
    (tmp_path / "s-test.txt").write_text("It is not read.\n")
    notes = opened(f"{tmp_path}/s-*.txt", None).notes
    assert f"{tmp_path}/s-*.txt: train is s-train.txt; validation is s-valid.txt; test is s-test.txt" in notes
    assert "left out 1 whose names tell no split, or another: s-test.txt" in notes[-1]
    held_out = opened(train, None)
    assert "5.00% of it, spread over it, is held out" in held_out.notes[-1]
    assert sum(text.count("Story") for text in texts(held_out)) == pytest.approx(3000, abs=5)  # a piece may begin in a story
    monkeypatch.setattr("recipes.data.text._write_ids", None)  # they are kept
    assert opened(train, validation).fingerprint == opened(f"{tmp_path}/s-*.txt", None).fingerprint
    ids_file(tmp_path / "a.ids", 200)
    (tmp_path / "numbers.txt").write_text("1 2 3 " * 100)
    for sources, problem in (
        ([(train, None), (str(tmp_path / "a.ids"), None)], r"s-train\.txt is text and .*a\.ids is not"),
        ([(train, 2.0)], r"s-train\.txt is text with a weight"),
        ([(str(tmp_path / "numbers.txt"), None)], "val_data_path is missing"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            open_streams(sources, [], None, VOCABULARY, 8)
        one_line(error)
    with pytest.raises(ValueError, match=r"owner/stories has its own validation text; leave out val_data_path"):
        opened("owner/stories", validation)
    with pytest.raises(ValueError, match=r"numbers\.txt holds numbers written as text; convert it"):
        opened(str(tmp_path / "numbers.txt"), str(tmp_path / "a.ids"))
