# SPDX-License-Identifier: Apache-2.0
"""Every shape of kernel under a checker of device memory:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -m sanitize

Without its cache the allocator gives each tensor memory of its own, so that a byte read or written
past its end is outside of any. No kernel here uses shared memory: there is nothing to race for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cuda_cases import COPIES, Copy, by, chunk, pool

from portakv import KVView, SlotError, copy_rows
from portakv.backends import rows_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
DEVICE = "cuda"


@pytest.fixture(autouse=True, scope="module")
def _own_memory() -> None:
    if os.environ.get(NO_CACHE) != "1":
        pytest.skip(f"{NO_CACHE} is not 1: a checker would take the allocator's cache for ours")


@pytest.fixture(params=[1, 2])
def each(request: pytest.FixtureRequest) -> Iterator[int]:
    """Vectors that one thread moves; with a prefetch in the smallest copies."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows_kernel, "TUNING", (rows_kernel.Tuning(0, request.param, 48),) * 2)
        yield request.param


class _Device:
    """Tensors on the device as they lie on the host: the same strides, the same shared storages."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def moved(self, tensors: Any) -> Any:
        """The same structure on the device."""
        if not isinstance(tensors, torch.Tensor):
            return [self.moved(one) for one in tensors]
        storage = tensors.untyped_storage()
        if storage.data_ptr() not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = (here, here.to(DEVICE))
        _, there = self._storages[storage.data_ptr()]
        moved = torch.empty(0, dtype=tensors.dtype, device=DEVICE)
        offset, size, stride = tensors.storage_offset(), tensors.size(), tensors.stride()
        return moved.set_(there.untyped_storage(), offset, size, stride)

    def bring_back(self) -> None:
        """What the device's storages hold, padding included, into those of the host."""
        for here, there in self._storages.values():
            here.copy_(there)


def _run(copied: Copy, backend: str) -> None:
    """Copy on the device; the oracle judges what comes back."""
    device = _Device()
    ends = (copied.src, copied.dst)
    src, dst = (KVView(device.moved(end.tensors), end.layout, **end.extents) for end in ends)

    def copy() -> None:
        mine, theirs = (end.index() for end in ends)
        copy_rows(src, dst, mine, theirs, count=copied.count, backend=backend).synchronize()
        device.bring_back()

    copied.check(copy)


@pytest.mark.parametrize("name", COPIES)
def test_cuda(name: str, each: int) -> None:
    _run(COPIES[name](), "cuda")


@pytest.mark.parametrize("name", COPIES)
def test_triton(name: str) -> None:
    _run(COPIES[name](), "triton")


@pytest.mark.parametrize("name", ["gather", "scatter", "padding", "NZ blocks", "two nests"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_what_torch_compiles_and_carries_out(name: str, backend: str) -> None:
    _run(COPIES[name](), backend)


@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled"])
@pytest.mark.parametrize("wild", [12, 1 << 20, 1 << 40, -(1 << 40)])
def test_wild_ids_touch_nothing(backend: str, wild: int) -> None:
    ids = [3, wild, 5, 0, 1, 2, 4]
    cache, rows = by(pool(), ids), chunk(7)
    copied = Copy(cache, rows, 7)
    device = _Device()
    src, dst = device.moved(cache.tensors), device.moved(rows.tensors)
    views = KVView(src, cache.layout), KVView(dst, rows.layout, heads=2)
    there = torch.tensor(ids, device=DEVICE)

    def copy() -> None:
        transfer = copy_rows(*views, there, backend=backend)
        if wild > 0:
            with pytest.raises(SlotError, match="Position 1 "):
                transfer.synchronize()
        else:
            transfer.synchronize()
        device.bring_back()

    copied.check(copy)
