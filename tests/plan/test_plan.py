# SPDX-License-Identifier: Apache-2.0
"""Plans: units, loops, runs and vector widths, worked out from two forms alone."""

from __future__ import annotations

import cProfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_cases import lazy
from support.presets_cases import KINDS, side

import portakv
from portakv import CopyPlan, KVView, LayoutError, Unsupported
from portakv.plan.plan import Loop
from portakv.view.form import Form


def form(layout: str, *shape: int, dtype: torch.dtype = torch.float16, **extents: Any) -> Form:
    return KVView(torch.zeros(shape, dtype=dtype), layout, **extents).form


def paged(block: int) -> Form:
    """Return the form of blocks with a gap after each, so tokens do not lie at one stride."""
    padded = torch.zeros(3, block * 8 + 8, dtype=torch.float16)
    return KVView(padded[:, :-8].view(3, block, 8), "block token dim").form


FLAT = form("token dim", 48, 8)
P16 = paged(16)
LISTED = KVView([torch.zeros(8, dtype=torch.float16) for _ in range(3)], "token | dim").form
POOL = form("(block token) dim", 48, 8, block_size=4)
PAGES = form("block page", 5, 64, block_size=4)


@pytest.mark.parametrize(
    ("src", "dst", "steps", "requested", "unit"),
    [
        (P16, P16, (16, 16), None, 16),
        (P16, P16, (1, 1), None, 1),
        (P16, P16, (16, 1), None, 1),
        (P16, P16, (0, 0), None, 16),
        (P16, P16, (0, 4), None, 4),
        (P16, paged(24), (16, 24), None, 8),
        (P16, paged(6), (0, 0), None, 2),
        (P16, paged(15), (16, 15), None, 1),
        (P16, FLAT, (16, 0), None, 16),
        (P16, FLAT, (64, 0), None, 16),  # a manager block of four kernel blocks
        (P16, FLAT, (8, 0), None, 8),  # half a block for each id
        (P16, FLAT, (0, 0), None, 16),
        (POOL, FLAT, (4, 0), None, 4),
        (POOL, FLAT, (64, 0), None, 64),  # a flat pool allows any
        (POOL, P16, (4, 16), None, 4),
        (POOL, POOL, (12, 8), None, 4),
        (FLAT, FLAT, (0, 0), None, 1),
        (FLAT, POOL, (0, 0), 48, 48),  # two flat sides without ids allow any
        # Tokens split 2 x 3 against 3 x 2: only single tokens have a place on both sides.
        (form("block token/3 head token%3 dim", 5, 2, 2, 3, 8),
         form("block token/2 head token%2 dim", 5, 3, 2, 2, 8), (6, 6), None, 1),
        *((P16, P16, (16, 16), unit, unit) for unit in (1, 2, 4, 8, 16)),
        *((PAGES, PAGES, steps, None, 4) for steps in ((0, 0), (4, 4), (4, 8))),
        # Opaque pages have no number type.
        (PAGES, form("block page", 5, 64, dtype=torch.int16, block_size=4), (4, 4), None, 4),
    ],
)  # fmt: skip
def test_the_unit_is_what_is_asked_or_the_most_that_steps_and_block_sizes_allow(
    src: Form, dst: Form, steps: tuple[int, int], requested: int | None, unit: int
) -> None:
    plan = CopyPlan(src, dst, *steps, requested)
    assert plan.unit == unit
    assert plan.nests[0].unit_bytes == unit * plan.token_bytes


@pytest.mark.parametrize(
    ("src", "step", "aligned"),
    [(FLAT, 0, False), (FLAT, 4, True), (POOL, 0, False), (POOL, 1, True), (P16, 0, True),
     (LISTED, 0, True)],
)  # fmt: skip
def test_sides_with_ids_or_tokens_apart_are_aligned(src: Form, step: int, aligned: bool) -> None:
    plan = CopyPlan(src, FLAT, step, 0)
    assert (plan.aligned("src"), plan.aligned("dst")) == (aligned, False)


MEMORY = torch.zeros(100, 8)
# kv at unequal distances are found through the table.
THREE = KVView([MEMORY[0:5], MEMORY[10:15], MEMORY[50:55]], "kv | token dim", kv=3).form
KV3 = form("kv token dim", 3, 5, 8, dtype=torch.float32, kv=3)
CROSS = form("block layer kv token head dim", 3, 2, 2, 4, 2, 8)
PLANES = form("kv layer token dim", 2, 3, 5, 8)
INSIDE = form("layer head token dim", 2, 3, 5, 8)
LAYERS = KVView([torch.zeros(2, 3, 4, 2, 8) for _ in range(3)], "layer | kv block token head dim")
CHUNK = form("kv layer token (head dim)", 2, 3, 12, 16, dtype=torch.float32, heads=2)
SPLIT = form("block (kv token dim)", 3, 4 * 132, dtype=torch.uint8, dim=(128, 4))
ROWS = form("token (kv dim)", 12, 132, dtype=torch.uint8, dim=(128, 4))


