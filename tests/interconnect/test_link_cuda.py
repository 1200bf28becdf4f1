# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver's copies, through a stand-in for its library that really copies.

It shows the calls of the driver, and that the bytes land; it says nothing about a real driver.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.crossing_cases import Ends, drawn_runs, pieces_of_runs, runs_of
from support.fake_libcuda import Call, FakeLibrary
from support.guarded_memory import refused

from portakv import KVView, TransferError
from portakv.core.call import Fault
from portakv.core.link import Link, pack_crossing
from portakv.interconnect import link
from portakv.interconnect.link import (
    ALL,
    FOLD_BELOW,
    LEAST_BATCH,
    CudaLink,
    Pieces,
    TorchLink,
    link_of,
)
from portakv.plan.plan import Runs
from portakv.runtime import cuda as _cuda_driver

STREAM = 0x7F55_0000_1230  # a handle of more than 32 bits
BATCHES = (13, 12, None)  # as CUDA 13 has it, as 12.8, and an older driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(params=BATCHES)
def library(request: pytest.FixtureRequest, folder: Path) -> FakeLibrary:
    return FakeLibrary(folder, request.param)


class Memory(Ends):
    """Random bytes, and zeros into which pieces are copied by a library's driver."""

    def __init__(self, nbytes: int = 8192) -> None:
        random = np.random.default_rng(6).integers(1, 256, nbytes, dtype=np.uint8)
        super().__init__(torch.from_numpy(random), torch.zeros(nbytes, dtype=torch.uint8))

    def carry(self, pieces: Pieces, library: FakeLibrary, to_device: bool = True) -> None:
        """Copy and judge pieces, with the rules that hold."""
        rules = link.IN_A_ROW, link.FIRST_DESCRIPTORS, link.MOST_DESCRIPTORS, 4, LEAST_BATCH
        crossing = pack_crossing(to_device, STREAM, 0, *rules)
        assert Link(library.library).submit(self.at(pieces), crossing) is None
        self.judge(pieces)


def plain(count: int, width: int = 8) -> Pieces:
    at = np.cumsum(np.arange(count) % 3 + 1) * 2 * width
    return pieces_of_runs(runs_of(at.tolist(), at[::-1].tolist(), width))


def rows(groups: int) -> Pieces:
    src = [g * g * 128 + g * 1000 + row * 64 for g in range(groups) for row in range(9)]
    return pieces_of_runs(runs_of(src, range(0, 16 * len(src), 16), 16))


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_byte_lands(folder: Path, batch: int | None, to_device: bool) -> None:
    library = FakeLibrary(folder, batch)

    @given(drawn_runs(), st.sampled_from([1 << 40, 200, 31, 7, 1]))
    def check(runs: Runs, in_a_row: int) -> None:
        pieces = pieces_of_runs(runs)
        memory = Memory(max((at + runs.nbytes).max(initial=0) for at in runs[:2]) + 64)
        library.forget()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link, "IN_A_ROW", in_a_row)
            memory.carry(pieces, library, to_device)
        calls = library.calls
        assert {call.stream for call in calls} <= {STREAM}
        largest = (pieces.width * pieces.height).max(initial=0) > in_a_row
        assert [call.kind for call in calls if call.kind == "w"] or not largest

    check()


def test_columns_that_may_not_be_written_or_are_not_contiguous(library: FakeLibrary) -> None:
    src = np.arange(0, 320, 32)[::2]
    dst = np.arange(5) * 8
    dst.setflags(write=False)
    width = np.full(5, 8)
    Memory().carry(Pieces(dst, src, width, np.ones(5, dtype=np.int64), width, width), library)


