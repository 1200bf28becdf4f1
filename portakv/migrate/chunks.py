# SPDX-License-Identifier: Apache-2.0
"""Make the canonical chunk, the form of rows of every layout for transports and checksums: for each
kv the layers in order, in each layer the tokens (or whole pages), in each token the heads."""

from __future__ import annotations

from typing import Any

import torch

from portakv.view import KVView

_ALIGNED = 256  # bytes; the rows of each kv begin at a multiple


def page_of(view: KVView) -> int:
    """Tokens that only move together: those of an opaque page, else one."""
    return view.form.block_size if view.opaque else 1


def chunk_bytes(view: KVView, count: int) -> int:
    """Bytes of a chunk for ``count`` tokens of a view."""
    tokens = view.layers * count // page_of(view) * view.heads
    return sum(-(-tokens * width // _ALIGNED) * _ALIGNED for width in view.widths)


def staging(nbytes: int, device: torch.device, most: int = 0) -> torch.Tensor:
    """Room for a chunk, uint8 ``[nbytes]``, whatever the caller's settings. With ``most``, for
    others after it as well: the next power of two, or that."""
    nbytes = min(most, 1 << (nbytes - 1).bit_length()) if most else nbytes
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def chunk(
    view: KVView, count: int, room: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], KVView]:
    """A chunk for ``count`` tokens of a view (of opaque pages, whole ones), in the first bytes of
    ``room`` (uint8; None: in memory of its own on the view's device): for each kv uint8 ``[layers,
    tokens, heads * bytes]`` or ``[layers, pages, bytes]``; and as a view."""
    if room is None:
        room = staging(chunk_bytes(view, count), view.device)
    size = page_of(view)
    made = list[torch.Tensor]()
    at = 0
    for width in view.widths:
        shape = view.layers, count // size, view.heads * width
        nbytes = shape[0] * shape[1] * shape[2]
        made.append(room[at : at + nbytes].view(shape))
        at += -(-nbytes // _ALIGNED) * _ALIGNED
    layout = "kv | layer block page" if view.opaque else "kv | layer token (head dim)"
    paged: dict[str, Any] = {"block_size": size} if view.opaque else {"heads": view.heads}
    return made, KVView(made, layout, kv=view.kv, dim=view.widths, **paged)
