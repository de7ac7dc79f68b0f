"""From text to token ids: rows -> tokenizer -> ids, cached by content.

A row is one line of text: a paragraph, a heading, a story. In the stream of ids each is followed by `<|endoftext|>`.
Whatever a user can mend raises ValueError or FileNotFoundError with one line that says what to do next.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.embedded import SPLITS, load_embedded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
CACHE_FORMAT = "1"  # part of every cache key: raise it whenever the same input would give other files

HUB_WIKITEXT = "Salesforce/wikitext"
HUB_DATASETS = {"wikitext2": "wikitext-2-raw-v1", "wikitext103": "wikitext-103-raw-v1"}
HUB_GPT2 = ("openai-community/gpt2", "gpt2")  # one model, two names: a machine without a network may hold either
HUB_PROBE_SECONDS = 5.0
GPT2_VOCAB_SIZE = 50_257
# Names of a complete set of local files, in the order of SPLITS.
LOCAL_FILES = (
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
    ("train.txt", "validation.txt", "test.txt"),
)
ENCODE_ROWS = 4096  # rows tokenized at a time: enough for every core, and memory stays bounded


@dataclass(frozen=True)
class TokenSplit:
    """One split as ids. Pickling a memory-mapped one sends its path, not its content, so that workers start at once."""

    ids: np.ndarray  # uint16 or uint32 [tokens]: each row followed by end-of-text
    row_ends: np.ndarray  # int64 [rows]: one past the end-of-text of each row
    words: int  # words separated by white space, and one end of line per row: what word perplexity divides by
    fingerprint: str  # hex; of the rows and the tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {k: Path(v.filename) if isinstance(v, np.memmap) else v for k, v in vars(self).items()}

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
        """Of a tokenizer alone: what is needed to encode and decode."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(tokenizer_json)
        return cls(tokenizer_json, _vocab_size(encoder), encoder.token_to_id(END_OF_TEXT), {})

    @property
    def fingerprint(self) -> str:
        """Hash of rows and tokenizer, of all splits."""
        return _hash(*(self.splits[name].fingerprint for name in SPLITS))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, ready to encode and decode."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)


def prepare_text(
    dataset: str, data_dir: str | None, tokenizer: str, vocab_size: int, cache_dir: str | Path | None = None
) -> Text:
    """Load rows and tokenizer and return the ids of each split, from the cache if the same rows were tokenized before.

    `vocab_size` counts for `tokenizer="train"` only; `Text.vocab_size` is what came of it. The cache is `cache_dir`,
    else $SAMECURVE_CACHE, else ~/.cache/samecurve. Raises what `load_rows` and `load_tokenizer` raise.
    """
    cache = Path(cache_dir or os.environ.get("SAMECURVE_CACHE") or Path.home() / ".cache" / "samecurve").expanduser()
    rows = load_rows(dataset, data_dir)
    encoder = load_tokenizer(tokenizer, rows["train"], vocab_size, cache)
    return Text(
        tokenizer_json=encoder.to_str(),
        vocab_size=_vocab_size(encoder),
        end_of_text=encoder.token_to_id(END_OF_TEXT),
        splits={split: _tokenize(rows[split], encoder, cache) for split in SPLITS},
    )


# ---------------------------------------------------------------------------------------------------------------- rows


def load_rows(dataset: str, data_dir: str | None) -> dict[str, list[str]]:
    """Return the rows of train, validation and test, without blank rows and trailing white space.

    `data_dir`, a folder with one of the sets of files in LOCAL_FILES, wins over `dataset`: wikitext2, wikitext103 (from
    the hub or its local cache) or embedded. Raises ValueError or FileNotFoundError; other text is never put in place.
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
    # Not splitlines(), which also cuts at characters that stand inside a line of WikiText.
    rows = [line.rstrip() for line in text.split("\n") if line.strip()]
    if not rows:
        state = "has only blank rows" if text else "is empty"
        raise ValueError(f"{path} {state}; give a file with text, one row per line")
    return rows


def _load_hub_rows(dataset: str) -> dict[str, list[str]]:
    import datasets

    config_offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this a machine with no network retries for half a minute or more before it looks into its own cache.
        datasets.config.HF_HUB_OFFLINE = config_offline or not _hub_answers()
        splits = datasets.load_dataset(HUB_WIKITEXT, HUB_DATASETS[dataset])
        return {split: [row.rstrip() for row in splits[split]["text"] if row.strip()] for split in SPLITS}
    except Exception as error:  # a library that raises a dozen kinds; each means the same to the user
        raise ValueError(
            f"cannot load --dataset {dataset} from the hub ({_one_line(error)}); "
            "give local files with --data_dir FOLDER, or use --dataset embedded, which needs no network"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = config_offline


def _hub_answers() -> bool:
    """Whether the hub can be reached at all, asked once and briefly, through the same proxies as any download."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception:  # no network, no route, no name, time-out, offline mode: all are a no
        return False
    return True


