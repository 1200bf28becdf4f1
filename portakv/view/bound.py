# SPDX-License-Identifier: Apache-2.0
"""`BoundLayout`: a layout with its declared extents reads the tensors of a `KVView`, raw or
packed.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from portakv.arguments import flag, kind_of
from portakv.core import view as core
from portakv.errors import DeviceMismatch, LayoutError, Unsupported
from portakv.layout.encodings import Encoding, Plane, as_encoding, plane_of
from portakv.layout.language import AXES, Layout, declare, factor_extent, parse, positive, solve
from portakv.layout.presets import Extent, resolve, suggested
from portakv.runtime.bounded import Bounded
from portakv.view.form import PLACES, Form, form_of, plain_reader

_STRIDED = torch.strided
_HOST = torch.device("cpu")
#: Presets at most that an error about a layout names.
FITTING = 5

#: A tensor, or the containers that a layout names, outermost first.
Tensors: TypeAlias = "torch.Tensor | Sequence[Tensors] | Mapping[Any, Tensors]"
#: A declared extent. Only widths may be several, one for each kv.
Declared: TypeAlias = int | Sequence[int] | None
#: Shape, strides and dtype of a tensor.
Kind: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
#: Sorted, disjoint ranges [first byte, past the last byte).
Spans = list[tuple[int, int]]
#: Form, origins, owners and spans of a view, as `KVView` documents them; None: found when needed.
Rows = tuple[Form, tuple[int, ...] | None, tuple[torch.Tensor, ...] | None, Spans | None]
#: Rows, slots, device, and whether a tensor requires grad. Every call would pay for names.
Facts = tuple[Rows, int, torch.device, bool]


class BoundLayout:
    """A layout and declared extents; with ``reinterpret`` rows are bytes, whatever the dtype.

    With ``encoding`` the tensors hold packed blocks.

    Attributes:
        address: of the words that the core reads; see `Bound` of `native/core/view.h`.
    """

    __slots__ = (
        "_planes",
        "_read",
        "_words",
        "address",
        "declared",
        "layout",
        "packed",
        "reinterpret",
    )

    def __init__(
        self,
        text: str,
        extents: Mapping[str, Extent],
        reinterpret: bool,
        encoding: Encoding | None = None,
    ) -> None:
        self.reinterpret = reinterpret
        self.packed: PackedExtents | None = None
        if encoding is None:
            self.layout = parse(text)
            self.declared = declare(self.layout, extents)
        else:
            self.packed = PackedExtents.of(text, extents, encoding)
            self.layout = replace(parse(self.packed.text), text=text)
            self.declared = declare(self.layout, self.packed.extents)
        # The planes of each kv, which belong to the forms of packed views.
        self._planes = self.packed.planes_of(len(self.declared)) if self.packed else ()
        # The core's function that reads plain tensors; None: torch is too old for it.
        reader = plain_reader()
        self._read = reader.read if reader else None
        # What the core reads of the layout, and the address of these words.
        self._words = self._as_words(reader.address if reader else 0)
        self.address, _ = self._words.buffer_info()

    def read(self, tensors: Tensors) -> Facts:
        """Return the form, the addresses and the other facts of tensors.

        Raises:
            LayoutError: tensors that contradict the layout or the extents.
            DeviceMismatch: tensors on different devices.
        """
        answer = self._read(self.address, tensors) if self._read is not None else None
        if answer.__class__ is not tuple:
            # The core reads plain tensors alone, and names no error.
            return self._read_by_methods(tensors)
        form, origins, owners, spans, slots, grad = answer
        if form.__class__ is bytes:
            form = form_of(form, self._planes)
        device = owners[0].device if form.place == "device" else _HOST
        return (form, origins, owners, spans), slots, device, grad

    def _read_by_methods(self, tensors: Tensors) -> Facts:
        """Read tensors that hide their memory from the core, or that an error will name."""
        flat, sizes = flatten_tensors(self.layout, tensors)
        device, begins = _device_and_addresses(flat)
        place = "device"
        if device.type == "cpu":
            place = "pinned" if all(tensor.is_pinned() for tensor in flat) else "pageable"
        kinds: dict[Kind, int] = {}
        words = [len(flat), 0, 1]
        for begin, tensor in zip(begins, flat, strict=True):
            base = tensor.untyped_storage().data_ptr()
            kind: Kind = (tensor.shape, tensor.stride(), tensor.dtype)
            words += begin, base, kinds.setdefault(kind, len(kinds))
        words[1] = len(kinds)
        for kind in kinds:
            words += _words_of_kind(*kind)
        read = core.read_words(self.address, sizes, words, PLACES.index(place), False, 0)
        if isinstance(read, int):
            self._raise(read, flat, sizes)
        owners = tuple([flat[entry] for entry in read.entries])
        origins = tuple([begins[entry] for entry in read.entries])
        grad = any(tensor.requires_grad for tensor in flat)
        form = form_of(read.form, self._planes)
        return (form, origins, owners, read.spans), read.slots, device, grad

    def read_table(
        self, sizes: Sequence[int], kind: Kind, alignment: int, place: str, on_device: bool
    ) -> tuple[Form, int, list[int]]:
        """Return the form and slots of tensors of one kind, at addresses in containers of these
        sizes.

        Also returns which of the addresses, in order, the table has. ``on_device``: a device alone
        knows the addresses.

        Raises:
            LayoutError: sizes or tensors that contradict the layout or the extents.
        """
        count = prod(sizes)
        words = [count, 1, 0, *[0] * count, *_words_of_kind(*kind)]
        number = PLACES.index(place)
        read = core.read_words(self.address, sizes, words, number, on_device, alignment)
        if isinstance(read, int):
            shape, strides, dtype = kind
            like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            self._raise(read, [like] * count, sizes)
        return form_of(read.form, self._planes), read.slots, read.entries

    def _as_words(self, torch_objects: int) -> array[int]:
        """Return the words of this layout, which `Bound` in `native/core/view.h` lists."""
        layout = self.layout
        packed = self.packed
        flags = (
            layout.paged,
            layout.opaque,
            layout.open_end,
            self.reinterpret,
            packed is not None,
            packed is not None and packed.slot_is_last,
        )
        words = array("q", [torch_objects, len(self.declared)])
        words.append(sum(1 << bit for bit, each in enumerate(flags) if each))
        words.append(packed.block_size if packed else 0)
        words.append(len(layout.containers))
        words.append(len(layout.dims))
        try:
            for known in self.declared:
                words.extend(known.get(axis, -1) for axis in AXES)
            for group in layout.containers + layout.dims:
                words.append(len(group.factors))
                for factor in group.factors:
                    part = ("", "/", "%").index(factor.part)
                    words.extend((AXES.index(factor.axis), part, factor.n))
        except OverflowError:
            raise _past_64_bits(layout) from None
        return words

    def _raise(self, code: int, flat: Sequence[torch.Tensor], sizes: Sequence[int]) -> NoReturn:
        """Raise the error of tensors in containers of these sizes that the core cannot read."""
        layout = self.layout
        if code == core.PAST_64_BITS:
            raise _past_64_bits(layout)
        packed = self.packed
        if packed is not None:
            packed.check(flat)
        values = [dict(known) for known in self.declared]
        pairs = zip(layout.containers, sizes, strict=True)
        solve(layout, values, [(group, [size] * len(values)) for group, size in pairs])
        picks = _pick_per_kv(layout, values, flat)
        try:
            dims = [_sizes_of_dims(layout, tensor) for tensor in picks]
            solve(layout, values, list(zip(layout.dims, zip(*dims, strict=True), strict=True)))
        except LayoutError as error:
            kinds = dict.fromkeys(f"shape {tuple(t.shape)}, strides {t.stride()}" for t in picks)
            text = f"{error} The tensors have {'; '.join(kinds)}."
            fitting = [] if packed else _fitting(layout, values[0], [*picks])
            if fitting:
                text += f" Presets with such shapes: {', '.join(fitting)}."
            raise LayoutError(text) from None
        assert packed is not None, f"The core cannot read {layout.text!r}: code {code}."
        if not self.reinterpret:
            packed.check_dtypes(layout.text, [tensor.dtype for tensor in picks])
        raise packed.apart(layout.text)


def _words_of_kind(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> list[int]:
    """Return the words of tensors of one shape, strides and dtype for `portakv_view_read`."""
    return [dtype.itemsize, core.dtype_words()[dtype], len(shape), *shape, *strides]


def _past_64_bits(layout: Layout) -> LayoutError:
    return LayoutError(
        f"Expected extents and strides of {layout.text!r} whose bytes have 64-bit numbers, got "
        f"larger ones. Declare the extents of the memory."
    )


def bind_layout(
    layout: str,
    /,
    *,
    layers: Declared = None,
    kv: Declared = None,
    block_size: Declared = None,
    heads: Declared = None,
    dim: Declared = None,
    reinterpret: bool = False,
    encoding: object = None,
    **unknown: object,
) -> BoundLayout:
    """Return a layout (string or preset) bound to declared extents; None means undeclared.

    ``reinterpret``: rows are bytes, whatever the dtypes of the tensors. ``encoding``: how the
    tensors are packed; None: they hold rows.
    """
    if unknown:
        raise LayoutError(
            f"Expected extents among layers, kv, block_size, heads and dim, got "
            f"{', '.join(sorted(unknown))}. Declare one of those; a connector takes its layout as "
            f"kv_layout."
        )
    if isinstance(dim, (list, tuple)):
        # Plain integers: equal numbers of other types must not pass for them.
        dim = tuple(positive("dim", one) for one in dim)
    terms = layout, layers, kv, block_size, heads, dim, reinterpret, encoding
    # Equal terms of other types must not pass for these: True is not a number of layers.
    kinds = layers.__class__, kv.__class__, block_size.__class__, heads.__class__, dim.__class__
    key = terms, kinds, reinterpret.__class__
    try:
        return _bound[key]
    except KeyError:
        return _bound.setdefault(key, _bind(*terms))
    except TypeError:  # a term that is not hashable, which the error names
        return _bind(*terms)


def _bind(
    layout: str,
    layers: Declared,
    kv: Declared,
    block_size: Declared,
    heads: Declared,
    dim: Declared,
    reinterpret: bool,
    encoding: object,
) -> BoundLayout:
    text, always = resolve(layout)
    declared = dict(always)
    extents = {"layers": layers, "kv": kv, "block_size": block_size, "heads": heads, "dim": dim}
    for name, value in extents.items():
        if value is None:
            continue
        if name == "dim" and isinstance(value, tuple):
            extent: Extent = value
        else:
            extent = positive(name, value)
        if declared.setdefault(name, extent) != extent:
            raise LayoutError(
                f"Expected {name}={always[name]} for preset {layout!r}, got {extent}. Declare "
                f"{name}={always[name]}, or write the layout string."
            )
    bits = flag("reinterpret", reinterpret)
    packed = None if encoding is None else as_encoding(encoding)
    return BoundLayout(text, declared, bits, packed)


#: Binding a layout takes longer than a view.
_bound: Bounded[tuple[Any, ...], BoundLayout] = Bounded("bound layouts", 256)


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
        remedy = "Pass tensors, in lists, tuples or dicts."
        # A layer of a cache of transformers, or the cache.
        if isinstance(getattr(value, "keys", None), torch.Tensor):
            remedy = "Pass (layer.keys, layer.values) with the layout 'kv | block head token dim'."
        elif isinstance(getattr(value, "layers", None), list):
            remedy = (
                "Pass [(x.keys, x.values) for x in cache.layers] with the layout "
                "'layer kv | block head token dim'."
            )
    return LayoutError(f"Expected {expected}, got {kind_of(value)}. {remedy}")


def _device_and_addresses(tensors: Sequence[torch.Tensor]) -> tuple[torch.device, list[int]]:
    """Return the device of tensors and the address of each.

    Raises:
        LayoutError: a tensor whose bytes are not its values, or that has no memory.
        DeviceMismatch: tensors on different devices.
    """
    device = tensors[0].device
    begins = []
    for tensor in tensors:
        if tensor.device != device:
            raise DeviceMismatch(
                f"Expected the tensors of one view on one device, got {device} and "
                f"{tensor.device}. Make a view (and a connector) for each device."
            )
        _check_bytes(tensor)
        begin = address_of(tensor)
        if not begin and device.type != "meta" and tensor.numel():
            raise LayoutError(
                f"Expected allocated tensors, got {kind_of(tensor)} of shape "
                f"{tuple(tensor.shape)} that owns no memory, as inside torch.vmap or "
                f"torch.func.grad. Pass allocated tensors, outside of function transforms."
            )
        begins.append(begin)
    if device.type == "meta":
        raise LayoutError(
            "Expected tensors with memory, got some on device meta, which has no memory. Pass "
            "allocated tensors."
        )
    return device, begins


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
    layout: Layout, values: Sequence[Mapping[str, int]], flat: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return a tensor for each kv; raise `LayoutError` if the tensors of a kv differ."""
    extents = [factor_extent(f, values[0]) or 1 for g in layout.containers for f in g.factors]
    axes = [factor.axis for group in layout.containers for factor in group.factors]
    if prod(extents) != len(flat):
        raise LayoutError(
            f"Expected containers of {layout.text!r} that are equally long for each kv, got "
            f"unequal widths. Declare one width, or name dim right of `|`."
        )
    kv = 1
    inside = len(flat)  # tensors of one kv that follow each other
    if "kv" in axes:
        at = axes.index("kv")
        kv = extents[at]
        inside = prod(extents[at + 1 :])
    picks = []
    for k in range(kv):
        row = [tensor for number, tensor in enumerate(flat) if number // inside % kv == k]
        kinds = dict.fromkeys((tensor.shape, tensor.stride(), tensor.dtype) for tensor in row)
        if len(kinds) > 1:
            one, other = (f"{tuple(n)} strides {s} {dtype}" for n, s, dtype in list(kinds)[:2])
            raise LayoutError(
                f"Expected tensors of one shape, strides and dtype in a view, got {one} and "
                f"{other}. Make a separate view for each group of equal tensors."
            )
        picks.append(row[0])
    return picks if len(picks) == len(values) else picks * len(values)


def _sizes_of_dims(layout: Layout, tensor: torch.Tensor) -> list[int]:
    """Return the sizes of a tensor's dimensions; the last one of a layout may cover several.

    Raises:
        LayoutError: another number of dimensions, or ones that are not contiguous together.
    """
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
    return shape


def _fitting(layout: Layout, known: Mapping[str, int], picks: list[torch.Tensor]) -> list[str]:
    """Return presets that fit tensors in the containers of a layout, one for each string.

    That one is the first of `suggested`. ``known``: the extents of the containers. Layouts that fit
    any shape are left out.
    """
    named = [f.axis for group in layout.containers for f in group.factors]
    outer = {axis: known[axis] for axis in named if axis in known}
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


# ------------------------------------------------------------------------------------------------
# Packed views: the layout, the extents and the form of tensors that hold slots of an encoding.

#: Tensors of these are bytes, whatever they stand for: fp8 and packed formats are kept so.
BYTES = frozenset({torch.uint8, torch.int8})

_PAGE = re.compile(r"\bpage\b")


@dataclass(frozen=True, slots=True)
class PackedExtents:
    """The declared extents of a packed view, and how its tensors are read as rows of slots.

    Attributes:
        text: the layout for rows of one token, whose width is a slot.
        extents: the extents for that layout.
        block_size: tokens of a block.
        planes: the geometry of a plane for each width that was declared.
    """

    text: str
    extents: dict[str, Extent]
    block_size: int
    planes: tuple[Plane, ...]

    @classmethod
    def of(cls, text: str, extents: Mapping[str, Extent], encoding: Encoding) -> PackedExtents:
        """Return the extents of a packed view.

        Raises:
            LayoutError: a layout without ``page``, or no ``block_size`` or ``dim``.
            Unsupported: the encoding has no planes of this size.
            InvalidTerms: slots that are too small.
        """
        found = _PAGE.search(text) if isinstance(text, str) else None
        if found is None or "block" not in text:
            raise LayoutError(
                f"Expected the layout of a packed view to name `block`, and `page` in the place of "
                f"the slot, such as 'block layer kv head page', got {text!r}. Write them."
            )
        for name in ("block_size", "dim"):
            if name not in extents:
                raise LayoutError(
                    f"Expected {name} for the packed view {text!r}, got None: no shape shows the "
                    f"values in a slot. Declare {name}."
                )
        before = text[: found.start()]
        inside = before.count("(") > before.count(")")
        rows = "token dim" if inside else "(token dim)"
        size = extents["block_size"]
        dims = extents["dim"]
        assert isinstance(size, int)
        widths = dims if isinstance(dims, tuple) else (dims,)
        planes = tuple(plane_of(encoding, size, width) for width in widths)
        slots = tuple(plane.slot_bytes for plane in planes)
        dim: Extent = slots if isinstance(dims, tuple) else slots[0]
        rest = {**extents, "block_size": 1, "dim": dim}
        return cls(before + rows + text[found.end() :], rest, size, planes)

    def check(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raise `LayoutError` if a tensor cannot hold slots, in words of slots."""
        sizes = {plane.slot_bytes for plane in self.planes}
        alone = self.slot_is_last
        for memory in tensors:
            last = memory.shape[-1] if memory.dim() else 0
            if memory.dtype.itemsize != 1 or (alone and last not in sizes):
                slots = " or ".join(map(str, sorted(sizes)))
                raise LayoutError(
                    f"Expected tensors of torch.uint8 whose last axis is a slot of {slots} bytes, "
                    f"got {last} of {memory.dtype}. Make slots of plane(...).slot_bytes bytes."
                )

    def check_dtypes(self, layout: str, dtypes: Iterable[torch.dtype]) -> None:
        """Raise `LayoutError` unless the tensors of each kv hold bytes."""
        names = ["" if each in BYTES else str(each).partition(".")[2] for each in dtypes]
        if any(names):
            raise LayoutError(
                f"Expected tensors of uint8 for the packed view {layout!r}, got "
                f"{', '.join(names)}. Pass tensor.view(torch.uint8)."
            )

    def planes_of(self, kv: int) -> tuple[Plane, ...]:
        """Return the geometry of the plane of each kv."""
        return self.planes if len(self.planes) == kv else self.planes * kv

    def apart(self, layout: str) -> Unsupported:
        """Return the error for slots that are not contiguous."""
        return Unsupported(
            f"The packed view {layout!r}",
            "the bytes of a slot must be contiguous; make `page` the innermost axis",
        )

    @property
    def slot_is_last(self) -> bool:
        """Return True if the slot is the last axis of a tensor."""
        return self.text.endswith("(token dim)")
