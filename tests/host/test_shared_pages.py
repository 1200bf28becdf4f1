# SPDX-License-Identifier: Apache-2.0
"""Shared memory without a name: in huge pages where the kernel brings them, and whole elsewhere."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import Any

import numpy as np
import pytest

from portakv.host import _registration
from portakv.host.shared import unnamed

HUGE = 2 << 20
SIZE = 3 * HUGE + 4096


def allocated(descriptor: int) -> int:
    """Return the bytes of a file that have memory."""
    return os.fstat(descriptor).st_blocks * 512


@pytest.fixture
def file() -> Any:
    """A file of shared memory without pages."""
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


def test_a_new_file_is_put_into_huge_pages(file: int) -> None:
    """As many as the call returns: a kernel without them leaves one small page in each."""
    brought = _registration.use_huge_pages(file, SIZE)
    assert brought in range(0, SIZE, HUGE)
    assert allocated(file) >= brought
    assert allocated(file) <= max(brought, 3 * 4096)
    mapping = mmap.mmap(file, SIZE)
    assert not np.frombuffer(mapping, np.uint8).any()


def test_a_process_with_a_limit_of_addresses_has_small_pages(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert _registration.use_huge_pages(file, SIZE) == 0
    assert allocated(file) == 0


def test_what_is_smaller_than_a_huge_page_is_left_alone(file: int) -> None:
    assert _registration.use_huge_pages(file, HUGE - 1) == 0
    assert allocated(file) == 0


@pytest.fixture
def collapsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the addresses of the slices that the kernel is asked for, which it brings."""
    asked: list[int] = []

    def libc(name: str, address: int, nbytes: int, advice: int) -> int:
        assert (name, nbytes) == ("madvise", HUGE)
        asked.append(address)
        return 0

    monkeypatch.setattr(_registration, "SLICE", HUGE)
    monkeypatch.setattr(_registration, "libc", libc)
    return asked


def test_each_slice_is_asked_for_once(file: int, collapsed: list[int]) -> None:
    assert _registration.use_huge_pages(file, SIZE) == 3 * HUGE
    first = min(collapsed)
    assert sorted(collapsed) == [first, first + HUGE, first + 2 * HUGE]


def test_a_slice_that_the_kernel_refuses_is_not_counted(
    file: int, collapsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    brings = _registration.libc

    def refuses(name: str, address: int, *rest: int) -> int:
        brings(name, address, *rest)
        return errno.ENOMEM if address == min(collapsed) + HUGE else 0

    monkeypatch.setattr(_registration, "libc", refuses)
    assert _registration.use_huge_pages(file, SIZE) == 2 * HUGE
    assert len(collapsed) == 3


@pytest.mark.parametrize("lacks", ["time", "threads"])
def test_slices_that_are_not_begun_have_small_pages(
    lacks: str, file: int, collapsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    if lacks == "time":
        monkeypatch.setattr(_registration, "HUGE_SECONDS", -1.0)
    else:
        monkeypatch.setattr(threading.Thread, "start", refused)
    brought = 0 if lacks == "time" else HUGE
    assert _registration.use_huge_pages(file, SIZE) == brought
    assert len(collapsed) * HUGE == brought


def test_a_lack_of_space_is_an_error_of_the_call(
    file: int, collapsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        _registration.use_huge_pages(file, SIZE)
    assert len(collapsed) == 1


@pytest.mark.parametrize("lacks", ["nothing", "huge pages"])
def test_all_memory_is_allocated(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a kernel that brings no huge pages."""
    if lacks == "huge pages":
        monkeypatch.setattr(_registration, "libc", lambda *_: errno.EINVAL)
    made = os.memfd_create
    files = list[int]()

    def noted(*args: Any) -> int:
        files.append(made(*args))
        return os.dup(files[-1])

    monkeypatch.setattr(os, "memfd_create", noted)
    mapping = unnamed(SIZE)
    (file,) = files
    assert allocated(file) == SIZE
    rows = np.frombuffer(mapping, np.uint8)
    assert not rows.any()
    rows[-1] = 7
    assert os.pread(file, 1, SIZE - 1) == b"\7"
    os.close(file)
