# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel, functionally emulated on a CPU: every byte against the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from support.command_line import registered
from support.core_cases import GIB, lazy, noise
from support.cuda_cases import COPIES, Copy, by, chunk, gathered, pool
from support.guarded_memory import filled, refused

from portakv import KVView, TransferError, Unsupported, copy_rows
from portakv.backends import _ascend_kernel
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.judging import index_of, view_of
from portakv_conformance.vendor import ascendc_emulated
from portakv_conformance.vendor.ascendc_emulated import SETTINGS, AscendC, Setting

CPU = torch.device("cpu")
_PROBED = AscendC.probe(CPU)
pytestmark = pytest.mark.skipif(not _PROBED.accepted, reason=_PROBED.reason)


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched, registered(**{AscendC.name: AscendC}):
        patched.delenv("PORTAKV_BACKEND", raising=False)
        yield


def copy(copied: Copy) -> None:
    """Copy as the library would."""
    src, dst = copied.src, copied.dst
    copy_rows(
        src.view(), dst.view(), src.index(), dst.index(), count=copied.count, backend=AscendC.name
    ).synchronize()


def launch(copied: Copy, told: bool = True) -> int:
    """Launch behind the library's checks; returns the status word."""
    src, dst = copied.src, copied.dst
    status = torch.zeros(1, dtype=torch.int64)
    AscendC(CPU).prepare(copied.plan())(
        src.view(), dst.view(), src.index(), dst.index(), copied.count, None,
        status if told else None,
    )  # fmt: skip
    return int(status)


def judged(copied: Copy, told: bool = True) -> int:
    """Launch and judge every byte; returns the status word."""
    found: list[int] = []
    copied.check(lambda: found.append(launch(copied, told)))
    return found[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", COPIES)
def test_every_byte_lands(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    copied = COPIES[name]()
    copied.check(lambda: copy(copied))


@given(all_cases())
def test_drawn_copies(case: Case) -> None:
    src, dst = view_of(case.src), view_of(case.dst)
    mine, theirs = index_of(case.src), index_of(case.dst)
    case.check(
        lambda: copy_rows(
            src, dst, mine, theirs, count=case.count, backend=AscendC.name
        ).synchronize()
    )


# Bad ids

WILD = [(torch.int32, 2**31 - 1), *((torch.int64, n) for n in (12, 2**31, 2**32 + 1, 2**63 - 1))]


@pytest.mark.parametrize(("dtype", "bad"), WILD, ids=lambda x: str(x))
@pytest.mark.parametrize("at", [0, 6])
def test_a_bad_id_moves_nothing_and_is_told(dtype: torch.dtype, bad: int, at: int) -> None:
    slots = [3, 1, -1, 7, 0, 11, 5, -(2**31)]
    slots[at] = bad
    for told in (True, False):
        gathers = Copy(by(pool(), slots, dtype=dtype), chunk(8), 8)
        scatters = Copy(chunk(8), by(pool(), slots, dtype=dtype), 8)
        assert [judged(gathers, told), judged(scatters, told)] == [at + 1 if told else 0] * 2


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ([1, 2**61, 0], [2, 1, 0], 5),  # a block of the source
        ([2, -1, 1], [0, 1, 2**63 - 1], 9),  # one of the destination
        ([3, 0, 1], [-1, 0, 1], 1),  # it is told although the other side skips it
    ],
)
def test_bad_blocks_on_either_side(mine: list[int], theirs: list[int], told: int) -> None:
    copied = Copy(by(pool(), mine, 4), by(pool(), theirs, 4), 12)
    assert copied.plan().unit == 4
    assert judged(copied) == told


def test_an_id_of_which_a_part_is_past_the_end() -> None:
    """Five blocks of 4 are two and a half of 8: the units past the end are told, others move."""
    copied = Copy(by(pool(blocks=5), [4, 0, 1, 3], 4), by(pool(blocks=5), [2, 0], 8), 16)
    assert copied.plan().unit == 4
    assert judged(copied) == 5


