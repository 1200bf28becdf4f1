# SPDX-License-Identifier: Apache-2.0
"""`CopyPlan`: plan a copy between two forms, before any address or index is known; its loops, its
runs of bytes, and `Move`, one copy as a value.

A plan is one nest of loops, or one for each kv if they differ: units x strided loops x one
contiguous run. Its cost does not depend on the number of tokens or blocks that a copy moves.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import as_whole, flag, kind_of
from portakv.core.plan import (
    NO_FACTOR,
    NO_MEMORY,
    NO_REFINEMENT,
    PAGES,
    UNIT,
    UNLIKE,
    Refused,
    plan_words,
)
from portakv.core.runs import list_runs, pointer_to
from portakv.errors import LayoutError, SlotError, Unsupported
from portakv.view.form import Form, Step, Steps
from portakv.view.index import MOST_STEP, Index
from portakv.view.view import KVView

# ------------------------------------------------------------------------------------------------
# Loop nests over two sides together, read from the words of the plans that the core makes.

#: The axes of loops, in the order of the digits that name them in words, from 1 on.
AXES = ("layer", "block", "token", "head", "dim", "kv")
_PLANES = frozenset({"layer", "kv"})
Numbers = TypeVar("Numbers", torch.Tensor, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Loop:
    """``extent`` steps that both sides take together, through tables and through memory.

    Attributes:
        axes: the axes that were merged into the loop, outermost first.
    """

    axes: tuple[str, ...]
    extent: int
    src_table: int
    src_stride: int
    dst_table: int
    dst_stride: int

    @property
    def name(self) -> str:
        """Return the axes as text."""
        return " ".join(self.axes)

    @property
    def tabled(self) -> bool:
        """Return True if a side looks its address up for each step."""
        return bool(self.src_table or self.dst_table)

    @property
    def over_planes(self) -> bool:
        """Return True if each step leads to another plane, and so never inside a token's row."""
        return _PLANES.issuperset(self.axes)

    def __str__(self) -> str:
        src = _walk(self.src_table, self.src_stride)
        dst = _walk(self.dst_table, self.dst_stride)
        return f"for {self.name} in range({self.extent}): src += {src}; dst += {dst}"


