# SPDX-License-Identifier: Apache-2.0
"""Addresses and index lists that broke released KV transports: each test names the fault it met.

Every copy is made twice: by the library's choice of backend, and run by run with memmove.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import GIB, Copier, address, by_backend, by_runs, lazy, noise

from portakv import CopyPlan, Index, KVView, LayoutError, SlotError, Unsupported

SCATTERED = pytest.mark.parametrize("scattered", [False, True], ids=["gather", "scatter"])


@pytest.fixture(params=[by_backend, by_runs], ids=["backend", "runs"])
def carry(request: pytest.FixtureRequest) -> Copier:
    carrier: Copier = request.param
    return carrier


BYTES = torch.uint8


def loaded(carry: Copier, rows: KVView, view: KVView, index: Any, memory: torch.Tensor) -> None:
    """Copy rows to a view of memory, of which only what ``memory`` says may change."""
    carry(rows, view, None, index)
    storage = view.owners[0].untyped_storage()
    content = torch.empty(0, dtype=memory.dtype).set_(storage)
    assert torch.equal(content, memory.flatten())


# Offsets in 32-bit arithmetic wrap silently: a row lands 4 GiB before its place.


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [131, 132, 4096])
def test_a_layer_of_more_than_4_gib(carry: Copier, ids_dtype: torch.dtype, width: int) -> None:
    """Rows around 2**31 and 2**32 bytes, of odd and even widths."""
    slots = 5 * GIB // width
    cache = lazy(slots * width).view(slots, width)
    edges = [2**31 // width + i for i in (-1, 0, 1)] + [2**32 // width + i for i in (-1, 0, 1)]
    ids = torch.tensor([*edges, 0, slots - 1], dtype=ids_dtype)
    rows = noise(len(ids), width, dtype=BYTES)
    view = KVView(cache, "token dim")
    chunk = KVView(rows, "token dim")
    carry(chunk, view, None, ids)
    for slot, row in zip(ids.tolist(), rows, strict=True):
        assert torch.equal(cache[slot], row)
    assert not cache[2**31 // width + 2].any()
    assert not cache[2**32 // width + 2].any()
    back = KVView(torch.zeros_like(rows), "token dim")
    carry(view, back, ids, None)
    assert torch.equal(back.tensors, rows)


def test_131072_tokens_of_32_layers_in_one_call() -> None:
    """16 GiB for each side: the addresses of the last rows, not only of the first."""
    tokens = 131_072
    row = 8 * 128 * 2
    pool = lazy(2 * 32 * tokens * row).view(torch.bfloat16).view(2, 32, tokens, 8, 128)
    chunk = lazy(2 * 32 * tokens * row).view(torch.bfloat16).view(2, 32, tokens, 1024)
    src = KVView(pool, "kv layer (block token) head dim", block_size=16)
    dst = KVView(chunk, "kv layer token (head dim)", heads=8)
    plan = CopyPlan(src.form, dst.form, 16, 0)
    blocks = Index(torch.arange(tokens // 16, dtype=torch.int32).flip(0), step=16)
    runs = plan.runs(src, dst, blocks, Index(), tokens)
    assert int(runs.nbytes.sum()) == 2 * 32 * tokens * row
    assert int(runs.src.max()) == address(src, 1, 31, tokens - 16)
    assert int(runs.dst.max()) == address(dst, 1, 31, tokens - 16)
    assert int(runs.dst.max()) - chunk.data_ptr() > 2**34 - 2**20


# A copy unit fixed at 8 bytes truncates rows of 132 or 100 bytes, silently.


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(132, BYTES), (66, torch.bfloat16), (100, BYTES), (25, torch.float32), (1, BYTES),
     (7, BYTES), (131, BYTES), (584, BYTES), (656, torch.float8_e4m3fn)],
)  # fmt: skip
def test_every_byte_of_a_row_and_none_behind_it(
    carry: Copier, width: int, dtype: torch.dtype
) -> None:
    paged = noise(32, width + 3, dtype=dtype)
    dense = noise(20, width, dtype=dtype, seed=1)
    ids = torch.randperm(32, generator=torch.Generator().manual_seed(1))[:20]
    expected = paged.view(BYTES).clone()
    expected[ids, : width * dtype.itemsize] = dense.view(BYTES)
    view = KVView(paged.view(4, 8, -1)[:, :, :width], "block token dim")
    loaded(carry, KVView(dense, "token dim"), view, ids, expected)


# A vector width chosen from row bytes alone faults, or moves other bytes, where a base, a stride
# or a storage offset is not aligned to it; or where later rows are less aligned.


def off_alignment(kind: str, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory, and rows of 64 bytes inside it that are not aligned to 16."""
    memory = noise(8, by if kind == "stride" else 80, dtype=BYTES)
    if kind == "stride":  # the first row is aligned, the later ones are not
        return memory, memory[:, :64]
    memory = memory.flatten()
    if kind == "base address":  # the storage itself begins off the alignment: its offset is 0
        start = -memory.data_ptr() % 16 + by
        memory = torch.from_numpy(memory.numpy()[start : start + 8 * 64 + 32])
        assert (memory.storage_offset(), memory.data_ptr() % 16) == (0, by)
        return memory, memory[: 8 * 64].view(8, 64)
    return memory, memory[by : by + 8 * 64].view(8, 64)


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize(
    ("kind", "by"),
    [
        *(("storage offset", by) for by in (1, 2, 4, 8, 12)),
        *(("base address", by) for by in (1, 2, 4, 8)),
        *(("stride", by) for by in (65, 66, 68, 72)),
    ],
)
def test_rows_off_their_alignment(carry: Copier, kind: str, by: int, side: str) -> None:
    memory, inside = off_alignment(kind, by)
    other = noise(8, 64, dtype=BYTES, seed=1)
    ids = torch.arange(8).flip(0)
    views = KVView(inside, "token dim")
    rows = inside.clone()
    around = memory.clone()
    if side == "src":
        carry(views, KVView(other, "token dim"), ids, None)
        assert torch.equal(other, rows[ids])
    else:
        carry(KVView(other, "token dim"), views, None, ids)
        assert torch.equal(inside[ids], other)
        inside.copy_(rows)
    assert torch.equal(memory, around)


