# SPDX-License-Identifier: Apache-2.0
"""Test small copies of every count, dtype and alignment, and those in the driver's commands.

On the host the commands go to a stand-in for the driver; the simulated device has none.
"""

from __future__ import annotations

import mmap
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.guarded_memory import filled, refused
from support.pool_processes import Child
from support.small_cases import INTEGERS, STREAM, Card, Place, drawn, same_bits
from support.threads import run_threads

from portakv import TransferError, Unsupported
from portakv.host import small
from portakv.host.small import COMMAND_BYTES, MOST_INLINE, InlineCopy, inline_copy, to_device
from portakv.runtime import cuda, streams

CARD = torch.device("cuda", 1)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_count(place: Place, dtype: torch.dtype) -> None:
    limits = [limit // dtype.itemsize for limit in (4096, COMMAND_BYTES, MOST_INLINE)]
    around = [limit + more for limit in limits for more in range(-2, 3)]
    for count in (*range(80 if place.device.type == "privateuseone" else 300), *around):
        values = drawn(count, dtype)
        assert same_bits(to_device(values, place.device), values), count
    shaped = filled((3, 4), torch.int32, device=place.device)
    assert to_device(range(12), out=shaped) is shaped
    assert shaped.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("offset", [*range(1, 17), 4097])
def test_a_target_of_any_alignment(place: Place, offset: int) -> None:
    """Only the requested elements are written."""
    for count in (0, 1, 15, 16, 17, 64, 333, 5000, COMMAND_BYTES + 1):
        memory = filled((count + 4200,), torch.uint8, device=place.device)
        before = memory.clone()
        values = drawn(count, torch.uint8)
        to_device(values, out=memory[offset : offset + count])
        assert same_bits(memory[offset : offset + count], values)
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + count :], before[offset + count :])


def test_threads_do_not_write_over_each_other_s_values(place: Place) -> None:
    """Nor has one of them ever seen the device."""

    def work(number: int) -> None:
        for time in range(50):
            values = np.arange(500) * (number + 1) + time
            assert np.array_equal(to_device(values, place.device).cpu().numpy(), values)

    run_threads(work, range(4))


@pytest.mark.gpu
def test_a_device_that_is_not_current() -> None:
    other = torch.device("cuda", 1)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for nth in range(20):
        landed = to_device(range(nth), other)
        assert (landed.device, landed.tolist()) == (other, [*range(nth)])
    assert torch.cuda.current_device() == 0


@pytest.fixture
def inline(card: Card) -> InlineCopy:
    """Copies to the second device."""
    made = small.inline_copy(CARD)
    assert made is not None
    return made


ONE_TWO = np.array([1, 2])


