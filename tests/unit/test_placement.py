from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.placement import GB, Candidate, Need, Placement, Refusal, Room, place


def room(index: int = 0, free: float = 10, total: float = 20, kind: str = "cuda") -> Room:
    return Room(index=index, kind=kind, total_bytes=int(total * GB), free_bytes=int(free * GB))


def candidate(name: str, *devices: Room, replicas: int = 0, refusal: str = "") -> Candidate:
    return Candidate(worker_id=name, devices=devices or (room(),), replicas_here=replicas, refusal=refusal)


def test_the_worker_with_the_most_memory_left_is_chosen() -> None:
    choice = place(Need(bytes_each=GB), [candidate("a", room(free=4)), candidate("b", room(free=6))])
    assert isinstance(choice, Placement)
    assert (choice.worker_id, choice.devices, choice.bytes_each) == ("b", (0,), GB)


def test_replicas_are_spread_before_memory_is_looked_at() -> None:
    choice = place(Need(bytes_each=GB), [candidate("a", room(free=4)), candidate("b", room(free=16), replicas=1)])
    assert isinstance(choice, Placement)
    assert choice.worker_id == "a"


def test_several_devices_are_those_with_the_most_room() -> None:
    devices = [room(0, 1), room(1, 9), room(2, 5), room(3, 8)]
    choice = place(Need(devices=2, bytes_each=2 * GB), [candidate("a", *devices)])
    assert isinstance(choice, Placement)
    assert choice.devices == (1, 3)


def test_a_refusal_gives_the_numbers_of_every_worker() -> None:
    refusal = place(
        Need(bytes_each=30 * GB),
        [candidate("a", room(free=4)), candidate("b", refusal="the engine 'vllm' is missing there")],
    )
    assert refusal == Refusal(
        "a: needs 30.0 GB on device 0, 4.0 GB free of 20.0 GB; b: the engine 'vllm' is missing there"
    )
    assert place(Need(), []) == Refusal("no worker is registered")
    two = place(Need(devices=2, bytes_each=0), [candidate("a")])
    assert two == Refusal("a: needs 2 devices, has 1")


def test_on_a_cpu_the_ranks_of_a_model_share_the_one_device() -> None:
    choice = place(Need(devices=2, bytes_each=GB), [candidate("a", room(kind="cpu"))])
    assert isinstance(choice, Placement)
    assert choice.devices == (0,)
    assert isinstance(place(Need(devices=2, bytes_each=GB), [candidate("a")]), Refusal)


def test_what_a_model_does_not_say_is_decided_by_the_kind_of_device() -> None:
    assert Need().on(room(kind="cpu")) == 2 * GB
    assert Need().on(room(total=100)) == 90 * GB
    assert Need(fraction=0.5).on(room(total=100, kind="cpu")) == 50 * GB


rooms = st.lists(
    st.builds(room, index=st.integers(0, 7), free=st.floats(0, 80), total=st.just(80)),
    min_size=1,
    max_size=4,
    unique_by=lambda each: each.index,
)


@given(st.lists(rooms, max_size=5), st.integers(1, 4), st.floats(0, 100))
def test_a_placement_always_fits_and_a_refusal_means_that_nothing_does(
    workers: list[list[Room]], count: int, need_gb: float
) -> None:
    need = Need(devices=count, bytes_each=int(need_gb * GB))
    candidates = [candidate(f"w{number}", *devices) for number, devices in enumerate(workers)]
    choice = place(need, candidates)
    able = {
        each.worker_id
        for each in candidates
        if sum(device.free_bytes >= need.on(device) for device in each.devices) >= count
    }
    if isinstance(choice, Refusal):
        assert not able
        return
    chosen = {
        device.index: device for each in candidates if each.worker_id == choice.worker_id for device in each.devices
    }
    assert choice.worker_id in able
    assert len(set(choice.devices)) == count
    assert all(chosen[index].free_bytes >= choice.bytes_each for index in choice.devices)
