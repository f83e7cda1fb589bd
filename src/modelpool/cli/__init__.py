"""The command line, `modelpool`: commands/ parses and prints, the rest does what they need."""

from __future__ import annotations


def main() -> None:
    """The `modelpool` command."""
    from modelpool.cli.app import app

    app()