# ----------------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(tokenizer: str, rows: list[str], vocab_size: int, cache_dir: Path) -> "Tokenizer":
    """Return the tokenizer; it knows END_OF_TEXT, never pads and never truncates.

    `tokenizer` is "gpt2" (the hub or its local cache), a folder with tokenizer.json or with vocab.json and merges.txt
    (GPT-2's byte-level BPE), a file tokenizer.json, or "train": byte-level BPE of `vocab_size` entries learned from
    `rows`, END_OF_TEXT being id 0. Raises ValueError or FileNotFoundError.
    """
    if tokenizer == "train":
        encoder = _trained_tokenizer(rows, vocab_size, cache_dir)
    elif tokenizer == "gpt2":
        encoder = _tokenizer_from_file(_download_gpt2())
        _check_gpt2(encoder, tokenizer)
    else:
        encoder = _local_tokenizer(Path(tokenizer).expanduser())
    if encoder.token_to_id(END_OF_TEXT) is None:
        raise ValueError(f"tokenizer {tokenizer} has no token {END_OF_TEXT}; add it, or use --tokenizer train")
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _trained_tokenizer(rows: list[str], vocab_size: int, cache_dir: Path) -> "Tokenizer":
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that any text can be encoded
    if vocab_size <= len(alphabet):
        smallest = len(alphabet) + 1
        raise ValueError(f"vocab_size {vocab_size} is too small for --tokenizer train; use at least {smallest}")
    entry = CacheEntry(cache_dir / "tokenizers" / _hash("train", str(vocab_size), *rows))
    if entry.read() is None:
        encoder = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        encoder.train_from_iterator(rows, trainer)
        entry.write({"tokenizer.json": encoder.to_str().encode()})
    return Tokenizer.from_file(str(entry.folder / "tokenizer.json"))


def _byte_level(model: Any) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    encoder = Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _download_gpt2() -> Path:
    from huggingface_hub import hf_hub_download

    for repository in HUB_GPT2:
        try:
            return Path(hf_hub_download(repository, "tokenizer.json", local_files_only=True))
        except FileNotFoundError:
            continue
    try:
        if not _hub_answers():
            raise ConnectionError("it does not answer")
        return Path(hf_hub_download(HUB_GPT2[0], "tokenizer.json"))
    except Exception as error:
        raise ValueError(
            f"cannot load --tokenizer gpt2 from the hub ({_one_line(error)}); "
            "give a folder or tokenizer.json with --tokenizer PATH, or use --tokenizer train"
        ) from error


def _local_tokenizer(path: Path) -> "Tokenizer":
    if path.is_file():
        return _tokenizer_from_file(path)
    if (path / "tokenizer.json").is_file():
        return _tokenizer_from_file(path / "tokenizer.json")
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist; use gpt2, train, a folder or a tokenizer.json")
    for name in ("vocab.json", "merges.txt"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"tokenizer {path} has no {name}; it must hold tokenizer.json, or vocab.json + merges.txt")
    return _gpt2_files(path)


