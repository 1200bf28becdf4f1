# SPDX-License-Identifier: Apache-2.0
"""Staging: copies between a device and the host for backends that reach only the device.

Right first: rows are made dense on one side, cross the link in one memcpy, and are laid out on the
other side. The host half goes through `reference`. Faster ways are backends whose places name host
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .clean import clean
from .errors import Unsupported
from .form import Form
from .index import Index
from .registry import REGISTRY, Choice
from .transfer import Transfer
from .view import KVView


def staged_copy(
    carry: Callable[..., Transfer],
    src: KVView,
    dst: KVView,
    src_index: Index,
    dst_index: Index,
    count: int,
    choice: Choice,
    stream: torch.Stream | None,
) -> Transfer:
    """Copy between a device and the host. Device to host blocks the host until it is done.

    All ids are checked on the host first. Raises as `copy_rows` does.
    """
    device = choice.backend.device
    work = stream or torch.accelerator.current_stream(device)
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(device))
    mine, theirs = src_index.to_host(), dst_index.to_host()
    skips = mine.judge(count, src.slots, False, "source")
    skips |= theirs.judge(count, dst.slots, True, "destination")
    if skips:
        unit = src.form.block_size if src.opaque else 1
        mine, theirs, count, _ = clean(src, dst, mine, theirs, count, unit)
    if count == 0:
        return Transfer()
    host = REGISTRY.choose_plainly(torch.device("cpu"), "reference")
    if src.device.type == "cpu":
        # Earlier work of this stream may still be writing pinned memory that is read here.
        work.synchronize()
        buffer = dense(src.form, count, torch.device("cpu"))
        carry(src, buffer, mine, Index(), count, host, None, disjoint=True)
        landed = cross(buffer, src.form, count, device, work)
        return carry(landed, dst, Index(), theirs, count, choice, stream, disjoint=True)
    gathered = dense(src.form, count, device)
    carry(src, gathered, mine, Index(), count, choice, stream, disjoint=True)
    landed = cross(gathered, src.form, count, torch.device("cpu"), work)
    work.synchronize()
    return carry(landed, dst, Index(), theirs, count, host, None, disjoint=True)


def cross(
    rows: KVView, form: Form, count: int, device: torch.device, stream: torch.Stream
) -> KVView:
    """Dense rows copied to the other side of the link, ordered on ``stream``."""
    landed = dense(form, count, device)
    with torch.get_device_module(stream.device).stream(stream):
        landed.tensors.copy_(rows.tensors, non_blocking=True)
    if device.type != "cpu":
        landed.tensors.record_stream(stream)
    else:
        rows.tensors.record_stream(stream)
    return landed


def dense(form: Form, count: int, device: torch.device) -> KVView:
    """An uninitialised dense buffer for ``count`` tokens; pinned where it is on the host."""
    widths = list(form.widths)
    if form.opaque:
        if count % form.block_size:
            raise Unsupported(
                f"Staging {count} tokens of opaque pages of {form.block_size}",
                "a page moves only whole; ask for whole blocks",
            )
        shape = (form.layers, count // form.block_size, sum(widths) * form.heads)
        layout, extra = "layer block (kv page)", {"block_size": form.block_size}
    else:
        shape = (form.layers, count, sum(widths) * form.heads)
        layout, extra = "layer token (kv head dim)", {"heads": form.heads}
    pin = device.type == "cpu" and torch.accelerator.is_available()
    buffer = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pin)
    return KVView(buffer, layout, kv=form.kv, layers=form.layers, dim=widths, **extra)
