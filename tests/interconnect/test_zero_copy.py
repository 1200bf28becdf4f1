# SPDX-License-Identifier: Apache-2.0
"""The strategy `zero_copy`: what it says of devices and plans, how its kernel cuts a copy, run on
the host both ways, what it asks of a driver; and on a GPU.

What holds of every kernel alike is judged in `tests/backends/test_every_backend.py`, every byte of
every copy of the table on a device in `test_staged.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cuda_cases import COPIES, NHD, Copy, End, by, chunk, objects, pool, seed_bug
from support.cuda_on_cpu import argument_bytes
from support.device_cases import LONG, current, delay, on, settle
from support.direct_on_cpu import CPU, SMALL, Driver, Loads, Stores, compiled, installed, why_not
from support.each_backend import Elsewhere
from support.engine_cases import DOWNWARD
from support.foreign_cases import blind
from support.guarded_memory import filled, refused, tensors_in
from support.launches import launches

from portakv import CopyPlan, Index, KVView, TransferError, Unsupported
from portakv.backends.base import PEERS, Capabilities, Decision, Launch
from portakv.backends.rows_kernel import LOOKUPS
from portakv.interconnect import strategy as strategies
from portakv.interconnect import zero_copy
from portakv.interconnect.strategy import PINNED, Terms
from portakv.interconnect.strategy import SMALL as SMALL_BYTES
from portakv.interconnect.zero_copy import (
    BLOCKS,
    CUT,
    MAX_VECTORS,
    NAME,
    Cut,
    ZeroCopy,
    ZeroCopyKernel,
)
from portakv.registry.prepared import bring_table
from portakv.runtime import cuda
from portakv.runtime.kernel_cache import LOADED
from portakv.view import view as view_of

CUDA = torch.device("cuda", 0)
# One of them in every run.
WIDER = [pytest.param(n, marks=[pytest.mark.full] * (n != 90)) for n in (80, 90, 100)]
needs_nvrtc = pytest.mark.skipif(cuda.no_nvrtc() is not None, reason=str(cuda.no_nvrtc()))


@pytest.fixture
def driver() -> Iterator[Driver]:
    if why := why_not():
        pytest.skip(why)
    with installed() as result:
        yield result


@pytest.fixture(params=[Loads, Stores], ids=["loads", "stores"])
def strategy(request: pytest.FixtureRequest, driver: Driver) -> type[Stores]:
    result: type[Stores] = request.param
    return result


def between(copied: Copy, src: str, dst: str) -> CopyPlan:
    forms = (copied.src.view().form, copied.dst.view().form)
    steps = (copied.src.index().plan_step, copied.dst.index().plan_step)
    return CopyPlan(replace(forms[0], place=src), replace(forms[1], place=dst), *steps)


def launched(copied: Copy, prepared: Launch) -> int:
    """Launch after the library's checks, judge every byte and return the status word."""
    src = copied.src
    dst = copied.dst
    status = torch.zeros(1, dtype=torch.int64)
    ends = src.view(), dst.view(), src.index(), dst.index()
    copied.check(lambda: prepared(*ends, copied.count, None, status))
    return int(status)


def judged(copied: Copy, strategy: type[Stores], most: int | None = None) -> int:
    terms = Terms(max_thread_blocks=most)
    return launched(copied, strategy(CPU, terms=terms).prepare(copied.plan()))


# What it says


def test_devices_that_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ZeroCopy.probe(CPU).reason == "it copies between a device and the host"
    other = ZeroCopy.probe(torch.device("xpu", 0))
    assert other == Decision("zero_copy", False, "the CUDA driver does not serve xpu devices")
    monkeypatch.setattr(cuda, "why_not", lambda device: "update the driver")
    assert ZeroCopy.probe(CUDA).reason == "update the driver"
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    monkeypatch.setattr(cuda, "device_too_old", lambda device: "capability 6.0")
    assert ZeroCopy.probe(CUDA) == Decision("zero_copy", False, "capability 6.0")
    monkeypatch.setattr(cuda, "device_too_old", lambda device: None)
    assert ZeroCopy.probe(CUDA).accepted


