# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernel's text does, run on the host: every byte against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support.command_line import registered
from support.core_cases import GIB, lazy, noise
from support.cuda_cases import COPIES, Copy, by, chunk, gathered, pool
from support.cuda_on_cpu import FLAGS, CudaOnCpu, why_not
from support.guarded_memory import filled, refused

from portakv import KVView, Unsupported, copy_rows
from portakv.backends import rows_kernel
from portakv.backends.rows_kernel import RowsKernel
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.judging import index_of, view_of

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True, params=[1, 2])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """As a backend, with so many vectors a thread, prefetching in the smallest copies."""
    with pytest.MonkeyPatch.context() as patched, registered(**{CudaOnCpu.name: CudaOnCpu}):
        patched.delenv("PORTAKV_BACKEND", raising=False)
        patched.setattr(rows_kernel, "TUNING", (rows_kernel.Tuning(0, request.param, 48),))
        yield


def copy(copied: Copy) -> None:
    """Copy as the library would."""
    src, dst = copied.src, copied.dst
    copy_rows(
        src.view(), dst.view(), src.index(), dst.index(), count=copied.count,
        backend=CudaOnCpu.name,
    ).synchronize()  # fmt: skip


def launch(copied: Copy, told: bool = True) -> int:
    """Launch behind the library's checks; returns the status word."""
    src, dst = copied.src, copied.dst
    status = torch.zeros(1, dtype=torch.int64)
    CudaOnCpu(CPU).prepare(copied.plan())(
        src.view(), dst.view(), src.index(), dst.index(), copied.count, None,
        status if told else None,
    )  # fmt: skip
    return int(status)


def judged(copied: Copy, told: bool = True) -> int:
    """Launch and judge every byte; returns the status word."""
    found: list[int] = []
    copied.check(lambda: found.append(launch(copied, told)))
    return found[0]


@pytest.mark.parametrize("name", COPIES)
def test_every_byte_lands(name: str) -> None:
    copied = COPIES[name]()
    copied.check(lambda: copy(copied))


