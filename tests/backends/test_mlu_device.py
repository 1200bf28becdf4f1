# SPDX-License-Identifier: Apache-2.0
"""The mlu backend on the simulated device of that name, through the stand-in for torch_mlu_ops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.own_process import in_child, own_process

from portakv import AdaptiveConnector, CopyPlan, Index, KVView, SlotError, copy_rows
from portakv.backends.mlu import Mlu
from portakv_conformance import simdev
from portakv_conformance.vendor import mlu_standin, standins

pytestmark = own_process("mlu", "mlu")
if in_child():
    standins.install("mlu")


DEVICE = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)
LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 5, 2, 16, 16
SLOTS = BLOCKS * SIZE
IDS = [37, 2, 79, 16, 15, 0, 48, 21, 64]
LAYERS_OP, PLANES_OP = "multi_layer_kv_transfer", "reshape_paged_cache"
#: layout, shape of a tensor without the kv containers, tensors for each layer, op, calls.
CACHES = {
    "merged": ("mlu-merged", (2, BLOCKS, HEADS, SIZE, DIM), 0, LAYERS_OP, 1),
    "in blocks": ("layer | block kv head token dim", (BLOCKS, 2, HEADS, SIZE, DIM), 0,
                  LAYERS_OP, 1),
    "latent": ("layer | block token dim", (BLOCKS, SIZE, DIM), 0, LAYERS_OP, 1),
    "pairs": ("mlu", (BLOCKS, HEADS, SIZE, DIM), 2, PLANES_OP, LAYERS),
    "nhd": ("vllm-nhd", (2, BLOCKS, SIZE, HEADS, DIM), 0, "", 0),
    "narrow": ("mlu-merged", (2, BLOCKS, HEADS, SIZE, 2), 0, "", 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_faults_left() -> Iterator[None]:
    mlu_standin.CALLS.clear()
    yield
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)
    assert not simdev.take_faults()


def counted(shape: tuple[int, ...], dtype: torch.dtype, start: int) -> torch.Tensor:
    """Bytes that differ from place to place, on the host."""
    number = torch.Size(shape).numel() * dtype.itemsize
    flat = (torch.arange(number) * 2654435761 + start * 40503) % 65521 % 251
    return flat.to(torch.uint8).view(dtype).view(shape)


def cache_of(kind: str, dtype: torch.dtype, start: int = 1) -> list[Any]:
    """A cache on the host."""
    _, shape, apart, *_ = CACHES[kind]
    if not apart:
        return [counted(shape, dtype, start + at) for at in range(LAYERS)]
    return [
        tuple(counted(shape, dtype, start + at * apart + k) for k in range(apart))
        for at in range(LAYERS)
    ]


def chunk_of(kind: str, dtype: torch.dtype, tokens: int, start: int) -> torch.Tensor:
    """A chunk on the host."""
    kv, heads = (1, 1) if kind == "latent" else (2, HEADS)
    return counted((kv, LAYERS, tokens, heads * CACHES[kind][1][-1]), dtype, start)


def there(tensors: Any, device: torch.device) -> Any:
    """The same on a device."""
    if isinstance(tensors, torch.Tensor):
        return tensors.clone().to(device)
    return type(tensors)(there(tensor, device) for tensor in tensors)


def as_bytes(tensors: Any) -> bytes:
    """All bytes of tensors that lie in one piece each."""
    if isinstance(tensors, torch.Tensor):
        return tensors.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return b"".join(as_bytes(tensor) for tensor in tensors)


def views(kind: str, cache: Any, chunk: torch.Tensor) -> tuple[KVView, KVView]:
    """Views of a cache and a chunk."""
    paged = KVView(cache, CACHES[kind][0])
    return paged, KVView(chunk, "kv layer token (head dim)", heads=paged.heads, kv=paged.kv)


def differs(
    kind: str,
    gather: bool,
    dtype: torch.dtype,
    ids: Any,
    tokens: int,
    *,
    first: int = 0,
    step: int = 1,
    backend: Mlu | None = None,
    device: torch.device = DEVICE,
) -> str:
    """Copy on the device and by `reference` on the host; empty where all bytes agree."""
    host = cache_of(kind, dtype), chunk_of(kind, dtype, tokens, 99)
    mine = there(host[0], device), there(host[1], device)
    count = len(ids) * step
    for (cache, chunk), place in ((host, None), (mine, device)):
        paged, dense = views(kind, cache, chunk)
        index, rows = Index(torch.tensor(ids), step=step), Index(offset=first)
        pairs = [(paged, index), (dense, rows)]
        (src, s), (dst, d) = pairs if gather else pairs[::-1]
        if place is None or backend is None:
            name = "reference" if place is None else "mlu"
            copy_rows(src, dst, s, d, count=count, backend=name).synchronize()
        else:
            plan = CopyPlan(src.form, dst.form, s.plan_step, d.plan_step, step)
            dtypes = backend.capabilities().index_dtypes
            s, d = s.placed(device, dtypes), d.placed(device, dtypes)
            backend.prepare(plan)(src, dst, s, d, count, None, None)
    for what, wanted, found in zip(("cache", "chunk"), host, mine, strict=True):
        if as_bytes(wanted) != as_bytes(found):
            return f"the {what} differs"
    return ""


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64]
)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("kind", CACHES)
def test_each_kind_of_cache_goes_by_its_op(kind: str, gather: bool, dtype: torch.dtype) -> None:
    *_, op, calls = CACHES[kind]
    if dtype == torch.uint8 and op:
        calls, op = 0, ""  # heads of 16 bytes
    assert not differs(kind, gather, dtype, IDS, len(IDS))
    assert dict(mlu_standin.CALLS) == ({op: calls} if op else {})


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("kind", CACHES)
def test_padding_and_block_tables(kind: str, gather: bool) -> None:
    half = torch.float16
    assert not differs(kind, gather, half, [-1, 3, -7, 70, -1], 5)
    assert not differs(kind, gather, half, [-1, -2], 2)
    assert not differs(kind, gather, half, [3, 0, -1], 3 * SIZE, step=SIZE)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(("kind", "op"), [("merged", PLANES_OP), ("latent", PLANES_OP),
                                          ("pairs", PLANES_OP), ("in blocks", "")])  # fmt: skip
def test_a_part_of_a_chunk_goes_plane_by_plane(kind: str, op: str, gather: bool) -> None:
    assert not differs(kind, gather, torch.float16, IDS, len(IDS) + 7, first=4)
    assert set(mlu_standin.CALLS) == ({op} if op else set())


@pytest.mark.parametrize("kind", ["merged", "pairs"])
def test_the_second_device(kind: str) -> None:
    """The stand-in refuses tensors of another device than the current one."""
    for gather in (True, False):
        assert not differs(kind, gather, torch.float16, IDS, len(IDS), device=OTHER)
    assert mlu_standin.CALLS.total() > 0


def test_unequal_widths_are_a_call_for_each_plane() -> None:
    half, pages = torch.float16, (BLOCKS, 1, SIZE)
    cache = [
        (counted((*pages, 64), half, at), counted((*pages, 16), half, at + 9)) for at in range(2)
    ]
    chunk = torch.zeros(2, 9, 80, dtype=torch.float16)
    mine, dense = there(cache, DEVICE), chunk.to(DEVICE)
    for found, name in ((chunk, "reference"), (dense, "mlu")):
        paged = KVView(cache if name == "reference" else mine, "mlu", dim=(64, 16))
        rows = KVView(found, "layer token (kv dim)", kv=2, dim=(64, 16))
        copy_rows(paged, rows, IDS, backend=name).synchronize()
    assert as_bytes(chunk) == as_bytes(dense)
    assert not mlu_standin.CALLS  # rows of a chunk with key and value side by side are no planes
    parts = there(
        [(chunk[at, :, :64].clone(), chunk[at, :, 64:].clone()) for at in range(2)], DEVICE
    )
    copy_rows(KVView(parts, "layer kv | token dim"), KVView(mine, "layer kv | block 1 token dim"),
              dst_index=IDS, backend="mlu").synchronize()  # fmt: skip
    assert dict(mlu_standin.CALLS) == {PLANES_OP: 4}
    assert as_bytes(cache) == as_bytes(mine)


# -- releases ----------------------------------------------------------------------------------


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Mlu:
    """The backend with a release of torch_mlu_ops that lacks something."""
    monkeypatch.delitem(sys.modules, "torch_mlu_ops")
    mlu_standin.install(**request.param)
    made = Mlu(DEVICE)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("release", [{"direction": False, "transfer": False}], indirect=True)
@pytest.mark.parametrize("kind", ["merged", "pairs"])
def test_an_older_release_only_scatters(release: Mlu, kind: str) -> None:
    assert not differs(kind, True, torch.float16, IDS, len(IDS), backend=release)
    assert not mlu_standin.CALLS
    assert not differs(kind, False, torch.float16, IDS, len(IDS), backend=release)
    assert dict(mlu_standin.CALLS) == {PLANES_OP: LAYERS}


@pytest.mark.parametrize("release", [{"transfer": False}], indirect=True)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(
    ("kind", "calls"), [("merged", LAYERS), ("latent", LAYERS), ("pairs", LAYERS), ("in blocks", 0)]
)
def test_a_release_without_the_transfer_of_all_layers(
    release: Mlu, kind: str, calls: int, gather: bool
) -> None:
    assert not differs(kind, gather, torch.float16, [*IDS, -1], len(IDS) + 1, backend=release)
    assert mlu_standin.CALLS[PLANES_OP] == mlu_standin.CALLS.total() == calls


def test_the_plan_tells_the_op() -> None:
    backend, told = Mlu(DEVICE), {}
    for kind in CACHES:
        paged, dense = views(kind, there(cache_of(kind, torch.float16), DEVICE),
                             there(chunk_of(kind, torch.float16, 4, 0), DEVICE))  # fmt: skip
        told[kind] = backend.check(CopyPlan(paged.form, dense.form, 1, 0)).reason
    assert told == {
        kind: f"takes the plan by {op or 'index_select and index_copy_, after a wait'}"
        for kind, (*_, op, _) in CACHES.items()
    }


# -- the library around it -----------------------------------------------------------------------


def test_the_connector_chooses_it_and_says_why() -> None:
    connector = AdaptiveConnector("mlu", kv_layout="mlu-merged", chunk_layout="chunk-2ltd")
    cache, chunk = cache_of("merged", torch.float16), chunk_of("merged", torch.float16, 9, 5)
    mine = there(cache, DEVICE)
    connector.register_kv_caches(mine)
    landed = torch.zeros_like(chunk, device=DEVICE)
    connector.to_gpu(
        there(chunk, DEVICE), slot_mapping=torch.tensor(IDS, device=DEVICE)
    ).synchronize()
    connector.from_gpu(landed, slot_mapping=torch.tensor(IDS, device=DEVICE)).synchronize()
    assert as_bytes(landed) == as_bytes(chunk)
    assert dict(mlu_standin.CALLS) == {LAYERS_OP: 2}
    told = str(connector.explain())
    assert (
        "mlu: accepted, torch_mlu_ops stand-in (emulated) has reshape_paged_cache (to and from "
        in told
    )
    assert "self-check passed, every byte right" in told


@pytest.mark.parametrize("kind", ["merged", "pairs", "nhd"])
def test_a_device_slot_past_the_end_moves_nothing_and_is_told(kind: str) -> None:
    host = cache_of(kind, torch.float16)
    mine, chunk = there(host, DEVICE), there(chunk_of(kind, torch.float16, 3, 7), DEVICE)
    paged, dense = views(kind, mine, chunk)
    for ids in ([SLOTS, 2**30, 2**31 - 1], [SLOTS, 2**40, -(2**62)]):
        bad = torch.tensor(ids, device=DEVICE)
        with pytest.raises(SlotError, match="Position 0 of a device index"):
            copy_rows(dense, paged, dst_index=bad, backend="mlu").synchronize()
        assert as_bytes(mine) == as_bytes(host)
    with pytest.raises(SlotError):
        copy_rows(dense, paged, dst_index=[0, 1, SLOTS], backend="mlu")


def test_vendor_ops_do_not_wait_for_the_device() -> None:
    """A synchronisation would hide a missing wait, and stall the host on a real device."""
    paged, dense = views("merged", there(cache_of("merged", torch.float16), DEVICE),
                         there(chunk_of("merged", torch.float16, 9, 7), DEVICE))  # fmt: skip
    ids = torch.tensor(IDS, device=DEVICE)
    torch.accelerator.synchronize()
    before = simdev.synchronised()
    marker = torch.Event(DEVICE)
    dense.tensors.fill_(1)
    marker.record()
    copy_rows(dense, paged, dst_index=ids, backend="mlu")
    assert not marker.query()
    assert simdev.synchronised() == before


def test_another_vendor_s_package_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"torch_npu was asked for {name}")

    monkeypatch.setitem(sys.modules, "torch_npu", Broken("torch_npu"))
    assert Mlu.probe(DEVICE).accepted
    connector = AdaptiveConnector("mlu", kv_layout="mlu", chunk_layout="chunk-2ltd")
    assert "backend 'mlu' was chosen" in connector.explain()


# -- the stand-in -------------------------------------------------------------------------------


def _arguments(**others: Any) -> dict[str, Any]:
    rows, cache = torch.zeros(3, 2, 16, device=DEVICE), torch.zeros(2, 2, 4, 16, device=DEVICE)
    slots = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    given = {"k": rows, "v": rows, "k_cache": cache, "v_cache": cache, "slot_mapping": slots}
    return given | others


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
    ],
)
def test_the_stand_in_refuses_what_the_op_does_not_take(name: str, value: Any, why: str) -> None:
    moved = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError, match=why):
        mlu_standin.reshape_paged_cache(**_arguments(**{name: moved}))


def test_the_stand_in_knows_no_other_device() -> None:
    for other in (torch.zeros(3, 2, 16), torch.zeros(3, 2, 16, device=OTHER)):
        with pytest.raises(RuntimeError, match="the current device is mlu:0"):
            mlu_standin.reshape_paged_cache(**_arguments(k=other))


def test_the_transfer_takes_chunks_on_the_host_and_skips_a_prefix() -> None:
    cache = torch.zeros(2, 4, 2, 4, 16, device=DEVICE)
    chunk = torch.arange(2 * 3 * 32, dtype=torch.float32).view(2, 1, 3, 32).pin_memory()
    pointers = torch.tensor([cache.data_ptr()], device=DEVICE)
    slots = torch.tensor([1, -1, 9], dtype=torch.int32, device=DEVICE)
    mlu_standin.multi_layer_kv_transfer(
        chunk, pointers, slots, DEVICE, 16, mlu_standin.TransferDirection.H2D,
        mlu_standin.KVFormat.TWO_NB_HN_BS_HS, 4, 16, 1,
    )  # fmt: skip
    found = cache.cpu().transpose(2, 3).reshape(2, 16, 32)
    wanted = torch.zeros_like(found)
    wanted[:, 9] = chunk[:, 0, 2]
    assert torch.equal(found, wanted)
