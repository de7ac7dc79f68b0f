"""The Hugging Face hub: whether it can be reached, its data sets, and errors of its libraries in one line."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HUB_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class HubDataSet:
    """A data set of the hub at one commit of its repository."""

    commit: str
    splits: Mapping[str, Any]
    """{name of the split in the set: its rows, as dicts}"""
    columns: list[str]
    sizes: dict[str, int]
    """{split: its bytes, uncompressed}, of those that the hub tells"""


@functools.lru_cache  # one commit for as long as this process reads of it
def open_data_set(name: str) -> HubDataSet:
    """OWNER/NAME[:CONFIGURATION] from the cache of `datasets` or, if it is not there, streamed without storing it.

    ValueError, in one line, if it cannot be loaded.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    config_offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this a machine with no network retries for half a minute or more before it reads its own cache.
        datasets.config.HF_HUB_OFFLINE = config_offline or not hub_is_reachable()
        builder = datasets.load_dataset_builder(repository, configuration or None)
        try:
            splits = builder.as_dataset()
        except FileNotFoundError:  # it was never stored here
            splits = builder.as_streaming_dataset()
        first = next(iter(splits.values()))
        columns = list(first.column_names or next(iter(first), {}))
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(f"cannot load {name} from the hub ({one_line(error)})") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = config_offline
    sizes = {split: info.num_bytes for split, info in (builder.info.splits or {}).items() if info.num_bytes}
    return HubDataSet(builder.hash, splits, columns, sizes)


def hub_is_reachable() -> bool:
    """Whether the hub can be reached at all: one short request, through the same proxies as any download."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception:  # no network, no route, no name, time-out, offline mode: all mean no
        return False
    return True


def one_line(error: Exception) -> str:
    """The text of an error on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
