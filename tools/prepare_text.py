"""Turns text into the token ids that recipes/tinystories_lm.py reads, in memory that does not grow with the text.

python tools/prepare_text.py stories-train.txt --valid stories-valid.txt --out data --vocab_size 10000
python tools/prepare_text.py 'corpus/*.jsonl' --out data --tokenizer gpt2        # holds out 1 % for validation

INPUT is a text file, JSONL, parquet (each compressed or not), a pattern in quotes, a folder of such files or one that
`datasets` saved, whose names tell the splits, or OWNER/NAME[:CONFIGURATION] of the Hugging Face hub. In text files
<|endoftext|> separates documents; a file without it is one document. Every document ends in <|endoftext|> in the ids; else
text is kept as it is.
Writes train.ids, valid.ids (each with a .json beside it) and tokenizer.json, each atomically.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from recipes.data.corpus import Part, hold_out, piece_size, units
from recipes.data.encoding import Encoder
from recipes.data.text_files import Read, no_progress
from recipes.data.text_sources import Source, find_sources, find_splits
from recipes.data.tokenizer import existing_tokenizer, train_tokenizer, vocabulary_size
from trainer.command_line.locations import argument_path
from trainer.distributed.hardware import cores
from trainer.errors import path_of

Task = list[Part]
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
    add("--overwrite", action="store_true", help="replace what an earlier call left in --out")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same cleanup as after Ctrl-C
    try:
        prepare(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"prepare_text: {' '.join(str(error).split())}\n")
    except BrokenProcessPool:
        parser.exit(2, "prepare_text: a worker was killed, perhaps for want of memory; try fewer --workers\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare_text: interrupted; nothing was written\n")


def prepare(options: argparse.Namespace) -> None:
    """Prepare all files. Raises ValueError or OSError with one line."""
    if not (0 < options.valid_percent <= 50 and options.sample_mb > 0 and options.workers > 0):
        raise ValueError("it takes 0 < valid_percent <= 50, sample_mb > 0 and workers > 0")
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))  # what the tokenizer's training runs on
    sources, validation_sources = _find(options)
    if both := set(sources) & set(validation_sources):
        raise ValueError(f"{both.pop().name} is both training and validation text; give others")
    options.out.mkdir(parents=True, exist_ok=True)
    with _locked(options.out):
        _prepare(options, sources, validation_sources)


def _find(options: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """What to train on, and what to validate on: nothing, where a part of the first is to be held out."""
    sources: list[Source] = []
    validation = find_sources(options.valid, hub_split="validation")
    for name in options.inputs:
        if not argument_path(name).is_dir():
            sources += find_sources([name])
            continue
        splits, notes = find_splits(name)
        for note in notes:
            print(note)
        sources += splits["train"]
        if not options.valid:
            validation += splits.get("validation", [])
    return sources, validation


def _prepare(options: argparse.Namespace, sources: list[Source], validation_sources: list[Source]) -> None:
    if (options.out / "train.ids").exists() and not options.overwrite:
        raise ValueError(f"{options.out / 'train.ids'} is there already; choose another --out, or add --overwrite")

    without: Counter[str] = Counter()

    def parts(read: Read = no_progress) -> Iterator[Part]:
        """All parts of the text, in order."""
        without.clear()
        share = 0.0 if validation_sources else options.valid_percent / 100
        piece = piece_size(_total(sources), share)
        yield from hold_out(units(sources, options.column, read, piece, without), share)
        held_out = units(validation_sources, options.column, read, without=without)
        yield from (Part(unit.text, True, unit.ends, False) for unit in held_out)

    tokenizer_json = _tokenizer(options, sources, parts)
    target = options.out / "tokenizer.json"
    if target.exists() and target.read_text(encoding="utf-8") != tokenizer_json and not options.overwrite:
        raise ValueError(f"{target} is there already and is another one; choose another --out, or add --overwrite")
    from tokenizers import Tokenizer

    entries = vocabulary_size(Tokenizer.from_str(tokenizer_json))
    dtype = "uint16" if entries <= 2**16 else "uint32"
    facts = {"dtype": dtype, "vocabulary": entries, "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest()}
    files = {name: _Output(options.out / f"{name}.ids", facts) for name in ("valid", "train")}
    try:
        with tqdm(
            total=_total(sources + validation_sources), unit="B", unit_scale=True, disable=None
        ) as bar:  # on a terminal only
            for train, valid in _encoded(_tasks(parts(bar.update)), tokenizer_json, dtype, options.workers):
                files["train"].write(train)
                files["valid"].write(valid)
        for name, file in files.items():
            if not file.count:
                raise ValueError(f"there is no text for {name}: give more documents, or --valid INPUT")
        _replace(target, tokenizer_json.encode())
        for file in files.values():  # train.ids last: if it exists, all of them do
            file.commit()
    finally:
        for file in files.values():
            file.discard()
    for name, count in without.items():
        print(f"{name}: {count:,} rows without text passed over")
    size, ids = _total(sources + validation_sources), sum(file.count for file in files.values())
    for name in ("train", "valid"):
        print(f"{files[name].path}: {files[name].count:,} tokens ({dtype})")
    print(f"{entries:,} entries" + (f", {size / ids:.2f} bytes of input a token" if size else ""))
    print(
        f"Train: accelerate launch {path_of('recipes/tinystories_lm.py')} --train_data_path {files['train'].path} "
        f"--val_data_path {files['valid'].path} --vocab_size {entries}"
    )


def _total(sources: list[Source]) -> int | None:
    """Bytes of all sources; None if one is at the hub."""
    sizes = [source.size_bytes for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _tokenizer(options: argparse.Namespace, sources: list[Source], parts: Callable[..., Iterator[Part]]) -> str:
    """tokenizer.json: the one of --tokenizer, or one trained on a part of the training text that fits into memory."""
    if options.tokenizer != "train":
        return existing_tokenizer(options.tokenizer).to_str()
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
    return trained.to_str()


def _tasks(stream: Iterable[Part]) -> Iterator[Task]:
    """Groups of parts, a megabyte each: the same ones for any number of workers."""
    task: Task = []
    size = 0
    for part in stream:
        task.append(part)
        size += len(part.text)
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    yield task


def _encoded(tasks: Iterator[Task], tokenizer_json: str, dtype: str, workers: int) -> Iterator[tuple[bytes, bytes]]:
    """(training ids, validation ids) of each task, in order; only a few tasks are held at a time."""
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
    """Set up a worker: it ends with the parent process, ignores Ctrl-C, and has its own encoder."""
    from trainer.distributed.signals import die_with_parent

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    global _encoder
    _encoder = Encoder(tokenizer_json, dtype)


def _encode_in_worker(task: Task) -> tuple[bytes, bytes]:
    return encode(_encoder, task)


def encode(encoder: Encoder, task: Task) -> tuple[bytes, bytes]:
    """(training ids, validation ids) of a group of parts."""
    train: list[bytes] = []
    valid: list[bytes] = []
    for part, ids in zip(task, encoder([part.text for part in task]), strict=True):
        if part.gap:
            train.append(encoder.end_of_text)
        (valid if part.held_out else train).extend([ids, encoder.end_of_text] if part.end else [ids])
    return b"".join(train), b"".join(valid)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes; ValueError if one holds it. However this process ends, the kernel unlocks it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        os.fsync(handle)
    except BlockingIOError:
        raise ValueError(f"another prepare_text writes to {folder}; wait for it, or choose another --out") from None
    finally:
        os.close(handle)


class _Output:
    """A file of ids under a temporary name, until `commit`."""

    def __init__(self, path: Path, facts: dict[str, object]) -> None:
        self.path, self.facts = path, facts
        self.width = 2 if facts["dtype"] == "uint16" else 4
        self.temporary = path.with_name(f".{path.name}.unfinished")
        self.file = self.temporary.open("wb")
        self.count = 0

    def write(self, ids: bytes) -> None:
        """Append."""
        self.file.write(ids)
        self.count += len(ids) // self.width

    def commit(self) -> None:
        """Rename it to its final name once it is on disk, after the .json beside it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        _replace(self.path.with_name(f"{self.path.name}.json"), json.dumps({**self.facts, "count": self.count}).encode())
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Remove what was not committed."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
