# SPDX-License-Identifier: Apache-2.0
"""The ends of copies that the core makes, by a driver on the host."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cuda_on_cpu import why_not
from support.ending_driver import NOT_READY, EndingDriver, EndingOnCpu
from support.late_driver import WORD
from support.whole_copies import watch_whole_copies

from portakv import AdaptiveConnector, LateErrors
from portakv.backends.row_kernels import RowKernels
from portakv.core.call import GUARDED, STREAM, TOKENS, CopyEnd, CurrentStream
from portakv.errors import SlotError, TransferError
from portakv.registry.registry import REGISTRY, choose
from portakv.runtime import transfer
from portakv.runtime.ends import End, Ends
from portakv.runtime.transfer import Owner, Transfer

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

CPU = torch.device("cpu")


class Rig:
    """Kernels whose copies have ends, and a copy that the core would make."""

    def __init__(self) -> None:
        self.driver = EndingDriver()
        self.driver.late = True
        self.kernels = RowKernels(self.driver, CPU, "rig")
        self.ends = self.kernels.ends = Ends(self.driver, CPU)
        self.bad = 0  # the position of a bad id that the next copy meets, from 1 on

    def issue(self, ids: object = None, owner: Owner | None = None) -> Transfer:
        end, result = self.made()
        return Transfer((end.completion(result, ids, owner),))

    def made(self) -> tuple[End, int]:
        made = self.kernels.issue(self.copy, ())
        assert made is not None
        end, result = made
        assert end is not None
        return end, result

    def copy(self, at: int, stream: int | None) -> int:
        if stream is None:
            return STREAM
        end = CopyEnd.from_address(at)
        if self.bad:
            word = ctypes.c_int64.from_address(end.status)
            self.driver.note("launch", 0, partial(setattr, word, "value", self.bad))
            self.bad = 0
        error = self.driver["cuEventRecord"](end.event, stream)
        return -1000 - error if error else 3 << TOKENS | GUARDED


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    transfer.retire()
    monkeypatch.setattr(transfer, "in_flight", type(transfer.in_flight)())
    monkeypatch.setattr(transfer, "failed", [])
    made = Rig()
    yield made
    made.driver.answers.clear()
    made.driver.work()
    transfer.retire()


# A copy of a connector


@pytest.fixture
def late() -> Iterator[EndingDriver]:
    """The driver of a backend, which works late from then on."""
    REGISTRY.register(EndingOnCpu.name, EndingOnCpu)
    backend = choose("cpu", EndingOnCpu.name).backend
    assert isinstance(backend, EndingOnCpu)
    driver = backend.ending
    yield driver
    driver.late = False
    driver.work()
    REGISTRY.unregister(EndingOnCpu.name)


def registered() -> tuple[list[torch.Tensor], AdaptiveConnector]:
    """Return the caches of three layers, and a connector that has them."""
    caches = [torch.randn(2, 4, 4, 2, 8) for _ in range(3)]
    connector = AdaptiveConnector("cpu", backend=EndingOnCpu.name)
    connector.register_kv_caches(caches)
    return caches, connector


@pytest.mark.parametrize("how", ["done", "synchronize", "dropped"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_copy_ends_when_its_kernels_do(
    how: str, kind: Any, late: EndingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, connector = registered()
    slots = [5, 2, 9]
    expected = torch.stack([cache.view(2, 16, 16)[:, slots] for cache in caches], dim=1)
    first = torch.zeros_like(expected)
    connector.from_gpu(first, None, slots)  # loads the kernel
    made = watch_whole_copies(monkeypatch)
    late.late = True
    chunk = torch.zeros_like(expected)
    ids = kind(slots)
    copy = connector.from_gpu(chunk, None, ids)
    assert made == [True]
    if kind is list:
        ids[:] = [15] * 3  # the kernels have read them, or have a list of their own
    assert not copy.done()
    assert not chunk.any()
    if how == "dropped":
        events = late.created
        del copy
        late.work()
        for _ in range(200):
            connector.from_gpu(chunk, None, slots)
            late.work()
        assert late.created <= events + 64
    elif how == "done":
        late.work()
        assert copy.done()
    else:
        copy.synchronize()
    assert torch.equal(chunk, expected)


# Ends


def test_an_end_serves_one_copy_at_a_time(rig: Rig) -> None:
    copies = [rig.issue() for _ in range(3 * 64)]
    used = [copy.completions[0].event for copy in copies]
    assert len(set(map(id, used))) == len(used)
    assert rig.driver.created == 3 * 64
    rig.driver.work()
    assert all(copy.done() for copy in copies)
    assert all(copy.completions[0].event is None for copy in copies)
    again = [rig.issue() for _ in copies]
    assert {id(copy.completions[0].event) for copy in again} == set(map(id, used))
    assert rig.driver.created == 3 * 64


def test_ends_of_dropped_copies_are_used_again(rig: Rig) -> None:
    for _ in range(1000):
        rig.issue()
        rig.driver.work()
    assert rig.driver.created == 64


def test_the_number_of_ends_is_limited(rig: Rig) -> None:
    rig.ends = rig.kernels.ends = Ends(rig.driver, CPU, batches=2)
    copies = [rig.issue() for _ in range(2 * 64)]
    assert rig.kernels.issue(rig.copy, ()) is None
    rig.driver.work()
    rig.issue()
    assert all(copy.done() for copy in copies)


def test_nothing_that_was_not_launched_keeps_an_end(rig: Rig) -> None:
    for _ in range(200):
        assert rig.kernels.issue(lambda *_: -50, ()) is None
    assert not rig.driver.queue
    assert len(rig.ends.free) == 64


def test_ids_are_retained_until_the_end(rig: Rig) -> None:
    ids = torch.zeros(3)
    gone = weakref.ref(ids)
    made = rig.issue(ids)
    del ids, made
    gc.collect()
    assert gone() is not None
    rig.driver.work()
    transfer.retire()
    gc.collect()
    assert gone() is None


def test_memory_of_the_host_is_retained_until_the_end(rig: Rig) -> None:
    memory = torch.zeros(3)
    gone = weakref.ref(memory)
    end, _ = rig.made()
    end.completion_across(memory)
    del memory
    assert transfer.copies_holding_memory() == 1
    assert gone() is not None
    rig.driver.work()
    transfer.retire()
    gc.collect()
    assert gone() is None


def test_a_stream_waits_for_the_event(rig: Rig) -> None:
    stream: Any = SimpleNamespace(device=CPU, stream_id=5, cuda_stream=5)
    rig.issue().wait(stream)
    rig.issue().wait(stream)
    assert [each for each, _ in rig.driver.followed] == [5, 5]
    assert len({event for _, event in rig.driver.followed}) == 2


def test_no_copy_gets_an_end_that_a_thread_waits_for(rig: Rig) -> None:
    copy = rig.issue()
    completion = copy.completions[0]
    end = completion.event
    completion.blocked += 1  # as a thread that blocks until the event
    rig.driver.work()
    assert completion.ended()
    assert end not in rig.ends.free
    completion.blocked -= 1
    completion.synchronize()
    assert rig.ends.free.count(end) == 1  # type: ignore[arg-type]


# Bad ids


def test_the_handle_reports_a_bad_id(rig: Rig) -> None:
    rig.bad = 3
    copy = rig.issue()
    other = rig.issue()
    rig.driver.work()
    with pytest.raises(SlotError, match=r"^Position 2 of a device index is past the end"):
        copy.done()
    assert other.done()
    for _ in range(200):
        again = rig.issue()
        rig.driver.work()
        assert again.done()  # no other copy finds the word set


def test_the_owner_reports_a_bad_id_of_a_dropped_copy(rig: Rig) -> None:
    late = LateErrors()
    rig.bad = 1
    rig.issue(owner=late.owner)
    late.check()
    rig.driver.work()
    LateErrors().check()
    with pytest.raises(SlotError, match=r"^Position 0"):
        late.check()
    late.check()


# The current stream


@pytest.mark.parametrize("alone", [False, True], ids=["", "one device"])
@pytest.mark.parametrize("answers", [(7, 0, 0), (7, 1, 0), (8, 0, 0), (7, 0, 900)])
def test_a_copy_asks_for_the_stream_itself(
    answers: tuple[int, int, int],
    alone: bool,
    late: EndingDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, captured, error = answers
    asked: list[str] = []

    def current_device(out: Any) -> int:
        asked.append("device")
        out[0] = device
        return 0

    def current_stream(number: int, out: Any) -> int:
        asked.append(f"stream of {number}")
        out[0] = 0x7FFF12345678
        return 0

    def capturing(stream: int, out: Any) -> int:
        asked.append(f"capture of {stream:x}")
        out[0] = captured
        return error

    number = ctypes.POINTER(ctypes.c_int)
    answer = ctypes.c_int
    functions = (
        ctypes.CFUNCTYPE(answer, number)(current_device),
        ctypes.CFUNCTYPE(answer, ctypes.c_int32, ctypes.POINTER(WORD))(current_stream),
        ctypes.CFUNCTYPE(answer, WORD, number)(capturing),
    )
    addresses = [ctypes.cast(each, ctypes.c_void_p).value for each in functions]
    words = CurrentStream(7, *addresses)
    if alone:  # the process has one device
        words.current_device = None
    kernels = choose("cpu", EndingOnCpu.name).backend.row_kernels
    assert kernels is not None
    kernels.executor.current = ctypes.addressof(words)
    _, connector = registered()
    chunk = torch.zeros(2, 3, 3, 16)
    ids = torch.tensor([5, 2, 9])
    connector.from_gpu(chunk, None, ids)  # loads the kernel
    made = watch_whole_copies(monkeypatch)
    asked.clear()
    connector.from_gpu(chunk, None, ids)
    assert made == [True]
    right = alone or device == 7
    by_core = right and (captured, error) == (0, 0)
    questions = ["device", "stream of 7", "capture of 7fff12345678"][alone : 3 if right else 1]
    assert asked == questions
    # Else torch is asked, whose answer stands.
    assert late.queue[-1].stream == (0x7FFF12345678 if by_core else 0)

    monkeypatch.setattr(kernels.process, "forked", True, raising=False)
    asked.clear()
    connector.from_gpu(chunk, None, ids)  # the driver refuses it, if it does not survive a fork
    assert not asked
    assert late.queue[-1].stream == 0


@pytest.mark.parametrize("kind", ["list", "dense", "strided"])
def test_ids_of_the_host_are_where_kernels_read_them(
    kind: str, late: EndingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, connector = registered()
    slots = [5, 2, 9]
    expected = torch.stack([cache.view(2, 16, 16)[:, slots] for cache in caches], dim=1)
    ids: Any = slots
    if kind != "list":
        ids = torch.tensor([5, 5, 2, 2, 9, 9])[::2] if kind == "strided" else torch.tensor(slots)
    chunk = torch.zeros_like(expected)
    connector.from_gpu(chunk, None, ids)  # loads the kernel
    made = watch_whole_copies(monkeypatch)
    chunk.zero_()
    late.late = True
    connector.from_gpu(chunk, None, ids)
    if kind == "strided":
        ids.fill_(15)
    late.work()
    assert made == [True]
    assert torch.equal(chunk, expected)


def test_no_copy_is_made_whole_while_a_word_reports_an_error(
    late: EndingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connector = registered()
    chunk = torch.zeros(2, 3, 3, 16)
    made = watch_whole_copies(monkeypatch)
    version = chunk._version
    copies = 0
    for value, whole in ((0, True), (1, False), (0, True)):
        for batch in transfer.word_batches:
            batch[-1] = value
        if not copies:
            connector.from_gpu(chunk, None, [5, 2, 9])  # loads the kernel
            made.clear()
        connector.from_gpu(chunk, None, [5, 2, 9])
        copies += 1
        assert made[-1] is whole
    assert chunk._version == version + copies + 1


# Errors of the driver


def test_an_event_that_is_not_recorded(rig: Rig) -> None:
    rig.driver.refuse_at = 0
    free = rig.ends.acquire_after_ends()
    assert free is not None
    free.release(free)
    with pytest.raises(TransferError, match=r"^The launch: expected success"):
        rig.issue()
    rig.driver.refuse_at = -1
    assert free not in rig.ends.free  # what was launched may use it
    rig.issue().synchronize()


@pytest.mark.parametrize("how", ["done", "synchronize"])
def test_an_error_of_the_device_comes_to_who_waits(rig: Rig, how: str) -> None:
    copy = rig.issue()
    rig.driver.answers = [700] * 2
    with pytest.raises(TransferError, match=r"^Expected copies on cpu to end, got error 700 from"):
        copy.synchronize(5) if how == "synchronize" else copy.done()
    rig.driver.answers = [NOT_READY, 0]
    assert not copy.done()
    assert copy.done()


def test_the_first_call_of_a_thread_has_no_context(rig: Rig) -> None:
    copy = rig.issue()
    rig.driver.work()
    before = rig.driver.adopted
    rig.driver.answers = [201, 201]
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(copy.done()))
    thread.start()
    thread.join()
    assert seen == [True]
    assert rig.driver.adopted == before + 1
