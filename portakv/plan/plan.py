# SPDX-License-Identifier: Apache-2.0
"""`CopyPlan`: plan a copy between two forms, before any address or index is known.

A plan is one nest of loops, or one for each kv if they differ: units x strided loops x one
contiguous run. Its cost does not depend on the number of tokens or blocks that a copy moves.
"""

from __future__ import annotations

from functools import cached_property
from math import gcd

import numpy as np
import torch

from portakv.arguments import as_whole, flag, kind_of
from portakv.core.plan import PAGES, UNIT, UNLIKE, Refused, plan_words
from portakv.errors import LayoutError, SlotError, Unsupported
from portakv.plan.loops import Nest as Nest
from portakv.plan.loops import Side as Side
from portakv.plan.loops import check_extents, lines_of, nests_of, refusal_of
from portakv.plan.move import Move as Move
from portakv.plan.runs import Runs, check_count, runs_of
from portakv.view.form import Form
from portakv.view.index import MOST_STEP, Index
from portakv.view.view import KVView

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
