"""Turns text into the token ids that recipes/tinystories_lm.py reads, in memory that does not grow with the text.

python tools/prepare_text.py stories-train.txt --valid stories-valid.txt --out data --vocab_size 10000
python tools/prepare_text.py 'corpus/*.jsonl' --out data --tokenizer gpt2        # holds out 1 % for validation

INPUT is a text file, JSONL, parquet (each compressed or not), a pattern in quotes, a folder of such files or one that
`datasets` saved, or OWNER/NAME[:CONFIGURATION] of the Hugging Face hub. Names of files and folders tell the splits, where
several do (stories-train.txt, valid/a.txt). In text files <|endoftext|> separates documents; a file without it is one
document. Every document ends in <|endoftext|> in the ids; else text is kept as it is.
Writes train.ids, valid.ids (each with a .json beside it: size, digest, largest id, documents) and tokenizer.json, each
atomically; with --shard_mb files in train/ and valid/, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prepared_files import Encoded, locked, write_files, write_shards
from tqdm import tqdm

from recipes.data.cache import signature
from recipes.data.documents import Part, hold_out, piece_size, units
from recipes.data.encoding import Encoder
from recipes.data.hub import open_data_set
from recipes.data.text_files import OnRead, no_progress
from recipes.data.text_sources import Source, find_splits
from recipes.data.tokenizer import end_of_text_id, existing_tokenizer, train_tokenizer, vocabulary_size
from recipes.data.unfinished_shards import PROGRESS
from trainer.command_line.locations import argument_path
from trainer.distributed.hardware import cores
from trainer.errors import path_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Task = list[Part]
"""what a worker encodes at once"""
TASK_CHARACTERS = 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and prepares. Exits with 2 and one line if it cannot, 130 if interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT")
    add("--out", type=argument_path, required=True, help="folder for the results")
    add("--valid", nargs="+", default=[], metavar="INPUT", help="validation text (default: hold out a part of the input)")
    add("--valid_percent", type=float, default=1.0, help="how much to hold out, in documents or pieces of at most 32 KB (1)")
    add("--tokenizer", default="train", help="train (byte-level BPE), gpt2 (hub), a folder, or a tokenizer.json (train)")
    add("--vocab_size", type=int, default=10_000, help="entries of a trained tokenizer (10000)")
    add("--sample_mb", type=float, default=256.0, help="train the tokenizer on so much, spread over the training text (256)")
    add("--column", default="text", help="column of the text in JSONL, parquet and data sets of the hub (text)")
    add("--workers", type=int, default=cores(), help="processes that encode (all cores)")
    add("--shard_mb", type=float, default=0.0, help="megabytes of text a file in OUT/train and OUT/valid (0: one file each)")
    add("--overwrite", action="store_true", help="replace what an earlier call left in --out")
    options = parser.parse_args(arguments)
    tool = shlex.join(["python", str(path_of("tools/prepare_text.py")), *(sys.argv[1:] if arguments is None else arguments)])
    options.command = f"cd {shlex.quote(os.getcwd())} && {tool}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same cleanup as after Ctrl-C
    try:
        prepare(options)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno and error.filename is None:  # from a write
            reason = f"cannot write to {options.out} ({error.strerror or reason}); make room, then {_way_on(options)}"
        parser.exit(2, f"prepare_text: {reason}\n")
    except BrokenProcessPool:
        parser.exit(2, "prepare_text: a worker was killed, perhaps for want of memory; try fewer --workers\n")
    except KeyboardInterrupt:
        parser.exit(130, f"prepare_text: interrupted; {_way_on(options)}\n")


def _way_on(options: argparse.Namespace) -> str:
    """What the user can do after an interruption."""
    return "the same command goes on" if (options.out / PROGRESS).exists() else "start it again"


def prepare(options: argparse.Namespace) -> None:
    """Write the files that the options ask for. Raises ValueError or OSError with one line."""
    if not (0 < options.valid_percent <= 50 and options.sample_mb > 0 and options.workers > 0 and options.shard_mb >= 0):
        raise ValueError("it takes 0 < valid_percent <= 50, sample_mb > 0, workers > 0 and shard_mb >= 0")
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))  # for the training of the tokenizer
    sources, validation_sources = _find(options)
    trained_on = {source.identity for source in sources}
    if both := [source.name for source in validation_sources if source.identity in trained_on]:
        raise ValueError(f"{both[0]} is both training and validation text; give others")
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        _prepare(options, sources, validation_sources)


def _find(options: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """(training sources, validation sources); the latter are empty if a part of the training text is to be held out."""
    splits, notes = find_splits(options.inputs, options.valid, test=False)
    for note in notes:
        print(note)
    return splits["train"], splits.get("validation", [])


def _check_out(options: argparse.Namespace) -> None:
    """ValueError if --out has results that may not be replaced, and this call does not continue them."""
    results = ("train", "train.ids", "valid", "valid.ids")
    # Without --shard_mb, valid.ids does not count: a call that was killed just before its end has left it alone.
    there = [options.out / name for name in results[: 4 if options.shard_mb else 3] if (options.out / name).exists()]
    if there and not options.overwrite and not (options.shard_mb and (options.out / PROGRESS).exists()):
        raise ValueError(f"{there[0]} is there already; choose another --out, or add --overwrite")


def _prepare(options: argparse.Namespace, sources: list[Source], validation_sources: list[Source]) -> None:
    """Get the tokenizer, encode the text, write the files, and print what was written. --out is locked."""
    _check_out(options)
    empty_rows: Counter[str] = Counter()

    def parts(on_read: OnRead = no_progress) -> Iterator[Part]:
        """All parts of the text, in order; the same ones at each call."""
        empty_rows.clear()
        share = 0.0 if validation_sources else options.valid_percent / 100
        piece = piece_size(_total(sources), share)
        yield from hold_out(units(sources, options.column, on_read, piece, empty_rows), share)
        held_out = units(validation_sources, options.column, on_read, empty_rows=empty_rows)
        yield from (Part(unit.text, True, unit.ends, False) for unit in held_out)

    tokenizer = _tokenizer(options, sources, parts)
    tokenizer_json = tokenizer.to_str()
    target = options.out / "tokenizer.json"
    if target.exists() and target.read_text(encoding="utf-8") != tokenizer_json and not options.overwrite:
        raise ValueError(f"{target} is there already and is another one; choose another --out, or add --overwrite")
    entries = vocabulary_size(tokenizer)
    dtype = "uint16" if entries <= 2**16 else "uint32"
    facts = {
        "dtype": dtype,
        "vocabulary": entries,
        "end_of_text": end_of_text_id(tokenizer),
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
    }
    all_sources = sources + validation_sources
    with tqdm(total=_total(all_sources), unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only

        def encoded(skipped: int) -> Encoded:
            return _encoded(islice(_tasks(parts(bar.update)), skipped, None), tokenizer_json, dtype, options.workers)

        if options.shard_mb:
            begun = {"made_from": _settings(options, sources, validation_sources, tokenizer_json), "command": options.command}
            tasks = max(1, round(options.shard_mb * 1e6 / TASK_CHARACTERS))
            counts = write_shards(options.out, facts, encoded, tokenizer_json, begun, tasks, options.overwrite)
        else:
            counts = write_files(options.out, facts, encoded(0), tokenizer_json)
    for name, count in empty_rows.items():
        print(f"{name}: {count:,} rows without text passed over")
    _print_results(counts, entries, dtype, _total(all_sources))


def _print_results(counts: dict[Path, int], entries: int, dtype: str, size: int | None) -> None:
    """Print the ids of each path, the size of the vocabulary, and a command that trains on them; `size`: bytes of input."""
    for path, count in counts.items():
        print(f"{path}: {count:,} tokens ({dtype})")
    print(f"{entries:,} entries" + (f", {size / sum(counts.values()):.2f} bytes of input a token" if size else ""))
    train, valid = counts
    print(
        f"Train: accelerate launch {path_of('recipes/tinystories_lm.py')} --train_data_path {train} "
        f"--val_data_path {valid} --vocab_size {entries}"
    )


def _settings(options: argparse.Namespace, train: list[Source], validation: list[Source], tokenizer_json: str) -> str:
    """Hash of everything that decides which ids are in which shard: sources, tokenizer and options."""
    sources = (*train, *validation)
    files = [[[[path.name, *signature(path)] for path in one.files], one.name, one.split] for one in sources]
    commits = [open_data_set(one.name).commit for one in sources if one.split and not one.files]
    settings = [files, commits, len(train), tokenizer_json, options.valid_percent, options.column, options.shard_mb]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _total(sources: list[Source]) -> int | None:
    """Bytes of all sources; None if one of them is on the hub."""
    sizes = [source.size_bytes for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _tokenizer(options: argparse.Namespace, sources: list[Source], parts: Callable[..., Iterator[Part]]) -> Tokenizer:
    """The tokenizer of --tokenizer, or one trained on at most --sample_mb of the training text."""
    if options.tokenizer != "train":
        return existing_tokenizer(options.tokenizer)
    limit, size = options.sample_mb * 1e6, _total(sources)
    every = 1 if size is None else max(1, math.ceil(size / limit))
    used = 0

    def sample() -> Iterator[str]:
        nonlocal used
        for number, part in enumerate(parts()):
            if used > limit:
                return
            if number % every == 0 and not part.held_out:
                used += len(part.text)
                yield part.text

    trained = train_tokenizer(sample(), options.vocab_size)
    which = "the first documents" if size is None else f"one document in {every}" if every > 1 else "all documents"
    print(f"Tokenizer: {trained.get_vocab_size():,} entries, trained on {which}, {used / 1e6:,.1f} M characters")
    return trained


def _tasks(stream: Iterable[Part]) -> Iterator[Task]:
    """Group the parts into tasks of about TASK_CHARACTERS, the same for any number of workers."""
    task: Task = []
    size = 0
    for part in stream:
        task.append(part)
        size += len(part.text)
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    yield task


def _encoded(tasks: Iterator[Task], tokenizer_json: str, dtype: str, workers: int) -> Encoded:
    """(training ids, validation ids) of each task, in order. At most 2 x `workers` + 1 tasks are in memory."""
    if workers == 1:
        encoder = Encoder(tokenizer_json, dtype)
        yield from (encode(encoder, task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the tokenizer library's running threads
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, dtype)) as pool:
        waiting: deque[Future[tuple[bytes, bytes]]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_encode_in_worker, task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_encoder: Encoder


def _start_worker(tokenizer_json: str, dtype: str) -> None:
    """Set up a worker process with an encoder of its own. It ignores Ctrl-C and ends with its parent."""
    from trainer.distributed.signals import die_with_parent

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    global _encoder
    _encoder = Encoder(tokenizer_json, dtype)


def _encode_in_worker(task: Task) -> tuple[bytes, bytes]:
    return encode(_encoder, task)


def encode(encoder: Encoder, task: Task) -> tuple[bytes, bytes]:
    """(training ids, validation ids) of a task, in the encoder's dtype, with end-of-text ids between documents."""
    train: list[bytes] = []
    valid: list[bytes] = []
    for part, ids in zip(task, encoder([part.text for part in task]), strict=True):
        if part.gap:
            train.append(encoder.end_of_text)
        (valid if part.held_out else train).extend([ids, encoder.end_of_text] if part.end else [ids])
    return b"".join(train), b"".join(valid)


if __name__ == "__main__":
    main()