class Without:
    """A library that has none of the functions."""

    def __getitem__(self, name: str) -> None:
        raise AttributeError(f"undefined symbol: {name}")


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_more_bytes_are_several_commands(
    card: Card, inline: InlineCopy, dtype: torch.dtype
) -> None:
    for nbytes in (8, COMMAND_BYTES - 8, COMMAND_BYTES, COMMAND_BYTES + 8, 3 * COMMAND_BYTES):
        values = drawn(nbytes // dtype.itemsize, dtype)
        out = filled((values.numel() + 8,), dtype)
        rest = out.view(torch.uint8)[nbytes:].clone()
        card.library.forget()
        inline.send(values.numpy(), out, None)
        assert same_bits(out[:-8], values)
        assert torch.equal(out.view(torch.uint8)[nbytes:], rest)
        begins = range(0, nbytes, COMMAND_BYTES)
        assert card.sends == [
            (out.data_ptr() + begin, min(COMMAND_BYTES, nbytes - begin), STREAM) for begin in begins
        ]


def test_the_current_stream_of_its_device_or_the_one_that_is_passed(
    card: Card, inline: InlineCopy
) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    inline.send(ONE_TWO, out, None)
    card.raw[1] = 0  # the default stream
    inline.send(ONE_TWO, out, None)
    other: Any = SimpleNamespace(cuda_stream=72)
    inline.send(ONE_TWO, out, other)
    assert card.entered == []
    card.current = 0
    inline.send(ONE_TWO + 2, out, None)
    assert [stream for _, _, stream in card.sends] == [STREAM, 0, 72, 0]
    assert (card.entered, card.current) == ([1], 0)
    assert out.tolist() == [3, 4, 0, 0]


def test_a_driver_that_refuses(card: Card, inline: InlineCopy) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    card.library.forget(refuse_at=0)
    with refused(TransferError, "Check", watch=out) as caught:
        inline.send(ONE_TWO, out, None)
    assert re.search("of 2 values.*CUDA_ERROR_INVALID_VALUE", str(caught.value))
    card.library.forget()
    inline.send(ONE_TWO, out, None)
    assert out.tolist() == [1, 2, 0, 0]
    library: Any = Without()
    assert cuda.error_name(700, library) == "error 700"  # the library returns no name


def test_a_forked_process_cannot_send(card: Card, inline: InlineCopy) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    inline.send(ONE_TWO, out, None)

    def work(_: object) -> None:
        with refused(Unsupported, "forked"):
            inline.send(ONE_TWO, out, None)

    assert Child(work).end() == 0
    inline.send(ONE_TWO, out, None)
    assert len(card.sends) == 2


def test_each_thread_has_memory_and_a_context_of_its_own(card: Card, inline: InlineCopy) -> None:
    turn = threading.Lock()
    all_sent = threading.Barrier(4)
    before = len(card.adopted)

    def work(number: int) -> None:
        for _ in range(2):
            with turn:
                inline.send(np.arange(64) + number, torch.zeros(64, dtype=torch.int64), None)
        all_sent.wait()  # so that none is given what another thread gave back

    run_threads(work, range(4))
    sources = [one.src for one in card.library.sent]
    assert len(sources) == 8
    assert len(set(sources)) == 4
    assert len(set(card.adopted[before:])) == len(card.adopted[before:]) == 4


def test_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    out = filled((2,), torch.int32)
    monkeypatch.setattr(small, "capturing", lambda device: True)
    followed: list[Any] = []
    monkeypatch.setattr(streams, "follow_current", lambda *rest: followed.append(rest))
    stream: Any = SimpleNamespace(device=out.device, stream_id=0)
    with refused(Unsupported, "by to_device inside graph capture", "before", watch=out):
        to_device([1, 2], out=out, stream=stream)
    # Nor did a stream wait for another one, which would have drawn it into the capture.
    assert followed == []


@pytest.mark.parametrize("count", [1, 64, COMMAND_BYTES // 8])
def test_the_source_is_whole_pages_that_nobody_pins(card: Card, count: int) -> None:
    """Private, of no file, and not the heap, parts of which others register with their own; nor
    the caller's memory, which would be read later if it were pinned."""
    out = torch.zeros(count, dtype=torch.int64)
    library: Any = card.library.library
    senders = [InlineCopy(CARD, library) for _ in range(2)]
    for each in senders:
        for values in (np.arange(count), np.arange(2 * count)[::2]):
            each.send(values, out, None)
            assert out.tolist() == values.tolist()
    sources = sorted({one.src for one in card.library.sent})
    assert [at % mmap.PAGESIZE for at in sources] == [0, 0]
    assert sources[1] - sources[0] >= COMMAND_BYTES
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for at in sources:
        (mapping,) = [line for line in lines if at in _addresses(line[0])]
        assert at + COMMAND_BYTES - 1 in _addresses(mapping[0])
        rights, _, _, file = mapping[1:5]
        assert (rights, file, mapping[5:]) == ("rw-p", "0", [])


def _addresses(mapping: str) -> range:
    return range(*(int(one, 16) for one in mapping.split("-")))


@pytest.mark.parametrize(
    "patched",
    [
        (cuda, "library", Mock(side_effect=OSError("cannot open it"))),
        (cuda, "library", Without),
        (torch.version, "hip", "6.4"),
        None,
    ],
)
def test_where_it_can_be_had(card: Card, patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without the driver's functions, nor where a device may read after the call."""
    assert inline_copy(CARD) is not None
    if patched is not None:
        monkeypatch.setattr(*patched)
    for unknown in (False, True):
        small.inline_copy.cache_clear()
        if patched is None:
            card.library.read_by_page_tables(1, untold=unknown)
        assert inline_copy(CARD) is None
    assert inline_copy(torch.device("cpu")) is None
    assert inline_copy(torch.device("mps")) is None
