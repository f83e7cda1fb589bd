"""The URL by which a worker is reached."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx


def is_worker_url(text: str) -> bool:
    """Whether manager and gateways can send requests there: `http://`, a host as DNS has it, a port where there is one.

    httpx takes ports that urlsplit does not, and urlsplit takes hosts that httpx does not.
    """
    try:
        parts = urlsplit(text)
        known = parts.scheme == "http" and parts.hostname and parts.port != 0 and httpx.URL(text).host
    except (httpx.InvalidURL, ValueError):
        return False
    return bool(known) and text.isascii() and text.isprintable()