class TestLoops:
    @pytest.mark.parametrize(
        ("src", "dst", "steps", "nests"),
        [
            # Contiguous on both sides is one run.
            (CROSS, CROSS, (4, 4), [((), 2 * 2 * 4 * 2 * 16, 0, 0)]),
            # A chunk from flash attention: loops over layers and kv, and head and dim are the run.
            (LAYERS.form, CHUNK, (1, 0), [
                ((Loop(("layer",), 3, 1, 0, 0, 768), Loop(("kv",), 2, 0, 768, 0, 2304)), 64, 0, 0),
            ]),
            (THREE, KV3, (), [((Loop(("kv",), 3, 1, 0, 0, 160),), 32, 0, 0)]),
            (KV3, KV3, (), [((Loop(("kv",), 3, 0, 160, 0, 160),), 32, 0, 0)]),
            # kv of unequal widths, or at unequal distances, have a nest each.
            (SPLIT, ROWS, (1, 0), [((), 128, 0, 0), ((), 4, 512, 128)]),
            (replace(KV3, parts=(*KV3.parts[:2], replace(KV3.parts[2], offset=1000))), KV3, (),
             [((), 32, 0, 0), ((), 32, 160, 160), ((), 32, 1000, 320)]),
            # Axes are refined to common factors.
            (form("token head dim/32 dim%32", 5, 2, 4, 32, dtype=torch.int8),
             form("dim/64 token head dim%64", 2, 5, 2, 64, dtype=torch.int8), (),
             [((Loop(("dim",), 2, 0, 64, 0, 640), Loop(("head",), 2, 0, 128, 0, 64)), 64, 0, 0)]),
            # A loop over planes is known by all its axes.
            (PLANES, PLANES, (1, 1), [((Loop(("kv", "layer"), 6, 0, 80, 0, 80),), 16, 0, 0)]),
            (INSIDE, INSIDE, (1, 1), [((Loop(("layer", "head"), 6, 0, 80, 0, 80),), 16, 0, 0)]),
        ],
    )  # fmt: skip
    def test_nests_have_the_fewest_loops(
        self, src: Form, dst: Form, steps: tuple[int, ...], nests: list[tuple[Any, ...]]
    ) -> None:
        plan = CopyPlan(src, dst, *steps)
        assert [(x.loops, x.run, x.src.offset, x.dst.offset) for x in plan.nests] == nests
        for loop in (loop for nest in plan.nests for loop in nest.loops):
            assert loop.over_planes is ({"layer", "kv"} >= set(loop.axes))

    def test_presets_need_at_most_five_strided_loops(self) -> None:
        """The bound that kernels rely on, for every pair of layouts that has a plan."""
        forms = [KVView(side(x).tensors, x, **side(x).extents).form for x in KINDS]
        made = 0
        for src, dst in product(forms, forms):
            try:
                steps = (1, 1), (src.block_size, dst.block_size)
                plans = [CopyPlan(src, dst, *pair) for pair in steps]
            except (LayoutError, Unsupported):
                continue
            made += 1
            assert max(len(nest.loops) for plan in plans for nest in plan.nests) <= 5
        assert made > 500

    def test_print_shows_the_loops_that_a_person_would_write(self) -> None:
        cache = form("kv block token head dim", 2, 3, 4, 2, 8)
        chunk = form("kv token (head dim)", 2, 12, 16, heads=2)
        assert str(CopyPlan(cache, chunk, 1, 0)) == (
            "unit 1 token, vector 16 B, 64 B a token\n"
            "s: units by ids of 1 token, d: consecutive units\n"
            "for s, d in units: src = table[0] + s * 32 B; dst = table[0] + d * 32 B\n"
            "  for kv in range(2): src += 384 B; dst += 384 B\n"
            "    copy 32 B in vectors of 16 B"
        )

    def test_print_shows_tables_units_and_split_numbers(self) -> None:
        layers = [torch.zeros(3, 2, 4, 8) for _ in range(2)]
        cache = KVView(layers, "layer | block head token dim").form
        chunk = form("layer token (head dim)", 2, 12, 16, dtype=torch.float32, heads=2)
        assert str(CopyPlan(cache, chunk, 1, 0)).splitlines()[2:4] == [
            "for s, d in units: src = table[0] + s // 4 * 256 B + s % 4 * 32 B; "
            "dst = table[0] + d * 64 B",
            "  for layer in range(2): src += table[1]; dst += 768 B",
        ]
        whole = str(CopyPlan(cache, chunk, 4, 0))
        assert "unit 4 tokens" in whole
        assert "for token in range(4): src += 32 B; dst += 64 B" in whole


