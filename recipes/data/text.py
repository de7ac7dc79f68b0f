"""From text to token ids: rows -> tokenizer -> ids, cached by content.

A row is one line of text: a paragraph, a heading, a story. In the stream of ids each is followed by `<|endoftext|>`.
Errors that a user can fix are ValueError or FileNotFoundError, with one line that names the next step.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.embedded import SPLITS, load_embedded
from recipes.data.encoding import Encoder
from recipes.data.hub import hub_is_reachable, one_line
from recipes.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


HUB_WIKITEXT = "Salesforce/wikitext"
HUB_DATASETS = {"wikitext2": "wikitext-2-raw-v1", "wikitext103": "wikitext-103-raw-v1"}
# Names of a complete set of local files, in the order of SPLITS.
LOCAL_FILES = (
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
    ("train.txt", "validation.txt", "test.txt"),
)


def file_of(ids: np.ndarray) -> Path:
    """The file of a memory-mapped array."""
    assert isinstance(ids, np.memmap)
    assert ids.filename is not None
    return Path(ids.filename)


@dataclass(frozen=True)
class TokenSplit:
    """One split as ids. Pickling a memory-mapped one sends its path, not its content, so that workers start at once."""

    ids: np.ndarray  # uint16 or uint32 [tokens]: each row followed by end-of-text
    row_ends: np.ndarray  # int64 [rows]: one past the end-of-text of each row
    words: int  # words separated by white space, and one end of line per row: what word perplexity divides by
    fingerprint: str  # hex; of the rows and the tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {k: file_of(v) if isinstance(v, np.memmap) else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: _map(v) if isinstance(v, Path) else v for k, v in state.items()})


@dataclass(frozen=True)
class Text:
    """A tokenized data set with its tokenizer."""

    tokenizer_json: str
    vocab_size: int
    end_of_text: int
    splits: dict[str, TokenSplit]  # train, validation, test

    @classmethod
    def without_data(cls, tokenizer_json: str) -> "Text":
        """A tokenizer alone, to encode and decode with."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(tokenizer_json)
        return cls(tokenizer_json, vocabulary_size(encoder), end_of_text_id(encoder), {})

    @property
    def fingerprint(self) -> str:
        """Hash of rows and tokenizer, of all splits."""
        return content_hash(*(self.splits[name].fingerprint for name in SPLITS))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, ready to encode and decode."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)


def prepare_text(
    dataset: str, data_dir: str | None, tokenizer: str, vocab_size: int, cache_dir: str | Path | None = None
) -> Text:
    """Load rows and tokenizer and return the ids of each split, from the cache if the same rows were tokenized before.

    `vocab_size` is for `tokenizer="train"` only; `Text.vocab_size` is the actual size. The cache is `cache_dir`,
    else $SAMECURVE_CACHE, else ~/.cache/samecurve. Raises what `load_rows` and `load_tokenizer` raise.
    """
    cache = cache_folder(cache_dir)
    rows = load_rows(dataset, data_dir)
    encoder = load_tokenizer(tokenizer, rows["train"], vocab_size, cache)
    return Text(
        tokenizer_json=encoder.to_str(),
        vocab_size=vocabulary_size(encoder),
        end_of_text=end_of_text_id(encoder),
        splits={split: _tokenize(rows[split], encoder, cache) for split in SPLITS},
    )


# ---------------------------------------------------------------------------------------------------------------- rows


def load_rows(dataset: str, data_dir: str | None) -> dict[str, list[str]]:
    """Return the rows of train, validation and test, without blank rows and trailing white space.

    `data_dir`, a folder with one of the sets of files in LOCAL_FILES, wins over `dataset`: wikitext2, wikitext103 (from
    the hub or its local cache) or embedded. Raises ValueError or FileNotFoundError; no other text is ever substituted.
    """
    if data_dir:
        return _load_local_rows(Path(data_dir).expanduser())
    if dataset == "embedded":
        return load_embedded()
    if dataset in HUB_DATASETS:
        return _load_hub_rows(dataset)
    raise ValueError(f"dataset {dataset!r} is unknown; use {', '.join(HUB_DATASETS)}, embedded, or --data_dir FOLDER")


def _load_local_rows(folder: Path) -> dict[str, list[str]]:
    expected = "wiki.{train,valid,test}.tokens, the same .raw, or {train,validation,test}.txt"
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_dir {folder} is not a folder; it must hold {expected}")
    for names in LOCAL_FILES:
        if (folder / names[0]).exists():
            return {split: _read_rows(folder / name) for split, name in zip(SPLITS, names, strict=True)}
    raise FileNotFoundError(f"--data_dir {folder} has no training file; it must hold {expected}")


def _read_rows(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; put it beside the other two splits") from None
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path} is not UTF-8 ({bad}); convert it, for example with iconv") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check what it is and its permissions") from None
    # Not splitlines(), which also cuts at characters that occur inside a line of WikiText.
    rows = [line.rstrip() for line in text.split("\n") if line.strip()]
    if not rows:
        state = "has only blank rows" if text else "is empty"
        raise ValueError(f"{path} {state}; give a file with text, one row per line")
    return rows


def _load_hub_rows(dataset: str) -> dict[str, list[str]]:
    import datasets

    config_offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this a machine with no network retries for half a minute or more before it reads its own cache.
        datasets.config.HF_HUB_OFFLINE = config_offline or not hub_is_reachable()
        splits = datasets.load_dataset(HUB_WIKITEXT, HUB_DATASETS[dataset])
        return {split: [row.rstrip() for row in splits[split]["text"] if row.strip()] for split in SPLITS}
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(
            f"cannot load --dataset {dataset} from the hub ({one_line(error)}); "
            "give local files with --data_dir FOLDER, or use --dataset embedded, which needs no network"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = config_offline


# ----------------------------------------------------------------------------------------------------------------- ids


def encode_rows(tokenizer: "Tokenizer", rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return `ids` [tokens], every row followed by end-of-text, and `row_ends` [rows], one past each end-of-text.

    `ids` are uint16 if the vocabulary fits, else uint32; `row_ends` are int64. An END_OF_TEXT written out in a row
    becomes that token too.
    """
    # Set explicitly, the library neither warns nor switches itself off when DataLoader workers are forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    encoder = Encoder(tokenizer.to_str(), dtype.name)
    encoded = [ids + encoder.end_of_text for ids in encoder(rows)]
    row_ends = np.cumsum([len(ids) // dtype.itemsize for ids in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype), row_ends


def _tokenize(rows: list[str], tokenizer: "Tokenizer", cache_dir: Path) -> TokenSplit:
    """`encode_rows` through the cache."""
    fingerprint = content_hash(tokenizer.to_str(), *rows)
    entry = CacheEntry(cache_dir / "tokens" / fingerprint)
    facts = entry.read()
    if facts is None:
        ids, row_ends = encode_rows(tokenizer, rows)
        facts = {"words": sum(len(row.split()) + 1 for row in rows)}
        entry.write({"ids.npy": _npy(ids), "row_ends.npy": _npy(row_ends)}, facts)
    return TokenSplit(_map(entry.folder / "ids.npy"), _map(entry.folder / "row_ends.npy"), facts["words"], fingerprint)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
