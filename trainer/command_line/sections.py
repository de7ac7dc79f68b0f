"""The sections of a configuration that every recipe has: `optimisation` and `run`. A recipe may add fields to them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from trainer.command_line.bounds import Fraction, NotNegative, Positive
from trainer.command_line.flags import Switch
from trainer.command_line.locations import Existing, ToMake

SECTIONS = ("model", "data", "optimisation", "run")
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Optimisation:
    """What decides the trained weights, beside the model and the data."""

    seed: Annotated[int, NotNegative] = 42
    """seed of initial weights, order of the data and dropout"""
    batch_size: Annotated[int, Positive, arg(aliases=("--batch",))] = 8
    """samples of one micro-step, summed over all processes"""
    gradient_accumulation_steps: Annotated[int, Positive, arg(aliases=("--gradient_accumulation",))] = 1
    """micro-steps per optimizer step; effective batch = batch_size x this"""
    max_steps: Annotated[int, NotNegative, arg(aliases=("--max_iters", "--steps"))] = 0
    """optimizer steps of the whole run (0: max_epochs decides)"""
    max_epochs: Annotated[float, NotNegative] = 10.0
    """passes over the training set, if max_steps is 0"""
    learning_rate: Annotated[float, Positive, arg(aliases=("--lr",))] = 3e-4
    """peak learning rate"""
    min_lr: Annotated[float, NotNegative] = 0.0
    """learning rate of the last step"""
    warmup_steps: Annotated[int, NotNegative, arg(aliases=("--warmup_iters",))] = 2000
    """optimizer steps of linear warm-up; an untyped value is cut to a tenth of the run"""
    schedule: Literal["recipe", "cosine", "linear", "constant", "wsd", "one_cycle"] = "recipe"
    """of the learning rate: the recipe's own, or one of these behind the warm-up; wsd stays at the peak and then comes down"""
    cooldown_fraction: Annotated[float, Fraction] = 0.2
    """the last part of the run, over which wsd comes down to min_lr"""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """muon: 2-D hidden weights by Muon, the rest by AdamW (not under ZeRO and FSDP)"""
    weight_decay: Annotated[float, NotNegative] = 0.01
    beta1: Annotated[float, Fraction] = 0.9
    """first-moment decay of Adam; momentum of SGD"""
    beta2: Annotated[float, Fraction] = 0.95
    eps: Annotated[float, Positive] = 1e-8
    grad_clip: Annotated[float, NotNegative, arg(aliases=("--gradient_clip",))] = 1.0
    """largest global gradient norm (0: no clipping)"""
    ema: Annotated[float, Fraction] = 0.0
    """average the weights of all steps with this decay, as 0.999; the average is what is evaluated and exported (0: off)"""
    overfit_batch: Annotated[int, NotNegative] = 0
    """train on the run's first so many effective batches alone, again and again: can the network learn them? (0: off)"""
    init_from: Annotated[str | None, Existing] = None
    """take the initial weights, and what flags of the network say, from this checkpoint folder or pretrained name"""

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step, over all processes and micro-steps."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class Run:
    """What decides where and how the run happens, but not its mathematics."""

    output_dir: Annotated[str | None, ToMake] = None
    """run directory (default: runs/RECIPE/NAME)"""
    run_name: str | None = None
    """last part of the run directory (default: from the preset or YAML file and the flags that change weights)"""
    preset: str | None = None
    """a named set of values of this recipe"""
    config: Annotated[str | None, Existing] = None
    """a YAML file of values, flat or in sections"""
    device: Device = "auto"
    """auto: cuda if there is a GPU, else mps (an Apple GPU, one process), else cpu"""
    deepspeed_config: Annotated[str | None, Existing] = None
    """train this launch under ZeRO, as a DeepSpeed file says, whatever started its processes: ds_configs/zero2.json, ..."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: what the launcher says, else bf16 on a GPU and fp32 on a CPU"""
    compile: Switch = "auto"
    """torch.compile the network together with its loss (auto: on a GPU, but not under ZeRO, where it gains little)"""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """reduce-overhead: CUDA graphs, for small models; max-autotune-no-cudagraphs: minutes at start, faster kernels"""
    tf32: bool = False
    """fp32 matrix products on a GPU with 10 bits of mantissa instead of 23: several times faster, other numbers"""
    fit_batch: bool = False
    """batch_size x gradient_accumulation_steps samples a step in the largest micro-batches that fit into memory, found before
    the first step (one process, where they are split again if memory runs out later, or DDP)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, block by block: less memory, about a third more time"""
    gradient_checkpointing_every: Annotated[int, NotNegative] = 0
    """recompute one block in so many alone: the others keep their activations, and cost no time (0: off)"""
    deterministic: bool = False
    """deterministic kernels: bit-exact resume on a GPU too"""
    num_workers: Annotated[int, NotNegative] = 2
    """data-loading processes per training process"""
    prefetch_factor: Annotated[int, Positive] = 2
    """micro-batches each data-loading process prepares ahead"""
    bad_samples: Literal["stop", "skip"] = "stop"
    """a sample that cannot be read ends the run, saved; or the next one that can takes its place, and the log says so"""
    pin_memory: bool = True
    """page-locked host batches (GPU only)"""
    log_every: Annotated[int, Positive, arg(aliases=("--log_interval",))] = 100
    """optimizer steps between log lines"""
    log_grad_norms: bool = False
    """with each log line the gradient norm of every layer too (not under ZeRO)"""
    eval_every: Annotated[int, NotNegative, arg(aliases=("--eval_interval",))] = 500
    """optimizer steps between evaluations (0: only at the end of epochs and of the run)"""
    eval_epochs: Annotated[int, NotNegative] = 1
    """epochs between evaluations (0: none at their ends; together with --eval_every 0 never, the end of the run included)"""
    eval_iters: Annotated[int, NotNegative] = 0
    """samples per evaluation, counted in steps of training: so many times the effective batch (0: the whole set)"""
    save_every: Annotated[int, NotNegative, arg(aliases=("--checkpoint_interval",))] = 1000
    """optimizer steps between checkpoints (0: off)"""
    save_epochs: Annotated[int, NotNegative] = 1
    """epochs between checkpoints that are kept, as checkpoint_epoch_E (0: off)"""
    save_minutes: Annotated[float, NotNegative] = 0.0
    """minutes between checkpoints (0: off)"""
    save_best: bool = True
    """save for a new best alone too; else best_model is the best of what is saved anyway"""
    save_sync: bool = False
    """training stands still until a checkpoint is written, not only while the state is copied"""
    keep_last: Annotated[int, NotNegative] = 3
    """step checkpoints to keep (0: all); those of new bests alone do not count, and what a link points to always stays"""
    checkpoint_dir: Annotated[str | None, ToMake] = None
    """where the checkpoints go (default: checkpoints/ in the run directory)"""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in this run directory, if it holds one"""
    resume_from: Annotated[str | None, Existing] = None
    """start from this checkpoint, or roll this run back to it"""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """accept: this launch resumes with other data than the run was trained on so far"""
    stop_at_step: Annotated[int, NotNegative] = 0
    """end this launch at this step, as if stopped by a request (0: off)"""
    max_training_hours: Annotated[float | None, Positive] = None
    """end this launch, checkpoint included, within so many hours of its start"""
    stop_when: str | None = None
    """a command that one process of each host runs every five seconds: exit 0 asks to stop, as a signal does (spot notices)"""
    patience: Annotated[int, NotNegative] = 0
    """evaluations without a better one before the run ends (0: off)"""
    target_loss: float | None = None
    """end the run once the logged training loss is at or below this"""
    max_bad_steps: Annotated[int, Positive] = 10
    """steps in a row with a non-finite gradient before the run fails"""
    timeout_minutes: Annotated[float, Positive] = 60.0
    """how long a process waits for the others before it gives up"""
    debug: bool = False
    """look at the first batch and at what goes through the network, and name the module where a value first stops being
    finite, with its step; nothing is compiled, and no worker reads data"""
    fast_dev_run: bool = False
    """try all that a run does, in a folder that is thrown away: one step, an evaluation, a save, and a resume"""
    profile: Annotated[int, NotNegative] = 0
    """trace so many steps on rank 0, after a few to warm up: a file to look at, and the operations that take the time"""
    use_tensorboard: bool = False
    tensorboard_tags: Literal["by_set", "by_metric"] = "by_set"
    """train/loss and eval/val_loss; or, in TensorBoard alone, Loss/train and Loss/val, and so for the accuracy"""
    use_wandb: bool = False
    wandb_project: str = "samecurve"
    """also the project, or experiment, of --log_with"""
    wandb_group: str | None = None
    """W&B shows the runs of a group together"""
    wandb_run_name: str | None = None
    log_with: tuple[Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"], ...] = ()
    """trackers of Accelerate, each a package to install and set up as it wants; each launch is a run there"""
    alert_webhook: str | None = None
    """Discord, Slack or any URL that takes JSON, told of start, progress, trouble and stop; kept nowhere. Better given as
    TRAINER_ALERT_WEBHOOK in the environment: other users see command lines, and a launcher repeats that of a failed run"""
    alert_every: Annotated[int, NotNegative] = 500
    """optimizer steps between alerts of progress (0: off)"""

    @property
    def recompute_every(self) -> int:
        """N, where one block in N recomputes its activations in the backward pass; 0: none does."""
        return self.gradient_checkpointing_every or int(self.gradient_checkpointing)


# Fields that describe one launch: a resumed run never takes them from the checkpoint.
PER_LAUNCH = (
    "output_dir",
    "run_name",
    "preset",
    "config",
    "device",
    "deepspeed_config",
    "resume",
    "resume_from",
    "data_changed",
    "stop_at_step",
    "debug",
    "fast_dev_run",
    "profile",
)
