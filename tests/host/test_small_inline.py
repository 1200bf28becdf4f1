# SPDX-License-Identifier: Apache-2.0
"""Small values inline, through a stand-in for the driver's library that copies at once.

It shows what the driver is asked, and out of which memory; it says nothing about a driver.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_libcuda import FakeLibrary, Sent
from support.guarded_memory import filled, refused
from support.small_cases import INTEGERS, drawn, forget, mixed_up, sent_by_a_fork

from portakv import LayoutError, TransferError, Unsupported
from portakv.host import _small_ways, small
from portakv.host._small_ways import INLINE_BYTES as MOST
from portakv.host._small_ways import Inline
from portakv.host.small import SmallCopy, choose, to_device
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import streams

CPU, CARD = torch.device("cpu"), torch.device("cuda", 1)
STREAM = 0x7F55_0000_1230  # a handle of more than 32 bits


class Cuda:
    """The stand-in, and what torch tells of two devices, of which number 1 is asked for."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.current, self.entered = 1, list[int]()
        self.raw: dict[int | None, int] = {None: STREAM, 0: 70, 1: STREAM}
        self.adopted: list[int] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.entered.append(device.index)
        yield
        self.current = before

    def adopt(self, device: torch.device) -> None:
        self.adopted.append(threading.get_ident())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeLibrary:
    return FakeLibrary(tmp_path_factory.mktemp("cuda"), None)


@pytest.fixture
def cuda(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda(library)
    library.forget()
    library.read_by_page_tables()
    for name, stands in {
        "_cuda_getDevice": lambda: fake.current,
        "_cuda_getCurrentRawStream": lambda index: fake.raw[index],
    }.items():
        monkeypatch.setattr(torch._C, name, stands, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda_driver, "library", lambda: library.library)
    monkeypatch.setattr(_cuda_driver, "adopt", fake.adopt)
    monkeypatch.setattr(small, "resolve", torch.device)
    forget()
    yield fake
    forget()


@pytest.fixture
def to_cpu(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Small copies to the CPU go inline where they fit, as on a device of which there is one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def why_not(way: str, device: torch.device, nbytes: int) -> str | None:
        fits = way == "host" or (way == "inline" and nbytes <= MOST)
        return None if fits else "it is a test"

    monkeypatch.setattr(small, "_why_not", why_not)
    return cuda


class Without:
    """A library that has none of the functions."""

    def __getitem__(self, name: str) -> None:
        raise AttributeError(f"undefined symbol: {name}")


def inline(dtype: torch.dtype, most: int) -> Inline:
    """What carries values to the second device."""
    return Inline(CARD, dtype, most)


# What arrives


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_the_bytes_arrive(to_cpu: Cuda, dtype: torch.dtype, ready: bool) -> None:
    for count in (0, 1, 2, 63, 64, MOST // dtype.itemsize):
        out, values = filled((count,), dtype, poison=True), drawn(count, dtype)
        sender = SmallCopy(count, dtype, out=out)
        assert sender.way == "inline"
        to_cpu.library.forget()
        landed = sender.send(values) if ready else to_device(values, out=out)
        assert landed is out
        assert torch.equal(out.view(torch.uint8), values.view(torch.uint8))
        asked = [(one.dst, one.nbytes, one.stream) for one in to_cpu.library.sent]
        nbytes = count * dtype.itemsize
        assert asked == ([(out.data_ptr(), nbytes, STREAM)] if count else [])


def test_a_new_tensor_and_fewer_values(to_cpu: Cuda) -> None:
    assert to_device(np.arange(6).reshape(2, 3), CPU).tolist() == [[0, 1, 2], [3, 4, 5]]
    sender = SmallCopy(9, torch.int32, CPU)
    sender.send(range(9))
    assert sender.send([7, -8]).tolist() == [7, -8]
    assert sender.out.tolist() == [7, -8, 2, 3, 4, 5, 6, 7, 8]
    assert [one.nbytes for one in to_cpu.library.sent] == [48, 36, 8]


@pytest.mark.parametrize("ready", [False, True])
def test_one_byte_more_goes_another_way(to_cpu: Cuda, ready: bool) -> None:
    for count in (MOST, MOST + 1):
        values = drawn(count, torch.uint8)
        sender = SmallCopy(count, torch.uint8, CPU)
        landed = sender.send(values) if ready else to_device(values, CPU)
        assert torch.equal(landed, values)
    assert [one.nbytes for one in to_cpu.library.sent] == [MOST]


@pytest.mark.parametrize("offset", range(1, 17))
@pytest.mark.usefixtures("to_cpu")
def test_a_target_of_any_alignment(offset: int) -> None:
    for count in (0, 1, 15, 64, 5000):
        memory = filled((5040,), torch.uint8)
        before, values = memory.clone(), drawn(count, torch.uint8)
        to_device(values, out=memory[offset : offset + count])
        assert torch.equal(memory[offset : offset + count], values)
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + count :], before[offset + count :])


def test_a_wrong_value_leaves_the_target(to_cpu: Cuda) -> None:
    sender = SmallCopy(3, torch.uint8, out=filled((3,), torch.uint8))
    for values in ([1, 2, 256], np.array([1, -1]), range(4)):
        with refused(LayoutError, watch=sender.out):
            sender.send(values)
    with refused(LayoutError, "256", watch=sender.out):
        to_device([1, 2, 256], out=sender.out)
    assert to_cpu.library.calls == []


@pytest.mark.usefixtures("to_cpu")
def test_nothing_is_refilled() -> None:
    with refused(Unsupported, "inline", "way='mapped'"):
        SmallCopy(3, torch.uint8, CPU).refill([1])


# Out of which memory


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(64), np.arange(64), np.arange(128)[::2], np.arange(64, dtype=np.uint8),
        bytearray(range(64)), bytes(range(64)),
    ],
    ids=lambda values: type(values).__name__,
)  # fmt: skip
def test_the_source_is_no_memory_of_the_caller_s(cuda: Cuda, values: Any) -> None:
    """It would be read later if it were pinned."""
    out, way = torch.zeros(64, dtype=torch.int64), inline(torch.int64, 64)
    for _ in range(3):
        way.send(values, out, None, False)
    assert out.tolist() == [int(one) for one in values]
    (source,) = {one.src for one in cuda.library.sent}
    theirs = np.asarray(memoryview(values) if isinstance(values, bytes | bytearray) else values)
    start = theirs.__array_interface__["data"][0]
    assert source + 8 * 64 <= start or start + 2 * 8 * 64 <= source


