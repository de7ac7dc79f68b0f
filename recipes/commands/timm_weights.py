"""`--init_from` a folder, or a name of the hub, with a Vision Transformer of timm: its settings and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoints.pretrained import StoredTensor
    from trainer.initial_weights import Weights


def timm_settings(name: str) -> Mapping[str, Any]:
    """{flag: value} of the network and its images. OSError or ValueError if it cannot be read, or is not our network."""
    from recipes.models.timm_vit import settings_of
    from trainer.checkpoints.pretrained import stored_config, stored_tensors

    return settings_of(stored_config(name), stored_tensors(name))


def timm_weights(name: str, network: Any, initial: Weights, notes: list[str]) -> Mapping[str, StoredTensor]:
    """{our name: tensor}, for the grid of our images. `notes` is replaced by notes on what begins anew or is interpolated."""
    from recipes.models.timm_vit import named_as_ours
    from trainer.checkpoints.pretrained import StoredTensor, stored_tensors

    fresh = {key: StoredTensor(tuple(p.shape), partial(initial, key)) for key, p in network.named_parameters()}
    found, notes[:] = named_as_ours(network, stored_tensors(name), fresh)
    return found
