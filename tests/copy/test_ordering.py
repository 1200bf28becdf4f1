# SPDX-License-Identifier: Apache-2.0
"""Order a connector's copy before and after other work, and free memory meanwhile.

Where waiting is what a test is about, the simulated device shows that without it bytes are wrong.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import no_wait, simdev_cases
from support.device_cases import (
    CHUNK_LAYOUT,
    HEADS,
    KV_LAYOUT,
    SIDE,
    STORE,
    Rig,
    check,
    current,
    delay,
    holds,
    host_bytes,
    on,
    settle,
)
from support.guarded_memory import check_sentence, untouched
from support.threads import run_threads

from portakv import Index, KVView, Unsupported, copy_rows
from portakv.runtime import streams, transfer
from portakv_benchmarks.shared.harness import DeviceTimer
from portakv_conformance import simdev

IDS = [9, 2, 17, 6, 0]
PLACES = pytest.mark.parametrize("place", ["host", "device"])


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def rig(request: pytest.FixtureRequest, accelerator: torch.device) -> Rig:
    """Return a rig on either device of its kind; the first one is the current device."""
    if request.param >= torch.get_device_module(accelerator).device_count():
        pytest.skip("there is one device of this kind")
    return Rig(torch.device(accelerator.type, request.param))


@pytest.fixture
def elsewhere(rig: Rig) -> torch.device:
    """The other device of this kind."""
    if torch.get_device_module(rig.device).device_count() < 2:
        pytest.skip("there is one device of this kind")
    return torch.device(rig.device.type, 1 - (rig.device.index or 0))


def copy_late(targets: list[torch.Tensor], fresh: list[torch.Tensor]) -> None:
    """Give tensors other bytes on the current stream, which is busy."""
    settle(fresh[0].device)
    delay(current(fresh[0].device))
    for old, new in zip(targets, fresh, strict=True):
        old.copy_(new, non_blocking=True)


@SIDE
@PLACES
@pytest.mark.parametrize("memory", ["device", "pinned", "pageable", "again"])
@STORE
def test_a_copy_waits_for_its_producer(
    rig: Rig, store: bool, memory: str, place: str, side: bool
) -> None:
    """Work after the copy on the current stream waits for the copy too."""
    ids = rig.ids(IDS, place)
    if memory == "again":  # where copies are repeated, it is one
        memory = "device"
        rig.move(store, rig.chunk(), None, ids).synchronize()
    chunk = rig.chunk(place=memory)
    other = Rig(rig.device)
    fresh = other.caches if store else [rig.chunk()]
    wanted = other.wanted(True, chunk, IDS) if store else rig.wanted(False, fresh[0], IDS)
    sources = rig.targets(not store, chunk)
    targets = rig.targets(store, chunk)
    copy_late(sources, fresh)
    stream = torch.Stream(rig.device) if side else None
    moved = rig.move(store, chunk, None, ids, stream=stream)
    moved.wait()
    landed = [target.clone() for target in targets if target.device == rig.device]
    for source in sources:
        if source.device == rig.device:  # the host would not wait
            source.zero_()
    moved.synchronize()
    assert holds(landed or targets, wanted)
    check(targets, wanted)


@pytest.mark.simdev
def test_the_stream_of_a_table_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(simdev_cases.DEVICE)
    followed = list[torch.Tensor]()
    monkeypatch.setattr(streams, "follow_current", lambda stream, *used: followed.extend(used))
    list_of_one = KVView([rig.chunk()], "block | kv layer token (head dim)", heads=HEADS)
    views = KVView(rig.caches, KV_LAYOUT), list_of_one
    tables = [view.table for view in views]
    copy_rows(*views, rig.ids(IDS), stream=torch.Stream(rig.device)).synchronize()
    assert all(any(used is table for used in followed) for table in tables)


@pytest.mark.simdev
@PLACES
@STORE
def test_without_the_connectors_wait_a_copy_is_wrong(
    store: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(streams, "follow_current", no_wait.follow_without_waiting)
    rig = Rig(simdev_cases.OTHER)
    other = Rig(simdev_cases.OTHER)
    chunk = rig.chunk()
    fresh = rig.chunk()
    ids = rig.ids(IDS, place)
    wanted = other.wanted(True, chunk, IDS) if store else rig.wanted(False, fresh, IDS)
    copy_late(rig.targets(not store, chunk), other.caches if store else [fresh])
    rig.move(store, chunk, None, ids, stream=torch.Stream(rig.device)).synchronize()
    assert not holds(rig.targets(store, chunk), wanted)
    settle(rig.device)


@STORE
def test_a_transfer_on_a_busy_stream_is_not_done(rig: Rig, store: bool) -> None:
    chunk = rig.chunk()
    rig.move(store, chunk, None, [-1] * len(IDS)).synchronize()  # the launch is prepared
    targets = rig.targets(store, chunk)
    wanted = rig.wanted(store, chunk, IDS)
    before = [host_bytes(target) for target in targets]
    moved = rig.move(store, chunk, None, IDS, stream=rig.delayed())
    assert holds([target.clone() for target in targets], before)  # a consumer that does not wait
    assert not moved.done()
    moved.wait()
    assert holds([target.clone() for target in targets], wanted)
    assert moved.done()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("freed", ["chunk", "device", "strided", "int32", "host", "negative"])
def test_what_is_freed_right_after_the_call(rig: Rig, freed: str, keep: bool) -> None:
    """The source of a load, or ids of each kind of a store."""
    slots = [*IDS, -1] if freed == "negative" else IDS
    store = freed != "chunk"
    chunk: Any = rig.chunk(len(slots))
    targets = rig.targets(store, chunk)
    wanted = rig.wanted(store, chunk, slots)
    ids = rig.ids(slots, "host" if freed == "host" else "device")
    if freed == "strided":
        ids = torch.stack([ids, ids], dim=1)[:, 0]
    if freed == "int32":
        ids = ids.int()
    sizes = [4 * len(slots), 8 * len(slots), 16 * len(slots), chunk.untyped_storage().nbytes()]
    moved: Any = rig.move(store, chunk, None, ids, stream=rig.delayed())
    del ids, chunk
    moved = moved if keep else None
    # The allocator gives that memory to others. Zeros are slots too: a wrong row, never a wild one.
    junk = [torch.zeros(n, dtype=torch.uint8, device=rig.device) for n in sizes for _ in range(16)]
    settle(rig.device)
    check(targets, wanted)
    del moved, junk


@pytest.mark.simdev
def test_without_recording_a_freed_source_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(simdev_cases.DEVICE)
    chunk = rig.chunk()
    wanted = rig.wanted(False, chunk, IDS)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    rig.move(False, chunk, None, IDS, stream=torch.Stream(rig.device))
    del chunk
    with pytest.raises(RuntimeError, match="freed"):
        settle(rig.device)
    assert not holds(rig.caches, wanted)
    settle(rig.device)
    simdev.take_faults()


@pytest.mark.parametrize("times", [1, 3])
def test_a_view_that_is_freed_after_its_last_copy_on_a_stream(rig: Rig, times: int) -> None:
    """The allocator learns of a stream once, and remembers it until the memory is freed."""
    device = rig.device
    nbytes = 1 << 20
    source = torch.full((nbytes, 1), 7, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    src = KVView(source, "token dim")
    dst = KVView(target, "token dim")
    stream = torch.Stream(device)
    for nth in range(times):
        target.zero_()
        if nth == times - 1:
            delay(stream)
        copy_rows(src, dst, stream=stream)
    del source, src
    junk = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(16)]
    settle(device)
    assert bool((target == 7).all())
    del junk


@pytest.mark.simdev
def test_without_recording_a_view_that_is_freed_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVView, "used_on", lambda view, stream: ())
    with pytest.raises(RuntimeError, match="freed"):
        test_a_view_that_is_freed_after_its_last_copy_on_a_stream(Rig(simdev_cases.DEVICE), 3)
    settle(simdev_cases.DEVICE)
    simdev.take_faults()


# Threads and devices


def test_threads_with_streams_of_their_own(rig: Rig) -> None:
    def work(first: int) -> None:
        slots = [(first + 5 * i) % 24 for i in range(4)]
        ids = rig.ids(slots) if first % 2 else slots
        with on(torch.Stream(rig.device)):
            for _ in range(5):
                chunk = rig.chunk(4)
                wanted = rig.wanted(True, chunk, slots)
                rig.move(True, chunk, None, ids).synchronize()
                check([chunk], wanted)

    settle(rig.device)
    run_threads(work, range(4))


@PLACES
def test_another_current_device(rig: Rig, elsewhere: torch.device, place: str) -> None:
    module = torch.get_device_module(rig.device)
    ids = rig.ids(IDS, place)
    rig.move(True, rig.chunk(), None, IDS).synchronize()
    with module.device(elsewhere):
        for _ in range(2):
            chunk = rig.chunk()
            settle(rig.device)
            delay(current(rig.device))  # the work must wait on the stream of that device
            stored = rig.move(True, chunk, None, ids)
            # `reference`, which the simulated device has, reads device ids and waits for them.
            assert (place == "device" and rig.device.type != "cuda") or not stored.done()
            stored.synchronize()
            check([chunk], rig.wanted(True, chunk, IDS))
            assert module.current_device() == elsewhere.index


@pytest.mark.parametrize("spread", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@STORE
def test_ids_of_another_device(
    rig: Rig, elsewhere: torch.device, store: bool, dtype: torch.dtype, spread: bool
) -> None:
    chunk = rig.chunk()
    ids = torch.tensor(IDS, dtype=dtype, device=elsewhere)
    if spread:
        ids = torch.stack([ids, torch.zeros_like(ids)], dim=1)[:, 0]
    wanted = rig.wanted(store, chunk, IDS)
    rig.move(store, chunk, None, ids).synchronize()
    check(rig.targets(store, chunk), wanted)


@SIDE
@pytest.mark.parametrize("own", [True, False], ids=["own", "another"])
def test_ids_that_a_device_produces_late(
    request: pytest.FixtureRequest, rig: Rig, own: bool, side: bool
) -> None:
    device = rig.device if own else request.getfixturevalue("elsewhere")
    chunk = rig.chunk()
    fresh = torch.tensor(IDS, device=device)
    wanted = rig.wanted(True, chunk, IDS)
    ids = torch.zeros_like(fresh)
    copy_late([ids], [fresh])
    stream = torch.Stream(rig.device) if side else None
    rig.move(True, chunk, None, ids, stream=stream).synchronize()
    check([chunk], wanted)


# What a stream, and the end of a transfer, mean


@pytest.mark.parametrize("passed", [True, False], ids=["given", "current"])
def test_the_default_stream_passed_to_the_connector(rig: Rig, passed: bool) -> None:
    """Its number is 0, which does not say that no stream was given: only then does waiting for it
    bring the bytes."""
    chunk = rig.chunk()
    default = current(rig.device)
    rig.move(True, chunk, None, [-1] * len(IDS)).synchronize()  # the launch is prepared
    wanted = rig.wanted(True, chunk, IDS)
    assert default.stream_id == 0
    with on(rig.delayed()):
        moving = rig.move(True, chunk, None, IDS, stream=default if passed else None)
    default.synchronize()
    assert holds([chunk], wanted) is passed  # read after the default stream alone
    moving.synchronize()
    check([chunk], wanted)


@pytest.mark.parametrize("waits", [True, False])
def test_synchronize_waits_for_a_copy_within_the_device(
    rig: Rig, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads the bytes without another wait for the stream that carried them."""
    src = rig.chunk(12)
    dst = rig.chunk(12)
    rows = host_bytes(src)
    wanted = host_bytes(dst)
    wanted[:, :, [1, 2, 11]] = rows[:, :, [3, 0, 7]]
    first, second = (KVView(tensor, CHUNK_LAYOUT, heads=HEADS) for tensor in (src, dst))
    copy_rows(first, second, Index([-1]), Index([-1])).synchronize()  # prepared
    moving = copy_rows(first, second, [3, 0, 7], [1, 2, 11], stream=rig.delayed())
    if not waits:
        monkeypatch.setattr(transfer.Completion, "synchronize", lambda completion: None)
    moving.synchronize()
    assert holds([dst], [wanted]) is waits
    monkeypatch.undo()
    moving.synchronize()