def _tokenizer_from_file(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({_one_line(error)}); give another with --tokenizer PATH") from None


def _gpt2_files(folder: Path) -> "Tokenizer":
    """Read vocab.json and merges.txt, with or without a `#version` line, and check that no byte would be lost."""
    from tokenizers import models, pre_tokenizers

    try:
        encoder = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:
        raise ValueError(
            f"{folder} holds no readable vocab.json + merges.txt ({_one_line(error)}); use another --tokenizer PATH"
        ) from None
    vocabulary = encoder.get_vocab()
    # BPE leaves out what it does not know without a word, and an empty vocabulary "works".
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys():
        raise ValueError(
            f"{folder}/vocab.json has {len(vocabulary)} entries and lacks {len(missing)} of the 256 bytes; "
            "use a byte-level vocabulary or --tokenizer train"
        )
    if folder.resolve().name == "gpt2":
        _check_gpt2(encoder, str(folder))
    if END_OF_TEXT in vocabulary:
        encoder.add_special_tokens([END_OF_TEXT])  # takes the id it has
    return encoder


def _check_gpt2(encoder: "Tokenizer", name: str) -> None:
    if (entries := encoder.get_vocab_size()) != GPT2_VOCAB_SIZE:
        raise ValueError(f"tokenizer {name} has {entries} entries, GPT-2 has {GPT2_VOCAB_SIZE}; replace its files")


def _vocab_size(encoder: "Tokenizer") -> int:
    """One more than the largest id: what an embedding needs, even if some ids are unused."""
    return max(encoder.get_vocab().values()) + 1


# ----------------------------------------------------------------------------------------------------------------- ids


def encode_rows(tokenizer: "Tokenizer", rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return `ids` [tokens], every row followed by end-of-text, and `row_ends` [rows], one past each end-of-text.

    `ids` are uint16 if the vocabulary fits, else uint32; `row_ends` are int64. An END_OF_TEXT written out in a row
    becomes that token too. Uses every core.
    """
    # Said aloud, the library neither warns nor switches itself off when DataLoader workers are forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype = np.uint16 if _vocab_size(tokenizer) <= 2**16 else np.uint32
    end_of_text = [tokenizer.token_to_id(END_OF_TEXT)]
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(rows), ENCODE_ROWS):
        encodings = tokenizer.encode_batch_fast(list(rows[start : start + ENCODE_ROWS]), add_special_tokens=False)
        batch = [encoding.ids + end_of_text for encoding in encodings]
        lengths.extend(map(len, batch))
        ids.append(np.fromiter(chain.from_iterable(batch), dtype))
    return np.concatenate(ids) if ids else np.empty(0, dtype), np.cumsum(lengths, dtype=np.int64)


def _tokenize(rows: list[str], tokenizer: "Tokenizer", cache_dir: Path) -> TokenSplit:
    """`encode_rows` through the cache."""
    fingerprint = _hash(tokenizer.to_str(), *rows)
    entry = CacheEntry(cache_dir / "tokens" / fingerprint)
    facts = entry.read()
    if facts is None:
        ids, row_ends = encode_rows(tokenizer, rows)
        facts = {"words": sum(len(row.split()) + 1 for row in rows)}
        entry.write({"ids.npy": _npy(ids), "row_ends.npy": _npy(row_ends)}, facts)
    return TokenSplit(_map(entry.folder / "ids.npy"), _map(entry.folder / "row_ends.npy"), facts["words"], fingerprint)


# --------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class CacheEntry:
    """A folder of files and, written last, `index.json` with their hashes.

    Each file replaces its predecessor atomically and its content follows from the folder's name alone, so neither a
    kill nor two processes writing at once can leave anything but a good entry or one that is written again.
    """

    folder: Path

    def read(self) -> dict[str, Any] | None:
        """Return the facts given to `write` if the index and every file are there and intact, else None."""
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
            files, facts = index["files"], index["facts"]
            intact = index["facts_sha256"] == _hash(json.dumps(facts, sort_keys=True))
            intact &= all(_file_hash(self.folder / name) == expected for name, expected in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return facts if intact else None

    def write(self, files: dict[str, bytes], facts: dict[str, Any] | None = None) -> None:
        """Write `files` {name: content} and `facts` (JSON). Raises ValueError if the folder cannot be written."""
        facts = facts or {}
        index = {
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "facts": facts,
            "facts_sha256": _hash(json.dumps(facts, sort_keys=True)),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**files, "index.json": json.dumps(index).encode()}.items():
                _write_atomically(self.folder / name, content)
        except OSError as error:
            reason = error.strerror or _one_line(error)
            raise ValueError(
                f"cannot write the token cache {self.folder} ({reason}); set SAMECURVE_CACHE to a folder with room"
            ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _hash(*parts: str) -> str:
    """sha256 (hex) of the cache format and the parts, each behind its length so that moving a border changes it."""
    digest = hashlib.sha256()
    for part in (CACHE_FORMAT, *parts):
        content = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