def test_of_several_bad_ids_one_is_told() -> None:
    slots = [12, 1, 13, 2, 99, 0, 5, 3]
    assert judged(Copy(by(pool(), slots), chunk(8), 8)) in (1, 3, 5)


# Far


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_past_two_and_four_gib(dtype: torch.dtype) -> None:
    cache = lazy(5 * GIB).as_strided((5, 4, 32), (GIB, 64, 1))
    cache.copy_(noise(5, 4, 32, dtype=torch.uint8))
    slots = torch.tensor([19, 0, 9, 16, 13], dtype=dtype)
    wanted, rows = cache.flatten(0, 1)[slots.long()], filled((5, 32), torch.uint8)
    paged, dense = KVView(cache, "block token dim"), KVView(rows, "token dim")
    copy_rows(paged, dense, slots, backend=AscendC.name).synchronize()
    assert torch.equal(rows, wanted)
    cache.zero_()
    copy_rows(dense, paged, None, slots, backend=AscendC.name).synchronize()
    assert torch.equal(cache.flatten(0, 1)[slots.long()], wanted)


def test_rows_farther_apart_than_a_transfer_can_say() -> None:
    """A gap of 4 GiB and more cannot be named by a transfer: the loop stays a loop."""
    far = lazy(5 * GIB).as_strided((2, 4, 32), (4 * GIB + 64, 64, 1))
    far.copy_(noise(2, 4, 32, dtype=torch.uint8))
    for source, axes in ((far, "head token dim"), (far.transpose(0, 1), "token head dim")):
        landed = filled(source.shape, torch.uint8)
        copy_rows(KVView(source, axes), KVView(landed, axes), backend=AscendC.name).synchronize()
        assert torch.equal(landed, source)


# What it refuses, and what the emulation tells


@pytest.mark.parametrize(("limit", "name"), [("MAX_LOOPS", "NZ blocks"), ("MAX_UNITS", "gather")])
def test_plans_with_more_than_the_arguments_hold(
    limit: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = COPIES[name]().plan()
    AscendC(CPU).prepare(plan)
    monkeypatch.setattr(_ascend_kernel, limit, 0)
    with refused(Unsupported, "the AscendC kernel takes", "reference"):
        AscendC(CPU).prepare(plan)


def test_it_says_that_it_is_emulated() -> None:
    assert ascendc_emulated.EMULATED
    assert AscendC.emulated
    assert "EMULATED" in _PROBED.reason
    assert not AscendC.probe(torch.device("meta")).accepted


def test_the_arguments_are_as_large_as_the_kernel_says() -> None:
    library = ascendc_emulated.library()
    plan = COPIES["gather"]().plan()
    arguments = _ascend_kernel.Arguments(plan)
    assert [len(nest) for nest in arguments.nests] == [library.portakv_emulated_nest_bytes()]
    case = COPIES["gather"]()
    sides = (case.src.view(), case.src.index()), (case.dst.view(), case.dst.index())
    (copied,) = arguments.copies([1], *sides, case.count, 0)
    assert len(copied) == library.portakv_emulated_copy_bytes()


def test_memory_that_was_not_given_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination said to be shorter than it is: the first byte past its end is told."""
    monkeypatch.setattr(
        _ascend_kernel, "_spans",
        lambda view, writable: [(first, past - first - 1, 1) for first, past in view.spans],
    )  # fmt: skip
    copied = gathered(64)
    with refused(TransferError, "emulated AscendC kernel", "lies in no allocation"):
        launch(copied)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (Setting(0, 4096, 0), "no core"),
        (Setting(1, 512, 0), "ask the platform"),
    ],
)
def test_launches_that_cannot_be_right(
    setting: Setting, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    copied = gathered(64)
    with refused(TransferError, told, watch=copied.dst.tensors):
        launch(copied)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ascendc_emulated.FLAGS, "-Dportakv=1")
    with refused(Unsupported, "g++ failed", "error"):
        ascendc_emulated.library_file.__wrapped__()
