"""Times that the project promises, on a machine that may be busy with something else."""

from __future__ import annotations

import os


def promised(seconds: float) -> float:
    """A bound for what is to take so long at most: more, where more wants to run than there are processors."""
    wanting, _, _ = os.getloadavg()
    return seconds * max(1.0, wanting / len(os.sched_getaffinity(0)))
