"""The fast way from text to ids gives what the library gives."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from recipes.data import encoding
from recipes.data.encoding import WORD, Encoder
from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer

TEXT = "It's a river, isn't it?\n\n  The stones' 12 lighthouses — “quietly” walked… don't   they've we'll été\t1990s.\n"
# What is white space to Python, to Unicode, to both or, by its name, to neither.
BLANK = [chr(code) for code in range(0x3001) if chr(code).isspace()] + ["\u180e", "\u200b", "\ufeff"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT * 3], 330)


def test_training_cuts_a_very_long_word_and_encoding_does_not() -> None:
    """BPE takes time with the square of a word: a picture in base64 would take many minutes."""
    trained, word = train_tokenizer(["x" * 30_000, "yz yz"], 300), "x" * 12_000
    assert max(map(len, trained.get_vocab())) <= 10_000
    assert "".join(trained.encode(word).tokens) == word
    assert "FixedLength" not in trained.to_str()


def library(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def ids(encoder: Encoder, text: str) -> list[int]:
    return np.frombuffer(encoder([text])[0], encoder.dtype).tolist()


def test_it_gives_the_ids_of_the_library_on_any_text(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_WORDS", 2000)  # so that the cache is emptied on the way
    monkeypatch.setattr(encoding, "MAX_LENGTH", 9)
    encoder, rng = Encoder(trained.to_str(), "uint16"), random.Random(0)
    every = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x11000), 0x1F642, 0x1D7D8)]
    common = list(" '\n\tstrelaZ09.\r  \u00a0")
    texts = []
    for _ in range(4000):
        kind = rng.choice((common, BLANK, every))
        texts.append("".join(rng.choice(kind if rng.random() < 0.7 else common) for _ in range(rng.randrange(40))))
    for text, found in zip(texts, encoder(texts), strict=True):
        assert np.frombuffer(found, np.uint16).tolist() == library(trained, text), ascii(text)
    assert len(encoder.words) < 2000
    assert max(map(len, encoder.words)) == 9


def test_every_kind_of_white_space_is_taken_for_what_the_library_takes_it() -> None:
    texts = ["a{0}b", "a{0} b", "a {0}b", "a{0}{0}b {0} !{0}! 1{0}", "{0}a\n{0}"]
    filled = [text.format(blank) for blank in BLANK for text in texts]
    tokenizer = train_tokenizer([text * 3 for text in filled], 700)  # it knows pieces with each of them
    encoder = Encoder(tokenizer.to_str(), "uint16")
    assert encoder.by_words
    assert len(BLANK) > 28
    for text in filled:
        assert ids(encoder, text) == library(tokenizer, text), ascii(text)


def test_words_are_met_once(trained: Tokenizer) -> None:
    encoder = Encoder(trained.to_str(), "uint32")
    assert ids(encoder, TEXT * 5) == library(trained, TEXT * 5)
    assert encoder.words.keys() == set(WORD.findall(TEXT * 2))
    encoder.words.tokenizer = None  # type: ignore[assignment] # it is not called again
    assert ids(encoder, TEXT * 7) == library(trained, TEXT * 7)


def test_added_tokens_and_other_tokenizers_go_to_the_library(trained: Tokenizer) -> None:
    encoder = Encoder(trained.to_str(), "uint16")
    text = f"a river{END_OF_TEXT}quietly"
    assert trained.token_to_id(END_OF_TEXT) in ids(encoder, text)
    assert ids(encoder, text) == library(trained, text)
    assert encoder.end_of_text == np.array([trained.token_to_id(END_OF_TEXT)], np.uint16).tobytes()
    with_space = Tokenizer.from_str(trained.to_str())
    with_space.add_special_tokens(["<two words>"])
    text = "a <two words> river"
    assert with_space.token_to_id("<two words>") in ids(Encoder(with_space.to_str(), "uint16"), text)
    assert ids(Encoder(with_space.to_str(), "uint16"), text) == library(with_space, text)
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ):
        other = json.dumps({**json.loads(trained.to_str()), **change})
        encoder = Encoder(other, "uint16")
        assert not encoder.by_words
        assert ids(encoder, TEXT) == library(Tokenizer.from_str(other), TEXT)
