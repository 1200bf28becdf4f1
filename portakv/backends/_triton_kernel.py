# SPDX-License-Identifier: Apache-2.0
"""The one Triton kernel: a nest of a plan, copied vector by vector. Imports triton.

A program moves ``TILE`` vectors of one plane: axis 0 of the grid walks through the vectors of a
plane in copy order, axis 1 through the planes. Extents and widths, which a model fixes, are
constants, so that division is by constants and nothing loops at run time; addresses, strides and
counts, which a request changes, are arguments. Addresses are plain int64, so that the kernel is
the same on a device and, under Triton's interpreter, on the host.

No cache hints: on an H200 every one of them cost bandwidth (docs/benchmarks.md).
"""

# Triton reads annotations itself, so none of them are postponed, and arguments have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

NO_POSITION = tl.constexpr(2**63 - 1)  # above every position


@triton.jit
def walk(number, start, steps, EXTENTS: tl.constexpr, UNBOUNDED: tl.constexpr):
    """``start`` moved by a number written in positional notation, innermost extent last.

    With ``UNBOUNDED`` 1 a step without an extent stands first and takes what the others leave.
    """
    place = start
    for back in tl.static_range(1, len(EXTENTS) + 1):
        digit = number % EXTENTS[len(EXTENTS) - back]
        place += digit.to(tl.int64) * steps[UNBOUNDED + len(EXTENTS) - back]
        number = number // EXTENTS[len(EXTENTS) - back]
    if UNBOUNDED == 1:
        place += number.to(tl.int64) * steps[0]
    return place


@triton.jit
def find_units(at, inside, side, PER_ID: tl.constexpr):
    """Return the units of one side: their numbers, and masks of the moved and the past-the-end
    ones.

    ``PER_ID`` is the units of one id, 0 for a side without ids.
    """
    number = at + side.first
    moved = inside
    past = tl.zeros_like(inside)
    if PER_ID > 0:
        slot = number // PER_ID
        ids = side.ids.to(tl.int64)  # the interpreter takes a low address for a narrow integer
        # Two loads of which one is masked off: choosing by a constant would compile twice.
        wide = tl.load(
            ids.to(tl.pointer_type(tl.int64)) + slot, mask=inside & (side.wide != 0), other=0
        )
        narrow = tl.load(
            ids.to(tl.pointer_type(tl.int32)) + slot, mask=inside & (side.wide == 0), other=0
        )
        read = wide + narrow.to(tl.int64)
        # Compared before it is multiplied: no id, however large, can overflow.
        moved = inside & (read >= 0) & (read < side.past)
        past = inside & (read >= side.past)
        if PER_ID == 1:
            number = read
        else:
            number = tl.where(moved, read, 0) * PER_ID + number % PER_ID
            past = past | (moved & (number >= side.limit))
            moved = moved & (number < side.limit)
    return number, moved, past


@triton.jit
def find_plane(plane, side, TABLE: tl.constexpr, OUTER: tl.constexpr, ENTRIES: tl.constexpr):
    """Return the place of a plane on one side: (bytes, entry of the table).

    ``TABLE``: 0 if one address is the base of all, 1 if each plane looks one up, 2 if each unit
    does, so that the entry is still open.
    """
    place = walk(plane, side.base.to(tl.int64), side.outer, OUTER, 0)
    entry = walk(plane, plane.to(tl.int64) * 0, ENTRIES, OUTER, 0)
    if TABLE == 1:
        place += tl.load(side.table.to(tl.int64).to(tl.pointer_type(tl.int64)) + entry)
    return place, entry


