"""Files of token ids, what is refused of them, and the windows drawn from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, environment

from recipes.data.token_windows import IGNORED, RandomWindows, TokenFile, TokenWindows, _spreading_stride, open_streams

VOCABULARY = 1000


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def ids_file(path: Path, count: int = 500, dtype: str = "uint16") -> np.ndarray:
    ids = np.random.default_rng(count).integers(1, VOCABULARY, count).astype(dtype)
    if path.suffix == ".npy":
        np.save(path, ids)
    else:
        ids.tofile(path)
    return ids


# --------------------------------------------------------------------------------------------------------------- reader


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.ids", "uint16"),
        ("a.bin", "uint16"),
        ("a.npy", "uint16"),
        ("a.npy", "int32"),
        ("a.npy", "int64"),
        ("a.npy", "uint32"),
    ],
)
def test_ids_are_read_from_every_kind_of_file(name: str, dtype: str, tmp_path: Path) -> None:
    ids = ids_file(tmp_path / name, dtype=dtype)
    file = TokenFile.open(tmp_path / name, VOCABULARY)
    assert (file.count, file.dtype) == (500, dtype)
    assert np.array_equal(file.ids(), ids)
    windows = file.windows(5, np.array([0, 17, 495]))
    assert windows.dtype == np.int32
    assert np.array_equal(windows, [ids[0:5], ids[17:22], ids[495:]])
    # The same ids have the same digest, however they are stored.
    assert file.check(VOCABULARY, 6) == TokenFile.open(_as_uint16(tmp_path, ids), VOCABULARY).check(VOCABULARY, 6)


def _as_uint16(folder: Path, ids: np.ndarray) -> Path:
    ids.astype(np.uint16).tofile(folder / "same.ids")
    return folder / "same.ids"


def test_large_vocabularies_and_the_json_beside_a_file_decide_its_type(tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", dtype="uint32")
    assert np.array_equal(TokenFile.open(tmp_path / "a.ids", 70_000).ids(), ids)
    (tmp_path / "a.ids.json").write_text(json.dumps({"dtype": "uint32", "count": 500, "vocabulary": VOCABULARY}))
    assert np.array_equal(TokenFile.open(tmp_path / "a.ids", VOCABULARY).ids(), ids)
    for sidecar, problem in (
        ({"dtype": "uint32", "count": 501}, "holds 500 ids, its .json says 501"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ([1], "no JSON object"),
    ):
        (tmp_path / "a.ids.json").write_text(json.dumps(sidecar))
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            TokenFile.open(tmp_path / "a.ids", VOCABULARY)
        one_line(error)


def test_what_is_no_file_of_ids_is_refused(tmp_path: Path) -> None:
    ids_file(tmp_path / "wide.ids", dtype="uint32")
    ids_file(tmp_path / "wider.ids", dtype="int64")
    np.array([0] * 5000 + [7] * 5000, dtype=np.int32).tofile(tmp_path / "zeros.ids")
    np.save(tmp_path / "renamed.npy", np.arange(1, 500, dtype=np.uint16))
    (tmp_path / "renamed.npy").rename(tmp_path / "renamed.ids")
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, np.arange(5))
    (tmp_path / "play.ids").write_text("To be, or not to be \u2014 that is the question:\n" * 200)
    (tmp_path / "empty.ids").write_bytes(b"")
    (tmp_path / "odd.ids").write_bytes(b"abc\xff\xfe")
    np.save(tmp_path / "floats.npy", np.ones(5))
    np.save(tmp_path / "square.npy", np.ones((5, 5), int))
    (tmp_path / "not.npy").write_bytes(b"\x80\x04K\x01.")  # a pickle
    for name, kind, problem in (
        ("wide.ids", ValueError, "every second id is 0"),
        ("wider.ids", ValueError, "every second id is 0"),
        ("zeros.ids", ValueError, "every second id is 0"),
        ("renamed.ids", ValueError, "is a .npy file under another name"),
        ("archive.npy", ValueError, "is an archive of arrays"),
        ("play.ids", ValueError, "is text, not ids; make them of it: python tools/prepare_text.py"),
        ("empty.ids", ValueError, "is empty"),
        ("odd.ids", ValueError, "has 5 bytes, no whole number of uint16 ids"),
        ("floats.npy", ValueError, "is float64 [5]"),
        ("square.npy", ValueError, "[5, 5]"),
        ("not.npy", ValueError, "is not a .npy array"),
        ("nowhere.ids", FileNotFoundError, "does not exist"),
        (".", FileNotFoundError, "is a folder"),
    ):
        for vocabulary in (VOCABULARY, 50_257):
            with pytest.raises(kind, match=re.escape(problem)) as error:
                TokenFile.open(tmp_path / name, vocabulary).check(vocabulary, 8)
            one_line(error)
    with pytest.raises(ValueError, match="every second id is 0"):  # 64-bit ids, read as the 32 bits of a large vocabulary
        TokenFile.open(tmp_path / "wider.ids", 100_000).check(100_000, 8)


@pytest.mark.parametrize(
    "content",
    [
        "12 7 999\n3 4 5\n",
        "[12, 7, 999]\n[3, 4, 5]\n",
        "[12, 7, 999,\n 3, 4, 5]\n",
        "12\n7\n999\n3\n4\n5",
        "1.2e+01 7.0e+00 999 3 4 5",
    ],
)
def test_numbers_as_text_are_refused_with_a_command_that_converts_them(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "Ann's"
    folder.mkdir()
    (folder / "text.ids").write_text(content)
    with pytest.raises(ValueError, match="numbers written as text") as error:
        TokenFile.open(folder / "text.ids", VOCABULARY)
    command = shlex.split(one_line(error).partition("convert it: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, env=environment())
    assert TokenFile.open(folder / "text.bin", VOCABULARY).ids().tolist() == [12, 7, 999, 3, 4, 5]


@pytest.mark.parametrize("place", [0, 12_345, 19_999])
def test_an_id_outside_the_vocabulary_is_named_with_its_position(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.data.token_windows.CHUNK_BYTES", 2048)
    ids = ids_file(tmp_path / "a.ids", 20_000)
    ids[place:] = VOCABULARY + np.arange(20_000 - place)
    ids.tofile(tmp_path / "a.ids")
    with pytest.raises(ValueError, match=f"id 1000 at position {place} .* vocab_size 1000") as error:
        TokenFile.open(tmp_path / "a.ids", VOCABULARY).check(VOCABULARY, 10)
    one_line(error)
    np.save(tmp_path / "a.npy", np.array([3, 4, -1, 5] * 9))
    with pytest.raises(ValueError, match="id -1 at position 2"):
        TokenFile.open(tmp_path / "a.npy", VOCABULARY).check(VOCABULARY, 10)


def test_streams_are_refused_with_the_flag_to_give(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ids")
    ids_file(Path(path), 18)
    for train, validation, length, problem in (
        (None, path, 4, "train_data_path is missing: give --train_data_path FILE.ids"),
        (path, None, 4, "val_data_path is missing: give --val_data_path FILE.ids"),
        (path, "embedded", 4, "use it for both"),
        (path, path, 17, "holds 18 ids, too few for windows of 17 inputs"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            open_streams(train, validation, None, VOCABULARY, length)
        message = one_line(error)
        assert "embedded" in message or "--context_length" in message
    assert open_streams(path, path, None, VOCABULARY, 16).train.count == 18


def test_the_fingerprint_follows_the_ids_of_both(tmp_path: Path) -> None:
    one, two = (str(tmp_path / name) for name in ("a.ids", "b.ids"))
    ids_file(Path(one), 200)
    ids_file(Path(two), 201)
    fingerprints = {open_streams(*pair, None, VOCABULARY, 8).fingerprint for pair in itertools.product((one, two), repeat=2)}
    assert len(fingerprints) == 4


def test_a_tokenizer_that_did_not_make_the_ids_is_refused(tmp_path: Path) -> None:
    from recipes.data.tokenizer import train_tokenizer

    tokenizers = [train_tokenizer(["one and two", "three"], size).to_str() for size in (259, 260)]
    path = tmp_path / "a.ids"
    ids_file(path)
    (tmp_path / "tokenizer.json").write_text(tokenizers[0])
    sidecar = {"dtype": "uint16", "tokenizer_sha256": hashlib.sha256(tokenizers[0].encode()).hexdigest()}
    (tmp_path / "a.ids.json").write_text(json.dumps(sidecar))
    assert open_streams(str(path), str(path), None, VOCABULARY, 8).tokenizer_json == tokenizers[0]
    with pytest.raises(ValueError, match=r"tokenizer\.json has 259 entries, vocab_size is 200"):
        open_streams(str(path), str(path), None, 200, 8)
    (tmp_path / "tokenizer.json").write_text(tokenizers[1])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the one that made .*a\.ids") as error:
        open_streams(str(path), str(path), None, VOCABULARY, 8)
    one_line(error)


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("count", [10, 17, 18, 25, 26, 200, 1001])
def test_windows_predict_every_id_but_the_first_exactly_once(count: int, tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", count)
    windows = TokenWindows(TokenFile.open(tmp_path / "a.ids", VOCABULARY), 8)
    assert len(windows) == -(-(count - 1) // 8)
    tokens = windows.__getitems__(range(len(windows)))["tokens"]
    assert tokens.dtype == torch.int32
    assert tokens.shape == (len(windows), 9)
    labels = tokens[:, 1:]
    assert int((labels != IGNORED).sum()) == count - 1
    contents = sorted(tuple(row[row != IGNORED].tolist()) for row in tokens)
    assert contents == sorted(tuple(ids[start : start + 9].tolist()) for start in range(0, count - 1, 8))
    again = windows.__getitems__([n + 5 * len(windows) for n in range(len(windows))])["tokens"]
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("windows", [1, 2, 13, 100, 144, 977, *random.Random(0).sample(range(1000, 16000), 25)])
def test_the_first_windows_are_spread_over_the_whole_file(windows: int, tmp_path: Path) -> None:
    np.arange(windows * 4 + 1, dtype=np.uint16).tofile(tmp_path / "a.ids")
    file = TokenFile.open(tmp_path / "a.ids", 65_536)
    for part in {1, windows // 7, windows // 2, windows} - {0}:
        some = TokenWindows(file, 4, limit=part)
        assert len(some) == part
        starts = some.__getitems__(range(part))["tokens"][:, 0].sort().values.tolist()
        assert len(set(starts)) == part
        gaps = np.diff([*starts, starts[0] + 4 * windows]) / 4
        assert gaps.max() <= max(4, 4 * windows / part), (part, gaps.max())


def test_the_default_evaluation_of_a_large_file_is_spread_evenly() -> None:
    for windows in (100_138, 2_365_000, *random.Random(1).sample(range(10**5, 10**7), 20)):
        starts = np.sort(np.arange(6400) * _spreading_stride(windows) % windows)  # 100 batches of 64
        gaps = np.diff([*starts, starts[0] + windows])
        assert gaps.max() < 4 * windows / 6400, windows
        assert gaps.min() > windows / 6400 / 8, windows


def test_random_windows_are_pure_functions_of_seed_and_number(tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", 2000)
    file = TokenFile.open(tmp_path / "a.ids", VOCABULARY)
    one, two, other = (RandomWindows(file, 16, seed) for seed in (3, 3, 4))
    assert not hasattr(one, "__len__")
    numbers = [5, 0, 10**12, 5]
    tokens = one.__getitems__(numbers)["tokens"]
    two.__getitems__(range(100))
    assert torch.equal(two.__getitems__(numbers)["tokens"], tokens)
    assert torch.equal(tokens[0], tokens[3])
    assert torch.equal(one.__getitems__([10**12])["tokens"][0], tokens[2])
    for start, row in zip(one.starts(numbers), tokens, strict=True):
        assert row.tolist() == ids[start : start + 17].tolist()
    assert not np.array_equal(one.starts(range(50)), other.starts(range(50)))


def test_every_start_is_equally_likely_and_independent_of_the_last(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 116)
    for seed in range(3):
        starts = RandomWindows(TokenFile.open(tmp_path / "a.ids", VOCABULARY), 16, seed).starts(range(100_000))
        counts = np.bincount(starts, minlength=100)
        assert len(counts) == 100  # the first and the last included
        chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
        assert 50 < chi_squared < 160, (seed, chi_squared)  # 99 degrees of freedom: far outside with p < 1e-4
        pairs = np.bincount(starts[:-1] // 10 * 10 + starts[1:] // 10, minlength=100)
        assert 50 < float(((pairs - 1000) ** 2 / 1000).sum()) < 160


def test_a_file_is_sent_to_workers_by_its_path(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 50_000)
    windows = RandomWindows(TokenFile.open(tmp_path / "a.ids", VOCABULARY), 16, 0)
    tokens = windows.__getitems__(range(9))["tokens"]
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).__getitems__(range(9))["tokens"], tokens)


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 500)
    file = TokenFile.open(tmp_path / "a.ids", VOCABULARY)
    (tmp_path / "a.ids").open("r+b").truncate(300)
    with pytest.raises(ValueError, match="has become shorter than its 500 ids"):
        file.windows(9, np.array([3, 400]))


MEMORY = """
import sys
from pathlib import Path
from recipes.data.token_windows import RandomWindows, TokenFile, TokenWindows
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
import torch
file = TokenFile.open(Path(sys.argv[1]), 10_000)
before = resident()
file.check(10_000, 257)
windows = RandomWindows(file, 256, 0)
most = 0
for start in range(0, 16_000, 64):
    windows.__getitems__(list(range(start, start + 64)))
    most = max(most, resident())
print((most - before) // 2**20)
"""


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """400 MB, most of them a hole that takes no disk. A memory map would come to hold all that it has shown."""
    with (tmp_path / "a.ids").open("wb") as file:
        np.arange(1, 5000, dtype=np.uint16).tofile(file)
        file.truncate(4 * 10**8)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.ids")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
