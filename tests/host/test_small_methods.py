# SPDX-License-Identifier: Apache-2.0
"""Test small copies by each method: every count, dtype, alignment, and sizes round the limits.

On the host ``inline`` goes through a stand-in for the driver, and ``value`` and ``mapped`` by the
kernels that g++ compiled; the simulated device has ``copy``; a CUDA device has all of them.
"""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.fake_libcuda import FakeLibrary
from support.guarded_memory import filled, refused
from support.pool_processes import Child
from support.small_cases import INTEGERS, STREAM, Card, Place, drawn, installed, same_bits
from support.threads import run_threads

from portakv import BackendUnavailable, LayoutError, TransferError, Unsupported
from portakv.host import small
from portakv.host.small import MOST, Send, SmallCopy, Target, choose, to_device
from portakv.runtime import cuda, nvrtc, streams

CPU = torch.device("cpu")
CARD = torch.device("cuda", 1)
INLINE = MOST["inline"]
VALUE = MOST["value"]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_count(place: Place, dtype: torch.dtype) -> None:
    sender = SmallCopy(300, dtype, place.device, method=place.requested)
    assert sender.method == place.method
    for count in range(301) if place.device.type != "privateuseone" else (*range(80), 255, 300):
        values = drawn(count, dtype)
        assert same_bits(to_device(values, place.device, method=place.requested), values), count
        assert same_bits(sender.send(values), values), count


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_counts_round_the_limits(
    place: Place, dtype: torch.dtype, send: Callable[..., torch.Tensor]
) -> None:
    shaped = filled((3, 4), dtype, device=place.device)
    assert send(range(12), shaped) is shaped
    assert shaped.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for limit in (240, 1008, 4096, 8192, VALUE, 32764, INLINE, 1 << 18):
        for count in range(limit // dtype.itemsize - 2, limit // dtype.itemsize + 3):
            nbytes = count * dtype.itemsize
            values = drawn(count, dtype)
            if nbytes > place.most and place.requested is not None:
                with refused(BackendUnavailable, str(place.most)):
                    to_device(values, place.device, method=place.requested)
                continue
            out = filled((count,), dtype, poison=True, device=place.device)
            if place.card is not None:
                place.card.forget()
            assert send(values, out) is out
            assert same_bits(out, values), count
            if place.card is not None:
                stream = place.card.raw[None]
                one = [(out.data_ptr(), nbytes, stream)]
                assert place.card.sends == (one if nbytes <= place.most else [])


@pytest.mark.parametrize("offset", [*range(1, 17), 4097])
def test_a_target_of_any_alignment(place: Place, offset: int) -> None:
    """Only the requested elements are written, by the widest vector that is allowed there."""
    for count in (0, 1, 15, 16, 17, 64, 333, 5000, min(place.most, INLINE)):
        memory = filled((count + 4200,), torch.uint8, device=place.device)
        before = memory.clone()
        values = drawn(count, torch.uint8)
        to_device(values, out=memory[offset : offset + count], method=place.requested)
        assert same_bits(memory[offset : offset + count], values)
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + count :], before[offset + count :])


def test_sends_again_and_again(place: Place) -> None:
    sender = SmallCopy(300, torch.int32, place.device, method=place.requested)
    for count in (300, 16, 0, 1, 299, 64, 72):
        before = sender.out.clone()
        values = drawn(count, torch.int32)
        landed = sender.send(values)
        assert landed.untyped_storage().data_ptr() == sender.out.data_ptr()
        assert same_bits(landed, values)
        assert torch.equal(sender.out[count:], before[count:])
    for many in (np.arange(301), torch.arange(301), range(301)):
        with refused(LayoutError, watch=sender.out):
            sender.send(many)
    whys = {
        "host": "send the values again",
        "inline": "method='mapped'",
        "value": "method='mapped'",
    }
    with refused(Unsupported, whys.get(place.method, "never captured")):
        sender.refill([1])


