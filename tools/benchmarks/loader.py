"""Tokens per second of the language model's loader on one core, beside batches drawn slice by slice; one interleaved run.

Also measured: the time and bytes read to open a huge file of ids with its .json, and the memory of drawing from 10^11 ids; the
order of a finite set, beside numpy's permutation; and a batch of photographs, beside one that is normalised image by image in
fp32.

The comparison does what many small training scripts do: map the file again for each batch, draw starts with torch, and stack
inputs and labels from a slice each, widened to int64. With a map that is kept, which is measured too, the pages that were read
stay in the memory of the process. Seconds are CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.data.image_batches import ImageBatches
from recipes.data.image_folder import FolderImages
from recipes.data.image_pixels import from_0_to_1
from recipes.data.token_sets import Mixture, find_files
from recipes.data.token_streams import open_streams
from recipes.data.token_windows import RandomWindows
from trainer.command_line.sections import Run
from trainer.data import loader, stream


def main(arguments: list[str]) -> None:
    """Prints a line per way of drawing batches: the median of the rounds, and the fastest and slowest."""
    parser = argparse.ArgumentParser(prog="benchmark.py loader", description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="ids in the file (uint16, random)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=400, help="batches a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.ids")
        random = np.random.default_rng(0)
        with path.open("wb") as file:
            for start in range(0, options.tokens, 10_000_000):
                random.integers(0, 10_000, min(10_000_000, options.tokens - start), dtype=np.uint16).tofile(file)
        measure(path, options)
        measure_known(Path(folder, "sparse.ids"), options)
    measure_order()
    with tempfile.TemporaryDirectory() as folder:
        measure_images(Path(folder), options.rounds)


def measure_known(path: Path, options: argparse.Namespace) -> None:
    """CPU time of opening, bytes read and memory, for sparse files of 20 and 200 GB whose .json says all that is checked."""
    for gigabytes in (20, 200):
        with path.open("wb") as file:
            file.truncate(gigabytes * 10**9)
        facts = {"dtype": "uint16", "count": gigabytes * 10**9 // 2, "digest": "0" * 64, "largest_id": 9999}
        path.with_name(f"{path.name}.json").write_text(json.dumps(facts))
        started, before, read = time.process_time(), resident_mb(), bytes_read()
        streams = open_streams([(str(path), 1.0)], [(str(path), 1.0)], None, 10_000, options.context_length)
        seconds, read = time.process_time() - started, bytes_read() - read
        windows = RandomWindows(streams.train, options.context_length, seed=0)
        for start in range(0, 100 * options.batch_size, options.batch_size):
            windows.__getitems__(list(range(start, start + options.batch_size)))
        print(
            f"a known file of {gigabytes} GB: open and checked in {seconds * 1000:.1f} ms CPU, {read:,} bytes read; "
            f"{resident_mb() - before:.1f} MB more memory after 100 batches"
        )


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def bytes_read() -> int:
    """Bytes that this process has read so far, from files or their cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure_order() -> None:
    """CPU nanoseconds per item of the order of an epoch, computed in the blocks that training uses, beside numpy's."""
    for length in (10**7, 10**12):
        started = time.process_time()
        for start in range(0, 200 * stream.BLOCK, stream.BLOCK):
            stream.sample_numbers(np.arange(start, start + stream.BLOCK), 0, length)
        nanoseconds = (time.process_time() - started) / 200 / stream.BLOCK * 1e9
        print(f"order of {length:,} items: {nanoseconds:.0f} ns an item, no memory")
    started = time.process_time()
    permutation = np.random.RandomState(0).permutation(10**7)
    seconds = time.process_time() - started
    print(f"numpy's permutation of 10,000,000: {seconds * 100:.0f} ns an item, {permutation.nbytes / 1e6:.0f} MB")


def measure_images(root: Path, rounds: int) -> None:
    """CPU time per image, and size of a batch, for 64 JPEGs of 500 x 375 pixels that are scaled and cropped to 224 x 224."""
    random = np.random.RandomState(0)
    for i in range(64):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = random.randint(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    items = FolderImages(root, (224, 224), 3, ["a", "b"])
    batches, numbers = ImageBatches((items, np.arange(64)), 2), list(range(64))

    def one_by_one() -> torch.Tensor:
        return torch.stack([(from_0_to_1(items[i][0]) - 0.5) / 0.5 for i in numbers])

    ways = {"8 bits": lambda: batches.__getitems__(numbers)["images"], "normalised one by one": one_by_one}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            started = time.process_time()
            size = read().nbytes / 1e6
            seconds[name].append(time.process_time() - started)
            if len(seconds[name]) == rounds:
                print(f"64 photographs, {name}: {statistics.median(seconds[name]) / 64e-3:.2f} ms an image, {size:.1f} MB")


def measure(path: Path, options: argparse.Namespace) -> None:
    """Tokens per CPU second of each way to draw batches. They take turns, so that a slow minute of the machine affects all."""
    size, length = options.batch_size, options.context_length
    windows = RandomWindows(Mixture((find_files(str(path), 10_000),), (1.0,)), length, seed=0)
    mapped = np.memmap(path, np.uint16, "r")
    numbers = (list(range(start, start + size)) for start in itertools.count(step=size))
    order = stream.TrainingOrder(size, 0, 1, 0, None, 0)
    reader = loader.read(windows, order, Run(num_workers=0), torch.device("cpu"))
    ways: dict[str, Callable[[], object]] = {
        "sliced and stacked, map per batch": lambda: sliced_and_stacked(np.memmap(path, np.uint16, "r"), size, length),
        "sliced and stacked, map kept": lambda: sliced_and_stacked(mapped, size, length),
        "RandomWindows": lambda: windows.__getitems__(next(numbers)),
        "RandomWindows in the trainer's loader": lambda: next(reader),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, draw in ways.items():
            started = time.process_time()
            for _ in range(options.batches):
                draw()
            speeds[name].append(options.batches * size * length / (time.process_time() - started) / 1e6)
    base = statistics.median(next(iter(speeds.values())))
    print(f"{options.tokens:,} ids; batches of {size} x {length}; {options.rounds} rounds of {options.batches}; one thread")
    for name, measured in speeds.items():
        median = statistics.median(measured)
        print(f"{name:40s} {median:7.1f} M tokens/s (from {min(measured):.1f} to {max(measured):.1f}), {median / base:5.1f} x")


def sliced_and_stacked(ids: np.ndarray, batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels), int64 [batch, length] each, at random starts; as many small training scripts draw them."""
    starts = torch.randint(len(ids) - length, (batch_size,)).tolist()
    inputs = torch.stack([torch.from_numpy(ids[s : s + length].astype(np.int64)) for s in starts])
    labels = torch.stack([torch.from_numpy(ids[s + 1 : s + 1 + length].astype(np.int64)) for s in starts])
    return inputs, labels
