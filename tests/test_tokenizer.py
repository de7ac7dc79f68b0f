"""Tokenizers: trained, from files, and refused."""

from pathlib import Path

import pytest

from recipes.data.tokenizer import END_OF_TEXT, load_tokenizer

ROWS = ["The cat sat on the mat .", "  A naïve café → 日本語 🙂 costs 3 € .", "= Heading =", "The dog sat on the cat ."]


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_trained_tokenizer_round_trips_any_text_and_is_deterministic(tmp_path: Path) -> None:
    first = load_tokenizer("train", lambda: ROWS, "digest", 300, tmp_path / "a")
    second = load_tokenizer("train", lambda: ROWS, "digest", 300, tmp_path / "b")
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 300
    assert first.token_to_id(END_OF_TEXT) == 0
    for row in [*ROWS, "\tnever seen: ßøλ\x00 \u2028 𐍈  "]:
        assert first.decode(first.encode(row).ids) == row


def test_vocab_and_merges_with_and_without_version_line(tmp_path: Path) -> None:
    trained = load_tokenizer("train", lambda: ROWS, "digest", 300, tmp_path)
    folder = tmp_path / "bpe"
    folder.mkdir()
    trained.model.save(str(folder))
    merges = folder / "merges.txt"
    assert merges.read_text().startswith("#version")
    expected = trained.encode(ROWS[1] + END_OF_TEXT).ids
    assert expected[-1] == 0
    for content in (merges.read_text(), merges.read_text().split("\n", 1)[1]):
        merges.write_text(content)
        loaded = load_tokenizer(str(folder), list, "", 0, tmp_path)
        assert loaded.encode(ROWS[1] + END_OF_TEXT).ids == expected

    folder.rename(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"300 entries.*50257") as error:
        load_tokenizer(str(tmp_path / "gpt2"), list, "", 0, tmp_path)
    one_line(error)


def test_tokenizer_json_neither_pads_nor_truncates(tmp_path: Path) -> None:
    trained = load_tokenizer("train", lambda: ROWS, "digest", 300, tmp_path)
    trained.enable_padding(length=64)
    trained.enable_truncation(2)
    trained.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path), list, "", 0, tmp_path)
        assert loaded.decode(loaded.encode("The cat sat").ids) == "The cat sat"
        assert 2 < len(loaded.encode("The cat sat").ids) < 64


def test_errors_of_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "no_end.json"))
    (tmp_path / "broken.json").write_text("{\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "small" / "merges.txt").write_text("")
    for name, kind, problem in (
        ("no_end.json", ValueError, "no token <|endoftext|>"),
        ("broken.json", ValueError, "not a tokenizer.json"),
        ("empty", FileNotFoundError, "has no vocab.json"),
        ("small", ValueError, "lacks 255 of the 256 bytes"),
        ("nowhere", FileNotFoundError, "does not exist"),
    ):
        with pytest.raises(kind) as error:
            load_tokenizer(str(tmp_path / name), list, "", 0, tmp_path)
        assert problem in one_line(error)
        assert name in one_line(error)
    with pytest.raises(ValueError, match=r"vocab_size 256 .* at least 257") as error:
        load_tokenizer("train", lambda: ROWS, "digest", 256, tmp_path)
    one_line(error)