@pytest.mark.parametrize("count", [1, 64, MOST // 8])
def test_the_source_is_whole_pages_that_nobody_pins(cuda: Cuda, count: int) -> None:
    """Private, of no file, and not the heap, parts of which others register with their own."""
    senders = [inline(torch.int64, count) for _ in range(2)]
    for way in senders:
        way.send([7], torch.zeros(1, dtype=torch.int64), None, False)
    sources = [one.src for one in cuda.library.sent]
    pages = -(-8 * count // mmap.PAGESIZE) * mmap.PAGESIZE
    assert [at % mmap.PAGESIZE for at in sources] == [0, 0]
    assert abs(sources[0] - sources[1]) >= pages
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for at in sources:
        (mapping,) = [line for line in lines if at in _addresses(line[0])]
        assert at + pages - 1 in _addresses(mapping[0])
        rights, _, _, file = mapping[1:5]
        assert (rights, file, mapping[5:]) == ("rw-p", "0", [])


def _addresses(mapping: str) -> range:
    return range(*(int(one, 16) for one in mapping.split("-")))


def test_each_thread_has_memory_and_a_context_of_its_own(cuda: Cuda) -> None:
    way, turn, all_sent = inline(torch.int64, 64), threading.Lock(), threading.Barrier(4)

    def work(nth: int) -> None:
        for _ in range(2):
            with turn:
                way.send([nth] * 64, torch.zeros(64, dtype=torch.int64), None, False)
        all_sent.wait()  # so that nobody is given what another thread gave back

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sources = [one.src for one in cuda.library.sent]
    assert len(sources) == 8
    assert len(set(sources)) == 4
    # This one, which made it, and four others.
    assert len(cuda.adopted) == len(set(cuda.adopted)) == 5


@pytest.mark.usefixtures("cuda")
def test_threads_do_not_write_over_each_other_s_values() -> None:
    assert not mixed_up(inline(torch.int64, 500), 500)


# Streams, devices, processes


def test_the_current_stream_of_its_device_or_the_one_that_is_passed(cuda: Cuda) -> None:
    way, out = inline(torch.int32, 4), torch.zeros(4, dtype=torch.int32)
    way.send([1, 2], out, None, False)
    cuda.raw[1] = 0  # the default stream
    way.send([1, 2], out, None, False)
    other: Any = SimpleNamespace(cuda_stream=72)
    way.send([1, 2], out, other, False)
    assert cuda.entered == []
    cuda.current = 0
    way.send([3, 4], out, None, False)
    assert [one.stream for one in cuda.library.sent] == [STREAM, 0, 72, 0]
    assert (cuda.entered, cuda.current) == ([1], 0)
    assert out.tolist() == [3, 4, 0, 0]


def test_a_driver_that_refuses(cuda: Cuda) -> None:
    way, out = inline(torch.int8, 4), torch.zeros(4, dtype=torch.int8)
    cuda.library.forget(refuse_at=0)
    with refused(TransferError, "2 values", "CUDA_ERROR_INVALID_VALUE", "Check", watch=out):
        way.send([1, 2], out, None, False)
    cuda.library.forget()
    way.send([1, 2], out, None, False)
    assert out.tolist() == [1, 2, 0, 0]


@pytest.mark.usefixtures("cuda")
def test_errors_have_a_name_where_the_driver_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cuda_driver.error_name(1, _cuda_driver.library()) == "CUDA_ERROR_INVALID_VALUE"

    monkeypatch.setattr(_cuda_driver, "library", Without)
    assert _cuda_driver.error_name(700, _cuda_driver.library()) == "error 700"


def test_a_forked_process_cannot_send(cuda: Cuda) -> None:
    way, out = inline(torch.int8, 4), torch.zeros(4, dtype=torch.int8)
    way.send([1], out, None, False)
    assert sent_by_a_fork(way, out) == 0
    way.send([3], out, None, False)
    assert [one.nbytes for one in cuda.library.sent] == [1, 1]


def test_inside_a_capture(to_cpu: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = SmallCopy(2, torch.int32, out=filled((2,), torch.int32), way="inline")
    opened = SmallCopy(2, torch.int32, CPU)
    monkeypatch.setattr(small, "capturing", lambda device: True)
    names = ("way='value'", "way='mapped'", "inside graph capture")
    followed: list[Any] = []
    monkeypatch.setattr(streams, "follow_current", lambda *rest: followed.append(rest))
    stream: Any = SimpleNamespace(device=CPU)
    with refused(Unsupported, "by way='inline'", *names, watch=sender.out):
        sender.send([1, 2], stream=stream)
    with refused(Unsupported, "left open", *names):
        opened.send([1, 2])
    for way in (None, "inline"):
        with refused(Unsupported, "to_device", "way='value'", "SmallCopy", watch=sender.out):
            to_device([1, 2], out=sender.out, way=way, stream=stream)
    # Nor did a stream wait for another one, which would have drawn it into the capture.
    assert (followed, to_cpu.library.calls) == ([], [])


# Where it cannot be had


def test_where_it_can_be_had(cuda: Cuda) -> None:
    """And the first question gave the thread a context; nothing is asked again."""
    assert _small_ways.why_not_inline(CARD) is None
    assert len(cuda.adopted) == 1
    cuda.library.read_by_page_tables(1)
    assert _small_ways.why_not_inline(CARD) is None
    assert choose(MOST, CARD) == choose(0, CARD)
    assert choose(MOST, CARD).way == "inline"
    assert len(cuda.adopted) == 1


def test_another_kind_of_device(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    why = _small_ways.why_not_inline(torch.device("xpu", 0))
    assert why == "the CUDA driver does not serve xpu devices"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _small_ways.why_not_inline(CARD) == "this torch is built for ROCm, not for CUDA"
    assert not cuda.adopted


@pytest.mark.usefixtures("cuda")
def test_without_the_library_or_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(_cuda_driver, "library", absent)
    assert "cannot open shared object file" in (_small_ways.why_not_inline(CARD) or "")
    forget()
    monkeypatch.setattr(_cuda_driver, "library", Without)
    assert "undefined symbol: cuMemcpyHtoDAsync_v2" in (_small_ways.why_not_inline(CARD) or "")


def test_a_device_that_reads_the_host_s_pages(cuda: Cuda) -> None:
    cuda.library.read_by_page_tables(1)
    assert _small_ways.why_not_inline(torch.device("cuda", 0)) is None
    why = _small_ways.why_not_inline(CARD)
    assert why is not None
    assert why.startswith("cuda:1 reads pageable memory by the host's page tables")


def test_a_driver_that_does_not_tell(cuda: Cuda) -> None:
    cuda.library.read_by_page_tables(untold=True)
    why = _small_ways.why_not_inline(CARD) or ""
    assert "does not tell" in why
    assert "CUDA_ERROR_INVALID_VALUE" in why


def test_what_the_stand_in_notes(cuda: Cuda) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    inline(torch.int64, 1).send([5], out, None, False)
    (only,) = cuda.library.sent
    assert only == Sent(out.data_ptr(), only.src, 8, STREAM)
    assert [call.kind for call in cuda.library.calls] == ["h"]
