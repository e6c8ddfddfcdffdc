"""Whether the Hub can be reached. Where not, what is on this machine is taken, without half a minute of retries."""

import functools
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from perce_lite.console import say


def hub_options(source: str) -> dict[str, bool]:
    """Options of `from_pretrained` for a folder or a Hub id: without a network nothing but the local cache is asked."""
    return {"local_files_only": not Path(source).is_dir() and not reachable()}


@functools.cache
def reachable() -> bool:
    """Whether the Hub's name can be looked up, asked once a process; behind a proxy that does the looking up, yes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    host = urlsplit(constants.ENDPOINT)
    if {host.scheme, "all"} & set(urllib.request.getproxies()):
        return True
    try:
        socket.getaddrinfo(host.hostname, host.port or host.scheme)
    except OSError:
        say(f"No connection to {host.hostname}: of models, only those on this machine are used.")
        return False
    return True


def is_of_the_hub(error: BaseException | None) -> bool:
    """Whether `error`, or one that led to it, is the Hub's: not to be reached, not to be read, or no such thing there.

    Told by types: what a message says may be said of anything. transformers wraps them in an OSError, or asks its cache
    alone and says that there is nothing in it.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or error.__context__
    return False