@pytest.mark.simdev
def test_a_call_that_only_enqueues_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock around such a call would make any copy fast."""
    device = simdev_cases.DEVICE
    small = SimpleNamespace(L2_cache_size=4096)
    module = torch.get_device_module(device)
    monkeypatch.setattr(module, "get_device_properties", lambda device: small, raising=False)
    taken = DeviceTimer(device).sample(lambda i: simdev.delay(current(device), 30), 0, 0.0)
    assert taken.elapsed >= 25_000 > taken.host
    assert not taken.hidden  # no delay kernel on this device: it does not claim to hide the host


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["no ids", "host ids", "device ids"])
def test_capture_is_refused_by_what_cannot_be_captured(kind: str) -> None:
    rig = Rig()
    slots = [*IDS, -1]
    chunk = rig.chunk(6)
    other = rig.chunk(6)
    view, twin = (KVView(tensor, CHUNK_LAYOUT, heads=HEADS) for tensor in (chunk, other))
    src = twin if kind == "no ids" else KVView(rig.caches, KV_LAYOUT)
    ids = {"no ids": None, "host ids": slots, "device ids": rig.ids(slots)}[kind]

    def copy() -> Any:
        return copy_rows(src, view, ids, backend="reference")

    copy().synchronize()  # prepared, so that nothing but the launch is left
    with untouched([*rig.caches, other]):
        torch.cuda.synchronize()
        gc.collect()  # a graph that dies during a capture spoils it
        with pytest.raises(Unsupported) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
            copy()
        check_sentence(str(caught.value), "graph capture", "capturable")
    # The device is sound, and the same copy works outside of the graph.
    chunk.zero_()
    wanted = [host_bytes(other)] if kind == "no ids" else rig.wanted(True, chunk, slots)
    copy().synchronize()
    check([chunk], wanted)
