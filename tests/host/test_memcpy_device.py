# SPDX-License-Identifier: Apache-2.0
"""Plain copies to, from and inside a device: every byte, the method, order, graphs, and who waits.

On the simulated device a missing wait becomes wrong bytes, and a stand-in for the driver's 2-D
memcpy issues the rows as one job, so that this method is judged there too.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.device_cases import DEVICE, current, delay, on, settle
from support.guarded_memory import bits, filled, refused, same

from portakv import DeviceMismatch, Unsupported
from portakv.host import memcpy
from portakv.host.memcpy import copy_, copy_d2d, copy_d2h, copy_h2d, is_available, is_pinned
from portakv.host.pinned import register
from portakv.runtime import cuda
from portakv.runtime.transfer import copies_holding_memory
from portakv_conformance import simdev

# of int32, in a matrix that is twice as wide
ROWS = 12
WIDTH = 512
REPEATS = 10

HOSTS = ["pageable", "pageable rows", "pinned", "pinned rows", "pinned columns", "pinned elements"]
DEVICES = ["device", "device rows", "device columns", "device elements"]
EITHER = [*HOSTS, *DEVICES]
PAIRS = [(dst, src) for dst in EITHER for src in EITHER if dst in DEVICES or src in DEVICES]
TAKEN_AS_ROWS = {"pinned", "pinned rows", "device", "device rows"}


def pinned(*shape: int) -> torch.Tensor:
    memory = torch.empty(shape, dtype=torch.int32, pin_memory=True)
    return memory.copy_(filled(shape, torch.int32))


def there(device: torch.device, *shape: int) -> torch.Tensor:
    return filled(shape, torch.int32, device=device)


def place(name: str, device: torch.device) -> torch.Tensor:
    """An int32 tensor of shape (ROWS, WIDTH): which memory holds it, and how it lies there."""
    memory, _, form = name.partition(" ")
    shape = {"": (ROWS, WIDTH), "columns": (WIDTH, ROWS)}.get(form, (ROWS, 2 * WIDTH))
    if memory == "pinned":
        whole = pinned(*shape)
    else:
        whole = there(device if memory == "device" else torch.device("cpu"), *shape)
    cuts = {"rows": whole[:, WIDTH:], "columns": whole.t(), "elements": whole[:, 1::2]}
    return cuts.get(form, whole)


def rest_of(view: torch.Tensor) -> torch.Tensor:
    """All bytes of a view's storage with its own elements cleared."""
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    rest = whole.cpu().clone()
    rest.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return rest


