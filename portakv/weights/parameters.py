# SPDX-License-Identifier: Apache-2.0
"""Describe the parameters of a model, and choose which owner provides which part of each.

A parameter is a tensor and the boxes of the whole tensor that it contains. Nothing here moves a
byte: `portakv.weights.pull` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from operator import add, attrgetter, sub
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta, ValidationError, convert, structs

from portakv.arguments import instance, invalid, items, text, whole
from portakv.core.view import READ_ONLY, writable
from portakv.errors import InvalidTerms, LayoutError
from portakv.migrate.messages import Box as Ends
from portakv.migrate.messages import Bytes, Dims, Message, Small, Text, prepare
from portakv.migrate.shards import deal
from portakv.migrate.shared_memory import Held, export_all
from portakv.view.bound import reach
from portakv.view.overlap import overlaps_itself


class Box(NamedTuple):
    """A box: ``extents`` elements from ``offset`` on of a whole tensor, here from ``start`` on."""

    offset: Dims
    start: Dims
    extents: Dims

    @property
    def ends(self) -> Ends:
        """Return from and to on each axis of the whole tensor."""
        return tuple(zip(self.offset, map(add, self.offset, self.extents), strict=True))

    def part(self, ends: Ends) -> Box:
        """Return the part of the box between these ends."""
        pairs = isinstance(ends, Sequence) and len(ends) == len(self.offset)
        if not pairs or not all(isinstance(x, Sequence) and len(x) == 2 for x in ends):
            raise invalid("ends", f"{len(self.offset)} pairs (from, to)", ends)
        first = tuple(a for a, _ in ends)
        start = map(add, map(sub, first, self.offset), self.start)
        return Box(first, tuple(start), tuple(b - a for a, b in ends))


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor, and the boxes of a tensor of ``shape`` that it contains; by default all of it.

    ``packing`` names how values were repacked after loading (Marlin, ...). ``block``: the elements
    on each axis that share a scale; boxes begin and end at its multiples. Scales are separate
    parameters. Elements in no box, such as padding, are not modified. Later changes of lists that
    were passed have no effect.
    """

    tensor: torch.Tensor
    shape: Sequence[int] | None = None
    boxes: Sequence[Box] | None = None
    packing: str = ""
    block: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Keep the terms as tuples, so that nothing can change them after a check."""
        terms = vars(self)
        with suppress(TypeError):  # `named` says what is wrong
            terms["block"] = tuple(self.block)
            if self.shape is not None:
                terms["shape"] = tuple(self.shape)
            if self.boxes is not None:
                terms["boxes"] = tuple(self.boxes)
                terms["boxes"] = tuple(Box(*map(tuple, box)) for box in self.boxes)

    @classmethod
    def split(
        cls,
        tensor: torch.Tensor,
        axis: int,
        parts: Sequence[int],
        cut: tuple[int, int],
        unit: int = 1,
    ) -> Parameter:
        """Return the parameter of rank ``cut[0]`` of ``cut[1]``, of a tensor that is cut along
        ``axis``.

        ``parts``: the whole extents on that axis of each fused part (query, key, value), or one
        extent. Each part is cut at multiples of ``unit`` (a head's rows). Ranks that outnumber
        these share.
        """
        instance("tensor", tensor, torch.Tensor)
        if not tensor.ndim:
            raise invalid("tensor", "a tensor with an axis to split", tensor)
        whole("axis", axis, -tensor.ndim, tensor.ndim - 1)
        parts = [whole("parts", part) for part in items("parts", parts, "extents")]
        if not isinstance(cut, tuple) or len(cut) != 2:
            raise invalid("cut", "a tuple (rank, ranks)", cut)
        whole("cut", cut[1], 1)
        whole("cut", cut[0], 0, cut[1] - 1)
        whole("unit", unit, 1)
        local = tuple(tensor.shape)
        axis %= len(local)
        before = local[:axis]
        after = local[axis + 1 :]

        def from_zero(on_axis: int) -> tuple[int, ...]:
            """Return a start: a number on the axis, and zero on the others."""
            return (*[0] * len(before), on_axis, *[0] * len(after))

        rank, ranks = cut
        boxes = list[Box]()
        at = 0  # in the tensor
        done = 0  # in the whole tensor
        for part in parts:
            first = part // unit * rank // ranks * unit
            past = part // unit * (rank + 1) // ranks * unit
            extent = max(unit, past - first)
            boxes.append(Box(from_zero(done + first), from_zero(at), (*before, extent, *after)))
            at += extent
            done += part
        if local[axis] != at or any(x % unit or x < unit for x in parts):
            raise LayoutError(
                f"Expected a tensor with {at} elements along axis {axis}, for its cut {cut} of "
                f"parts {parts}, which are multiples of unit {unit}, got {local}. Correct it, "
                f"or give boxes."
            )
        return cls(tensor, (*before, done, *after), (*boxes,))


Parameters = Mapping[str, Parameter | torch.Tensor]  # by name; a plain tensor is whole
_DEFAULTS = None, None, "", ()  # terms of a whole tensor
_Numbers = tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...]
#: The shape, the block and the boxes of a parameter.
_Terms = tuple[_Numbers, _Numbers, tuple[tuple[_Numbers, _Numbers, _Numbers], ...]]
_dtype_of = attrgetter("dtype")
_kind_of = attrgetter("device", "layout")


class Item(Message, frozen=True):
    """The description of a parameter.

    ``tie``: the first name of its memory. ``local`` and ``strides``: of the tensor itself.
    ``place``: the region of its first element, and the byte offset there; None: no memory.
    """

    dtype: Annotated[str, Meta(max_length=32)]
    shape: Dims
    boxes: Annotated[tuple[Box, ...], Meta(max_length=1024)]
    packing: Text
    block: Dims
    tie: Text
    local: Dims
    strides: Dims
    place: tuple[Small, Bytes] | None = None

    def __post_init__(self) -> None:
        of = self.shape
        blocks = self.block or (1,) * len(self.shape)
        for offset, _, extents in self.boxes:
            axes = zip(offset, map(add, offset, extents), of, blocks, strict=False)
            if len({*map(len, (offset, extents, of, blocks))}) > 1 or any(
                k < 1 or a < 0 or b > n or a % k or (b % k and b < n) for a, b, n, k in axes
            ):
                raise LayoutError(
                    f"Expected a box in the shape {of} that cuts no block of {blocks}, got "
                    f"{extents} elements from {offset} on. Correct the box."
                )


class Cell(NamedTuple):
    """A box of the reader's parameter, and its start ``src`` in an owner's tensor."""

    name: str
    owner: int
    box: Box
    src: Dims


def part_of(tensor: torch.Tensor, start: Dims, extents: Dims) -> torch.Tensor:
    """Return a part of a tensor; raise `LayoutError` if the tensor does not contain it."""
    part = tensor.detach()
    if part.shape != extents or any(start):  # else it is the whole tensor
        axes = zip(start, extents, tensor.shape, strict=False)
        part = part[tuple(slice(a, a + n) for a, n, _ in axes)]
    if part.shape != extents or part.is_meta:
        raise LayoutError(
            f"Expected a box in a tensor of shape {tuple(tensor.shape)} with memory, got "
            f"{tuple(extents)} elements from {tuple(start)} on, on {tensor.device}. Correct the "
            f"box."
        )
    return part


def named(argument: str, parameters: Parameters) -> dict[str, Parameter]:
    """Return parameters by name, all checked."""
    if not isinstance(parameters, Mapping):
        raise invalid(argument, "a mapping of names to tensors", parameters)
    named = dict[str, Parameter]()
    for name, value in parameters.items():
        if type(name) is not str or not name.isascii() or not 0 < len(name) < 1024:
            text(f"a name in {argument}", name)
        parameter = value if isinstance(value, Parameter) else Parameter(value)
        tensor = parameter.tensor
        if not isinstance(tensor, torch.Tensor):
            instance(f"{argument}[{name!r}]", tensor, torch.Tensor)
        if why := _odd(tensor):
            raise LayoutError(f"Expected {name} to be a plain tensor, got {why}. Pass its parts.")
        if parameter is value:
            text(f"packing of {argument}[{name!r}]", parameter.packing, least=0)
            _check_boxes(name, parameter)
        named[name] = parameter
    return named


def tensors_of(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return the tensors of checked parameters by name."""
    return {n: x.tensor if isinstance(x, Parameter) else x for n, x in parameters.items()}


def facts_of(parameters: Parameters) -> tuple[object, ...] | None:
    """Return all that the checks and the plan of a pull depend on, as a key; None if there is none.

    Parameters with equal keys pass or fail the same checks. The key retains no tensor. Its second
    part is the result of `forms_of`.
    """
    tensors = [*tensors_of(parameters).values()]
    terms = [
        (x.shape, x.boxes, x.packing, x.block) if isinstance(x, Parameter) else _DEFAULTS
        for x in parameters.values()
    ]
    try:
        # Each `map` makes its calls without a step of Python for a tensor.
        facts = (
            tuple(parameters),
            forms_of(tensors),
            tuple(map(_kind_of, tensors)),
            tuple(map(torch.Tensor.is_conj, tensors)),
            tuple(map(torch.Tensor.is_neg, tensors)),
            tuple(terms),
        )
        hash(facts[-1])  # the only part that may have no hash
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # the checks say why
        return None
    return facts


def forms_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[object, ...], ...]:
    """Return all about tensors that operations in place can change and the checks depend on.

    An address belongs to one device. Whether a tensor is a conjugate view is fixed for its life.
    """
    return (
        # Tied parameters have one address. Checksums are computed there.
        tuple(map(torch.Tensor.data_ptr, tensors)),
        tuple(map(torch.Tensor.size, tensors)),
        tuple(map(torch.Tensor.stride, tensors)),
        tuple(map(_dtype_of, tensors)),
    )


