# SPDX-License-Identifier: Apache-2.0
"""The kernels of `cuda` and `hip` that pack and unpack, byte for byte: on the host, where g++
compiles them, and on a GPU. What they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import registered
from support.cuda_on_cpu import why_not
from support.launches import pack_launches
from support.pack_on_cpu import HostPackDriver, PackOnCpu, Rows, by_block

from portakv import Index, KVView, TransferError
from portakv.backends.base import Backend
from portakv.backends.cuda import Cuda
from portakv.plan.packing import PackPlan
from portakv.runtime.hip import Card, Driver
from portakv_conformance.judge.slots import usual_slot
from portakv_conformance.vendor.hip_emulated import HipEmulated, HostCard, compiler

CPU = torch.device("cpu")
HND = "layer | kv block head token dim"
needs_compiler = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.xdist_group("cuda-on-cpu"),
]
#: One of each kind of kernel: a warp a plane, a part of a segment, and several warps with a sampled
#: table; then other layouts, widths and slots.
FEW = [
    Rows(16, 128),
    Rows(16, 16, layout="layer | block kv head token dim", bits=3),
    Rows(16, 576, heads=1, kv=1, layout="layer | block token dim", bits=3),
]
WIDER = [
    Rows(16, 128, bits=3),
    Rows(16, 128, layout="layer | block token head (kv dim)"),
    Rows(16, 128, layout="layer | block kv head token dim", slot=4096),
    Rows(5, 64, bits=3),
    Rows(16, 96, layout=HND),
    Rows(32, 128),
    Rows(48, 128, layout=HND, bits=3),
    Rows(64, 128, layout="layer | block kv token head dim"),
    Rows(128, 128, heads=1, layout=HND, bits=3),
    Rows(256, 128, heads=1),
    Rows(16, 576, heads=1, kv=1, layout="layer | block token dim"),
    Rows(64, 576, heads=1, kv=1, layout="layer | block token dim"),
    Rows(384, 128, heads=1, layers=1, bits=3),
]


def _name(rows: Rows) -> str:
    return f"{rows.tokens}x{rows.dim}-{rows.bits}bits-{rows.layout.partition('|')[2].strip()}"


def _cases() -> Iterator[Any]:
    for rows in FEW:
        yield pytest.param("cpu", rows, marks=needs_compiler, id=f"cpu-{_name(rows)}")
    for rows in WIDER:
        marks = [*needs_compiler, pytest.mark.full]
        yield pytest.param("cpu", rows, marks=marks, id=f"cpu-{_name(rows)}")
    for rows in FEW + WIDER:
        yield pytest.param("cuda:0", rows, marks=pytest.mark.gpu, id=f"cuda-{_name(rows)}")


@pytest.fixture(scope="module", autouse=True)
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Register the backend of the host; a separate cache on disk holds the kernels."""
    with pytest.MonkeyPatch.context() as patched, registered(**{PackOnCpu.name: PackOnCpu}):
        patched.setenv("PORTAKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


class Case:
    """Blocks in memory of a device: some positions of a copy name them, others name no block."""

    def __init__(self, device: str, rows: Rows, backend: Backend | None = None) -> None:
        self.rows = rows
        self.device = torch.device(device)
        self.backend = backend or (Cuda if self.device.type == "cuda" else PackOnCpu)(self.device)
        self.values = rows.values(most=16)
        self.blocks = len(self.values)
        self.slots, self.flags = rows.slots(self.values)
        # Positions in any order, one that is skipped, and one past the end.
        random = np.random.default_rng(3)
        self.order = random.permutation(self.blocks)
        self.ids = [*self.order.tolist(), -1, self.blocks + 1]
        self.overflowing = np.append(self.flags[self.order].any(1), [False, False])

    def run(self, src: KVView, dst: KVView, src_ids: Any, dst_ids: Any) -> tuple[int, np.ndarray]:
        """Copy the blocks at all positions; return the status word and the overflow words."""
        size = self.rows.tokens
        steps = [0 if ids is None else size for ids in (src_ids, dst_ids)]
        plan = PackPlan(src.form, dst.form, *steps)
        assert self.backend.check_pack(plan).accepted
        launch = self.backend.prepare_pack(plan)
        src_index, dst_index = (
            Index() if ids is None else Index(torch.tensor(ids, device=self.device), step=size)
            for ids in (src_ids, dst_ids)
        )
        pinned = self.device.type == "cuda"
        status = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        overflow = torch.zeros(len(self.ids), dtype=torch.int32, pin_memory=pinned)
        count = len(self.ids) * size
        launch(src, dst, src_index, dst_index, count, None, status, overflow)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return int(status), overflow.numpy()

    def pack(self) -> tuple[np.ndarray, int, np.ndarray]:
        """Return the slots by position, and the words."""
        raw = self.rows.raw_view(self.rows.tensors(self.values, self.device))
        out = np.full((len(self.ids), *self.slots.shape[1:]), 0xA5, np.uint8)
        slots = torch.from_numpy(out).to(self.device)
        words = self.run(raw, self.rows.packed_view(slots), self.ids, None)
        return slots.cpu().numpy(), *words

    def unpack(self, slots: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """Return the bytes of the written tensors by block, and the words."""
        tensors = self.rows.tensors(np.full_like(self.values, 0x5A5A), self.device)
        packed = self.rows.packed_view(torch.from_numpy(slots).to(self.device))
        places = [*range(self.blocks), self.blocks, self.blocks + 1]
        words = self.run(packed, self.rows.raw_view(tensors), places, self.ids)
        return self.by_block(tensors), *words

    def by_block(self, tensors: list[torch.Tensor]) -> np.ndarray:
        """Return the values of all layers by block."""
        layers = [x.flatten(1) for x in by_block(tensors, self.rows)]
        return torch.stack(layers, 1).cpu().numpy()

    @property
    def bad(self) -> int:
        """The status word for the position that is past the end."""
        return (self.blocks + 1) * self.rows.tokens + 1


def _pack_faults(case: Case) -> str:
    """Return what is wrong with packed slots and the words of the copy; empty if all is right."""
    slots, status, overflow = case.pack()
    if status != case.bad or (overflow != case.overflowing).any():
        return f"words: {status}, {overflow}"
    if (slots[case.blocks :] != 0xA5).any():
        return "a position without a block was written"
    wrong = np.argwhere((slots[: case.blocks] != case.slots[case.order]).any(2))
    return f"slots: {wrong}" if len(wrong) else ""


def _unpack_faults(case: Case) -> str:
    """Return the same for rows, of which those of flagged slots keep their bytes."""
    more = np.full((2, *case.slots.shape[1:]), 0xA5, np.uint8)
    written, status, overflow = case.unpack(np.concatenate([case.slots[case.order], more]))
    if status != case.bad or (overflow != case.overflowing).any():
        return f"words: {status}, {overflow}"
    kept = np.where(case.flags[:, :, None], np.uint16(0x5A5A), case.values)
    wrong = np.argwhere(written != case.by_block(case.rows.tensors(kept, case.device)))
    return f"rows: {wrong}" if len(wrong) else ""


@pytest.mark.parametrize(("device", "rows"), [*_cases()])
def test_every_byte_is_as_the_format_says(device: str, rows: Rows) -> None:
    case = Case(device, rows)
    assert not _pack_faults(case)
    assert not _unpack_faults(case)


class Backwards(HostPackDriver):
    """Lanes run from the last to the first."""

    backwards = True


def _on_host(driver: type[HostPackDriver]) -> Backend:
    altered: type[PackOnCpu] = type("Altered", (PackOnCpu,), {"driver": driver})
    return altered(CPU)


@pytest.mark.parametrize(
    "rows", [FEW[0], pytest.param(WIDER[5], marks=pytest.mark.full)], ids=_name
)
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.xdist_group("cuda-on-cpu")
def test_no_lane_depends_on_another_being_in_step(rows: Rows) -> None:
    backward = Case("cpu", rows, _on_host(Backwards))
    assert not _pack_faults(backward)
    assert not _unpack_faults(backward)


def _reads_outside(rows: Rows, device: str, backend: Backend | None = None) -> bool:
    """Return True if rows from slots of any bytes depend on the bytes of their neighbours."""
    case = Case(device, rows, backend)
    random = np.random.default_rng(9)
    shape = (case.blocks + 2, *case.slots.shape[1:])
    slots = random.integers(0, 256, shape, np.uint8)
    slots[..., case.rows.shape.head + 15] = 0
    others = random.integers(0, 256, shape, np.uint8)
    others[:, ::2] = slots[:, ::2]
    # The layout has planes whole, in the order of the slots.
    one, other = (case.unpack(each)[0].reshape(case.values.shape) for each in (slots, others))
    return bool((one[:, ::2] != other[:, ::2]).any())


_DAMAGED = [FEW[1], Rows(16, 576, kv=1, layers=1, layout="layer | block head token dim", bits=3)]


@pytest.mark.parametrize(
    ("device", "rows"),
    [
        pytest.param("cpu", _DAMAGED[0], marks=needs_compiler),
        pytest.param("cpu", _DAMAGED[1], marks=[*needs_compiler, pytest.mark.full]),
        *(pytest.param("cuda:0", rows, marks=pytest.mark.gpu) for rows in _DAMAGED),
    ],
)
def test_damaged_slots_are_read_inside_only(device: str, rows: Rows) -> None:
    assert not _reads_outside(rows, device)


@pytest.mark.full
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.xdist_group("cuda-on-cpu")
def test_a_kernel_that_trusts_the_number_of_escapes_is_caught() -> None:
    trusting = _altered(
        "const u32 place = rank < F::cap ? rank : F::cap - 1;", "const u32 place = rank;"
    )
    assert _reads_outside(_DAMAGED[0], "cpu", trusting)


def _altered(text: str, other: str) -> Backend:
    return _on_host(type("Text", (HostPackDriver,), {"text": ((text, other),)}))


#: Errors of a kernel by name, as a text and its replacement.
PACK_MUTANTS = {
    "escapes of a thread in reverse": (
        "F::escapes_at + rank++, (u8)",
        "F::escapes_at + rank + __popc(mask) - 1, (u8)",
    ),
    "the last escape is lost": ("at = total + warp * 32", "at = total - 1 + warp * 32"),
    "one escape too many fits": ("if (total > F::cap) {", "if (total > F::cap + 1) {"),
    "one escape too few fits": ("if (total > F::cap) {", "if (total >= F::cap) {"),
    "no count across segments": ("if (nth == warp) start = total;", ""),
    "equal counts by the smaller exponent": (
        "rank += shared.ranked[other] > key;",
        "rank += (shared.ranked[other] ^ 255) > (key ^ 255);",
    ),
    "at most 32 exponents": ("if (found <= 32) {", "if (true) {"),
    "other values are sampled": ("(at + at / 16) & 7;", "at & 7;"),
    "the sign of zero is lost": (
        "rest = merge(0x80808080u, high, low);",
        "rest = merge(0x80808080u, exponents, low);",
    ),
    "counts of the block before": ("shared.counts[at] = 0;", "{}"),
    "an overflow keeps the codes": ("clear_slot<F>(slot, warp", "if (0) clear_slot<F>(slot, warp"),
    "no word for an overflow": ("if (argument.overflow) argument.overflow[plane.unit] = 1;", ""),
    "two words of codes change places": (
        "const u32 low = of_lane(bits, from & 31);",
        "const u32 low = of_lane(bits, (from ^ 1) & 31);",
    ),
}
UNPACK_MUTANTS = {
    "no count across segments": ("if (warp) start = load", "if (warp > 1) start = load"),
    "half a table": (
        "const u32 high = choose(table[2], table[3], which);",
        "const u32 high = low;",
    ),
    "the flag is ignored": ("if (table[3] >> 24) {", "if (false) {"),
    "escapes begin one too late": (
        "field(fields[round / 3], round) - __popc(mask);",
        "field(fields[round / 3], round) - __popc(mask) / 2;",
    ),
    "the sign of zero is lost": (
        "const u32 high = merge(0x80808080u, rest, exponents >> 1);",
        "const u32 high = exponents >> 1;",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("faults", "text"),
    [
        *(pytest.param(_pack_faults, x, id=f"pack: {name}") for name, x in PACK_MUTANTS.items()),
        *(pytest.param(_unpack_faults, x, id=f"unpack: {n}") for n, x in UNPACK_MUTANTS.items()),
    ],
)
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.xdist_group("cuda-on-cpu")
def test_every_mutant_is_caught(faults: Callable[[Case], str], text: tuple[str, str]) -> None:
    rows = (FEW[0], FEW[2])
    assert any(faults(Case("cpu", each, _altered(*text))) for each in rows)


needs_hip = [
    pytest.mark.skipif(compiler() is None, reason="the fake HIP driver needs g++"),
    pytest.mark.xdist_group("hip"),
]


@pytest.mark.parametrize(
    "rows",
    [
        *(pytest.param(rows, marks=needs_hip, id=_name(rows)) for rows in FEW),
        *(pytest.param(x, marks=[*needs_hip, pytest.mark.full], id=_name(x)) for x in WIDER),
    ],
)
def test_every_byte_of_the_text_for_amd(rows: Rows) -> None:
    case = Case("cpu", rows, HipEmulated(CPU))
    assert not _pack_faults(case)
    assert not _unpack_faults(case)


#: Errors in what is for AMD's compiler alone, as a text and its replacement.
AMD_MUTANTS = {
    "lanes do not wait for each other": ("__builtin_amdgcn_wave_barrier();", ""),
    "the other half of a wave votes": (
        "(u32)(__ballot(bit) >> (__lane_id() & 32))",
        "(u32)(__ballot(bit) >> (~__lane_id() & 32))",
    ),
    "half of the lanes are added": (
        "step = 16; step; step /= 2) value",
        "step = 8; step; step /= 2) value",
    ),
    "the last lane for any": ("return __shfl(value, lane, 32);", "return __shfl(value, 31, 32);"),
    "a lane of the whole wave": (
        "return __shfl(value, lane, 32);",
        "return __shfl(value, lane, 64);",
    ),
    "sums of both halves": (
        "value += __shfl_xor(value, step, 32);",
        "value += __shfl_xor(value, 2 * step, 64);",
    ),
    "one lane below for any": ("__shfl_up(value, by, 32)", "__shfl_up(value, 1, 32)"),
    "the larger of half of the lanes": (
        "step = 16; step; step /= 2) {",
        "step = 8; step; step /= 2) {",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("mutant", [pytest.param(x, marks=needs_hip) for x in AMD_MUTANTS])
def test_every_mutant_of_the_text_for_amd_is_caught(mutant: str) -> None:
    right, wrong = AMD_MUTANTS[mutant]

    class Altered(HostCard):
        def load(self, source: str, names: Iterable[str]) -> dict[str, object]:
            assert source.count(right) == 1
            return super().load(source.replace(right, wrong), names)

    class AlteredHip(HipEmulated):
        @staticmethod
        def find_card(device: torch.device, driver: Driver) -> Card:
            return Altered(device, driver)

    def is_caught(find: Callable[[Case], str], rows: Rows) -> bool:
        try:
            return bool(find(Case("cpu", rows, AlteredHip(CPU))))
        except TransferError:  # threads wait in different places
            return True

    finds = (_pack_faults, _unpack_faults)
    assert any(is_caught(find, rows) for rows in (FEW[0], FEW[2]) for find in finds)


@pytest.mark.parametrize("rows", [Rows(16, 128), Rows(384, 128, heads=1)], ids=_name)
def test_no_launch_has_more_threads_than_hip_takes(rows: Rows) -> None:
    """Fewer than 2^32; ids that are skipped count, too."""
    plan = _plan(rows.raw_view(rows.tensors(rows.values(0), CPU)))
    launches = pack_launches(plan, 3_000_000_000)
    assert sum(each.units for each in launches) == 3_000_000_000
    assert all(one.start + one.units == after.start for one, after in pairwise(launches))
    assert all(each.blocks * each.threads < 2**32 for each in launches)
    assert launches[0].blocks * launches[0].threads > 2**32 - 2**20  # no more than needed


def _plan(raw: KVView, packs: bool = True) -> PackPlan:
    """Return the plan of packing or unpacking whole blocks of a view, at random."""
    size = raw.form.block_size
    heads = raw.form.heads
    layers = raw.form.layers
    kv = raw.form.kv
    dim = raw.form.token_bytes // (2 * heads * layers * kv)
    shape = usual_slot(size * dim, 4)
    slots = torch.zeros((3, layers, kv, heads, shape.slot_bytes), dtype=torch.uint8)
    packed = Rows(size, dim, heads, layers, kv).packed_view(slots)
    src, dst = (raw, packed) if packs else (packed, raw)
    return PackPlan(src.form, dst.form, size, size)


@pytest.mark.parametrize("packs", [True, False])
def test_rows_that_the_kernels_do_not_take_are_refused_with_a_reason(packs: bool) -> None:
    backend = _on_host(HostPackDriver)
    taken = Rows(16, 128).raw_view(Rows(16, 128).tensors(Rows(16, 128).values(0), CPU))
    assert backend.check_pack(_plan(taken, packs)).accepted
    narrow = KVView(
        torch.zeros(1, 2, 3, 16, 2, 100, dtype=torch.bfloat16), "layer kv block token head dim"
    )
    decision = backend.check_pack(_plan(narrow, packs))
    assert not decision.accepted
    assert decision.reason == "it needs 16 B alignment and the plan allows 8 B"
