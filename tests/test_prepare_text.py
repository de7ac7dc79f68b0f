"""tools/prepare_text.py: the same ids on any number of workers, in bounded memory, whole or not at all."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import prepare_text
import pytest
from launching import ROOT, Started, environment
from prepared_files import Output
from tokenizers import Tokenizer

from recipes.data.text_of_ids import text_of_ids
from recipes.data.text_sources import find_sources
from recipes.data.token_sets import find_files
from recipes.data.token_streams import open_streams
from recipes.data.tokenizer import END_OF_TEXT
from recipes.data.unfinished_shards import PROGRESS

TOOL = ROOT / "tools" / "prepare_text.py"
STORY = "Once upon a time {} walked quietly between the lighthouses. It was {}!\n\nThe end, she said.\n"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def run(*arguments: object, expect: int = 0) -> str:
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == expect, done.stderr[-2000:]
    if expect:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr if expect else done.stdout


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24,000 stories of 90 bytes, a quarter of them with an accent."""
    rng = random.Random(0)
    names, moods = ["Lily", "Tom", "Zoé", "a little red fox"], ["sunny", "raining", "getting late", "1999"]
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text(END_OF_TEXT.join(STORY.format(rng.choice(names), rng.choice(moods)) for _ in range(24_000)))
    return path


@pytest.fixture(scope="module")
def prepared(stories: Path) -> Path:
    """What one worker makes of them."""
    output = run(stories, "--out", stories.parent / "one", "--vocab_size", 320, "--workers", 1)
    assert "train.ids" in output
    assert "--vocab_size 320" in output
    return stories.parent / "one"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_ids_are_the_text_again_with_every_document_ended(stories: Path, prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    documents = {}
    for name in ("train", "valid"):
        ids = np.fromfile(prepared / f"{name}.ids", np.uint16)
        sidecar = json.loads((prepared / f"{name}.ids.json").read_text())
        assert (sidecar["dtype"], sidecar["vocabulary"], sidecar["count"]) == ("uint16", 320, len(ids))
        assert (sidecar["largest_id"], sidecar["documents"]) == (ids.max(), np.count_nonzero(ids == end))
        assert ids[-1] == end
        pieces = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
        documents[name] = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
        expected = tokenizer.encode(END_OF_TEXT.join(documents[name]), add_special_tokens=False).ids
        assert ids[:-1].tolist() == expected  # what the library makes of the whole text at once
    texts = stories.read_text().split(END_OF_TEXT)
    assert sorted(documents["train"] + documents["valid"]) == sorted(texts)
    assert 0.009 < len(documents["valid"]) / len(texts) < 0.011
    streams = open_streams([(str(prepared / "train.ids"), 1.0)], [(str(prepared / "valid.ids"), 1.0)], None, 320, 64)
    assert streams.tokenizer_json == (prepared / "tokenizer.json").read_text()
    for vocab_size, said in ((320, False), (384, False), (10_000, True)):  # as they are, padded, and the default
        sets = [[(str(prepared / f"{name}.ids"), None)] for name in ("train", "valid")]
        notes = open_streams(*sets, None, vocab_size, 64).notes
        note = f"vocab_size {vocab_size}: the tokenizer has 320 entries alone; --vocab_size 320 would do"
        assert (note in notes) == said


def test_two_workers_give_the_same_files(stories: Path, prepared: Path) -> None:
    run(stories, "--out", stories.parent / "two", "--vocab_size", 320, "--workers", 2)
    assert contents(stories.parent / "two") == contents(prepared)


def test_validation_text_of_its_own_and_other_kinds_of_input(stories: Path, prepared: Path, tmp_path: Path) -> None:
    texts = stories.read_text().split(END_OF_TEXT)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"story": text}) for text in texts[:500]))
    (tmp_path / "v1.txt").write_text(END_OF_TEXT.join(texts[500:510]))
    (tmp_path / "v2.txt").write_text("A long text. " * 10_000)
    flags = ["--column", "story", "--tokenizer", prepared / "tokenizer.json", "--workers", 1]
    run(tmp_path / "train.jsonl", "--valid", f"{tmp_path}/v*.txt", "--out", tmp_path / "out", *flags)
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    for name, documents in (("train", texts[:500]), ("valid", [*texts[500:510], "A long text. " * 10_000])):
        expected = tokenizer.encode(END_OF_TEXT.join([*documents, ""]), add_special_tokens=False).ids
        assert np.fromfile(tmp_path / "out" / f"{name}.ids", np.uint16).tolist() == expected


