from __future__ import annotations

import pytest

from modelpool.core.epoch import cluster_of, epoch_of, is_foreign, is_older, number_of
from modelpool.errors import Conflict
from modelpool.worker.fence import Fence


def test_epochs_of_one_cluster_are_in_order_and_of_two_in_none() -> None:
    assert (cluster_of(epoch_of("a1", 12)), number_of(epoch_of("a1", 12))) == ("a1", 12)
    assert is_older("a.2", "a.10")
    assert not is_older("a.10", "a.2")
    assert not is_older("a.2", "a.2")
    assert not is_older("b.1", "a.2")
    assert is_foreign("b.1", "a.2")
    assert not is_foreign("a.1", "a.2")
    assert not is_foreign("a.1", "")
    assert not is_foreign("", "a.1")


def test_a_worker_obeys_the_latest_manager_that_it_has_heard_of() -> None:
    fence = Fence(lambda: True)
    for epoch in ("a.2", "a.2", "a.10", ""):
        fence.hear(epoch)
    with pytest.raises(Conflict, match=r"a\.10 is later than a\.9") as refused:
        fence.hear("a.9")
    assert refused.value.code == "stale_epoch"
    assert fence.epoch == "a.10"


def test_a_worker_that_runs_something_has_one_cluster_and_an_idle_one_may_go_to_another() -> None:
    busy = True
    fence = Fence(lambda: busy)
    fence.hear("a.7")
    with pytest.raises(Conflict, match="instances of the cluster `a`; the manager is that of `b`") as refused:
        fence.hear("b.1")
    assert refused.value.code == "other_cluster"
    busy = False
    with pytest.raises(Conflict, match="later"):
        fence.hear("a.6")
    fence.hear("b.1")
    assert fence.epoch == "b.1"