@dataclass(frozen=True, slots=True)
class Side:
    """The location of the units of one side.

    Attributes:
        table, offset: the origin: an entry of the address table, and bytes after its address.
        units: the steps that the number of a unit walks through, outermost (unbounded) first: ``n %
            extent`` from the innermost on, as in positional notation.
    """

    table: int
    offset: int
    units: Steps

    @property
    def tabled(self) -> bool:
        """Return True if a unit's number selects the table entry of its address."""
        return any(step.table for step in self.units)

    def text(self, number: str) -> str:
        """Format the location of the unit of a number for a reader."""
        walks: list[str] = []
        below = 1
        for at in reversed(self.units):
            place = number if below == 1 else f"{number} // {below}"
            place = f"{place} % {at.extent}" if at.extent else place
            walk = f"table[{place} * {at.table}]" if at.table else f"{place} * {at.stride} B"
            walks.insert(0, walk)
            below *= at.extent or 1
        base = f"table[{self.table}]" + (f" + {self.offset} B" if self.offset else "")
        return " + ".join([base, *walks])

    def locate(self, numbers: Numbers, grain: int = 1) -> tuple[Numbers | None, Numbers]:
        """Locate units by their numbers (an int64 array, or a tensor on any device).

        Returns:
            The entries of the address table relative to ``table``, None if all units use one
                address; and the distances from ``offset`` in multiples of ``grain`` bytes, which
                divides the strides of the units.
        """
        entries = places = None
        rest = numbers
        for step in reversed(self.units):
            rest, digit = (rest // step.extent, rest % step.extent) if step.extent else (rest, rest)
            if step.table:
                entries = digit * step.table + (0 if entries is None else entries)
            if step.stride:
                factor = step.stride // grain
                place = digit if factor == 1 else digit * factor
                places = place if places is None else places + place
        return entries, numbers * 0 if places is None else places


@dataclass(frozen=True, slots=True)
class TwoSides:
    """The location of the units of two sides, and the loops of a unit, which both take together."""

    src: Side
    dst: Side
    loops: tuple[Loop, ...]

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return the source and the destination."""
        return self.src, self.dst

    @property
    def src_tabled(self) -> bool:
        """Return True if the source looks addresses up in its table."""
        return self.src.tabled or any(loop.src_table for loop in self.loops)

    @property
    def dst_tabled(self) -> bool:
        """Return True if the destination looks addresses up in its table."""
        return self.dst.tabled or any(loop.dst_table for loop in self.loops)


@dataclass(frozen=True, slots=True)
class Nest(TwoSides):
    """One loop nest. ``vector`` is the widest access in bytes that everything in it allows."""

    run: int
    vector: int

    @property
    def unit_bytes(self) -> int:
        """Return the bytes that one unit moves in this nest."""
        return prod(loop.extent for loop in self.loops) * self.run


def _walk(table: int, stride: int) -> str:
    moves = []
    if table:
        moves.append(f"table[{table}]")
    if stride or not table:
        moves.append(f"{stride} B")
    return " + ".join(moves)


def lines_of(nests: Iterable[TwoSides], work: Callable[[Any], str]) -> list[str]:
    """Return the lines of nests for a reader; ``work`` says what is done inside their loops."""
    lines = []
    for nest in nests:
        src = nest.src.text("s")
        dst = nest.dst.text("d")
        lines.append(f"for s, d in units: src = {src}; dst = {dst}")
        for depth, line in enumerate([*map(str, nest.loops), work(nest)], 1):
            lines.append("  " * depth + line)
    return lines


def check_extents(form: Form, other: Form, name: str, like: str) -> None:
    """Raise `LayoutError` unless a form, called ``name``, has the extents of the one it must be
    ``like``."""
    for axis in ("kv", "layers", "heads"):
        extent = getattr(other, axis)
        got = getattr(form, axis)
        if extent != got:
            raise LayoutError(
                f"Expected {name} with {axis.rstrip('s')!r} extent {extent} like the {like}, got "
                f"extent {got}. Declare them alike, or slice one view."
            )


class WordReader:
    """Reads the records of a plan from its words, whose order `native/core/plan.h` lists."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words = iter(words)

    def word(self) -> int:
        """Return the next word."""
        return next(self._words)

    def steps(self) -> Steps:
        """Return steps: a count, then the steps."""
        word = self.word
        return tuple([Step(word(), word(), word()) for _ in range(word())])

    def side(self) -> Side:
        """Return one side."""
        return Side(self.word(), self.word(), self.steps())

    def loops(self) -> tuple[Loop, ...]:
        """Return loops: a count, then the loops."""
        word = self.word
        return tuple(
            [
                Loop(axes_named(word()), word(), word(), word(), word(), word())
                for _ in range(word())
            ]
        )

    def nest(self) -> Nest:
        """Return one nest."""
        return Nest(self.side(), self.side(), self.loops(), self.word(), self.word())


def nests_of(words: Sequence[int]) -> tuple[Nest, ...]:
    """Return the nests of a plan's words."""
    reader = WordReader(words)
    reader.word()  # the unit
    return tuple([reader.nest() for _ in range(reader.word())])


def axes_named(digits: int) -> tuple[str, ...]:
    """Return the axes that the base-8 digits of a loop name, outermost first."""
    names = []
    while digits:
        names.append(AXES[digits % 8 - 1])
        digits //= 8
    return tuple(names[::-1])


def refusal_of(refused: Refused) -> Exception:
    """Return the error for two sides that the core cannot loop over together."""
    code = refused.code
    values = refused.values
    if code == NO_FACTOR:
        unit = values[0]
        extent = values[1]
        return Unsupported(
            f"Moving {unit} tokens together through blocks of {extent}",
            "they have no common factor; use a smaller unit",
        )
    if code == NO_REFINEMENT:
        axis = AXES[values[0] - 1]
        count = values[1]
        extents = values[3 : 3 + count + values[2]].tolist()
        return Unsupported(
            f"Copying axis {axis!r} between factors {extents[:count]} and {extents[count:]}",
            "they have no common refinement; go through a view whose factors divide both",
        )
    if code == NO_MEMORY:
        return MemoryError("The core has no memory for a plan.")
    return LayoutError(
        "Expected forms whose steps reach every position of their axes and whose strides fit in "
        "64 bits, got others. Pass the forms of two views."
    )


# ------------------------------------------------------------------------------------------------
# `Move`: one copy as a value, from which its parts are cut.


class Move(NamedTuple):
    """``count`` tokens from the rows of one view to the rows of another.

    The order of the fields is that of a launch: ``launch(*move, stream, status)``. Making a move
    costs the host as little as a tuple.

    Attributes:
        src, dst: views.
        src_index, dst_index: for each side, the slot of each position.
        count: tokens.
    """

    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int  # type: ignore[assignment]  # tuples have a method of that name

    @property
    def steps(self) -> tuple[int, int]:
        """Return the steps that a plan of this copy is made for."""
        return self.src_index.plan_step, self.dst_index.plan_step

    def ends(self, downward: bool) -> tuple[KVView, KVView, Index, Index]:
        """Return the rows of a device, those of the other side, and the index of each.

        ``downward``: the device has the source.
        """
        if downward:
            return self.src, self.dst, self.src_index, self.dst_index
        return self.dst, self.src, self.dst_index, self.src_index

    @property
    def ids_on_host(self) -> bool:
        """Return True if all ids lie on the host, or there are none."""
        return self.src_index.on_host and self.dst_index.on_host

    @property
    def is_clean(self) -> bool:
        """Return True if the ids of both sides need no guard, as `Index.is_clean` says."""
        src_clean = self.src_index.is_clean(self.count, self.src.slots)
        return src_clean and self.dst_index.is_clean(self.count, self.dst.slots)

    def mark_clean(self) -> None:
        """Note that no id of either side is negative or past the end of its view."""
        self.src_index.mark_clean(self.count, self.src.slots)
        self.dst_index.mark_clean(self.count, self.dst.slots)

    def part(self, first: int, tokens: int) -> Move:
        """Return ``tokens`` positions from position ``first`` on; shares ids and their copies."""
        if not first:
            if tokens == self.count:
                return self
            return Move(self.src, self.dst, self.src_index, self.dst_index, tokens)
        src_index = self.src_index.shifted(first)
        dst_index = self.dst_index.shifted(first)
        return Move(self.src, self.dst, src_index, dst_index, tokens)

    def layer(self, layer: int) -> Move:
        """Return one layer of the copy; both views must have the same number of layers."""
        return self.planes((layer, layer + 1), None)

    def planes(self, layers: tuple[int, int] | None, kv: tuple[int, int] | None) -> Move:
        """Return the rows of some layers and kv, each range [first, past the last); None: all."""
        if layers is None and kv is None:
            return self
        src = self.src.planes(layers, kv)
        dst = self.dst.planes(layers, kv)
        return Move(src, dst, self.src_index, self.dst_index, self.count)


# ------------------------------------------------------------------------------------------------
# Runs: a plan expanded on the host into contiguous bytes, for copy engines, files, networks.
#
# The core expands plans; this module describes copies to it.

Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous pieces: int64 arrays of equal length; ``src`` and ``dst`` hold addresses."""

    src: Int64
    dst: Int64
    nbytes: Int64


def side_words(view: KVView, index: Index) -> tuple[int, ...]:
    """Return a side of a copy as the core reads it; ids on a device are read back."""
    entries = view.entries
    addresses = view.origins[0] if entries == 1 else pointer_to(view.addresses)
    return addresses, entries, *index_words(index), view.slots


def index_words(index: Index) -> tuple[int, ...]:
    """Return an index as the core reads it; ids on a device are read back."""
    ids = index.ids
    if ids is None:
        return 0, 0, 0, 1, index.offset
    if index.on_host and ids.is_contiguous():
        return ids.data_ptr(), ids.element_size(), ids.numel(), index.step, index.offset
    array = index.host_ids()
    return pointer_to(array), 8, array.size, index.step, index.offset


def check_count(unit: int, count: object) -> None:
    """Raise `SlotError` unless a number of tokens is a multiple of the plan's unit."""
    if not isinstance(count, (int, np.integer)) or count < 0 or count % unit:
        raise SlotError(
            f"Expected runs of a multiple of the plan's unit {unit}, got {count!r} tokens. Pass "
            f"head and tail to a plan with unit=1."
        )


def outside(move: Move) -> SlotError:
    """Return the error of a copy with positions outside of a list or a view."""
    try:
        for index, view, side in (
            (move.src_index, move.src, "source"),
            (move.dst_index, move.dst, "destination"),
        ):
            index.check_length(move.count, view.slots, side)
            index.to_host().check(move.count, view.slots, side)
    except SlotError as error:
        return error
    return SlotError(
        "Expected ids that do not change during a call, got others. Pass a copy of the ids."
    )


def runs_of(words: array[int], move: Move, room: int) -> Runs:
    """Return the runs of a copy; raise as `CopyPlan.runs` does.

    ``words``: of the plan. ``room``: the most runs that the copy has.
    """
    src, dst, src_index, dst_index, count = move
    copy = (*side_words(src, src_index), *side_words(dst, dst_index), count)
    columns = list_runs(words.buffer_info()[0], copy, room)
    if columns is None:
        raise outside(move)
    return Runs(*columns)


# ------------------------------------------------------------------------------------------------
# `CopyPlan`: plan a copy between two forms, before any address or index is known.

_MOST_UNIT = 2**63 - 1
#: The last words of a plan, from the end.
_VECTOR = -6
_RUN = -5
_RUNS = -4
_BYTES = -3
_SRC_ANYWHERE = -2
_DST_ANYWHERE = -1


class CopyPlan:
    """The plan of a copy from one form to another.

    Args:
        src, dst: forms; a `KVView` has one.
        src_step, dst_step: tokens for each entry of that side's index: 1 for a slot mapping,
            ``block_size`` for a block table, 0 for a side without ids (consecutive slots).
        unit: tokens moved for each index read; by default the most that both sides allow.
        reinterpret: the forms may have different number types; bits are moved, not converted.

    Attributes:
        unit: tokens moved for each index read; counts are multiples of it.
        nests: one `Nest`, or one for each kv.

    Raises:
        LayoutError: extents, widths or number types differ between the forms.
        Unsupported: opaque pages by token, or factors without a common refinement.
    """

    def __init__(
        self,
        src: Form,
        dst: Form,
        src_step: int = 0,
        dst_step: int = 0,
        unit: int | None = None,
        *,
        reinterpret: bool = False,
    ) -> None:
        if not (isinstance(src, Form) and isinstance(dst, Form)):
            raise LayoutError(
                f"Expected two forms for a plan, such as view.form, got {kind_of(src)} and "
                f"{kind_of(dst)}. Pass the forms of two views."
            )
        flag("reinterpret", reinterpret)
        numbers = [as_whole(src_step), as_whole(dst_step), as_whole(1 if unit is None else unit)]
        if None in numbers or not (0 <= src_step <= MOST_STEP and 0 <= dst_step <= MOST_STEP):
            raise SlotError(
                f"Expected integers as the steps and the unit of a plan, got steps {src_step!r} "
                f"and {dst_step!r} and unit={unit!r}. Pass tokens for each id, or 0 for a side "
                f"without ids."
            )
        if reinterpret:
            src = src.untyped()
        self.src = src
        self.dst = dst
        self.src_step = int(src_step)
        self.dst_step = int(dst_step)
        # The core knows no number types and no encodings.
        if src.dtypes != dst.dtypes or src.encoding or dst.encoding:
            _check_forms(src, dst)
        # The core takes 0 for the most that both sides allow, and no word holds a larger unit.
        wanted = 0 if unit is None else unit if 0 < unit <= _MOST_UNIT else -1
        try:
            words = plan_words(src.address, dst.address, self.src_step, self.dst_step, wanted)
        except Refused as refused:
            raise _error_of(refused, src, dst, unit) from None
        self.unit = words[0]
        #: The words of the plan, which `native/core/plan.h` lists.
        self.words = words

    @cached_property
    def nests(self) -> tuple[Nest, ...]:
        """Return one `Nest`, or one for each kv."""
        return nests_of(self.words)

    @property
    def vector(self) -> int:
        """Return the least vector of the nests, in bytes."""
        return self.words[_VECTOR]

    @property
    def token_bytes(self) -> int:
        """Return the bytes that one token moves (an opaque page: its share)."""
        return self.words[_BYTES] // self.unit

    @cached_property
    def tabled(self) -> bool:
        """Return True if a side needs its address table."""
        return any(nest.src_tabled or nest.dst_tabled for nest in self.nests)

    def aligned(self, side: str) -> bool:
        """Return True if positions of a side must start at multiples of ``unit``.

        A side without ids may start anywhere if its tokens lie at one stride from one address.
        """
        return not self.words[_SRC_ANYWHERE if side == "src" else _DST_ANYWHERE]

    def split(self, move: Move) -> list[tuple[int, int, int]]:
        """Return the sections of a copy, each (first position, tokens, tokens of a unit).

        The sections are the body, in the largest units that the counts and offsets allow, and the
        head and tail by token.

        Raises:
            Unsupported: opaque pages would have to be cut.
        """
        unit = self.unit
        count = move.count
        src = move.src
        dst = move.dst
        src_index = move.src_index
        dst_index = move.dst_index
        offsets = (src_index.offset, dst_index.offset)
        if unit == 1 or unit == gcd(unit, count, src.slots, dst.slots, *offsets):
            return [(0, count, unit)]
        indices = (("src", src_index), ("dst", dst_index))
        starts = [index.offset for side, index in indices if self.aligned(side)]
        # A flat pool may end inside a unit; then no unit may be moved that is partly past the end.
        sides = ((src, src_index), (dst, dst_index))
        ends = [view.slots for view, index in sides if index.ids is not None]
        common = gcd(unit, *ends, *(start - starts[0] for start in starts))
        head = -starts[0] % common if starts else 0
        body = max(0, count - head) // common * common
        if self.src.opaque and (common < unit or head or body < count):
            raise Unsupported(
                f"Moving {count} tokens of opaque pages of {self.src.block_size} from {starts} on",
                "a page moves only whole; ask for whole blocks",
            )
        if body == 0:
            return [(0, count, 1)]
        past = head + body
        sections = [(0, head, 1), (head, body, common), (past, count - past, 1)]
        return [section for section in sections if section[1]]

    def runs(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> Runs:
        """Expand the plan on the host: arrays of source address, destination address and bytes,
        neighbours merged; negative ids are left out.

        Raises:
            LayoutError: a view whose form the plan was not made for.
            SlotError: an argument that is not a view or an index, an id past the end of its view, a
                range past the list, or a range or an index that does not consist of whole units.
        """
        self.check_sides(src, dst, src_index, dst_index)
        check_count(self.unit, count)
        room = int(count) // self.unit * self.runs_per_unit
        return runs_of(self.words, Move(src, dst, src_index, dst_index, count), room)

    @property
    def runs_per_unit(self) -> int:
        """Return the runs of one unit, before neighbours are merged."""
        return self.words[_RUNS]

    @property
    def run(self) -> int:
        """Return the bytes of the shortest contiguous run."""
        return self.words[_RUN]

    def check_sides(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> None:
        """Raise as `runs` does for views and indices that the plan was not made for."""
        known = isinstance(src_index, Index) and isinstance(dst_index, Index)
        alike = getattr(src, "form", None) is self.src and getattr(dst, "form", None) is self.dst
        if known and alike and self.unit == 1:
            return  # the usual case, without a call for each side
        self._check_side("src", "source", src, src_index)
        self._check_side("dst", "destination", dst, dst_index)

    def _check_side(self, side: str, name: str, view: KVView, index: Index) -> None:
        if not (isinstance(view, KVView) and isinstance(index, Index)):
            raise SlotError(
                f"Expected a KVView and an Index as the {name} of plan.runs, got "
                f"{kind_of(view)} and {kind_of(index)}. Pass Index() for consecutive slots."
            )
        form = getattr(self, side)
        if view.form is not form and view.form != form and view.form.untyped() != form:
            raise LayoutError(
                f"The {name}, {view.layout.text!r}, has another form than the plan was made for; "
                f"make a plan for the forms of these two views."
            )
        if index.offset % self.unit and (index.ids is not None or self.aligned(side)):
            raise SlotError(
                f"Expected a {name} index that begins at a multiple of the plan's unit "
                f"{self.unit}, got one that begins at token {index.offset}. Pass head and tail to "
                f"a plan with unit=1."
            )
        if index.plan_step % self.unit:
            raise SlotError(
                f"Expected a {name} index whose step is a multiple of the plan's unit "
                f"{self.unit}, got step {index.step}. Make the plan for the steps of these two "
                f"indices."
            )

    def __str__(self) -> str:
        steps = self.src_step, self.dst_step
        src, dst = (f"units by ids of {_tokens(n)}" if n else "consecutive units" for n in steps)
        lines = [
            f"unit {_tokens(self.unit)}, vector {self.vector} B, {self.token_bytes} B a token",
            f"s: {src}, d: {dst}",
        ]
        lines += lines_of(self.nests, lambda x: f"copy {x.run} B in vectors of {x.vector} B")
        return "\n".join(lines)


def check_disjoint(move: Move) -> None:
    """Raise `SlotError` if a copy between views that share memory reads a byte that it writes.

    Ids on a device are not read back: the contents of overlapping rows are then unspecified.
    """
    src = move.src
    dst = move.dst
    if src.form.encoding or dst.form.encoding:
        if src.overlaps(dst):
            raise SlotError(
                "Expected packed and raw rows in separate memory, got two views that share memory. "
                "Pass views of two tensors."
            )
        return
    src_index = move.src_index
    dst_index = move.dst_index
    count = move.count
    if not src.overlaps(dst) or not (src_index.on_host and dst_index.on_host):
        return
    if src.form == dst.form and src.origins == dst.origins:
        read = src_index.slots(count)
        written = dst_index.slots(count)
        both = np.intersect1d(read[read >= 0], written[written >= 0])
        if both.size:
            raise SlotError(
                f"Expected different slots on the two sides of a copy inside one cache, got slot "
                f"{int(both[0])} as both source and destination. Exchange rows through a buffer."
            )
        return
    unit = src.form.block_size if src.opaque else 1
    runs = CopyPlan(src.form, dst.form, *move.steps, unit).runs(*move)
    order = np.argsort(runs.dst)
    first = runs.dst[order]
    past = (runs.dst + runs.nbytes)[order]
    at = np.searchsorted(first, runs.src + runs.nbytes) - 1
    if ((at >= 0) & (past[at] > runs.src)).any():
        raise SlotError(
            "Expected different rows on the two sides of a copy inside one allocation, got a row "
            "as both source and destination. Exchange rows through a buffer."
        )


def _tokens(count: int) -> str:
    return f"{count} {'token' if count == 1 else 'tokens'}"


def _check_forms(src: Form, dst: Form) -> None:
    """Raise unless the rows of two forms hold the same bytes."""
    if src.encoding or dst.encoding:
        raise Unsupported(
            "A plan of rows for a packed view",
            "copy_blocks copies packed blocks; nothing else reads them",
        )
    check_extents(dst, src, "a destination", "source")
    if src.opaque != dst.opaque:
        raise Unsupported(
            "A copy between opaque pages and rows",
            "what a page holds is unknown, so it moves only whole and to another page view; use a "
            "layout that names the token's place in the page",
        )
    for k in range(src.kv):
        if src.widths[k] != dst.widths[k]:
            raise _unequal_widths(src, dst, k)
    if src.opaque and src.block_size != dst.block_size:
        raise LayoutError(
            f"Expected the destination's opaque pages to hold {src.block_size} tokens like the "
            f"source's, got {dst.block_size}. Copy such pages only between equal block sizes."
        )
    for k, (one, other) in enumerate(zip(src.dtypes, dst.dtypes, strict=False)):
        if one != other and one and other:
            raise LayoutError(
                f"Expected the destination's rows of kv {k} to be {one} like the source's, got "
                f"{other}: a copy moves bits and converts nothing. Make the dtypes equal, or pass "
                f"reinterpret=True (to a connector when it is made) if the bits are meant."
            )


def _elements(form: Form, k: int) -> int:
    """Return the elements of a row of one kv, of a form with dtypes."""
    return form.widths[k] // int(getattr(torch, form.dtypes[k]).itemsize)


def _unequal_widths(src: Form, dst: Form, k: int) -> LayoutError:
    """Return the error for rows of one kv that differ in width."""
    src_width = f"{src.widths[k]} bytes wide"
    dst_width = f"{dst.widths[k]}"
    why = "widths are compared in bytes"
    do = "Declare dim alike, or slice the kv that agree."
    # A form without dtypes holds bytes, or rows whose bits the caller reinterprets.
    src_dtype = src.dtypes[k] if src.dtypes else ""
    dst_dtype = dst.dtypes[k] if dst.dtypes else ""
    # Rows of as many elements differ by the dtype alone; others have another shape.
    if src_dtype and dst_dtype and _elements(src, k) == _elements(dst, k):
        src_width += f" ({src_dtype})"
        dst_width += f" ({dst_dtype})"
        why = "a copy moves bits and converts nothing"
        do = f"Make the dtypes equal: convert the rows by tensor.to(torch.{dst_dtype}) first."
    return LayoutError(
        f"Expected the destination's rows of kv {k} to be {src_width} for each head of each layer "
        f"like the source's, got {dst_width}: {why}. {do}"
    )


def _error_of(refused: Refused, src: Form, dst: Form, unit: int | None) -> Exception:
    """Return the error for a plan that the core refuses to make.

    Raises:
        LayoutError, Unsupported: the forms do not hold the same bytes.
    """
    code = refused.code
    values = refused.values
    if code == UNLIKE:
        _check_forms(src, dst)
    if code == UNIT:
        largest = values[0]
        return Unsupported(
            f"A plan with unit {unit}", f"the steps and block sizes allow divisors of {largest}"
        )
    if code == PAGES:
        return Unsupported(
            f"Moving opaque pages of {src.block_size} tokens by smaller pieces",
            "a page moves only whole; use copy_blocks, or an index with step=block_size",
        )
    return refusal_of(refused)
