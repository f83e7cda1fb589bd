"""Which manager is the later one.

An epoch is written `cluster.number`: the id of the store that gave it, and how many managers that store has had.
Epochs of one cluster are in order; between two clusters there is none.
"""

from __future__ import annotations


def epoch_of(cluster: str, number: int) -> str:
    return f"{cluster}.{number}"


def cluster_of(epoch: str) -> str:
    return epoch.partition(".")[0]


def number_of(epoch: str) -> int:
    digits = epoch.partition(".")[2]
    return int(digits) if digits.isdecimal() else 0


def is_foreign(epoch: str, known: str) -> bool:
    """Of another cluster than `known`. Whoever knows none ("") finds nothing foreign."""
    return bool(epoch and known) and cluster_of(epoch) != cluster_of(known)


def is_older(epoch: str, known: str) -> bool:
    """Given to a manager before the one that `known` was given to."""
    return cluster_of(epoch) == cluster_of(known) and number_of(epoch) < number_of(known)
