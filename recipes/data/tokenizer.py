"""Tokenizers: GPT-2's from the hub or local files, any tokenizer.json, or byte-level BPE trained on the text at hand."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.cache import CacheEntry, content_hash
from recipes.data.hub import hub_is_reachable, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
HUB_GPT2 = ("openai-community/gpt2", "gpt2")  # one model, two names: a machine without a network may hold either
GPT2_VOCAB_SIZE = 50_257
WORD_CHARACTERS = 10_000  # of a word that BPE is trained on, which takes time with its square; longer ones are cut


def load_tokenizer(
    tokenizer: str, rows: Callable[[], Iterable[str]], digest: str, vocab_size: int, cache_dir: Path
) -> "Tokenizer":
    """Return the tokenizer that `tokenizer` names (see `existing_tokenizer`), or for "train" one trained on `rows`.

    A trained one is kept in the cache, under the `digest` of the rows. Raises ValueError or FileNotFoundError.
    """
    if tokenizer != "train":
        return existing_tokenizer(tokenizer)
    entry = CacheEntry(cache_dir / "tokenizers" / content_hash("train", str(vocab_size), digest))
    if entry.read() is None:
        entry.write({"tokenizer.json": train_tokenizer(rows(), vocab_size).to_str().encode()})
    return _tokenizer_from_file(entry.folder / "tokenizer.json")


def existing_tokenizer(tokenizer: str) -> "Tokenizer":
    """Return a tokenizer that exists already; it knows END_OF_TEXT, never pads and never truncates.

    `tokenizer` is "gpt2" (the hub or its local cache), a folder with tokenizer.json or with vocab.json and merges.txt
    (GPT-2's byte-level BPE), or a file tokenizer.json. Raises ValueError or FileNotFoundError.
    """
    if tokenizer == "gpt2":
        encoder = _tokenizer_from_file(_download_gpt2())
        _check_gpt2(encoder, tokenizer)
    else:
        encoder = _local_tokenizer(Path(tokenizer).expanduser())
    if encoder.token_to_id(END_OF_TEXT) is None:
        raise ValueError(f"tokenizer {tokenizer} has no token {END_OF_TEXT}; add it, or use --tokenizer train")
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE of `vocab_size` entries (fewer, if the texts have no more) trained on `texts`; END_OF_TEXT is id 0.

    Memory grows with the number of distinct words, not with the text. ValueError if `vocab_size` does not exceed the 256 bytes.
    """
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that any text can be encoded
    if vocab_size <= len(alphabet):
        smallest = len(alphabet) + 1
        raise ValueError(f"vocab_size {vocab_size} is too small for --tokenizer train; use at least {smallest}")
    encoder = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    pre_tokenizer = encoder.pre_tokenizer
    encoder.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.FixedLength(length=WORD_CHARACTERS)])
    encoder.train_from_iterator(texts, trainer)
    encoder.pre_tokenizer = pre_tokenizer
    return encoder


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
        if not hub_is_reachable():
            raise ConnectionError("it does not answer")
        return Path(hf_hub_download(HUB_GPT2[0], "tokenizer.json"))
    except Exception as error:
        raise ValueError(
            f"cannot load --tokenizer gpt2 from the hub ({one_line(error)}); "
            "give a folder or tokenizer.json with --tokenizer PATH, or use --tokenizer train"
        ) from error


def _local_tokenizer(path: Path) -> "Tokenizer":
    if path.is_file():
        return _tokenizer_from_file(path)
    if (path / "tokenizer.json").is_file():
        return _tokenizer_from_file(path / "tokenizer.json")
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist; use gpt2, train, a folder or tokenizer.json that is here")
    for name in ("vocab.json", "merges.txt"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"tokenizer {path} has no {name}; it must hold tokenizer.json, or vocab.json + merges.txt")
    return _gpt2_files(path)


def _tokenizer_from_file(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({one_line(error)}); give another with --tokenizer PATH") from None


def _gpt2_files(folder: Path) -> "Tokenizer":
    """Read vocab.json and merges.txt, with or without a `#version` line, and check that no byte would be lost."""
    from tokenizers import models, pre_tokenizers

    try:
        encoder = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:
        raise ValueError(
            f"{folder} holds no readable vocab.json + merges.txt ({one_line(error)}); use another --tokenizer PATH"
        ) from None
    vocabulary = encoder.get_vocab()
    # BPE silently drops unknown characters, and even accepts an empty vocabulary.
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys():
        raise ValueError(
            f"{folder}/vocab.json has {len(vocabulary)} entries and lacks {len(missing)} of the 256 bytes; "
            "use a byte-level vocabulary or --tokenizer train"
        )
    if folder.resolve().name == "gpt2":
        _check_gpt2(encoder, str(folder))
    if END_OF_TEXT in vocabulary:
        encoder.add_special_tokens([END_OF_TEXT])  # it keeps its id
    return encoder


def _check_gpt2(encoder: "Tokenizer", name: str) -> None:
    if (entries := encoder.get_vocab_size()) != GPT2_VOCAB_SIZE:
        raise ValueError(f"tokenizer {name} has {entries} entries, GPT-2 has {GPT2_VOCAB_SIZE}; replace its files")


def end_of_text_id(encoder: "Tokenizer") -> int:
    """The id of END_OF_TEXT in a tokenizer that has it."""
    token_id = encoder.token_to_id(END_OF_TEXT)
    assert token_id is not None
    return token_id


def vocabulary_size(encoder: "Tokenizer") -> int:
    """One more than the largest id: what an embedding needs, even if some ids are unused."""
    return max(encoder.get_vocab().values()) + 1
