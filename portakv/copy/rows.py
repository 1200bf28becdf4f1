# SPDX-License-Identifier: Apache-2.0
"""`copy_rows`: copy rows between two views, the one primitive."""

from __future__ import annotations

import torch

from portakv.copy.handle import BlockTransfer
from portakv.copy.options import Check, CopyOptions, options_of
from portakv.copy.request import Ids, move_of
from portakv.copy.submit import submit
from portakv.interconnect.strategy import Overlap
from portakv.runtime.transfer import LateErrors
from portakv.view import KVView


def copy_rows(
    src: KVView,
    dst: KVView,
    src_index: Ids | None = None,
    dst_index: Ids | None = None,
    *,
    count: int | None = None,
    options: CopyOptions | None = None,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    by_layer: bool = False,
    overlap: Overlap = "compute",
    max_thread_blocks: int | None = None,
    max_gbps: float | None = None,
    cancellable: bool = False,
    detached: bool = False,
    reinterpret: bool = False,
    check: Check = "usual",
    late: LateErrors | None = None,
) -> BlockTransfer:
    """Copy rows between views.

    Everything is issued before this returns, ordered on a stream. With ``cancellable`` or
    ``max_gbps`` a thread issues the copy in slices instead, after the present work of the current
    stream. No stream orders slices: `Transfer.wait` blocks the host.

    A ``detached`` copy begins after the same work, and no stream waits for its end unless
    `Transfer.wait` makes one wait. The next transfer then need not wait for the last bytes of this
    one, which keeps the link busy next to a model that leaves few gaps. Two detached copies are not
    ordered either: until the end the caller must not write what is read, nor use what is written.

    Args:
        src, dst: views of equal extents and of equal widths in bytes, of any layouts. Both on one
            device, one on it and one on the host, or on two devices of one type; then the
            destination's device reads the source.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive
            tokens.
        count: tokens to move; None: those that the indices cover.
        options: how to copy, made once for many calls. None: the other keywords, which are the
            options that `CopyOptions` describes.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host, or sides that cover different numbers of tokens. The
            transfer raises bad device ids; slices refuse those before they begin.
        DeviceMismatch: a stream of another device, or devices of two types.
        InvalidTerms: an option with a value that it cannot have; options and other keywords.
        BackendUnavailable: no backend executes it; ``trace`` has the decisions.
        Unsupported: terms that cannot be kept; slices, or a detached or strict copy, inside graph
            capture.
    """
    options = options_of(
        options,
        backend,
        stream,
        by_layer,
        overlap,
        max_thread_blocks,
        max_gbps,
        cancellable,
        detached,
        reinterpret,
        check,
        late,
    )
    return submit(move_of(src, dst, src_index, dst_index, count), options)
