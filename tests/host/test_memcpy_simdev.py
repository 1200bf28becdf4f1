# SPDX-License-Identifier: Apache-2.0
"""Plain copies on the simulated device: where a missing wait becomes wrong bytes.

A stand-in for the driver's 2-D memcpy issues the rows as one job, so that this way is judged too.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.guarded_memory import bits, filled, refused, same
from support.host_copy_cases import REPEATS, device_tensor
from support.host_copy_places import places, rest_of
from support.simdev_cases import DEVICE, OTHER, current, on

from portakv import DeviceMismatch, LayoutError
from portakv.host import memcpy
from portakv.host.memcpy import Copied, copy_, copy_d2d, copy_d2h, copy_h2d, is_available
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.transfer import copies_holding_memory
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

ROWS, WIDTH = 12, 512  # of int32, in a matrix that is twice as wide


@pytest.fixture(params=["torch", "memcpy2d"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that rows at a pitch take."""
    if request.param == "memcpy2d":

        def issue(
            dst: int, src: int, to_device: bool, rows: tuple[int, int, int, int],
            device: torch.device, stream: torch.Stream | None,
        ) -> None:  # fmt: skip
            width, height, src_pitch, dst_pitch = rows
            at = torch.arange(height)
            simdev.copy_runs(
                src + at * src_pitch, dst + at * dst_pitch, torch.full((height,), width),
                stream or current(device),
            )  # fmt: skip

        monkeypatch.setattr(_cuda_driver, "why_not", lambda device: None)
        monkeypatch.setattr(_cuda_driver, "copy_pitched", issue)
    return str(request.param)


def pinned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Pinned memory with bytes that name their places."""
    memory = torch.empty(shape, dtype=dtype, pin_memory=True)
    return memory.copy_(filled(shape, dtype))


HOSTS, DEVICES, PAIRS = _places = places(ROWS, WIDTH, pinned, device_tensor)
PLACES = _places.all


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize(("target", "source"), PAIRS)
def test_every_byte_lands(
    target: str, source: str, non_blocking: bool, side: bool, way: str
) -> None:
    dst, src = PLACES[target](), PLACES[source]()
    torch.accelerator.synchronize(DEVICE)
    wanted, rest = bits(src), rest_of(dst)
    stream = torch.Stream(DEVICE) if side else None
    copied = copy_(dst, src, non_blocking, stream)
    assert copied.nbytes == dst.numel() * 4
    assert copied.direction == {(True, False): "d2h", (False, True): "h2d"}.get(
        (target in HOSTS, source in HOSTS), "d2d"
    )
    if not non_blocking:
        assert copied.waited
    if not copied.waited:
        copied.synchronize()
    assert copied.done()
    assert torch.equal(bits(dst), wanted)
    assert torch.equal(rest_of(dst), rest)
    rows = {source, target} <= {"pinned", "pinned rows", "device", "device rows"}
    pitched = rows and copied.direction != "d2d" and {source, target} != {"pinned", "device"}
    assert copied.way == ("memcpy2d" if pitched and way == "memcpy2d" else "torch")
    if pitched and way == "torch":
        assert "does not serve simdev" in copied.why
    # Whether the host has to wait although it need not have.
    host = target if target in HOSTS else source
    ready = host == "pinned" or {source, target} == {"pinned columns", "device columns"}
    late = host in DEVICES or ready or copied.way == "memcpy2d"
    assert copied.waited is not (non_blocking and late)


def test_blocking_means_that_the_host_waits() -> None:
    for dst, src in ((DEVICE, DEVICE), (OTHER, DEVICE)):
        source, target = device_tensor(64, device=src), device_tensor(64, device=dst)
        before = simdev.synchronised()
        copied = copy_d2d(target, source)
        assert copied.waited
        assert simdev.synchronised() == before  # the call waits, no op of torch
        assert current(src).query()
        assert current(dst).query()
        late = copy_d2d(target, source, non_blocking=True)
        assert not late.waited
        assert not current(dst).query()
        late.synchronize()
        assert late.done()


@pytest.mark.parametrize(
    ("target", "source"),
    [("pinned rows", "device"), ("device", "pinned rows"), ("device rows", "device")],
)
@pytest.mark.parametrize("side", [False, True])
def test_a_copy_waits_for_its_producer(target: str, source: str, side: bool, way: str) -> None:
    """And whoever waits for it sees it."""
    for _ in range(REPEATS):
        dst, src, fresh = PLACES[target](), PLACES[source](), device_tensor(ROWS, WIDTH)
        torch.accelerator.synchronize(DEVICE)
        wanted = bits(fresh)
        simdev.delay(current(), 1)
        src.copy_(fresh, non_blocking=True)
        copied = copy_(dst, src, True, torch.Stream(DEVICE) if side else None)
        copied.wait()
        fresh.zero_()
        landed = dst.to(DEVICE, copy=True, non_blocking=True)
        assert torch.equal(bits(landed), wanted)
        copied.synchronize()
        assert torch.equal(bits(dst), wanted)


def test_pinned_memory_that_the_host_packs_is_written_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its strides fit no 2-D copy, so that the host reads it, after what the stream holds."""
    write = memcpy._write

    def as_cuda_does(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool) -> None:
        write(dst, src.contiguous(), non_blocking)

    monkeypatch.setattr(memcpy, "_write", as_cuda_does)
    for make in ("pinned columns", "pinned elements"):
        src, dst, fresh = HOSTS[make](), device_tensor(ROWS, WIDTH), device_tensor(ROWS, WIDTH)
        torch.accelerator.synchronize(DEVICE)
        side = torch.Stream(DEVICE)
        with on(side):
            simdev.delay(side, 1)
            src.copy_(fresh, non_blocking=True)
        copied = copy_h2d(dst, src, True, side)
        assert copied.waited
        assert same(dst, fresh)


