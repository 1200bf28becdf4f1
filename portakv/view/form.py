# SPDX-License-Identifier: Apache-2.0
"""The form of a view: where its rows lie relative to its addresses, in bytes.

A `Form` is everything about a view except addresses and counts (of blocks, or of a chunk's
tokens). It is hashable and holds integers and strings only, so it can be sent to another process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import islice, product
from typing import Any

from portakv.core.view import TensorReader, dtype_names, tensor_reader
from portakv.runtime.bounded import Bounded

#: Where memory can be: on the device, pinned or pageable on the host, in another process, or a
#: peer's, whose memory the device reads over a link: another device's, perhaps of another process.
PLACES = ("device", "pinned", "pageable", "remote", "peer")


@dataclass(frozen=True, slots=True)
class Step:
    """One factor of an axis: ``extent`` steps through the address table and through memory.

    ``extent`` 0 means unbounded (blocks, or the tokens of a chunk). ``table`` counts entries of
    the address table, ``stride`` counts bytes; 64-bit on every backend.
    """

    extent: int
    table: int
    stride: int


Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class KVRows:
    """The rows of one ``kv``: its origin and, for each axis, its steps, outermost first."""

    table: int
    offset: int
    layer: Steps = ()
    block: Steps = ()
    token: Steps = ()
    head: Steps = ()
    dim: Steps = ()

    def axis(self, name: str) -> Steps:
        """Return the steps of one axis by its name."""
        return getattr(self, name)  # type: ignore[no-any-return]


PART_AXES = ("layer", "block", "token", "head", "dim")


@dataclass(frozen=True, slots=True, eq=True)
class Form:
    """The places of the rows of a view, relative to its addresses.

    Attributes:
        parts: a part for each ``kv``.
        layers, heads: extents.
        widths: bytes of ``dim`` (or of the page) for each kv.
        block_size: tokens of a block; 0 if the view is not paged.
        opaque: only whole pages can be moved.
        alignment: the largest power of two up to 16 that divides all addresses.
        place: one of ``device``, ``pinned``, ``pageable``, ``remote``, ``peer``.
        dtypes: for each kv the number type, such as ``float16``, or "" for bytes; () if all are.
        table_on_device: the addresses are known to a device alone, which has a table of them.
        encoding: for each kv the geometry of an encoded plane, all of one encoding; () for raw
            rows. ``widths`` are then the bytes of slots, one for each block, layer and head, and
            blocks move only whole.
    """

    parts: tuple[KVRows, ...]
    layers: int
    heads: int
    widths: tuple[int, ...]
    block_size: int
    opaque: bool
    alignment: int
    place: str
    dtypes: tuple[str, ...] = ()
    table_on_device: bool = False
    encoding: tuple[Any, ...] = ()  # of `Plane`; what reads the planes of one encoding knows it
    #: The address of the form's words, which `native/core/form.h` lists: they stay as long as it.
    address: int = field(default=0, init=False, compare=False, repr=False)
    _hash: int = field(default=0, init=False, compare=False, repr=False)
    _words: array[int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Forms key the cache of launches on the hot path: hash the nested tuples only once.
        key = (self.parts, self.layers, self.heads, self.widths, self.block_size, self.alignment)
        rest = self.opaque, self.place, self.dtypes, self.table_on_device, self.encoding
        words = array("q", _words_of(self))
        object.__setattr__(self, "_hash", hash((key, *rest)))
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "address", words.buffer_info()[0])

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        # The hash of a string differs between processes, so a form is made anew on arrival.
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @property
    def lists(self) -> bool:
        """Return True if the blocks or tokens lie in a list of tensors."""
        return any(step.table for part in self.parts for step in part.block + part.token)

    @property
    def planes(self) -> list[tuple[int, int]]:
        """Return the table entry and byte offset of each plane: for each kv those of all layers."""
        layers = range(self.layers)
        return [locate(x.table, x.offset, x.layer, layer) for x in self.parts for layer in layers]

    @property
    def unshown(self) -> str:
        """Return why `KVView.plane` shows no plane as one strided tensor, as a clause; empty if it
        can."""
        if self.encoding:
            return f"its blocks are packed by {self.encoding[0].encoding!r}"
        if self.opaque:
            return "opaque pages have no rows"
        for part, name in product(self.parts, ("block", "token", "head", "dim")):
            steps = part.axis(name)
            if any(step.table for step in steps):
                return f"its {name!r} axis goes through tensors of their own"
            if name == "dim" and steps and (len(steps) > 1 or steps[0].stride != 1):
                return "its 'dim' axis is not a single run of bytes"
            if len(steps) > 1:
                return f"its {name!r} axis is split into {len(steps)} factors"
        return ""

    def untyped(self) -> Form:
        """Return this form with rows of bytes, which go to and from rows of any number type."""
        return replace(self, dtypes=()) if self.dtypes else self

    def as_slots(self) -> Form:
        """Return the form of packed blocks as rows of bytes: a block is one token, a slot its
        row."""
        return replace(self, block_size=1, opaque=False, encoding=())

    @property
    def raw_widths(self) -> tuple[int, ...]:
        """Return the bytes of a raw row for each kv: ``widths``, unless blocks are packed."""
        if not self.encoding:
            return self.widths
        return tuple([plane.raw_bytes // self.block_size for plane in self.encoding])

    @property
    def kv(self) -> int:
        """Return the number of parts."""
        return len(self.parts)

    @property
    def paged(self) -> bool:
        """Return True if rows are addressed by slot."""
        return self.block_size > 0

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token in all layers, heads and kv (opaque pages: of one page)."""
        return self.layers * self.heads * sum(self.widths)


