"""Sets of token ids: shards as one stream, mixtures, and what is refused of them."""

from __future__ import annotations

import hashlib
import itertools
import json
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
    with pytest.raises(ValueError, match=r"x\.ids has the weight 0 in its mixture; give it one above 0"):
        _mixture([paths[0], (paths[1][0], 1.0), (paths[2][0], 0.0)], 50, one_set=True)


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
