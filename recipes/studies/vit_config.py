"""The configuration of the Vision Transformer recipe: flags, the guide's sections of a YAML file, sizes that must agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from tyro.conf import arg

from trainer import sections
from trainer.errors import Refusal
from trainer.hardware import cores


@dataclass(frozen=True)
class Model:
    """The network."""

    d_model: Annotated[int, arg(aliases=("--embed_dim",))] = 96
    """width"""
    num_layers: Annotated[int, arg(aliases=("--n_layers", "--depth"))] = 4
    num_heads: Annotated[int, arg(aliases=("--nhead",))] = 4
    head_dim: int | None = None
    """width of a head (default: d_model / num_heads)"""
    d_ff: int | None = None
    """width of the MLP (default: 4 x d_model)"""
    dropout: float = 0.1
    """of attention weights, the output of attention, and the MLP"""
    attention_scale: bool = True
    """attention logits divided by sqrt(head_dim)"""
    pool: Literal["cls", "mean"] = "cls"
    """what the head reads: a class token, or the mean of the patches (and no class token)"""
    patch_size: int | None = None
    """pixels along a side of a patch (default: 16; digits 2, cifar10 4)"""
    window_size: tuple[int, int] | None = None
    """patches down and across, which is the whole image (default: what image_size gives)"""
    sequence_length: int | None = None
    """patches of an image: the product of the window"""
    absolute_position: Annotated[bool, arg(aliases=("--use_absolute_position",))] = True
    """a learnt embedding for each position"""
    relative_position: Annotated[bool, arg(aliases=("--use_relative_position",))] = True
    """a learnt bias for each offset between two positions, in every layer and head"""
    bias_type: Literal["2d", "1d"] = "2d"
    """offsets down and across, or of the places in the row of patches"""
    learnable_bias: bool = True
    """train the bias tables, or leave them as they were drawn"""
    init_std: float = 0.02
    """standard deviation of fresh bias tables"""


@dataclass(frozen=True)
class Images:
    """The images and what is done to them."""

    dataset: str = "synthetic"
    """synthetic, digits (no network), folder (with --data_dir), cifar10, or OWNER/NAME of a hub image set"""
    data_dir: str | None = None
    """folder of images: CLASS/*.png, or train/CLASS/*.png beside val and test"""
    image_size: Annotated[int | None, arg(aliases=("--img_size",))] = None
    """pixels along a side (default: window x patch; without a window 112, digits 8, cifar10 32, others 224)"""
    in_channels: int | None = None
    """1 (grey) or 3 (default: 3, digits 1)"""
    num_classes: int | None = None
    """classes of the synthetic set (default: 10); the others have theirs"""
    num_samples: int | None = None
    """training images of the synthetic set (default: 1000)"""
    val_samples: int | None = None
    """validation images (default: a fifth), where a set has no validation split of its own"""
    crop_padding: int = 0
    """pixels of grey around a training image before it is cut back at a random place"""
    flip: bool = False
    """mirror half of the training images (not where left and right matter: digits, synthetic)"""
    mixup: float = 0.0
    """alpha of mixup (0: off)"""
    label_smoothing: float = 0.0
    image_mean: tuple[float, ...] = (0.5,)
    """subtracted from pixels of 0 to 1: one number, or one for each channel"""
    image_std: tuple[float, ...] = (0.5,)
    """what they are then divided by"""


@dataclass(frozen=True)
class Optimisation(sections.Optimisation):
    """The guide's defaults."""

    batch_size: Annotated[int, arg(aliases=("--batch",))] = 32
    """samples of one micro-step, summed over all processes"""
    max_epochs: float = 100.0
    """passes over the training set, if max_steps is 0"""
    learning_rate: Annotated[float, arg(aliases=("--lr",))] = 1e-3
    """peak learning rate"""
    warmup_steps: Annotated[int, arg(aliases=("--warmup_iters",))] = 0
    """optimizer steps of linear warm-up (0: warmup_fraction decides)"""
    warmup_fraction: float = 0.1
    """part of the run that is warm-up"""
    weight_decay: float = 0.05
    beta2: float = 0.999


@dataclass(frozen=True)
class Run(sections.Run):
    """The guide's defaults."""

    num_workers: int = field(default_factory=lambda: min(4, cores()))
    """data-loading processes per training process (default: the number of cores, at most 4)"""
    log_every: Annotated[int, arg(aliases=("--log_interval",))] = 50
    """optimizer steps between log lines"""
    eval_every: Annotated[int, arg(aliases=("--eval_interval",))] = 0
    """optimizer steps between evaluations (0: only at the end of epochs and of the run)"""
    save_epochs: int = 10
    """epochs between checkpoints that are kept, as checkpoint_epoch_E (0: off)"""
    use_tensorboard: bool = True
    wandb_project: str = "vit-relpos"


@dataclass(frozen=True)
class Config:
    """Train a Vision Transformer on images, with or without relative position bias."""

    model: Model = field(default_factory=Model)
    data: Images = field(default_factory=Images)
    optimisation: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    yaml_sections = {
        "project": {"name": "run_name", "seed": "seed", "device": "device"},
        "input": {"batch_size": "batch_size", "sequence_length": "sequence_length", "embed_dim": "d_model"},
        "attention": {"num_heads": "num_heads", "head_dim": "head_dim", "dropout": "dropout", "scale": "attention_scale"},
        "relative_position_bias": {
            "enabled": "relative_position",
            "type": "bias_type",
            "window_size": "window_size",
            "learnable": "learnable_bias",
            "init_std": "init_std",
        },
        "training": None,
    }

    def resolved(self) -> Config:
        """Sizes of image, patches, window and sequence brought together. Refusal, naming both, where two contradict."""
        from recipes.data.images import OTHERS, USUAL
        from recipes.models.patch_grid import patch_grid

        m, d = self.model, self.data
        _check(m, d, self.optimisation)
        usual = USUAL.get(d.dataset, OTHERS)
        patch = m.patch_size or usual.patch_size
        try:
            grid = patch_grid(patch, usual.image_size, d.image_size, m.window_size, m.sequence_length)
        except ValueError as reason:
            raise Refusal(str(reason)) from None
        channels = d.in_channels or usual.channels
        for name, values in (("image_mean", d.image_mean), ("image_std", d.image_std)):
            if len(values) not in (1, channels):
                raise Refusal(f"{name} has {len(values)} numbers for {channels} channels; give one, or one for each")
        model = replace(m, patch_size=patch, window_size=grid.window)
        return replace(self, model=model, data=replace(d, in_channels=channels))


def _check(m: Model, d: Images, o: Optimisation) -> None:
    """Refuse what no run can mean and the trainer does not know of."""
    sizes = {name: getattr(m, name) for name in ("head_dim", "patch_size", "sequence_length")}
    sizes |= {name: getattr(d, name) for name in ("image_size", "num_classes", "num_samples", "val_samples")}
    for name, value in [*sizes.items(), *(("window_size", side) for side in m.window_size or ())]:
        if value is not None and value <= 0:
            raise Refusal(f"{name} {value} must be above 0")
    for name, value in {"crop_padding": d.crop_padding, "mixup": d.mixup, "init_std": m.init_std}.items():
        if value < 0:
            raise Refusal(f"{name} {value} must not be negative")
    for name, value in {"label_smoothing": d.label_smoothing, "warmup_fraction": o.warmup_fraction}.items():
        if not 0 <= value < 1:
            raise Refusal(f"{name} {value} must be at least 0 and below 1")
    if d.in_channels not in (None, 1, 3):
        raise Refusal(f"in_channels {d.in_channels}: images have 1 (grey) or 3 (RGB)")
    if not all(map(math.isfinite, d.image_mean)) or not all(0 < std < math.inf for std in d.image_std):
        raise Refusal(f"image_mean {d.image_mean} must be finite, and image_std {d.image_std} above 0")
    if m.head_dim is None and m.d_model % m.num_heads:
        raise Refusal(f"d_model {m.d_model} does not divide into num_heads {m.num_heads}; change one, or give --head_dim")


def image_shape(m: Model) -> tuple[int, int]:
    """Height and width in pixels of the images of a resolved configuration."""
    return m.window_size[0] * m.patch_size, m.window_size[1] * m.patch_size


def vit_arguments(m: Model, d: Images, classes: int) -> dict[str, Any]:
    """The arguments of VisionTransformer, as JSON can hold them."""
    shape = {"window_size": m.window_size} if m.bias_type == "2d" else {"seq_len": m.window_size[0] * m.window_size[1]}
    bias = {"bias_type": m.bias_type, **shape, "init_std": m.init_std, "learnable": m.learnable_bias}
    return {
        "img_size": image_shape(m),
        "patch_size": m.patch_size,
        "in_channels": d.in_channels,
        "num_classes": classes,
        "embed_dim": m.d_model,
        "depth": m.num_layers,
        "num_heads": m.num_heads,
        "mlp_ratio": (m.d_ff or 4 * m.d_model) / m.d_model,
        "dropout": m.dropout,
        "use_relative_position": m.relative_position,
        "use_absolute_position": m.absolute_position,
        "rpb_kwargs": bias,
        "pool": m.pool,
        "head_dim": m.head_dim,
        "scale": m.attention_scale,
    }