@pytest.mark.parametrize(
    ("heads", "dim"), [(16, 33), (16, 50), (16, 100), (128, 16), (129, 16), (1030, 16)]
)
def test_heads_that_are_many_or_odd(carry: Copier, heads: int, dim: int) -> None:
    """HND: 16 heads of 33 bytes make a row of 528, yet each head is a separate piece. More than
    1,024 threads were requested for a block of 128 heads."""
    cache = noise(3, heads, 4, dim, dtype=BYTES)
    chunk = noise(12, heads * dim, dtype=BYTES, seed=1)
    views = KVView(cache, "block head token dim"), KVView(chunk, "token (head dim)", heads=heads)
    for ids in (torch.arange(12).flip(0), torch.arange(12).roll(5)):
        carry(views[1], views[0], None, ids)
        assert torch.equal(cache.transpose(1, 2).reshape(12, -1)[ids], chunk)
        chunk.copy_(noise(12, heads * dim, dtype=BYTES, seed=2))
        carry(*views, ids, None)
        assert torch.equal(cache.transpose(1, 2).reshape(12, -1)[ids], chunk)


# A layout guessed from `shape[i] == 2`, or from how many tensors there are.


@pytest.mark.parametrize("shape", [(2, 2, 4, 1, 8), (2, 2, 2, 2, 2)])
def test_two_blocks_of_two_kv(carry: Copier, shape: tuple[int, ...]) -> None:
    """[2, B, ...] and [B, 2, ...] with B == 2: each reading gives different bytes."""
    cache = noise(*shape)
    _, _, tokens, heads, dim = shape
    got = []
    for layout in ("kv block token head dim", "block kv token head dim"):
        chunk = torch.zeros(2, 2 * tokens, heads, dim, dtype=cache.dtype)
        carry(KVView(cache, layout), KVView(chunk, "kv token head dim"), None, None)
        got.append(chunk)
    assert torch.equal(got[0], cache.flatten(1, 2))
    assert torch.equal(got[1], cache.transpose(0, 1).flatten(1, 2))
    assert not torch.equal(*got)


