# SPDX-License-Identifier: Apache-2.0
"""Plain copies on a CUDA device: every byte, the way, order, graphs, and who waits."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.device_cases import DEVICE, LONG
from support.guarded_memory import bits, filled, refused, same
from support.host_copy_places import places, rest_of

from portakv import LayoutError, Unsupported
from portakv.host.memcpy import copy_, copy_d2d, copy_d2h, copy_h2d, is_available, is_pinned
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.transfer import copies_holding_memory

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 24, 512  # of int32


def pinned(*shape: int) -> torch.Tensor:
    return filled(shape, torch.int32).pin_memory()


def there(*shape: int) -> torch.Tensor:
    return filled(shape, torch.int32, device=DEVICE)


HOSTS, DEVICES, PAIRS = _places = places(ROWS, WIDTH, pinned, there)
PLACES = _places.all


@pytest.fixture
def side() -> Any:
    return torch.cuda.Stream(DEVICE)


@pytest.mark.parametrize("on_side", [False, True])
@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize(("target", "source"), PAIRS)
def test_every_byte_lands(
    target: str, source: str, non_blocking: bool, on_side: bool, side: Any
) -> None:
    dst, src = PLACES[target](), PLACES[source]()
    wanted, rest = bits(src), rest_of(dst)
    torch.cuda.synchronize()
    copied = copy_(dst, src, non_blocking, side if on_side else None)
    assert copied.waited or non_blocking
    copied.synchronize()
    assert copied.done()
    assert torch.equal(bits(dst), wanted)
    assert torch.equal(rest_of(dst), rest)
    rows = {source, target} <= {"pinned", "pinned rows", "device", "device rows"}
    pitched = rows and copied.direction != "d2d" and {source, target} != {"pinned", "device"}
    assert copied.way == ("memcpy2d" if pitched and is_available() else "torch"), copied.why


def test_the_driver_is_used_where_the_extra_is_installed() -> None:
    if not is_available():
        pytest.skip(_cuda_driver.why_not(DEVICE) or "")
    copied = copy_d2h(pinned(ROWS, 2 * WIDTH)[:, :WIDTH], there(ROWS, WIDTH), non_blocking=True)
    copied.synchronize()
    assert (copied.way, copied.waited) == ("memcpy2d", False)


@pytest.mark.parametrize(
    ("target", "source"),
    [(a, b) for a, b in PAIRS if "pageable" not in a + b and "columns" not in a + b],
)
def test_a_copy_comes_behind_a_slow_producer(target: str, source: str, side: Any) -> None:
    dst, src = PLACES[target](), PLACES[source]()
    fresh = there(ROWS, WIDTH)
    wanted = bits(fresh)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    copy_(src, fresh, non_blocking=True)
    copied = copy_(dst, src, True, side)
    copied.wait()
    landed = dst.to(DEVICE, copy=True, non_blocking=True) if dst.is_cuda else None
    copied.synchronize()
    assert torch.equal(bits(dst), wanted)
    if landed is not None:
        assert torch.equal(bits(landed), wanted)


@pytest.mark.parametrize(
    ("target", "source"),
    [("pinned", "device"), ("device", "pinned"), ("pinned rows", "device"),
     ("device rows", "pinned"), ("device", "device")],
)  # fmt: skip
def test_non_blocking_does_not_wait_and_blocking_does(target: str, source: str, side: Any) -> None:
    if "rows" in target and not is_available():
        pytest.skip(_cuda_driver.why_not(DEVICE) or "")
    dst, src = PLACES[target](), PLACES[source]()
    copy_(dst, src)  # what is loaded late is loaded
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    copied = copy_(dst, src, True, side)
    assert not copied.waited
    assert not copied.done()
    assert not side.query()
    assert copy_(dst, src, False, side).waited
    assert side.query()


def test_pinned_memory_freed_while_a_copy_flies(side: Any) -> None:
    src = pinned(ROWS, 2 * WIDTH)
    wanted, dst = src[:, :WIDTH].clone(), there(ROWS, WIDTH)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    copy_h2d(dst, src[:, :WIDTH], True, side)
    del src
    gc.collect()
    rubbish = [torch.zeros(ROWS, 2 * WIDTH, dtype=torch.int32).pin_memory() for _ in range(4)]
    torch.cuda.synchronize()
    assert same(dst, wanted)
    assert len(rubbish) == 4
    assert copies_holding_memory() == 0


def test_the_default_stream_is_a_stream() -> None:
    dst, src, side = there(64), there(64), torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        copied = copy_d2d(dst, src, True, torch.cuda.default_stream(DEVICE))
        copied.synchronize()  # behind the current stream, which is slow
        assert side.query()
    assert same(dst, src)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("on_side", [False, True])
def test_a_copy_in_a_graph(rows: bool, on_side: bool, side: Any) -> None:
    if rows and not is_available():
        pytest.skip(_cuda_driver.why_not(DEVICE) or "")
    cut = (slice(None), slice(0, WIDTH)) if rows else (slice(None),)
    src, back = pinned(ROWS, 2 * WIDTH)[cut], pinned(ROWS, 2 * WIDTH)[cut]
    through = there(*src.shape)
    copy_h2d(through, src)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for dst, given in ((through, src), (back, through)):
            copied = copy_(dst, given, True, side if on_side else None)
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


def test_what_is_refused_writes_nothing() -> None:
    dst = there(8, 8)
    with refused(LayoutError, "share bytes", watch=dst):
        copy_d2d(dst[1:], dst[:-1])
    with refused(LayoutError, "torch.float32", watch=dst):
        copy_h2d(dst, torch.zeros(8, 8))
    with refused(LayoutError, "[8, 4]", watch=dst):
        copy_h2d(dst, torch.zeros(8, 4, dtype=torch.int32))


def test_registered_memory_is_pinned() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert not is_pinned(memory)
    start = -memory.data_ptr() % 4096
    half = memory[start : start + (1 << 18)]
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(half.data_ptr(), half.numel(), 0)) == 0
    try:
        assert is_pinned(half)
        assert not is_pinned(memory[start : start + (1 << 19)])
    finally:
        assert int(runtime.cudaHostUnregister(half.data_ptr())) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("on_source", [None, True, False])
def test_between_two_devices(on_source: bool | None) -> None:
    other = torch.device("cuda", 1)
    src, fresh = there(ROWS, 2 * WIDTH), there(ROWS, 2 * WIDTH)
    dst = filled((ROWS, 2 * WIDTH), torch.int32, device=other)
    wanted = bits(fresh[:, :WIDTH])
    stream = None if on_source is None else torch.cuda.Stream(DEVICE if on_source else other)
    torch.cuda.synchronize(DEVICE)
    torch.cuda.synchronize(other)
    torch.cuda._sleep(LONG)
    src.copy_(fresh)
    copied = copy_d2d(dst[:, :WIDTH], src[:, :WIDTH], True, stream)
    assert copied.direction == "peer"
    copied.wait(torch.cuda.current_stream(DEVICE))
    src.zero_()
    copied.synchronize()
    assert torch.equal(bits(dst[:, :WIDTH]), wanted)