def test_rows_and_plain_copies_together(library: FakeLibrary) -> None:
    memory = Memory(65536)
    few = rows(3)
    many = plain(50)
    pieces = Pieces(*(np.concatenate(both) for both in zip(few, many, strict=True)))
    pieces.dst[3:] += 32768
    order = np.random.default_rng(8).permutation(53)
    mixed = Pieces(*(np.repeat(column[order], 2)[::2] for column in pieces))
    memory.carry(mixed, library, False)
    kinds = [call.kind for call in library.calls]
    assert kinds.count("r") == 3
    assert kinds.count("b") == bool(library.batches)
    assert sum(call.copies for call in library.calls if call.kind != "r") == 50


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, []), (1, []), (LEAST_BATCH, [LEAST_BATCH]), (3, [3]), (4, [3, 1]), (16, [3, 12, 1]),
     (31, [3, 12, 16]), (50, [3, 12, 16, 16, 3])],
    ids=str,
)  # fmt: skip
def test_many_plain_copies_are_few_calls_of_so_many_at_most(
    library: FakeLibrary, count: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MOST_DESCRIPTORS", 16)
    monkeypatch.setattr(link, "FIRST_DESCRIPTORS", 3)
    Memory().carry(plain(count), library)
    batches = [Call("b", size, STREAM) for size in sizes] if library.batches else []
    assert library.calls == (batches or [Call("p", 1, STREAM)] * count)


def test_wide_rows_are_folded_without_batches_and_if_they_are_many(library: FakeLibrary) -> None:
    assert Link(library.library).batches == library.batches
    below = FOLD_BELOW if library.batches else ALL
    for width, height, folds in (
        (FOLD_BELOW, 20, not library.batches),
        (FOLD_BELOW, 32, True),
        (FOLD_BELOW // 4, 20, True),
    ):
        src, dst = (range(0, height * gap * width, gap * width) for gap in (2, 1))
        made = pieces_of_runs(runs_of(src, dst, width), below=below)
        assert made.number == (1 if folds else height)


@pytest.mark.parametrize("library", [13, 12], indirect=True)
@pytest.mark.parametrize("what", ["1 x 8 bytes", "9 x 16 bytes", "batch of 20 copies"])
def test_what_the_driver_refuses(
    cuda: Crossing, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = {"1": plain(1), "9": rows(3), "b": plain(20)}[what[0]]
    cuda.library.forget(refuse_at=int(what[0] == "9"))
    monkeypatch.setattr(cuda.library, "forget", lambda: None)
    with refused(TransferError, what, "CUDA_ERROR_INVALID_VALUE", "Check"):
        cuda.copy(pieces, STREAM)
    assert len(cuda.library.calls) == int(what[0] == "9")


class Crossing:
    """A `CudaLink` on a machine without CUDA, between two buffers, with what it touches of torch:
    the current device, contexts that were adopted, and streams by their handles."""

    def __init__(self, library: FakeLibrary, patch: pytest.MonkeyPatch) -> None:
        self.library = library
        self.memory = Memory()
        self.device = 0
        self.adopted: list[tuple[int, int | None]] = []
        self.link_streams = [77, 78, 79]  # handles of the next streams of the link's own

        @contextmanager
        def switched(device: torch.device) -> Iterator[None]:
            before = self.device
            self.device = device.index
            yield
            self.device = before

        def adopt(device: torch.device) -> None:
            self.adopted.append((threading.get_ident(), device.index))

        patch.setattr(_cuda_driver, "library", lambda: library.library)
        patch.setattr(_cuda_driver, "adopt", adopt)
        patch.setattr(_cuda_driver, "raw", lambda stream, index: stream.cuda_stream)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        patch.setattr(torch.cuda, "device", switched)
        patch.setattr(link, "own_stream", lambda device: self.stream(self.link_streams.pop(0)))
        buffers = (self.memory.src, "pinned"), (self.memory.dst, "device")
        self._views = []
        for buffer, place in buffers:
            view = KVView(buffer.view(-1, 16), "token dim")
            view.form = replace(view.form, place=place)
            self._views.append(view)
        self.links = [CudaLink(torch.device("cuda", at)) for at in range(2)]

    def stream(self, handle: int) -> Any:
        """A stream of that handle."""
        return SimpleNamespace(cuda_stream=handle)

    def copy(self, pieces: Pieces, handle: int, device: int = 0) -> list[int]:
        """Copy and judge pieces; returns the stream of each call that copies or rests."""
        self.library.forget()
        src, dst = self._views
        self.links[device].copy(self.memory.at(pieces), src, dst, self.stream(handle))
        self.memory.judge(pieces)
        return [call.stream for call in self.library.copies]


@pytest.fixture
def cuda(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Crossing:
    return Crossing(library, monkeypatch)


def test_the_right_device_in_any_thread(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Link.submit

    def submit(self: Link, *args: Any) -> Fault | None:
        seen.append(cuda.device)
        return real(self, *args)

    monkeypatch.setattr(Link, "submit", submit)
    for _ in range(2):
        cuda.copy(plain(3), STREAM, device=1)
    other = threading.Thread(target=lambda: cuda.copy(plain(3), STREAM, device=1))
    other.start()
    other.join()
    assert seen == [1, 1, 1]
    assert cuda.device == 0
    # Once in each thread, since a new one has no context.
    assert len(cuda.adopted) == len(set(cuda.adopted)) == 2


@pytest.mark.parametrize("handle", [0, 1])
def test_the_default_stream_is_not_given_to_a_batch(cuda: Crossing, handle: int) -> None:
    for pieces in (plain(LEAST_BATCH - 1), plain(30), plain(40)):
        on_link_stream = pieces.number >= LEAST_BATCH and cuda.library.batches
        assert set(cuda.copy(pieces, handle)) == {77 if on_link_stream else handle}
        calls = cuda.library.calls
        if not on_link_stream:
            assert cuda.library.copies == calls
            continue
        both = calls[:2], calls[-2:]
        for (record, wait), before, after in zip(both, (handle, 77), (77, handle), strict=True):
            assert record == Call("e", wait.copies, before)
            assert wait == Call("a", record.copies, after)


@pytest.mark.parametrize("library", [13], indirect=True)
def test_the_default_stream_awaits_failures(
    cuda: Crossing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the stream that replaces it: the first two calls are its events."""
    monkeypatch.setattr(link, "FIRST_DESCRIPTORS", 10)
    cuda.library.forget(refuse_at=3)
    monkeypatch.setattr(cuda.library, "forget", lambda: None)
    with pytest.raises(TransferError):
        cuda.copy(plain(30), 0)
    assert [(call.kind, call.stream) for call in cuda.library.calls] == [
        ("e", 0),
        ("a", 77),
        ("b", 77),
    ]


@pytest.mark.parametrize(("in_a_row", "every"), [(256, 2), (300, 2), (384, 3), (128, 1)])
def test_others_get_in_between_copies_in_a_row(
    cuda: Crossing, in_a_row: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream rests before the copy of 128 bytes that would exceed the limit. Each stream has its
    own count."""
    monkeypatch.setattr(link, "IN_A_ROW", in_a_row)
    for nth in range(10):
        rest = nth > 0 and nth % every == 0
        for handle in (5, 6):
            cuda.copy(plain(1, width=128), handle)
            assert cuda.library.calls == [Call("w", 1, handle)] * rest + [Call("p", 1, handle)]


def test_a_rest_is_on_the_stream_that_copies_for_the_default_stream(
    cuda: Crossing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 240)
    cuda.copy(plain(60), 0)
    stream = 77 if cuda.library.batches else 0
    assert cuda.library.copies.count(Call("w", 1, stream)) == 1
    assert {call.stream for call in cuda.library.copies} == {stream}


def test_short_copies_have_no_rest(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 480)
    for expected in ([], [], [Call("w", 1, 5)]):
        for handle in range(2, 50):
            cuda.copy(plain(30), handle)
            rests = [call for call in cuda.library.calls if call.kind == "w"]
            assert rests == [call._replace(stream=handle) for call in expected]


def test_the_first_batch_alone_is_short(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("IN_A_ROW", 480), ("FIRST_DESCRIPTORS", 3), ("GROWTH", 2)):
        monkeypatch.setattr(link, name, size)
    cuda.copy(plain(60), 5)
    if cuda.library.batches:
        assert [call.copies for call in cuda.library.calls] == [3, 6, 12, 24, 15]


@pytest.mark.parametrize("in_a_row", [8, 15, 100, 160, 479])
def test_a_long_list_crosses_with_rests(
    cuda: Crossing, in_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more bytes than the limit follow each other, and no fewer than half of it."""
    monkeypatch.setattr(link, "IN_A_ROW", in_a_row)
    assert set(cuda.copy(plain(60), 5)) == {5}
    rows = [0]
    for call in cuda.library.calls:
        if call.kind == "w":
            rows.append(0)
        else:
            rows[-1] += 8 * call.copies
    assert sum(rows) == 480
    assert max(rows) <= in_a_row
    assert all(2 * row > in_a_row for row in rows[:-1])


def test_a_range_between_rests_is_one_call(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first range may follow other copies on its stream; calls after a rest are long at
    once."""
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    monkeypatch.setattr(link, "FIRST_DESCRIPTORS", 5)
    cuda.copy(plain(2), 5)
    cuda.copy(plain(30), 5)
    rest = Call("w", 1, 5)
    if cuda.library.batches:
        first, second, third, last = (Call("b", copies, 5) for copies in (5, 7, 12, 6))
        assert cuda.library.calls == [rest, first, second, rest, third, rest, last]
    else:
        one = Call("p", 1, 5)
        assert cuda.library.calls == [rest, *[one] * 12, rest, *[one] * 12, rest, *[one] * 6]


def test_a_large_copy_is_cut(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    rest = Call("w", 1, 5)
    part = Call("p", 1, 5)
    cuda.copy(plain(1, width=200), 5)
    assert cuda.library.calls == [part, rest, part, rest, part]
    cuda.copy(rows(1), 6)  # nine rows of 16 bytes
    assert cuda.library.calls == [Call("r", 6, 6), Call("w", 1, 6), Call("r", 3, 6)]


def test_rests_begin_once_memory_can_be_pinned(
    cuda: Crossing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies go on, and have rests as soon as there is memory."""
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    cuda.library.set_device(full=True)
    cuda.copy(plain(30), 5)
    assert {call.kind for call in cuda.library.calls} <= {"b", "p"}
    cuda.library.set_device()
    cuda.copy(plain(30), 5)
    assert Call("w", 1, 5) in cuda.library.calls


def test_copies_cross_on_a_device_without_waits(
    cuda: Crossing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    cuda.library.set_device(no_waits=True)
    for _ in range(2):
        cuda.copy(plain(30), 5)
        assert {call.kind for call in cuda.library.calls} <= {"b", "p"}
        assert sum(call.copies for call in cuda.library.calls) == 30
    cuda.library.set_device()


def test_the_word_is_allocated_while_another_thread_captures(
    cuda: Crossing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    cuda.library.set_device(another_captures=True)
    assert cuda.library.library.cuMemHostAlloc(ctypes.byref(ctypes.c_uint64()), 4, 1) == 900
    cuda.copy(plain(30), 5)
    assert Call("w", 1, 5) in cuda.library.calls


def test_a_rest_that_the_driver_refuses(cuda: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", 96)
    cuda.copy(plain(12), 5)
    cuda.library.forget(refuse_at=0)
    monkeypatch.setattr(cuda.library, "forget", lambda: None)
    with refused(TransferError, "a wait for a word", "CUDA_ERROR_INVALID_VALUE", "Check"):
        cuda.copy(plain(12), 5)
    assert cuda.library.calls == []


def test_who_is_asked_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    ask = link.why_not.__wrapped__
    assert ask(torch.device("mps")) == "the CUDA driver does not serve mps devices"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert "ROCm" in str(ask(cuda))
    monkeypatch.setattr(_cuda_driver, "library", lambda: ctypes.CDLL("libnone.so.7"))
    assert "libnone.so.7" in str(ask(cuda))
    assert isinstance(link_of(torch.device("meta")), TorchLink)