@triton.jit
def find_pieces(
    place,
    entry,
    number,
    piece,
    moved,
    side,
    TABLE: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The address of each piece of a tile, from the bytes and the entry of its plane."""
    address = walk(piece, walk(number, place, side.units, UNITS, 1), side.inner, INNER, 0)
    if TABLE == 2:
        entries = walk(number, entry, ENTRIES, UNITS, 1)
        table = side.table.to(tl.int64).to(tl.pointer_type(tl.int64))
        address += tl.load(table + entries, mask=moved, other=0)
    return address


@triton.jit
def to_pointers(address, VECTOR: tl.constexpr, ELEMENT: tl.constexpr, LANES: tl.constexpr):
    """Pointers to the elements of each vector: ``[TILE, LANES]``."""
    pointers = address.to(tl.pointer_type(ELEMENT))[:, None] + tl.arange(0, LANES)[None, :]
    # Triton cannot know that an address from a table is aligned; the plan does.
    return tl.max_contiguous(tl.multiple_of(pointers, (VECTOR, VECTOR)), (1, LANES))


@triton.jit
def report(status, position):
    """Leave the lowest bad position + 1 in the status word, which holds 0 at first. Programs and
    launches arrive in any order, so a program replaces only 0 and higher positions."""
    word = status.to(tl.int64).to(tl.pointer_type(tl.int64))
    current = tl.load(word, volatile=True)
    while (current == 0) | (current > position):
        before = tl.atomic_cas(word, current, position)
        current = tl.where(before == current, position, before)


@triton.jit
def copy_rows(
    src,
    dst,
    units,
    start,
    tokens,
    status,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    ROW: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SRC_PER_ID: tl.constexpr,
    SRC_UNITS: tl.constexpr,
    SRC_TABLE: tl.constexpr,
    SRC_UNIT_ENTRIES: tl.constexpr,
    SRC_OUTER_ENTRIES: tl.constexpr,
    DST_PER_ID: tl.constexpr,
    DST_UNITS: tl.constexpr,
    DST_TABLE: tl.constexpr,
    DST_UNIT_ENTRIES: tl.constexpr,
    DST_OUTER_ENTRIES: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Copy ``units`` units of one nest, from unit ``start`` on, in all planes.

    ``src`` and ``dst`` are `_triton_rows.Side`. A unit has ``tokens`` tokens; the position of a
    first bad id goes to the word at ``status`` (0: nowhere). A vector is ``LANES`` elements of
    ``ELEMENT``; ``RUN`` and ``ROW`` count vectors: contiguous ones, and those of one unit in one
    plane.
    """
    # Loads that depend on nothing stand first and the word last: a store between two loads would
    # make the second wait for whatever the store waits for.
    plane = tl.program_id(1)
    src_place, src_entry = find_plane(plane, src, SRC_TABLE, OUTER, SRC_OUTER_ENTRIES)
    dst_place, dst_entry = find_plane(plane, dst, DST_TABLE, OUTER, DST_OUTER_ENTRIES)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < units * ROW
    unit = (start + at // ROW).to(tl.int64)
    within = at % ROW
    src_number, src_moved, src_past = find_units(unit, inside, src, SRC_PER_ID)
    dst_number, dst_moved, dst_past = find_units(unit, inside, dst, DST_PER_ID)
    moved = src_moved & dst_moved
    piece = within // RUN
    source = find_pieces(
        src_place,
        src_entry,
        src_number,
        piece,
        moved,
        src,
        SRC_TABLE,
        SRC_UNITS,
        INNER,
        SRC_UNIT_ENTRIES,
    )
    target = find_pieces(
        dst_place,
        dst_entry,
        dst_number,
        piece,
        moved,
        dst,
        DST_TABLE,
        DST_UNITS,
        INNER,
        DST_UNIT_ENTRIES,
    )
    byte = (within % RUN).to(tl.int64) * VECTOR
    vectors = tl.load(to_pointers(source + byte, VECTOR, ELEMENT, LANES), mask=moved[:, None])
    tl.store(to_pointers(target + byte, VECTOR, ELEMENT, LANES), vectors, mask=moved[:, None])
    if SRC_PER_ID + DST_PER_ID > 0:  # noqa: SIM102 - decided by the compiler, the next at run time
        if plane == 0:
            reports = (src_past | dst_past) & (within == 0) & (status != 0)
            position = tl.min(tl.where(reports, unit * tokens + 1, NO_POSITION))
            if position < NO_POSITION:
                report(status, position)