@given(all_cases())
def test_drawn_copies(case: Case) -> None:
    src, dst = view_of(case.src), view_of(case.dst)
    mine, theirs = index_of(case.src), index_of(case.dst)
    case.check(
        lambda: copy_rows(
            src, dst, mine, theirs, count=case.count, backend=CudaOnCpu.name
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


# Far and large


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_past_two_and_four_gib(dtype: torch.dtype) -> None:
    cache = lazy(5 * GIB).as_strided((5, 4, 32), (GIB, 64, 1))
    cache.copy_(noise(5, 4, 32, dtype=torch.uint8))
    slots = torch.tensor([19, 0, 9, 16, 13], dtype=dtype)
    wanted, rows = cache.flatten(0, 1)[slots.long()], filled((5, 32), torch.uint8)
    paged, dense = KVView(cache, "block token dim"), KVView(rows, "token dim")
    copy_rows(paged, dense, slots, backend=CudaOnCpu.name).synchronize()
    assert torch.equal(rows, wanted)
    cache.zero_()
    copy_rows(dense, paged, None, slots, backend=CudaOnCpu.name).synchronize()
    assert torch.equal(cache.flatten(0, 1)[slots.long()], wanted)


def test_strides_past_four_gib_inside_a_unit_and_between_planes() -> None:
    far = lazy(5 * GIB).as_strided((5, 4, 32), (GIB, 64, 1))
    far.copy_(noise(5, 4, 32, dtype=torch.uint8))
    for source, axes in ((far, "layer token dim"), (far.transpose(0, 1), "token head dim")):
        landed = filled(source.shape, torch.uint8)
        copy_rows(KVView(source, axes), KVView(landed, axes), backend=CudaOnCpu.name).synchronize()
        assert torch.equal(landed, source)


@pytest.mark.parametrize("most", [8, 100])
def test_a_copy_of_several_launches(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are named by their place in the whole."""
    monkeypatch.setattr(rows_kernel, "_MAX_VECTORS", most)
    slots = [*range(11, -1, -1), *range(11)]
    slots[17] = 12
    copied = Copy(by(pool(), slots), chunk(23), 23)
    plan = copied.plan()
    spans = RowsKernel(plan.nests[0], plan).spans(23)
    assert len(spans) == {8: 8, 100: 1}[most]
    assert judged(copied) == 18


# What it refuses


@pytest.mark.parametrize(
    ("limit", "name"), [("MAX_OUTER", "gather"), ("MAX_INNER", "NZ blocks"),
                        ("MAX_UNITS", "split tokens"), ("MAX_PLANES", "blocks")]
)  # fmt: skip
def test_plans_with_more_than_the_arguments_hold(
    limit: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = COPIES[name]().plan()
    CudaOnCpu(CPU).prepare(plan)
    monkeypatch.setattr(rows_kernel, limit, 1)
    with refused(Unsupported, "the kernel takes", "reference"):
        CudaOnCpu(CPU).prepare(plan)


def test_a_view_of_more_units_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_kernel, "_MAX_NUMBERS", 11)
    copied = gathered(48)
    with refused(Unsupported, "12 tokens", "reference", watch=copied.dst.tensors):
        copy(copied)
    fits = Copy(by(pool(), [2, 1], 4), chunk(8), 8)  # 3 units of 4
    fits.check(lambda: copy(fits))


# The copies above can fail

# What a bug replaces, by what, and a copy that shows it without leaving the memory around its rows.
BUGS = {
    "ids are always int64": ("request.wide ?", "true ?", "gather int32"),
    "the first position is forgotten": ("request.first + unit;", "unit;", "slots to an id"),
    "a slot past the end is moved": ("if (found >= request.limit)", "if (false)", "past the end"),
    "a bad id is told at the wrong place": ("(i64)unit * copy.unit + 1", "unit", "past the end"),
    "one table for both sides": ("copy.dst_table, to", "copy.src_table, to", "pool to pool"),
    "units run backwards": ("+ at % Shape::per_id", "+ 1 - at % 2", "several units of an id"),
    "inner loops run across": ("(at / below) * stride", "(at % First) * stride", "NZ blocks"),
    "the last vector is left out": ("if (at >= all)", "if (at + 1 >= all)", "blocks"),
    "every other plane": ("plane = blockIdx.y;", "plane = blockIdx.y / 2 * 2;", "scatter"),
    "a prefetch of another place": ("+ (i64)(in % Run) * Bytes);", "+ (1 << 20));", "gather"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, name = BUGS[bug]
    text = rows_kernel.kernel_text()
    assert right in text, "the kernel's text has changed: seed the bug anew"
    monkeypatch.setattr(rows_kernel, "kernel_text", lambda *_: text.replace(right, wrong, 1))
    past = Copy(by(pool(), [3, 1, 12, 11]), chunk(4), 4)
    copied = past if name == "past the end" else COPIES[name]()
    told = 3 if copied is past else 0
    with pytest.raises(AssertionError):
        assert judged(copied) == told


# Under sanitizers


def _sanitizer() -> str | None:
    """The runtime that has to be loaded before anything else."""
    asked = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    library = asked.stdout.strip()
    return library if os.path.isabs(library) else None


@pytest.mark.full
def test_the_kernel_is_clean_under_sanitizers() -> None:
    """Reads and writes outside of ids, tables and arguments; misaligned or overflowing ones."""
    library = _sanitizer()
    if library is None:
        pytest.skip("g++ has no address sanitizer")
    if FLAGS in os.environ:
        pytest.skip("this is the run under sanitizers")
    environment = {
        **os.environ,
        FLAGS: "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    some = "bad or several or blocks or objects or planes or split"
    words = [
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-k",
        f"({some}) and not seeded",
        Path(__file__).name,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=Path(__file__).parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
