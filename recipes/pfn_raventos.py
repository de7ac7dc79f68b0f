"""Linear-regression PFN and the task-diversity experiment: `accelerate launch recipes/pfn_raventos.py [train|sweep|...] ...`

After Müller et al. 2022 (arXiv 2112.10510) and Raventós et al. 2023 (arXiv 2306.15063). A sample is a sequence of pairs (x, y)
of one linear task; the model predicts each y from the pairs before it and its own x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.studies.pfn_settings import Config
from recipes.studies.predictive_resampling import Predict, predict
from recipes.studies.regression_evaluation import Evaluate, evaluate, evaluate_after_training
from recipes.studies.task_diversity import Plot, Sweep, plot, sweep
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Recipe

CONFIGS = Path(__file__).parent / "configs"


class PFNRaventos(Recipe):
    """Model, data and loss of one model, or of a stack of them: then there is a loss term for each."""

    name = "pfn_raventos"
    Config = Config
    presets = {"quick": CONFIGS / "pfn_raventos_quick.yaml"}
    commands = {
        "sweep": Command(Sweep, sweep, {"quick": CONFIGS / "pfn_raventos_sweep_quick.yaml"}),
        "plot": Command(Plot, plot),
        "evaluate": Command(Evaluate, evaluate),
        "predict": Command(Predict, predict),
    }
    loss_unit = "nats per y"
    checkpoint_prefix = "model_checkpoint_"

    def build_data(self, config: Config) -> Data:
        """Endless sequences from the pool (or pools); to evaluate on, fresh ones of the same tasks and of tasks never seen."""
        from recipes.data.regression import RegressionSample, RegressionStream, task_pool

        d, seed = config.data, config.optimisation.seed
        pools = [task_pool(size, d.task_size, d.task_seed) for size in d.stack or (d.num_tasks,)]
        shape = (d.task_size, d.examples, d.noise)
        train = RegressionStream("train", seed, pools, *shape)
        same = RegressionSample(d.val_sequences, "validation", seed, pools, *shape)
        true = RegressionSample(d.val_sequences, "validation, true tasks", seed, [pool[:0] for pool in pools], *shape)
        # What a sample is follows from the settings alone, which a resumed run has to repeat anyway.
        notes = [f"{len(pools)} models as one network: the losses of a stack are sums over its models"] if d.stack else []
        return Data(train, {"val": same, "true": true}, fingerprint=train.VERSION, notes=notes, extra={"pools": pools})

    def build_model(self, config: Config, data: Data) -> Any:
        """AutoregressivePFN; every model of a stack starts with the weights it would have alone."""
        from recipes.models.pfn import AutoregressivePFN, stack

        m, d = config.model, config.data
        y_min, y_max = config.y_bounds()
        sizes = {"d_model": m.d_model, "num_layers": m.num_layers, "num_heads": m.num_heads, "d_ff": m.d_ff}
        sizes |= {"d_x": d.task_size, "d_vocab": m.d_vocab, "y_min": y_min, "y_max": y_max, "examples": d.examples}
        sizes |= {"recompute": config.run.gradient_checkpointing}
        single = AutoregressivePFN(**sizes)
        return stack(single, AutoregressivePFN(**sizes, models=len(d.stack))) if d.stack else single

    def items(self, batch: Batch) -> dict[str, int]:
        """Predictions, of each model."""
        sequences, models, examples = batch["y"].shape
        return {f"model_{i}": sequences * examples for i in range(1, models + 1)}

    def loss(self, network: Any, batch: Batch) -> dict[str, Any]:
        """Summed cross entropy of the bins of y, of each model."""
        y = network.of_batch(batch["y"])
        sums = network.cross_entropy(network(batch["x"], y), y)
        return dict(zip(self.items(batch), sums.unbind(), strict=True))

    def measure(self, network: Any, batch: Batch) -> dict[str, tuple[Any, float]]:
        """Cross entropy, and the squared error of the mean prediction over the dimension of the task, of each model."""
        y, counts = network.of_batch(batch["y"]), self.items(batch)
        logits = network(batch["x"], y)
        errors = (network.mean(logits) - y).square().view(len(counts), -1).sum(1) / batch["x"].shape[-1]
        found = {}
        for (term, n), nats, error in zip(counts.items(), network.cross_entropy(logits, y), errors, strict=True):
            found |= {term: (nats, n), f"mse_{term}" if len(counts) > 1 else "mse": (error, n)}
        return found

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Without the numbers of each model of a stack, which are in metrics.jsonl."""
        return super().evaluation_line(step, {name: value for name, value in metrics.items() if "_model_" not in name})

    def parameter_groups(self, network: Any, config: Config) -> list[dict[str, Any]]:
        """No decay on biases and norms, which in a stack have a dimension more."""
        decay, vectors = config.optimisation.weight_decay, 2 if config.data.stack else 1
        groups = [[p for p in network.parameters() if (p.ndim > vectors) == decayed] for decayed in (True, False)]
        return [{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}]

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """One cycle: a triangle with its peak at half."""
        from trainer.schedule import one_cycle

        return one_cycle(step, total_steps, config.optimisation.learning_rate)

    def schedule_text(self, config: Config) -> str:
        """In words."""
        o = config.optimisation
        first, last = (self.learning_rate(step, o.max_steps, config) for step in (1, o.max_steps))
        unused = " (warmup_steps and min_lr are not used)" if o.warmup_steps or o.min_lr else ""
        return f"one cycle{unused}, learning rate from {first:.3g} to {o.learning_rate:g} at half and down to {last:.3g}"

    def tensors(self, config: Config, data: Data) -> dict[str, dict[str, Any]]:
        """The task vectors, so that a model is evaluated on the tasks it was trained on."""
        return {"tasks": {f"model_{i}": pool for i, pool in enumerate(data.extra["pools"], start=1)}}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Of a sequence, for MFU."""
        from recipes.models.pfn import training_flops

        m, d = config.model, config.data
        one = training_flops(m.d_model, m.num_layers, m.d_ff, m.d_vocab, d.task_size, d.examples)
        return one * max(1, len(d.stack))

    def after_training(self, config: Config, data: Data, run: Any, checkpoint: Path, say: Callable[[str], None]) -> None:
        """The comparison with ridge and dMMSE, into evaluation.json."""
        evaluate_after_training(self, config, run, checkpoint, say)


if __name__ == "__main__":
    main(PFNRaventos())