def test_what_it_claims_and_that_narrow_vectors_are_told() -> None:
    strategy = ZeroCopy(CUDA)
    assert strategy.capabilities() == Capabilities(
        places=PINNED | PEERS, skips_negative=True, guards=True, capturable=True
    )
    for sides in (Loads.sides, Stores.sides):
        wide = strategy.check(between(COPIES["gather"](), *sides))
        assert wide == Decision("zero_copy", True, "takes the plan")
        narrow = strategy.check(between(COPIES["rows at an odd address"](), *sides))
        reason = "takes the plan, in vectors of 1 B: only 16 B fill the link"
        assert narrow == Decision("zero_copy", True, reason)
    for src, dst in (("device", "device"), ("pageable", "device"), ("device", "pageable")):
        decision = strategy.check(between(COPIES["gather"](), src, dst))
        assert decision.reason == f"it does not copy from {src} to {dst} memory"


# How a copy is cut


def large() -> Copy:
    """12,288 vectors: six blocks of 1024 threads with 2 each."""
    slots = list(range(256, 0, -1))
    cache = pool(blocks=65, layers=2, dim=48)
    return Copy(by(cache, slots), chunk(256, layers=2, dim=48), 256)


MEDIUM = Cut(threads=64, each=2)


@pytest.mark.parametrize(
    ("cut", "make", "terms", "blocks"),
    [(MEDIUM, large, None, BLOCKS), *((MEDIUM, large, most, most) for most in (1, 2, 3, 20)),
     (CUT, large, None, 6), (Cut(1024, 4, 2), large, None, 4), (CUT, COPIES["gather"], None, 1)],
    ids=["no terms", *(f"at most {most}" for most in (1, 2, 3, 20)), "fewer", "two planes", "one"],
)  # fmt: skip
@pytest.mark.usefixtures("driver")
def test_no_more_thread_blocks_than_the_terms_allow_and_have_something_to_do(
    cut: Cut, make: Callable[[], Copy], terms: int | None, blocks: int
) -> None:
    with installed(cut) as driver:
        assert judged(make(), Stores, terms) == 0
    assert driver.launches == [(blocks, cut.threads, 7)]


@pytest.mark.parametrize("terms", [Terms(), Terms("idle"), Terms(max_thread_blocks=5)], ids=str)
def test_beside_a_model_a_large_launch_has_few(strategy: type[Stores], terms: Terms) -> None:
    plan = between(COPIES["gather"](), *strategy.sides)
    direction = "h2d" if strategy is Loads else "d2h"
    most = terms.max_thread_blocks or BLOCKS
    computing = zero_copy.COMPUTING[direction] if terms == Terms() else most
    kernel = ZeroCopyKernel(plan, terms=terms)
    small = SMALL_BYTES[direction] // plan.token_bytes
    (few,) = launches(plan, kernel, small)
    (many,) = launches(plan, kernel, small + 1)
    assert (few.blocks, many.blocks) == (most, computing)


CUTS = [SMALL, Cut(), Cut(64, 4), Cut(2, 1), *(Cut(8, 4, planes) for planes in (2, 4, 5, 8))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("most", [1, 2, 7])
def test_every_cut(cut: Cut, most: int, strategy: type[Stores]) -> None:
    with installed(cut) as driver:
        for name in ("gather", "memory objects, blocks", "NZ", "rows at an odd address"):
            assert judged(COPIES[name](), strategy, most) == 0
        assert {threads for _, threads, _ in driver.launches} == {cut.threads}
        assert max(blocks for blocks, _, _ in driver.launches) <= most


def tall(tokens: int) -> Copy:
    """Planes of 2 vectors a token: numbers that no power of two divides."""
    slots = [(7 * n + 3) % 12 for n in range(tokens)]
    cache = End([filled((2, 3, 4, 2, 8)) for _ in range(3)], NHD, ids=slots)
    return Copy(cache, chunk(tokens), tokens)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 11, 12])
