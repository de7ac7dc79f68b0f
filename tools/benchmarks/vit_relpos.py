"""The cost of relative position bias: images/s of training with it over without, interleaved; attention kernels and MFU.

python tools/benchmark.py vit_relpos                 # ViT-B/16 at 224, bf16 and compiled on a GPU
python tools/benchmark.py vit_relpos --small         # for a CPU
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from recipes.models.vit import VisionTransformer
from trainer.distributed.hardware import peak_flops

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "num_classes": 10, "embed_dim": 96, "depth": 4, "num_heads": 4}
KERNELS = ("flash", "efficient", "cudnn", "fmha", "_scaled_dot_product_attention_math")


def training_step(relative: bool, small: bool, batch_size: int, device: torch.device, compiled: bool) -> tuple[Callable, float]:
    """(a function that does forward, backward and AdamW on one fixed batch, FLOPs of an image)."""
    torch.manual_seed(0)
    model = VisionTransformer(**(SMALL if small else {}), use_relative_position=relative).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    side, classes = (SMALL["img_size"], SMALL["num_classes"]) if small else (224, 1000)
    images = torch.randn(batch_size, 3, side, side, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return cross_entropy(model(images).float(), labels)

    forward = torch.compile(loss) if compiled else loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model.training_flops()


def seconds(step: Callable, steps: int, device: torch.device) -> float:
    """Wall-clock seconds of one step, averaged over `steps`."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def attention_kernels(step: Callable, device: torch.device) -> str:
    """Names of the attention operators or kernels that a step runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        _wait(device)
    names = {event.key for event in profile.key_averages() if any(kernel in event.key.lower() for kernel in KERNELS)}
    return ", ".join(sorted(name[:80] for name in names)) or "none recognised"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str]) -> None:
    """Print images per second and MFU with and without the bias, the attention kernels, and the ratio."""
    parser = argparse.ArgumentParser(prog="benchmark.py vit_relpos", description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model of 64 patches instead of ViT-B/16")
    parser.add_argument("--batch_size", type=int, default=None, help="default: 128, small 32")
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each model, in turn")
    parser.add_argument("--no_compile", action="store_true")
    flags = parser.parse_args(arguments)
    if min(flags.steps, flags.rounds, flags.batch_size or 1) < 1:
        parser.error("steps, rounds and batch_size must be above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = flags.batch_size or (32 if flags.small else 128)
    compiled = device.type == "cuda" and not flags.no_compile
    steps, flops = {}, {}
    for name, relative in (("with", True), ("without", False)):
        steps[name], flops[name] = training_step(relative, flags.small, batch_size, device, compiled)
        seconds(steps[name], 3, device)  # compiles, and warms up
        print(f"attention {name} relative bias: {attention_kernels(steps[name], device)}")
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(flags.rounds):
        for name, step in steps.items():
            measured[name].append(seconds(step, flags.steps, device))
    peak = peak_flops(device, "bf16")
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{kind}; batch {batch_size}; {'bf16' if device.type == 'cuda' else 'fp32'}{', compiled' if compiled else ''}")
    for name, times in measured.items():
        rate = batch_size / statistics.median(times)
        mfu = f", MFU {rate * flops[name] / peak:.1%}" if peak else ""
        spread = f"{batch_size / max(times):.1f} to {batch_size / min(times):.1f}"
        print(f"{name} relative bias: {rate:.1f} images/s (median of {flags.rounds}, {spread}){mfu}")
    ratios = [without / with_bias for with_bias, without in zip(measured["with"], measured["without"], strict=True)]
    print(f"with over without: {statistics.median(ratios):.3f} (median of {flags.rounds} pairs)")
