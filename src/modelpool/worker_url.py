"""The URL by which a worker is reached."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx


def is_worker_url(text: str) -> bool:
    """Whether manager and gateways can send requests there and below: `http://`, a host as DNS has it, perhaps a port
    (else it is 80) and a path.

    httpx takes ports that urlsplit does not, and urlsplit takes hosts that httpx does not.
    """
    if not text.isascii() or not text.isprintable() or any(each in text for each in " ?#"):
        return False
    try:
        parts = urlsplit(text)
        known = parts.scheme == "http" and parts.hostname and parts.port != 0 and httpx.URL(text).host
    except (httpx.InvalidURL, ValueError):
        return False
    return bool(known) and not parts.netloc.endswith(":")
