"""Megabytes of text a second and core that become ids, beside the tokenizer library called directly; one interleaved run.

The text is English that is on every machine (Python's documentation), in documents of a few kilobytes, or `--input`. Seconds
are CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import prepare_text

from recipes.data.corpus import Source, units
from recipes.data.embedded import load_embedded
from recipes.data.encoding import Encoder
from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer
from trainer.command_line.locations import argument_path


def main(arguments: list[str]) -> None:
    """Prints a line per way: the median of the rounds, and the fastest and slowest."""
    parser = argparse.ArgumentParser(prog="benchmark.py prepare_text", description=__doc__)
    parser.add_argument("--input", type=argument_path, help="a text file instead")
    parser.add_argument("--megabytes", type=float, default=10.0, help="repeat the text up to this size")
    parser.add_argument("--vocab_size", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the library starts its threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        text = options.input.read_text(encoding="utf-8") if options.input else _documentation()
        path.write_text(text * max(1, round(options.megabytes * 1e6 / len(text.encode()))), encoding="utf-8")
        measure(path, options)


def _documentation() -> str:
    rows = load_embedded()["train"]
    return END_OF_TEXT.join("\n\n".join(rows[start : start + 20]) for start in range(0, len(rows), 20)) + END_OF_TEXT


def measure(path: Path, options: argparse.Namespace) -> None:
    """Each way in turn, round after round."""
    documents = [unit.text for unit in units([Source(str(path))])]
    tokenizer = train_tokenizer(documents, options.vocab_size)
    tokenizer.save(str(path.with_name("tokenizer.json")))
    encoder = Encoder(tokenizer.to_str(), "uint16")
    tool = [str(path), "--out", str(path.with_name("out")), "--tokenizer", str(path.with_name("tokenizer.json"))]

    def whole_tool() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_text.main([*tool, "--workers", "1", "--overwrite"])

    ways: dict[str, Callable[[], object]] = {
        "tokenizers: encode, a text at a time": lambda: [np.array(tokenizer.encode(t).ids, np.uint16) for t in documents],
        "tokenizers: encode_batch_fast": lambda: [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(documents)],
        "Encoder": lambda: [encoder(text) for text in documents],
        "tools/prepare_text.py, one worker": whole_tool,
    }
    size = path.stat().st_size / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    base = statistics.median(next(iter(seconds.values())))
    print(f"{size:.1f} MB in {len(documents):,} documents, {tokenizer.get_vocab_size():,} entries; {options.rounds} rounds")
    for name, measured in seconds.items():
        median, speeds = statistics.median(measured), [size / value for value in measured]
        print(f"{name:38s} {size / median:6.1f} MB/s (from {min(speeds):.1f} to {max(speeds):.1f}), {base / median:4.1f} x")
