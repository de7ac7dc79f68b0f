"""The Hugging Face hub: whether it can be reached, and errors of its libraries in one line."""

HUB_PROBE_SECONDS = 5.0


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
