# SPDX-License-Identifier: Apache-2.0
"""The mlu backend on the simulated device of that name, through the stand-in for torch_mlu_ops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cuda_cases import Copy, End, by
from support.each_backend import Carrier, Elsewhere
from support.guarded_memory import filled
from support.own_process import in_child, own_process

from portakv import CopyPlan
from portakv.backends.mlu import Mlu
from portakv.registry.registry import choose
from portakv_conformance import simdev
from portakv_conformance.vendor import mlu_standin, standins

pytestmark = own_process("mlu", "mlu")
DEVICE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)
if in_child():
    standins.install("mlu")
    choose(DEVICE, "mlu")  # with its self-check, whose calls must not count
MLU = Carrier(Mlu, DEVICE)
LAYERS = 3
BLOCKS = 5
HEADS = 2
SIZE = 16
DIM = 16
SLOTS = BLOCKS * SIZE
IDS = [37, 2, 79, 16, 15, 0, 48, 21, 64]
HALF = torch.float16
LAYERS_OP = "multi_layer_kv_transfer"
PLANES_OP = "reshape_paged_cache"
#: layout, shape of a tensor without the kv containers, tensors for each layer, op, calls.
CACHES = {
    "merged": ("layer | kv block head token dim", (2, BLOCKS, HEADS, SIZE, DIM), 0, LAYERS_OP, 1),
    "in blocks": ("layer | block kv head token dim", (BLOCKS, 2, HEADS, SIZE, DIM), 0,
                  LAYERS_OP, 1),
    "latent": ("layer | block token dim", (BLOCKS, SIZE, DIM), 0, LAYERS_OP, 1),
    "pairs": ("layer kv | block head token dim", (BLOCKS, HEADS, SIZE, DIM), 2, PLANES_OP, LAYERS),
    "nhd": ("layer | kv block token head dim", (2, BLOCKS, SIZE, HEADS, DIM), 0, "", 0),
    "narrow": ("layer | kv block head token dim", (2, BLOCKS, HEADS, SIZE, 2), 0, "", 0),
}  # fmt: skip
both_directions = pytest.mark.parametrize("gather", [True, False])


@pytest.fixture(autouse=True)
def _no_faults_left() -> Iterator[None]:
    mlu_standin.CALLS.clear()
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


def cache(kind: str, dtype: torch.dtype = HALF) -> End:
    layout, shape, apart, *_ = CACHES[kind]
    if not apart:
        return End([filled(shape, dtype) for _ in range(LAYERS)], layout)
    return End([[filled(shape, dtype) for _ in range(apart)] for _ in range(LAYERS)], layout)


def chunk(kind: str, tokens: int, dtype: torch.dtype = HALF, first: int = 0) -> End:
    kv, heads = (1, 1) if kind == "latent" else (2, HEADS)
    rows = filled((kv, LAYERS, tokens, heads * CACHES[kind][1][-1]), dtype)
    return End(rows, "kv layer token (head dim)", {"heads": heads, "kv": kv}, offset=first)


def copied(
    kind: str,
    gather: bool,
    ids: list[int],
    dtype: torch.dtype = HALF,
    *,
    step: int = 1,
    first: int = 0,
    more: int = 0,
) -> Copy:
    """A copy between a cache and a chunk of ``more`` tokens more."""
    count = len(ids) * step
    paged = by(cache(kind, dtype), ids, step)
    dense = chunk(kind, count + more, dtype, first)
    return Copy(paged, dense, count) if gather else Copy(dense, paged, count)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64]
)
@both_directions
@pytest.mark.parametrize("kind", CACHES)
def test_each_kind_of_cache_goes_by_its_op(kind: str, gather: bool, dtype: torch.dtype) -> None:
    *_, op, calls = CACHES[kind]
    if dtype == torch.uint8 and op:
        # heads of 16 bytes
        calls = 0
        op = ""
    copy = copied(kind, gather, IDS, dtype)
    MLU.copies(copy)
    assert dict(mlu_standin.CALLS) == ({op: calls} if op else {})
    src, dst = Elsewhere(DEVICE).views(copy.src, copy.dst)
    reason = Mlu(DEVICE).check(CopyPlan(src.form, dst.form, int(gather), int(not gather))).reason
    assert reason == f"takes the plan by {op or 'index_select and index_copy_, after a wait'}"


@both_directions
@pytest.mark.parametrize("kind", CACHES)
def test_padding_and_block_tables(kind: str, gather: bool) -> None:
    MLU.copies(copied(kind, gather, [-1, 3, -7, 70, -1]))
    MLU.copies(copied(kind, gather, [-1, -2]))
    MLU.copies(copied(kind, gather, [3, 0, -1], step=SIZE))


@both_directions
@pytest.mark.parametrize(("kind", "op"), [("merged", PLANES_OP), ("latent", PLANES_OP),
                                          ("pairs", PLANES_OP), ("in blocks", "")])  # fmt: skip
def test_a_part_of_a_chunk_goes_plane_by_plane(kind: str, op: str, gather: bool) -> None:
    MLU.copies(copied(kind, gather, IDS, first=4, more=7))
    assert set(mlu_standin.CALLS) == ({op} if op else set())


def test_unequal_widths_are_a_call_for_each_plane() -> None:
    shapes = (BLOCKS, 1, SIZE, 64), (BLOCKS, 1, SIZE, 16)
    layers = [[filled(shape) for shape in shapes] for _ in range(2)]
    paged = End(layers, "layer kv | block head token dim", {"dim": (64, 16)}, IDS)
    joined = End(filled((2, 9, 80)), "layer token (kv dim)", {"kv": 2, "dim": (64, 16)})
    MLU.copies(Copy(paged, joined, 9))
    assert not mlu_standin.CALLS  # rows of a chunk with key and value side by side are no planes
    parts = [[filled((9, dim)) for dim in (64, 16)] for _ in range(2)]
    MLU.copies(Copy(End(parts, "layer kv | token dim", {"dim": (64, 16)}), paged, 9))
    assert dict(mlu_standin.CALLS) == {PLANES_OP: 4}


@pytest.mark.parametrize(
    ("lacks", "kinds", "gathers"),
    [
        ({"direction": False, "transfer": False}, ("merged", "pairs"), 0),
        ({"transfer": False}, ("merged", "latent", "pairs"), LAYERS),
    ],
    ids=["the other direction", "the transfer of all layers"],
)
def test_a_release_that_lacks_something(
    lacks: dict[str, bool], kinds: tuple[str, ...], gathers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch_mlu_ops")
    mlu_standin.install(**lacks)
    for kind, gather in ((x, y) for x in (*kinds, "in blocks") for y in (True, False)):
        mlu_standin.CALLS.clear()
        MLU.launch_and_check(copied(kind, gather, [*IDS, -1]), None)
        calls = 0 if kind == "in blocks" else gathers if gather else LAYERS
        assert mlu_standin.CALLS[PLANES_OP] == mlu_standin.CALLS.total() == calls, (kind, gather)


@pytest.mark.parametrize("ids", [[SLOTS, 2**30, 2**31 - 1], [SLOTS, 2**40, -(2**62)]], ids=str)
@pytest.mark.parametrize("kind", ["merged", "pairs", "nhd"])
def test_a_device_slot_past_the_end_moves_nothing_and_is_told(kind: str, ids: list[int]) -> None:
    MLU.copies(copied(kind, False, ids), bad="Position 0 of a device index", there=True)


# The stand-in


def _arguments(**others: Any) -> dict[str, Any]:
    rows = torch.zeros(3, 2, 16, device=DEVICE)
    cache = torch.zeros(2, 2, 4, 16, device=DEVICE)
    slots = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    arguments = {"k": rows, "v": rows, "k_cache": cache, "v_cache": cache, "slot_mapping": slots}
    return arguments | others


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("slot_mapping", torch.zeros(3, dtype=torch.int64), "int64"),
        ("slot_mapping", torch.zeros(2, dtype=torch.int32), r"expected int32 \(3,\)"),
        ("k", torch.zeros(3, 2, 16, dtype=torch.float64), "float64"),
        ("k", torch.zeros(3, 16, 2).transpose(1, 2), "not contiguous"),
        ("k", torch.zeros(3, 32), "2 dimensions, expected 3"),
        ("k_cache", torch.zeros(2, 4, 2, 16), "rows are"),
        ("k_cache", torch.zeros(2, 2, 4, 16, dtype=torch.float16), "one dtype"),
        ("v_cache", None, "together"),
        *(("k", device, "the current device is mlu:0") for device in (torch.device("cpu"), OTHER)),
    ],
)
def test_the_stand_in_refuses_what_the_op_does_not_take(name: str, value: Any, why: str) -> None:
    moved = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    if isinstance(value, torch.device):
        moved = torch.zeros(3, 2, 16, device=value)
    with pytest.raises(RuntimeError, match=why):
        mlu_standin.reshape_paged_cache(**_arguments(**{name: moved}))


def test_the_transfer_takes_chunks_on_the_host_and_skips_a_prefix() -> None:
    cache = torch.zeros(2, 4, 2, 4, 16, device=DEVICE)
    chunk = torch.arange(2 * 3 * 32, dtype=torch.float32).view(2, 1, 3, 32).pin_memory()
    pointers = torch.tensor([cache.data_ptr()], device=DEVICE)
    slots = torch.tensor([1, -1, 9], dtype=torch.int32, device=DEVICE)
    mlu_standin.multi_layer_kv_transfer(
        chunk,
        pointers,
        slots,
        DEVICE,
        16,
        mlu_standin.TransferDirection.H2D,
        mlu_standin.KVFormat.TWO_NB_HN_BS_HS,
        4,
        16,
        1,
    )
    result = cache.cpu().transpose(2, 3).reshape(2, 16, 32)
    wanted = torch.zeros_like(result)
    wanted[:, 9] = chunk[:, 0, 2]
    assert torch.equal(result, wanted)
