# SPDX-License-Identifier: Apache-2.0
"""Packed views: the layout, the extents and the form of tensors that hold slots of an encoding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from portakv.errors import LayoutError, Unsupported
from portakv.layout.encodings import Encoding, Plane, plane_of
from portakv.layout.presets import Extent

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