@pytest.fixture(params=["torch", "memcpy2d"])
def method(
    request: pytest.FixtureRequest, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The method that rows at a pitch take."""

    def issue(
        dst: int,
        src: int,
        to_device: bool,
        rows: tuple[int, int, int, int],
        device: torch.device,
        stream: torch.Stream | None,
    ) -> None:
        width, height, src_pitch, dst_pitch = rows
        at = torch.arange(height)
        widths = torch.full((height,), width)
        simdev.copy_runs(
            src + at * src_pitch, dst + at * dst_pitch, widths, stream or current(device)
        )

    if request.param == "torch":
        monkeypatch.setattr(cuda, "why_not", lambda device: "of the test")
    elif accelerator.type != "cuda":
        monkeypatch.setattr(cuda, "why_not", lambda device: None)
        monkeypatch.setattr(cuda, "copy_pitched", issue)
    elif not is_available():
        pytest.skip(cuda.why_not(accelerator) or "")
    return str(request.param)


@pytest.fixture
def second(accelerator: torch.device) -> torch.device:
    """Another device of the same kind."""
    if torch.get_device_module(accelerator).device_count() < 2:
        pytest.skip("there is one device of this kind")
    return torch.device(accelerator.type, 1)


@pytest.mark.parametrize("on_side", [False, True])
@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize(("target", "source"), PAIRS)
def test_every_byte_lands(
    accelerator: torch.device,
    target: str,
    source: str,
    non_blocking: bool,
    on_side: bool,
    method: str,
) -> None:
    dst = place(target, accelerator)
    src = place(source, accelerator)
    wanted = bits(src)
    rest = rest_of(dst)
    settle(accelerator)
    copied = copy_(dst, src, non_blocking, torch.Stream(accelerator) if on_side else None)
    assert copied.nbytes == dst.numel() * 4
    assert copied.direction == {(True, False): "d2h", (False, True): "h2d"}.get(
        (target in HOSTS, source in HOSTS), "d2d"
    )
    assert copied.waited or non_blocking
    copied.synchronize()
    assert copied.done()
    assert torch.equal(bits(dst), wanted)
    assert torch.equal(rest_of(dst), rest)
    rows = {source, target} <= TAKEN_AS_ROWS and {source, target} != {"pinned", "device"}
    rows = rows and copied.direction != "d2d"
    assert copied.method == ("memcpy2d" if rows and method == "memcpy2d" else "torch"), copied.why
    assert copied.why == "of the test" or not (rows and method == "torch")
    if accelerator.type != "cuda":  # CUDA has read pageable memory when its call returns
        # Whether the host has to wait although it need not have.
        host = target if target in HOSTS else source
        ready = host == "pinned" or {source, target} == {"pinned columns", "device columns"}
        late = host in DEVICES or ready or copied.method == "memcpy2d"
        assert copied.waited is not (non_blocking and late)


@pytest.mark.parametrize(
    ("target", "source"),
    [("pinned", "device"), ("device", "pinned"), ("pinned rows", "device"),
     ("device rows", "pinned"), ("device", "device")],
)  # fmt: skip
def test_non_blocking_does_not_wait_and_blocking_does(
    accelerator: torch.device, target: str, source: str, method: str
) -> None:
    if "rows" in target and method == "torch":
        pytest.skip("torch packs the rows on the host")
    dst = place(target, accelerator)
    src = place(source, accelerator)
    copy_(dst, src)  # what is loaded late is loaded
    settle(accelerator)
    side = torch.Stream(accelerator)
    delay(side)
    copied = copy_(dst, src, True, side)
    assert not copied.waited
    assert not copied.done()
    assert not side.query()
    assert copy_(dst, src, False, side).waited
    assert side.query()


@pytest.mark.parametrize("on_side", [False, True])
@pytest.mark.parametrize(
    ("target", "source"),
    [("pinned rows", "device"), ("device", "pinned rows"), ("device rows", "device"),
     ("pinned", "device elements"), ("pinned elements", "device"), ("device", "pinned elements")],
)  # fmt: skip
def test_a_copy_waits_for_its_producer(
    accelerator: torch.device, target: str, source: str, on_side: bool, method: str
) -> None:
    """And what waits for it sees it."""
    for _ in range(REPEATS if accelerator.type != "cuda" else 1):
        dst = place(target, accelerator)
        src = place(source, accelerator)
        fresh = there(accelerator, ROWS, WIDTH)
        wanted = bits(fresh)
        settle(accelerator)
        delay(current(accelerator))
        copy_(src, fresh, non_blocking=True)
        copied = copy_(dst, src, True, torch.Stream(accelerator) if on_side else None)
        copied.wait()
        fresh.zero_()
        if dst.device == accelerator:
            assert torch.equal(bits(dst.to(accelerator, copy=True, non_blocking=True)), wanted)
        copied.synchronize()
        assert torch.equal(bits(dst), wanted)


@pytest.mark.parametrize("source", ["pinned columns", "pinned elements"])
def test_pinned_memory_that_the_host_packs_is_written_first(
    accelerator: torch.device, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its strides fit no 2-D copy, so that the host reads it, after what the stream holds."""
    copy = torch.Tensor.copy_

    def packed(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return copy(dst, src.contiguous(), non_blocking)

    if accelerator.type != "cuda":  # as CUDA does
        monkeypatch.setattr(torch.Tensor, "copy_", packed)
    src = place(source, accelerator)
    dst = there(accelerator, ROWS, WIDTH)
    fresh = there(accelerator, ROWS, WIDTH)
    side = torch.Stream(accelerator)
    settle(accelerator)
    delay(side)
    with on(side):
        src.copy_(fresh, non_blocking=True)
    assert copy_h2d(dst, src, True, side).waited
    assert same(dst, fresh)


def test_pageable_memory_may_change_right_after_the_call(accelerator: torch.device) -> None:
    src = filled((64,), torch.int32)
    dst = there(accelerator, 64)
    wanted = src.clone()
    delay(current(accelerator))
    copied = copy_h2d(dst, src, non_blocking=True)
    assert copied.waited or accelerator.type == "cuda"
    src.zero_()
    assert same(dst, wanted)


@pytest.mark.gpu
def test_the_default_stream_is_a_stream() -> None:
    dst = there(DEVICE, 64)
    src = there(DEVICE, 64)
    side = torch.cuda.Stream(DEVICE)
    settle(DEVICE)
    with torch.cuda.stream(side):
        delay(side)
        copied = copy_d2d(dst, src, True, torch.cuda.default_stream(DEVICE))
        copied.synchronize()  # after the current stream, which is slow
        assert side.query()
    assert same(dst, src)


def test_what_is_freed_while_a_copy_flies(accelerator: torch.device, method: str) -> None:
    src = pinned(ROWS, 2 * WIDTH)[:, :WIDTH]
    back = pinned(ROWS, 2 * WIDTH)[:, :WIDTH]
    wanted = src.clone()
    side = torch.Stream(accelerator)
    dst = there(accelerator, ROWS, WIDTH)
    through = there(accelerator, ROWS, WIDTH)
    settle(accelerator)
    delay(side)
    copy_h2d(through, src, True, side)
    with on(side):
        copy_d2h(back, through, True)
        copy_h2d(dst, back, True)
    del src, back, through
    gc.collect()
    rubbish = [torch.zeros(ROWS, 2 * WIDTH, dtype=torch.int32, pin_memory=True) for _ in range(4)]
    rubbish += [torch.zeros(ROWS, WIDTH, dtype=torch.int32, device=accelerator) for _ in range(4)]
    current(accelerator).wait_stream(side)
    assert same(dst, wanted)
    settle(accelerator)
    assert copies_holding_memory() == 0


def test_memory_is_let_go_once_a_copy_has_ended(accelerator: torch.device) -> None:
    src = pinned(64)
    dst = there(accelerator, 64)
    copy_h2d(dst, src)  # what is loaded late is loaded
    settle(accelerator)
    delay(current(accelerator))
    for _ in range(5):
        copy_h2d(dst, src, non_blocking=True)  # no one keeps the handle
    assert copies_holding_memory() == 5
    forgotten = weakref.ref(src)
    del src
    assert forgotten() is not None
    settle(accelerator)
    assert copies_holding_memory() == 0
    assert forgotten() is None


def test_memory_that_is_pinned_only_at_its_beginning(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: object = None
    src = filled((ROWS, 2 * WIDTH), torch.int32)
    dst = there(accelerator, ROWS, WIDTH)
    assert not is_pinned(src)
    if accelerator.type == "cuda":
        registered = register(src[: ROWS // 2], fallback=False)
    else:
        end = src[ROWS // 2 :].data_ptr()
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() < end)
    assert is_pinned(src[: ROWS // 2])
    assert not is_pinned(src[:, :WIDTH])
    copied = copy_h2d(dst, src[:, :WIDTH], non_blocking=True)
    assert (copied.method, copied.waited) == ("torch", True)
    assert same(dst, src[:, :WIDTH])
    del registered


@pytest.mark.parametrize("on_source", [None, True, False])
@pytest.mark.parametrize("columns", [slice(None), slice(0, WIDTH), slice(0, None, 2)], ids=str)
def test_between_two_devices(
    accelerator: torch.device, second: torch.device, on_source: bool | None, columns: slice
) -> None:
    for _ in range(REPEATS if accelerator.type != "cuda" else 1):
        src = there(accelerator, ROWS, 2 * WIDTH)
        fresh = there(accelerator, ROWS, 2 * WIDTH)
        dst = there(second, ROWS, 2 * WIDTH)
        wanted = bits(fresh[:, columns])
        stream = None if on_source is None else torch.Stream(accelerator if on_source else second)
        settle(accelerator)
        settle(second)
        delay(current(accelerator))
        src.copy_(fresh)
        copied = copy_d2d(dst[:, columns], src[:, columns], True, stream)
        assert (copied.direction, copied.method, copied.waited) == ("peer", "torch", False)
        copied.wait(current(accelerator))
        copied.wait(current(second))
        src.zero_()
        assert torch.equal(bits(dst[:, columns]), wanted)
        copied.synchronize()
    before = simdev.synchronised()
    assert copy_d2d(dst, src).waited
    assert simdev.synchronised() == before  # the call waits, no op of torch
    assert current(accelerator).query()
    assert current(second).query()


def test_a_stream_that_takes_no_part(accelerator: torch.device, second: torch.device) -> None:
    src = there(accelerator, 64)
    dst = there(accelerator, 64)
    with refused(DeviceMismatch, f"{accelerator}", f"{second}", watch=dst):
        copy_d2d(dst, src, stream=torch.Stream(second))
    with refused(DeviceMismatch, "cpu", watch=dst):
        copy_(torch.zeros(4), torch.zeros(4), stream=torch.Stream(accelerator))


@pytest.mark.parametrize(
    ("target", "source", "why"),
    [
        ("device", "pinned", ()), ("pinned", "device", ()), ("pinned rows", "device", ()),
        ("device elements", "device", ()), ("device columns", "pinned columns", ()),
        ("device", "pageable", ("pageable", "pin the memory")),
        ("pageable rows", "device", ("pageable", "pin the memory")),
        ("device", "pinned elements", ("strides [1024, 2]", "rows of 4 bytes")),
        ("pinned columns", "device", ("strides [1, 12]", "2 loops")),
    ],
)  # fmt: skip
def test_what_can_be_captured(
    accelerator: torch.device,
    target: str,
    source: str,
    why: tuple[str, ...],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dst = place(target, accelerator)
    src = place(source, accelerator)
    monkeypatch.setattr(memcpy, "capturing", lambda device: True)
    with refused(Unsupported, "non_blocking=True", watch=dst):
        copy_(dst, src)
    if target == "pinned rows" and method == "torch":
        why = "strides [1024, 1]", "of the test"
    if why:
        with refused(Unsupported, *why, watch=dst):
            copy_(dst, src, non_blocking=True)
    else:
        assert not copy_(dst, src, non_blocking=True).waited
        settle(accelerator)
        assert same(dst, src)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("on_side", [False, True])
def test_a_copy_in_a_graph(rows: bool, on_side: bool) -> None:
    if rows and not is_available():
        pytest.skip(cuda.why_not(DEVICE) or "")
    cut = (slice(None), slice(0, WIDTH)) if rows else (slice(None),)
    src = pinned(ROWS, 2 * WIDTH)[cut]
    back = pinned(ROWS, 2 * WIDTH)[cut]
    through = there(DEVICE, *src.shape)
    side = torch.cuda.Stream(DEVICE)
    copy_h2d(through, src)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for dst, origin in ((through, src), (back, through)):
            copied = copy_(dst, origin, True, side if on_side else None)
            copied.wait()
        with pytest.raises(Unsupported):
            copy_(through, src)
        with pytest.raises(Unsupported):
            copy_h2d(through, filled(src.shape, torch.int32), True)
    for value in (3, 4):
        src.fill_(value)
        back.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(back, torch.full_like(back, value))
