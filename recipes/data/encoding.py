"""Texts to ids, fast: each different word is given to the tokenizer once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.data.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GPT-2's pre-tokenizer (Radford et al. 2019, its public encoder.py): words, contractions, signs, digits, blanks; on ASCII,
# the letters of Latin-1 and a few signs, where it takes no table of Unicode to tell one kind from another.
LETTER = "A-Za-zÀ-ÖØ-öø-ÿ"
WORD = re.compile(rf" ?[{LETTER}]+|'(?:[stmd]|re|ve|ll)| ?[^\s{LETTER}0-9]+| ?[0-9]+|\s+(?!\S)|\s+", re.ASCII)
SIMPLE = re.compile(rf"[\x00-\x7f{LETTER}\u2018\u2019\u201c\u201d\u2013\u2014\u2026]*")
MOST_WORDS = 1_000_000  # kept at a time: a few hundred megabytes


class Encoder:
    """Texts -> ids as bytes in `dtype`, without special tokens added; what `encode_batch` gives, several times faster.

    Under GPT-2's pre-tokenizer the ids of a text are those of its words, one behind the other, and few words are new. A
    text that is not SIMPLE, or with an added token in it, goes to the library, and so does every text of a tokenizer of
    another kind.
    """

    def __init__(self, tokenizer_json: str, dtype: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.dtype = Tokenizer.from_str(tokenizer_json), dtype
        told = json.loads(tokenizer_json)
        before = told["pre_tokenizer"] or {}
        plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
        self.by_words = bool(plain and not told["normalizer"] and not told["model"].get("dropout"))
        self.added = [token["content"] for token in told["added_tokens"]]
        self.words = _Words(self.tokenizer, dtype)
        self.end_of_text = np.array([self.tokenizer.token_to_id(END_OF_TEXT)], dtype).tobytes()

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text."""
        slow = [n for n, text in enumerate(texts) if not self._plain(text)]
        encodings = self.tokenizer.encode_batch_fast([texts[n] for n in slow], add_special_tokens=False)
        found = {n: np.array(encoding.ids, self.dtype).tobytes() for n, encoding in zip(slow, encodings, strict=True)}
        ids = self.words.__getitem__
        return [found[n] if n in found else b"".join(map(ids, WORD.findall(text))) for n, text in enumerate(texts)]

    def _plain(self, text: str) -> bool:
        simple = text.isascii() or SIMPLE.fullmatch(text)
        return bool(self.by_words and simple and not any(token in text for token in self.added))


class _Words(dict[str, bytes]):
    """{word: its ids}, filled as words are met."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        super().__init__()
        self.tokenizer, self.dtype = tokenizer, dtype

    def __missing__(self, word: str) -> bytes:
        if len(self) >= MOST_WORDS:
            self.clear()
        ids = self[word] = np.array(self.tokenizer.encode(word, add_special_tokens=False).ids, self.dtype).tobytes()
        return ids
