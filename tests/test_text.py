"""Text to samples: rows, tokenizers, cache, packing."""

import hashlib
import itertools
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.data import embedded, hub, text, text_corpus, tokenizer
from recipes.data.hub import hub_is_reachable
from recipes.data.text import TokenSplit
from recipes.data.text_corpus import Reading, find_corpus
from recipes.data.text_of_ids import holds_ids, text_of_ids
from recipes.data.token_samples import IGNORED, TokenBlocks, TokenRows
from recipes.data.tokenizer import END_OF_TEXT

ROWS = {
    "train": [
        "The cat sat on the mat .",
        "  A naïve café → 日本語 🙂 costs 3 € .",
        "= Heading =",
        "The dog sat on the cat .",
    ],
    "validation": ["The mat sat ."],
    "test": ["A dog on a mat .", "The end ."],
}
END = 9


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in zip(("train", "valid", "test"), ROWS.values(), strict=True):
        # Blank rows, trailing blanks and a Windows line end, as they occur in real files.
        content = " \n" + " \n\n".join(rows) + "\r\n \n"
        (folder / f"wiki.{name}.tokens").write_bytes(content.encode())
    return folder


def split_of_rows(*rows: list[int]) -> TokenSplit:
    ids = np.array([token for row in rows for token in [*row, END]], dtype=np.uint16)
    return TokenSplit(ids, np.cumsum([len(row) + 1 for row in rows]), words=0, fingerprint="")


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------- rows


def rows_of(data_dir: Path | str, cache: Path, column: str = "text") -> dict[str, list[str]]:
    """The rows that are not blank, by split."""
    rows: dict[str, list[str]] = {}
    for split, row, _ in find_corpus("wikitext2", [str(data_dir)], Reading(column), cache).rows(Counter()):
        if row.strip():
            rows.setdefault(split, []).append(row)
    return rows


def test_local_rows_are_stripped_and_blank_ones_dropped(data_dir: Path, tmp_path: Path) -> None:
    assert rows_of(data_dir, tmp_path) == ROWS


def test_plain_text_files_and_odd_line_separators(tmp_path: Path) -> None:
    for name in ("train.txt", "validation.txt", "test.txt"):
        (tmp_path / name).write_text("\ufeffone\u2028row\nanother\n", encoding="utf-8")
    assert rows_of(tmp_path, tmp_path / "cache")["test"] == ["one\u2028row", "another"]


def test_a_text_with_separators_has_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["One.\n\nTwo.", "Dreï " * 300 + "and", "Four."]  # the first border is far from the beginning
    monkeypatch.setattr("recipes.data.text_files.READ_BYTES", 40)
    (tmp_path / "train.txt").write_text(f" \n{END_OF_TEXT}".join([*texts, "\n"]))
    (tmp_path / "dev.txt").write_text(texts[0])
    assert rows_of(tmp_path, tmp_path / "cache") == {"train": texts, "validation": ["One.", "Two."]}


def test_without_a_validation_text_runs_of_rows_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("".join(f"Line {n} of the play, which goes on.\n" for n in range(12_000)))
    corpus = find_corpus("", [str(tmp_path / "play.txt")], Reading(), tmp_path)
    assert corpus.notes == [
        f"{tmp_path}/play.txt has no validation text: 5.00% of it, spread over it, "
        "is held out for validation and as much for test"
    ]
    found = list(corpus.rows(Counter()))
    assert [row for _, row, _ in found] == (tmp_path / "play.txt").read_text().splitlines()
    assert found[0][0] == "train"
    for split in ("validation", "test"):
        assert 0.04 < sum(name == split for name, *_ in found) / len(found) < 0.06
        runs = [len(list(group)) for name, group in itertools.groupby(found, key=lambda row: row[0]) if name == split]
        assert 10 < len(runs) < 40  # of some twenty lines each, all over the play
    (tmp_path / "play.txt").rename(tmp_path / "train.txt")
    (tmp_path / "test.txt").write_text("The end.\n")
    splits = Counter(split for split, *_ in find_corpus("", [str(tmp_path)], Reading(), tmp_path).rows(Counter()))
    assert splits["test"] == 1
    assert 0.04 < splits["validation"] / splits["train"] < 0.06


