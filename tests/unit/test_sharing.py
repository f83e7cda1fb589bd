"""What nodes are told of each other, as short stories."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modelpool.core.limits import WINDOW_S, Limits, Use
from modelpool.manager.claims import Sent
from modelpool.manager.sharing import Sharing
from modelpool.messages.demand import DemandReport, KeyDemand, ModelDemand, node_of
from modelpool.messages.routing import Others

LIMITS = {"k": Limits(requests=100, concurrency=10)}
CAPACITIES = {"m": 100}


def report(
    gateway: str, *, heard: int = 0, inflight: int = 0, use: Use | None = None, asked: Use = Use()
) -> DemandReport:
    models = {"m": ModelDemand(inflight={"m": inflight})} if inflight else {}
    keys = {} if use is None else {"k": KeyDemand(use=use, asked=asked)}
    return DemandReport(gateway=gateway, models=models, keys=keys, heard=heard)


def news(sharing: Sharing, now: float = 0.0) -> dict[str, Others]:
    return dict(sharing.news(LIMITS.get, CAPACITIES.get, "c.1", 1000, now))


def hear(sharing: Sharing, said: DemandReport, now: float) -> None:
    sharing.hear(said, CAPACITIES.get, now)


def two(now: float = 0.0) -> Sharing:
    """Two nodes that know of each other, and that all of the key's use was on the first."""
    sharing = Sharing()
    sharing.join("a.1")
    hear(sharing, report("a.1", use=Use(requests=40), asked=Use(requests=40)), now)
    sharing.join("b.1")
    return sharing


def test_a_node_is_the_first_part_of_a_gateways_name() -> None:
    assert [node_of(name) for name in ("n.p", "alone", "")] == ["n", "", ""]


def test_where_there_is_one_node_nothing_is_told() -> None:
    sharing = Sharing()
    sharing.join("a.1")
    sharing.join("a.2")
    hear(sharing, report("a.1", use=Use(requests=3), asked=Use(requests=3)), 0.0)
    assert news(sharing) == {}


def test_a_node_that_joins_gets_only_what_the_other_is_known_to_have_given_up() -> None:
    sharing = two()
    told = news(sharing)
    assert {node: (each.nodes, each.keys["k"].requests) for node, each in told.items()} == {"a": (2, 90), "b": (2, 0)}
    assert news(sharing) == {}, "nothing is new"
    hear(sharing, report("a.1", heard=told["a"].number, use=Use(requests=40)), 1.0)
    told = news(sharing, 1.0)
    assert told["b"].keys["k"].requests == 10
    hear(sharing, report("b.1", heard=told["b"].number, use=Use(), asked=Use(requests=500)), 2.0)
    first = news(sharing, 2.0)
    hear(sharing, report("a.1", heard=first["a"].number, use=Use(requests=40)), 2.1)
    hear(sharing, report("b.1", heard=told["b"].number, use=Use(requests=3), asked=Use(requests=500)), 2.1)
    parts = {node: each.keys["k"].requests or 0 for node, each in news(sharing, 2.1).items()}
    assert parts["b"] > 45


def test_a_node_hears_what_others_have_in_flight_and_not_its_own() -> None:
    sharing = Sharing()
    for gateway in ("a.1", "a.2", "b.1"):
        sharing.join(gateway)
        hear(sharing, report(gateway, inflight=2), 0.0)
    assert {node: each.inflight for node, each in news(sharing, 100.0).items()} == {"a": {"m": 2}, "b": {"m": 4}}


def test_what_others_have_in_flight_is_an_average_so_that_nodes_do_not_all_run_to_one_instance() -> None:
    sharing = Sharing()
    for gateway in ("a.1", "b.1"):
        sharing.join(gateway)
    told = []
    for now in range(10):
        hear(sharing, report("a.1", inflight=8 * (now % 2)), float(now))
        told.append(news(sharing, float(now)).get("b"))
    assert {each.inflight.get("m", 0) for each in told[4:] if each} <= {2, 3, 4, 5}
    hear(sharing, report("a.1"), 20.0)
    assert news(sharing, 60.0)["b"].inflight == {}


def test_the_last_node_has_all_again_but_for_what_the_others_used() -> None:
    sharing = two()
    sharing.join("c.1")
    news(sharing)
    sharing.leave("a.1")
    told = news(sharing, 1.0)
    assert (told["b"].keys["k"].requests or 0) + (told["c"].keys["k"].requests or 0) <= 60
    sharing.leave("c.1")
    (last,) = news(sharing, 2.0).values()
    assert (last.nodes, last.keys) == (1, {})
    assert news(sharing, 3.0) == {}


def test_what_was_used_longer_than_a_minute_ago_is_forgotten() -> None:
    sharing = two()
    assert set(news(sharing)["b"].keys) == {"k"}
    assert news(sharing, WINDOW_S + 1)["b"].keys == {}


def granted(sent: Sent, heard: int) -> int:
    return sent.granted("requests", 100, heard, 50)


@settings(deadline=None)
@given(given_out=st.lists(st.integers(0, 100), min_size=20, max_size=60), late=st.integers(0, 30))
def test_nothing_that_a_node_may_still_keep_to_is_forgotten(given_out: list[int], late: int) -> None:
    sent, parts = Sent(), [50, *given_out]
    for number, part in enumerate(given_out, 1):
        heard = max(0, number - 1 - late)
        assert granted(sent, heard) >= max(parts[heard:number])
        sent.send(number, Limits(requests=part), heard)
    assert granted(sent, len(given_out)) == given_out[-1]


def test_what_a_node_keeps_to_counts_however_much_it_has_not_heard_of() -> None:
    sent = Sent()
    assert granted(sent, 0) == 50
    sent.send(1, Limits(requests=90), 0)
    for number in range(2, 50):
        sent.send(number, Limits(requests=number), 1)
        assert granted(sent, 1) == 90
    assert granted(sent, 49) == 49


def test_of_much_that_was_not_heard_of_a_limit_that_was_left_out_means_all_of_it() -> None:
    sent = Sent()
    assert granted(sent, 0) == 50
    sent.send(1, Limits(requests=9), 0)
    sent.send(2, Limits(), 1)
    for number in range(3, 50):
        sent.send(number, Limits(requests=number), 1)
        assert granted(sent, 1) == 100
