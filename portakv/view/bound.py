# SPDX-License-Identifier: Apache-2.0
"""`BoundLayout`: a layout with its declared extents reads the tensors of a `KVView`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import flag, kind_of
from portakv.errors import DeviceMismatch, LayoutError
from portakv.layout.encodings import Encoding, as_encoding
from portakv.layout.extents import declare, factor_extent, positive, solve
from portakv.layout.language import Factor, Layout, parse
from portakv.layout.presets import Extent, resolve, suggested
from portakv.runtime.bounded import Bounded
from portakv.view.form import Form, build_parts, same_form, widest_vector
from portakv.view.packed import PackedExtents

_STRIDED = torch.strided
#: Presets at most that an error about a layout names.
FITTING = 5
#: Tensors of these are bytes, whatever they stand for: fp8 and packed formats are kept so.
_BYTES = frozenset({torch.uint8, torch.int8})

#: A tensor, or the containers that a layout names, outermost first.
Tensors: TypeAlias = "torch.Tensor | Sequence[Tensors] | Mapping[Any, Tensors]"
Grid = npt.NDArray[np.int64]
#: The walk of a container factor: table entries, and bytes for each kv, of one step.
Walks = dict[Factor, tuple[int, tuple[int, ...]]]
#: Sorted, disjoint ranges [first byte, past the last byte).
Spans = list[tuple[int, int]]
#: Form, origins, owners and spans of a view, as `KVView` documents them; None: found when needed.
Rows = tuple[Form, tuple[int, ...] | None, tuple[torch.Tensor, ...] | None, Spans | None]
#: Rows, slots, device, and whether a tensor requires grad. Every call would pay for names.
Facts = tuple[Rows, int, torch.device, bool]


class BoundLayout:
    """A layout and declared extents; with ``reinterpret`` rows are bytes, whatever the dtype.

    With ``encoding`` the tensors hold packed blocks.
    """

    __slots__ = ("_forms", "_known", "declared", "layout", "packed", "reinterpret")

    def __init__(
        self,
        text: str,
        extents: tuple[tuple[str, Extent], ...],
        reinterpret: bool,
        encoding: Encoding | None = None,
    ) -> None:
        self.reinterpret = reinterpret
        self.packed: PackedExtents | None = None
        if encoding is None:
            self.layout = parse(text)
            self.declared = declare(self.layout, dict(extents))
        else:
            self.packed = PackedExtents.of(text, dict(extents), encoding)
            self.layout = replace(parse(self.packed.text), text=text)
            self.declared = declare(self.layout, self.packed.extents)
        # The facts that tensors of one key share: form, slots, device, first byte and past the
        # last.
        self._known: Bounded[tuple[Any, ...], tuple[Form, int, torch.device, int]]
        self._known = Bounded("forms of tensors", 256)
        # The same for tensors in containers: form, slots, table entries, bytes of each.
        self._forms: Bounded[tuple[Any, ...], tuple[Form, int, list[int], list[int]]]
        self._forms = Bounded("forms of tensors in containers", 256)

    def read(self, tensors: Tensors) -> Facts:
        """Return the form, the addresses and the other facts of tensors.

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
        address = address_of(tensors)
        if not address:
            return self._read_all(tensors)
        # The storage offset shows whether the storage's base is as aligned as the address.
        key = (
            tensors.shape,
            tensors.stride(),
            tensors.dtype,
            tensors.device,
            address & 15,
            tensors.storage_offset() & 15,
            tensors.is_cpu and tensors.is_pinned(),
        )
        known = self._known.get(key)
        if known is None:
            facts = self._read_all(tensors)
            (form, _, _, spans), slots, device, _ = facts
            self._known[key] = form, slots, device, spans[0][1] - spans[0][0] if spans else 0
            return facts
        form, slots, device, nbytes = known
        spans = [(address, address + nbytes)] if nbytes else []
        return (form, (address,), (tensors,), spans), slots, device, tensors.requires_grad

    def _read_all(self, tensors: Tensors) -> Facts:
        flat, sizes = flatten_tensors(self.layout, tensors)
        device = _one_device(flat)
        begins = [tensor.data_ptr() for tensor in flat]
        place = "device"
        if device.type == "cpu":
            place = "pinned" if all(tensor.is_pinned() for tensor in flat) else "pageable"
        # Where tensors lie counts within a storage alone, and how a storage is aligned.
        bases = [tensor.untyped_storage().data_ptr() for tensor in flat]
        number = {base: nth for nth, base in enumerate(dict.fromkeys(bases))}
        lie = [
            (number[base], begin - base, base & 15, tensor.shape, tensor.stride(), tensor.dtype)
            for tensor, begin, base in zip(flat, begins, bases, strict=True)
        ]
        key = place, *sizes, *lie
        known = self._forms.get(key)
        if known is None:
            if self.packed is not None:
                self.packed.check(flat)
            values, factors, grid = self._contained(sizes)
            picks = _pick_per_kv(factors, flat, grid, len(values))
            entries, walks = _tabulate(factors, grid, len(values), begins, bases)
            # Torch addresses memory from its storage's base, so the base has to be aligned as well.
            form, slots = self._form(values, picks, walks, widest_vector(begins + bases), place)
            lengths = [reach(t.shape, t.stride()) * t.element_size() for t in flat]
            known = self._forms[key] = form, slots, entries, lengths
        form, slots, entries, lengths = known
        grad = any(tensor.requires_grad for tensor in flat)
        owners = tuple(flat[i] for i in entries)
        origins = tuple(begins[i] for i in entries)
        rows = form, origins, owners, _spans(zip(begins, lengths, strict=True))
        return rows, slots, device, grad

    def read_table(
        self, sizes: Sequence[int], like: torch.Tensor, alignment: int, place: str, on_device: bool
    ) -> tuple[Form, int, list[int]]:
        """Return the form and slots of tensors ``like`` one, at addresses in containers of these
        sizes.

        Also returns which of the addresses, in order, the table has. ``on_device``: a device alone
        knows the addresses.

        Raises:
            LayoutError: sizes or tensors that contradict the layout or the extents.
        """
        values, factors, grid = self._contained(sizes)
        entries, walks = _tabulate(factors, grid, len(values))
        picks = [like] * len(values)
        form, slots = self._form(values, picks, walks, alignment, place, on_device)
        return form, slots, entries

    def _contained(self, sizes: Sequence[int]) -> tuple[list[dict[str, int]], list[Factor], Grid]:
        """Return the extents of each kv that nested containers of these sizes imply.

        Also returns the factors that they walk through, and the position of each tensor, in order.
        """
        values = [dict(known) for known in self.declared]
        pairs = zip(self.layout.containers, sizes, strict=True)
        solve(self.layout, values, [(group, [size] * len(values)) for group, size in pairs])
        factors = [f for group in self.layout.containers for f in group.factors]
        extents = [factor_extent(f, values[0]) or 1 for f in factors]
        return values, factors, np.arange(prod(sizes)).reshape(extents)

    def _form(
        self,
        values: list[dict[str, int]],
        picks: Sequence[torch.Tensor],
        walks: Walks,
        alignment: int,
        place: str,
        table_on_device: bool = False,
    ) -> tuple[Form, int]:
        """Return the form of tensors of which each kv has one in ``picks``, and the slots."""
        layout = self.layout
        try:
            dims = [_read_dims(layout, tensor) for tensor in picks]
            sizes_of_each = zip(*(of_kv.sizes for of_kv in dims), strict=True)
            solve(layout, values, list(zip(layout.dims, sizes_of_each, strict=True)))
        except LayoutError as error:
            kinds = dict.fromkeys(f"shape {tuple(t.shape)}, strides {t.stride()}" for t in picks)
            text = f"{error} The tensors have {'; '.join(kinds)}."
            fitting = [] if self.packed else _fitting(layout, values[0], [*picks])
            if fitting:
                text += f" Presets with such shapes: {', '.join(fitting)}."
            raise LayoutError(text) from None
        strides = [of_kv.strides for of_kv in dims]
        itemsizes = [tensor.element_size() for tensor in picks]
        known = values[0]
        axis = "page" if layout.opaque else "dim"
        dtypes = tuple("" if t.dtype in _BYTES else str(t.dtype).partition(".")[2] for t in picks)
        form = Form(
            parts=build_parts(layout, values, strides, itemsizes, walks),
            layers=known["layer"],
            heads=known["head"],
            widths=tuple(v[axis] * size for v, size in zip(values, itemsizes, strict=True)),
            block_size=known["token"] if layout.paged else 0,
            opaque=layout.opaque,
            alignment=alignment,
            place=place,
            dtypes=dtypes if any(dtypes) and not (layout.opaque or self.reinterpret) else (),
            table_on_device=table_on_device,
        )
        slots = known["token"] * known.get("block", 1)
        if self.packed is not None:
            if form.dtypes:
                raise LayoutError(
                    f"Expected tensors of uint8 for the packed view {layout.text!r}, got "
                    f"{', '.join(form.dtypes)}. Pass tensor.view(torch.uint8)."
                )
            form = self.packed.form(form, layout.text)
            slots *= self.packed.block_size
        return same_form(form), slots


