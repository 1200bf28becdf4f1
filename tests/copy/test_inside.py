# SPDX-License-Identifier: Apache-2.0
"""Copies that the core makes as a whole, by the CUDA kernel on the host: their bytes are those that
torch's indexing gives, and what is wrong has the same error as on the general way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from ctypes import addressof
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu import CudaOnCpu, HostDriver, why_not
from support.whole_copies import (
    needs_whole_copies,
    watch_copies_of_views,
    watch_whole_copies,
)

from portakv import (
    AdaptiveConnector,
    Index,
    KVView,
    LayoutError,
    PortaKVError,
    copy_blocks,
    copy_rows,
)
from portakv.copy import inside, rows
from portakv.copy.inside import ChunkCopies
from portakv.core.call import CopyEnd, calls
from portakv.core.rows import MOST_LISTED
from portakv.registry.registry import REGISTRY, choose
from portakv.view.form import plain_reader

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

LAYERS = 3
BLOCKS = 5
SIZE = 4
HEADS = 2
SLOTS = BLOCKS * SIZE


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    REGISTRY.register(CudaOnCpu.name, CudaOnCpu)
    yield
    REGISTRY.unregister(CudaOnCpu.name)


def caches_of(dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shape = 2, BLOCKS, SIZE, HEADS, dim
    numbers = torch.arange(LAYERS * 2 * SLOTS * HEADS * dim) % 251
    return [*numbers.view(LAYERS, *shape).to(dtype).clone()]


def chunk_of(tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((2, LAYERS, tokens, HEADS * dim), 77, dtype=torch.int64).to(dtype)


def rows_of(caches: list[torch.Tensor], ids: list[int]) -> torch.Tensor:
    """The rows of a chunk, [kv, layer, token, bytes]."""
    stacked = torch.stack([cache.view(2, SLOTS, -1) for cache in caches], dim=1)
    return stacked[:, :, ids]


def connector_of(caches: list[torch.Tensor]) -> AdaptiveConnector:
    connector = AdaptiveConnector("cpu", backend=CudaOnCpu.name)
    connector.register_kv_caches(caches)
    return connector


def as_passed(kind: str, ids: list[int]) -> Any:
    """Ids as a caller may pass them."""
    wide = torch.tensor([[each, -1] for each in ids])
    return {
        "list": ids,
        "int64": torch.tensor(ids),
        "int32": torch.tensor(ids, dtype=torch.int32),
        "apart": wide[:, 0],
        "index": Index(ids),
        "index of a tensor": Index(torch.tensor(ids, dtype=torch.int32)),
        "after others": Index([-5, 9999, *ids], offset=2),
        "array": np.array(ids),
    }[kind]


KINDS = ["list", "int64", "int32", "apart", "index", "index of a tensor", "after others", "array"]


@given(
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 3, 4, 7, 8, 16]),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32]),
    order=st.permutations(range(SLOTS)),
    skipped=st.sets(st.integers(0, SLOTS - 1), max_size=3),
    ends=st.tuples(st.integers(0, SLOTS), st.integers(0, SLOTS)).filter(lambda x: x[0] != x[1]),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_torch(
    kind: str,
    dim: int,
    dtype: torch.dtype,
    order: list[int],
    skipped: set[int],
    ends: tuple[int, int],
) -> None:
    start, end = sorted(ends)
    ids = [-3 if place in skipped else slot for place, slot in enumerate(order)]
    here = ids[start:end]
    used = [place for place, slot in enumerate(here) if slot >= 0]
    slots = [here[place] for place in used]
    caches = caches_of(dim, dtype)
    connector = connector_of(caches)
    with pytest.MonkeyPatch.context() as patched:
        watched = watch_whole_copies(patched)
        for _ in range(3):
            chunk = chunk_of(end - start, dim, dtype)
            wanted = chunk.clone()
            wanted[:, :, used] = rows_of(caches, slots)
            connector.from_gpu(chunk, None, as_passed(kind, ids), start, end).synchronize()
            assert torch.equal(chunk, wanted)
        before = [cache.clone() for cache in caches]
        for _ in range(3):
            chunk = torch.randint(0, 100, chunk.shape).to(dtype)
            connector.to_gpu(chunk, None, as_passed(kind, ids), start, end).synchronize()
            expected = torch.stack([cache.view(2, SLOTS, -1) for cache in before], dim=1)
            expected[:, :, slots] = chunk[:, :, used]
            assert torch.equal(rows_of(caches, [*range(SLOTS)]), expected)
    assert watched[:1] == [False]
    assert watched[1:3] == [True] * 2
    assert watched[4:] == [True] * 2


def readable(tokens: int) -> torch.Tensor:
    return chunk_of(tokens, 4, torch.float16)


IDS = [3, 9, 1, 12, 6]
WRONG: dict[str, Any] = {
    "past the end": lambda c, x: c.from_gpu(readable(5), None, torch.tensor([3, 9, SLOTS, 2, 6])),
    "twice": lambda c, x: c.to_gpu(readable(5), None, torch.tensor([3, 9, 1, 9, 6])),
    "shorter chunk": lambda c, x: c.from_gpu(readable(4), None, torch.tensor(IDS)),
    "longer chunk": lambda c, x: c.from_gpu(readable(6), None, torch.tensor(IDS)),
    "range": lambda c, x: c.from_gpu(readable(5), None, torch.tensor(IDS), 2, 6),
    "range from below 0": lambda c, x: c.from_gpu(readable(5), None, torch.tensor(IDS), -1, 4),
    "end before start": lambda c, x: c.from_gpu(readable(5), None, torch.tensor(IDS), 3, 2),
    "start of many bits": lambda c, x: c.from_gpu(
        readable(5), None, torch.tensor(IDS), 2**70, 2**70 + 1
    ),
    "end of many bits": lambda c, x: c.from_gpu(readable(5), None, torch.tensor(IDS), 0, 2**70),
    "two dimensions": lambda c, x: c.from_gpu(readable(5), None, torch.tensor([IDS])),
    "float ids": lambda c, x: c.from_gpu(readable(5), None, torch.tensor(IDS).float()),
    "requires grad": lambda c, x: c.from_gpu(readable(5).requires_grad_(), None, torch.tensor(IDS)),
    "one place": lambda c, x: c.from_gpu(
        readable(1).expand(2, LAYERS, 5, HEADS * 4), None, torch.tensor(IDS)
    ),
    "other rows": lambda c, x: c.from_gpu(chunk_of(5, 3, torch.float16), None, torch.tensor(IDS)),
    "another dtype": lambda c, x: c.from_gpu(readable(5).bfloat16(), None, torch.tensor(IDS)),
    "in the caches": lambda c, x: c.from_gpu(
        x[0].view(-1)[: 2 * LAYERS * 1 * HEADS * 4].view(2, LAYERS, 1, HEADS * 4),
        None,
        torch.tensor([3]),
    ),
    "step": lambda c, x: c.from_gpu(readable(5), None, Index(torch.tensor([1, 2]), step=SIZE)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_has_the_error_of_the_general_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core refuses it although it made the copies before."""
    caches = caches_of(4, torch.float16)
    connector = connector_of(caches)
    for _ in range(2):
        connector.from_gpu(readable(5), None, torch.tensor(IDS))
        connector.to_gpu(readable(5), None, torch.tensor(IDS))
    before = [cache.clone() for cache in caches]
    watched = watch_whole_copies(monkeypatch)
    connector.from_gpu(readable(5), None, torch.tensor(IDS))
    assert watched == [True]
    call = WRONG[name]
    errors = list[tuple[type[PortaKVError] | None, str]]()
    for general in (False, True):
        if general:
            monkeypatch.setattr(ChunkCopies, "transfer", lambda *_: None)
        try:
            call(connector, caches)
        except PortaKVError as error:
            errors.append((type(error), str(error)))
        else:
            errors.append((None, ""))
        assert all(map(torch.equal, caches, before))
    assert watched[1:] == [False]
    assert errors[0] == errors[1]
    assert name == "step" or errors[0][0] is not None


