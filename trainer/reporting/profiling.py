"""`--profile N`: a trace of N steps, a table of the slowest operations, and a snapshot of GPU memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.reporting.console import Console

WARM_UP_STEPS = 3
"""steps before the trace: the first ones compile, allocate and choose kernels"""
ROWS = 10


class StepProfiler:
    """Records `steps` steps of this launch, after WARM_UP_STEPS others, into `folder`. Recording begins at once."""

    def __init__(self, steps: int, folder: Path, device: torch.device, console: Console) -> None:
        self.steps, self.folder, self.on_gpu, self.console = steps, folder, device.type == "cuda", console
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps kineto from printing that it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        timing = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=timing, on_trace_ready=self._write, record_shapes=True)
        self.profiler.start()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def step(self) -> None:
        """Call it after each step."""
        self.profiler.step()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, snapshot = self.folder / "trace.json.gz", self.folder / "memory.pickle"
        profiler.export_chrome_trace(str(trace))
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        lines = [f"Profile of {self.steps} steps on rank 0; the {ROWS} operations that take the most time:", table]
        lines.append(f"Trace: {trace} (open it at https://ui.perfetto.dev)")
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            lines.append(f"GPU memory, by when and where it was taken: {snapshot} (open it at https://pytorch.org/memory_viz)")
        self.console.log("\n".join(lines))