def test_the_same_rows_have_the_same_ids_from_every_kind_of_file(tmp_path: Path) -> None:
    """White space at their ends, which lines of a file cannot keep, is no part of them."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    texts = [f"Row {n} of many. \t" for n in range(40)] + ["", "   ", "The end.\n"]
    for name in ("lines", "documents", "jsonl", "parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines" / "train.txt").write_text("\r\n".join(text.strip("\n") for text in texts))
    (tmp_path / "documents" / "train.text").write_text(END_OF_TEXT.join(texts))
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    write_table(pa.table({"text": texts}), tmp_path / "parquet" / "train.parquet")
    found = []
    for folder in ("lines", "documents", "jsonl", "parquet"):
        (tmp_path / folder / "dev.txt").write_text("Something else.")
        prepared = text.prepare_text("", [str(tmp_path / folder)], "train", 300, tmp_path / "cache")
        found.append([np.asarray(prepared.splits["train"].ids).tolist(), prepared.splits["train"].words])
    assert found == [found[0]] * 4


def test_a_text_of_one_line_is_held_out_in_pieces(tmp_path: Path) -> None:
    whole = " ".join(f"Sentence {n} of the only line there is." for n in range(5000))
    (tmp_path / "book.txt").write_text(whole)
    rows = list(find_corpus("", [str(tmp_path / "book.txt")], Reading(), tmp_path).rows(Counter()))
    assert "".join(row for _, row, _ in rows) == whole
    sizes = Counter()
    for split, row, _ in rows:
        sizes[split] += len(row)
    assert 0.04 < sizes["validation"] / len(whole) < 0.06
    # A piece ends in the id of end-of-text where the next one went elsewhere.
    assert [end for _, _, end in rows] == [*(a[0] != b[0] for a, b in itertools.pairwise(rows)), True]
    prepared = text.prepare_text("", [str(tmp_path / "book.txt")], "train", 300, tmp_path)
    for name, split in prepared.splits.items():
        ids, runs = np.asarray(split.ids), [len(list(g)) for s, g in itertools.groupby(row[0] for row in rows) if s == name]
        assert np.flatnonzero(ids == prepared.end_of_text).tolist() == (split.row_ends - 1).tolist()
        assert len(split.row_ends) == len(runs)


def test_an_empty_file_among_others_is_passed_over_by_name(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "wiki.train.2.tokens").write_text(" \n")
    prepared = text.prepare_text("", [str(data_dir)], "train", 300, tmp_path)
    assert prepared.notes[1:] == (f"{data_dir}/wiki.train.2.tokens: passed over, as it holds no text",)
    assert len(prepared.splits["train"].row_ends) == len(ROWS["train"])


def test_a_file_whose_rows_are_all_without_text_is_counted_beside_others(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "One row."}\n')
    (tmp_path / "dev.txt").write_text("Another.\n")
    (tmp_path / "train-2.jsonl").write_text('{"text": null}\n' * 3)
    prepared = text.prepare_text("", [str(tmp_path)], "train", 300, tmp_path / "cache")
    assert prepared.notes[1:] == (f"{tmp_path}/train-2.jsonl: 3 rows without text passed over",)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train-2\.jsonl is empty, or has only blank rows; give one with text for train"):
        text.prepare_text("", [str(tmp_path)], "train", 300, tmp_path / "cache")


def test_the_same_bytes_read_otherwise_are_another_corpus(tmp_path: Path) -> None:
    digests = []
    for kind in ("txt", "jsonl"):
        folder = tmp_path / kind
        folder.mkdir()
        for split in ("train", "dev"):
            (folder / f"{split}.{kind}").write_text('{"text": "One."}\n')
        digests += [find_corpus("", [str(folder)], Reading(by_line=by_line), tmp_path).digest for by_line in (True, False)]
    assert len(set(digests)) == 4


def test_a_blank_piece_that_ends_a_row_keeps_its_end(tmp_path: Path) -> None:
    encoder = tokenizer.train_tokenizer(["a b"], 260)
    written = text._SplitFile(tmp_path / "a.ids", text.Encoder(encoder.to_str(), "uint16"))
    for piece, end in (("a", False), (" ", True), (" ", True), ("b", True)):
        written.add(piece, end)
    written.finish()
    assert encoder.decode(np.fromfile(tmp_path / "a.ids", np.uint16).tolist(), False) == f"a {END_OF_TEXT}b{END_OF_TEXT}"
    assert list(written.row_ends) == [3, 5]


def test_validation_text_that_is_training_text_is_said(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "wiki.valid.tokens").write_bytes((data_dir / "wiki.train.tokens").read_bytes())
    _, note = find_corpus("", [str(data_dir)], Reading(), tmp_path).notes
    assert note.startswith(f"{data_dir}/wiki.valid.tokens has the text of {data_dir}/wiki.train.tokens: ")


def test_errors_of_local_files_name_the_file(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist") as error:
        rows_of(data_dir / "nowhere", tmp_path)
    one_line(error)
    validation = data_dir / "wiki.valid.tokens"
    for content, problem in ((b"caf\xe9", "0xe9 at offset 3"), (b"", "is empty"), (b" \n\n", "has only blank rows")):
        validation.write_bytes(content)
        with pytest.raises(ValueError, match=problem) as error:
            rows_of(data_dir, tmp_path)
        assert str(validation) in one_line(error)
    (data_dir / "wiki.train.tokens").unlink()
    with pytest.raises(FileNotFoundError, match="has text for test and validation, and none whose name says `train`") as error:
        rows_of(data_dir, tmp_path)
    one_line(error)


def test_unknown_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'wikitext'.*wikitext2.*embedded.*--data_dir") as error:
        find_corpus("wikitext", [], Reading(), tmp_path)
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"owner/name does not exist; .* a data set of the hub by --dataset") as error:
        find_corpus("wikitext2", ["owner/name"], Reading(), tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match=f"{tmp_path} is a path here; give --data_dir {tmp_path}"):
        find_corpus(str(tmp_path), [], Reading(), tmp_path)


def test_unreachable_hub_is_a_quick_error_that_names_the_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    for module in (hub, tokenizer):
        monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    # Names that no machine has in its cache.
    monkeypatch.setitem(text_corpus.HUB_DATASETS, "wikitext2", "samecurve/nowhere:none")
    monkeypatch.setattr(tokenizer, "HUB_GPT2", ("samecurve/nowhere",))
    offline = datasets.config.HF_HUB_OFFLINE
    pauses: list[float] = []  # before another try: the library would make five of them, in half a minute

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(ValueError, match=r"nowhere:none from the hub.*--data_dir.*--dataset embedded") as error:
        find_corpus("wikitext2", [], Reading(), tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match=r"--tokenizer PATH.*--tokenizer train") as error:
        tokenizer.load_tokenizer("gpt2", list, "", 0, tmp_path)
    one_line(error)
    assert pauses == []
    assert offline == datasets.config.HF_HUB_OFFLINE


def test_the_hub_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    assert not hub_is_reachable()


# ------------------------------------------------------------------------------------------------------------ embedded


def test_embedded_text_is_the_same_every_time_and_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = embedded.load_embedded(tmp_path / "one")
    code = (
        "import hashlib, sys; from pathlib import Path; from recipes.data.embedded import load_embedded;"
        "print(hashlib.sha256(repr(load_embedded(Path(sys.argv[1]))).encode()).hexdigest())"
    )
    other = run_python(code, str(tmp_path / "two"), PYTHONHASHSEED="7")
    assert other == hashlib.sha256(repr(rows).encode()).hexdigest()
    monkeypatch.setattr(embedded, "_source_files", None)  # it is not called again
    assert embedded.load_embedded(tmp_path / "one") == rows

    every_row = [row for split in rows.values() for row in split]
    assert len(every_row) == len(set(every_row))
    assert all(row == " ".join(row.split()) for row in every_row)
    sizes = {split: sum(map(len, rows[split])) for split in rows}
    assert sizes["train"] > 1_000_000
    assert min(sizes["validation"], sizes["test"]) > 0.02 * sizes["train"]


def test_embedded_splits_are_by_document_name() -> None:
    splits = [embedded.split_of(f"package/module_{i}.py") for i in range(4000)]
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert abs(splits.count(split) / 4000 - share) < 0.02


def test_embedded_paragraphs_are_prose_lines(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""A heading\n=========\n\nTwo\n   lines.\n\n1 + 1\n"""\nif True:\n    def f():\n        "Inner."\nx = "no"\n'
    )
    rows = [row for doc in embedded._docstrings(path) for row in embedded._paragraphs(doc)]
    assert rows == ["A heading", "Two lines.", "Inner."]


