# SPDX-License-Identifier: Apache-2.0
"""A call checks each view and each list of ids once, by whatever schedule it issues its copy."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import simdev_cases
from support.block_cases import (
    BLOCKS,
    DST,
    LAYERS,
    METHODS,
    SIZE,
    SLICED,
    SRC,
    Pair,
    block_first,
    layered,
)
from support.command_line import registered
from support.small_backends import small_backend

from portakv import (
    AdaptiveConnector,
    BlockTransfer,
    CopyOptions,
    Index,
    KVView,
    LayoutError,
    Pack,
    SlotError,
    copy_blocks,
    copy_runs,
)
from portakv.copy import slices
from portakv.copy.context import Context
from portakv.copy.settle import drop_bad_ids
from portakv.plan.plan import check_disjoint
from portakv.runtime.transfer import Transfer

CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
PLACES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(simdev_cases.DEVICE, id="simdev", marks=pytest.mark.simdev),
]
#: The checks of a call.
ONCE = Counter(
    [
        "context",
        "memory of source",
        "memory of destination",
        "writable destination",
        "disjoint",
        "ids of source",
        "ids of destination",
    ]
)


class Checks:
    """Counts the checks of one call, and apart those of the threads that go on with its work.

    All views except ``src`` and ``dst`` are parts.
    """

    def __init__(self, src: KVView | None = None, dst: KVView | None = None) -> None:
        self.of_call = Counter[str]()
        self.of_workers = Counter[str]()
        self._thread = threading.get_ident()
        self._names = {id(src): "source", id(dst): "destination"}
        self._checks: dict[Any, Callable[[dict[str, Any]], str]] = {
            KVView.check_memory.__code__: lambda args: f"memory of {self._name(args)}",
            KVView.check_writable.__code__: lambda args: f"writable {self._name(args)}",
            Index.check.__code__: lambda args: f"ids of {args['side']}",
            check_disjoint.__code__: lambda args: "disjoint",
            drop_bad_ids.__code__: lambda args: "bad ids",
            Context.of.__func__.__code__: lambda args: "context",  # type: ignore[attr-defined]
        }

    def _name(self, args: dict[str, Any]) -> str:
        return self._names.get(id(args["self"]), "a part")

    def _note(self, frame: Any, event: str, argument: object) -> None:
        text = self._checks.get(frame.f_code) if event == "call" else None
        if text is not None:
            own = threading.get_ident() == self._thread
            counts = self.of_call if own else self.of_workers
            counts[text(frame.f_locals)] += 1

    def __enter__(self) -> Checks:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def made(device: torch.device, ids: list[int], place: str) -> Any:
    """Return ids on the host or on the device."""
    return torch.tensor(ids, device=device) if place == "device" else ids


@pytest.mark.parametrize("ids", ["host", "device"])
@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_call_checks_everything_once(
    method: str, device: torch.device, ids: str, small_slices: None
) -> None:
    pair = Pair(layered(device), block_first(device))
    lists = made(device, SRC, ids), made(device, DST, ids)
    with Checks(pair.src.view, pair.dst.view) as checks:
        transfer = pair.start(*lists, **METHODS[method])
        transfer.synchronize()
    assert pair.landed()
    expected = ONCE.copy()
    if not (method in SLICED or device.type == "cpu" or ids == "host"):
        expected["bad ids"] = 1  # the backend does not skip them
    assert checks.of_call == expected
    of_workers = Counter[str]()
    if method in SLICED:  # memory may be released between two slices; nothing else may change
        for side in ["a part"] * 2 if "layer" in method else ["source", "destination"]:
            of_workers[f"memory of {side}"] += transfer.statistics.slices
    assert checks.of_workers == of_workers


@pytest.mark.simdev
@pytest.mark.parametrize("check", ["usual", "strict"])
@pytest.mark.parametrize("detached", [False, True])
def test_bad_ids_of_a_device_are_read_once_for_all_layers(detached: bool, check: str) -> None:
    device = simdev_cases.DEVICE
    src_ids = [5, -1, 7, 2, 3]
    pair = Pair(layered(device), block_first(device), src_ids, DST)
    lists = made(device, src_ids, "device"), made(device, DST, "device")
    with Checks(pair.src.view, pair.dst.view) as checks:
        transfer = pair.start(*lists, by_layer=True, detached=detached, check=check)
        transfer.synchronize()
    assert pair.landed()
    assert checks.of_call["bad ids"] == 1
    assert len(transfer.layers) == LAYERS
    skipped = check == "strict"  # else the host does not know the ids
    assert transfer.statistics.blocks_requested == len(DST) - skipped


@pytest.mark.simdev
@pytest.mark.parametrize("src_ids", [[5, 99, 7, 2, 3], [99] * 5], ids=["one", "all"])
def test_each_layer_reports_ids_that_were_left_out(src_ids: list[int]) -> None:
    device = simdev_cases.DEVICE
    pair = Pair(layered(device), block_first(device))
    pair.expected = pair.dst.rows()
    rows = pair.src.rows()
    for read, written in zip(src_ids, DST, strict=True):
        if read < BLOCKS:
            moved = rows[:, :, pair.src.slots([read])]
            pair.expected[:, :, pair.dst.slots([written])] = moved
    lists = made(device, src_ids, "device"), made(device, DST, "device")
    transfer = pair.start(*lists, by_layer=True)
    for end in (*transfer.layers, transfer):
        with pytest.raises(SlotError, match="past the end"):
            end.synchronize()
    assert pair.landed()


@pytest.mark.parametrize("by_layer", [False, True])
def test_memory_that_is_released_between_two_slices_is_noticed(
    by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker issues slices after the call, when the memory may be another one."""
    monkeypatch.setattr(slices, "SLICE", 1)
    pair = Pair(layered(), block_first())
    issued = 0

    def release(dst: Any) -> None:
        nonlocal issued
        issued += 1
        if issued == 2:
            pair.dst.tensors.untyped_storage().resize_(0)

    gone = small_backend("gone", spoil=release, by_runs=True)
    with registered(gone=gone):
        issued = -100  # the registry tests a backend by a copy
        pair.start(backend="gone").synchronize()
        issued = 0
        transfer = pair.start(backend="gone", cancellable=True, by_layer=by_layer)
        with pytest.raises(LayoutError, match="replaced"):
            transfer.synchronize()
    assert issued == 2


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("unpack", [False, True], ids=["pack", "unpack"])
def test_packed_layers_are_checked_once(unpack: bool, device: torch.device) -> None:
    tensors = [torch.ones(2, BLOCKS, SIZE, 2, 64, dtype=torch.bfloat16) for _ in range(LAYERS)]
    raw = KVView([layer.to(device) for layer in tensors], CACHE)
    slot = Pack().plane(SIZE * 64).slot_bytes
    slots = torch.zeros(BLOCKS, LAYERS, 2, 2, slot, dtype=torch.uint8, device=device)
    packed = KVView(slots, "block layer kv head page", block_size=SIZE, dim=64, encoding="pack")
    copy_blocks(raw, packed, SRC, DST).synchronize()
    views = (packed, raw) if unpack else (raw, packed)
    with Checks(*views) as checks:
        copy_blocks(*views, DST if unpack else SRC, SRC, by_layer=True).synchronize()
    assert checks.of_call == ONCE


