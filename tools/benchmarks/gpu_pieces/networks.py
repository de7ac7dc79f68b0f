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
    """(recipe, configuration): its defaults, compiled; `models` of them stacked, or one."""
    small = {"d_model": 16, "examples": 6, "task_size": 3, "d_vocab": 8, "batch_size": 4}
    pools = {"stack": tuple(2**i for i in range(models))} if models else {}
    return PFNRaventos(), configured(PFNRaventos(), **({"compile": "yes"} | place.size({}, small) | pools | values))


def piece_d(place: Place) -> Result:
    """Sixteen models as one network, beside one of them, compiled; both with CUDA graphs too, in a bare loop."""
    # CUDA graphs are kept for the thread that imports this: let it be the one that takes the steps of `StepsHere`.
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
    """Normal noise in the form of images, made once where the model is: the loader has no part in what is measured."""

    on_device = True

    def __init__(self, images: int, side: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, 3, side, side, generator=generator)
        self.labels = torch.randint(classes, (images,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        """Keep them there from now on."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A slice from the first number on: an index would be copied to the device."""
        first = numbers[0] % max(1, len(self) - len(numbers) + 1)
        return {"images": self.images[first : first + len(numbers)], "labels": self.labels[first : first + len(numbers)]}


class SyntheticVit(VitRelpos):
    """The recipe, on images that are noise."""

    def build_data(self, config: Any) -> Data:
        """As many as four batches."""
        side, classes = config.data.image_size, config.data.num_classes
        images = ImagesOnDevice(4 * config.optimisation.batch_size, side, classes)
        return Data(images, {}, fingerprint="noise", extra={"classes": [str(i) for i in range(classes)]})


def vit(place: Place, relative: bool = True, **values: Any) -> tuple[SyntheticVit, Any]:
    """(recipe, configuration): ViT-B/16 at 224 pixels without dropout, compiled."""
    base = {"d_model": 768, "num_layers": 12, "num_heads": 12, "image_size": 224, "num_classes": 1000, "batch_size": 128}
    small = {"d_model": 16, "num_layers": 2, "num_heads": 2, "image_size": 32, "num_classes": 5, "batch_size": 4}
    shared = {"patch_size": 16, "dropout": 0.0, "relative_position": relative, "compile": "yes"}
    return SyntheticVit(), configured(SyntheticVit(), **(shared | place.size(base, small) | values))


def piece_e(place: Place) -> Result:
    """Images per second with relative position bias and without."""
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
    """(recipe, configuration): its defaults, compiled. ModuleNotFoundError without numba, which generates the numbers."""
    import numba  # noqa: F401

    from recipes.collatz import Collatz

    small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "max_len": 60, "prefix_len": 12, "batch_size": 8}
    settings = {"compile": "yes", "val_numbers": 16} | place.size({}, small)
    return Collatz(), configured(Collatz(), **(settings | values))


def piece_f(place: Place) -> Result:
    """Steps per second with the recipe's own number of data workers, the share of it spent waiting, and without workers."""
    from recipes.collatz import NUM_WORKERS

    result, workers = Result(), place.size(max(1, NUM_WORKERS), 1)
    recipe, config = collatz(place, num_workers=workers)
    stamps: list[tuple[float, float]] = []
    """after each step: (the time, seconds waited for data so far)"""

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
    # Of the second half of each round: while the other one runs, the workers fill their queues.
    halves = [(stamps[end - steps // 2 - 1], stamps[end - 1]) for end in range(warmup + steps, len(stamps) + 1, steps)]
    shares = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in halves]
    result.add("ours, time spent waiting for data", statistics.median(shares), "of it")
    result.add("ours, data workers", workers, "")
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    return result