# --------------------------------------------------------------------------------------------------------- ids, cache


def test_prepared_ids_decode_to_the_rows_and_words_count_line_ends(data_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    prepared = text.prepare_text("wikitext2", [str(data_dir)], "train", 300, tmp_path)
    encoder = Tokenizer.from_str(prepared.tokenizer_json)
    assert (prepared.vocab_size, prepared.end_of_text) == (300, 0)
    for name, split in prepared.splits.items():
        ids = np.asarray(split.ids)
        assert ids.dtype == np.uint16
        assert split.row_ends.dtype == np.int64
        starts = [0, *split.row_ends[:-1]]
        pieces = [ids[a:b] for a, b in zip(starts, split.row_ends, strict=True)]
        assert [encoder.decode(piece[:-1].tolist()) for piece in pieces] == ROWS[name]
        assert all(piece[-1] == 0 for piece in pieces)
        assert len(split.ids) == split.row_ends[-1]
    # Two rows of words, and line ends: of the blank line before, between and after them too, as published counts have them.
    assert prepared.splits["test"].words == 6 + 3 + 5


def test_second_call_reads_the_cache_and_damage_is_repaired(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    encoded: list[int] = []
    add = text._SplitFile.add
    monkeypatch.setattr(text._SplitFile, "add", lambda file, row, end: encoded.append(row) or add(file, row, end))

    def prepare() -> text.Text:
        encoded.clear()
        return text.prepare_text("wikitext2", [str(data_dir)], "train", 300, cache)

    def contents(prepared: text.Text) -> list[list[int]]:
        return [array.tolist() for split in prepared.splits.values() for array in (np.asarray(split.ids), split.row_ends)]

    first = prepare()
    assert [row for row in encoded if row.strip()] == [row for rows in ROWS.values() for row in rows]
    expected = contents(first)
    assert contents(prepare()) == expected
    assert encoded == []
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".ids", ".row_ends", ".json"}
    files = [path for path in files if path.parent.parent.name != "files"]

    for damage in ("truncate", "empty", "flip", "remove"):
        for path in files:
            intact = path.read_bytes()
            damaged = {"truncate": intact[:-3], "empty": b"", "flip": bytes([*intact[:-2], intact[-2] ^ 1, intact[-1]])}
            # A new file, as the old one may be mapped by `first`: nobody writes into a file of the cache.
            path.unlink()
            if damage != "remove":
                path.write_bytes(damaged[damage])
            again = prepare()
            assert contents(again) == expected, (damage, path)
            assert again.fingerprint == first.fingerprint
            assert path.name == "index.json" or path.read_bytes() == intact  # which has the times of the others
            assert encoded or "tokenizers" in path.parts
    assert contents(first) == expected


def test_a_failed_write_leaves_no_file_behind(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ValueError, match=r"No space left.*SAMECURVE_CACHE") as error:
            text.prepare_text("wikitext2", [str(data_dir)], "train", 300, cache)
    one_line(error)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert len(text.prepare_text("wikitext2", [str(data_dir)], "train", 300, cache).splits) == 3
    (entry,) = (cache / "ids").iterdir()
    for name, age in (("killed", 90_000), ("running", 60)):  # other processes', a day and a minute ago
        (entry / f"{name}.tmp").write_text("half a file")
        os.utime(entry / f"{name}.tmp", (time.time() - age,) * 2)
    (entry / "index.json").unlink()
    assert len(text.prepare_text("wikitext2", [str(data_dir)], "train", 300, cache).splits) == 3
    assert [path.name for path in entry.glob("*.tmp")] == ["running.tmp"]


def test_fingerprint_follows_rows_and_tokenizer_and_cache_the_environment(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "from_environment"))
    first = text.prepare_text("wikitext2", [str(data_dir)], "train", 300)
    assert (tmp_path / "from_environment" / "ids").is_dir()
    other_tokenizer = text.prepare_text("wikitext2", [str(data_dir)], "train", 290)
    (data_dir / "wiki.test.tokens").write_text("Another test .\n")
    other_test = text.prepare_text("wikitext2", [str(data_dir)], "train", 300)
    assert len({first.fingerprint, other_tokenizer.fingerprint, other_test.fingerprint}) == 3
    assert other_test.splits["train"].fingerprint == first.splits["train"].fingerprint


