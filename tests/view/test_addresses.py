# SPDX-License-Identifier: Apache-2.0
"""`KVView.at`: views over memory that is known by addresses alone, on the host and on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import registered
from support.core_cases import noise
from support.cuda_on_cpu import CudaOnCpu, why_not
from support.fake_libcuda import FakeLibrary
from support.foreign_cases import blind
from support.guarded_memory import check_sentence
from torch.utils._python_dispatch import TorchDispatchMode

from portakv import (
    DeviceMismatch,
    Index,
    KVView,
    LayoutError,
    TransferError,
    Unsupported,
    copy_rows,
    copy_runs,
)
from portakv.host import pinned
from portakv.runtime import cuda, hip
from portakv.view import addresses as view_addresses
from portakv.view import view as view_of
from portakv.view.addresses import UNKNOWN_SLOTS
from portakv.view.view import check_writable

CPU = torch.device("cpu")
LAYOUT = "layer kv | block token head dim"
CHUNK = "kv layer token head dim"
SLOTS = [3, -1, 39, 8, 9]
BLOCKS = 10
SIZE = 4
HEADS = 2
DIM = 8


def caches(device: torch.device = CPU) -> list[list[torch.Tensor]]:
    """Return keys and values of three layers, each a separate allocation."""
    return [
        [noise(BLOCKS, SIZE, HEADS, DIM, seed=2 * layer + kv).to(device) for kv in (0, 1)]
        for layer in range(3)
    ]


def addresses(tensors: list[list[torch.Tensor]]) -> list[list[int]]:
    return [[tensor.data_ptr() for tensor in pair] for pair in tensors]


def at(memory: Any, blocks: int = BLOCKS, device: torch.device = CPU, **named: Any) -> KVView:
    shape = (blocks, SIZE, HEADS, DIM)
    if blocks < 0:
        named.setdefault("block_size", SIZE)
    return KVView.at(memory, LAYOUT, shape=shape, dtype=torch.int16, device=device, **named)


def rows(tensors: list[list[torch.Tensor]], slots: list[int]) -> torch.Tensor:
    """Return the rows of some slots as a chunk has them; zeros for slots that are skipped."""
    picked = torch.stack([torch.stack(pair) for pair in tensors], 1).flatten(2, 3).cpu()
    used = torch.tensor(slots) >= 0
    return picked[:, :, torch.tensor(slots).clamp(0)] * used[:, None, None]


def chunk(device: torch.device = CPU) -> torch.Tensor:
    return torch.zeros(2, 3, len(SLOTS), HEADS, DIM, dtype=torch.int16, device=device)


KINDS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda numbers: numbers,
    "int64": torch.tensor,
    "uint64": lambda numbers: torch.tensor(numbers).view(torch.uint64),
    "numpy": np.array,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [BLOCKS, -1], ids=["known", "unknown"])
def test_addresses_are_read_as_tensors_are(kind: str, blocks: int) -> None:
    tensors = caches()
    view = at(KINDS[kind](addresses(tensors)), blocks)
    out = chunk()
    assert view.form == KVView(tensors, LAYOUT).form
    assert view.slots == (BLOCKS * SIZE if blocks > 0 else UNKNOWN_SLOTS)
    copy_rows(view, KVView(out, CHUNK), SLOTS).synchronize()
    assert torch.equal(out, rows(tensors, SLOTS))
    back = caches()
    back = [[torch.zeros_like(tensor) for tensor in pair] for pair in back]
    copy_rows(KVView(out, CHUNK), at(addresses(back), blocks), None, SLOTS).synchronize()
    assert torch.equal(rows(back, SLOTS), out)


def test_strides_are_elements_and_may_leave_holes() -> None:
    wide = noise(BLOCKS, SIZE, HEADS, 2 * DIM)
    numbers = [wide.data_ptr(), wide.data_ptr() + 2 * DIM]
    view = KVView.at(
        numbers,
        "kv | block token head dim",
        shape=(BLOCKS, SIZE, HEADS, DIM),
        strides=wide.stride(),
        dtype=torch.int16,
        device="cpu",
    )
    out = torch.zeros(2, 5, HEADS, DIM, dtype=torch.int16)
    copy_rows(view, KVView(out, "kv token head dim"), SLOTS).synchronize()
    halves = [list(wide.split(DIM, -1))]
    assert torch.equal(out, rows(halves, SLOTS)[:, 0])


def test_a_block_behind_each_address() -> None:
    """A list of runs of one size is a table that the block's number walks through."""
    pages = [noise(SIZE, DIM, seed=seed) for seed in range(7)]
    layout = "block | token dim"
    target = torch.zeros(3, SIZE, DIM, dtype=torch.int16)
    view = KVView.at(
        [page.data_ptr() for page in pages],
        layout,
        shape=(SIZE, DIM),
        dtype=torch.int16,
        device="cpu",
    )
    assert view.slots == 7 * SIZE
    copy_rows(view, KVView(target, "block token dim"), Index([5, 0, 6], SIZE)).synchronize()
    assert torch.equal(target, torch.stack([pages[at] for at in (5, 0, 6)]))


