"""What `--init_from` finds in a folder, or under a name of the hub, that holds a Vision Transformer of timm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoints.pretrained import StoredTensor
    from trainer.initial_weights import Weights


def timm_settings(name: str) -> Mapping[str, Any]:
    """{flag: its value} of the network and its images. OSError or ValueError for what this network has not."""
    from recipes.models.timm_vit import settings_of
    from trainer.checkpoints.pretrained import stored_config, stored_tensors

    return settings_of(stored_config(name), stored_tensors(name))


def timm_weights(name: str, network: Any, initial: Weights, notes: list[str]) -> Mapping[str, StoredTensor]:
    """Its weights under our names, for the grid of our images. `notes` become what begins anew or is interpolated."""
    from recipes.models.timm_vit import named_as_ours
    from trainer.checkpoints.pretrained import StoredTensor, stored_tensors

    fresh = {key: StoredTensor(tuple(p.shape), partial(initial, key)) for key, p in network.named_parameters()}
    found, notes[:] = named_as_ours(network, stored_tensors(name), fresh)
    return found
