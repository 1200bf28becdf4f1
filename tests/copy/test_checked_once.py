# SPDX-License-Identifier: Apache-2.0
"""A call checks each view and each list of ids once, by whatever schedule it issues its copy."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
from support.threads import on_helpers

from portakv import (
    AdaptiveConnector,
    BlockTransfer,
    CopyOptions,
    Fp8,
    Index,
    KVView,
    LayoutError,
    Pack,
    Rope,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_runs,
    rotate_blocks,
)
from portakv.copy import call, encodings, submit
from portakv.copy.call import Context, drop_bad_ids
from portakv.plan.plan import check_disjoint
from portakv.runtime.transfer import Transfer
from portakv.view.form import plain_reader
from portakv.view.view import check_writable

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
            check_writable.__code__: lambda args: f"writable {self._name(args)}",
            Index.check.__code__: lambda args: f"ids of {args['side']}",
            check_disjoint.__code__: lambda args: "disjoint",
            drop_bad_ids.__code__: lambda args: "bad ids",
            Context.of.__func__.__code__: lambda args: "context",  # type: ignore[attr-defined]
        }

    def _name(self, args: dict[str, Any]) -> str:
        return self._names.get(id(args.get("self", args.get("view"))), "a part")

    def _note(self, frame: Any, event: str, argument: object) -> None:
        text = self._checks.get(frame.f_code) if event == "call" else None
        if text is not None:
            own = threading.get_ident() == self._thread
            counts = self.of_call if own else self.of_workers
            counts[text(frame.f_locals)] += 1

    def __enter__(self) -> Checks:
        threading.setprofile(self._note)
        on_helpers(lambda: sys.setprofile(self._note))
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        on_helpers(lambda: sys.setprofile(None))


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
    by_core = (
        method == "together"
        and (device.type == "cpu" or ids == "host")
        and plain_reader() is not None
    )
    if method == "together":
        pair.start(*lists)  # the core's first call reads both views
    with Checks(pair.src.view, pair.dst.view) as checks:
        transfer = pair.start(*lists, **METHODS[method])
        transfer.synchronize()
    assert pair.landed()
    expected = Counter() if by_core else ONCE.copy()
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
    monkeypatch.setattr(submit, "SLICE", 1)
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


# Encoded rows


def raw_blocks(device: torch.device) -> KVView:
    shape = (2, BLOCKS, SIZE, 2, 64)
    layers = [torch.randn(shape, device="cpu").bfloat16() for _ in range(LAYERS)]
    return KVView([layer.to(device) for layer in layers], CACHE)


def encoded_blocks(encoding: str, device: torch.device, pin: bool = False) -> KVView:
    """Return slots of zeros, each layer a separate allocation."""
    slot = Pack().plane(SIZE * 64).slot_bytes
    if encoding == "fp8":
        slot = Fp8().plane(SIZE, 64).slot_bytes
    shape = (BLOCKS, 2, 2, slot)
    layers = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(LAYERS)]
    if pin:
        layers = [layer.pin_memory() for layer in layers]
    image = "layer | block kv head page"
    return KVView(layers, image, block_size=SIZE, dim=64, encoding=encoding)


def bytes_of(view: KVView) -> torch.Tensor:
    """Return a copy of all layers on the host."""
    return torch.stack([layer.cpu().view(torch.uint8) for layer in view.tensors]).clone()


@dataclass
class Sides:
    """A raw and an encoded side: on one device, or with a link between them.

    Attributes:
        raw, encoded: blocks `SRC` of the raw side were encoded as blocks `DST`.
        unpack: the encoded side is the source.
    """

    raw: KVView
    encoded: KVView
    unpack: bool

    @property
    def views(self) -> tuple[KVView, KVView]:
        """Return the source and the destination."""
        return (self.encoded, self.raw) if self.unpack else (self.raw, self.encoded)

    @property
    def ids(self) -> tuple[list[int], list[int]]:
        """Return the blocks of the source and of the destination."""
        return (DST, SRC) if self.unpack else (SRC, DST)

    def wanted(self, blocks: list[tuple[int, int]]) -> torch.Tensor:
        """Return the destination after a copy of some blocks, alone, of separate views."""
        copy_blocks(*self.views, *map(list, zip(*blocks, strict=True))).synchronize()
        result = bytes_of(self.views[1])
        for layer in self.views[1].tensors:
            layer.zero_()
        return result


def pinned_side(sides: Sides) -> bool:
    """Return True if a side lies in pinned memory."""
    return any(view.form.place == "pinned" for view in sides.views)


CPU = torch.device("cpu")
DEVICE = simdev_cases.DEVICE
#: The places of the raw and the encoded side, and whether the host's memory is pinned.
BOTH = [
    pytest.param((CPU, CPU, False), id="cpu"),
    pytest.param((DEVICE, DEVICE, False), id="simdev", marks=pytest.mark.simdev),
    pytest.param((DEVICE, CPU, False), id="encoded on host", marks=pytest.mark.simdev),
    pytest.param((DEVICE, CPU, True), id="encoded in pinned memory", marks=pytest.mark.simdev),
    pytest.param((CPU, DEVICE, False), id="raw on host", marks=pytest.mark.simdev),
]


@pytest.fixture(params=[False, True], ids=["encode", "decode"])
def unpack(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=["pack", "fp8"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BOTH)
def sides(
    request: pytest.FixtureRequest,
    encoding: str,
    unpack: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> Sides:
    """Return both sides of a copy that moves one block in each slice."""
    here, there, pin = request.param
    monkeypatch.setattr(encodings, "FP8_SLICE", 1)
    monkeypatch.setattr(encodings, "PACK_SLICE", 1)
    made = Sides(raw_blocks(here), encoded_blocks(encoding, there, pin), unpack)
    if unpack:
        copy_blocks(made.raw, made.encoded, SRC, DST).synchronize()
        for layer in made.raw.tensors:
            layer.zero_()
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"by_layer": True},
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"check": "strict"}, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.parametrize("ids", ["host", "device"])
def test_encoded_rows_are_checked_once(sides: Sides, options: dict[str, Any], ids: str) -> None:
    src, dst = sides.views
    device = next((view.device for view in sides.views if view.device.type != "cpu"), CPU)
    wanted = sides.wanted(list(zip(*sides.ids, strict=True)))
    lists = [made(device, each, ids) for each in sides.ids]
    with Checks(src, dst) as checks:
        copy_blocks(src, dst, *lists, **options).synchronize()
    assert torch.equal(bytes_of(dst), wanted)
    counts = checks.of_call
    if src.device != dst.device:
        # The host checks the memory of each copy that it makes itself, and the ids of each slice
        # that it expands to runs.
        again = ("memory", "ids") if pinned_side(sides) else ("memory",)
        for check in [check for check in counts if check.startswith(again)]:
            counts[check] = 1
        del counts["memory of a part"]
    expected = ONCE.copy()
    if ids == "device" and device.type != "cpu":
        expected["bad ids"] = 1
    assert counts == expected


@pytest.mark.simdev
@pytest.mark.parametrize("sides", BOTH[1:], indirect=True)
@pytest.mark.parametrize(
    "all_bad", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_bad_ids_of_encoded_rows_are_read_once(sides: Sides, all_bad: bool) -> None:
    """Each layer reports them, and moves all other blocks."""
    src, dst = sides.views
    src_ids, dst_ids = ([*each] for each in sides.ids)
    src_ids[1] = 99
    dst_ids[2] = -1
    wanted = sides.wanted([(src_ids[nth], dst_ids[nth]) for nth in (0, 3, 4)])
    if all_bad:
        src_ids = [99] * len(src_ids)
        wanted.zero_()
    lists = [made(DEVICE, each, "device") for each in (src_ids, dst_ids)]
    with Checks(src, dst) as checks:
        transfer = copy_blocks(src, dst, *lists, by_layer=True)
        for end in (*transfer.layers, transfer):
            with pytest.raises(SlotError, match="past the end"):
                end.synchronize()
    assert len(transfer.layers) == LAYERS
    assert checks.of_call["bad ids"] == 1
    assert torch.equal(bytes_of(dst), wanted)


@pytest.mark.parametrize("ids", ["host", pytest.param("device", marks=pytest.mark.full)])
def test_padding_of_encoded_rows_is_left_out_of_all_layers(sides: Sides, ids: str) -> None:
    src, dst = sides.views
    device = next((view.device for view in sides.views if view.device.type != "cpu"), CPU)
    src_ids, dst_ids = ([*each] for each in sides.ids)
    wanted = sides.wanted([(src_ids[nth], dst_ids[nth]) for nth in (0, 2, 3)])
    src_ids[1] = dst_ids[4] = -1
    lists = [made(device, each, ids) for each in (src_ids, dst_ids)]
    copy_blocks(src, dst, *lists, by_layer=True).synchronize()
    assert torch.equal(bytes_of(dst), wanted)


@pytest.mark.parametrize("sides", [*BOTH[:3], BOTH[4]], indirect=True)
def test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written(sides: Sides) -> None:
    src, dst = sides.views
    src.tensors[-1].untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        copy_blocks(src, dst, *sides.ids, by_layer=True)
    assert not any(layer.any() for layer in dst.tensors)


def test_shared_memory_of_a_later_layer_is_noticed_before_a_row_is_written(encoding: str) -> None:
    raw = raw_blocks(CPU)
    image = encoded_blocks(encoding, CPU)
    first, *_, last = image.tensors
    memory = torch.zeros(max(raw.tensors[-1].nbytes, last.nbytes), dtype=torch.uint8, device="cpu")
    shared = memory[: raw.tensors[-1].nbytes].view(torch.bfloat16).view(raw.tensors[-1].shape)
    src = KVView([*raw.tensors[:-1], shared], CACHE)
    slots = [*image.tensors[:-1], memory[: last.nbytes].view(last.shape)]
    how: dict[str, Any] = {"block_size": SIZE, "dim": 64, "encoding": encoding}
    dst = KVView(slots, image.layout.text, **how)
    with pytest.raises(SlotError, match="separate memory"):
        copy_blocks(src, dst, SRC, DST, by_layer=True)
    assert not first.any()


@pytest.mark.simdev
@pytest.mark.parametrize("sides", BOTH[1:3], indirect=True)
def test_encoded_rows_are_refused_if_the_given_stream_records_a_graph(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a copy do not ask again."""
    stream = torch.Stream(device=DEVICE)
    monkeypatch.setattr(call, "capturing", lambda device: simdev_cases.current() == stream)
    with pytest.raises(Unsupported, match="inside graph capture"):
        copy_blocks(*sides.views, *sides.ids, stream=stream)
    assert not any(layer.any() for layer in sides.views[1].tensors)


