"""Pieces (b) and (j): what the loop adds to a step, how often the host waits for the device, and what the kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_pieces.contenders import Contender, free, interleave, wait_for
from benchmarks.gpu_pieces.language import gpt2, tinystories
from benchmarks.gpu_pieces.results import Result
from benchmarks.gpu_pieces.sessions import OurLoop, Place, bare_loop

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense", "aten::item")
"""calls in which the host reads, or waits for, the device"""


def profiled(contender: Contender, device: torch.device, steps: int) -> list[Any]:
    """The profiler's averages by name (`key_averages`) over `steps` steps, recorded in the thread that takes them."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    recorded: list[profile] = []

    def within() -> profile:
        recorded.append(profile(activities=activities))
        return recorded[0]

    with profile(activities=activities):  # starts its library, which takes time, in the thread that imported torch
        wait_for(device)
    contender.run(steps, within)
    wait_for(device)
    return list(recorded[0].key_averages())


def piece_b(place: Place) -> Result:
    """Our loop beside a bare one, on a model so small that the host limits the speed: time, waits and operations of a step."""
    result = Result()
    small = {"d_model": 128, "num_layers": 2, "num_heads": 2, "d_ff": 256, "batch_size": 8}
    recipe, config = tinystories(place, **place.size(small, {}), compile="no")
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: OurLoop(recipe, config, place.launch, place.new_folder()),
        "bare": lambda: bare_loop(recipe, config, place.launch, compile_mode=None),
        "bare again": lambda: bare_loop(recipe, config, place.launch, compile_mode=None),
    }
    rounds, steps = place.size((15, 40), (2, 2))
    measured = interleave(makers, place.device, rounds, steps, place.size(20, 1), required="ours", until=place.until)
    result.add("ours above bare, small model", 1e6 * (measured.median("ours") - measured.median("bare")), "us a step", "40")
    result.add(
        "bare again above bare (the noise)", 1e6 * (measured.median("bare again") - measured.median("bare")), "us a step"
    )
    result.add("ours / bare, speed, small model", measured.ratio("ours", "bare"), "x")
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    steps = place.size(20, 2)
    for name in ("ours", "bare"):
        contender = makers[name]()
        contender.run(place.size(5, 1))
        averages = profiled(contender, place.device, steps)
        contender.close()
        counts = {event.key: event.count for event in averages}
        operations = sum(n for key, n in counts.items() if key.startswith("aten::"))
        result.add(f"{name}, operations", operations / steps, "a step")
        for wait in WAITS:
            # The profiler itself waits for the device once, at its end.
            result.add(f"{name}, {wait}", counts.get(wait, 0) / steps, "a step", "0" if name == "ours" else "")
        result.details[f"{name}: CUDA calls a step"] = {
            key: n / steps for key, n in sorted(counts.items()) if key.startswith(("cuda", "cuLaunch"))
        }
    return result


def piece_j(place: Place) -> Result:
    """The ten kernels (on a CPU: operations) that take most of a GPT-2 step, and the five that exceed a bare loop's most."""
    result = Result()
    batch_size = int(place.results.figure("a", "batch") or place.size(32, 2))
    recipe, config = gpt2(place, batch_size)
    ours = kernels_ms(OurLoop(recipe, config, place.launch, place.new_folder()), place)
    bare = kernels_ms(bare_loop(recipe, config, place.launch), place)
    kind = "kernels" if place.device.type == "cuda" else "operations"
    result.add(f"all {kind}", total := sum(ours.values()), "ms a step")
    result.add(f"all {kind} of a bare loop", sum(bare.values()), "ms a step")
    for name, ms in largest(ours, 10).items():
        result.add(name[:52], ms / total, "of it")
    for name, ms in largest({name: ours[name] - bare.get(name, 0.0) for name in ours}, 5).items():
        result.add(f"above bare: {name[:40]}", ms, "ms a step")
    result.details[f"{kind}, ms a step"] = {"ours": largest(ours, 30), "bare": largest(bare, 30)}
    return result


def largest(values: dict[str, float], count: int) -> dict[str, float]:
    """The `count` largest entries, largest first."""
    return dict(sorted(values.items(), key=lambda entry: -entry[1])[:count])


def kernels_ms(contender: Contender, place: Place) -> dict[str, float]:
    """{kernel (on a CPU: operation): milliseconds per step}. Closes the contender."""
    on_gpu, steps = place.device.type == "cuda", place.size(5, 2)
    contender.run(place.size(5, 1))
    averages = profiled(contender, place.device, steps)
    contender.close()
    free(place.device)
    if on_gpu:
        # Without annotated ranges, which would count the kernels inside them twice.
        averages = [e for e in averages if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in averages}
    return {name: time_us / steps / 1000 for name, time_us in times.items()}
