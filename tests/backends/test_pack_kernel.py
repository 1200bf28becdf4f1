# SPDX-License-Identifier: Apache-2.0
"""The kernels of `cuda` that pack and unpack, byte for byte: on the host, where g++ compiles them,
and on a GPU. What they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import registered
from support.cuda_on_cpu import why_not
from support.pack_on_cpu import HostPackDriver, PackOnCpu, Rows, by_block

from portakv import Index, KVView
from portakv.backends.base import Backend
from portakv.backends.cuda import Cuda
from portakv.backends.pack_kernel import refusal
from portakv.plan.packing import PackPlan

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
    Rows(16, 16, layout=HND, bits=3),
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
        indices = [
            Index() if ids is None else Index(torch.tensor(ids, device=self.device), step=size)
            for ids in (src_ids, dst_ids)
        ]
        status = torch.zeros(1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        overflow = torch.zeros(len(self.ids), dtype=torch.int32, device=self.device)
        count = len(self.ids) * size
        launch(src, dst, *indices, count, None, status, overflow)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return int(status), overflow.cpu().numpy()

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


@pytest.mark.parametrize(("device", "rows"), [*_cases()])
def test_every_byte_is_as_the_format_says(device: str, rows: Rows) -> None:
    case = Case(device, rows)
    slots, status, overflow = case.pack()
    assert status == case.bad
    assert overflow.tolist() == case.overflowing.astype(int).tolist()
    wrong = (slots[: case.blocks] != case.slots[case.order]).any(2)
    assert not wrong.any(), np.argwhere(wrong)
    assert (slots[case.blocks :] == 0xA5).all()

    written, status, overflow = case.unpack(slots)
    assert status == case.bad
    assert overflow.tolist() == case.overflowing.astype(int).tolist()
    kept = np.where(case.flags[:, :, None], np.uint16(0x5A5A), case.values)
    expected = case.by_block(rows.tensors(kept, case.device))
    assert (written == expected).all()


class Backwards(HostPackDriver):
    """Lanes run from the last to the first."""

    backwards = True


def _on_host(driver: type[HostPackDriver]) -> Backend:
    return type("Altered", (PackOnCpu,), {"driver": driver})(CPU)


@pytest.mark.parametrize(
    "rows", [FEW[0], pytest.param(WIDER[5], marks=pytest.mark.full)], ids=_name
)
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_no_lane_depends_on_another_being_in_step(rows: Rows) -> None:
    forward = Case("cpu", rows)
    backward = Case("cpu", rows, _on_host(Backwards))
    slots = forward.pack()[0]
    assert (backward.pack()[0] == slots).all()
    assert (backward.unpack(slots)[0] == forward.unpack(slots)[0]).all()
