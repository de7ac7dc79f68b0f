"""Megabytes of text a second and core that become ids, beside the tokenizer libraries called directly; one interleaved run.

python tools/benchmark.py prepare_text --input wiki.*.tokens --tokenizer gpt2-files                 # 100 MB made of real text
python tools/benchmark.py prepare_text --input wiki.*.tokens --tokenizer gpt2-files --megabytes 0   # the text as it is, once

Without `--input` the text is English that is on every machine (Python's documentation). The encoder starts each round cold, as
a run does; it remembers words, so that repeated text is faster. tiktoken, of the extra `benchmark`, makes the ids of a GPT-2
tokenizer only. Ids are compared, document by document. Seconds are CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import prepare_text

from recipes.data.cache import cache_folder
from recipes.data.embedded import load_embedded
from recipes.data.encoding import Encoder
from recipes.data.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, existing_tokenizer, train_tokenizer
from trainer.command_line.locations import argument_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GPT-2's, as tiktoken spells it (its file openai_public.py).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def main(arguments: list[str]) -> None:
    """Prints a line per way: the median of the rounds, and the fastest and slowest."""
    parser = argparse.ArgumentParser(prog="benchmark.py prepare_text", description=__doc__)
    parser.add_argument("--input", type=argument_path, nargs="+", default=[], help="text files instead, a document a line")
    parser.add_argument("--megabytes", type=float, default=100.0, help="repeat the text up to this size")
    parser.add_argument("--tokenizer", default="train", help="train, gpt2 (hub), a folder, or a tokenizer.json (train)")
    parser.add_argument("--vocab_size", type=int, default=10_000, help="of a trained one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the library starts its threads
    rows = [row for path in options.input for row in path.read_text(encoding="utf-8").split("\n")]
    rows = rows or load_embedded(cache_folder())["train"]
    documents = [row for row in rows if row.strip() and END_OF_TEXT not in row]
    size = sum(len(document.encode()) for document in documents)
    documents *= max(1, round(options.megabytes * 1e6 / size))
    trained = options.tokenizer == "train"
    tokenizer = train_tokenizer(documents, options.vocab_size) if trained else existing_tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        measure(documents, tokenizer, Path(folder), options.rounds)


def measure(documents: list[str], tokenizer: Tokenizer, folder: Path, rounds: int) -> None:
    """Print MB per CPU second of each way to encode, which take turns, and in how many documents the ids differ."""
    (folder / "text.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tool = [str(folder / "text.txt"), "--out", str(folder / "out"), "--tokenizer", str(folder / "tokenizer.json")]
    dtype = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"

    def whole_tool() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_text.main([*tool, "--workers", "1", "--overwrite"])

    ways: dict[str, Callable[[], Any]] = {
        "tokenizers: encode, a text at a time": lambda: [np.array(tokenizer.encode(t).ids, dtype) for t in documents],
        "tokenizers: encode_batch_fast": lambda: [np.array(e.ids, dtype) for e in tokenizer.encode_batch_fast(documents)],
        "Encoder": lambda: cold[0](documents),
        "tools/prepare_text.py, one worker": whole_tool,
    }
    peer = tiktoken_of(tokenizer)
    if peer:
        ways = {"tiktoken: encode_ordinary": lambda: [np.array(peer.encode_ordinary(t), dtype) for t in documents], **ways}
    size = sum(len(document.encode()) for document in documents) / 1e6
    cold: list[Encoder] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        cold[:] = [Encoder(tokenizer.to_str(), dtype)]  # it remembers no word yet; making it is not timed, as for the peers
        for name, way in ways.items():
            started = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - started)
    print(f"{size:.1f} MB in {len(documents):,} documents, {tokenizer.get_vocab_size():,} entries; {rounds} rounds")
    base, expected = statistics.median(next(iter(seconds.values()))), results[next(iter(ways))]
    for name, measured in seconds.items():
        median, speeds = statistics.median(measured), [size / value for value in measured]
        print(f"{name:38s} {size / median:6.1f} MB/s (from {min(speeds):.1f} to {max(speeds):.1f}), {base / median:4.1f} x")
    differing = sum(ids.tobytes() != found for ids, found in zip(expected, results["Encoder"], strict=True))
    print(f"ids of Encoder and of {next(iter(ways)).partition(':')[0]} differ in {differing} of {len(documents):,} documents")


def tiktoken_of(tokenizer: Tokenizer) -> Any:
    """tiktoken's encoding made of the vocabulary of GPT-2's `tokenizer`. Prints why and returns None if that is impossible."""
    if importlib.util.find_spec("tiktoken") is None or tokenizer.get_vocab_size() != GPT2_VOCAB_SIZE:
        print("without tiktoken: it is not installed, or the tokenizer is not GPT-2's (--tokenizer)")
        return None
    # In a byte-level vocabulary a printable Latin byte is its own character; the others are the characters from 256 on.
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in themselves]
    byte_of = {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {
        bytes(map(byte_of.__getitem__, piece)): rank for piece, rank in tokenizer.get_vocab().items() if piece != END_OF_TEXT
    }
    return importlib.import_module("tiktoken").Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