def test_what_is_freed_while_a_copy_flies(way: str) -> None:
    for _ in range(3):
        src, back = pinned(ROWS, 2 * WIDTH)[:, :WIDTH], pinned(ROWS, 2 * WIDTH)[:, :WIDTH]
        wanted, side = src.clone(), torch.Stream(DEVICE)
        dst, through = device_tensor(ROWS, WIDTH), device_tensor(ROWS, WIDTH)
        torch.accelerator.synchronize(DEVICE)
        simdev.delay(side, 1)
        copy_h2d(through, src, True, side)
        with on(side):
            copy_d2h(back, through, True)
            copy_h2d(dst, back, True)
        del src, back, through
        gc.collect()
        torch.accelerator.synchronize(OTHER)
        rubbish = [torch.zeros(ROWS, 2 * WIDTH, dtype=torch.int32, pin_memory=True)]
        rubbish += [torch.zeros(ROWS, WIDTH, dtype=torch.int32, device=DEVICE) for _ in range(4)]
        current().wait_stream(side)
        assert same(dst, wanted)


def test_memory_is_let_go_once_a_copy_has_ended() -> None:
    torch.accelerator.synchronize(DEVICE)
    src, dst = pinned(64), device_tensor(64)
    for _ in range(5):
        copy_h2d(dst, src, non_blocking=True)  # whose handle nobody keeps
    assert copies_holding_memory() == 5
    forgotten = weakref.ref(src)
    del src
    assert forgotten() is not None
    torch.accelerator.synchronize(DEVICE)
    assert copies_holding_memory() == 0
    assert forgotten() is None


def test_a_stream_that_takes_no_part() -> None:
    src, dst = device_tensor(64), device_tensor(64)
    with refused(DeviceMismatch, f"{DEVICE}", f"{OTHER}", watch=dst):
        copy_d2d(dst, src, stream=torch.Stream(OTHER))
    with refused(DeviceMismatch, "cpu", watch=dst):
        copy_(torch.zeros(4), torch.zeros(4), stream=torch.Stream(DEVICE))


@pytest.mark.parametrize("on_source", [None, True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_between_two_devices(on_source: bool | None, strided: bool) -> None:
    for _ in range(REPEATS):
        src, fresh = device_tensor(ROWS, 2 * WIDTH), device_tensor(ROWS, 2 * WIDTH)
        dst = device_tensor(ROWS, 2 * WIDTH, device=OTHER)
        cut = (slice(None), slice(0, None, 2)) if strided else (slice(None),)
        for each in (DEVICE, OTHER):
            torch.accelerator.synchronize(each)
        wanted = bits(fresh[cut])
        stream = None if on_source is None else torch.Stream(DEVICE if on_source else OTHER)
        simdev.delay(current(DEVICE), 1)
        src.copy_(fresh)
        copied = copy_d2d(dst[cut], src[cut], True, stream)
        assert (copied.direction, copied.way) == ("peer", "torch")
        copied.wait(current(DEVICE))
        copied.wait(current(OTHER))
        src.zero_()
        assert torch.equal(bits(dst[cut]), wanted)
        copied.synchronize()


def test_pageable_memory_may_change_right_after_the_call() -> None:
    src, dst = filled((64,), torch.int32), device_tensor(64)
    wanted = src.clone()
    copied = copy_h2d(dst, src, non_blocking=True)
    assert copied.waited
    src.zero_()
    assert same(dst, wanted)


def test_the_simulated_device_has_no_driver() -> None:
    assert not is_available()
    assert not is_available(DEVICE)
    assert _cuda_driver.why_not(DEVICE) == "the CUDA driver does not serve simdev devices"


def test_memory_that_is_pinned_only_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = pinned(ROWS, 2 * WIDTH), device_tensor(ROWS, WIDTH)
    end = src.data_ptr() + 4 * WIDTH * ROWS
    real = torch.Tensor.is_pinned
    monkeypatch.setattr(
        torch.Tensor, "is_pinned", lambda self: real(self) and self.data_ptr() < end
    )
    assert not memcpy.is_pinned(src[:, :WIDTH])
    assert memcpy.is_pinned(src[: ROWS // 2])
    copied: Copied = copy_h2d(dst, src[:, :WIDTH], non_blocking=True)
    assert (copied.way, copied.waited) == ("torch", True)
    assert same(dst, src[:, :WIDTH])


def test_overlap_on_a_device() -> None:
    memory = device_tensor(64)
    with refused(LayoutError, "share bytes", watch=memory):
        copy_d2d(memory[:32], memory[31:63])
    wanted = memory[1::2].cpu()
    copy_d2d(memory[::2], memory[1::2])
    assert same(memory[::2], wanted)
