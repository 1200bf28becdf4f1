# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver's copies, through a stand-in for its library that really copies.

It shows what the driver is asked, and that the bytes land; it says nothing about a driver.
"""

from __future__ import annotations

import ctypes
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from support.crossing_cases import bytes_of_pieces, drawn_runs, runs_of
from support.fake_libcuda import Call, FakeLibrary
from support.guarded_memory import refused

from portakv import KVView, TransferError
from portakv.engines import link
from portakv.engines.link import FOLD_BELOW, LEAST_BATCH, Copies, CudaLink, TorchLink, link_of
from portakv.engines.pieces import ALL, Pieces, to_2d_copies
from portakv.plan.runs import Runs
from portakv.runtime import cuda as _cuda_driver

STREAM = 0x7F55_0000_1230  # a handle of more than 32 bits
BATCHES = (13, 12, None)  # as CUDA 13 has it, as 12.8, and an older driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(params=BATCHES)
def library(request: pytest.FixtureRequest, folder: Path) -> FakeLibrary:
    return FakeLibrary(folder, request.param)


class Memory:
    """Two buffers: random bytes, and zeros into which pieces are copied."""

    def __init__(self, nbytes: int = 8192) -> None:
        self.src = np.random.default_rng(6).integers(1, 256, nbytes, dtype=np.uint8)
        self.dst = np.zeros(nbytes, dtype=np.uint8)

    def at(self, pieces: Pieces) -> Pieces:
        """Pieces whose addresses count from 0, in these buffers."""
        for start, pitch in ((pieces.src, pieces.src_pitch), (pieces.dst, pieces.dst_pitch)):
            past = start + (pieces.height - 1) * pitch + pieces.width
            assert past.max(initial=0) <= self.dst.size
        src, dst = self.src.ctypes.data, self.dst.ctypes.data
        return pieces._replace(dst=pieces.dst + dst, src=pieces.src + src)

    def judge(self, pieces: Pieces) -> None:
        """Exactly the pieces' bytes were copied; then all is forgotten."""
        expected = np.zeros_like(self.dst)
        moved = bytes_of_pieces(pieces)
        if moved:
            targets, sources = np.array(moved).T
            expected[targets] = self.src[sources]
        assert (self.dst == expected).all()
        self.dst[:] = 0


def plain(count: int, width: int = 8) -> Pieces:
    """So many copies at odd distances."""
    at = np.cumsum(np.arange(count) % 3 + 1) * 2 * width
    return to_2d_copies(runs_of(at.tolist(), at[::-1].tolist(), width))


def rows(groups: int) -> Pieces:
    """So many pieces of nine rows."""
    src = [g * g * 128 + g * 1000 + row * 64 for g in range(groups) for row in range(9)]
    return to_2d_copies(runs_of(src, range(0, 16 * len(src), 16), 16))


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_byte_lands(folder: Path, batch: int | None, to_device: bool) -> None:
    library = FakeLibrary(folder, batch)
    copies = Copies(library.library)

    @given(drawn_runs())
    def check(runs: Runs) -> None:
        pieces = to_2d_copies(runs)
        memory = Memory(max((at + runs.nbytes).max(initial=0) for at in runs[:2]) + 64)
        library.forget()
        copies.copy(memory.at(pieces), to_device, STREAM)
        memory.judge(pieces)
        assert {call.stream for call in library.calls} <= {STREAM}

    check()


@pytest.mark.parametrize("count", [0, 1, LEAST_BATCH - 1, LEAST_BATCH, 100])
def test_many_plain_copies_are_one_call(library: FakeLibrary, count: int) -> None:
    memory, pieces = Memory(), plain(count)
    Copies(library.library).copy(memory.at(pieces), True, STREAM)
    memory.judge(pieces)
    batches = library.batches and count >= LEAST_BATCH
    wanted = [Call("b", count, STREAM)] if batches else [Call("p", 1, STREAM)] * count
    assert library.calls == wanted


def test_rows_and_plain_copies_together(library: FakeLibrary) -> None:
    memory = Memory(65536)
    few, many = rows(3), plain(50)
    pieces = Pieces(*(np.concatenate(both) for both in zip(few, many, strict=True)))
    pieces.dst[3:] += 32768
    mixed = Pieces(*(column[np.random.default_rng(8).permutation(53)] for column in pieces))
    Copies(library.library).copy(memory.at(mixed), False, STREAM)
    memory.judge(mixed)
    kinds = [call.kind for call in library.calls]
    assert kinds.count("r") == 3
    assert kinds.count("b") == bool(library.batches)
    assert sum(call.copies for call in library.calls if call.kind != "r") == 50