def _words_of(form: Form) -> list[int]:
    """Return the words of a form in the order of `native/core/form.h`."""
    words = [len(form.parts), form.layers, form.heads, form.block_size, form.opaque, form.alignment]
    words += form.widths
    for part in form.parts:
        words += part.table, part.offset
        for name in PART_AXES:
            steps = part.axis(name)
            words.append(len(steps))
            for step in steps:
                words += step.extent, step.table, step.stride
    return words


#: Forms by their words and by themselves, so that equal forms are one object.
_forms: Bounded[Any, Form] = Bounded("forms", 8192)


def same_form(form: Form) -> Form:
    """Return the first form that was equal to this one, so that look-ups compare by identity."""
    return _forms.setdefault(form, form)


#: The readers that were made: layouts and executors keep their addresses. Several threads may each
#: make the first one.
_readers = list[TensorReader | None]()


@cache
def plain_reader() -> TensorReader | None:
    """Return the core's reader of plain tensors, which finds known forms; None: torch is too old
    for it."""
    reader = tensor_reader(_forms)
    _readers.append(reader)
    return reader


def form_of(words: bytes, encoding: tuple[Any, ...] = ()) -> Form:
    """Return the form of the words of `View::form` in `native/core/view.h`.

    ``encoding`` is that of the form. Equal words have one form.
    """
    key = (words, encoding) if encoding else words
    known = _forms.get(key)
    if known is not None:
        return known
    numbers = iter(array("q", words))
    kv, layers, heads, block_size, opaque, alignment = islice(numbers, 6)
    widths = tuple(islice(numbers, kv))
    parts = []
    for _ in range(kv):
        table, offset = islice(numbers, 2)
        axes = []
        for _ in PART_AXES:
            count = next(numbers)
            axes.append(tuple(Step(*islice(numbers, 3)) for _ in range(count)))
        parts.append(KVRows(table, offset, *axes))
    place, on_device = islice(numbers, 2)
    dtypes = tuple(dtype_names()[word] for word in numbers)
    form = Form(
        parts=tuple(parts),
        layers=layers,
        heads=heads,
        widths=widths,
        block_size=block_size,
        opaque=opaque == 1,
        alignment=alignment,
        place=PLACES[place],
        dtypes=dtypes if any(dtypes) else (),
        table_on_device=on_device == 1,
        encoding=encoding,
    )
    form = _forms[key] = same_form(form)
    return form


def widest_vector(numbers: Iterable[int]) -> int:
    """Return the largest power of two up to 16 that divides every number: a vector's bytes."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits


def locate(table: int, offset: int, steps: Sequence[Step], position: int) -> tuple[int, int]:
    """Return the table entry and byte offset of ``position`` on one axis."""
    for step in reversed(steps):
        position, at = divmod(position, step.extent) if step.extent else (0, position)
        table = table + at * step.table
        offset = offset + at * step.stride
    return table, offset