_bound = lru_cache(maxsize=256)(BoundLayout)


def bind_layout(
    layout: str,
    /,
    *,
    reinterpret: bool = False,
    encoding: object = None,
    **extents: int | Sequence[int] | None,
) -> BoundLayout:
    """Return a layout (string or preset) bound to declared extents; None means undeclared.

    ``reinterpret``: rows are bytes, whatever the dtypes of the tensors. ``encoding``: how the
    tensors are packed; None: they hold rows.
    """
    text, always = resolve(layout)
    declared = dict(always)
    unknown = extents.keys() - {"layers", "kv", "block_size", "heads", "dim"}
    if unknown:
        raise LayoutError(
            f"Expected extents among layers, kv, block_size, heads and dim, got "
            f"{', '.join(sorted(unknown))}. Declare one of those; a connector takes its layout as "
            f"kv_layout."
        )
    for name, value in extents.items():
        if value is None:
            continue
        # Plain integers: equal numbers of other types must not pass for them.
        if name == "dim" and isinstance(value, (list, tuple)):
            extent: Extent = tuple(positive(name, one) for one in value)
        else:
            extent = positive(name, value)
        if declared.setdefault(name, extent) != extent:
            raise LayoutError(
                f"Expected {name}={always[name]} for preset {layout!r}, got {extent}. Declare "
                f"{name}={always[name]}, or write the layout string."
            )
    bits = flag("reinterpret", reinterpret)
    return _bound(text, tuple(sorted(declared.items())), bits, as_encoding(encoding))


