# SPDX-License-Identifier: Apache-2.0
"""Make the canonical chunk, the form of rows of every layout for transports and checksums.

A chunk contains, for each kv, the layers in order; in each layer the tokens (or whole pages); in
each token the heads.
"""

from __future__ import annotations

from typing import Any

import torch

from portakv.registry.prepared import ASYNCHRONOUS
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

_PARTS = 64  # slices of a view that the view retains
_CHUNKS = 8  # forms of chunks that a staging buffer retains
_INT64 = frozenset([torch.int64])
_ALIGNED = 256  # bytes; the rows of each kv start at a multiple


def page_of(view: KVView) -> int:
    """Return the tokens that move together: those of an opaque page, else one."""
    return view.form.block_size if view.opaque else 1


def chunk_bytes(view: KVView, count: int) -> int:
    """Return the bytes of a chunk for ``count`` tokens of a view."""
    return rows_bytes(view, view.layers, count, view.heads)


def rows_bytes(view: KVView, layers: int, count: int, heads: int) -> int:
    """Return the bytes of a chunk for some layers, tokens and heads of a view."""
    rows = layers * count // page_of(view) * heads
    return sum(-(-rows * width // _ALIGNED) * _ALIGNED for width in view.widths)


def staged_bytes(nbytes: int, most: int) -> int:
    """Return the bytes of memory for later chunks as well: a power of two, at most ``most``."""
    return min(most, 1 << (nbytes - 1).bit_length())


def staging(nbytes: int, device: torch.device, most: int = 0) -> torch.Tensor:
    """Return memory for a chunk, uint8 ``[nbytes]``, whatever the caller's settings.

    With ``most``, the memory also serves later chunks: its size is the next power of two, at most
    ``most``.
    """
    nbytes = staged_bytes(nbytes, most) if most else nbytes
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def part_of(view: KVView, layers: slice, heads: slice | None = None) -> KVView:
    """Return layers and heads of a view, which retains them for the next copy.

    A copy between two views that were used before takes half of the host's time.
    """
    made: Bounded[Any, KVView] | None = view.derived.get("parts")
    if made is None:
        made = view.derived.setdefault("parts", Bounded("parts of views", _PARTS))
    key = layers.start, layers.stop, heads and (heads.start, heads.stop)
    return made.get_or_make(key, lambda: view.slice(layers=layers, heads=heads))


def bring_ids(index: Index, device: torch.device) -> None:
    """Send the ids of an index to a device for later copies, ordered on the current stream.

    The host does not wait, as it would if the first copy brought them. Only the current stream, and
    streams that follow it, may use the index from then on.
    """
    if device.type not in ASYNCHRONOUS or not index.on_host:
        return
    if not index.has_ids_on(device, _INT64):
        from portakv.host.small import to_device  # not before it is needed

        index.add_copy(to_device(index.host_ids(), device, torch.int64))


class Chunks:
    """The chunks that lie in the memory of a staging buffer, each made once."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._made: Bounded[Any, tuple[list[torch.Tensor], KVView]] = Bounded(
            "chunks of buffers", _CHUNKS
        )

    def of(self, view: KVView, count: int) -> tuple[list[torch.Tensor], KVView]:
        """Return the chunk for ``count`` tokens of a view; see `chunk`."""
        rows = view.kv, view.layers, view.heads, tuple(view.widths)
        key = *rows, view.opaque, page_of(view), count
        return self._made.get_or_make(key, lambda: chunk(view, count, self._memory))


def chunk(
    view: KVView, count: int, buffer: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], KVView]:
    """Return a chunk for ``count`` tokens of a view (whole opaque pages), as tensors and as a view.

    The tensors are, for each kv, uint8 ``[layers, tokens, heads * bytes]`` or ``[layers, pages,
    bytes]``. The chunk lies in the first bytes of ``buffer`` (uint8; None: new memory on the view's
    device).
    """
    if buffer is None:
        buffer = staging(chunk_bytes(view, count), view.device)
    size = page_of(view)
    made = list[torch.Tensor]()
    at = 0
    for width in view.widths:
        shape = view.layers, count // size, view.heads * width
        nbytes = shape[0] * shape[1] * shape[2]
        made.append(buffer[at : at + nbytes].view(shape))
        at += -(-nbytes // _ALIGNED) * _ALIGNED
    layout = "kv | layer block page" if view.opaque else "kv | layer token (head dim)"
    paged: dict[str, Any] = {"block_size": size} if view.opaque else {"heads": view.heads}
    return made, KVView(made, layout, kv=view.kv, dim=view.widths, **paged)
