"""The command line: `modelpool up | worker | register | rm | ls | status | chat | logs`."""

from __future__ import annotations


def main() -> None:
    """The `modelpool` command."""
    from modelpool.cli.app import app

    app()