def test_planes_of_any_length(tokens: int, strategy: type[Stores]) -> None:
    """The kernel divides by the length of a plane, which only the launch knows."""
    assert judged(tall(tokens), strategy) == 0


@pytest.mark.parametrize(("most", "launches"), [(13, 23), (50, 6), (2000, 1)])
def test_a_copy_of_several_launches(
    most: int,
    launches: int,
    strategy: type[Stores],
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions are named by their place in the whole. A token is 12 vectors in 6 planes."""
    monkeypatch.setattr(zero_copy, "MAX_VECTORS", most)
    slots = [*range(11, -1, -1), *range(11)]
    slots[17] = 12
    copied = Copy(by(pool(), slots), chunk(23), 23)
    assert judged(copied, strategy) == 18
    assert len(driver.launches) == launches
    assert judged(replace(copied, count=0), strategy) == 0
    assert len(driver.launches) == launches, "nothing is no launch"


def test_a_unit_of_too_many_vectors(
    strategy: type[Stores], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_VECTORS <= 2**30  # `Divisor` is exact below
    monkeypatch.setattr(zero_copy, "MAX_VECTORS", 12)
    with refused(Unsupported, "12 vectors", "'staged'"):
        strategy(CPU).prepare(tall(3).plan())


def test_the_most_vectors_are_divided_exactly() -> None:
    """`Divisor` of native/host/direct.cuh is exact below 2^30."""
    assert MAX_VECTORS <= 2**30
    for divisor in [*range(1, 200), 641, 2**16 + 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 1]:
        shift = 30 + (divisor - 1).bit_length()
        factor = -(-(2**shift) // divisor)
        assert factor < 2**32
        last = divisor * (2**30 // divisor - 1)
        for number in (0, 1, 2, 3, 2**29, 2**30 - 2, 2**30 - 1, last - 1, last, last + 1):
            assert number * factor >> shift == number // divisor


@pytest.mark.usefixtures("driver")
def test_the_argument_is_as_the_kernel_takes_it() -> None:
    for name in ("gather", "scatter", "memory objects, blocks", "NZ blocks", "two nests"):
        plan = COPIES[name]().plan()
        for nest in range(len(plan.nests)):
            kernel = ZeroCopyKernel(plan, nest)
            library = compiled(kernel.source)
            assert library.argument_bytes() == argument_bytes(kernel.shape)
            # Of the six words of each request the table's is the second.
            assert (library.src_table_at(), library.dst_table_at()) == (8, 8 * 7)


def test_tables_of_the_host_lie_on_the_device(strategy: type[Stores]) -> None:
    """Its own table is cleared here: whatever reads it faults or moves wrong bytes."""
    source, target = (objects(), pool()) if strategy is Loads else (pool(), objects())
    copied = Copy(by(source, [11, 0, 5], 1), target, 3)
    plan = between(copied, *strategy.sides)
    shape = ZeroCopyKernel(plan).shape
    assert LOOKUPS[(shape.src if strategy is Loads else shape.dst).lookup] == "UNITS"
    assert judged(copied, strategy) == 0


def test_neighbours_on_the_hosts_side_are_walked_together(strategy: type[Stores]) -> None:
    hnd = End([filled((2, 3, 2, 4, 8)) for _ in range(3)], "layer | kv block head token dim")
    nhd = pool()
    for src, dst in ((hnd, nhd), (nhd, hnd)):
        copied = Copy(by(src, [2, 0], 4), by(dst, [1, 2], 4), 8)
        plan = between(copied, *strategy.sides)
        host = src if strategy is Loads else dst
        # Walked innermost: 2 heads of a token where the host has tokens first, else 4 tokens.
        inner = (4, 2) if host is nhd else (2, 4)
        assert ZeroCopyKernel(plan).shape.inner == inner
        assert judged(copied, strategy) == 0


# The copies above can fail

BUGS = {
    "every other strip": ("nth * blockDim.x +", "nth / 2 * 2 * blockDim.x +", "gather"),
    "the last vector is left out": ("at < all &&", "at + 1 < all &&", "blocks"),
    "past the end is moved too": ("write && in[nth] != row;", "write;", "pool to pool"),
    "strips with gaps": ("blockDim.x * Strips;", "blockDim.x * (Strips + 1);", "gather"),
    "one turn": ("start += gridDim.x * width", "start += all", "gather"),
    "a divisor rounded down": ("divisor - 1) / divisor", "0) / divisor", "gather"),
    "ids are always int64": ("request.wide ?", "true ?", "gather int32"),
    "a bad id has the wrong place": ("(i64)unit[nth] * copy.unit + 1", "1", "past the end"),
    "parts of an id are forgotten": (
        "known.first = (request.first + unit) % Shape::per_id;", "known.first = 0;",
        "several units of an id",
    ),
    "one plane": ("lengths.divide(Planes == 1 ? there : start)", "0", "gather"),
}  # fmt: skip
#: Bugs of several planes together.
PLANES_BUGS = {
    "one plane of several": ("group[nth] * Planes + more", "group[nth] * Planes", "gather"),
    "planes are not filled up": ("/ width * width;", "/ width;", "gather"),
    "a unit's entry is lost": ("UNITS ? place.entry", "UNITS ? none", "memory objects, blocks"),
}


@pytest.mark.parametrize("bug", [*BUGS, *PLANES_BUGS])
def test_a_seeded_bug_is_caught(
    bug: str, strategy: type[Stores], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, expected = seed_bug(monkeypatch, (BUGS | PLANES_BUGS)[bug], "host/direct.cuh")
    with installed(SMALL if bug in BUGS else Cut(8, 4, 4)), pytest.raises(AssertionError):
        assert judged(copied, strategy, 1) == expected


# What it asks of the driver, and of the host's memory


def test_nothing_is_loaded_during_capture(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stores(CPU)
    copied = COPIES["gather"]()
    with monkeypatch.context() as capturing:
        capturing.setattr(zero_copy, "capturing", lambda device: True)
        with refused(Unsupported, "make the same call once before the capture"):
            made.prepare(copied.plan())
    launched(copied, made.prepare(copied.plan()))
    driver.retained.clear()
    for module in (zero_copy, strategies):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    launched(copied, made.prepare(copied.plan()))
    assert driver.retained == [], "a graph's memory is its owner's"


def test_host_memory_is_held_until_the_copy_ended(strategy: type[Stores], driver: Driver) -> None:
    copied = COPIES["gather"]()
    assert judged(copied, strategy) == 0
    host = copied.src if strategy is Loads else copied.dst
    assert [[x.data_ptr() for x in retained] for retained in driver.retained] == [
        [x.data_ptr() for x in host.view().owners]
    ]
    driver.error = 700  # what was launched before may be under way
    with refused(TransferError, "700", "nothing was moved", watch=copied.dst.tensors):
        judged(copied, strategy)
    assert len(driver.retained) == 2


@pytest.mark.parametrize("reached", [True, False], ids=["mapped", "not mapped"])
def test_a_view_is_asked_until_it_is_reached(
    driver: Driver, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[int] = []

    def ask(address: int, device: torch.device) -> int:
        addresses.append(address)
        return address if reached else 64 * (len(addresses) - 1)  # nowhere, or elsewhere

    monkeypatch.setattr(zero_copy, "device_address", ask)
    copied = COPIES["gather"]()
    prepared = Stores(CPU).prepare(copied.plan())
    dst = copied.dst.view()
    ends = copied.src.view(), dst, copied.src.index(), Index(), copied.count
    for _ in range(3):
        if reached:
            prepared(*ends, None, None)
            continue
        expected = f"reaches it only at {64 * len(addresses):#x}" if addresses else "mapped=True"
        with refused(Unsupported, expected, "staged", watch=copied.dst.tensors):
            prepared(*ends, None, None)
    assert addresses == [dst.origins[0]] * (1 if reached else 3)
    assert len(driver.launches) == 3 * reached


def test_a_table_is_sent_once_and_waited_for_by_every_stream(accelerator: torch.device) -> None:
    view = objects().view()
    side = torch.Stream(accelerator)
    delay(current(accelerator))
    bring_table(view, accelerator)
    cached = view.table_on(accelerator)
    assert cached is not None
    with on(side):
        bring_table(view, accelerator, side)
        read = cached.clone()
    assert cached is view.table_on(accelerator)
    view.derived.clear()
    del cached  # the allocator knows which stream reads it
    rubbish = [torch.full_like(read, 7) for _ in range(4)]
    with on(side):
        assert read.tolist() == list(view.origins)
    del rubbish


def test_a_callers_table_is_held_for_the_stream_that_reads_it_first(
    accelerator: torch.device,
) -> None:
    made = objects()
    side = torch.Stream(accelerator)
    table = torch.tensor(made.view().origins).to(accelerator)
    view = KVView.at(
        table,
        "block | kv layer token (head dim)",
        shape=(2, 3, 4, 16),
        dtype=torch.float16,
        device="cpu",
        heads=2,
    )
    settle(accelerator)
    delay(side)
    bring_table(view, accelerator, side)
    cached = view.table_on(accelerator)
    assert cached is not None
    assert cached.data_ptr() == table.data_ptr()
    with on(side):
        read = table.clone()
    del table, cached, view
    rubbish = [torch.full_like(read, 7) for _ in range(4)]
    with on(side):
        assert read.tolist() == list(made.view().origins)
    del rubbish


def test_a_table_in_a_capture(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be there before; then nothing waits for what was enqueued outside."""
    view = objects().view()
    with monkeypatch.context() as inside:
        inside.setattr(view_of, "capturing", lambda device: True)
        with refused(Unsupported, "make the same call once before the capture"):
            bring_table(view, accelerator, captured=True)
    bring_table(view, accelerator)
    there = view.table_on(accelerator)
    monkeypatch.setattr(view_of, "capturing", lambda device: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", None)
    bring_table(view, accelerator, captured=True)
    assert view.table_on(accelerator) is there


@pytest.mark.parametrize("name", ["gather", "memory objects, blocks", "NZ"])
def test_a_table_that_only_the_device_has_is_read_where_it_is(
    strategy: type[Stores], driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Both sides have one, and the host never reads an address."""
    copied = COPIES[name]()
    status = torch.zeros(1, dtype=torch.int64)
    src = blind(copied.src.view())
    dst = blind(copied.dst.view())
    indices = copied.src.index(), copied.dst.index()
    plan = CopyPlan(src.form, dst.form, *(index.plan_step for index in indices))
    prepared = strategy(CPU).prepare(plan)
    # No allocator is notified of tables.
    monkeypatch.setattr(zero_copy, "capturing", lambda device: True)
    copied.check(lambda: prepared(src, dst, *indices, copied.count, None, status))
    assert not src.known
    assert not dst.known
    assert driver.launches


# What compilers make of the kernel


def kernels() -> list[ZeroCopyKernel]:
    chosen = {}
    for make in COPIES.values():
        plan = make().plan()
        for nest in range(len(plan.nests)):
            kernel = ZeroCopyKernel(plan, nest)
            shape = kernel.shape
            chosen[shape.vector, shape.src.lookup, shape.dst.lookup] = kernel
    assert {vector for vector, _, _ in chosen} == {16, 8, 4, 2, 1}
    return list(chosen.values())


_PTX = {16: ".v4.u32", 8: ".u64", 4: ".u32", 2: ".u16", 1: ".u8"}


@needs_nvrtc
def test_nvrtc_keeps_all_vectors_of_a_thread_in_registers() -> None:
    for kernel in kernels():
        text = cuda.compile_text(kernel.source, "compute_80").decode()
        assert text.count(".entry") == 1
        assert f".entry {NAME}(" in text
        assert f".maxntid {CUT.threads}" in text
        assert ".local" not in text
        stores = f"st.global{_PTX[kernel.shape.vector]}"
        assert text.count(f"{stores} ") + text.count(f"{stores}\t") == CUT.each
        assert "ld.u" not in text, "a generic load"


@needs_nvrtc
@pytest.mark.parametrize("architecture", WIDER)
def test_nvrtc_makes_machine_code(architecture: int) -> None:
    for kernel in kernels()[:4]:
        binary = cuda.compile_text(kernel.source, f"sm_{architecture}")
        assert binary.startswith(b"\x7fELF")


def test_nests_of_one_shape_have_one_text() -> None:
    def text(layers: int, tokens: int) -> str:
        plan = Copy(by(pool(layers=layers), [1, 0, 2][:tokens]), chunk(tokens, layers), tokens)
        made = plan.plan()
        return ZeroCopyKernel(made).source

    assert text(3, 2) == text(3, 3)
    assert text(3, 2) != text(2, 2), "the number of planes is in the text"


# On a CUDA device: real pinned memory, streams and graphs


@pytest.fixture(scope="module")
def gpu() -> ZeroCopy:
    decision = ZeroCopy.probe(CUDA)
    if not decision.accepted:
        pytest.skip(decision.reason)
    return ZeroCopy(CUDA)


def judged_there(copied: Copy, strategy: ZeroCopy, downward: bool) -> int:
    """Launch on the device, judge every byte and return the status word."""
    status = torch.zeros(1, dtype=torch.int64).pin_memory()

    def run() -> None:
        sides = [Elsewhere(CUDA), Elsewhere("pinned")][:: 1 if downward else -1]
        src, dst = (x.views(end)[0] for x, end in zip(sides, (copied.src, copied.dst), strict=True))
        indices = copied.src.index(), copied.dst.index()
        assert {src.form.place, dst.form.place} == {"device", "pinned"}
        launch = strategy.prepare(CopyPlan(src.form, dst.form, *(x.plan_step for x in indices)))
        torch.cuda.synchronize()
        dtypes = strategy.capabilities().index_dtypes
        src_index, dst_index = (x.placed(CUDA, dtypes) for x in indices)
        launch(src, dst, src_index, dst_index, copied.count, None, status)
        torch.cuda.synchronize()
        for side in sides:
            side.bring_back()

    copied.check(run)
    return int(status)


@pytest.mark.gpu
@DOWNWARD
def test_large_copies_in_many_turns(gpu: ZeroCopy, downward: bool) -> None:
    """15 MB in rows of 256 B; one block takes 225 turns."""
    slots = torch.randperm(256 * 4).tolist()[:960]
    for terms in (None, Terms(max_thread_blocks=1), Terms(max_thread_blocks=40)):
        chosen = gpu if terms is None else ZeroCopy(CUDA, terms=terms)
        paged = pool(layers=30, blocks=256, dim=64)
        dense = chunk(960, layers=30, dim=64)
        assert judged_there(Copy(by(paged, slots), dense, 960), chosen, downward) == 0
        assert judged_there(Copy(dense, by(paged, slots), 960), chosen, downward) == 0


@pytest.mark.gpu
@DOWNWARD
@pytest.mark.parametrize(("bad", "most"), [(12, 2**30), (2**31 - 1, 50), (2**63 - 1, 2**30)])
def test_bad_ids_move_nothing_and_are_told(
    gpu: ZeroCopy, bad: int, most: int, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_copy, "MAX_VECTORS", most)
    slots = [3, 1, -1, 7, bad, 11, 5, -(2**31)]
    assert judged_there(Copy(by(pool(), slots), chunk(8), 8), gpu, downward) == 5
    assert judged_there(Copy(chunk(8), by(pool(), slots), 8), gpu, downward) == 5


class Moved:
    def __init__(self, strategy: ZeroCopy, downward: bool, listed: bool) -> None:
        cache = torch.randint(-30000, 30000, (3, 2, 3, 4, 16), dtype=torch.int16)
        self.cache = cache.to(CUDA)
        host = objects() if listed else chunk(12)
        self.host = [x.clone().zero_().pin_memory() for x in tensors_in(host.tensors)]
        tensors = self.host if listed else self.host[0]
        paged = KVView(self.cache, "layer kv block token (head dim)", heads=2)
        dense = KVView(tensors, host.layout, **host.extents)
        step = Index(torch.tensor([1, 0, 2], device=CUDA), step=4)
        self.views = (paged, dense) if downward else (dense, paged)
        self.indices = (step, Index()) if downward else (Index(), step)
        steps = [x.plan_step for x in self.indices]
        plan = CopyPlan(self.views[0].form, self.views[1].form, *steps, reinterpret=True)
        self.downward = downward
        self._launch = strategy.prepare(plan)

    def launch(self, stream: Any = None) -> None:
        self._launch(*self.views, *self.indices, 12, stream, None)

    def rows(self) -> torch.Tensor:
        """Return the rows that the host should hold: ``[kv, layer, token, head dim]``."""
        expected = self.cache.cpu()[:, :, [1, 0, 2]].transpose(0, 1)
        return expected.reshape(2, 3, 12, 16)

    def landed(self) -> torch.Tensor:
        parts = [x.view(torch.int16).view(2, 3, -1, 16) for x in self.host]
        return torch.cat(parts, dim=2)


@pytest.fixture(params=[False, True], ids=["chunk", "objects"])
def listed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("on_side", [False, True])
def test_a_store_comes_behind_what_its_stream_holds_and_the_host_does_not_wait(
    gpu: ZeroCopy, listed: bool, on_side: bool
) -> None:
    """Nor at the first launch, which sends the table of addresses."""
    warm = Moved(gpu, True, listed)
    moved = Moved(gpu, True, listed)
    warm.launch()
    fresh = moved.cache.flip(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(CUDA) if on_side else None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        moved.cache.copy_(fresh)
        moved.launch(stream)
        assert not torch.cuda.current_stream().query(), "the launch blocked the host"
    torch.cuda.synchronize()
    assert torch.equal(moved.cache, fresh)
    assert torch.equal(moved.landed(), moved.rows())


@pytest.mark.gpu
@DOWNWARD
def test_a_replay_moves_what_is_there_then(gpu: ZeroCopy, listed: bool, downward: bool) -> None:
    moved = Moved(gpu, downward, listed)
    moved.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved.launch()
    for _ in range(3):
        for source in [moved.cache] if downward else moved.host:
            source.view(torch.int16).random_(-30000, 30000)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(moved.landed(), moved.rows())


@pytest.mark.gpu
def test_an_address_that_no_kernel_reaches() -> None:
    pageable = torch.zeros(4096)
    pinned = torch.zeros(4096).pin_memory()
    assert zero_copy.device_address(pinned.data_ptr() + 64, CUDA) == pinned.data_ptr() + 64
    reached = zero_copy.device_address(pageable.data_ptr(), CUDA)
    assert reached in (0, pageable.data_ptr()), "a device that reaches all memory may say so"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_kernel_starts_with_as_many_threads_as_it_is_cut_for(gpu: ZeroCopy) -> None:
    """Registers of all instances of the table allow a block, without local memory."""
    driver = cuda.bindings()
    attribute = driver.CUfunction_attribute
    for name in sorted(COPIES)[:12]:
        copied = COPIES[name]()
        (src,) = Elsewhere(CUDA).views(copied.src)
        (dst,) = Elsewhere("pinned").views(copied.dst)
        steps = (copied.src.index().plan_step, copied.dst.index().plan_step)
        gpu.prepare(CopyPlan(src.form, dst.form, *steps))
    for loaded in [made for (owner, _), made in LOADED.items() if owner is gpu._kernels]:
        for function in loaded.values():
            _, threads = driver.cuFuncGetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function
            )
            _, local = driver.cuFuncGetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function
            )
            assert int(threads) >= zero_copy.CUT.threads
            assert int(local) < 128, "what a thread has under way lies in registers"
