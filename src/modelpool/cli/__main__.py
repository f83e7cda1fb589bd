"""`python -m modelpool.cli`: the `modelpool` command."""

from modelpool.cli import main

main()