def _odd(tensor: torch.Tensor) -> str:
    """Return why no plain bytes of a tensor can be copied; empty if they can."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"one of layout {'nested' if tensor.is_nested else tensor.layout}"
    if tensor.is_quantized:
        return "a quantized one"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugate or negative view"
    if tensor.is_meta:
        return "one without memory (meta)"
    return ""


def _check_boxes(name: str, parameter: Parameter) -> None:
    """Raise `InvalidTerms` for shapes, blocks or boxes that are not whole numbers."""
    terms = parameter.shape or (), parameter.block, parameter.boxes or ()
    try:
        (_, _, boxes) = convert(terms, _Terms)
        right = all(len({*map(len, box)}) == 1 for box in boxes)
    except ValidationError:
        right = False
    if not right:
        expected = "whole numbers in boxes, shape and block, of one length for each box"
        raise InvalidTerms(f"Expected {name} to have {expected}, got others. Pass `Box` of tuples.")


def check_destinations(parameters: Mapping[str, Parameter]) -> None:
    """Raise `LayoutError` for a destination that has several elements at one address, or that the
    host may not write."""
    for name, parameter in parameters.items():
        tensor = parameter.tensor
        if not tensor.is_contiguous() and overlaps_itself(tensor):
            raise LayoutError(
                f"Expected {name} to have memory for each element, got an expanded tensor, or "
                f"another one whose elements share some. Pass a contiguous one."
            )
        first = tensor.data_ptr()
        nbytes = reach(tensor.shape, tensor.stride()) * tensor.itemsize
        if tensor.is_cpu and not writable(first, first + nbytes):
            raise LayoutError(f"Expected {name} to be writable, got a tensor: {READ_ONLY}.")


def items_of(parameters: Mapping[str, Parameter]) -> dict[str, Item]:
    """Return the descriptions of parameters; several names of one memory are tied."""
    first = dict[object, str]()
    items = dict[str, Item]()
    for name, x in parameters.items():
        tensor = x.tensor
        local = tuple(tensor.shape)
        shape = local if x.shape is None else tuple(x.shape)
        zeros = (0,) * len(local)
        boxes = tuple(x.boxes or [Box(zeros, zeros, local)])
        dtype = str(tensor.dtype).removeprefix("torch.")
        item = Item(dtype, shape, boxes, x.packing, tuple(x.block), "", local, tensor.stride())
        for box in boxes:
            part_of(tensor, box.start, box.extents)
        memory = tensor.data_ptr() or name, tensor.device, item
        items[name] = structs.replace(item, tie=first.setdefault(memory, name))
    return items


def export_items(
    tensors: Mapping[str, torch.Tensor], items: Mapping[str, Item], what: str
) -> tuple[list[Held], dict[str, Item]]:
    """Return the memory of items as few regions, and the items with their places there.

    Keep the tensors until all regions are closed. Raises `Unsupported`, which names
    ``what[name]``, for memory that cannot be shared.
    """
    memory = {name: x for name, x in tensors.items() if items[name].tie == name}
    regions, places = export_all(memory, what)
    placed = {name: structs.replace(item, place=places[item.tie]) for name, item in items.items()}
    return regions, placed


def _unlike(dst: Mapping[str, Item], src: Mapping[str, Item]) -> Iterator[tuple[str, str]]:
    """Yield each parameter that both sides describe differently, and the difference."""
    both = [x for x in dst if x in src]
    own_ties, ties = (names_of({x: side[x].tie for x in both}) for side in (dst, src))
    for name in both:
        for what in ("dtype", "shape", "packing", "block"):
            here = getattr(dst[name], what)
            there = getattr(src[name], what)
            if here != there:
                yield name, f"its {what} is {here!r} here and {there!r} there"
        if own_ties[name] != ties[name]:
            yield name, f"{own_ties[name]} are one tensor here, and {ties[name]} there"


def names_of(memory: Mapping[str, object]) -> dict[str, list[str]]:
    """Return for each name all names of its memory, in order."""
    groups = defaultdict[object, list[str]](list)
    for name, each in memory.items():
        groups[each].append(name)
    return {name: groups[each] for name, each in memory.items()}


def plan(
    dst: Mapping[str, Item], owners: Sequence[Mapping[str, Item]], some: bool = False
) -> list[Cell]:
    """Return the cells of each parameter, each from the first owner that has it.

    One `LayoutError` lists all that does not match. ``some``: owners may have further parameters.
    """
    surplus = [] if some else [x for src in owners for x in src if x not in dst]
    unlike = [x for src in owners for x in _unlike(dst, src)]
    wrong = [f"{name}: it was not requested" for name in surplus]
    wrong += [f"{name}: {why}" for name, why in unlike]
    bad = {name for name, _ in unlike}
    cells = list[Cell]()
    for name, item in dst.items():
        candidates = [(i, box) for i, x in enumerate(owners) if name in x for box in x[name].boxes]
        wrong += [] if candidates else [f"{name}: no owner has it"]
        boxes = item.boxes if candidates and name not in bad else ()
        for box in (x for x in boxes if prod(x.extents)):
            dealt, holes = deal(
                box.ends, {n: (x.ends, None) for n, (_, x) in enumerate(candidates)}
            )
            for n, ends, _ in dealt:
                owner, src = candidates[n]
                cells.append(Cell(name, owner, box.part(ends), src.part(ends).start))
            for hole in (box.part(ends) for ends, _ in holes):
                wrong.append(f"{name}: no owner has {hole.extents} elements from {hole.offset} on")
    if wrong:
        raise LayoutError(
            f"Expected {len(dst)} weights that match {len(owners)} owners, got the differences "
            f"below; nothing was pulled. Correct them on either side:\n"
            + "\n".join(dict.fromkeys(wrong))
        )
    return cells


prepare(globals())
