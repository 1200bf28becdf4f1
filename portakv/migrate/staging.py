# SPDX-License-Identifier: Apache-2.0
"""Make the canonical chunk, the form of rows of every layout for transports and checksums.

A chunk contains, for each kv, the layers in order; in each layer the tokens (or whole pages); in
each token the heads. A packed chunk has blocks in place of tokens, and a slot for each head.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any, NamedTuple

import torch

from portakv.errors import LayoutError, PackOverflow, PortaKVError
from portakv.layout.encodings import Pack, PackedPlane, pack_parameters_of
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import Transfer
from portakv.view import KVView

_PARTS = 64  # slices of a view that the view retains
_CHUNKS = 8  # forms of chunks that a staging buffer retains
_log = RateLimitedLog(logging.getLogger(__name__))
_ALIGNED = 256  # bytes; the rows of each kv start at a multiple


def page_of(view: KVView) -> int:
    """Return the tokens that move together: those of an opaque page, else one."""
    return view.form.block_size if view.opaque else 1


def rows_bytes(
    view: KVView, layers: int, count: int, heads: int, slots: Slots | None = None
) -> int:
    """Return the bytes of a chunk for some layers, tokens and heads of a view."""
    return sum([_aligned(prod(shape)) for shape in _shapes(view, layers, count, heads, slots)])


def _shapes(
    view: KVView, layers: int, count: int, heads: int, slots: Slots | None
) -> list[tuple[int, ...]]:
    """Return the shape of the tensor of each kv of a chunk, uint8."""
    if slots is not None:
        blocks = count // slots.unit
        return [(layers, blocks, heads, plane.slot_bytes) for plane in slots.planes(view)]
    return [(layers, count // page_of(view), heads * width) for width in view.widths]


def _aligned(nbytes: int) -> int:
    """Return the bytes after which the rows of the next kv start."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


def staged_bytes(nbytes: int, most: int) -> int:
    """Return the bytes of memory for later chunks as well: a power of two, at most ``most``."""
    return min(most, 1 << (nbytes - 1).bit_length())


def staging(
    nbytes: int, device: torch.device, most: int = 0, rows: torch.device | None = None
) -> torch.Tensor:
    """Return memory for a chunk, uint8 ``[nbytes]``, whatever the caller's settings.

    With ``most``, the memory also serves later chunks: its size is the next power of two, at most
    ``most``. ``rows``: the device of the rows that cross in it. For rows of an accelerator, memory
    on the host is pinned where that is possible: pageable memory takes one more copy by the host.
    """
    nbytes = staged_bytes(nbytes, most) if most else nbytes
    with torch.inference_mode(False):
        if nbytes and rows is not None and rows.type != "cpu" and device.type == "cpu":
            # The driver's allocation would end captures of other threads.
            try:
                with ignoring_captures(rows):
                    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=True)
            except RuntimeError as error:
                text = (
                    "Staging buffers on the host for %s are pageable, so transfers take longer: %s"
                )
                _log.warning(str(rows), text, rows, str(error).partition("\n")[0], lines=1)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def retain(buffer: torch.Tensor) -> None:
    """Keep a buffer's memory until the current stream's work has ended."""
    if not buffer.is_cpu:
        buffer.record_stream(torch.accelerator.current_stream(buffer.device.index))


def part_of(view: KVView, layers: slice, heads: slice | None = None) -> KVView:
    """Return layers and heads of a view, which retains them for the next copy.

    A copy between two views that were used before takes half of the host's time.
    """
    made: Bounded[Any, KVView] | None = view.derived.get("parts")
    if made is None:
        made = view.derived.setdefault("parts", Bounded("parts of views", _PARTS))
    key = layers.start, layers.stop, heads and (heads.start, heads.stop)
    part = made.get(key) or view.slice(layers=layers, heads=heads)
    return part if part is view else made.setdefault(key, part)  # a view does not cache itself


