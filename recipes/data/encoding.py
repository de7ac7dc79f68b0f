"""Texts to ids, fast: each distinct word goes through the tokenizer once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.data.tokenizer import end_of_text_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GPT-2's pre-tokenizer (Radford et al. 2019, its public encoder.py) always cuts where white space begins, and never looks back
# beyond: the ids of a text are those of its words, each encoded with the white space before it.
WORD = re.compile(r"\s*\S+|\s+")
NO_WHITE_SPACE = "\x1c\x1d\x1e\x1f"  # the four characters that are white space to Python and not to Unicode
MAX_WORDS, MAX_LENGTH = 1_000_000, 64  # words cached, a few hundred megabytes; and their characters: longer ones rarely recur


class Encoder:
    """Texts -> the ids of each as bytes in `dtype`, equal to those of the library's `encode` without special tokens; with
    GPT-2's pre-tokenizer several times faster. Texts that hold an added token, and other tokenizers, are left to the library.
    """

    def __init__(self, tokenizer_json: str, dtype: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.dtype = Tokenizer.from_str(tokenizer_json), dtype
        settings = json.loads(tokenizer_json)
        splitter = settings["pre_tokenizer"] or {}
        gpt2 = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True) and not splitter.get("add_prefix_space")
        self.by_words = bool(gpt2 and not settings["normalizer"] and not settings["model"].get("dropout"))
        self.not_by_words = [*NO_WHITE_SPACE, *(token["content"] for token in settings["added_tokens"])]
        self.words = _Words(self.tokenizer, dtype)
        self.end_of_text = np.array([end_of_text_id(self.tokenizer)], dtype).tobytes()

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text."""
        if not self.by_words:
            return self._by_the_library(texts)
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> bytes:
        if any(token in text for token in self.not_by_words):
            return self._by_the_library([text])[0]
        return b"".join(map(self.words.__getitem__, WORD.findall(text)))

    def _by_the_library(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]


class _Words(dict[str, bytes]):
    """{word: its ids}, filled as words occur."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        super().__init__()
        self.tokenizer, self.dtype = tokenizer, dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.tokenizer.encode(word, add_special_tokens=False).ids, self.dtype).tobytes()
        if len(word) <= MAX_LENGTH:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