def test_runs_of_several_sizes_are_checked_once() -> None:
    """All sizes are checked before the first is copied."""
    src, dst = (torch.zeros(1024, dtype=torch.uint8) for _ in "ab")
    sources, destinations = ([x.data_ptr(), x.data_ptr() + 512] for x in (src, dst))
    with Checks() as checks:
        copy_runs(sources, destinations, [64, 96], src_device="cpu", dst_device="cpu")
    expected = {"memory of a part": 4, "writable a part": 2, "disjoint": 2}
    assert {name: checks.of_call[name] for name in expected} == expected


# Connectors


def chunk_of(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(2, LAYERS, tokens, 2 * 16, dtype=torch.float16, device=device)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("options", [{}, {"by_layer": True}, {"cancellable": True}], ids=str)
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_a_connector_checks_everything_once(
    store: bool, options: dict[str, Any], device: torch.device
) -> None:
    """It knows that its caches are there and that the chunk, read just now, lies outside."""
    cache = layered(device)
    connector = AdaptiveConnector(device, None, CACHE, CHUNK, options=CopyOptions(**options))
    connector.register_kv_caches(cache.tensors)
    chunk = chunk_of(len(DST) * SIZE, device)
    move = connector.from_gpu if store else connector.to_gpu
    with Checks() as checks:
        transfer: Transfer = move(chunk, slot_mapping=cache.slots(DST))
        transfer.synchronize()
    assert checks.of_call == Counter(
        ["context", "writable a part", "ids of source", "ids of destination"]
    )


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("ids", ["host", "device"])
@pytest.mark.parametrize("options", [{"by_layer": True}, {"cancellable": True}], ids=str)
def test_padding_of_a_connector_is_left_out(
    options: dict[str, Any], ids: str, device: torch.device
) -> None:
    cache = layered(device)
    connector = AdaptiveConnector(device, None, CACHE, CHUNK, options=CopyOptions(**options))
    connector.register_kv_caches(cache.tensors)
    slots = [3, -1, 17, 8]
    chunk = chunk_of(len(slots), device)
    transfer = connector.from_gpu(chunk, slot_mapping=made(device, slots, ids))
    transfer.synchronize()
    rows = chunk.cpu().view(torch.int16).transpose(0, 1)
    expected = cache.rows()[:, :, slots]
    expected[:, :, 1] = 0
    assert torch.equal(rows, expected)
    assert isinstance(transfer, BlockTransfer)
    if ids == "host" or "cancellable" in options:
        assert transfer.statistics.blocks_requested == len(slots) - 1


@pytest.mark.parametrize("device", PLACES)
def test_slices_of_a_connector_refuse_bad_ids_of_a_device(device: torch.device) -> None:
    cache = layered(device)
    connector = AdaptiveConnector(device, None, CACHE, CHUNK, options=CopyOptions(cancellable=True))
    connector.register_kv_caches(cache.tensors)
    chunk = chunk_of(2, device)
    with pytest.raises(SlotError, match="inside the view"):
        connector.from_gpu(chunk, slot_mapping=made(device, [3, BLOCKS * SIZE], "device"))
    assert not chunk.any()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("check", ["usual", "strict"])
def test_a_batch_checks_each_copy_once(check: str, device: torch.device) -> None:
    """Two chunks of two sizes are two copies."""
    cache = layered(device)
    options = CopyOptions(check=check)  # type: ignore[arg-type]
    connector = AdaptiveConnector(device, None, CACHE, CHUNK, options=options)
    connector.register_kv_caches(cache.tensors)
    chunks = [chunk_of(tokens, device) for tokens in (8, 12)]
    slots = cache.slots(DST)
    with Checks() as checks:
        connector.batched_from_gpu(
            chunks, slot_mapping=slots, starts=[0, 8], ends=[8, 20]
        ).synchronize()
    of_each = ["writable a part", "ids of source", "ids of destination"]
    assert checks.of_call == Counter(["context", *of_each, *of_each])
