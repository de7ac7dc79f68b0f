"""Files of token ids: how they are stored, what is refused of them, and what is known of them without reading."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment

from recipes.data.token_files import TokenFile

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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))


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
    assert file.check(VOCABULARY) == TokenFile.open(_as_uint16(tmp_path, ids), VOCABULARY).check(VOCABULARY)


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
    np.save(tmp_path / "swapped.npy", np.arange(5).astype(">u2"))
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
        ("swapped.npy", ValueError, "is >u2, in another byte order; save ids.astype('uint16')"),
        ("not.npy", ValueError, "is not a .npy array"),
        ("nowhere.ids", FileNotFoundError, "does not exist"),
        (".", FileNotFoundError, "is a folder"),
    ):
        for vocabulary in (VOCABULARY, 50_257):
            with pytest.raises(kind, match=re.escape(problem)) as error:
                TokenFile.open(tmp_path / name, vocabulary).check(vocabulary)
            one_line(error)
    with pytest.raises(ValueError, match="every second id is 0"):  # 64-bit ids, read as the 32 bits of a large vocabulary
        TokenFile.open(tmp_path / "wider.ids", 100_000).check(100_000)


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
    monkeypatch.setattr("recipes.data.token_files.CHUNK_IDS", 1024)
    monkeypatch.delattr(os, "sched_getaffinity")  # which not every system has
    ids = ids_file(tmp_path / "a.ids", 20_000)
    ids[place:] = VOCABULARY + np.arange(20_000 - place)
    ids.tofile(tmp_path / "a.ids")
    with pytest.raises(ValueError, match=f"id 1000 at position {place} .* vocab_size 1000") as error:
        TokenFile.open(tmp_path / "a.ids", VOCABULARY).check(VOCABULARY)
    one_line(error)
    np.save(tmp_path / "a.npy", np.array([3, 4, -1, 5] * 9))
    with pytest.raises(ValueError, match="id -1 at position 2"):
        TokenFile.open(tmp_path / "a.npy", VOCABULARY).check(VOCABULARY)


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 500)
    file = TokenFile.open(tmp_path / "a.ids", VOCABULARY)
    (tmp_path / "a.ids").open("r+b").truncate(300)
    with pytest.raises(ValueError, match="has become shorter than its 500 ids"):
        file.windows(9, np.array([3, 400]))


MEMORY = """
import sys
from pathlib import Path
from recipes.data.token_sets import Mixture, find_files
from recipes.data.token_windows import RandomWindows
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
import torch
ids = find_files(sys.argv[1], 10_000)
before = resident()
ids.check(257)
windows = RandomWindows(Mixture((ids,), (1.0,)), 256, 0)
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