def test_two_tokens_are_no_kv(carry: Copier) -> None:
    cache = noise(3, 2, 2, 8)
    chunk = noise(6, 2, 8, seed=1)
    carry(KVView(cache, "block token head dim"), KVView(chunk, "token head dim"), None, None)
    assert torch.equal(chunk, cache.flatten(0, 1))


def test_two_tensors_are_layers_or_kv_as_declared(carry: Copier) -> None:
    pair = [noise(12, 8, seed=i) for i in range(2)]
    as_layers = KVView(pair, "layer | token dim")
    as_kv = KVView(pair, "kv | token dim")
    assert (as_layers.layers, as_layers.kv) == (2, 1)
    assert KVView(pair[:1], "layer | token dim").layers == 1
    assert (as_kv.layers, as_kv.kv) == (1, 2)
    with pytest.raises(LayoutError, match="'kv' extent"):
        carry(as_layers, KVView(torch.zeros(2, 12, 8).short(), "kv token dim"), None, None)


def test_logical_nhd_over_hnd_memory(carry: Copier) -> None:
    """Shape (2, B, T, H, D) over memory K B H T D, addressed as if it were linear."""
    memory = noise(2, 3, 2, 4, 8)
    chunk = noise(2, 5, 2, 8, seed=1)
    expected = memory.clone()
    ids = torch.tensor([11, 0, 4, 3, 7])
    expected.transpose(2, 3)[:, ids // 4, ids % 4] = chunk
    view = KVView(memory.transpose(2, 3), "kv block token head dim")
    loaded(carry, KVView(chunk, "kv token head dim"), view, ids, expected)


def test_padding_of_pages_is_not_touched(carry: Copier) -> None:
    """The stride of a block is more than its dense size: the rest belongs to somebody."""
    memory = noise(4, 100)
    chunk = noise(2, 4, 8, seed=1)
    expected = memory.clone()
    pages = memory[:, :64].view(4, 2, 4, 8)
    expected[2, :64] = chunk.flatten()
    view = KVView(pages, "block kv token dim")
    loaded(carry, KVView(chunk, "kv token dim"), view, Index([2], step=4), expected)


def test_packed_layers_do_not_touch_each_other(carry: Copier) -> None:
    """All layers interleave in a block; a copy of one must leave its neighbours whole."""
    memory = noise(3, 4, 5, 2, 16)
    chunk = noise(2, 10, 2, 8, seed=1)
    layers = [memory[:, i].transpose(1, 2) for i in range(4)]
    expected = memory.clone()
    for at, block in enumerate((2, 0)):
        rows = chunk[:, 5 * at : 5 * at + 5].permute(1, 2, 0, 3).reshape(5, 2, 16)
        expected[block, 2] = rows
    view = KVView(layers, "layer | block head token (kv dim)").slice(layers=2)
    loaded(carry, KVView(chunk, "kv token head dim"), view, Index([2, 0], step=5), expected)


def test_a_destination_that_is_not_contiguous_is_really_written(carry: Copier) -> None:
    """Copied through `.contiguous()` and thrown away: success reported, nothing written."""
    memory = noise(8, 2, 3, 12)
    chunk = noise(2, 6, 3, 8, seed=1)
    expected = memory.clone()
    expected[..., ::2] = chunk.permute(3, 0, 2, 1)
    view = KVView(memory.permute(1, 3, 2, 0)[:, ::2], "kv token head dim")  # each element apart
    loaded(carry, KVView(chunk, "kv token head dim"), view, None, expected)


def test_a_slice_of_a_list_is_written_and_not_a_copy_of_it(carry: Copier) -> None:
    """A raw-pointer view fell back to a copy, and what was scattered into it was lost."""
    layers = [noise(3, 2, 4, 8, seed=i).transpose(1, 2) for i in range(3)]
    part = KVView(layers, "layer | block token head dim").slice(layers=1, heads=1)
    rows = noise(2, 8, seed=9)
    carry(KVView(rows, "token dim"), part, None, torch.tensor([9, 2]))
    assert torch.equal(layers[1][2, 1, 1], rows[0])
    assert torch.equal(layers[1][0, 2, 1], rows[1])


@pytest.mark.parametrize(("of_tensor", "step", "ids"), [(16, 64, [2, 0]), (64, 16, [11, 1])])
def test_manager_blocks_over_kernel_blocks(
    carry: Copier, of_tensor: int, step: int, ids: list[int]
) -> None:
    """The manager counts blocks of 64 tokens, the tensor kernel blocks of 16; or the other way."""
    cache = noise(192 // of_tensor, of_tensor, 8)
    chunk = noise(2 * step, 8, seed=1)
    carry(KVView(chunk, "token dim"), KVView(cache, "block token dim"), None, Index(ids, step))
    for at, block in enumerate(ids):
        rows = cache.flatten(0, 1)[block * step : (block + 1) * step]
        assert torch.equal(rows, chunk[at * step : (at + 1) * step])


def test_a_dsa_page_is_its_values_and_then_its_scales(carry: Copier) -> None:
    """Nominal (B, T, 132): moved as rows of 132 bytes, values and scales mix."""
    cache = [noise(3, 64, 132, dtype=BYTES, seed=i) for i in range(2)]
    pages = torch.stack(cache).view(2, 3, 64 * 132)
    values = pages[..., : 64 * 128]
    scales = pages[..., 64 * 128 :]
    slot = torch.tensor([5, 64 + 63, 130])
    split = KVView(cache, "vllm-dsa-split", block_size=64)
    chunk = [torch.zeros(2, 3, n, dtype=BYTES) for n in (128, 4)]
    carry(split, KVView(chunk, "kv | layer token dim"), slot, None)
    expected = values.reshape(2, 192, 128)[:, slot], scales.reshape(2, 192, 4)[:, slot]
    assert torch.equal(chunk[0], expected[0])
    assert torch.equal(chunk[1], expected[1])
    as_rows = torch.stack(cache).view(2, 192, 132)[:, slot]
    assert not torch.equal(as_rows, torch.cat(expected, 2))


def test_a_dsa_page_is_not_moved_by_token_where_its_content_is_unknown(carry: Copier) -> None:
    cache = [noise(3, 64, 132, dtype=BYTES) for _ in range(2)]
    other = [torch.zeros(3, 64, 132, dtype=BYTES) for _ in range(2)]
    src, dst = (KVView(tensors, "vllm-dsa", block_size=64) for tensors in (cache, other))
    with pytest.raises(Unsupported, match="page moves only whole"):
        carry(src, dst, torch.tensor([1]), torch.tensor([2]))
    assert not any(tensor.any() for tensor in other)
    carry(src, dst, Index([2], 64), Index([1], 64))
    assert torch.equal(other[1][1], cache[1][2])
    assert not other[1][[0, 2]].any()


# Index lists


class Rig:
    """A paged cache of 5 blocks x 4 tokens and a chunk, each between canaries."""

    def __init__(self, tokens: int) -> None:
        self.memory = noise(7, 4, 8)
        self.chunk_memory = noise(tokens + 8, 8, seed=1)
        self.before = self.memory.clone()
        self.chunk_before = self.chunk_memory.clone()
        self.paged = KVView(self.memory[1:6], "block token dim")
        self.dense = KVView(self.chunk_memory[4:-4], "token dim")

    def move(self, carry: Copier, index: Any, scattered: bool, count: int | None = None) -> None:
        if scattered:
            carry(self.dense, self.paged, None, index, count)
        else:
            carry(self.paged, self.dense, index, None, count)

    def expect(self, slots: list[int], *, scattered: bool) -> None:
        """The rows of ``slots`` moved, in their order; every other byte is as it was."""
        cache = self.before[1:6].view(20, 8)
        chunk = self.chunk_before[4:-4]
        at = [i for i, slot in enumerate(slots) if slot >= 0]
        if scattered:
            cache[[slots[i] for i in at]] = chunk[at]
        else:
            chunk[at] = cache[[slots[i] for i in at]]
        assert torch.equal(self.memory, self.before)
        assert torch.equal(self.chunk_memory, self.chunk_before)


LISTS: dict[str, Callable[[list[int]], Any]] = {
    "int64": lambda ids: torch.tensor(ids, dtype=torch.int64),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "not contiguous": lambda ids: (
        torch.tensor([*ids, *ids], dtype=torch.int64).reshape(2, -1).T.contiguous()[:, 0]
    ),
    "array": lambda ids: np.array(ids, dtype=np.int64),
    "list": lambda ids: ids,
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS.keys())
@SCATTERED
@pytest.mark.parametrize(
    "slots",
    [
        [],
        [13],
        [19, 0],
        [3, 9, 4, 18, 1, 0, 12],
        list(range(20)),
        [3, -1, 9],
        [-1, -1, -1],
        [4, 5, 6, 7, 12, 13],  # a block and a half
        [-7, 2, -(2**31), 19],
    ],
    ids=str,
)
def test_lists_of_any_length_make_and_order(
    carry: Copier, make: Callable[[list[int]], Any], scattered: bool, slots: list[int]
) -> None:
    """Empty, one element, no multiple of the block; int32; not contiguous. A negative slot was
    skipped by one backend and read as the last row by another: here it is skipped by all."""
    rig = Rig(len(slots))
    rig.move(carry, make(slots), scattered)
    rig.expect(slots, scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("slot", [20, 21, 2**31, 2**40, 2**62])
def test_a_slot_past_the_end_moves_nothing(carry: Copier, scattered: bool, slot: int) -> None:
    """Other code wrote out of bounds, or raised a device assert that poisons the context."""
    rig = Rig(3)
    with pytest.raises(SlotError, match=f"the view's 20 slots, got slot {slot} "):
        rig.move(carry, torch.tensor([1, slot, 2]), scattered)
    rig.expect([-1, -1, -1], scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("block", [5, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("count", [10, 12])
def test_a_block_past_the_end_moves_nothing(scattered: bool, block: int, count: int) -> None:
    """2**62 * 4 is 0 in 64 bits: a wild block must not come back as block 0."""
    rig = Rig(12)
    message = rf"the view's 20 slots, .* \(of id {block}, 4 slots each\) at position 4;"
    with pytest.raises(SlotError, match=message):
        rig.move(by_backend, Index([0, block, 1], step=4), scattered, count)
    rig.expect([-1] * 12, scattered=scattered)


def test_duplicates_in_a_scatter_are_refused_and_in_a_gather_are_served(carry: Copier) -> None:
    rig = Rig(4)
    with pytest.raises(SlotError, match="destination index, got slot 7, which occurs 2 times"):
        rig.move(by_backend, [7, 3, 7, 1], scattered=True)
    rig.expect([-1] * 4, scattered=True)
    rig.move(carry, [7, 3, 7, 1], scattered=False)
    rig.expect([7, 3, 7, 1], scattered=False)


@SCATTERED
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("offset", [0, 1, 4, 6])
def test_a_partial_chunk_is_moved_like_a_whole_one(
    scattered: bool, count: int, offset: int
) -> None:
    """A partial last chunk was taken by the fallback and refused by the kernel: here head and
    tail of the blocks move by token."""
    rig = Rig(12)
    table = Index([3, 0, 4, 1, 2], step=4, offset=offset)
    slots = table.slots(count).tolist() + [-1] * (12 - count)
    rig.move(by_backend, table, scattered, count)
    rig.expect(slots, scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("padding", [-1, -7, -(2**31), -(2**62), -(2**63)])
@pytest.mark.parametrize("count", [10, 12])
def test_a_negative_block_skips_its_tokens(scattered: bool, padding: int, count: int) -> None:
    """-2**63 * 4 is 0 in 64 bits: padding must not come back as block 0."""
    rig = Rig(12)
    rig.move(by_backend, Index([4, padding, 1], step=4), scattered, count)
    rig.expect([16, 17, 18, 19, *[-1] * 4, *range(4, count - 4)], scattered=scattered)
