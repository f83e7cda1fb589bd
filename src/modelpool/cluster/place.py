"""A node's own part of a deployment: its settings, its home, its logs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path

from modelpool.home import Home
from modelpool.messages.cluster import Deployment
from modelpool.settings import Settings, over

_LOG_BYTES_MAX = 16 << 20


def at_node(deployment: Deployment, part: str, environ: Mapping[str, str] = os.environ) -> tuple[Settings, Home]:
    """The settings, but for what the environment of this node's Ray says, and the home, which has the pool's secrets.

    From now on what this process logs goes to `logs/<part>.log` of that home.
    """
    settings = over(deployment.settings, environ)
    home = Home(settings.home_path)
    home.keep_secrets(settings.token, deployment.admin_key)
    _log_to(home.logs / f"{part}.log", part, settings.log_level)
    return settings, home


def _log_to(path: Path, part: str, level: str) -> None:
    logger = logging.getLogger("modelpool")
    if logger.handlers:
        return
    path.touch(mode=0o600)
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES_MAX, backupCount=1)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {part} %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
