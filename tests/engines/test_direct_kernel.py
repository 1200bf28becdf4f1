# SPDX-License-Identifier: Apache-2.0
"""How the kernel of `direct` cuts a copy, run on the host both ways; bugs in it are noticed.

What holds of every kernel alike is judged in `tests/backends/test_every_backend.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.cuda_cases import COPIES, NHD, Copy, End, by, chunk, objects, pool
from support.direct_on_cpu import (
    CPU,
    SMALL,
    DirectOnCpu,
    Driver,
    Loads,
    Stores,
    compiled,
    installed,
    why_not,
)
from support.guarded_memory import filled, refused

from portakv import CopyPlan, Unsupported
from portakv.backends import rows_kernel
from portakv.engines import direct
from portakv.engines.direct import MAX_VECTORS, Cut, DirectKernel
from portakv.engines.engine import Terms

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module", autouse=True, params=[Loads, Stores])
def engine(request: pytest.FixtureRequest) -> Iterator[type[DirectOnCpu]]:
    with installed():
        yield request.param


@pytest.fixture
def driver(engine: type[DirectOnCpu]) -> Iterator[Driver]:
    """Another driver, that has seen nothing."""
    with installed() as found:
        yield found


def judged(copied: Copy, engine: type[DirectOnCpu], terms: Terms | None = None) -> int:
    """Launch behind the library's checks and judge every byte; returns the status word."""
    src, dst, status = copied.src, copied.dst, torch.zeros(1, dtype=torch.int64)
    launch = engine(CPU, terms=terms).prepare(copied.plan())
    ends = src.view(), dst.view(), src.index(), dst.index()
    copied.check(lambda: launch(*ends, copied.count, None, status))
    return int(status)


CUTS = [SMALL, Cut(), Cut(threads=64, each=4, strip=32), Cut(threads=2, each=1, strip=1)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("most", [1, 2, 7])
def test_every_cut(cut: Cut, most: int, engine: type[DirectOnCpu]) -> None:
    """Turns, strips and blocks in all proportions to the copy."""
    with installed(cut) as driver:
        for name in ("gather", "memory objects, blocks", "NZ", "rows at an odd address"):
            assert judged(COPIES[name](), engine, terms=Terms(max_thread_blocks=most)) == 0
        assert {threads for _, threads, _ in driver.launches} == {cut.threads}
        assert max(blocks for blocks, _, _ in driver.launches) <= most


def tall(tokens: int) -> Copy:
    """Planes of 2 vectors a token: numbers that no power of two divides."""
    slots = [(7 * n + 3) % 12 for n in range(tokens)]
    cache = End([filled((2, 3, 4, 2, 8)) for _ in range(3)], NHD, ids=slots)
    return Copy(cache, chunk(tokens), tokens)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 11, 12])
def test_planes_of_any_length(tokens: int, engine: type[DirectOnCpu]) -> None:
    """What is divided by the length of a plane, which only the launch knows."""
    assert judged(tall(tokens), engine) == 0


# Several launches


