"""The toy recipe, recording for each rank and micro-step its own losses, and how often gradients have been reduced before."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from toy_recipe import Config, ToyRecipe

from trainer.recipe import Batch, Data

reductions = 0
"""number of gradient buckets that have been reduced so far"""


def counted(group: Any, bucket: GradBucket) -> Future[Tensor]:
    """DDP's own reduction, counted. DDP checks the annotations, so they must not become strings (`from __future__`)."""
    global reductions
    reductions += 1
    return allreduce_hook(group, bucket)


def init_with_hook(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
    original_init(self, *args, **kwargs)
    self.register_comm_hook(None, counted)


original_init = DistributedDataParallel.__init__
DistributedDataParallel.__init__ = init_with_hook


def rows(directory: Path, rank: int) -> list[dict[str, Any]]:
    """The records of a rank in a run, by micro-step: {"reductions": number so far, "losses": {term: sum}}."""
    return [json.loads(line) for line in Path(f"{directory}.rank{rank}").read_text().splitlines()]


class WatchedRecipe(ToyRecipe):
    """Writes its records to `{run directory}.rank{rank}`."""

    def build_data(self, config: Config) -> Data:
        self.file = Path(f"{config.run.output_dir}.rank{os.environ.get('RANK', 0)}")
        return super().build_data(config)

    def loss(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        sums = super().loss(network, batch)
        row = {"reductions": reductions, "losses": {term: float(total) for term, total in sums.items()}}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return sums