def test_threads_do_not_write_over_each_other_s_values(place: Place) -> None:
    """Nor has one of them ever seen the device."""
    sender = SmallCopy(64, torch.int64, place.device, method=place.requested)

    def work(number: int) -> None:
        for time in range(50):
            values = np.arange(500) * (number + 1) + time
            landed = to_device(values, place.device, method=place.requested).cpu().numpy()
            assert np.array_equal(landed, values)
            if place.device.type != "cpu":  # the host writes it immediately, not in one piece
                assert len(set(sender.send([number] * 64).tolist())) == 1

    run_threads(work, range(4))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["inline", "value", "mapped", "copy"])
def test_a_device_that_is_not_current(method: str) -> None:
    other = torch.device("cuda", 1)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for nth in range(20):
        landed = to_device(range(nth), other, method=method)
        assert (landed.device, landed.tolist()) == (other, [*range(nth)])
    assert SmallCopy(8, torch.int8, other, method=method).send([1, 2]).tolist() == [1, 2]
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("nbytes", [1, 31, 4096, 70_001, 300_000])
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_through_mapped_memory(nbytes: int, offset: int, libcuda: FakeLibrary) -> None:
    """300,000 bytes are more than one grid holds: threads go round."""
    assert 300_000 > small.MOST_BLOCKS * small.THREADS * 16
    source = torch.arange(nbytes, dtype=torch.int64).mul(2654435761).to(torch.uint8)
    target = filled((nbytes + 32,), torch.uint8)
    before = target.clone()
    out = target[16 + offset : 16 + offset + nbytes]
    slot: Any = SimpleNamespace(address=source.data_ptr())
    with installed(libcuda, only="mapped"):
        small.Kernels(CPU).mapped(out, slot, nbytes, None)
    assert torch.equal(out, source)
    assert torch.equal(target[: 16 + offset], before[: 16 + offset])
    assert torch.equal(target[16 + offset + nbytes :], before[16 + offset + nbytes :])


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
def test_nvrtc_reads_parameters_where_they_lie() -> None:
    """Without a GPU: it compiles, and no thread makes a copy of 32 KB for itself."""
    code = nvrtc.compile_text(small.source(), "compute_80").decode()
    assert ".local" not in code
    assert f"{small.VALUES_NAME}_param_0[{VALUE + 16}]" in code
    assert code.count("st.global.v4.u32") == 2


@pytest.fixture(params=["inline", "value"])
def method(request: pytest.FixtureRequest, card: Card) -> Send:
    """Carries up to 64 int64 to the second device."""
    return Target(CARD).make(request.param, torch.int64, 64)


ONE_TWO = np.array([1, 2])


class Without:
    """A library that has none of the functions."""

    def __getitem__(self, name: str) -> None:
        raise AttributeError(f"undefined symbol: {name}")


def test_the_current_stream_of_its_device_or_the_one_that_is_passed(
    card: Card, method: Send
) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    method(ONE_TWO, out, None, False)
    card.raw[1] = 0  # the default stream
    method(ONE_TWO, out, None, False)
    other: Any = SimpleNamespace(cuda_stream=72)
    method(ONE_TWO, out, other, False)
    assert card.entered == []
    card.current = 0
    method(ONE_TWO + 2, out, None, False)
    assert [stream for _, _, stream in card.sends] == [STREAM, 0, 72, 0]
    assert (card.entered, card.current) == ([1], 0)
    assert out.tolist() == [3, 4, 0, 0]


def test_a_driver_that_refuses(card: Card, method: Send) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    card.library.forget(refuse_at=0)
    card.answer = 719
    with refused(TransferError, "Check", watch=out) as caught:
        method(ONE_TWO, out, None, False)
    assert re.search("of 2 values.*CUDA_ERROR_INVALID_VALUE|launch.* 719", str(caught.value))
    card.library.forget()
    card.answer = 0
    method(ONE_TWO, out, None, False)
    assert out.tolist() == [1, 2, 0, 0]
    library: Any = Without()
    assert cuda.error_name(700, library) == "error 700"  # the library returns no name


def test_a_forked_process_cannot_send(card: Card, method: Send) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    method(ONE_TWO, out, None, False)

    def work(_: object) -> None:
        with refused(Unsupported, "forked"):
            method(ONE_TWO, out, None, False)

    assert Child(work).end() == 0
    method(ONE_TWO, out, None, False)
    assert len(card.sends) == 2