def test_slices_are_views_of_the_same_memory() -> None:
    tensors = caches()
    out = chunk()
    view = at(addresses(tensors), -1)
    for layer in range(3):
        part = view.slice(layers=layer, heads=1)
        copy_rows(part, KVView(out, CHUNK).slice(layers=layer, heads=1), SLOTS).synchronize()
    assert torch.equal(out[..., 1, :], rows(tensors, SLOTS)[..., 1, :])
    assert not out[..., 0, :].any()


def test_what_is_shared_is_found_where_extents_are_known() -> None:
    tensors = caches()
    known = at(addresses(tensors))
    other = at(addresses(caches()))
    assert known.overlaps(KVView(tensors[1][0], "block token head dim"))
    assert not known.overlaps(other)
    assert not at(addresses(tensors), -1).overlaps(known)


def test_addresses_that_touch_cover_one_span() -> None:
    """So a copy of thousands of tiles compares few spans with few; a gap of a byte parts them."""
    places = [4096 + 64 * n for n in range(1000)] + [4096 + 64 * 1000 + 1]
    view = KVView.at(
        torch.tensor(places[::-1]),
        "block | token dim",
        shape=(1, 64),
        dtype=torch.uint8,
        device="cpu",
    )
    assert view.spans == [(4096, places[-1] - 1), (places[-1], places[-1] + 64)]


def test_what_only_a_device_knows_is_found_once_it_was_read() -> None:
    """A slice and the check of a destination keep no answer from before the addresses were."""
    tensors = caches()
    tensors[2][1] = tensors[0][0]  # two planes at one address
    view = blind(at(addresses(tensors)))
    dense = KVView(tensors[0][0], "block token head dim")
    part = view.slice(layers=0, heads=1)
    for each in (view, part, view.as_bytes()):
        assert not each.overlaps(dense)
        check_writable(each)
        assert each.origins
        assert each.overlaps(dense)
    memory = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors[0]]
    assert part.spans == [(first + 2 * DIM, past) for first, past in sorted(memory)]
    with pytest.raises(LayoutError, match="at one address"):
        check_writable(view)


def test_it_holds_nothing_and_says_so() -> None:
    view = at(addresses(caches()), -1)
    assert view.raw
    assert view.retained == ()
    assert "unknown blocks" in repr(view)
    view.check_memory()


def test_a_plane_shows_memory_at_an_address() -> None:
    tensors = caches()
    assert torch.equal(at(addresses(tensors)).plane(2, 1), tensors[2][1])


