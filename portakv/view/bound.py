# SPDX-License-Identifier: Apache-2.0
"""`BoundLayout`: a layout with its declared extents reads the tensors of a `KVView`.

Addresses come from ``data_ptr()`` and strides, never from contiguity, the number of tensors or
``shape[i] == 2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError
from portakv.layout import presets
from portakv.layout.extents import Sized, Values, declare, factor_extent, finish, positive, solve
from portakv.layout.language import Factor, Layout, parse
from portakv.layout.presets import Extent
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form, Part, build_parts, same_form

_STRIDED = torch.strided
#: Tensors of these are bytes, whatever they stand for: fp8 and packed formats are kept so.
_BYTES = frozenset({torch.uint8, torch.int8})
_KNOWN_SHAPES = 256  # forms of single tensors that one layout remembers

#: A tensor, or the containers that a layout names, outermost first.
Tensors: TypeAlias = "torch.Tensor | Sequence[Tensors] | Mapping[Any, Tensors]"
Grid = npt.NDArray[np.object_]
#: How a container factor walks: entries of the table, and bytes for each kv, of one step.
Walks = dict[Factor, tuple[int, tuple[int, ...]]]


class Facts(NamedTuple):
    """What a bound layout finds out about tensors; `KVView` documents each."""

    form: Form
    origins: tuple[int, ...]
    owners: tuple[torch.Tensor, ...]
    slots: int
    device: torch.device
    requires_grad: bool
    spans: list[tuple[int, int]]


#: `Facts` without names, whose making every call would pay for.
Found = tuple[
    Form, tuple[int, ...], tuple[torch.Tensor, ...], int, torch.device, bool, list[tuple[int, int]]
]


class BoundLayout:
    """A layout and its declared extents; with ``reinterpret`` rows are bytes, whatever the dtype.

    A tensor of known shape, strides, dtype and place reuses its form by one look-up.
    """

    __slots__ = ("_known", "declared", "layout", "reinterpret")

    def __init__(
        self, layout: Layout, extents: Mapping[str, Extent], reinterpret: bool = False
    ) -> None:
        self.layout, self.reinterpret = layout, reinterpret
        self.declared = declare(layout, extents)
        # What tensors of one shape, strides, dtype, place and alignment share: form, slots, device,
        # and the bytes from the first to past the last.
        self._known: Bounded[tuple[Any, ...], tuple[Form, int, torch.device, int]]
        self._known = Bounded("forms of tensors", _KNOWN_SHAPES)

    def read(self, tensors: Tensors) -> Found:
        """Find form and addresses, in the order of `Facts`.

        Raises:
            LayoutError: tensors that contradict the layout or the extents.
            DeviceMismatch: tensors on different devices.
        """
        if self.layout.containers or not isinstance(tensors, torch.Tensor):
            return self._read_all(tensors)
        if tensors.layout is not _STRIDED or tensors.is_nested:
            return self._read_all(tensors)  # which refuses it
        address = 0 if tensors.is_conj() or tensors.is_neg() else _address(tensors)
        if not address:
            return self._read_all(tensors)  # no memory of its own, or none of it used
        # The storage offset tells whether the storage's base is as aligned as the address.
        key = (
            tensors.shape, tensors.stride(), tensors.dtype, tensors.device, address & 15,
            tensors.storage_offset() & 15, tensors.is_cpu and tensors.is_pinned(),
        )  # fmt: skip
        known = self._known.get(key)
        if known is None:
            facts = self._read_all(tensors)
            reach = facts.spans[0][1] - facts.spans[0][0] if facts.spans else 0
            self._known[key] = facts.form, facts.slots, facts.device, reach
            return facts
        form, slots, device, reach = known
        spans = [(address, address + reach)] if reach else []
        return form, (address,), (tensors,), slots, device, tensors.requires_grad, spans

    def _read_all(self, tensors: Tensors) -> Facts:
        layout = self.layout
        grid = _to_grid(layout, tensors)
        flat: list[torch.Tensor] = list(grid.reshape(-1))
        device = _one_device(flat)
        values = [dict(known) for known in self.declared]
        outer = [(g, [n] * len(values)) for g, n in zip(layout.containers, grid.shape, strict=True)]
        stuck = solve(layout, values, outer)
        if stuck:
            finish(layout, values, stuck)
        picks = _pick_per_kv(layout, grid, values)
        shapes = [_dim_shapes(layout, tensor) for tensor in picks]
        sized: list[Sized] = [(g, [s[i][0] for s in shapes]) for i, g in enumerate(layout.dims)]
        finish(layout, values, solve(layout, values, sized))
        origins, owners, walks = _tabulate(_container_factors(layout, values), grid, len(values))
        strides = [[stride for _, stride in shape] for shape in shapes]
        itemsizes = [tensor.element_size() for tensor in picks]
        parts = build_parts(layout, values, strides, itemsizes, walks)
        slots = values[0]["token"] * values[0].get("block", 1)
        grad = any(tensor.requires_grad for tensor in flat)
        form = _form(layout, values, parts, picks, flat)
        form = same_form(form.untyped() if self.reinterpret else form)
        return Facts(form, origins, owners, slots, device, grad, _spans(flat))


@lru_cache(maxsize=256)
def _bound(layout: str, declared: tuple[tuple[str, Extent], ...], reinterpret: bool) -> BoundLayout:
    text, always = presets.resolve(layout)
    extents = dict(always)
    for name, value in declared:
        if name in extents and extents[name] != value:
            raise LayoutError(
                f"{name}={value} was declared, but preset {layout!r} is true only for "
                f"{name}={extents[name]}; declare that, or write the layout string."
            )
        extents[name] = value
    return BoundLayout(parse(text), extents, reinterpret)


def bind_layout(
    layout: str, /, *, reinterpret: bool = False, **extents: int | Sequence[int] | None
) -> BoundLayout:
    """A layout (string or preset) bound to declared extents; None means undeclared.

    ``reinterpret``: rows are bytes, whatever the dtypes of the tensors.
    """
    if not isinstance(layout, str):
        raise LayoutError(f"A layout is a string of axis names, but {layout!r} was given.")
    declared = tuple(
        (name, _integers(name, value))
        for name, value in sorted(extents.items())
        if value is not None
    )
    return _bound(layout, declared, bool(reinterpret))


def _integers(name: str, value: object) -> Extent:
    """A declared extent as plain integers: equal numbers of other types must not pass for them."""
    if name == "dim" and isinstance(value, (list, tuple)):
        return tuple(positive(name, one) for one in value)
    return positive(name, value)


def _container_factors(layout: Layout, values: Values) -> list[tuple[Factor, int]]:
    """Each container factor and its extent, outermost first."""
    factors = [f for group in layout.containers for f in group.factors]
    return [(f, factor_extent(f, values[0]) or 1) for f in factors]


def _to_grid(layout: Layout, tensors: object) -> Grid:
    """Lay nested containers out as an array of tensors, one axis for each container level."""
    shape: list[int] = []
    level = [tensors]
    for group in layout.containers:
        rows = [_items(layout, container) for container in level]
        first = len(rows[0])
        if not first:
            raise LayoutError(
                f"A container of {layout.text!r} is empty; hand over at least one tensor."
            )
        for row in rows:
            if len(row) != first:
                raise LayoutError(
                    f"Containers of {group} in {layout.text!r} have unequal lengths {first} and "
                    f"{len(row)}; all must be equally long."
                )
        shape.append(first)
        level = [item for row in rows for item in row]
    grid = np.empty(len(level), dtype=object)
    for at, tensor in enumerate(level):
        if not isinstance(tensor, torch.Tensor):
            _refuse_array(tensor)
            raise LayoutError(
                f"{layout.text!r} expects tensors inside {len(shape)} container level(s), but a "
                f"{type(tensor).__name__} was found; add a container axis left of `|`."
            )
        grid[at] = tensor
    return grid.reshape(shape)


def _items(layout: Layout, level: object) -> list[object]:
    if isinstance(level, Mapping):
        return list(level.values())
    if isinstance(level, (list, tuple)):
        return list(level)
    _refuse_array(level)
    raise LayoutError(
        f"{layout.text!r} names {len(layout.containers)} container level(s) left of `|`, but a "
        f"{type(level).__name__} was found where a list, tuple or dict was expected; write its "
        f"axis right of `|` if it is a dimension of the tensor."
    )


def _refuse_array(level: object) -> None:
    if isinstance(level, np.ndarray):
        raise LayoutError(
            f"A numpy array of shape {level.shape} was found where tensors are read; hand over "
            f"torch.from_numpy(array), which shares its memory."
        )


def _tabulate(
    factors: Sequence[tuple[Factor, int]], grid: Grid, kv: int
) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...], Walks]:
    """Collapse a grid into the smallest table: its addresses, for each of them the tensor in whose
    storage it lies, and how each container factor walks through them.

    Tensors of one allocation at equal distances become a stride, so that a block that is contiguous
    over all layers is one run; what is left stays a table.
    """
    # Blocks stand outermost: then no step of another axis depends on how many there are.
    rank = {"block": 0, "token": 1}
    order = sorted(range(len(factors)), key=lambda i: rank.get(factors[i][0].axis, 2))
    cube = grid.reshape([extent for _, extent in factors]).transpose(order)
    axes = [factors[i][0] for i in order]
    flat = list(cube.reshape(-1))
    where = np.array([t.data_ptr() for t in flat], dtype=np.int64).reshape(cube.shape)
    homes = np.array([t.untyped_storage().data_ptr() for t in flat], dtype=np.int64)
    homes = homes.reshape(cube.shape)
    walks: Walks = {}
    for at, factor in enumerate(axes):
        kv_at = next((i for i, f in enumerate(axes) if f.axis == "kv" and i != at), None)
        distances = _distances(where, homes, at, kv_at, kv)
        # Memory objects come and go: whether they lie at equal distances must not change a form.
        if factor.axis not in ("block", "token") and distances is not None:
            walks[factor] = (0, distances)
            where, homes, cube = (x.take([0], axis=at) for x in (where, homes, cube))
    entries = 1
    for at in reversed(range(len(axes))):
        if axes[at] not in walks:
            walks[axes[at]] = (entries, (0,) * kv)
            entries *= where.shape[at]
    return tuple(where.reshape(-1).tolist()), tuple(cube.reshape(-1)), walks


def _distances(
    where: npt.NDArray[np.int64], homes: npt.NDArray[np.int64], at: int, kv_at: int | None, kv: int
) -> tuple[int, ...] | None:
    """For each kv the constant distance along axis ``at`` inside one allocation, else None."""
    if where.shape[at] == 1:
        return (0,) * kv
    steps = np.diff(where, axis=at)
    if np.diff(homes, axis=at).any():
        return None
    by_kv = steps.reshape(1, -1) if kv_at is None else np.moveaxis(steps, kv_at, 0)
    by_kv = by_kv.reshape(by_kv.shape[0], -1)
    if (by_kv != by_kv[:, :1]).any():
        return None
    found = tuple(int(row[0]) for row in by_kv)
    if min(found) < 0:
        return None  # torch has no negative strides, so descending tensors stay a table
    return found if len(found) == kv else found * kv


def _one_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise DeviceMismatch(
                f"The tensors of one view lie on {device} and {tensor.device}; one view lives on "
                f"one device. Make a view (and a connector) for each device."
            )
        if tensor.is_conj() or tensor.is_neg():
            raise LayoutError(
                "A lazily conjugated or negated tensor was found, whose bytes are not its values; "
                "hand over tensor.resolve_conj().resolve_neg()."
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise LayoutError(f"A view reads strided tensors, but a {kind} one was found.")
        if device.type != "meta" and tensor.numel() and not _address(tensor):
            raise LayoutError(
                f"A {type(tensor).__name__} of shape {tuple(tensor.shape)} without memory was "
                f"found; hand over allocated tensors."
            )
    if device.type == "meta":
        raise LayoutError("Tensors on device meta have no memory; hand over allocated tensors.")
    return device


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        raise LayoutError(
            f"A {type(tensor).__name__} of shape {tuple(tensor.shape)} without memory of its own "
            f"was found, as inside torch.vmap or torch.func.grad; hand over tensors outside of "
            f"function transforms."
        ) from None


def as_dtype(dtype: object) -> torch.dtype:
    """A dtype as it is; raises `LayoutError` for anything else, such as its name."""
    if not isinstance(dtype, torch.dtype):
        raise LayoutError(
            f"dtype={dtype!r} was asked; expected a torch.dtype, such as torch.float16."
        )
    return dtype


def _pick_per_kv(layout: Layout, grid: Grid, values: Values) -> list[torch.Tensor]:
    """One tensor for each kv, after checking that it speaks for all of its kv."""
    factors = _container_factors(layout, values)
    kv_at = next((i for i, (factor, _) in enumerate(factors) if factor.axis == "kv"), None)
    cube = grid.reshape([extent for _, extent in factors])
    rows = cube.reshape(1, -1) if kv_at is None else np.moveaxis(cube, kv_at, 0)
    rows = rows.reshape(len(rows), -1)
    for row in rows:
        first = row[0]
        for tensor in row[1:]:
            if (tensor.shape, tensor.stride(), tensor.dtype) != (
                first.shape, first.stride(), first.dtype,
            ):  # fmt: skip
                raise LayoutError(
                    f"Tensors of one view share shape, strides and dtype, but {_facts(first)} and "
                    f"{_facts(tensor)} were found; tensors that differ are another group, with a "
                    f"view of its own."
                )
    picks = [row[0] for row in rows]
    return picks if len(picks) == len(values) else picks * len(values)


def _facts(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} strides {tensor.stride()} {tensor.dtype}"


def _dim_shapes(layout: Layout, tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Size and stride (elements) of each dimension group; the last may cover several."""
    shape, strides, groups = list(tensor.shape), list(tensor.stride()), layout.dims
    extra = len(shape) - len(groups)
    last = groups[-1]
    if extra < 0 or (extra and not layout.open_end):
        raise LayoutError(
            f"{layout.text!r} has {len(groups)} dimension(s) right of its containers, but a tensor "
            f"of shape {tuple(shape)} was found; write an axis (or `1`) for each dimension."
        )
    while extra:
        size, stride = shape.pop(), strides.pop()
        if shape[-1] != 1 and size != 1 and strides[-1] != size * stride:
            raise LayoutError(
                f"{last} of {layout.text!r} covers several dimensions of a tensor of shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}, which are not contiguous "
                f"together; write an axis for each dimension."
            )
        stride = strides[-1] if size == 1 else stride
        shape[-1], strides[-1] = shape[-1] * size, stride
        extra -= 1
    return list(zip(shape, strides, strict=True))


