"""A baseline for labelled images that needs no network: logistic regression on the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from recipes.data.image_batches import ImageBatches

SIDE = 16  # pixels along a side; larger images are averaged down to it
MOST_IMAGES, MOST_CLASSES = 10_000, 100  # one process reads and fits them on one core: a minute or two
BATCH = 256


class Prediction(NamedTuple):
    """Results on the validation images."""

    accuracy: float
    nats: float
    """cross entropy per image"""


def logistic_regression(train: ImageBatches, validation: ImageBatches) -> Prediction:
    """Scikit-learn's, with its default penalty, on pixels from -1 to 1, at most SIDE x SIDE, in fp64.

    `train` is used as it is: give it without augmentation. ValueError for too many images or classes, or too few to fit;
    OSError for an image that cannot be read.
    """
    images = len(train) + len(validation)
    if images > MOST_IMAGES or train.classes > MOST_CLASSES:
        most = f"it takes at most {MOST_IMAGES:,} of {MOST_CLASSES}"
        raise ValueError(f"{images:,} images of {train.classes:,} classes are too many, {most}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # small products: several threads would only wait for each other, and round differently
        model = LogisticRegression(max_iter=1000).fit(*_pixels(train))
        pixels, labels = _pixels(validation)
        likelihoods = model.predict_proba(pixels)
    nats = log_loss(labels, likelihoods, labels=model.classes_)
    return Prediction(float(np.mean(model.classes_[likelihoods.argmax(1)] == labels)), float(nats))


def _pixels(images: ImageBatches) -> tuple[np.ndarray, np.ndarray]:
    """(pixels fp64 [images, features], labels [images])."""
    from torch.nn.functional import adaptive_avg_pool2d

    from recipes.data.image_pixels import from_0_to_1

    pixels, labels = [], []
    for start in range(0, len(images), BATCH):
        batch = images.__getitems__(range(start, min(start + BATCH, len(images))))
        height, width = batch["images"].shape[-2:]
        small = adaptive_avg_pool2d(from_0_to_1(batch["images"]).double() * 2 - 1, (min(SIDE, height), min(SIDE, width)))
        pixels.append(small.flatten(1).numpy())
        labels.append(batch["labels"].numpy())
    return np.concatenate(pixels), np.concatenate(labels)