@pytest.mark.parametrize(
    ("passed", "named", "expected"),
    [
        ([1 << 12], {}, "2 container"),
        ([[1 << 12, 0]], {}, "above 0"),
        ([[1 << 12, (1 << 12) + 1]], {}, "multiples of 2 bytes"),
        ([[]], {}, "at least one address"),
        ([[1.5, 2.5]], {}, "float64"),
        ([[1 << 12], [1 << 12, 1 << 13]], {}, "whole numbers"),
        (torch.ones(3, 2, dtype=torch.int32), {}, "int32"),
        ([[1 << 12, 1 << 13]], {"shape": (BLOCKS, SIZE, -1, DIM)}, "one extent may be -1"),
        ([[1 << 12, 1 << 13]], {"shape": (BLOCKS, SIZE, HEADS)}, "3 dimension(s)|(10, 4, 2)"),
        ([[1 << 12, 1 << 13]], {"strides": (1, 2)}, "(1, 2)"),
        ([[1 << 12, 1 << 13]], {"shape": "wide"}, "shape='wide'"),
        ([[1 << 12, 1 << 13]], {"dtype": "float16"}, "'float16'"),
        ([[1 << 12, 1 << 13]], {"shape": (1 << 62, SIZE, HEADS, DIM)}, "at most"),
        ([[1 << 12, 1 << 13]], {"shape": (1 << 70, SIZE, HEADS, DIM)}, "at most"),
        ([[1 << 12, 1 << 13]], {"strides": (1 << 62, 16, 8, 1)}, "at most"),
        ([[1 << 12, 1 << 13]], {"shape": (-1, 4, 2, 8), "strides": (1 << 34, 16, 8, 1)}, "at most"),
        ([[(1 << 63) - 16] * 2], {}, "ends below"),
        (torch.tensor([[1 << 63] * 2], dtype=torch.uint64), {}, "above 0"),
        ([[1 << 12, 1 << 13]], {"shape": (-2, SIZE, HEADS, DIM)}, "no number below 0"),
        ([[1 << 12, 1 << 13]], {"strides": (-64, 16, 8, 1)}, "no number below 0"),
    ],
)  # fmt: skip
def test_what_are_no_addresses_is_refused(passed: Any, named: Any, expected: str) -> None:
    arguments = {
        "shape": (BLOCKS, SIZE, HEADS, DIM),
        "dtype": torch.int16,
        "device": "cpu",
        **named,
    }
    with pytest.raises(LayoutError) as refused:
        KVView.at(passed, LAYOUT, **arguments)
    message = str(refused.value)
    check_sentence(message)
    assert any(each in message for each in expected.split("|")), message


@pytest.mark.parametrize(
    ("device", "error"), [("nope", DeviceMismatch), ("meta", LayoutError), ("xpu", DeviceMismatch)]
)
def test_a_device_that_is_none_here(device: str, error: type[Exception]) -> None:
    if device == "xpu" and torch.accelerator.is_available():
        pytest.skip("torch names the accelerator for any other type")
    with pytest.raises(error, match=f"{device}.*(this machine has|name the device)"):
        at([[4096, 8192]], device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [3.5, "cuda:63"])
def test_a_device_that_is_told_is_asked_for_memory(device: Any) -> None:
    with pytest.raises(DeviceMismatch, match=f"{device}.*this machine has"):
        at([[4096, 8192]] * 3, device=device)


def test_an_unknown_extent_inside_another_needs_strides() -> None:
    """The start of the second of ``kv`` would follow from the number of blocks."""
    memory = noise(2, BLOCKS, SIZE, DIM)
    out = torch.zeros(2, len(SLOTS), DIM, dtype=torch.int16)

    def view(strides: Any) -> KVView:
        return KVView.at(
            memory.data_ptr(),
            "kv block token dim",
            shape=(2, -1, SIZE, DIM),
            dtype=torch.int16,
            strides=strides,
            device="cpu",
            block_size=SIZE,
        )

    with pytest.raises(LayoutError, match="strides=") as refused:
        view(None)
    check_sentence(str(refused.value))
    copy_rows(view(memory.stride()), KVView(out, "kv token dim"), SLOTS).synchronize()
    assert torch.equal(out, rows([list(memory[:, :, :, None])], SLOTS)[:, 0, :, 0])


def test_a_table_on_a_device_that_does_not_reach_the_memory(accelerator: torch.device) -> None:
    table = torch.full((3, 2), 4096, device=accelerator)
    if accelerator.type != "cuda" or torch.cuda.device_count() > 1:
        other = torch.device(accelerator.type, 1)
        with pytest.raises(DeviceMismatch, match=f"table on {accelerator}") as refused:
            at(table, device=other)
        check_sentence(str(refused.value), str(other))
    with pytest.raises(LayoutError, match="not pinned") as unreached:
        at(table, pinned=False)
    check_sentence(str(unreached.value), str(accelerator))