def test_each_thread_has_memory_and_a_context_of_its_own(card: Card) -> None:
    method = Target(CARD).make("inline", torch.int64, 64)
    turn = threading.Lock()
    all_sent = threading.Barrier(4)

    def work(number: int) -> None:
        for _ in range(2):
            with turn:
                method(np.arange(64) + number, torch.zeros(64, dtype=torch.int64), None, False)
        all_sent.wait()  # so that none is given what another thread gave back

    run_threads(work, range(4))
    sources = [one.src for one in card.library.sent]
    assert len(sources) == 8
    assert len(set(sources)) == 4
    # This thread made the method; four other threads use it.
    assert (len(card.adopted), len(set(card.adopted))) == (6, 5)


def test_a_capture_is_asked_of_its_device(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = {0: False, 1: True}
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: captured[card.current])
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: type("Module", (), {"device": card.device})
    )
    asks = Target(CARD).captures
    assert asks()
    card.current = 0
    assert asks()
    captured.update({0: True, 1: False})
    assert not asks()
    assert card.current == 0


def test_inside_a_capture(libcuda: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(libcuda, only="inline") as card:
        sender = SmallCopy(2, torch.int32, out=filled((2,), torch.int32), method="inline")
        opened = SmallCopy(2, torch.int32, CPU)
        monkeypatch.setattr(small, "capturing", lambda device: True)
        names = ("method='value'", "method='mapped'", "inside graph capture")
        followed: list[Any] = []
        monkeypatch.setattr(streams, "follow_current", lambda *rest: followed.append(rest))
        stream: Any = SimpleNamespace(device=CPU, stream_id=0)
        with refused(Unsupported, "by method='inline'", *names, watch=sender.out):
            sender.send([1, 2], stream=stream)
        with refused(Unsupported, "left open", *names):
            opened.send([1, 2])
        for method in (None, "inline"):
            with refused(Unsupported, "to_device", "method='value'", "SmallCopy", watch=sender.out):
                to_device([1, 2], out=sender.out, method=method, stream=stream)
        # Nor did a stream wait for another one, which would have drawn it into the capture.
        assert (followed, card.sends) == ([], [])


@pytest.mark.parametrize("count", [1, 64, INLINE // 8])
def test_the_source_is_whole_pages_that_nobody_pins(card: Card, count: int) -> None:
    """Private, of no file, and not the heap, parts of which others register with their own; nor
    the caller's memory, which would be read later if it were pinned."""
    out = torch.zeros(count, dtype=torch.int64)
    senders = [Target(CARD).make("inline", torch.int64, count) for _ in range(2)]
    for method in senders:
        for values in (np.arange(count), np.arange(2 * count)[::2]):
            method(values, out, None, False)
            assert out.tolist() == values.tolist()
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


def test_where_it_can_be_had(card: Card) -> None:
    """The first call gave the thread a context; no later call needs another."""
    assert choose(0, CARD).method == "inline"
    card.library.read_by_page_tables(1)
    assert choose(INLINE, CARD) == choose(0, CARD)
    assert len(card.adopted) == 1


@pytest.mark.parametrize(
    ("why", "patched"),
    [
        ("cannot open it", (cuda, "library", Mock(side_effect=OSError("cannot open it")))),
        ("undefined symbol: cuMemcpyHtoDAsync_v2", (cuda, "library", Without)),
        ("^this torch is built for ROCm, not for CUDA$", (torch.version, "hip", "6.4")),
        ("does not report .*CUDA_ERROR_INVALID_VALUE", None),
        ("^cuda:1 reads pageable memory by the host's page tables", None),
    ],
)
def test_why_it_cannot_be_had(
    card: Card, why: str, patched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patched is None:
        card.library.read_by_page_tables(1, untold="report" in why)
    else:
        monkeypatch.setattr(*patched)
    assert re.search(why, small.why_not_inline(CARD) or "")
    if "by the host's" in why:
        assert small.why_not_inline(torch.device("cuda", 0)) is None
