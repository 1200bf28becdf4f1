# SPDX-License-Identifier: Apache-2.0
"""`BlockForm` tells a store what the bytes of a block mean: which layers and heads of which cache,
in which layout. It holds no TP size, no device and no engine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from portakv.errors import StoreError
from portakv.layout.extents import known_parts
from portakv.layout.language import parse
from portakv.view import KVView

FORMAT = 1  # of images, and of what a form tells of itself
HEADER = 4096  # bytes before the payload of an image, and what images and segments are multiples of
LEAST_SEGMENT, MOST_SEGMENTS = 256 << 10, 48
Range = tuple[int, int, int]  # from, to, of: [from, to) of what the whole model has
Slices = dict[str, Any]  # arguments of `KVView.slice`


class Segment(NamedTuple):
    """Whole layers, ``nbytes`` from ``offset`` of the payload on, that are verified together."""

    first_layer: int
    past_layer: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BlockForm:
    """What stored blocks hold. ``dtype`` is torch's name, ``uint8`` for all that is read as bytes;
    ``widths`` are elements of `dim` for each kv (bytes of a page); ``salt`` is a digest in hex."""

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
    ) -> BlockForm:
        """The form of a paged view's blocks, in the canonical layout. ``model`` is name and
        revision; ``layers`` and ``heads`` are those of the model that the view holds;
        ``block_size`` is in tokens, by default the view's; ``salt`` keeps tenants apart; ``notes``
        say what else fixes the bytes, such as a quantisation."""
        if not isinstance(view, KVView):
            raise StoreError(
                f"A form was asked of a {type(view).__name__}: expected a KVView; make one of the "
                f"tensors and their layout."
            )
        layers = layers or (0, view.layers, view.layers)
        heads = heads or (0, view.heads, view.heads)
        size, kinds = block_size or view.block_size or 0, {*view.form.dtypes}
        dtype = kinds.pop() if len(kinds) == 1 and "" not in kinds else "uint8"
        widths = tuple(width // getattr(torch, dtype).itemsize for width in view.widths)
        inner = "head kv token dim" if len({*widths}) == 1 else "head (kv token dim)"
        inner = inner if not view.opaque else "page" if view.kv == 1 else "(kv page)"
        texts = isinstance(salt, bytes) and {type(model), type(notes)} == {str}
        layout, salted = f"block layer {inner}", salt and texts and hashlib.sha256(salt).hexdigest()
        form = cls(model, dtype, view.kv, widths, size, layers, heads, layout, salted or "", notes)
        held = texts and model != "" and bool(view.block_size) and form._sound()
        held = held and (layers[1] - layers[0], heads[1] - heads[0]) == (view.layers, view.heads)
        if not held or (view.opaque and size != view.block_size):
            raise StoreError(
                f"A form of layers {layers}, heads {heads} and blocks of {size} was asked for "
                f"{view}: expected a paged view, ranges (from, to, of) of as many as it holds, of "
                f"opaque pages its own block size, a model's name, texts, and a salt of bytes; "
                f"correct them."
            )
        return form

    def _sound(self) -> bool:
        """Whether its numbers are those of blocks."""
        numbers, ranges = (self.kv, self.block_size, *self.widths), [self.layers, self.heads]
        if {*map(type, ranges)} != {tuple} or {*map(len, ranges)} != {3}:
            return False
        whole = {*map(type, (*numbers, *self.layers, *self.heads))} == {int} and min(numbers) > 0
        whole = whole and len(self.widths) == self.kv
        return whole and all(0 <= first < past <= of for first, past, of in ranges)

    @classmethod
    def from_json(cls, text: str) -> BlockForm:
        """The form that `json` told; raises `StoreError` for any other text or format."""
        try:
            told: dict[str, Any] = json.loads(text)
            found, ranges = told.pop("format"), ("widths", "layers", "heads")
            form = cls(**{**told, **{name: tuple(told[name]) for name in ranges}})
            if found == FORMAT and form._sound() and form.image_bytes > HEADER:
                return form
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            found = error
        raise StoreError(
            f"A form of blocks was to be read from {text[:80]!r} and {found!r} was found: expected "
            f"format {FORMAT}; use the release that wrote it, or wipe the store."
        )

    def json(self) -> str:
        """Canonical JSON; the digest is made of it."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes, which differ if the bytes of a block can."""
        return hashlib.sha256(self.json().encode()).digest()[:16]

    @property
    def name(self) -> str:
        """The digest in hex: what a store's folder is called."""
        return self.digest.hex()

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of a block's rows."""
        return self.layer_bytes * (self.layers[1] - self.layers[0])

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of header, payload and padding."""
        return HEADER + -(-self.payload_bytes // HEADER) * HEADER

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of a block's rows in one layer."""
        rows = 1 if parse(self.layout).opaque else self.block_size * (self.heads[1] - self.heads[0])
        return rows * sum(self.widths) * int(getattr(torch, self.dtype).itemsize)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The payload in groups of layers; one, if a layer is no run of whole 4,096 bytes."""
        count, size = self.layers[1] - self.layers[0], self.layer_bytes
        many = max(1, count // max(-(-LEAST_SEGMENT // size), -(-count // MOST_SEGMENTS)))
        apart = size % HEADER == 0 and str(parse(self.layout).dims[1]) == "layer"
        ends = [count * i // many for i in range(many + 1)] if apart else [0, count]
        return tuple(Segment(a, b, a * size, (b - a) * size) for a, b in pairwise(ends))

    def view(self, rows: torch.Tensor) -> KVView:
        """The blocks of images: ``rows`` is uint8 ``[n, >= image_bytes]`` on the host, its rows at
        multiples of 4,096 bytes. Copies nothing."""
        layers, heads = self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]
        size, axes = self.block_size, ("block", "layer", "kv", "head", "token")
        extents = dict(zip(axes, (len(rows), layers, self.kv, heads, size), strict=True))
        values = [{**extents, "dim": width, "page": width} for width in self.widths]
        shape = [known_parts(group, values)[0] for group in parse(self.layout).dims]
        payload = rows[:, HEADER : HEADER + self.payload_bytes].view(getattr(torch, self.dtype))
        names: dict[str, Any] = {"layers": layers, "kv": self.kv, "heads": heads}
        return KVView(payload.view(shape), self.layout, block_size=size, dim=self.widths, **names)

    def same_cache(self, other: BlockForm) -> bool:
        """Whether both are of one cache, whatever their parts of it and their layouts."""
        one, two = ({**asdict(x), "layers": 0, "heads": 0, "layout": 0} for x in (self, other))
        kinds = {(x.layers[2], x.heads[2], parse(x.layout).opaque) for x in (self, other)}
        return one == two and len(kinds) == 1

    def part_of(self, other: BlockForm) -> tuple[Slices, Slices] | None:
        """What both hold, as slices of ``other``'s view and of this form's; None if nothing."""
        theirs, mine = Slices(), Slices()
        for axis in ("layers", "heads"):
            (a, b, _), (c, d, _) = getattr(self, axis), getattr(other, axis)
            first, past = max(a, c), min(b, d)
            if first >= past or not self.same_cache(other):
                return None
            theirs[axis], mine[axis] = slice(first - c, past - c), slice(first - a, past - a)
        return theirs, mine