def _form(
    layout: Layout,
    values: Values,
    parts: tuple[Part, ...],
    picks: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
) -> Form:
    known = values[0]
    axis = "page" if layout.opaque else "dim"
    bits = 0
    for tensor in tensors:
        # Torch addresses memory from its storage's base, so the base has to be aligned as well.
        bits |= tensor.data_ptr() | tensor.untyped_storage().data_ptr()
    dtypes = tuple("" if t.dtype in _BYTES else str(t.dtype).removeprefix("torch.") for t in picks)
    return Form(
        parts=parts,
        layers=known["layer"],
        heads=known["head"],
        widths=tuple(v[axis] * t.element_size() for v, t in zip(values, picks, strict=True)),
        block_size=known["token"] if layout.paged else 0,
        opaque=layout.opaque,
        alignment=min(16, bits & -bits) if bits else 16,
        place=_place(tensors),
        dtypes=dtypes if any(dtypes) and not layout.opaque else (),
    )


def _spans(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Sorted, disjoint ranges of bytes from the first to past the last of the tensors."""
    found = set()
    for tensor in tensors:
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            found.add((first, first + (last + 1) * tensor.element_size()))
    merged: list[tuple[int, int]] = []
    for first, past in sorted(found):
        if merged and first < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(past, merged[-1][1]))
        else:
            merged.append((first, past))
    return merged


def _place(tensors: Sequence[torch.Tensor]) -> str:
    if tensors[0].device.type != "cpu":
        return "device"
    return "pinned" if all(tensor.is_pinned() for tensor in tensors) else "pageable"
