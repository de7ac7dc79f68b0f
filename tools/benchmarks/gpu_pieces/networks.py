"""Pieces (d), (e) and (f): the PFN, the Vision Transformer and Collatz."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_pieces.contenders import Contender, interleave
from benchmarks.gpu_pieces.results import Result
from benchmarks.gpu_pieces.sessions import OurLoop, Place, bare_loop, configured
from recipes.pfn_raventos import PFNRaventos
from recipes.vit_relpos import VitRelpos
from trainer.distributed.hardware import peak_flops
from trainer.recipe import Data


def pfn(place: Place, models: int = 0, **values: Any) -> tuple[PFNRaventos, Any]:
    """(recipe, configuration) of the defaults, compiled; `models`: how many are stacked (0: a single one)."""
    small = {"d_model": 16, "examples": 6, "task_size": 3, "d_vocab": 8, "batch_size": 4}
    pools = {"stack": tuple(2**i for i in range(models))} if models else {}
    return PFNRaventos(), configured(PFNRaventos(), **({"compile": "yes"} | place.size({}, small) | pools | values))


def piece_d(place: Place) -> Result:
    """A step of 16 models stacked in one network, beside 16 times a step of one; also with CUDA graphs, in a bare loop."""
    # CUDA graphs work in the thread that imports this: import it in the thread that takes the steps of `StepsHere`.
    importlib.import_module("torch._inductor.cudagraph_trees")
    result, models = Result(), place.size(16, 3)
    one, stacked = pfn(place), pfn(place, models)
    graphs = place.size("reduce-overhead", "default")
    makers: dict[str, Callable[[], Contender]] = {
        "stacked": lambda: OurLoop(*stacked, place.launch, place.new_folder()),
        "one": lambda: OurLoop(*one, place.launch, place.new_folder()),
        "one, CUDA graphs": lambda: bare_loop(*one, place.launch, graphs),
        "stacked, CUDA graphs": lambda: bare_loop(*stacked, place.launch, graphs),
    }
    rounds, steps = place.size((8, 10), (2, 2))
    measured = interleave(makers, place.device, rounds, steps, place.size(5, 1), required="stacked", until=place.until)
    result.notes += measured.notes()
    for name in measured.seconds:
        result.add(f"{name}, a step", 1000 * measured.median(name), "ms")
        if name in measured.peak_gib:
            result.add(f"{name}, peak memory", measured.peak_gib[name], "GiB")
    for faster, slower in (("stacked", "one"), ("stacked, CUDA graphs", "one, CUDA graphs"), ("stacked", "one, CUDA graphs")):
        if faster in measured.seconds and slower in measured.seconds:
            goal = "4" if (faster, slower) == ("stacked", "one") else ""
            result.add(f"{faster} / {models} in turn ({slower})", models * measured.ratio(faster, slower), "x", goal)
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    return result


class ImagesOnDevice:
    """Normal noise in the shape of images that stays on the model's device, so that no loading is measured."""

    on_device = True

    def __init__(self, images: int, side: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, 3, side, side, generator=generator)
        self.labels = torch.randint(classes, (images,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        """Move all images and labels to the device."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A slice that begins at the first number, because a list of indices would be copied to the device."""
        first = numbers[0] % max(1, len(self) - len(numbers) + 1)
        return {"images": self.images[first : first + len(numbers)], "labels": self.labels[first : first + len(numbers)]}


class SyntheticVit(VitRelpos):
    """The recipe on images of noise."""

    def build_data(self, config: Any) -> Data:
        """Training data of four batches; no evaluation sets."""
        side, classes = config.data.image_size, config.data.num_classes
        images = ImagesOnDevice(4 * config.optimisation.batch_size, side, classes)
        return Data(images, {}, fingerprint="noise", extra={"classes": [str(i) for i in range(classes)]})


def vit(place: Place, relative: bool = True, **values: Any) -> tuple[SyntheticVit, Any]:
    """(recipe, configuration) of ViT-B/16 at 224 pixels without dropout, compiled; a small ViT in a rehearsal."""
    base = {"d_model": 768, "num_layers": 12, "num_heads": 12, "image_size": 224, "num_classes": 1000, "batch_size": 128}
    small = {"d_model": 16, "num_layers": 2, "num_heads": 2, "image_size": 32, "num_classes": 5, "batch_size": 4}
    shared = {"patch_size": 16, "dropout": 0.0, "relative_position": relative, "compile": "yes"}
    return SyntheticVit(), configured(SyntheticVit(), **(shared | place.size(base, small) | values))


def piece_e(place: Place) -> Result:
    """Images per second, MFU and memory with relative position bias and without."""
    result = Result()
    recipe, config = vit(place)
    with_bias, without = (recipe, config), vit(place, relative=False)
    makers: dict[str, Callable[[], Contender]] = {
        "relative": lambda: OurLoop(*with_bias, place.launch, place.new_folder()),
        "plain": lambda: OurLoop(*without, place.launch, place.new_folder()),
    }
    rounds, steps = place.size((8, 8), (2, 2))
    measured = interleave(makers, place.device, rounds, steps, place.size(4, 1), required="relative", until=place.until)
    result.notes += measured.notes()
    with torch.device("meta"):
        network = recipe.build_model(config, Data(None, {}, extra={"classes": ["0"] * config.data.num_classes}))
    flops, peak = recipe.flops_per_item(config, network), peak_flops(place.device, "bf16")
    for name in measured.seconds:
        rate = config.optimisation.batch_size / measured.median(name)
        result.add(f"{name}, images/s", rate, "")
        if peak:
            result.add(f"{name}, MFU", rate * flops / peak, "")
        if name in measured.peak_gib:
            result.add(f"{name}, peak memory", measured.peak_gib[name], "GiB")
    if "plain" in measured.seconds:
        result.add("relative / plain, speed", measured.ratio("relative", "plain"), "x", "0.97")
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    return result


def collatz(place: Place, **values: Any) -> tuple[Any, Any]:
    """(recipe, configuration) of the defaults, compiled; small in a rehearsal. `values`: other flags. ModuleNotFoundError
    without numba, which the generator of numbers needs."""
    import numba  # noqa: F401

    from recipes.collatz import Collatz

    small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "max_len": 60, "prefix_len": 12, "batch_size": 8}
    settings = {"compile": "yes", "val_numbers": 16} | place.size({}, small)
    return Collatz(), configured(Collatz(), **(settings | values))


def piece_f(place: Place) -> Result:
    """Steps per second with the recipe's number of data workers, the share of the time spent waiting for them, and steps per
    second of a bare loop that generates its batches itself."""
    from recipes.collatz import NUM_WORKERS

    result, workers = Result(), place.size(max(1, NUM_WORKERS), 1)
    recipe, config = collatz(place, num_workers=workers)
    stamps: list[tuple[float, float]] = []
    """after each step: (the time, seconds spent waiting for data so far)"""

    def make() -> Contender:
        waited, loop = 0.0, OurLoop(recipe, config, place.launch, place.new_folder())
        assert loop.training is not None
        logger = loop.training.logger
        add = logger.add_data_seconds

        def count(seconds: float) -> None:
            nonlocal waited
            waited += seconds
            add(seconds)

        logger.add_data_seconds = count  # type: ignore[method-assign]
        loop.on_step = lambda: stamps.append((time.perf_counter(), waited))
        return loop

    makers: dict[str, Callable[[], Contender]] = {
        "ours": make,
        "bare loop, generating in between": lambda: bare_loop(*collatz(place), place.launch),
    }
    rounds, steps, warmup = place.size((2, 120, 5), (2, 4, 1))
    measured = interleave(makers, place.device, rounds, steps, warmup, required="ours", until=place.until)
    result.notes += measured.notes()
    for name in measured.seconds:
        result.add(f"{name}, steps/s", 1 / measured.median(name), "")
    # The second half of each round only: the workers have filled their queues while the other contender ran.
    halves = [(stamps[end - steps // 2 - 1], stamps[end - 1]) for end in range(warmup + steps, len(stamps) + 1, steps)]
    shares = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in halves]
    result.add("ours, time spent waiting for data", statistics.median(shares), "of it")
    result.add("ours, data workers", workers, "")
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    return result
