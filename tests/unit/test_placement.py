from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.core.placement import (
    GB,
    HOST,
    Candidate,
    Need,
    Other,
    Placement,
    Refusal,
    Room,
    place,
    shortfalls,
)


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


def test_of_workers_with_as_many_replicas_one_with_the_files_is_chosen_and_one_where_it_failed_comes_last() -> None:
    files = replace(candidate("files", room(free=4)), has_files=True)
    choice = place(Need(bytes_each=GB), [candidate("room", room(free=16)), files])
    assert isinstance(choice, Placement)
    assert (choice.worker_id, choice.reason[-19:]) == ("files", "its files are there")
    choice = place(Need(bytes_each=GB), [candidate("other", replicas=2), replace(files, avoid=True)])
    assert isinstance(choice, Placement)
    assert choice.worker_id == "other"
    choice = place(Need(bytes_each=GB), [replace(files, avoid=True)])
    assert isinstance(choice, Placement)


def test_devices_are_of_one_kind_and_none_is_lost() -> None:
    mixed = [replace(room(0), name="L4"), room(1, 9), room(2, 8), replace(room(3), name="L4"), room(4, 7)]
    choice = place(Need(devices=3, bytes_each=2 * GB), [candidate("a", *mixed)])
    assert isinstance(choice, Placement)
    assert choice.devices == (1, 2, 4)
    assert place(Need(devices=4, bytes_each=0), [candidate("a", *mixed)]) == Refusal(
        "a: needs 4 devices of one kind, has 3"
    )
    mixed[4] = replace(mixed[4], lost="GPU is lost")
    assert place(Need(devices=3, bytes_each=0), [candidate("a", *mixed)]) == Refusal(
        "a: needs 3 devices of one kind, has 2; device 4 is lost (GPU is lost)"
    )


def test_a_refusal_says_how_things_stand_on_each_device_and_who_else_is_there() -> None:
    other = Other(7, "train.py", 6 * GB)
    devices = [room(0, 4), replace(room(1, 14), others=(other,))]
    machine = Room(index=HOST, kind="cpu", total_bytes=64 * GB, free_bytes=GB)
    need = Need(bytes_each=15 * GB, host_bytes=2 * GB)
    assert place(need, [replace(candidate("a", *devices), host=machine)]) == Refusal(
        "a: needs 15.0 GB on one device (device 0: 4.0 GB free of 20.0 GB; device 1: 14.0 GB free of 20.0 GB, train.py "
        "(process 7) holds 6.0 GB); needs 2.0 GB of host memory, 1.0 GB free of 64.0 GB"
    )


def test_what_is_lacking_is_told_for_one_set_of_devices_after_the_other() -> None:
    machine = Room(index=HOST, kind="cpu", total_bytes=64 * GB, free_bytes=GB)
    one = replace(candidate("a", room(0, 4), room(1, 5), room(2, 1)), host=machine)
    need = Need(devices=2, bytes_each=5 * GB, host_bytes=2 * GB)
    assert list(shortfalls(need, one)) == [
        {0: GB, HOST: GB},
        {2: 4 * GB, HOST: GB},
        {0: GB, 2: 4 * GB, HOST: GB},
    ]
    assert list(shortfalls(Need(bytes_each=30 * GB), one)) == []
    assert list(shortfalls(Need(host_bytes=65 * GB, bytes_each=0), one)) == []


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