@pytest.mark.parametrize("of", ["chunk", "ids", "cache"])
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_memory_that_was_resized(
    of: str, store: bool, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = caches_of(4, torch.float16)
    connector = connector_of(caches)
    ids = torch.empty(5, dtype=torch.int64).copy_(torch.tensor(IDS))
    chunk = readable(5)
    move = connector.from_gpu if store else connector.to_gpu
    for _ in range(0 if first else 2):
        move(chunk, None, Index(IDS))
    watched = watch_whole_copies(monkeypatch)
    storage = {"chunk": chunk, "ids": ids, "cache": caches[1]}[of].untyped_storage()
    storage.resize_(storage.nbytes() - 2)
    with pytest.raises(PortaKVError):
        move(chunk, None, ids)
    assert watched == [False]


def shrink_in_place(tensor: torch.Tensor) -> None:
    """Move a storage until it is at its first address again, with fewer bytes."""
    storage = tensor.untyped_storage()
    first = storage.data_ptr()
    for _ in range(100):
        storage.resize_(storage.nbytes() - 2)
        if storage.data_ptr() == first:
            return
    pytest.skip("the memory does not come back")


REPLACED: dict[str, Callable[[torch.Tensor], object]] = {
    "another storage": lambda cache: cache.set_(cache.clone().untyped_storage()),
    "other data": lambda cache: setattr(cache, "data", cache.clone()),
    "a larger tensor": lambda cache: cache.resize_(1 << 20),
    "no bytes": lambda cache: cache.untyped_storage().resize_(0),
    "fewer bytes at one address": shrink_in_place,
}


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("store", [True, False])
def test_no_copy_uses_memory_that_was_replaced(
    name: str, store: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = caches_of(4, torch.float16)
    if not shared:
        caches = [cache.clone() for cache in caches]
    connector = connector_of(caches)
    chunk = readable(5)
    move = connector.from_gpu if store else connector.to_gpu
    ids = torch.tensor(IDS)
    move(chunk, None, ids)
    watched = watch_whole_copies(monkeypatch)
    move(chunk, None, ids)
    REPLACED[name](caches[-1])
    before = chunk.clone()
    with pytest.raises(PortaKVError):
        move(chunk, None, ids)
    assert watched == [True, False]
    assert torch.equal(chunk, before)


def test_tensors_that_are_watched_live_as_long_as_they_are_registered() -> None:
    caches = caches_of(4, torch.float16)
    gone = [weakref.ref(cache) for cache in caches]
    connector = connector_of(caches)
    del caches
    gc.collect()
    assert all(each() is not None for each in gone)
    connector.unregister_kv_caches()
    gc.collect()
    assert all(each() is None for each in gone)


def test_a_tensor_that_was_swapped_is_other_memory() -> None:
    caches = caches_of(4, torch.float16)
    connector = connector_of(caches)
    chunk = chunk_of(1, 4, torch.float16)
    connector.from_gpu(chunk, None, [3])
    torch.utils.swap_tensors(caches[0], caches[0].clone())
    with pytest.raises(LayoutError, match="replaced"):
        connector.from_gpu(chunk, None, [3])


# Two views


def views(dtype: torch.dtype, dim: int) -> tuple[KVView, KVView, torch.Tensor, torch.Tensor]:
    """Paged caches, and blocks of all layers in one tensor, with these tensors."""
    numbers = torch.arange(LAYERS * 2 * SLOTS * HEADS * dim) % 251
    paged = numbers.view(LAYERS, 2, BLOCKS, SIZE, HEADS, dim).to(dtype).clone()
    stored = torch.full((BLOCKS + 2, LAYERS, 2, SIZE, HEADS, dim), 77).to(dtype)
    return (
        KVView([*paged], "layer | kv block token head dim"),
        KVView(stored, "block layer kv token head dim"),
        paged,
        stored,
    )


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each copy between views whether the core made it."""
    return watch_copies_of_views(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [1, 3, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_between_two_views(
    kind: str, dim: int, dtype: torch.dtype, whole: list[bool]
) -> None:
    src, dst, paged, stored = views(dtype, dim)
    read = [4, 0, -1, 3, 3]
    written = [6, 2, 1, -7, 0]
    if kind == "after others":
        pytest.skip("an offset of blocks is tokens")
    for _ in range(3):
        stored.fill_(77)
        wanted = stored.clone()
        for block, to in zip(read, written, strict=True):
            if block >= 0 and to >= 0:
                wanted[to] = paged[:, :, block]
        ids = [as_blocks(kind, each) for each in (read, written)]
        made = copy_blocks(src, dst, *ids, backend=CudaOnCpu.name)
        made.synchronize()
        assert torch.equal(stored, wanted)
        assert made.statistics.blocks == 3
        assert made.statistics.strategy == CudaOnCpu.name
    assert whole[1:] == [True] * 2


def test_more_slots_than_travel_with_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core checks them all the same, and a launch reads their copy on the device."""
    count = MOST_LISTED + 100
    caches = [torch.randn(2, count // SIZE + 1, SIZE, 1, 4) for _ in range(LAYERS)]
    connector = connector_of(caches)
    chunk = torch.zeros(2, LAYERS, count, 4)
    slots = torch.randperm(count)
    connector.from_gpu(chunk, None, Index(slots))
    chunk.zero_()
    watched = watch_whole_copies(monkeypatch)
    connector.from_gpu(chunk, None, Index(slots))
    expected = torch.stack([x.flatten(1, 2)[:, slots].flatten(2) for x in caches], 1)
    assert torch.equal(chunk, expected)
    with pytest.raises(PortaKVError):
        connector.to_gpu(chunk, None, torch.zeros(count, dtype=torch.int64))
    assert watched == [True, False]


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 513, 1300])
@pytest.mark.parametrize("kinds", ["both", "read", "written"])
def test_ids_of_the_host_travel_with_as_many_launches_as_it_takes(
    kinds: str, count: int, step: int, whole: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch carries 512 ids of both sides together. Ids of blocks are shared by their units."""
    launches = list[int]()
    run = HostDriver.run

    def counted(driver: HostDriver, *call: Any) -> None:
        launches.append(1)
        run(driver, *call)

    monkeypatch.setattr(HostDriver, "run", counted)
    tokens = count * step
    rows = torch.randn(1, tokens, 1, 8)
    landed = torch.zeros(1, tokens, 1, 8)
    # The other side has half as many tokens in a block, so that a unit is less than a block.
    size = max(1, step // 2)
    here = KVView(rows.view(1, -1, step, 1, 8), "layer block token head dim")
    there = KVView(landed.view(1, -1, size, 1, 8), "layer block token head dim")
    read = torch.randperm(2 * count)[::2].argsort() if kinds != "written" else torch.arange(count)
    written = torch.arange(tokens // size)
    if kinds != "read":
        written = torch.randperm(len(written)).to(torch.int32)
        written[len(written) // 2] = -1
    src_ids = None if kinds == "written" else Index(read, step)
    dst_ids = None if kinds == "read" else Index(written, size)
    for _ in range(2):  # the first one prepares the kernel
        launches.clear()
        landed.zero_()
        copy_rows(here, there, src_ids, dst_ids, backend=CudaOnCpu.name).synchronize()
    slots = [each * step + at for each in read.tolist() for at in range(step)]
    places = [
        each * size + at if each >= 0 else -1 for each in written.tolist() for at in range(size)
    ]
    expected = torch.zeros_like(landed)
    for slot, place in zip(slots, places, strict=True):
        if place >= 0:  # no id is negative but -1, whose slots are, too
            expected[:, place] = rows[:, slot]
    assert torch.equal(landed, expected)
    assert whole[-1]
    if kinds != "both" and step == 1:
        assert len(launches) == -(-count // 511)


def test_more_ids_than_travel_with_launches(whole: list[bool]) -> None:
    """A launch reads a copy of the index on the device, once the core has checked the ids."""
    count = MOST_LISTED + 100
    src = KVView(torch.randn(1, count, 1, 8), "layer token head dim")
    dst = KVView(torch.zeros(1, count, 1, 8), "layer token head dim")
    read = Index(torch.randperm(count))
    written = Index(torch.randperm(count))
    for _ in range(2):  # the first one prepares the kernel
        whole.clear()
        copy_rows(src, dst, read, written, backend=CudaOnCpu.name).synchronize()
    expected = torch.zeros(1, count, 1, 8)
    expected[:, written.ids] = src.owners[0][:, read.ids]
    assert torch.equal(dst.owners[0], expected)
    with pytest.raises(PortaKVError):
        copy_rows(src, dst, read, Index([*range(count - 1), 0]), backend=CudaOnCpu.name)
    assert whole == [True, False]


@pytest.mark.parametrize("count", [-1, -8, True, 2**70])
def test_a_count_that_is_none_has_the_error_of_the_general_way(count: int) -> None:
    """Also -1, which to the core stands for all tokens of the ids."""
    src, dst, _, stored = views(torch.float16, 4)
    ids = torch.tensor([1, 2]), torch.tensor([3, 4])
    copy_blocks(src, dst, *ids, backend=CudaOnCpu.name)
    before = stored.clone()
    with pytest.raises(PortaKVError, match="Expected"):
        copy_blocks(src, dst, *ids, count=count, backend=CudaOnCpu.name)
    assert torch.equal(stored, before)


def as_blocks(kind: str, ids: list[int]) -> Any:
    return Index(ids, SIZE) if kind.startswith("index") else as_passed(kind, ids)


@given(
    offsets=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    count=st.none() | st.integers(-2, 9),
    read=st.lists(st.integers(-2, SLOTS), min_size=1, max_size=12),
    written=st.none() | st.lists(st.integers(-2, SLOTS), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_rows_by_any_ids_end_as_on_the_general_way(
    offsets: tuple[int, int], count: int | None, read: list[int], written: list[int] | None
) -> None:
    """Bytes and errors are equal: of ranges, skipped and repeated ids, and ids past the end."""
    ends = []
    for general in (False, True):
        src, dst, _, stored = views(torch.float16, 4)
        with pytest.MonkeyPatch.context() as patched:
            if general:
                patched.setattr(rows, "copied", lambda *_: None)
            end: object = None
            for _ in range(2):
                src_index = Index(torch.tensor(read), offset=offsets[0])
                dst_index = Index(offset=offsets[1])
                if written is not None:
                    dst_index = Index(torch.tensor(written), offset=offsets[1])
                try:
                    made = copy_rows(
                        src, dst, src_index, dst_index, count=count, backend=CudaOnCpu.name
                    )
                    end = made.statistics.blocks, made.statistics.nbytes
                except PortaKVError as error:
                    end = type(error), str(error)
        ends.append((end, stored))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("change", [-2, 2, 1 << 20])
@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("first", [True, False])
def test_views_whose_memory_was_resized(
    side: str, change: int, first: bool, whole: list[bool]
) -> None:
    """Also before the first copy of a view, whose kernels other views have loaded."""
    blocks = torch.tensor([1]), torch.tensor([2])
    src, dst, _, _ = views(torch.float16, 4)
    copy_blocks(src, dst, *blocks, backend=CudaOnCpu.name)
    numbers = [torch.zeros(2, BLOCKS, SIZE, HEADS, 4, dtype=torch.float16) for _ in range(LAYERS)]
    stored = torch.zeros(BLOCKS + 2, LAYERS, 2, SIZE, HEADS, 4, dtype=torch.float16)
    src = KVView(numbers, "layer | kv block token head dim")
    dst = KVView(stored, "block layer kv token head dim")
    if not first:
        copy_blocks(src, dst, *blocks, backend=CudaOnCpu.name)
    storage = (numbers[1] if side == "source" else stored).untyped_storage()
    before = storage.data_ptr()
    storage.resize_(storage.nbytes() + change)
    if change > 0 and storage.data_ptr() == before:
        pytest.skip("the memory stayed where it was")
    with pytest.raises(PortaKVError, match="replaced after it was read"):
        copy_blocks(src, dst, *blocks, backend=CudaOnCpu.name)
    assert not whole[-1]


COUNTS: dict[str, Any] = {
    "below 0": lambda src, dst: copied_ids(src, dst, count=-1),
    "past 64 bits": lambda src, dst: copied_ids(src, dst, count=2**70),
    "past a float": lambda src, dst: copied_ids(src, dst, count=10**400),
    "more than the ids": lambda src, dst: copied_ids(src, dst, count=4),
    "an empty source": lambda src, dst: copy_rows(
        src, dst, [], torch.tensor([4, 5]), backend=CudaOnCpu.name
    ),
    "an empty destination": lambda src, dst: copy_rows(
        src, dst, torch.tensor([4, 5]), [], backend=CudaOnCpu.name
    ),
    "a boolean": lambda src, dst: copied_ids(src, dst, count=True),
    "offset past 64 bits": lambda src, dst: copied_ids(src, dst, offset=2**70),
    "offset past the ids": lambda src, dst: copied_ids(src, dst, offset=4),
    "index without ids and blocks": lambda src, dst: copy_rows(
        src, dst, Index(), Index(torch.tensor([1, 2]), step=SIZE), backend=CudaOnCpu.name
    ),
    "indices without ids": lambda src, dst: copy_rows(
        src, dst, Index(), Index(), count=8, backend=CudaOnCpu.name
    ),
    "bad ids by an unknown backend": lambda src, dst: copy_rows(
        src, dst, [True], [1], backend="unknown"
    ),
    "too few ids for an unknown backend": lambda src, dst: copy_rows(
        src, dst, [1], [1], count=5, backend="unknown"
    ),
}


def copied_ids(src: KVView, dst: KVView, count: Any = None, offset: int = 0) -> Any:
    read = Index(torch.tensor([1, 2, 3]), offset=offset)
    return copy_rows(src, dst, read, torch.tensor([4, 5, 6]), count=count, backend=CudaOnCpu.name)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_have_the_end_of_the_general_way(name: str) -> None:
    ends = []
    for general in (False, True):
        src, dst, _, stored = views(torch.float16, 4)
        with pytest.MonkeyPatch.context() as patched:
            if general:
                patched.setattr(rows, "copied", lambda *_: None)
            end: object = None
            for _ in range(2):
                try:
                    made = COUNTS[name](src, dst)
                    end = made.statistics.blocks, made.statistics.blocks_requested
                except PortaKVError as error:
                    end = type(error), str(error)
        ends.append((end, stored))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@needs_whole_copies
@pytest.mark.parametrize("numbers", [(2**70, 0, 0), (3, 2**70, 0), (3, 0, 2**64)])
def test_no_number_past_64_bits_reaches_a_copy(numbers: tuple[int, int, int]) -> None:
    """Lists need memory that kernels of a device read; here the test brings some."""
    count, src_offset, dst_offset = numbers
    src, dst, _, stored = views(torch.float16, 4)
    copy_rows(src, dst, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), backend=CudaOnCpu.name)
    stored.fill_(77)
    kernels = choose("cpu", CudaOnCpu.name).backend.row_kernels
    reader = plain_reader()
    read = inside.opened(src)
    written = inside.opened(dst)
    assert kernels is not None
    assert reader is not None
    assert read is not None
    assert written is not None
    end = CopyEnd()
    sides = kernels.executor_at, read.address, written.address
    ids = [1, 2, 3], [4, 5, 6], 1, 1
    wrong = src_offset, dst_offset, count
    for offsets in (wrong, (0, 0, 3)):
        result = calls().copy_views(*sides, *ids, *offsets, addressof(end), 0)
        assert (result < 0) == (offsets is wrong)
        assert bool((stored == 77).all()) == (offsets is wrong)


class Followed(KVView):
    """A view that counts how often a launch waits for its table of addresses."""

    times = 0

    def follow_table(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        self.times += 1


def separate_blocks(view: type[KVView] = KVView) -> KVView:
    """Blocks that lie in one tensor each, so that kernels look their addresses up."""
    blocks = [torch.randn(2, LAYERS, SIZE, HEADS, 4).half() for _ in range(BLOCKS)]
    return view(blocks, "block | kv layer token head dim")


def test_launches_wait_for_tables_of_addresses(whole: list[bool]) -> None:
    """Another stream may have sent the table, and no stream knows who reads it."""
    _, dst, _, stored = views(torch.float16, 4)
    listed = separate_blocks(Followed)
    assert isinstance(listed, Followed)
    for _ in range(2):
        before = listed.times
        copy_blocks(listed, dst, torch.tensor([1]), torch.tensor([2]), backend=CudaOnCpu.name)
    assert whole[-1]
    assert listed.times == before + 1
    assert torch.equal(stored[2].transpose(0, 1), listed.tensors[1])


@needs_whole_copies
def test_no_kernel_reads_a_table_of_another_device() -> None:
    """Pinned memory has its table on the host, which kernels of a device do not reach."""
    blocks = [torch.zeros(2, LAYERS, SIZE, HEADS, 4) for _ in range(BLOCKS)]
    view = KVView.at(
        [each.data_ptr() for each in blocks],
        "block | kv layer token head dim",
        shape=blocks[0].shape,
        dtype=torch.float32,
        device="cpu",
        pinned=True,
    )
    opened = inside.opened(view)
    assert opened is not None
    assert opened.tabled
    assert inside.has_tables(torch.device("cpu"), [view])
    assert not inside.has_tables(torch.device("cuda", 0), [view])


def test_rows_inside_one_cache(whole: list[bool]) -> None:
    """The core cannot tell whether both sides have a row in common."""
    src, _, paged, _ = views(torch.float16, 4)
    for _ in range(2):
        wanted = paged.clone()
        wanted[:, :, 4] = paged[:, :, 1]
        copy_blocks(src, src, torch.tensor([1]), torch.tensor([4]), backend=CudaOnCpu.name)
        assert torch.equal(paged, wanted)
    assert whole == [False, False]
    with pytest.raises(PortaKVError, match="as both source and destination"):
        copy_blocks(src, src, torch.tensor([1, 2]), torch.tensor([2, 3]), backend=CudaOnCpu.name)