class Slots(NamedTuple):
    """Packed rows in staging buffers: a slot for each block of ``unit`` tokens, layer, kv and
    head."""

    pack: Pack
    unit: int

    @classmethod
    def requested(cls, view: KVView, text: str, first: int, count: int) -> Slots | None:
        """Return how an owner packs ``count`` tokens of a view from token ``first`` on, which a
        reader requests in the encoding of ``text``; None: they cross raw.

        Raises:
            LayoutError: a part of a block, or another encoding than that of a packed view.
            InvalidTerms: no encoding of this release.
        """
        own = pack_parameters_of(view.form.encoding).text if view.form.encoding else ""
        if not (text or own):
            return None
        unit = view.block_size or 0
        whole = unit > 0 and first % unit == count % unit == 0
        if not (text and whole and own in ("", text)):
            raise LayoutError(
                f"Expected a request for whole blocks of {view}, got tokens {first} + {count} as "
                f"{text or 'raw rows'}. Connect sides of one release."
            )
        return cls(Pack.of_text(text), unit)

    def planes(self, view: KVView) -> list[PackedPlane]:
        """Return the geometry of a slot for each kv of a view.

        Raises `Unsupported` or `InvalidTerms` if the encoding has no such slots.
        """
        return [self.pack.plane(self.unit * width // 2) for width in view.form.raw_widths]


class Chunks:
    """The chunks that lie in the memory of a staging buffer, each made once."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._made: Bounded[Any, tuple[list[torch.Tensor], KVView]] = Bounded(
            "chunks of buffers", _CHUNKS
        )

    def of(
        self, view: KVView, count: int, slots: Slots | None = None
    ) -> tuple[list[torch.Tensor], KVView]:
        """Return the chunk for ``count`` tokens of a view; see `chunk`."""
        rows = view.kv, view.layers, view.heads, tuple(view.widths), view.form.raw_widths
        key = *rows, view.opaque, page_of(view), slots, count
        return self._made.get_or_make(key, lambda: chunk(view, count, self._memory, slots))


def chunk(
    view: KVView, count: int, buffer: torch.Tensor, slots: Slots | None = None
) -> tuple[list[torch.Tensor], KVView]:
    """Return a chunk for ``count`` tokens of a view, which are whole opaque pages or the whole
    blocks of slots, as tensors and as a view.

    The tensors are, for each kv, uint8 ``[layers, tokens, heads * bytes]`` or ``[layers, pages,
    bytes]``; packed ``[layers, blocks, heads, slot]``. They lie in the first bytes of ``buffer``,
    uint8.
    """
    made = list[torch.Tensor]()
    at = 0
    for shape in _shapes(view, view.layers, count, view.heads, slots):
        made.append(buffer[at : at + prod(shape)].view(shape))
        at += _aligned(prod(shape))
    layout = "kv | layer token (head dim)"
    terms: dict[str, Any] = {"heads": view.heads, "dim": view.widths}
    if slots is not None:
        layout = "kv | layer block head page"
        dims = tuple([width // 2 for width in view.form.raw_widths])
        terms = {"block_size": slots.unit, "dim": dims, "encoding": slots.pack}
    elif view.opaque:
        layout = "kv | layer block page"
        terms = {"block_size": page_of(view), "dim": view.widths}
    return made, KVView(made, layout, kv=view.kv, **terms)


def has_ended(copy: Transfer, wait: bool) -> bool:
    """Return True if a copy has ended, or wait for it; blocks that do not fit raise nothing."""
    try:
        if not wait:
            return copy.done()
        copy.synchronize()
    except PackOverflow:
        return True
    return True


def unfit_blocks(copy: Transfer) -> list[int]:
    """Return the positions of the blocks of a copy that has ended that did not fit; raise its other
    errors."""
    unfit = set[int]()
    for end in copy.completions:
        error: PortaKVError | None = end.take_error() or end.error
        if isinstance(error, PackOverflow):
            unfit.update(error.src_blocks)
        elif error is not None:
            raise error
    return sorted(unfit)