@pytest.mark.parametrize(("most", "launches"), [(13, 23), (50, 6), (2000, 1)])
def test_a_copy_of_several_launches(
    most: int,
    launches: int,
    engine: type[DirectOnCpu],
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions are named by their place in the whole. A token is 12 vectors in 6 planes."""
    monkeypatch.setattr(direct, "MAX_VECTORS", most)
    slots = [*range(11, -1, -1), *range(11)]
    slots[17] = 12
    copied = Copy(by(pool(), slots), chunk(23), 23)
    assert judged(copied, engine) == 18
    assert len(driver.launches) == launches
    assert judged(replace(copied, count=0), engine) == 0
    assert len(driver.launches) == launches, "nothing is no launch"


def test_a_unit_of_more_vectors_than_are_counted(
    engine: type[DirectOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_VECTORS", 12)
    with refused(Unsupported, "12 vectors", "'staged'"):
        engine(CPU).prepare(tall(3).plan())


def test_the_most_vectors_leave_room_for_a_turn() -> None:
    """The last turn may begin just below the most and end one turn of all threads past it, which
    is no longer than the copy itself; and `Divisor` is exact below 2^30."""
    assert MAX_VECTORS <= 2**30
    numbers = [0, 1, 2, 3, 2**29, 2**30 - 2, 2**30 - 1]
    for divisor in [*range(1, 200), 641, 2**16 + 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 1]:
        shift = 30 + (divisor - 1).bit_length()
        factor = -(-(2**shift) // divisor)
        assert factor < 2**32
        for near in numbers + [divisor * (2**30 // divisor - 1) + n for n in (-1, 0, 1)]:
            assert near * factor >> shift == near // divisor


# Arguments


def test_the_argument_is_as_the_kernel_takes_it(engine: type[DirectOnCpu]) -> None:
    for name in ("gather", "scatter", "memory objects, blocks", "NZ blocks", "two nests"):
        plan = COPIES[name]().plan()
        for nest in plan.nests:
            kernel = DirectKernel(nest, plan)
            library = compiled(kernel.source)
            assert library.argument_bytes() == len(kernel.fixed)
            assert library.src_table_at() == direct._SRC_TABLE_AT
            assert library.dst_table_at() == direct._DST_TABLE_AT


def test_tables_of_the_host_lie_on_the_device(engine: type[DirectOnCpu]) -> None:
    """Its own table is cleared here: whoever reads it faults or moves wrong bytes."""
    copied = Copy(by(pool(), [11, 0, 5], 1), objects(), 3)
    if engine is Loads:
        copied = Copy(by(objects(), [11, 0, 5], 1), pool(), 3)
    kernel = DirectKernel(copied.plan().nests[0], _as(copied.plan(), engine))
    assert kernel.wants_table
    assert judged(copied, engine) == 0


def _as(plan: CopyPlan, engine: type[DirectOnCpu]) -> CopyPlan:
    if engine.stores:
        plan.src = replace(plan.src, place="device")
    return plan


def test_neighbours_on_the_hosts_side_are_walked_together(engine: type[DirectOnCpu]) -> None:
    """Heads before tokens on one side, behind them on the other, in blocks."""
    hnd = End([filled((2, 3, 2, 4, 8)) for _ in range(3)], "layer | kv block head token dim")
    nhd = pool()
    for src, dst in ((hnd, nhd), (nhd, hnd)):
        copied = Copy(by(src, [2, 0], 4), by(dst, [1, 2], 4), 8)
        plan = _as(copied.plan(), engine)
        kernel = DirectKernel(plan.nests[0], plan)
        host = dst if engine.stores else src
        # Walked innermost: 2 heads of a token where the host has tokens first, else 4 tokens.
        assert kernel.inner == ([4, 2] if host is nhd else [2, 4])
        assert judged(copied, engine) == 0


# The copies above can fail

BUGS = {
    "every other strip": ("nth * Strip;", "nth / 2 * 2 * Strip;", "gather"),
    "the last vector is left out": ("at < all ? here % row", "at + 1 < all ? here % row", "blocks"),
    "past the end is moved too": ("|| in[nth] == row) continue;", ") continue;", "pool to pool"),
    "strips overlap": ("thread / Strip * (Strip * Each)", "thread / Strip * Strip", "gather"),
    "one turn": ("start += turn", "start += all", "gather"),
    "a divisor rounded down": ("divisor - 1) / divisor", "0) / divisor", "gather"),
    "ids are always int64": ("request.wide ?", "true ?", "gather int32"),
    "a bad id is told at the wrong place": ("(i64)unit[nth] * copy.unit + 1", "1", "past the end"),
    "parts of an id are forgotten": (
        "known.first = (request.first + unit) % Shape::per_id;", "known.first = 0;",
        "several units of an id",
    ),
    "one plane": ("planes.divide(there)", "0", "gather"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_caught(
    bug: str, engine: type[DirectOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, name = BUGS[bug]
    text = rows_kernel.kernel_text("host/direct.cuh")
    assert right in text, "the kernel's text has changed: seed the bug anew"
    monkeypatch.setattr(rows_kernel, "kernel_text", lambda *_: wrong.join(text.rsplit(right, 1)))
    past = Copy(by(pool(), [3, 1, 12, 11]), chunk(4), 4)
    copied = past if name == "past the end" else COPIES[name]()
    told = 3 if copied is past else 0
    with pytest.raises(AssertionError):
        assert judged(copied, engine) == told
