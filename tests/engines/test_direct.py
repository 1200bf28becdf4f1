# SPDX-License-Identifier: Apache-2.0
"""The engine `direct` without a GPU: what it says of devices and plans, and asks of a driver."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.cuda_cases import COPIES, Copy, by, chunk, objects, pool
from support.device_cases import current, delay, on
from support.direct_on_cpu import CPU, DirectOnCpu, Driver, installed, why_not
from support.guarded_memory import refused

from portakv import CopyPlan, TransferError, Unsupported
from portakv.backends.base import Capabilities, Decision, Launch
from portakv.engines import direct
from portakv.engines.direct import BLOCKS, CUT, NAME, Cut, Direct, DirectKernel
from portakv.engines.engine import PINNED, Terms
from portakv.plan.plan import Move
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import nvrtc as _nvrtc

CUDA = torch.device("cuda", 0)
needs_compiler = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
# One of them in every run.
WIDER = [pytest.param(n, marks=[pytest.mark.full] * (n != 90)) for n in (80, 90, 100)]
needs_nvrtc = pytest.mark.skipif(_nvrtc.missing() is not None, reason=str(_nvrtc.missing()))


def between(copied: Copy, src: str, dst: str) -> CopyPlan:
    """The plan of a copy with its sides in these places."""
    forms = (copied.src.view().form, copied.dst.view().form)
    steps = (copied.src.index().plan_step, copied.dst.index().plan_step)
    return CopyPlan(replace(forms[0], place=src), replace(forms[1], place=dst), *steps)


# What it says


def test_devices_that_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Direct.probe(CPU).reason == "it copies between a device and the host"
    other = Direct.probe(torch.device("xpu", 0))
    assert other == Decision("direct", False, "the CUDA driver does not serve xpu devices")
    monkeypatch.setattr(_cuda_driver, "why_not", lambda device: "update the driver")
    assert Direct.probe(CUDA).reason == "update the driver"
    monkeypatch.setattr(_cuda_driver, "why_not", lambda device: None)
    monkeypatch.setattr(_cuda_driver, "device_too_old", lambda device: "capability 6.0")
    assert Direct.probe(CUDA) == Decision("direct", False, "capability 6.0")
    monkeypatch.setattr(_cuda_driver, "device_too_old", lambda device: None)
    assert Direct.probe(CUDA).accepted


def test_plans_by_their_places_and_narrow_vectors_are_told() -> None:
    engine = Direct(CUDA)
    for src, dst in (("device", "pinned"), ("pinned", "device")):
        wide = engine.check(between(COPIES["gather"](), src, dst))
        assert wide == Decision("direct", True, "takes the plan")
        narrow = engine.check(between(COPIES["rows at an odd address"](), src, dst))
        told = "takes the plan, in vectors of 1 B: only 16 B fill the link"
        assert narrow == Decision("direct", True, told)
    for src, dst in (("device", "device"), ("pageable", "device"), ("device", "pageable")):
        decision = engine.check(between(COPIES["gather"](), src, dst))
        assert decision.reason == f"it does not copy from {src} to {dst} memory"


def test_what_it_claims() -> None:
    assert Direct(CUDA).capabilities() == Capabilities(
        places=PINNED, skips_negative=True, guards=True, capturable=True
    )


# What it asks of the driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    with installed(CUT) as found:
        yield found


def large() -> Copy:
    """12,288 vectors: six blocks of 1024 threads with 2 each."""
    slots = list(range(256, 0, -1))
    cache = pool(blocks=65, layers=2, dim=48)
    return Copy(by(cache, slots), chunk(256, layers=2, dim=48), 256)


def launch(copied: Copy, terms: Terms | None = None) -> None:
    prepared = DirectOnCpu(CPU, terms=terms).prepare(copied.plan())
    _run(prepared, copied)


def _run(prepared: Launch, copied: Copy) -> None:
    src, dst = copied.src, copied.dst
    prepared(src.view(), dst.view(), src.index(), dst.index(), copied.count, None, None)


SMALL = Cut(threads=64, each=2, strip=64)


@needs_compiler
@pytest.mark.parametrize(
    ("cut", "make", "terms", "blocks"),
    [(SMALL, large, None, BLOCKS), *((SMALL, large, most, most) for most in (1, 2, 3, 20)),
     (CUT, large, None, 6), (CUT, COPIES["gather"], None, 1)],
    ids=["no terms", *(f"at most {most}" for most in (1, 2, 3, 20)), "fewer to do", "one to do"],
)  # fmt: skip
def test_no_more_thread_blocks_than_the_terms_allow_and_have_something_to_do(
    cut: Cut, make: Callable[[], Copy], terms: int | None, blocks: int
) -> None:
    copied = make()
    with installed(cut) as driver:
        copied.check(lambda: launch(copied, Terms(max_thread_blocks=terms)))
    assert [launched[:2] for launched in driver.launches] == [(blocks, cut.threads)]
    assert driver.streams == [7], "the stream's handle, as the driver knows it"


@needs_compiler
def test_a_launch_that_the_driver_refuses(driver: Driver) -> None:
    driver.error = 700
    copied = COPIES["gather"]()
    with refused(TransferError, "700", "nothing was moved", watch=copied.dst.tensors):
        launch(copied)


# Graph capture


@needs_compiler
def test_nothing_is_loaded_during_capture(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, copied = DirectOnCpu(CPU), COPIES["gather"]()
    with monkeypatch.context() as capturing:
        capturing.setattr(direct, "capturing", lambda device: True)
        with refused(Unsupported, "make the same call once before the capture"):
            engine.prepare(copied.plan())
    copied.check(lambda: _run(engine.prepare(copied.plan()), copied))
    driver.held.clear()
    with monkeypatch.context() as capturing:
        capturing.setattr(direct, "capturing", lambda device: True)
        copied.check(lambda: _run(engine.prepare(copied.plan()), copied))
    assert driver.held == [], "a graph's memory is its owner's"


# Tables of the host on the device


def test_a_table_is_sent_once_and_waited_for_by_every_stream(accelerator: torch.device) -> None:
    view, side = objects().view(), torch.Stream(accelerator)
    delay(current(accelerator))
    first = direct.table_on(view, accelerator, None)
    kept = view.derived[direct._TABLE_ON, accelerator]
    with on(side):
        assert direct.table_on(view, accelerator, side) == first
        read = kept.addresses.clone()
    assert kept is view.derived[direct._TABLE_ON, accelerator]
    view.derived.clear()
    del kept  # the allocator knows which stream reads it
    rubbish = [torch.full_like(read, 7) for _ in range(4)]
    with on(side):
        assert read.tolist() == list(view.origins)
    del rubbish


def test_a_table_inside_a_capture(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to be there before; then nothing waits for what was enqueued outside."""
    view = objects().view()
    with monkeypatch.context() as inside:
        inside.setattr(direct, "capturing", lambda device: True)
        with refused(Unsupported, "make the same call once before the capture"):
            direct.table_on(view, accelerator, None)
    there = direct.table_on(view, accelerator, None)
    monkeypatch.setattr(direct, "capturing", lambda device: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", None)
    assert direct.table_on(view, accelerator, None) == there


# Memory that a device does not reach


@needs_compiler
@pytest.mark.parametrize("found", [0, 64])
def test_memory_that_is_pinned_but_not_mapped(
    driver: Driver, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "device_address", lambda address, device: found)
    copied = COPIES["gather"]()
    with refused(Unsupported, "mapped=True", "staged", watch=copied.dst.tensors):
        launch(copied)
    assert driver.launches == []


@needs_compiler
def test_a_view_is_asked_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(address: int, device: torch.device) -> int:
        asked.append(address)
        return address

    monkeypatch.setattr(direct, "device_address", ask)
    copied = COPIES["gather"]()
    prepared = DirectOnCpu(CPU).prepare(copied.plan())
    views = copied.src.view(), copied.dst.view()
    for _ in range(3):
        prepared(*views, copied.src.index(), copied.dst.index(), copied.count, None, None)
    assert asked == [views[1].origins[0]]


# The argument


def test_arguments_begin_as_the_rows_kernels_do() -> None:
    """The words of a request: base, table, ids, wide, first, limit."""
    copied = Copy(by(pool(), [3, 1]), objects(), 2)
    plan = between(copied, "device", "pinned")
    kernel = DirectKernel(plan.nests[0], plan, CUDA)
    assert kernel.wants_table
    buffer = bytearray(kernel.fixed)
    ids, dst = copied.src.index(), copied.dst.view()
    addresses = SimpleNamespace(data_ptr=lambda: 1 << 40)
    dst.derived[direct._TABLE_ON, CUDA] = SimpleNamespace(addresses=addresses)
    move = Move(copied.src.view(), dst, ids, copied.dst.index(), copied.count)
    kernel.pack(buffer, move, 99, 0)
    words = struct.unpack_from("<12q", buffer)
    assert words[7] == (1 << 40) + 8 * kernel.dst.side.table
    assert (words[2], words[3], words[5]) == (ids.ids.data_ptr(), 1, 12)  # type: ignore[union-attr]


# What is held


@needs_compiler
@pytest.mark.parametrize("stores", [True, False])
def test_the_host_s_memory_is_held_until_the_copy_ended(
    stores: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectOnCpu, "stores", stores)
    copied = COPIES["gather"]()
    copied.check(lambda: launch(copied))
    host = copied.dst if stores else copied.src
    assert [[x.data_ptr() for x in held] for held in driver.held] == [
        [x.data_ptr() for x in host.view().owners]
    ]
    driver.error = 700  # what was launched before may be under way
    with refused(TransferError, "700", watch=copied.dst.tensors):
        launch(copied)
    assert len(driver.held) == 2


# What compilers make of the kernel


def kernels() -> list[DirectKernel]:
    """One for each width and each pair of tables."""
    chosen = {}
    for make in COPIES.values():
        plan = make().plan()
        for nest in plan.nests:
            kernel = DirectKernel(nest, plan)
            chosen[kernel.vector, kernel.src.kind, kernel.dst.kind] = kernel
    assert {vector for vector, _, _ in chosen} == {16, 8, 4, 2, 1}
    return list(chosen.values())


_PTX = {16: ".v4.u32", 8: ".u64", 4: ".u32", 2: ".u16", 1: ".u8"}


@needs_nvrtc
def test_nvrtc_keeps_all_vectors_of_a_thread_in_registers() -> None:
    for kernel in kernels():
        text = _nvrtc._compile(kernel.source, "compute_80").decode()
        assert text.count(".entry") == 1
        assert f".entry {NAME}(" in text
        assert f".maxntid {CUT.threads}" in text
        assert ".local" not in text
        stores = f"st.global{_PTX[kernel.vector]}"
        assert text.count(f"{stores} ") + text.count(f"{stores}\t") == CUT.each
        assert "ld.u" not in text, "a generic load"


@needs_nvrtc
@pytest.mark.parametrize("architecture", WIDER)
def test_nvrtc_makes_machine_code(architecture: int) -> None:
    for kernel in kernels()[:4]:
        binary = _nvrtc._compile(kernel.source, f"sm_{architecture}")
        assert binary.startswith(b"\x7fELF")


def test_nests_of_one_shape_have_one_text() -> None:
    def text(layers: int, tokens: int) -> str:
        plan = Copy(by(pool(layers=layers), [1, 0, 2][:tokens]), chunk(tokens, layers), tokens)
        made = plan.plan()
        return DirectKernel(made.nests[0], made).source

    assert text(3, 2) == text(3, 3)
    assert text(3, 2) != text(2, 2), "the number of planes is in the text"