def test_a_mapped_split_is_pickled_by_path(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "wiki.train.tokens").write_text("The cat sat on the mat .\n" * 5000)
    prepared = text.prepare_text("wikitext2", [str(data_dir)], "train", 300, tmp_path)
    blocks = TokenBlocks(prepared.splits["train"], 16, prepared.vocab_size, prepared.end_of_text)
    sent = pickle.dumps(blocks)
    assert len(sent) < 2000 < len(prepared.splits["train"].ids)
    assert torch.equal(pickle.loads(sent).__getitems__([3])["labels"], blocks.__getitems__([3])["labels"])


def test_prepared_ids_take_the_place_of_text(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    prepared, folder = text.prepare_text("wikitext2", [str(data_dir)], "train", 300), tmp_path / "ids"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(prepared.tokenizer_json)
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        np.asarray(prepared.splits[split].ids).tofile(folder / f"{name}.ids")
    assert holds_ids(str(folder))
    assert not holds_ids(str(data_dir))
    again = text_of_ids(str(folder), "gpt2", by_rows=True)
    assert (again.vocab_size, again.end_of_text, again.tokenizer_json) == (300, 0, prepared.tokenizer_json)
    for name, split in prepared.splits.items():
        assert np.asarray(again.splits[name].ids).tolist() == np.asarray(split.ids).tolist()
        assert again.splits[name].row_ends.tolist() == split.row_ends.tolist()
    assert text_of_ids(str(folder), "gpt2", by_rows=False).splits["test"].row_ends.tolist() == [
        len(prepared.splits["test"].ids)
    ]
    shards = tmp_path / "shards"
    for name in ("train", "valid", "test"):
        ids = np.fromfile(folder / f"{name}.ids", np.uint16)
        (shards / name).mkdir(parents=True)
        for number, part in enumerate(np.split(ids, [1, len(ids) // 2])):
            part.tofile(shards / name / f"{number}.ids")
    (shards / "tokenizer.json").write_text(prepared.tokenizer_json)
    for by_rows, cut in ((True, TokenRows), (False, TokenBlocks)):
        one, many = (text_of_ids(str(path), "gpt2", by_rows) for path in (folder, shards))
        for name, split in one.splits.items():
            own = many.splits[name]
            assert (own.row_ends.tolist(), own.largest_id) == (split.row_ends.tolist(), split.largest_id)
            assert np.asarray(own.ids).tolist() == np.asarray(split.ids).tolist()
            samples = [cut(s, 4, 300, 0) for s in (split, pickle.loads(pickle.dumps(own)))]
            batches = [sample.__getitems__(range(len(sample))) for sample in samples]
            assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    # No file of ids is mapped, since mapped pages stay in memory, until all of a file does.
    assert str(folder) not in (maps := Path("/proc/self/maps").read_text())
    assert ".row_ends" in maps
    other = text.prepare_text("wikitext2", [str(data_dir)], "train", 290).tokenizer_json
    (tmp_path / "other.json").write_text(other)
    with pytest.raises(ValueError, match=r"other\.json is not the one that made the ids") as error:
        text_of_ids(str(folder), str(tmp_path / "other.json"), by_rows=False)
    one_line(error)
    assert text_of_ids(str(folder), str(folder / "tokenizer.json"), by_rows=False).notes == ()
    (note,) = again.notes
    assert note == f"{folder}/tokenizer.json, of 300 entries, is the tokenizer: --tokenizer gpt2 is for text"
    (folder / "valid.ids.json").write_text(json.dumps({"tokenizer_sha256": hashlib.sha256(other.encode()).hexdigest()}))
    with pytest.raises(ValueError, match=r"ids/tokenizer\.json is not the one that made .*valid\.ids") as error:
        text_of_ids(str(folder), "gpt2", by_rows=False)
    one_line(error)
    (folder / "valid.ids.json").unlink()
    for ids, row_ends in (([3, 0, 4, 5, 6], [2, 5]), ([3, 4, 5], [3])):  # the last row lacks its end-of-text
        np.array(ids, dtype=np.uint16).tofile(folder / "valid.ids")
        rows = text_of_ids(str(folder), "gpt2", by_rows=True).splits["validation"]
        assert rows.row_ends.tolist() == row_ends
        assert len(TokenRows(rows, 4, 300, 0)) == len(row_ends)
    (folder / "valid.ids").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \.ids file for validation") as error:
        text_of_ids(str(folder), "gpt2", by_rows=False)
    one_line(error)
    for name in ("valid", "dev"):  # two of a split are one set, as two files of text are
        np.array([3, 4, 0], dtype=np.uint16).tofile(folder / f"{name}.ids")
    for data_dir in (str(folder), f"{folder}/*.ids"):
        both = text_of_ids(data_dir, "gpt2", by_rows=True)
        assert np.asarray(both.splits["validation"].ids).tolist() == [3, 4, 0] * 2
        assert both.splits["validation"].row_ends.tolist() == [3, 6]
    np.array([3, 300, 4], dtype=np.uint16).tofile(folder / "dev.ids")
    with pytest.raises(ValueError, match=r"dev\.ids: token id 300 at position 1 is not below vocab_size 300") as error:
        text_of_ids(str(folder), "gpt2", by_rows=False)
    one_line(error)


# ------------------------------------------------------------------------------------------------------------- samples


def test_blocks_shift_labels_once_and_pad_the_last() -> None:
    blocks = TokenBlocks(split_of_rows([1, 2, 3], [4, 5]), max_length=4, vocab_size=10, end_of_text=END)
    assert len(blocks) == 2
    batch = blocks.__getitems__([0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 3, END], [4, 5, END, END]]
    assert batch["labels"].tolist() == [[2, 3, END, 4], [5, END, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 101])
def test_blocks_predict_every_token_but_the_first_exactly_once(tokens: int) -> None:
    ids = np.random.default_rng(tokens).integers(0, 50, tokens).astype(np.uint16)
    blocks = TokenBlocks(TokenSplit(ids, np.array([tokens]), 0, ""), 4, 50, 0)
    assert len(blocks) == math.ceil((tokens - 1) / 4)  # and so no block without a label
    batch = blocks.__getitems__(range(len(blocks)))
    real = batch["labels"] != IGNORED
    assert batch["labels"][real].tolist() == ids[1:].tolist()
    assert batch["input_ids"][real].tolist() == ids[:-1].tolist()


def test_numbers_go_on_through_the_epochs() -> None:
    split = split_of_rows([1, 2, 3], [4, 5], [6])
    for samples in (TokenBlocks(split, 4, 10, END), TokenRows(split, 4, 10, END)):
        n = len(samples)
        first, later = samples.__getitems__([1, 0, 1]), samples.__getitems__([n + 1, 10**12 * n, 5 * n + 1])
        assert torch.equal(first["input_ids"], later["input_ids"])
        assert torch.equal(first["labels"], later["labels"])


def test_rows_are_padded_to_the_longest_of_the_batch_and_truncation_is_counted() -> None:
    rows = TokenRows(split_of_rows([1, 2, 3, 4, 5], [6], [7, 8], [1, 2, 3, 4]), 4, 10, END)
    assert len(rows) == 4
    assert rows.truncated == 1  # four tokens and end-of-text are four inputs: that one just fits
    batch = rows.__getitems__([2, 1])
    assert batch["input_ids"].tolist() == [[7, 8], [6, END]]
    assert batch["labels"].tolist() == [[8, END], [END, IGNORED]]
    batch = rows.__getitems__([0, 3])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[2, 3, 4, 5], [2, 3, 4, END]]


def test_errors_of_samples() -> None:
    for kind in (TokenBlocks, TokenRows):
        with pytest.raises(ValueError, match=r"id 7 at position 4 .* vocab_size 7") as error:
            kind(split_of_rows([1, 2, 3, 0, 7]), 4, 7, 0)
        one_line(error)
        with pytest.raises(ValueError, match="1 tokens") as error:
            kind(split_of_rows([]), 4, 10, END)
        one_line(error)
    with pytest.raises(ValueError, match="row 1 ") as error:
        TokenRows(split_of_rows([1, 2], [], [3]), 4, 10, END)
    one_line(error)


# ------------------------------------------------------------------------------------------------------------- imports


def test_importing_is_light() -> None:
    heavy = {"torch", "transformers", "datasets", "tokenizers", "trainer"}
    assert run_python(f"import sys, recipes.data.text; print(sorted({heavy!r} & sys.modules.keys()))") == "[]"


def run_python(code: str, *arguments: str, **environment: str) -> str:
    root = Path(text.__file__).parents[2]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()
