"""Text of any size as a stream of documents: borders, pieces of long ones, what is held out, and every kind of file."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.data import hub, text_files
from recipes.data.documents import PIECE, Part, Unit, hold_out, piece_size, units
from recipes.data.hub import HubDataSet
from recipes.data.text_sources import Source, find_sources, find_splits, split_named
from recipes.data.tokenizer import END_OF_TEXT


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def documents(pieces: list[Unit]) -> list[str]:
    """Units put together again."""
    whole: list[str] = []
    for unit in pieces:
        if unit.starts:
            whole.append("")
        whole[-1] += unit.text
    assert [unit.ends for unit in pieces] == [*(unit.starts for unit in pieces[1:]), True]
    return whole


def read(path: Path, content: str | bytes) -> list[Unit]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(units(find_sources([str(path)])))


def test_a_text_file_is_its_documents_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    texts = ["One.\n", "\n Two \r\n\n", "Dreï 🙂"]
    pieces = read(tmp_path / "a.txt", "\ufeff" + END_OF_TEXT.join([*texts[:2], " \n", texts[2]]) + END_OF_TEXT + "\n")
    assert pieces == [Unit(text, True, True) for text in texts]
    assert read(tmp_path / "b.txt", "no separator\nat all") == [Unit("no separator\nat all", True, True)]
    assert read(tmp_path / "c.txt", " \n") == []


@pytest.mark.parametrize("block", [1, 7, 64, 100_000])
def test_documents_do_not_depend_on_how_the_file_is_read(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data.documents.PIECE", 40)
    rng = random.Random(0)
    words = ["a", "river", "stone.\n", "\n\n", "quietly", "é", "🙂", "<|endof", "lighthouses", "  "]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(60)]
    (tmp_path / "a.txt").write_bytes(END_OF_TEXT.join(texts).encode())
    expected = list(units(find_sources([str(tmp_path / "a.txt")])))
    assert documents(expected) == [text for text in texts if text.strip()]
    assert max(len(unit.text) for unit in expected) <= 80
    assert len(expected) > 2 * len(texts)
    monkeypatch.setattr(text_files, "READ_BYTES", block)
    assert documents(list(units(find_sources([str(tmp_path / "a.txt")])))) == documents(expected)


def test_long_documents_are_cut_before_white_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data.documents.PIECE", 20)
    pieces = read(tmp_path / "a.txt", "twelve words\n\n  or more " * 20)
    assert documents(pieces) == ["twelve words\n\n  or more " * 20]
    for before, after in itertools.pairwise(pieces):
        assert not before.text[-1].isspace()
        assert after.text[0].isspace()
    assert documents(read(tmp_path / "b.txt", "日" * 500)) == ["日" * 500]  # no white space at all


ROWS = ["One.\nTwo.", "  ", "Dreï", "x" * 50_000]
KEPT = [ROWS[0], ROWS[2], ROWS[3]]


def compressed(content: bytes, ending: str) -> bytes:
    if ending == ".zst":
        import pyarrow

        return pyarrow.compress(content, "zstd", asbytes=True)
    ways: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lzma.compress, "": bytes}
    return ways[ending](content)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".xz", ".BZ2"])
def test_every_kind_of_file_has_the_same_documents_compressed_or_not(ending: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    lines = [json.dumps({"id": 1, "text": row}) for row in ROWS]
    write_table(pa.table({"text": ROWS, "n": [1, 2, 3, 4]}), tmp_path / "table", row_group_size=2)
    contents = {
        "a.txt": END_OF_TEXT.join(ROWS).encode(),
        "a.JSONL": "\n".join([*lines[:2], "", *lines[2:]]).encode(),
        "a.parquet": (tmp_path / "table").read_bytes(),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(compressed(content, ending))
        progress: list[int] = []
        assert documents(list(units(find_sources([str(path)]), on_read=progress.append))) == KEPT, name
        assert sum(progress) <= path.stat().st_size
        if ending and "parquet" not in name:
            path.write_bytes(compressed((content + b"\n") * 50, ending)[:-9])
            with pytest.raises(ValueError, match=r"is damaged or cut off|cannot be read|is not JSON") as error:
                list(units([Source(str(path))]))
            assert str(path) in one_line(error)


def test_a_saved_data_set_is_read_by_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ROWS, "n": [1, 2, 3, 4]})
    DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(str(tmp_path / "several"))
    rows.save_to_disk(str(tmp_path / "one"))
    assert documents(list(units(find_sources([str(tmp_path / "several")])))) == KEPT
    assert documents(list(units(find_sources([str(tmp_path / "one")])))) == KEPT
    splits, notes = find_splits([str(tmp_path / "several")])
    assert {name: [source.split for source in sources] for name, sources in splits.items()} == {
        "train": ["train"],
        "validation": ["dev"],
    }
    assert notes == [f"{tmp_path}/several: train is train; validation is dev"]
    for name, split in (("sep/train", rows), ("sep/valid", rows.select([0]))):  # without splits: the folders tell them
        split.save_to_disk(str(tmp_path / name))
    for inputs in (["sep"], ["sep/*"], ["sep/train", "sep/valid"]):
        assert by_split(tmp_path, *inputs)[0] == {"train": ["train"], "validation": ["valid"]}
    assert by_split(tmp_path, "sep/valid")[0] == {"train": ["valid"]}  # given as the whole text
    for damaged in ("[]", '{"splits'):
        (tmp_path / "several" / "dataset_dict.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"dataset_dict\.json is damaged .*; save the data set again") as error:
            find_sources([str(tmp_path / "several")])
        one_line(error)
    DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(ValueError, match=r"without a test split \(it has train, dev\)"):
        find_sources([str(tmp_path / "several")], "test")


def test_rows_without_text_are_counted_and_a_file_without_any_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": null}\n{"other": 3}\n')
    write_table(pa.table({"text": ["One.", None]}), tmp_path / "a.parquet")
    without: Counter[str] = Counter()
    found = list(units(find_sources([str(tmp_path / "a.*")]), empty_rows=without))
    assert documents(found) == ["One.", "One."]
    assert without == {str(tmp_path / "a.jsonl"): 2, str(tmp_path / "a.parquet"): 1}
    (tmp_path / "empty.jsonl").write_text('{"text": null}\n')  # the column is there
    assert list(units([Source(str(tmp_path / "empty.jsonl"))], empty_rows=without)) == []
    assert without[str(tmp_path / "empty.jsonl")] == 1
    for name, content, problem in (
        (
            "b.jsonl",
            '{"story": "One.", "n": 1}',
            r"b\.jsonl has no text in 'text' \(it has story, n\); give its name with --column",
        ),
        ("c.jsonl", '{"text": ["One."]}', r"c\.jsonl, line 1: column 'text' holds .*, not text"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=problem) as error:
            list(units([Source(str(tmp_path / name))]))
        one_line(error)


def test_names_tell_the_splits(tmp_path: Path) -> None:
    for name, split in (
        ("wiki.train.tokens", "train"),
        ("TinyStoriesV2-GPT4-valid.txt", "validation"),
        ("train-00000-of-00002.parquet", "train"),
        ("DEV.jsonl.GZ", "validation"),
        ("my_val.txt", "validation"),
        ("train_evaluator", "train"),
        ("trainset.txt", "train"),
        ("TESTSET.txt", "test"),
        ("evaluation.txt", "validation"),
        ("held-out.jsonl", "validation"),
        ("HeldOut", "validation"),
        ("dataset.txt", None),
        ("StoriesTrain.txt", "train"),
        ("myDevSet.jsonl", "validation"),
        ("corpusTEST", "test"),
        ("latest.txt", None),
        ("contest.txt", None),
    ):
        assert split_named(name) == split, name
    for name in (
        "train/a.txt",
        "train/b.jsonl",
        "validation/c.txt",
        "test.txt.gz",
        "README.txt",
        ".hidden/train.txt",
        "notes.pdf",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    splits, notes = find_splits([str(tmp_path)])
    names = {split: [str(Path(s.name).relative_to(tmp_path)) for s in sources] for split, sources in splits.items()}
    assert names == {"train": ["train/a.txt", "train/b.jsonl"], "validation": ["validation/c.txt"], "test": ["test.txt.gz"]}
    assert notes == [
        f"{tmp_path}: train is train/a.txt, train/b.jsonl; validation is validation/c.txt; test is test.txt.gz",
        f"{tmp_path}: left out 1 whose names tell no split, or another: README.txt",
    ]
    (tmp_path / "train" / "valid.CSV").write_text("text")
    assert f"{tmp_path}: passed over valid.CSV" in find_splits([str(tmp_path)])[1][1]
    assert find_splits([str(tmp_path / "validation" / "*.txt")])[0].keys() == {"train"}  # given as the whole text


def by_split(folder: Path, *inputs: str, validation: tuple[str, ...] = ()) -> tuple[dict[str, list[str]], list[str]]:
    splits, notes = find_splits([str(folder / name) for name in inputs], [str(folder / name) for name in validation])
    return {split: [Path(s.name).name for s in sources] for split, sources in splits.items()}, notes


def test_a_folder_called_as_a_split_tells_it_and_then_the_name(tmp_path: Path) -> None:
    for name in ("data/train/deep/a.txt", "data/train/the_test.txt", "data/VAL/b.txt", "data/my-test/c.txt", "data/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    expected = {"train": ["a.txt", "the_test.txt"], "validation": ["b.txt"], "test": ["c.txt"]}
    splits, notes = by_split(tmp_path, "data")
    assert (splits, len(notes)) == (expected, 2)
    # As several folders, a pattern, or what a shell makes of one.
    assert by_split(tmp_path, "data/train", "data/VAL", "data/my-test")[0] == expected
    for inputs in (["data/*/*.txt", "data/*/*/*.txt"], ["data/train/the_test.txt", "data/VAL/b.txt"]):
        assert {"the_test.txt"} <= {*by_split(tmp_path, *inputs)[0]["train"]}
        assert by_split(tmp_path, *inputs)[0]["validation"] == ["b.txt"]
    assert by_split(tmp_path, "data/VAL") == ({"train": ["b.txt"]}, [])  # a folder that is given is no split of itself


def test_names_tell_the_splits_of_files_and_patterns_too(tmp_path: Path) -> None:
    for name in ("s-train.txt", "s-valid.txt", "s-test.txt", "s-notes.txt", "other.txt"):
        (tmp_path / name).write_text("text")
    expected = {"train": ["s-train.txt"], "validation": ["s-valid.txt"], "test": ["s-test.txt"]}
    splits, notes = by_split(tmp_path, "s-*.txt")
    assert splits == expected
    assert "left out 1 whose names tell no split, or another: s-notes.txt" in notes[1]
    splits, notes = find_splits([f"{tmp_path}/s-*.txt"], test=False)
    assert splits.keys() == {"train", "validation"}
    assert "left out 2 whose names tell no split, or another: s-notes.txt, s-test.txt" in notes[1]
    splits, notes = by_split(tmp_path, "s-valid.txt", "other.txt")  # who gives a file means it
    assert splits == {"validation": ["s-valid.txt"], "train": ["other.txt"]}
    assert notes == [f"{tmp_path}/s-valid.txt, {tmp_path}/other.txt: train is other.txt; validation is s-valid.txt"]
    splits, notes = by_split(tmp_path, "s-*.txt", validation=("other.txt",))
    assert splits == expected | {"validation": ["other.txt"]}
    assert "s-valid.txt" in notes[1]
    assert by_split(tmp_path, "s-valid.txt")[0] == by_split(tmp_path, "*-valid*")[0] == {"train": ["s-valid.txt"]}


def test_many_files_make_a_short_note(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("text")
    (note,) = by_split(tmp_path, *(f"{number}.txt" for number in range(9)))[1]
    assert note.endswith("2.txt and 6 more: train is 0.txt, 1.txt, 2.txt and 6 more")


def test_data_sets_of_the_hub_are_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def open_data_set(name: str) -> HubDataSet:
        calls.append(name)
        return HubDataSet("a" * 40, {"train": [{"text": "Zero."}], "dev": [{"text": "One."}, {"text": "Two."}]}, ["text"], {})

    monkeypatch.setattr(text_files, "open_data_set", open_data_set)
    assert documents(list(units([Source("owner/stories:small", "dev")]))) == ["One.", "Two."]
    assert calls == ["owner/stories:small"]
    with pytest.raises(ValueError, match=r"no text in 'story' \(it has text\); give its name with --column") as error:
        list(units([Source("owner/stories", "train")], "story"))
    one_line(error)


def test_patterns_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("text")
    names = [Path(source.name).name for source in find_sources([f"{tmp_path}/*.txt", str(tmp_path / "c.jsonl")])]
    assert names == ["a.txt", "b.txt", "c.jsonl"]
    assert find_sources(["owner/stories", "owner/stories:small"], "validation") == [
        Source("owner/stories", "validation"),
        Source("owner/stories:small", "validation"),
    ]
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("data/missing.txt", "does not exist"),
        ("missing", "does not exist"),
        ("*.nothing", "does not exist"),
        (str(tmp_path / "empty"), "holds no text"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=problem) as error:
            find_sources([name])
        assert name in one_line(error)
    (tmp_path / "data[1].txt").write_text("text")
    assert find_sources([str(tmp_path / "data[1].txt")]) == [Source(str(tmp_path / "data[1].txt"))]
    for name in ("a.json", "a.csv.gz", "a.CSV"):
        (tmp_path / name).write_text("text")
        with pytest.raises(ValueError, match="is no text file"):
            find_sources([str(tmp_path / name)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "c.jsonl")
    (tmp_path / "a.txt.GZ").write_text("the same, compressed")
    monkeypatch.chdir(tmp_path)
    for inputs, problem in (
        ([str(tmp_path / "a.txt"), f"{tmp_path}/*.txt"], "a.txt is given twice"),
        (["a.txt", str(tmp_path / "a.txt")], f"{tmp_path}/a.txt is a.txt again"),
        (["c.jsonl", "link.jsonl"], "link.jsonl is c.jsonl again"),
        (["a.txt*"], "a.txt.GZ is a.txt again, by its path or its name; leave one of them out"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            find_sources(inputs)
        one_line(error)


def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "READ_BYTES", 64)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    for name, content, problem in (
        ("a.txt", b"good \xc3\xa9 " * 30 + b"caf\xe9 and on", "byte 0xe9 at offset 243"),
        ("b.txt", b"cut off \xc3", "byte 0xc3 at offset 8"),
        ("a.jsonl", b'{"text": "good"}\n{"text": ', "line 2 is not JSON"),
        ("c.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        ("a.parquet", b"no parquet", "not a readable parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            list(units([Source(str(tmp_path / name))]))
        assert name in one_line(error)
    with pytest.raises(ValueError, match=r"owner/stories cannot be read .cannot load .*[Oo]ffline") as error:
        list(units([Source("owner/stories", "train")]))
    one_line(error)


def test_held_out_units_are_the_requested_share_and_never_the_first() -> None:
    stream = [Unit("x" * (10 + n % 7), True, True) for n in range(3000)]
    parts = list(hold_out(stream, 0.05))
    assert "".join(part.text for part in parts) == "".join(unit.text for unit in stream)
    held = [n for n, part in enumerate(parts) if part.held_out]
    assert sum(len(parts[n].text) for n in held) / sum(len(part.text) for part in parts) == pytest.approx(0.05, rel=0.02)
    assert held[0] == 1
    assert max(b - a for a, b in itertools.pairwise(held)) < 40  # spread evenly
    assert all(part.end and not part.gap for part in parts)
    assert [part.held_out for part in hold_out(stream[:2], 0.01)] == [False, True]
    assert not any(part.held_out for part in hold_out(stream, 0.0))


def test_of_a_short_text_too_many_places_are_held_out(tmp_path: Path) -> None:
    assert piece_size(10**9, 0.01) == piece_size(None, 0.01) == piece_size(10**5, 0.0) == PIECE
    text = "To be, or not to be, that is the question:\n" * 20_000
    (tmp_path / "play.txt").write_text(text)
    stream = units(find_sources([str(tmp_path / "play.txt")]), piece=piece_size(len(text), 0.05))
    parts = list(hold_out(stream, 0.05))
    assert "".join(part.text for part in parts) == text
    assert sum(part.held_out for part in parts) >= 30


def test_a_piece_that_is_held_out_leaves_a_border_on_both_sides() -> None:
    long = [Unit(text, text == "a", text == "f") for text in "abcdef"]
    parts = list(hold_out(long, 0.5))
    assert parts == [
        Part("a", False, False, False),
        Part("b", True, True, True),
        Part("c", False, False, False),
        Part("d", True, True, True),
        Part("e", False, False, False),
        Part("f", True, True, True),
    ]
    two = [Unit("xxxxx", True, True), *long]
    assert [part[1:] for part in hold_out(two, 0.25)][:3] == [(False, True, False), (True, True, False), (True, True, False)]
