# SPDX-License-Identifier: Apache-2.0
"""`BoundLayout`: a layout with its declared extents reads the tensors of a `KVView`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError
from portakv.layout import presets
from portakv.layout.extents import Sized, declare, factor_extent, finish, positive, solve
from portakv.layout.language import Factor, Layout, parse
from portakv.layout.presets import Extent
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form, build_parts, same_form

_STRIDED = torch.strided
#: Tensors of these are bytes, whatever they stand for: fp8 and packed formats are kept so.
_BYTES = frozenset({torch.uint8, torch.int8})

#: A tensor, or the containers that a layout names, outermost first.
Tensors: TypeAlias = "torch.Tensor | Sequence[Tensors] | Mapping[Any, Tensors]"
Grid = npt.NDArray[np.object_]
#: How a container factor walks: entries of the table, and bytes for each kv, of one step.
Walks = dict[Factor, tuple[int, tuple[int, ...]]]
#: Sorted, disjoint ranges [first byte, past the last byte).
Spans = list[tuple[int, int]]
#: Form, origins, owners and spans of a view, as `KVView` documents them.
Rows = tuple[Form, tuple[int, ...], tuple[torch.Tensor, ...], Spans]
#: Rows, slots, device, and whether a tensor requires grad. Every call would pay for names.
Facts = tuple[Rows, int, torch.device, bool]


class BoundLayout:
    """A layout and declared extents; with ``reinterpret`` rows are bytes, whatever the dtype."""

    __slots__ = ("_known", "declared", "layout", "reinterpret")

    def __init__(
        self, layout: Layout, extents: Mapping[str, Extent], reinterpret: bool = False
    ) -> None:
        self.layout, self.reinterpret = layout, reinterpret
        self.declared = declare(layout, extents)
        # What tensors of one key share: form, slots, device, bytes from the first to past the last.
        self._known: Bounded[tuple[Any, ...], tuple[Form, int, torch.device, int]]
        self._known = Bounded("forms of tensors", 256)

    def read(self, tensors: Tensors) -> Facts:
        """Find form and addresses.

        Raises:
            LayoutError: tensors that contradict the layout or the extents.
            DeviceMismatch: tensors on different devices.
        """
        if (
            self.layout.containers
            or not isinstance(tensors, torch.Tensor)
            or tensors.layout is not _STRIDED
            or tensors.is_nested
            or tensors.is_conj()
            or tensors.is_neg()
        ):
            return self._read_all(tensors)
        address = _address(tensors)
        if not address:
            return self._read_all(tensors)
        # The storage offset tells whether the storage's base is as aligned as the address.
        key = (
            tensors.shape, tensors.stride(), tensors.dtype, tensors.device, address & 15,
            tensors.storage_offset() & 15, tensors.is_cpu and tensors.is_pinned(),
        )  # fmt: skip
        known = self._known.get(key)
        if known is None:
            facts = self._read_all(tensors)
            (form, _, _, spans), slots, device, _ = facts
            self._known[key] = form, slots, device, spans[0][1] - spans[0][0] if spans else 0
            return facts
        form, slots, device, reach = known
        spans = [(address, address + reach)] if reach else []
        return (form, (address,), (tensors,), spans), slots, device, tensors.requires_grad

    def _read_all(self, tensors: Tensors) -> Facts:
        layout = self.layout
        grid = _to_grid(layout, tensors)
        flat: list[torch.Tensor] = list(grid.reshape(-1))
        device = _one_device(flat)
        values = [dict(known) for known in self.declared]
        outer = [(g, [n] * len(values)) for g, n in zip(layout.containers, grid.shape, strict=True)]
        finish(layout, values, solve(layout, values, outer))
        factors = [f for group in layout.containers for f in group.factors]
        cube = grid.reshape([factor_extent(f, values[0]) or 1 for f in factors])
        picks = _pick_per_kv(cube, [f.axis for f in factors], len(values))
        shapes = [_dim_shapes(layout, tensor) for tensor in picks]
        sized: list[Sized] = [(g, [s[i][0] for s in shapes]) for i, g in enumerate(layout.dims)]
        finish(layout, values, solve(layout, values, sized))
        origins, owners, walks = _tabulate(factors, cube, len(values))
        strides = [[stride for _, stride in shape] for shape in shapes]
        itemsizes = [tensor.element_size() for tensor in picks]
        # Torch addresses memory from its storage's base, so the base has to be aligned as well.
        bits = 16
        for tensor in flat:
            bits |= tensor.data_ptr() | tensor.untyped_storage().data_ptr()
        place = "device"
        if device.type == "cpu":
            place = "pinned" if all(tensor.is_pinned() for tensor in flat) else "pageable"
        known, axis = values[0], "page" if layout.opaque else "dim"
        dtypes = tuple("" if t.dtype in _BYTES else str(t.dtype).partition(".")[2] for t in picks)
        form = Form(
            parts=build_parts(layout, values, strides, itemsizes, walks),
            layers=known["layer"],
            heads=known["head"],
            widths=tuple(v[axis] * size for v, size in zip(values, itemsizes, strict=True)),
            block_size=known["token"] if layout.paged else 0,
            opaque=layout.opaque,
            alignment=bits & -bits,
            place=place,
            dtypes=dtypes if any(dtypes) and not (layout.opaque or self.reinterpret) else (),
        )
        slots = known["token"] * known.get("block", 1)
        grad = any(tensor.requires_grad for tensor in flat)
        return (same_form(form), origins, owners, _spans(flat)), slots, device, grad


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
    declared: list[tuple[str, Extent]] = []
    for name, value in sorted(extents.items()):
        # Plain integers: equal numbers of other types must not pass for them.
        if name == "dim" and isinstance(value, (list, tuple)):
            declared.append((name, tuple(positive(name, one) for one in value)))
        elif value is not None:
            declared.append((name, positive(name, value)))
    return _bound(layout, tuple(declared), bool(reinterpret))


def _to_grid(layout: Layout, tensors: object) -> Grid:
    """Lay nested containers out as an array of tensors, one axis for each container level."""
    shape: list[int] = []
    level: list[Any] = [tensors]
    for group in layout.containers:
        rows = [list(x.values()) if isinstance(x, Mapping) else x for x in level]
        wrong = next((x for x in rows if not isinstance(x, (list, tuple))), rows)
        if wrong is not rows:
            raise _not_read(
                wrong,
                f"{layout.text!r} names {len(layout.containers)} container level(s) left of `|`, "
                f"but a {type(wrong).__name__} was found where a list, tuple or dict was expected; "
                f"write its axis right of `|` if it is a dimension of the tensor.",
            )
        first, *others = dict.fromkeys(map(len, rows))
        if not first:
            raise LayoutError(
                f"A container of {layout.text!r} is empty; hand over at least one tensor."
            )
        if others:
            raise LayoutError(
                f"Containers of {group} in {layout.text!r} have unequal lengths {first} and "
                f"{others[0]}; all must be equally long."
            )
        shape.append(first)
        level = [item for row in rows for item in row]
    grid = np.empty(len(level), dtype=object)
    for at, tensor in enumerate(level):
        if not isinstance(tensor, torch.Tensor):
            raise _not_read(
                tensor,
                f"{layout.text!r} expects tensors inside {len(shape)} container level(s), but a "
                f"{type(tensor).__name__} was found; add a container axis left of `|`.",
            )
        grid[at] = tensor
    return grid.reshape(shape)


def _not_read(found: object, why: str) -> LayoutError:
    if isinstance(found, np.ndarray):
        why = (
            f"A numpy array of shape {found.shape} was found where tensors are read; hand over "
            f"torch.from_numpy(array), which shares its memory."
        )
    return LayoutError(why)


def _by_kv(array: npt.NDArray[Any], kv_at: int | None) -> npt.NDArray[Any]:
    """A row for each kv, or one for all if no axis is ``kv``."""
    rows = array[None] if kv_at is None else np.moveaxis(array, kv_at, 0)
    return rows.reshape(len(rows), -1)


def _tabulate(
    factors: Sequence[Factor], cube: Grid, kv: int
) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...], Walks]:
    """Collapse a grid into the smallest table: its addresses, for each of them the tensor in whose
    storage it lies, and how each container factor walks through them.

    Tensors of one allocation at equal distances become a stride, so that a block that is contiguous
    over all layers is one run; what is left stays a table.
    """
    # Blocks stand outermost: then no step of another axis depends on how many there are.
    rank = {"block": 0, "token": 1}
    order = sorted(range(len(factors)), key=lambda i: rank.get(factors[i].axis, 2))
    cube, axes = cube.transpose(order), [factors[i] for i in order]
    places = [(t.data_ptr(), t.untyped_storage().data_ptr()) for t in cube.reshape(-1)]
    where, homes = np.array(places, dtype=np.int64).T.reshape(2, *cube.shape)
    walks: Walks = {}
    for at, factor in enumerate(axes):
        # Memory objects come and go: whether they lie at equal distances must not change a form.
        if factor.axis in ("block", "token"):
            continue
        kv_at = next((i for i, f in enumerate(axes) if f.axis == "kv" and i != at), None)
        distances = _distances(where, homes, at, kv_at)
        if distances is not None:
            walks[factor] = 0, distances if len(distances) == kv else distances * kv
            where, homes, cube = (x.take([0], axis=at) for x in (where, homes, cube))
    entries = 1
    for at in reversed(range(len(axes))):
        if axes[at] not in walks:
            walks[axes[at]] = (entries, (0,) * kv)
            entries *= where.shape[at]
    return tuple(where.reshape(-1).tolist()), tuple(cube.reshape(-1)), walks


def _distances(
    where: npt.NDArray[np.int64], homes: npt.NDArray[np.int64], at: int, kv_at: int | None
) -> tuple[int, ...] | None:
    """The constant distance along axis ``at`` inside one allocation, for each kv or for all; else
    None."""
    if where.shape[at] == 1:
        return (0,)
    steps = _by_kv(np.diff(where, axis=at), kv_at)
    # Torch has no negative strides, so descending tensors stay a table.
    if np.diff(homes, axis=at).any() or (steps != steps[:, :1]).any() or steps.min() < 0:
        return None
    return tuple(steps[:, 0].tolist())


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
        if tensor.layout is not _STRIDED or tensor.is_nested:
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


def _pick_per_kv(cube: Grid, axes: list[str], kv: int) -> list[torch.Tensor]:
    """One tensor for each kv, after checking that it speaks for all of its kv."""
    rows = _by_kv(cube, axes.index("kv") if "kv" in axes else None)
    for row in rows:
        kinds = dict.fromkeys((tensor.shape, tensor.stride(), tensor.dtype) for tensor in row)
        if len(kinds) > 1:
            one, other = (f"{tuple(n)} strides {s} {dtype}" for n, s, dtype in list(kinds)[:2])
            raise LayoutError(
                f"Tensors of one view share shape, strides and dtype, but {one} and {other} were "
                f"found; tensors that differ are another group, with a view of its own."
            )
    picks = [row[0] for row in rows]
    return picks if len(picks) == kv else picks * kv


def _dim_shapes(layout: Layout, tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Size and stride (elements) of each dimension group; the last may cover several."""
    shape, strides, groups = list(tensor.shape), list(tensor.stride()), layout.dims
    extra = len(shape) - len(groups)
    if extra < 0 or (extra and not layout.open_end):
        raise LayoutError(
            f"{layout.text!r} has {len(groups)} dimension(s) right of its containers, but a tensor "
            f"of shape {tuple(shape)} was found; write an axis (or `1`) for each dimension."
        )
    for _ in range(extra):
        size, stride = shape.pop(), strides.pop()
        if shape[-1] != 1 and size != 1 and strides[-1] != size * stride:
            raise LayoutError(
                f"{groups[-1]} of {layout.text!r} covers several dimensions of a tensor of shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}, which are not contiguous "
                f"together; write an axis for each dimension."
            )
        if size != 1:
            strides[-1] = stride
        shape[-1] *= size
    return list(zip(shape, strides, strict=True))


def reach(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to past the last of a tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0


def _spans(tensors: Sequence[torch.Tensor]) -> Spans:
    found = {
        (t.data_ptr(), t.data_ptr() + reach(t.shape, t.stride()) * t.element_size())
        for t in tensors
        if t.numel()
    }
    merged: Spans = []
    for first, past in sorted(found):
        if merged and first < merged[-1][1]:
            first, end = merged.pop()
            past = max(past, end)
        merged.append((first, past))
    return merged