def flat(row: int, start: int = 0, stride: int = 0) -> Form:
    """Five rows of bytes from a place in memory on, at a stride."""
    memory = torch.zeros(2048, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    return KVView(memory[start:].as_strided((5, row), (stride or row, 1)), "token dim").form


def apart(axis: int, extra: int) -> Form:
    """Layers, kv or blocks that lie ``extra`` bytes further apart than their content."""
    strides = [2 * 3 * 256, 3 * 256, 256, 64, 1]
    strides[axis] += extra
    memory = torch.zeros(8192, dtype=torch.uint8).as_strided((2, 2, 3, 4, 64), strides)
    return KVView(memory, "layer kv block token dim").form


def heads(layout: str, width: int) -> tuple[Form, Form]:
    """A cache of 16 heads in blocks of 4, and a chunk."""
    shape = (3, 16, 4, width) if "head token" in layout else (3, 4, 16, width)
    chunk = form("token (head dim)", 12, 16 * width, dtype=torch.uint8, heads=16)
    return form(layout, *shape, dtype=torch.uint8), chunk


def parts(*widths: int) -> Form:
    return form("token (kv dim)", 5, sum(widths), dtype=torch.uint8, kv=len(widths), dim=widths)


HND = "block head token dim"
NHD = "block token head dim"
WIDTHS = {256: 16, 144: 16, 136: 8, 132: 4, 100: 4, 130: 2, 131: 1, 1: 1, 24: 8}
#: The widest access that base, strides, offsets and run allow, each of them alone.
VECTORS: list[tuple[tuple[Form, Form], int]] = [
    *(((flat(width), flat(width)), vector) for width, vector in WIDTHS.items()),
    *(((flat(64, n), flat(64)), n & -n if n % 16 else 16) for n in (0, 1, 2, 4, 8, 16, 3, 12)),
    *(((flat(64, 0, n), flat(64)), min(16, n & -n)) for n in (65, 66, 68, 72, 80)),
    # Later rows less aligned than the first: each axis has to be looked at.
    *(((apart(axis, n), apart(0, 0)), n or 16) for axis in range(3) for n in (0, 1, 2, 4, 8)),
    # A row of 16 heads is divisible by 16 however wide a head is.
    *((heads(HND, n), vector) for n, vector in ((64, 16), (66, 2), (100, 4), (33, 1), (8, 8))),
    *((heads(NHD, n), 16) for n in (64, 66, 100, 33, 8)),
    # The second part is 16 bytes wide, every 32 bytes, yet begins after 8.
    ((parts(8, 16, 8), parts(8, 16, 8)), 8),
    ((parts(6, 10), parts(6, 10)), 2),
]


@pytest.mark.parametrize(("pair", "vector"), VECTORS)
def test_the_vector_is_the_widest_that_everything_allows(
    pair: tuple[Form, Form], vector: int
) -> None:
    for src, dst in (pair, pair[::-1]):
        plan = CopyPlan(src, dst, 1, 1)
        assert {nest.vector for nest in plan.nests} == {plan.vector} == {vector}


def test_a_flat_side_may_begin_between_two_units() -> None:
    """A block of 8 tokens x 24 B allows vectors of 16 B, a start at the next token does not."""
    blocks = form("block token dim", 4, 8, 12)
    rows = form("token dim", 24, 12)
    assert CopyPlan(blocks, blocks, 8, 8).vector == 16
    assert CopyPlan(blocks, rows, 8, 0).vector == CopyPlan(rows, blocks, 0, 8).vector == 8


def test_the_cost_does_not_depend_on_blocks_or_tokens() -> None:
    """The interpreter makes exactly the same calls for 3 blocks and for 300,000."""
    _calls(1)  # the first plan of a process loads the core
    assert len({_calls(blocks) for blocks in (3, 3000, 300_000)}) == 1


def _calls(blocks: int) -> int:
    cache = KVView(lazy(blocks * 2 * 16 * 64).view(blocks, 2, 16, 64), "block kv token dim").form
    chunk = KVView(lazy(blocks * 2 * 16 * 64).view(2, blocks * 16, 64), "kv token dim").form
    profile = cProfile.Profile()
    profile.runcall(CopyPlan, cache, chunk, 16, 0)
    # Only the library's own calls: a collection may run callbacks of others at any time.
    library = Path(portakv.__file__).resolve().parent
    count = 0
    for call in profile.getstats():
        file = Path(getattr(call.code, "co_filename", ""))
        if file.resolve().is_relative_to(library):
            count += call.callcount
    assert count > 0
    return count


def typed(*dtypes: torch.dtype) -> Form:
    """Return the form of rows of 8 bytes, with a separate dtype for each kv."""
    tensors = [torch.zeros(5, 8 // dtype.itemsize, dtype=dtype) for dtype in dtypes]
    return KVView(tensors, "kv | token dim", kv=len(dtypes)).form


class TestRefusals:
    @pytest.mark.parametrize(
        ("src", "dst", "arguments", "error", "why"),
        [
            (form("kv token dim", 2, 5, 8), FLAT, (), LayoutError, "'kv' extent 2 .* 1"),
            (form("layer token dim", 2, 5, 8), FLAT, (), LayoutError, "'layer' extent 2"),
            (form("token head dim", 5, 2, 8), FLAT, (), LayoutError, "'head' extent 2"),
            (FLAT, form("token dim", 5, 4), (), LayoutError, "kv 0 to be 16 bytes wide .* 8: wid"),
            (SPLIT, form("token (kv dim)", 12, 136, dtype=torch.uint8, dim=(128, 8)), (1, 0),
             LayoutError, "kv 1 to be 4 bytes wide for each head of each layer .* 8: .*dim"),
            (FLAT, form("token dim", 5, 8, dtype=torch.uint8), (), LayoutError, "are compared in"),
            (form("token dim", 5, 8, dtype=torch.float32), form("token dim", 5, 8), (), LayoutError,
             r"32 bytes wide \(float32\) .* got 16 \(float16\): .* nothing.*torch.float16\) first"),
            (form("token dim", 5, 8, dtype=torch.float32), form("token dim", 5, 4), (), LayoutError,
             r"32 bytes wide for .* got 8: widths are compared in bytes\. Declare dim alike"),
            (PAGES, form("block page", 5, 64, block_size=8), (4, 8), LayoutError,
             "to hold 4 tokens .* got 8"),
            (PAGES, form("block page", 5, 32, block_size=4), (4, 4), LayoutError, "bytes"),
            (PAGES, form("block token dim", 5, 4, 16), (4, 4), Unsupported, "between opaque pages"),
            (PAGES, PAGES, (1, 1), Unsupported, "opaque pages of 4 tokens by smaller pieces"),
            (PAGES, PAGES, (4, 4, 2), Unsupported, "smaller pieces"),
            (form("token dim/2 head dim%2", 5, 3, 2, 2), form("token dim/3 head dim%3", 5, 2, 2, 3),
             (), Unsupported, "no common refinement"),
            *((P16, P16, (16, 16, unit), Unsupported, "unit.*divisors of 16")
              for unit in (0, -1, 3, 32)),
        ],
    )  # fmt: skip
    def test_extents_and_widths_that_differ(
        self, src: Form, dst: Form, arguments: tuple[int, ...], error: Any, why: str
    ) -> None:
        with pytest.raises(error, match=why):
            CopyPlan(src, dst, *arguments)

    @pytest.mark.parametrize(
        ("src", "dst", "different"),
        [
            ((torch.uint8,), (torch.float32,), ""),
            ((torch.int8,), (torch.float32,), ""),
            ((torch.float16, torch.uint8), (torch.float16, torch.float32), ""),
            ((torch.half,), (torch.bfloat16,), "kv 0 to be float16 .*, got bfloat16"),
            ((torch.float32,), (torch.int32,), "kv 0 to be float32 .*, got int32"),
            ((torch.int16,), (torch.float16,), "kv 0 to be int16"),
            ((torch.half, torch.float32), (torch.half, torch.bfloat16), "kv 1 to be float32"),
        ],
    )
    def test_two_number_types_unless_one_is_bytes_or_their_bits_are_meant(
        self, src: tuple[torch.dtype, ...], dst: tuple[torch.dtype, ...], different: str
    ) -> None:
        one = typed(*src)
        other = typed(*dst)
        if different:
            why = f"{different}.*moves bits and converts nothing.*reinterpret="
            with pytest.raises(LayoutError, match=why):
                CopyPlan(one, other)
        for pair in ((one, other), (other, one)):
            plan = CopyPlan(*pair, reinterpret=bool(different))
            assert plan.token_bytes == 8 * len(src)
            assert CopyPlan(plan.src, plan.dst).token_bytes == 8 * len(src)