class Sent(TorchDispatchMode):
    """The ops that take something from the host to a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = op(*args, **(kwargs or {}))
        each = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [x for x in each if isinstance(x, torch.Tensor)]
        on_device = isinstance(answer, torch.Tensor) and not answer.is_cpu
        if on_device and any(x.is_cpu for x in tensors):
            self.ops.append(op.overloadpacket.__name__)
        return answer


@pytest.mark.parametrize(
    "layout", ["layer block | token dim", "block layer | token dim", "layer kv block | token dim"]
)
def test_a_table_in_another_order_is_permuted_where_it_is(
    accelerator: torch.device, layout: str
) -> None:
    sizes = [4, 2, 6] if "kv" in layout else [4, 12]
    addresses = (torch.arange(48) + 1).reshape(sizes) * 4096
    terms: dict[str, Any] = {"shape": (SIZE, DIM), "dtype": torch.int16, "device": accelerator}
    listed = KVView.at(addresses, layout, **terms)
    table = addresses.to(accelerator)
    with Sent() as sent:
        view = KVView.at(table, layout, **terms)
    assert view.table.tolist() == list(listed.origins)
    assert sorted(listed.origins) == addresses.reshape(-1).tolist()
    assert sent.ops == []


def test_torch_is_asked_of_one_address_in_each_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[int] = []

    def is_pinned(tensor: torch.Tensor) -> bool:
        pages.append(tensor.data_ptr() >> 12)
        return pages[-1] != 9

    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    for last, place in ((8, "pinned"), (9, "pageable")):
        addresses = [*range(5 << 12, 6 << 12, 256), 7 << 12, last << 12]
        view = KVView.at(
            addresses, "block | token dim", shape=(1, 64), dtype=torch.uint8, device="cpu"
        )
        assert view.form.place == place
        assert pages == [5, 7, last]
        pages.clear()


def test_no_driver_is_asked_for_the_range_of_pageable_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queried: list[object] = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    sys.setprofile(lambda frame, event, called: queried.append(frame.f_code))
    try:
        view = KVView.at(
            [4096, 8192], "block | token dim", shape=(1, 64), dtype=torch.uint8, device="cpu"
        )
    finally:
        sys.setprofile(None)
    assert view.form.place == "pageable"
    assert cuda.range_of.__code__ not in queried


@pytest.mark.parametrize("size", [4, 12, 16])
def test_the_shape_tells_how_many_blocks_can_be_counted(size: int) -> None:
    """Kernels count tokens in 32 bits, also if ``block_size`` stands in the shape alone."""
    stated, inferred = (
        KVView.at(
            4096,
            "block token dim",
            shape=(-1, size, 8),
            dtype=torch.uint8,
            device="cpu",
            block_size=declared,
        )
        for declared in (size, None)
    )
    assert (inferred.slots, inferred.form) == (stated.slots, stated.form)
    assert UNKNOWN_SLOTS - size < inferred.slots <= UNKNOWN_SLOTS


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize, None])
def test_a_table_without_memory_of_its_own_is_refused(transform: Any) -> None:
    """Torch would hand over whatever lies in memory as addresses."""
    table = torch.full((1, 3, 2), 4096, device="meta" if transform is None else "cpu")

    def copied(numbers: torch.Tensor) -> Any:
        return copy_runs(numbers, numbers, 2, src_device="cpu", dst_device="cpu")

    reads: tuple[Callable[[torch.Tensor], Any], ...] = (at, copied)
    for read in reads:
        with pytest.raises(LayoutError) as refused:
            (transform or (lambda call: call))(read)(table if transform is torch.vmap else table[0])
        check_sentence(str(refused.value), "owns no memory")


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("part", [{}, {"layers": slice(1, 3), "heads": 1}, {"kv": 0, "layers": 2}])
@pytest.mark.parametrize("store", [True, False])
def test_a_kernel_reads_a_table_that_the_host_never_sees(part: Any, store: bool) -> None:
    tensors = caches()
    other = chunk()
    if not store:
        other.copy_(noise(*other.shape, seed=9))
    view = blind(at(addresses(tensors), -1)).slice(**part)
    dense = KVView(other, CHUNK).slice(**part)
    before = [[tensor.clone() for tensor in pair] for pair in tensors]
    with registered(**{CudaOnCpu.name: CudaOnCpu}):
        if store:
            copy_rows(view, dense, SLOTS, backend=CudaOnCpu.name).synchronize()
        else:
            copy_rows(dense, view, None, SLOTS, backend=CudaOnCpu.name).synchronize()
    assert not view.known
    expected = chunk()
    whole = KVView(before, LAYOUT).slice(**part)
    if store:
        copy_rows(whole, KVView(expected, CHUNK).slice(**part), SLOTS).synchronize()
        assert torch.equal(other, expected)
    else:
        copy_rows(dense, whole, None, SLOTS).synchronize()
        assert all(
            torch.equal(a, b)
            for x, y in zip(tensors, before, strict=True)
            for a, b in zip(x, y, strict=True)
        )


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_device(accelerator: torch.device, where: str) -> None:
    """Addresses of a device's memory, known to the host or to the device alone."""
    tensors = caches(accelerator)
    out = chunk(accelerator)
    table = torch.tensor(addresses(tensors))
    view = at(table if where == "host" else table.to(accelerator), -1, accelerator)
    assert view.form.table_on_device == (where == "device")
    ids = torch.tensor(SLOTS, device=accelerator)
    copy_rows(view, KVView(out, CHUNK), ids).synchronize()
    assert torch.equal(out.cpu(), rows(tensors, SLOTS))
    if where == "device" and accelerator.type == "cuda":
        assert not view.known


