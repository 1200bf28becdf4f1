# SPDX-License-Identifier: Apache-2.0
"""Arguments that mean nothing are refused by a sentence of the library's own, never by Python's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.guarded_memory import refused
from support.pool_processes import unused_name

from portakv import BackendUnavailable, LayoutError, SlotError
from portakv.errors import HostMemoryError, PortaKVError, Unsupported
from portakv.host import memcpy, pinned, small
from portakv.host.pool import PinnedPool
from portakv.host.shared import SharedPool, remove
from portakv.host.small import SmallCopy, to_device

pytestmark = pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned")
ABSENT = "xpu"  # torch knows the type, and this machine has none
name = pytest.fixture(unused_name)


@pytest.mark.parametrize("device", [ABSENT, "nonsense"])
def test_small_copies_say_what_the_machine_lacks(device: str) -> None:
    for ask in (lambda: small.choose(64, device), lambda: to_device([1, 2], device)):
        with refused(BackendUnavailable, device, "Name a device of this machine"):
            ask()


def test_plain_copies_are_not_available_there() -> None:
    assert not memcpy.is_available(ABSENT)
    assert not memcpy.is_available("nonsense")
    assert not memcpy.is_available("cpu")


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: PinnedPool(64, 1, timeout="x"), HostMemoryError, ("timeout", "huge_pages")),
        (lambda: PinnedPool(64, 1, unit=3), HostMemoryError, ("unit",)),
        (lambda: PinnedPool(64, 1, limit="x"), HostMemoryError, ("'x'", "whole number")),  # type: ignore
        (lambda: PinnedPool(64, 1, limit=2.5), HostMemoryError, ("2.5", "whole number")),  # type: ignore
        (lambda: PinnedPool("x", 1), HostMemoryError, ("'x'", "power of two")),  # type: ignore
        (lambda: PinnedPool(64, 1, alignment=[]), HostMemoryError, ("[]",)),  # type: ignore
        (lambda: PinnedPool(64, 1, numa=1.5), Unsupported, ("1.5", "whole numbers")),
        (lambda: pinned.allocate(64, numa=1.5), Unsupported, ("1.5",)),  # type: ignore
        (lambda: pinned.register_address("x", 64), HostMemoryError, ("'x'",)),  # type: ignore
        (lambda: pinned.register_address(-1, 64), HostMemoryError, ("-1",)),
        (lambda: SmallCopy("x", torch.int32, "cpu"), LayoutError, ("'x'",)),  # type: ignore
        (lambda: SmallCopy(1.5, torch.int32, "cpu"), LayoutError, ("1.5",)),  # type: ignore
        (lambda: SmallCopy(1, "int32", "cpu"), LayoutError, ("int32",)),  # type: ignore
        (lambda: SmallCopy(1, [], "cpu"), LayoutError, ("[]",)),  # type: ignore
        (lambda: SmallCopy(1, torch.int32, out=[0]), LayoutError, ("list",)),  # type: ignore
        (lambda: to_device([1], out=[0]), LayoutError, ("list", "tensor")),  # type: ignore
        (lambda: to_device(torch.ones(2).to_sparse(), "cpu"), LayoutError, ("sparse", "strided")),
        (lambda: to_device([[1], [2, 3]], "cpu"), LayoutError, ("list", "position 0")),  # type: ignore
        (lambda: memcpy.copy_(torch.ones(1), 3), LayoutError, ("int", "source")),  # type: ignore
        (lambda: SharedPool(3), HostMemoryError, ("3", "letters")),  # type: ignore
        (lambda: remove(3), HostMemoryError, ("3", "letters")),  # type: ignore
    ],
)  # fmt: skip
def test_an_argument_that_means_nothing(
    call: Callable[[], object], error: type[PortaKVError], names: tuple[str, ...]
) -> None:
    with refused(error, *names):
        call()


def test_what_pools_are_given(name: str) -> None:
    with PinnedPool(64, 1) as pool, pool.acquire() as block:
        with refused(HostMemoryError, "str", "release a Block"):
            pool.release("x")  # type: ignore[arg-type]
        with refused(HostMemoryError, "expected seconds"):
            pool.acquire(wait=True, timeout="x")  # type: ignore[arg-type]
        with SharedPool(name, 64, 1) as shared:
            with refused(HostMemoryError, "str", "release a Block"):
                shared.release("x")  # type: ignore[arg-type]
            for index in ("x", 1.5, -1, 1):
                with refused(SlotError, repr(index), "0 .. 0"):
                    shared.bytes_of(index)  # type: ignore[arg-type]
                with refused(SlotError, repr(index), "0 .. 0"):
                    shared.adopt(index)  # type: ignore[arg-type]
            with shared.acquire(owner=7) as taken:  # type: ignore[arg-type]
                assert "for 7" in shared.leaks()[0]
                assert taken.index == 0
        assert block.held
