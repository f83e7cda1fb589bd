"""The commands. Each parses its options, does one thing, and prints it for people or, with --json, for programs."""