def test_a_single_document_gives_a_validation_part_too(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("To be, or not to be, that is the question:\n" * 4000)
    run(tmp_path / "play.txt", "--out", tmp_path / "out", "--vocab_size", 280, "--valid_percent", 10, "--workers", 1)
    counts = [(tmp_path / "out" / f"{name}.ids").stat().st_size for name in ("train", "valid")]
    assert 0.05 < counts[1] / sum(counts) < 0.2


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "ABCDEFGHIJKLMNOP" for c in range(170)]
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join([" ".join(words)] * 2))
    output = run(tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab_size", 280, "--workers", 1)
    assert "uint16" in output
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"unused {n}": n for n in range(280, 65_600)}
    (tmp_path / "wide.json").write_text(json.dumps(tokenizer))
    output = run(tmp_path / "a.txt", "--out", tmp_path / "wide", "--tokenizer", tmp_path / "wide.json", "--workers", 1)
    assert "uint32" in output
    narrow, wide = (np.fromfile(tmp_path / name / "train.ids", kind) for name, kind in (("out", "u2"), ("wide", "u4")))
    assert narrow.tolist() == wide.tolist()
    assert find_files(str(tmp_path / "wide" / "train.ids"), 65_600).files[0].dtype == "uint32"


def test_refusals_are_one_line_and_leave_nothing(stories: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "tiny.txt").write_text("a")
    out = tmp_path / "out"
    for arguments, problem in (
        ([tmp_path / "missing.txt", "--out", out], "does not exist"),
        ([tmp_path / "latin.txt", "--out", out], "latin.txt is not UTF-8"),
        ([tmp_path / "tiny.txt", "--out", out, "--vocab_size", 300], "there is no text for valid"),
        ([stories, "--out", out, "--vocab_size", 200], "vocab_size 200 is too small"),
        ([stories, "--out", out, "--tokenizer", tmp_path / "none.json"], "does not exist"),
        ([stories, "--out", out, "--workers", 0], "workers > 0"),
        ([stories, "--out", prepared], "is there already"),
        ([stories, "--valid", os.path.relpath(stories, ROOT), "--out", out], "is both training and validation text"),
    ):
        text = run(*arguments, expect=2)
        assert problem in text
        assert "cannot write" not in text
    assert list(out.iterdir()) == []
    assert set(contents(prepared)) == {"tokenizer.json", "train.ids", "train.ids.json", "valid.ids", "valid.ids.json"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ended_in_mid_work_it_leaves_no_half_file_and_starts_again(
    number: signal.Signals, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    text = stories.read_text() + END_OF_TEXT
    (tmp_path / "long.txt").write_text(text * 12)
    out, flags = tmp_path / "out", ["--tokenizer", prepared / "tokenizer.json", "--workers", 2]
    started = command(tmp_path / "long.txt", "--out", out, *flags)
    process = Started(started, tmp_path / "log.txt", environment(PYTHONPATH=str(ROOT)))
    unfinished = out / ".train.ids.unfinished"
    try:
        wait_until(lambda: unfinished.is_file() and unfinished.stat().st_size > 0)
        os.kill(process.pid, signal.SIGSTOP)  # so that it cannot finish meanwhile
        assert "another prepare_text writes" in run(stories, "--out", out, *flags, expect=2)
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(timeout=100) == (-number if number == signal.SIGKILL else 130)
        assert process.orphans(10) == []
    finally:
        process.kill_all()
    assert not (out / "train.ids").exists()
    assert not (out / "valid.ids").exists()
    if number != signal.SIGKILL:
        assert list(out.iterdir()) == []
    run(stories, "--out", out, *flags)
    assert contents(out) == contents(prepared)


def test_shards_hold_the_same_ids_and_an_interrupted_call_goes_on(stories: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text((stories.read_text() + END_OF_TEXT) * 4)
    flags = ["--tokenizer", prepared / "tokenizer.json", "--workers", 1]
    run(tmp_path / "long.txt", "--out", tmp_path / "one", *flags)
    out, sharded = tmp_path / "out", [*flags, "--shard_mb", 1]
    started = command(tmp_path / "long.txt", "--out", out, *sharded)
    process = Started(started, tmp_path / "log.txt", environment(PYTHONPATH=str(ROOT)))
    try:
        wait_until(lambda: (out / "train" / "00001.ids").exists())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=100)
    finally:
        process.kill_all()
    there = [path.name for path in sorted((out / "train").glob("*.ids"))]
    assert "00001.ids" in there
    assert "holds a part of other text or settings" in run(stories, "--out", out, *sharded, expect=2)
    times = (out / "train" / "00000.ids").stat().st_mtime_ns
    assert "going on behind" in run(tmp_path / "long.txt", "--out", out, *sharded)
    assert (out / "train" / "00000.ids").stat().st_mtime_ns == times
    assert len(list((out / "train").glob("*.ids"))) > len(there)
    for name in ("train", "valid"):
        whole = find_files(str(tmp_path / "one" / f"{name}.ids"), 320)
        shards = find_files(str(out / name), 320)
        assert np.array_equal(shards.ids(), whole.ids())
    assert "train is there already" in run(tmp_path / "long.txt", "--out", out, *sharded, expect=2)


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The tool in this process, with a twentieth of its usual tasks."""
    monkeypatch.setattr(prepare_text, "TASK_CHARACTERS", 50_000)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *arguments: prepare_text.main([*map(str, arguments), "--workers", "1"])


def relative_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_of_an_earlier_preparation_is_left_beside_a_new_one(
    prepare: Callable[..., None], stories: Path, prepared: Path, tmp_path: Path
) -> None:
    flags = ["--tokenizer", prepared / "tokenizer.json"]
    short, out = tmp_path / "short.txt", tmp_path / "out"
    short.write_text(stories.read_text()[:150_000])
    for name, sharded in (("few", ["--shard_mb", 0.05]), ("one", [])):
        prepare(short, "--out", tmp_path / name, *flags, *sharded)
    prepare(stories, "--out", out, *flags, "--shard_mb", 0.05)
    assert len(list((out / "train").glob("*.ids"))) > 20
    (out / "train" / "mine.txt").write_text("is no shard")
    for name, sharded in (("few", ["--shard_mb", 0.05]), ("one", []), ("few", ["--shard_mb", 0.05])):
        prepare(short, "--out", out, *flags, *sharded, "--overwrite")
        assert relative_files(out) == relative_files(tmp_path / name) | {"train/mine.txt": b"is no shard"}


def test_ended_between_its_two_files_it_leaves_no_old_one_beside_a_new_one(
    prepare: Callable[..., None], stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text(stories.read_text()[:150_000])
    flags = ["--out", tmp_path / "out", "--tokenizer", prepared / "tokenizer.json"]
    prepare(stories, *flags)
    commit = Output.commit

    def interrupted(file: Output) -> None:
        if file.path.name == "train.ids":
            raise KeyboardInterrupt
        commit(file)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", interrupted)
        with pytest.raises(SystemExit):
            prepare(tmp_path / "short.txt", *flags, "--overwrite")
    assert contents(tmp_path / "out").keys() == {"tokenizer.json", "valid.ids", "valid.ids.json"}
    prepare(tmp_path / "short.txt", *flags)


def test_killed_while_it_removes_old_shards_it_leaves_what_the_next_call_removes(
    prepare: Callable[..., None], stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--out", tmp_path / "out", "--tokenizer", prepared / "tokenizer.json"]
    (tmp_path / "short.txt").write_text(stories.read_text()[:150_000])
    prepare(stories, *flags, "--shard_mb", 0.05)
    shards, unlink = set((tmp_path / "out" / "train").glob("*.ids")), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            prepare(tmp_path / "short.txt", *flags, "--shard_mb", 0.05, "--overwrite")
    assert set((tmp_path / "out" / "train").glob("*.ids")) == shards
    prepare(tmp_path / "short.txt", *flags, "--shard_mb", 0.05, "--overwrite")
    names = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert {f"{name}.json" for name in names if name.endswith(".ids")} == {name for name in names if name.endswith(".json")}


def test_a_full_disk_is_said_with_its_folder(
    prepare: Callable[..., None],
    stories: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: Output, ids: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Output, "write", full)
    with pytest.raises(SystemExit) as ended:
        prepare(stories, "--out", tmp_path / "out", "--tokenizer", prepared / "tokenizer.json")
    assert ended.value.code == 2
    said = f"prepare_text: cannot write to {tmp_path}/out (No space left on device); make room, then start it again\n"
    assert capsys.readouterr().err == said


def test_another_saved_data_set_of_the_same_name_is_another_preparation(tmp_path: Path) -> None:
    from datasets import Dataset

    options = argparse.Namespace(valid_percent=1.0, column="text", shard_mb=1.0)
    settings = []
    for text in ("One.", "Two."):
        Dataset.from_dict({"text": [text]}).save_to_disk(str(tmp_path / "set"))
        settings += [prepare_text._settings(options, find_sources([str(tmp_path / "set")]), [], "{}") for _ in range(2)]
        shutil.rmtree(tmp_path / "set")
    assert settings[0] == settings[1] != settings[2]


def test_a_part_of_the_shards_is_refused_with_the_command_that_goes_on(
    prepare: Callable[..., None], stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(stories.read_text()[:400_000])
    monkeypatch.chdir(tmp_path)
    out, flags = tmp_path / "out", ["--tokenizer", prepared / "tokenizer.json", "--shard_mb", 0.05]
    encode, calls = prepare_text.encode, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_text, "encode", interrupted)
        with pytest.raises(SystemExit):
            prepare("a.txt", "b.txt", "--out", "out", *flags)
    for path in (out / "train", f"{out}/train/*.ids", out / "train" / "00000.ids"):
        with pytest.raises(
            ValueError, match=r"out/train holds a part of the shards .*; go on with it: cd .* && python"
        ) as error:
            find_files(str(path), 320)
        assert f"cd {tmp_path} && " in str(error.value)
        assert "prepare_text.py a.txt b.txt --out out --tokenizer" in str(error.value)
    with pytest.raises(ValueError, match="holds a part of the shards"):
        text_of_ids(str(out), "gpt2", by_rows=False)
    with pytest.raises(SystemExit):  # other text, as one of the files is now for validation
        prepare("a.txt", "--valid", "b.txt", "--out", "out", *flags)
    intact = (out / PROGRESS).read_bytes()
    for damaged in (intact[:-20], b"[]"):
        (out / PROGRESS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.progress\.json is damaged; remove it and the shards"):
            find_files(str(out / "train"), 320)
        with pytest.raises(SystemExit):
            prepare("a.txt", "b.txt", "--out", "out", *flags)
    (out / PROGRESS).write_bytes(intact)
    prepare("a.txt", "b.txt", "--out", "out", *flags)
    assert len(find_files(str(out / "train"), 320)) > 10_000


def test_a_pattern_that_matches_every_split_trains_on_one(
    prepare: Callable[..., None], stories: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {name: stories.read_text()[:size] for name, size in (("train", 9000), ("valid", 3000), ("test", 2000))}
    for name, content in texts.items():
        (tmp_path / f"s-{name}.txt").write_text(content)
    prepare(f"{tmp_path}/s-*.txt", "--out", tmp_path / "out", "--tokenizer", prepared / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    for name in ("train", "valid"):
        ids = np.fromfile(tmp_path / "out" / f"{name}.ids", np.uint16).tolist()
        assert tokenizer.decode(ids, skip_special_tokens=False) == texts[name] + END_OF_TEXT
    output = capsys.readouterr().out
    assert "s-*.txt: train is s-train.txt; validation is s-valid.txt; test is s-test.txt" in output
    assert "left out 1 whose names tell no split, or another: s-test.txt" in output


def wait_until(condition: object, seconds: float = 100.0) -> None:
    began = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """300 MB, some of them one document, in a third of the memory; with one worker, which does it all in one process."""
    rng = random.Random(0)
    words = ["international", "responsibility", "straightforward", "lighthouses", "notwithstanding", "a", "of", "\n"]
    block = " ".join(rng.choices(words, weights=[10] * 7 + [1], k=100_000))
    separated = block.replace("\n", END_OF_TEXT)
    with (tmp_path / "large.txt").open("w") as file:
        for n in range(300_000_000 // len(block)):
            file.write(block if n % 2 else separated)
    assert (tmp_path / "large.txt").stat().st_size > 290_000_000
    flags = ["--out", str(tmp_path / "out"), "--vocab_size", "400", "--sample_mb", "2", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(TOOL), str(tmp_path / "large.txt"), *flags],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tools'}"),
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert int(done.stdout.splitlines()[-1]) * 1024 < 100_000_000
    assert "trained on one document in 15" in done.stdout
    counts = [json.loads((tmp_path / "out" / f"{name}.ids.json").read_text())["count"] for name in ("train", "valid")]
    assert 0.009 < counts[1] / sum(counts) < 0.011
