# SPDX-License-Identifier: Apache-2.0
"""`BlockForm` describes the bytes of a stored block: its layers and heads, its cache, its layout.

A form contains no TP size, no device and no engine.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from portakv import arguments
from portakv.errors import InvalidTerms, LayoutError, StoreError, Unsupported
from portakv.layout.encodings import (
    DTYPES,
    PACK,
    PACKED_DTYPE,
    Encoding,
    Pack,
    Plane,
    as_encoding,
    encoding_of_text,
    is_lossy,
    parameters_of,
    plane_of,
)
from portakv.layout.language import known_parts, parse
from portakv.view import KVView

FORMAT = 1  # of images, and of the description of a form
HEADER = 4096  # bytes before the payload of an image; images and segments are multiples of it
LEAST_SEGMENT = 256 << 10
MOST_SEGMENTS = 48
Range = tuple[int, int, int]  # from, to, of: [from, to) of the whole model's layers or heads
_SLOT = "token dim"  # of a packed layout: a row of one token, as wide as a slot
_RANGE = "(from, to, of) with 0 <= from < to <= of"
Slices = dict[str, Any]  # arguments of `KVView.slice`


class Segment(NamedTuple):
    """Whole layers, ``nbytes`` from ``offset`` of the payload on, that are verified together."""

    first_layer: int
    past_layer: int
    offset: int
    nbytes: int


def _window(axis: str, window: Range | None, count: int) -> Range:
    """Return the layers or heads of the whole model that a view with ``count`` of them holds."""
    if window is None:
        return 0, count, count
    _check_numbers(axis, window, 0, 3)
    first, past, of = window
    if not (first < past <= of and past - first == count):
        do = f"The view holds {count} of the model's {axis}."
        raise arguments.invalid(axis, _RANGE, window, do)
    return window


def _elements_of(view: KVView) -> tuple[str, tuple[int, ...]]:
    """Return the number type of a view's rows, and their widths in its elements."""
    encoding = view.form.encoding
    if encoding:
        size = view.form.block_size
        if DTYPES[encoding[0].encoding] != (PACKED_DTYPE,):
            raise Unsupported(
                f"The form of a view in the encoding {encoding[0].encoding!r}",
                "its slots do not show the number type of the rows; pass a view of the raw cache, "
                "and the encoding",
            )
        return PACKED_DTYPE, tuple(plane.values // size for plane in encoding)
    kinds = {*view.form.dtypes}
    dtype = kinds.pop() if len(kinds) == 1 and "" not in kinds else "uint8"
    return dtype, tuple(width // getattr(torch, dtype).itemsize for width in view.widths)


def _layout_of(view: KVView, dtype: str, widths: tuple[int, ...], encoding: Encoding | None) -> str:
    """Return the canonical layout of a view's blocks; raise `Unsupported` for rows that cannot be
    packed."""
    pages = view.opaque and not view.form.encoding
    if encoding is None:
        inner = "page" if view.kv == 1 else "(kv page)"
        return f"block layer {inner}" if pages else _raw_layout(widths)
    name = encoding.text.partition("/")[0]
    if dtype not in DTYPES[name] or pages:
        raise _not_taken(name, "pages" if pages else dtype)
    return _packed_layout(widths)


def _not_taken(name: str, kind: str) -> Unsupported:
    """Return the error for rows that an encoding does not take."""
    return Unsupported(
        f"The encoding {name!r} for a cache of {kind}",
        f"it takes rows of {', '.join(DTYPES[name])} only; leave these blocks raw",
    )


def _raw_layout(widths: tuple[int, ...]) -> str:
    """Return the canonical layout of raw rows."""
    inner = "head kv token dim" if len({*widths}) == 1 else "head (kv token dim)"
    return f"block layer {inner}"


def _packed_layout(widths: tuple[int, ...]) -> str:
    """Return the canonical layout of slots, each a row of one token."""
    inner = f"kv head ({_SLOT})" if len({*widths}) == 1 else f"head (kv {_SLOT})"
    return f"block layer {inner}"


def _check_numbers(name: str, numbers: Any, least: int, count: int) -> None:
    """Raise `InvalidTerms` unless an argument is a tuple of ``count`` whole numbers."""
    whole = isinstance(numbers, tuple) and {*map(type, numbers)} == {int}
    if not whole or len(numbers) != count or min(numbers) < least:
        expected = f"a tuple of {count} whole numbers of at least {least}"
        raise arguments.invalid(name, expected, numbers)


@dataclass(frozen=True)
class BlockForm:
    """The content of stored blocks.

    ``dtype`` is torch's name, ``uint8`` for all that is read as bytes. ``widths`` are elements of
    `dim` for each kv (bytes of a page). ``salt`` is a checksum in hex. ``encoding`` is empty for
    raw rows, else the text of a `Pack` or an `Fp8`; the layout is then that of slots.
    """

    model: str
    dtype: str
    kv: int
    widths: tuple[int, ...]
    block_size: int
    layers: Range
    heads: Range
    layout: str
    salt: str = ""
    notes: str = ""
    encoding: str = ""

    @classmethod
    def of(
        cls,
        view: KVView,
        model: str,
        *,
        layers: Range | None = None,
        heads: Range | None = None,
        block_size: int | None = None,
        salt: bytes = b"",
        notes: str = "",
        encoding: Encoding | str | None = None,
    ) -> BlockForm:
        """Return the form of a paged view's blocks, in the canonical layout.

        Args:
            model: the name and revision of the model.
            layers, heads: the layers and heads of the model that the view contains.
            block_size: tokens of a block, a multiple or a divisor of the view's; by default the
                view's.
            salt: separates tenants.
            notes: other facts that fix the bytes, such as a quantisation.
            encoding: ``pack``, ``fp8``, a `Pack` or an `Fp8`: how the blocks are stored. None: as
                the view's are.

        Raises `InvalidTerms`, which names the wrong argument, and `Unsupported` for rows that the
        encoding does not take.
        """
        arguments.instance("view", view, KVView, "Make one of the tensors and their layout.")
        if not view.block_size:
            expected = "a paged view"
            raise arguments.invalid("view", expected, view, "Name a block axis in its layout.")
        made = as_encoding(encoding)
        size = view.block_size
        if block_size is not None:
            size = arguments.whole("block_size", block_size, 1)
        if view.opaque and size != view.block_size:
            expected = f"{view.block_size}, as blocks that move only whole are not re-blocked"
            raise arguments.invalid("block_size", expected, size, "Leave it out.")
        if size % view.block_size and view.block_size % size:
            # A key would begin inside a block of the view, where no call can begin.
            expected = f"a multiple or a divisor of {view.block_size}, the view's block size"
            raise arguments.invalid("block_size", expected, size, "Pass one, or leave it out.")
        if view.form.encoding and made is None:
            made = parameters_of(view.form.encoding)
        dtype, widths = _elements_of(view)
        layout = _layout_of(view, dtype, widths, made)
        salted = arguments.octets("salt", salt) and hashlib.sha256(salt).hexdigest()
        return cls(
            model,
            dtype,
            view.kv,
            widths,
            size,
            _window("layers", layers, view.layers),
            _window("heads", heads, view.heads),
            layout,
            salted or "",
            notes,
            "" if made is None else made.text,
        )

    def __post_init__(self) -> None:
        arguments.text("model", self.model)
        arguments.text("notes", self.notes, least=0, most=1 << 16)
        arguments.text("salt", self.salt, least=0)
        arguments.text("dtype", self.dtype)
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise arguments.invalid("dtype", "the name of a dtype of torch", self.dtype)
        arguments.whole("kv", self.kv, 1)
        arguments.whole("block_size", self.block_size, 1)
        _check_numbers("widths", self.widths, 1, self.kv)
        for axis in ("layers", "heads"):
            window = getattr(self, axis)
            _check_numbers(axis, window, 0, 3)
            if not window[0] < window[1] <= window[2]:
                raise arguments.invalid(axis, _RANGE, window)
        arguments.text("encoding", self.encoding, least=0)
        _ = self.planes  # checks the encoding
        arguments.text("layout", self.layout)
        try:
            parse(self.layout)
        except LayoutError as error:
            raise arguments.invalid("layout", "a layout", self.layout, str(error)) from None

    @classmethod
    def from_json(cls, text: str) -> BlockForm:
        """Return the form that `json` wrote. Raises `StoreError` for any other text or format; the
        error shows nothing of the text."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise StoreError(
                    f"Expected text to be the JSON of a block form of format {FORMAT}, got format "
                    f"{arguments.shown(version)}. Use the release that wrote it, or wipe the store."
                )
            fields.pop("folder", None)  # fields that a folder of a disk adds about itself
            for name in ("widths", "layers", "heads"):
                fields[name] = tuple(fields[name])
            form = cls(**fields)
            if form.image_bytes > HEADER:
                return form
            got = "fields of wrong types or values"
        except (json.JSONDecodeError, RecursionError):
            got = "text that is not JSON"
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            got = "other JSON"
        raise StoreError(
            f"Expected text to be the JSON of a block form of format {FORMAT}, got {got}. Use "
            f"the release that wrote it, or wipe the store."
        )

    def json(self) -> str:
        """Return canonical JSON, of which the digest is made."""
        fields: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        if not self.encoding:  # as releases without encodings write it, so that both agree
            del fields["encoding"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> bytes:
        """Return 16 bytes, which differ from those of forms whose blocks may have other bytes."""
        return hashlib.sha256(self.json().encode()).digest()[:16]

    @property
    def name(self) -> str:
        """Return the form's checksum in hex, the name of its folder."""
        return self.digest.hex()

    @cached_property
    def payload_bytes(self) -> int:
        """Return the bytes of a block's rows."""
        return self.layer_bytes * (self.layers[1] - self.layers[0])

    @cached_property
    def image_bytes(self) -> int:
        """Return the bytes of header, payload and padding."""
        return HEADER + -(-self.payload_bytes // HEADER) * HEADER

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Return for each kv the geometry of encoded planes; () if the blocks are raw."""
        if not self.encoding:
            return ()
        made = encoding_of_text(self.encoding)
        return tuple(plane_of(made, self.block_size, width) for width in self.widths)

    @cached_property
    def raw(self) -> BlockForm:
        """Return the form of the same blocks as raw rows."""
        if not self.encoding:
            return self
        return replace(self, encoding="", layout=_raw_layout(self.widths))

    @property
    def lossy(self) -> bool:
        """Return True if the blocks do not keep every bit: forms that do never read them."""
        return is_lossy(self.encoding)

    def packed(self, pack: Pack) -> BlockForm:
        """Return the form of the same blocks packed with parameters.

        Raises `Unsupported` for rows that the encoding does not take.
        """
        arguments.instance("pack", pack, Pack, "Pass Pack().")
        if self.dtype != PACKED_DTYPE or parse(self.raw.layout).opaque:
            raise _not_taken(PACK, self.dtype)
        packed = replace(self, encoding=pack.text, layout=_packed_layout(self.widths))
        _ = packed.planes  # checks their size
        return packed

    @cached_property
    def layer_bytes(self) -> int:
        """Return the bytes of a block's rows in one layer."""
        if self.encoding:
            return (self.heads[1] - self.heads[0]) * sum(x.slot_bytes for x in self.planes)
        rows = 1 if parse(self.layout).opaque else self.block_size * (self.heads[1] - self.heads[0])
        return rows * sum(self.widths) * int(getattr(torch, self.dtype).itemsize)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Return the payload in groups of layers; one group if a layer is not whole runs of 4,096
        bytes."""
        count = self.layers[1] - self.layers[0]
        size = self.layer_bytes
        many = max(1, count // max(-(-LEAST_SEGMENT // size), -(-count // MOST_SEGMENTS)))
        apart = size % HEADER == 0 and str(parse(self.layout).dims[1]) == "layer"
        ends = [count * i // many for i in range(many + 1)] if apart else [0, count]
        return tuple(Segment(a, b, a * size, (b - a) * size) for a, b in pairwise(ends))

    @cached_property
    def pieces(self) -> bytes:
        """Return the offset in an image and the bytes of each segment, as int64."""
        numbers = [(HEADER + x.offset, x.nbytes) for x in self.segments]
        return array("q", chain.from_iterable(numbers)).tobytes()

    def view(self, rows: torch.Tensor) -> KVView:
        """Return a view of the blocks of images; copies nothing.

        ``rows`` is uint8 ``[n, >= image_bytes]`` on the host, its rows at multiples of 4,096 bytes.
        Of pages, uint8 ``[n, 4096]`` without gaps, an image begins at each page that has room for
        it, and its block has the number of that page.
        """
        arguments.instance("rows", rows, torch.Tensor)
        passed = rows
        rows = self._rows_of_pages(rows)
        if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] < self.image_bytes:
            raise InvalidTerms(
                f"Expected rows to be uint8 [n, {self.image_bytes} or more], got {rows.dtype} "
                f"{[*rows.shape]}. Correct it."
            )
        layers = self.layers[1] - self.layers[0]
        heads = self.heads[1] - self.heads[0]
        size = self.block_size
        payload = rows[:, HEADER : HEADER + self.payload_bytes]
        layout = self.layout
        widths = self.widths
        tokens = size
        if self.encoding:  # a slot is a row of one token
            layout = layout.replace(_SLOT, "page").replace("(page)", "page")
            widths = tuple(plane.slot_bytes for plane in self.planes)
            tokens = 1
        else:
            payload = payload.view(getattr(torch, self.dtype))
        axes = ("block", "layer", "kv", "head", "token")
        extents = dict(zip(axes, (len(rows), layers, self.kv, heads, tokens), strict=True))
        values = [{**extents, "dim": width, "page": width} for width in widths]
        shape = [known_parts(group, values)[0] for group in parse(self.layout).dims]
        view = KVView(
            payload.view(shape),
            layout,
            block_size=size,
            dim=self.widths,
            layers=layers,
            kv=self.kv,
            heads=heads,
            encoding=encoding_of_text(self.encoding) if self.encoding else None,
        )
        view.blocks_overlap = rows is not passed  # an image begins at each page
        return view

    def _rows_of_pages(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows that begin at each page of a tensor of pages; other tensors as they
        are."""
        if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] != HEADER:
            return rows
        count = len(rows) - self.image_bytes // HEADER + 1
        if count < 1 or not rows.is_contiguous():
            return rows
        return rows.as_strided((count, self.image_bytes), (HEADER, 1))

    def same_cache(self, other: BlockForm) -> bool:
        """Return True if both forms are of one cache, whatever their parts of it, their layouts and
        their encodings."""
        arguments.instance("other", other, BlockForm)
        rest = {"layers": 0, "heads": 0, "layout": 0, "encoding": 0}
        one, two = ({**asdict(x), **rest} for x in (self, other))
        kinds = {(x.layers[2], x.heads[2], parse(x.layout).opaque) for x in (self, other)}
        return one == two and len(kinds) == 1

    def part_of(self, other: BlockForm) -> tuple[Slices, Slices] | None:
        """Return the common part of both forms, as slices of ``other``'s view and of this form's.

        None: there is none, or this form keeps every bit and ``other`` does not.
        """
        arguments.instance("other", other, BlockForm)
        if other.lossy and other.encoding != self.encoding:
            return None
        if not self.same_cache(other):
            return None
        src = Slices()
        dst = Slices()
        for axis in ("layers", "heads"):
            (a, b, _) = getattr(self, axis)
            (c, d, _) = getattr(other, axis)
            first = max(a, c)
            past = min(b, d)
            if first >= past:
                return None
            src[axis] = slice(first - c, past - c)
            dst[axis] = slice(first - a, past - a)
        return src, dst


def size_notes(own: Sequence[BlockForm], present: Sequence[BlockForm]) -> list[str]:
    """Return for each block size in which a tier has the cache of a store's own forms, and the
    store does not, how to reach it."""
    others = [form for form in present if form not in own]
    notes = dict[str, None]()
    for form in own:
        for other in sorted(others, key=lambda other: other.block_size):
            size = other.block_size
            alike = replace(other.raw, block_size=form.block_size)  # a packed one may be impossible
            if size != form.block_size and form.same_cache(alike):
                note = (
                    f"The model {form.model} is here in blocks of {size} tokens, which a store of "
                    f"blocks of {form.block_size} does not find. Pass block_size={size} to "
                    f"BlockForm.of and prefix_keys."
                )
                notes[note] = None
    return [*notes]