def flatten_tensors(layout: Layout, tensors: object) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tensors inside nested containers in order, and the extent of each level."""
    sizes: list[int] = []
    level: list[Any] = [tensors]
    for group in layout.containers:
        rows = [list(x.values()) if isinstance(x, Mapping) else x for x in level]
        for row in rows:
            if not isinstance(row, (list, tuple)):
                raise _not_contained(layout, str(group), row)
        first, *others = dict.fromkeys(map(len, rows))
        if not first:
            raise LayoutError(
                f"Expected containers with tensors for {layout.text!r}, got an empty one. Pass at "
                f"least one tensor."
            )
        if others:
            raise LayoutError(
                f"Expected equally long containers of {group} in {layout.text!r}, got lengths "
                f"{first} and {others[0]}. Make the lengths equal."
            )
        sizes.append(first)
        level = [item for row in rows for item in row]
    for tensor in level:
        if not isinstance(tensor, torch.Tensor):
            raise _not_a_tensor(layout, tensor)
    return level, sizes


def _not_a_tensor(layout: Layout, value: object) -> LayoutError:
    """Return the error for a value in place of a tensor."""
    if not layout.containers:
        expected = f"a tensor for {layout.text!r}"
        remedy = "Pass the tensor itself, or write the axis of the list left of `|`."
        return _not_read(expected, value, remedy)
    levels = " of ".join(["a list, tuple or dict"] * len(layout.containers))
    expected = f"{levels} of tensors for {layout.text!r}"
    remedy = "Pass the tensors without it, or write its axis left of `|` too."
    return _not_read(expected, value, remedy)


def _not_contained(layout: Layout, axis: str, value: object) -> LayoutError:
    """Return the error for a value in place of the container of an axis."""
    expected = f"a list, tuple or dict with an item for each {axis}, left of `|` in {layout.text!r}"
    remedy = "Put it into a list: [tensor]."
    if len(layout.containers) > 1:
        order = ", ".join(map(str, layout.containers))
        remedy = f"Nest the containers in the order {order}, outermost first."
    elsewhere = f"If {axis} is a dimension of the tensor, write it right of `|`."
    return _not_read(expected, value, f"{remedy} {elsewhere}")


def _not_read(expected: str, value: object, remedy: str) -> LayoutError:
    if isinstance(value, np.ndarray):
        return LayoutError(
            f"Expected tensors, got a numpy array of shape {value.shape}. Pass "
            f"torch.from_numpy(array), which shares its memory, or a copy if a stride is negative."
        )
    if not isinstance(value, (torch.Tensor, list, tuple, Mapping)):
        remedy = _pairs_of_a_cache(value) or "Pass tensors, in lists, tuples or dicts."
    return LayoutError(f"Expected {expected}, got {kind_of(value)}. {remedy}")


def _pairs_of_a_cache(value: object) -> str:
    """Return how to pass a cache of transformers, or a layer of one; "" for another object."""
    if isinstance(getattr(value, "keys", None), torch.Tensor):
        return "Pass (layer.keys, layer.values) with the layout 'kv | block head token dim'."
    layers = getattr(value, "layers", None)
    if not isinstance(layers, list):
        return ""
    return (
        "Pass [(x.keys, x.values) for x in cache.layers] with the layout "
        "'layer kv | block head token dim'."
    )


def _by_kv(array: Grid, axes: Sequence[Factor], but: int = -1) -> Grid:
    """Return a row for each kv, or one for all if no axis, other than number ``but``, is ``kv``."""
    at = next((i for i, factor in enumerate(axes) if factor.axis == "kv" and i != but), None)
    rows = array[None] if at is None else np.moveaxis(array, at, 0)
    return rows.reshape(len(rows), -1)


def _tabulate(
    factors: Sequence[Factor],
    grid: Grid,
    kv: int,
    begins: Sequence[int] = (),
    bases: Sequence[int] = (),
) -> tuple[list[int], Walks]:
    """Collapse a grid of tensors into the smallest table.

    Returns the tensors that stay entries, and the walk of each container factor through them.
    Tensors of one allocation at equal distances become a stride, so that a block that is contiguous
    over all layers is one run. The rest stays a table. Raw addresses without tensors also stay a
    table: nothing shows which of them lie in one allocation.
    """
    # Blocks stand outermost: then no step of another axis depends on how many there are.
    rank = {"block": 0, "token": 1}
    order = sorted(range(len(factors)), key=lambda i: rank.get(factors[i].axis, 2))
    grid = grid.transpose(order)
    axes = [factors[i] for i in order]
    where = np.array(begins, dtype=np.int64)
    storages = np.array(bases, dtype=np.int64)
    walks: Walks = {}
    for at, factor in enumerate(axes if begins else ()):
        # Memory objects come and go: whether they lie at equal distances must not change a form.
        if factor.axis in ("block", "token"):
            continue
        steps = _by_kv(np.diff(where[grid], axis=at), axes, at)
        # Torch has no negative strides, so descending tensors stay a table.
        equal = (steps == steps[:, :1]).all() and steps.min(initial=0) >= 0
        if equal and not np.diff(storages[grid], axis=at).any():
            distances = tuple(steps[:, 0].tolist()) if steps.size else (0,)
            walks[factor] = 0, distances if len(distances) == kv else distances * kv
            grid = grid.take([0], axis=at)
    entries = 1
    for factor, extent in zip(reversed(axes), reversed(grid.shape), strict=True):
        if factor not in walks:
            walks[factor] = (entries, (0,) * kv)
            entries *= extent
    return grid.reshape(-1).tolist(), walks


def _one_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise DeviceMismatch(
                f"Expected the tensors of one view on one device, got {device} and "
                f"{tensor.device}. Make a view (and a connector) for each device."
            )
        _check_bytes(tensor)
        if device.type != "meta" and tensor.numel() and not address_of(tensor):
            raise LayoutError(
                f"Expected allocated tensors, got {kind_of(tensor)} of shape "
                f"{tuple(tensor.shape)} that owns no memory, as inside torch.vmap or "
                f"torch.func.grad. Pass allocated tensors, outside of function transforms."
            )
    if device.type == "meta":
        raise LayoutError(
            "Expected tensors with memory, got some on device meta, which has no memory. Pass "
            "allocated tensors."
        )
    return device


def _check_bytes(tensor: torch.Tensor) -> None:
    """Raise `LayoutError` unless a tensor is strided, and its bytes are its values."""
    if tensor.is_conj() or tensor.is_neg():
        raise LayoutError(
            "Expected tensors whose bytes are their values, got a lazily conjugated or negated "
            "one. Pass tensor.resolve_conj().resolve_neg()."
        )
    if tensor.layout is not _STRIDED or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise LayoutError(f"Expected strided tensors, got a {kind} one. Pass a strided copy.")
    if tensor.is_quantized:
        raise LayoutError(
            f"Expected tensors whose bytes are their values, got a quantized one of "
            f"{tensor.dtype}, whose scale a copy does not move. Pass tensor.int_repr(), and keep "
            f"the scale and the zero point yourself."
        )


def address_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's first byte; 0 if it has no memory."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # inside torch.vmap; inside functionalize it is 0
        return 0


def as_dtype(dtype: object) -> torch.dtype:
    """Return a dtype as it is; raise `LayoutError` for anything else, such as its name."""
    if not isinstance(dtype, torch.dtype):
        raise LayoutError(
            f"Expected dtype to be a torch.dtype, got {dtype!r}. Pass one such as torch.float16."
        )
    return dtype


def _pick_per_kv(
    factors: Sequence[Factor], flat: Sequence[torch.Tensor], grid: Grid, kv: int
) -> list[torch.Tensor]:
    """Return a tensor for each kv; raise `LayoutError` if the tensors of a kv differ."""
    picks = []
    for numbers in _by_kv(grid, factors):
        row = [flat[number] for number in numbers]
        kinds = dict.fromkeys((tensor.shape, tensor.stride(), tensor.dtype) for tensor in row)
        if len(kinds) > 1:
            one, other = (f"{tuple(n)} strides {s} {dtype}" for n, s, dtype in list(kinds)[:2])
            raise LayoutError(
                f"Expected tensors of one shape, strides and dtype in a view, got {one} and "
                f"{other}. Make a separate view for each group of equal tensors."
            )
        picks.append(row[0])
    return picks if len(picks) == kv else picks * kv


class _Dims(NamedTuple):
    """The sizes and the strides, in elements, of the dimensions that a layout names."""

    sizes: list[int]
    strides: list[int]


def _read_dims(layout: Layout, tensor: torch.Tensor) -> _Dims:
    """Return the dimensions of a tensor; the last one of a layout may cover several of them."""
    shape = list(tensor.shape)
    strides = list(tensor.stride())
    groups = layout.dims
    extra = len(shape) - len(groups)
    if extra < 0 or (extra and not layout.open_end):
        raise LayoutError(
            f"Expected a tensor of {len(groups)} dimension(s), as {layout.text!r} has right of its "
            f"containers, got {len(shape)}. Write an axis (or `1`) for each dimension."
        )
    for _ in range(extra):
        size = shape.pop()
        stride = strides.pop()
        if shape[-1] != 1 and size != 1 and strides[-1] != size * stride:
            raise LayoutError(
                f"Expected contiguous dimensions for {groups[-1]} of {layout.text!r}, which covers "
                f"several, got some that are not contiguous together. Write an axis for each "
                f"dimension."
            )
        if size != 1:
            strides[-1] = stride
        shape[-1] *= size
    return _Dims(shape, strides)


def _fitting(layout: Layout, known: Mapping[str, int], picks: list[torch.Tensor]) -> list[str]:
    """Return presets that fit tensors in the containers of a layout, one for each string.

    That one is the first of `suggested`. ``known``: the extents of the containers. Layouts that fit
    any shape are left out.
    """
    outer = {f.axis: known[f.axis] for group in layout.containers for f in group.factors}
    names = dict[str, str]()  # by the string of the layout
    for preset in suggested():
        other = parse(preset.layout)
        ranks = {len(other.dims), *(pick.dim() for pick in picks)}
        if other.opaque or other.containers != layout.containers or len(ranks) > 1:
            continue
        values = [{**of_kv, **outer} for of_kv in declare(other, dict(preset.extents))]
        if outer.get("kv", len(values)) != len(values):
            continue
        each = picks if "kv" in outer else picks[:1] * len(values)  # one tensor holds each kv
        try:
            sizes = zip(*(pick.shape for pick in each), strict=True)
            solve(other, values, list(zip(other.dims, sizes, strict=True)))
        except LayoutError:
            continue
        names.setdefault(preset.layout, preset.name)
    return [*names.values()][:FITTING]


def reach(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to past the last of a tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0


def _spans(tensors: Iterable[tuple[int, int]]) -> Spans:
    """Return the ranges that tensors at addresses cover, each of so many bytes."""
    merged: Spans = []
    for first, past in sorted({(at, at + nbytes) for at, nbytes in tensors if nbytes}):
        if merged and first < merged[-1][1]:
            first, end = merged.pop()
            past = max(past, end)
        merged.append((first, past))
    return merged