@pytest.mark.parametrize("packs", [True, False], ids=["packs", "unpacks"])
@pytest.mark.parametrize("device", PLACES)
def test_a_rotation_of_packed_rows_is_checked_once(device: torch.device, packs: bool) -> None:
    raw = raw_blocks(device)
    packed = encoded_blocks("pack", device)
    copy_blocks(raw, packed, SRC, DST).synchronize()
    views = (raw, packed) if packs else (packed, raw)
    ids = (SRC, DST) if packs else (DST, SRC)
    with Checks(*views) as checks:
        rotate_blocks(*views, *ids, Rope(shift=3, base=10000.0)).synchronize()
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
    """It knows that its caches are there and that the chunk lies outside."""
    cache = layered(device)
    connector = AdaptiveConnector(device, None, CACHE, CHUNK, options=CopyOptions(**options))
    connector.register_kv_caches(cache.tensors)
    chunk = chunk_of(len(DST) * SIZE, device)
    move = connector.from_gpu if store else connector.to_gpu
    with Checks() as checks:
        transfer: Transfer = move(chunk, slot_mapping=cache.slots(DST))
        transfer.synchronize()
    assert checks.of_call == Counter(
        ["context", "memory of a part", "writable a part", "ids of source", "ids of destination"]
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
    of_each = ["memory of a part", "writable a part", "ids of source", "ids of destination"]
    assert checks.of_call == Counter(["context", *of_each, *of_each])
