# SPDX-License-Identifier: Apache-2.0
"""What small copies ask of the CUDA driver, through a stand-in that notes it: out of which memory,
on which stream, of which device, and why ``inline`` cannot be had."""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_libcuda import FakeLibrary
from support.guarded_memory import filled, refused
from support.small_cases import STREAM, Card, forget, in_threads, installed

from portakv import TransferError, Unsupported
from portakv.host import _small_ways, small
from portakv.host._small_ways import INLINE_BYTES, ByValue, Inline, Way
from portakv.host.small import SmallCopy, choose, to_device
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import streams

CPU, CARD = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeLibrary:
    return FakeLibrary(tmp_path_factory.getbasetemp(), None)


@pytest.fixture
def card(library: FakeLibrary) -> Iterator[Card]:
    """The second of two devices."""
    with installed(library) as found:
        yield found


@pytest.fixture(params=[Inline, ByValue])
def way(request: pytest.FixtureRequest, card: Card) -> Way:
    """Carries up to 64 int64 to the second device."""
    found: Way = request.param(CARD, torch.int64, 64)
    return found


class Without:
    """A library that has none of the functions."""

    def __getitem__(self, name: str) -> None:
        raise AttributeError(f"undefined symbol: {name}")


# Streams, devices, processes, threads


def test_the_current_stream_of_its_device_or_the_one_that_is_passed(card: Card, way: Way) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    way.send([1, 2], out, None, False)
    card.raw[1] = 0  # the default stream
    way.send([1, 2], out, None, False)
    other: Any = SimpleNamespace(cuda_stream=72)
    way.send([1, 2], out, other, False)
    assert card.entered == []
    card.current = 0
    way.send([3, 4], out, None, False)
    assert [stream for _, _, stream in card.asked] == [STREAM, 0, 72, 0]
    assert (card.entered, card.current) == ([1], 0)
    assert out.tolist() == [3, 4, 0, 0]


def test_a_driver_that_refuses(card: Card, way: Way) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    card.library.forget(refuse_at=0)
    card.answer = 719
    names = ("2 values", "CUDA_ERROR_INVALID_VALUE") if isinstance(way, Inline) else ("719",)
    with refused(TransferError, *names, "Check", watch=out):
        way.send([1, 2], out, None, False)
    card.library.forget()
    card.answer = 0
    way.send([1, 2], out, None, False)
    assert out.tolist() == [1, 2, 0, 0]


def test_a_forked_process_cannot_send(card: Card, way: Way) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    way.send([1], out, None, False)
    child = os.fork()
    if not child:
        try:
            way.send([2], out, None, False)
        except Unsupported as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    way.send([3], out, None, False)
    assert len(card.asked) == 2


def test_each_thread_has_memory_and_a_context_of_its_own(card: Card) -> None:
    way, turn, all_sent = Inline(CARD, torch.int64, 64), threading.Lock(), threading.Barrier(4)

    def work(number: int) -> None:
        for _ in range(2):
            with turn:
                way.send([number] * 64, torch.zeros(64, dtype=torch.int64), None, False)
        all_sent.wait()  # so that none is given what another thread gave back

    in_threads(work)
    sources = [one.src for one in card.library.sent]
    assert len(sources) == 8
    assert len(set(sources)) == 4
    # This one, which made it, and four others.
    assert len(card.adopted) == len(set(card.adopted)) == 5


def test_a_capture_is_asked_of_its_device(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = {0: False, 1: True}
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: captured[card.current])
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: type("Module", (), {"device": card.device})
    )
    asks: Callable[[], bool] = small._capture_question(CARD)
    assert asks()
    card.current = 0
    assert asks()
    captured.update({0: True, 1: False})
    assert not asks()
    assert card.current == 0


def test_inside_a_capture(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(library, only="inline") as card:
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
        assert (followed, card.asked) == ([], [])


# Out of which memory


@pytest.mark.parametrize("count", [1, 64, INLINE_BYTES // 8])
def test_the_source_is_whole_pages_that_nobody_pins(card: Card, count: int) -> None:
    """Private, of no file, and not the heap, parts of which others register with their own; nor
    the caller's memory, which would be read later if it were pinned."""
    out = torch.zeros(count, dtype=torch.int64)
    senders = [Inline(CARD, torch.int64, count) for _ in range(2)]
    for way in senders:
        for values in (torch.arange(count), np.arange(count), np.arange(2 * count)[::2],
                       np.zeros(count, np.uint8), bytes(count), bytearray(count)):  # fmt: skip
            way.send(values, out, None, False)
            assert out.tolist() == [int(one) for one in values]
    sources = sorted({one.src for one in card.library.sent})
    pages = -(-8 * count // mmap.PAGESIZE) * mmap.PAGESIZE
    assert [at % mmap.PAGESIZE for at in sources] == [0, 0]
    assert sources[1] - sources[0] >= pages
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for at in sources:
        (mapping,) = [line for line in lines if at in _addresses(line[0])]
        assert at + pages - 1 in _addresses(mapping[0])
        rights, _, _, file = mapping[1:5]
        assert (rights, file, mapping[5:]) == ("rw-p", "0", [])


def _addresses(mapping: str) -> range:
    return range(*(int(one, 16) for one in mapping.split("-")))


# Where it cannot be had


def test_where_it_can_be_had(card: Card) -> None:
    """And the first question gave the thread a context; nothing is asked again."""
    assert _small_ways.why_not_inline(CARD) is None
    assert len(card.adopted) == 1
    card.library.read_by_page_tables(1)
    assert _small_ways.why_not_inline(CARD) is None
    assert choose(INLINE_BYTES, CARD) == choose(0, CARD)
    assert choose(INLINE_BYTES, CARD).way == "inline"
    assert len(card.adopted) == 1


@pytest.mark.parametrize(
    ("library_is", "why"),
    [
        ("absent", "cannot open shared object file"),
        ("without", "undefined symbol: cuMemcpyHtoDAsync_v2"),
        ("untold", "does not tell .*CUDA_ERROR_INVALID_VALUE"),
        ("shared", "^cuda:1 reads pageable memory by the host's page tables"),
        ("rocm", "^this torch is built for ROCm, not for CUDA$"),
    ],
)
def test_why_it_cannot_be_had(
    card: Card, library_is: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    if library_is == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif library_is in ("absent", "without"):
        monkeypatch.setattr(_cuda_driver, "library", absent if library_is == "absent" else Without)
    else:
        card.library.read_by_page_tables(1, untold=library_is == "untold")
    found = _small_ways.why_not_inline(CARD)
    assert found is not None
    assert re.search(why, found)
    if library_is == "shared":
        assert _small_ways.why_not_inline(torch.device("cuda", 0)) is None
    forget()


@pytest.mark.usefixtures("card")
def test_errors_have_a_name_if_the_driver_tells_it() -> None:
    assert _cuda_driver.error_name(1, _cuda_driver.library()) == "CUDA_ERROR_INVALID_VALUE"
    assert _cuda_driver.error_name(700, Without()) == "error 700"