def test_planes_that_one_stream_made_are_read_on_another(accelerator: torch.device) -> None:
    tensors = caches(accelerator)
    view = at(torch.tensor(addresses(tensors)).to(accelerator), -1, accelerator)
    torch.accelerator.synchronize()
    on = torch.get_device_module(accelerator).stream
    with on(torch.Stream(accelerator)):
        made = view.planes(None, (1, 2))
    with on(torch.Stream(accelerator)):
        again = view.planes(None, (1, 2))
        assert again.table.tolist() == [pair[1].data_ptr() for pair in tensors]
    assert again is made


@pytest.mark.parametrize("where", ["host", "device"])
def test_across_the_link(accelerator: torch.device, where: str) -> None:
    """Both sides are addresses: device memory and pinned memory of the host."""
    tensors = caches(accelerator)
    host = [[pinned.empty(x.shape, x.dtype) for x in pair] for pair in caches()]
    tables = [torch.tensor(addresses(x)) for x in (tensors, host)]
    if where == "device":
        tables = [table.to(accelerator) for table in tables]
    src = at(tables[0], -1, accelerator)
    dst = at(tables[1], -1, pinned=True)
    copy_rows(src, dst, [3, 8, 9], [1, 0, 2]).synchronize()
    assert torch.equal(rows(host, [1, 0, 2]), rows(tensors, [3, 8, 9]))