@pytest.mark.parametrize("library", [13, 12], indirect=True)
def test_a_batch_has_so_many_entries_at_most(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MOST_DESCRIPTORS", 16)
    monkeypatch.setattr(link, "FIRST_DESCRIPTORS", 3)
    wanted = {3: [3], 4: [3, 1], 16: [3, 12, 1], 31: [3, 12, 16], 50: [3, 12, 16, 16, 3]}
    for count, sizes in wanted.items():
        memory, pieces = Memory(), plain(count)
        library.forget()
        Copies(library.library).copy(memory.at(pieces), True, STREAM)
        memory.judge(pieces)
        assert [call.copies for call in library.calls] == sizes


def test_wide_rows_are_folded_without_batches_and_if_they_are_many(library: FakeLibrary) -> None:
    below = Copies(library.library).fold_below
    assert below == (FOLD_BELOW if library.batches else ALL)
    for width, height, folds in ((FOLD_BELOW, 20, not library.batches), (FOLD_BELOW, 32, True),
                                 (FOLD_BELOW // 4, 20, True)):  # fmt: skip
        src, dst = (range(0, height * gap * width, gap * width) for gap in (2, 1))
        made = to_2d_copies(runs_of(src, dst, width), below=below)
        assert made.number == (1 if folds else height)


def test_columns_that_are_not_contiguous(library: FakeLibrary) -> None:
    memory, pieces = Memory(), plain(40)
    every = Pieces(*(column[::2] for column in pieces))
    Copies(library.library).copy(memory.at(every), True, STREAM)
    memory.judge(every)


@pytest.mark.parametrize("library", [13, 12], indirect=True)
@pytest.mark.parametrize("what", ["1 x 8 bytes", "9 x 16 bytes", "batch of 20 copies"])
def test_what_the_driver_refuses(library: FakeLibrary, what: str) -> None:
    pieces = {"1": plain(1), "9": rows(3), "b": plain(20)}[what[0]]
    memory = Memory()
    library.forget(refuse_at=int(what[0] == "9"))
    with refused(TransferError, what, "CUDA_ERROR_INVALID_VALUE", "Check"):
        Copies(library.library).copy(memory.at(pieces), True, STREAM)
    assert len(library.calls) == int(what[0] == "9")


def fake_stream(handle: int, log: list[str]) -> Any:
    """A stream of the fake torch below: a handle, and a log of who waits for whom."""

    def wait_stream(other: Any) -> None:
        log.append(f"{handle} waits for {other.cuda_stream}")

    return SimpleNamespace(cuda_stream=handle, wait_stream=wait_stream)


@pytest.fixture
def cuda(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What of torch's CUDA a crossing touches, on a machine without any: the current device, who
    adopted a context, and streams by their handles."""
    state = SimpleNamespace(device=0, adopted=[], log=[], library=library)

    class Switched:
        def __init__(self, device: torch.device) -> None:
            self._device = device

        def __enter__(self) -> None:
            self._before, state.device = state.device, self._device.index

        def __exit__(self, *_: object) -> None:
            state.device = self._before

    def adopt(device: torch.device) -> None:
        state.adopted.append((threading.get_ident(), device.index))

    monkeypatch.setattr(_cuda_driver, "library", lambda: library.library)
    monkeypatch.setattr(_cuda_driver, "adopt", adopt)
    monkeypatch.setattr(_cuda_driver, "raw", lambda stream, index: stream.cuda_stream)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state.device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Switched)
    monkeypatch.setattr(link, "own_stream", lambda device: fake_stream(77, state.log))
    return state


def views(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> tuple[KVView, KVView]:
    """Views of the buffers; the destination says that it is on a device."""
    made = [KVView(torch.from_numpy(each).view(-1, 16), "token dim") for each in
            (memory.src, memory.dst)]  # fmt: skip
    places = (SimpleNamespace(place="pinned"), SimpleNamespace(place="device"))
    for view, form in zip(made, places, strict=True):
        monkeypatch.setattr(view, "form", form)
    return made[0], made[1]


def test_the_right_device_in_any_thread(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, pieces = Memory(), plain(3)
    where = views(memory, monkeypatch)
    made = CudaLink(torch.device("cuda", 1))
    seen = []
    real = Copies.copy

    def copy(self: Copies, *args: Any) -> None:
        seen.append(cuda.device)
        real(self, *args)

    monkeypatch.setattr(Copies, "copy", copy)
    for _ in range(2):
        made.copy(memory.at(pieces), *where, fake_stream(STREAM, cuda.log))
        memory.judge(pieces)
    other = threading.Thread(
        target=lambda: made.copy(memory.at(pieces), *where, fake_stream(STREAM, cuda.log))
    )
    other.start()
    other.join()
    memory.judge(pieces)
    assert seen == [1, 1, 1]
    assert cuda.device == 0
    # Once in each thread, since a new one has no context.
    assert len(cuda.adopted) == len(set(cuda.adopted)) == 2


@pytest.mark.parametrize("handle", [0, 1])
def test_the_default_stream_is_not_given_to_a_batch(
    cuda: Any, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    where = views(memory, monkeypatch)
    made = CudaLink(torch.device("cuda", 0))
    for pieces in (plain(LEAST_BATCH - 1), plain(30), plain(40)):
        cuda.log.clear()
        cuda.library.forget()
        made.copy(memory.at(pieces), *where, fake_stream(handle, cuda.log))
        memory.judge(pieces)
        beside = pieces.number >= LEAST_BATCH and cuda.library.batches
        assert {call.stream for call in cuda.library.calls} == {77 if beside else handle}
        order = [f"77 waits for {handle}", f"{handle} waits for 77"]
        assert cuda.log == (order if beside else [])


@pytest.mark.parametrize("library", [13], indirect=True)
def test_the_default_stream_waits_also_for_what_failed(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    cuda.library.forget(refuse_at=0)
    with pytest.raises(TransferError):
        CudaLink(torch.device("cuda", 0)).copy(
            memory.at(plain(30)), *views(memory, monkeypatch), fake_stream(0, cuda.log)
        )
    assert cuda.log[-1] == "0 waits for 77"


def test_others_get_in_between_copies_in_a_row(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many bytes a copy goes by another stream: each stream has its own, and its count."""
    memory, pieces = Memory(), plain(1, width=128)
    monkeypatch.setattr(link, "IN_A_ROW", 300)
    streams = iter((77, 78, 79))
    monkeypatch.setattr(link, "own_stream", lambda device: fake_stream(next(streams), cuda.log))
    where = views(memory, monkeypatch)
    made = CudaLink(torch.device("cuda", 0))
    beside = {5: 77, 6: 78}
    for nth in range(1, 10):
        for handle in beside:
            cuda.log.clear()
            cuda.library.forget()
            made.copy(memory.at(pieces), *where, fake_stream(handle, cuda.log))
            memory.judge(pieces)
            other, turn = beside[handle], nth % 3 == 0
            assert [call.stream for call in cuda.library.calls] == [other if turn else handle]
            order = [f"{other} waits for {handle}", f"{handle} waits for {other}"]
            assert cuda.log == (order if turn else [])


def test_only_the_first_batch_of_a_long_list_is_short(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link waits for the end of its call alone."""
    memory, pieces = Memory(), plain(60)
    for name, size in (("IN_A_ROW", 480), ("FIRST_DESCRIPTORS", 3), ("GROWTH", 2)):
        monkeypatch.setattr(link, name, size)
    made = CudaLink(torch.device("cuda", 0))
    made.copy(memory.at(pieces), *views(memory, monkeypatch), fake_stream(5, cuda.log))
    memory.judge(pieces)
    if cuda.library.batches:
        assert [call.copies for call in cuda.library.calls] == [3, 6, 11, 20, 20]


def test_copies_beyond_the_limit_take_turns_too(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, pieces = Memory(), plain(1, width=128)
    monkeypatch.setattr(link, "IN_A_ROW", 100)
    made = CudaLink(torch.device("cuda", 0))
    for _ in range(4):
        made.copy(memory.at(pieces), *views(memory, monkeypatch), fake_stream(5, cuda.log))
    assert [call.stream for call in cuda.library.calls] == [5, 77, 5, 77]


def test_a_long_list_crosses_in_turns(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, pieces = Memory(), plain(60)
    monkeypatch.setattr(link, "IN_A_ROW", 160)
    made = CudaLink(torch.device("cuda", 0))
    made.copy(memory.at(pieces), *views(memory, monkeypatch), fake_stream(5, cuda.log))
    memory.judge(pieces)
    row: dict[int, int] = {5: 0, 77: 0}
    streams = [stream for call in cuda.library.calls for stream in [call.stream] * call.copies]
    for before, stream in pairwise([0, *streams]):
        row[stream] = row[stream] + 8 if stream == before else 8
        assert row[stream] <= 160
    assert streams.count(5) + streams.count(77) == 60
    assert cuda.log[-1] == "5 waits for 77"


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
