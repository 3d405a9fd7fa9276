"""Hubs of models that cannot be reached: then only what was downloaded before is loaded, and at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

SECONDS = 3  # for one connection; the hub's own client tries for minutes
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY")


def is_reachable() -> bool:
    """Whether the hub answers; taken for granted behind a proxy, which knows names that this machine does not."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def hub() -> Iterator[None]:
    """Within it, the hub's client does not try again and again where there is no network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