def test_without_a_device_memory_is_the_host_s(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned memory is the host's on any machine."""
    memory = torch.zeros(64, dtype=torch.uint8, device="cpu")
    if device == CPU:
        monkeypatch.setattr(view_addresses, "usual_device", lambda: CPU)
    else:
        memory = pinned.empty(64, torch.uint8)
    view = KVView.at(memory.data_ptr(), "token dim", shape=(4, 16), dtype=torch.uint8)
    assert view.device == CPU
    assert view.form.place == ("pinned" if memory.is_pinned() else "pageable")


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_the_driver_says_where_memory_is(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeLibrary(tmp_path, None)
    adopted = list[torch.device]()
    first = torch.device("cuda", 0)
    monkeypatch.setattr(view_addresses, "usual_device", lambda: first)
    monkeypatch.setattr(cuda, "adopt", adopted.append)
    if build == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.2")
        monkeypatch.setattr(hip, "driver", lambda: hip.Driver(fake.library, fake.library))
    else:
        monkeypatch.setattr(cuda, "library", lambda: fake.library)
    memory = torch.zeros(64, dtype=torch.uint8)

    def view(address: Any) -> KVView:
        return KVView.at(address, "token dim", shape=(4, 16), dtype=torch.uint8)

    assert view(memory.data_ptr()).form.place == "pageable"
    fake.give(memory.data_ptr(), 3)
    result = view(memory.data_ptr())
    assert (result.device, result.form.place) == (torch.device("cuda", 3), "device")
    several = KVView.at(
        [memory.data_ptr(), 4096], "layer | token dim", shape=(4, 16), dtype=torch.uint8
    )
    assert several.device == result.device, "only the first is checked, the others are promised"
    assert adopted == [first] * 3, "a thread has a context before it asks"
    with pytest.raises(TransferError, match="nothing was moved") as caught:
        view(13)
    check_sentence(str(caught.value))
    monkeypatch.setattr(cuda, "library", no_driver)
    monkeypatch.setattr(hip, "driver", no_driver)
    with pytest.raises(LayoutError, match="no driver") as refused:
        view(memory.data_ptr())
    check_sentence(str(refused.value))


@pytest.mark.gpu
def test_nvidia_s_driver_says_where_memory_is() -> None:
    there = torch.arange(64, dtype=torch.uint8, device="cuda").view(4, 16)
    page = pinned.empty((4, 16), torch.uint8)
    heap = torch.zeros(4, 16, dtype=torch.uint8)
    for memory, place in ((there, "device"), (page, "pinned"), (heap, "pageable")):
        result = KVView.at(memory[1:].data_ptr(), "token dim", shape=(3, 16), dtype=torch.uint8)
        assert (result.device, result.form.place) == (memory.device, place)
    for memory in (page, heap):
        copy_runs(there.data_ptr(), memory.data_ptr(), 64).synchronize()
        assert torch.equal(memory, there.cpu())


def no_driver() -> Any:
    raise OSError("no driver is installed")


def test_what_no_driver_tells_has_to_be_said(accelerator: torch.device) -> None:
    if accelerator.type == "cuda":
        pytest.skip("its driver knows the memory")
    there = torch.zeros(64, dtype=torch.uint8, device=accelerator)
    table = torch.tensor([there.data_ptr()]).to(accelerator)
    for passed, expected in ((there.data_ptr(), str(accelerator)), (table, "themselves")):
        with pytest.raises(LayoutError, match=expected) as refused:
            KVView.at(
                passed,
                "layer | token dim" if passed is table else "token dim",
                shape=(4, 16),
                dtype=torch.uint8,
            )
        check_sentence(str(refused.value))


def test_a_table_is_not_made_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(4, 8) for _ in "ab"]
    addresses = [x.data_ptr() for x in tensors]
    view = KVView.at(
        addresses, "layer | token dim", shape=(4, 8), dtype=torch.float32, device="cpu"
    )
    with monkeypatch.context() as inside:
        inside.setattr(view_of, "capturing", lambda device: True)
        with pytest.raises(Unsupported) as raised:
            view.table  # noqa: B018
        check_sentence(str(raised.value), "Sending addresses", "once before the capture")
    there = view.table
    monkeypatch.setattr(view_of, "capturing", lambda device: True)
    assert view.table is there


@pytest.mark.gpu
def test_many_addresses_in_a_few_allocations() -> None:
    """CUDA's driver knows the range of an allocation, so one call serves all addresses in it."""
    pools = [torch.empty(1 << 20, dtype=torch.uint8).pin_memory() for _ in range(2)]
    at = [pool.data_ptr() + 4096 * page for page in range(200) for pool in pools]
    shape: dict[str, Any] = {"shape": (16, 4), "dtype": torch.uint8, "device": "cpu"}
    assert KVView.at(at, "layer | token dim", **shape).form.place == "pinned"
    heap = torch.empty(1 << 20, dtype=torch.uint8)
    view = KVView.at([*at, heap.data_ptr()], "layer | token dim", **shape)
    assert view.form.place == "pageable"
    for pool in pools:
        begin = pool.data_ptr()
        end = pool.data_ptr() + pool.nbytes
        first, past = cuda.range_of(begin + 5) or (0, 0)
        assert first <= begin < end <= past
