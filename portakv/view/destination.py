# SPDX-License-Identifier: Apache-2.0
"""Check that a view can be the destination of a copy, and note that a copy has written it."""

from __future__ import annotations

from bisect import bisect_right
from itertools import product

import torch
from torch.autograd.graph import increment_version

from portakv.errors import LayoutError
from portakv.runtime.writable import READ_ONLY, writable
from portakv.view.bound import flatten_tensors, reach
from portakv.view.form import PART_AXES
from portakv.view.overlap import shared_axes, shared_by_addresses
from portakv.view.view import KVView

_WHY_NOT = "why not a destination"  # of a view; empty if it is one
_WRITTEN = "tensors with versions"  # of a view


def check_writable(view: KVView) -> None:
    """Raise `LayoutError` if a view cannot be a destination.

    The answer is kept with the view, except that its memory is mapped for reading only: the caller
    may map it anew.
    """
    why: str | None = view.derived.get(_WHY_NOT)
    if why is None:
        why = _why_not(view)
        # Look at the first and the last byte of each span of host memory.
        on_host = not why and view.form.place == "pageable"
        if on_host and not all(writable(first, past) for first, past in view.spans):
            why = READ_ONLY
        elif view.known:  # else the addresses may be read back later
            view.derived[_WHY_NOT] = why
    if why:
        raise LayoutError(f"Expected a writable destination, got {view.layout.text!r}: {why}.")


def _why_not(view: KVView) -> str:
    """Return why rows at these addresses cannot be a destination; empty if they can."""
    form = view.form
    if view.requires_grad:
        return "it requires grad. Pass tensor.detach()"
    if form.place == "peer":
        return "a peer's rows are only read. Let its own device read the source"
    count: int | None = view.slots // (form.block_size or 1)
    if view.blocks_overlap or (view.raw and not view.entry_bytes):
        count = None  # the blocks of a copy are apart, or none knows how many there are
    axes = shared_axes(form, count)
    if not axes and view.known and view.entries > 1:
        axes = shared_by_addresses(form, count, view.addresses)
    return _why_shared(view, axes) if axes else ""


def _why_shared(view: KVView, axes: tuple[str, ...]) -> str:
    """Return why rows that are apart along some axes cannot both be written, with what to do."""
    for part, name in product(view.form.parts, axes):
        steps = part.axis(name) if name in PART_AXES else ()
        if any(step.stride == step.table == 0 for step in steps):
            containers = view.layout.containers
            listed = any(each.axis == name for group in containers for each in group.factors)
            remedy = f"separate memory for each {name}" if listed else "tensor.contiguous()"
            return (
                f"its {name!r} axis has stride 0, so that several rows share one place. Pass "
                f"{remedy}"
            )
    if {*axes} <= {"", "kv", "layer"}:
        return (
            "two of its planes lie at one address, so that one would overwrite the other. Pass "
            "separate memory for each"
        )
    apart = " and ".join(repr(name) for name in axes if name)
    return (
        f"two of its rows, which are apart along {apart}, share bytes. Pass tensors whose rows "
        f"share none, such as tensor.contiguous()"
    )


def note_written(view: KVView) -> None:
    """Raise the version of each tensor of a view, as torch does when it writes in place.

    So autograd notices if a copy overwrites a tensor that it saved for a backward pass. Raw memory
    has no versions, nor have tensors that were made in inference mode.
    """
    increment_version(with_versions(view))


def with_versions(view: KVView) -> tuple[torch.Tensor, ...]:
    """Return a tensor for each version of a view: views of one tensor share it."""
    tensors: tuple[torch.Tensor, ...] | None = view.derived.get(_WRITTEN)
    if tensors is None:
        tensors = view.derived[_WRITTEN] = _find_versions(view)
    return tensors


def _find_versions(view: KVView) -> tuple[torch.Tensor, ...]:
    if view.raw:
        return ()
    if not view.layout.containers:
        return view.owners
    # A table has only the first of tensors that lie at equal distances, and a slice has all tensors
    # of its view.
    flat, _ = flatten_tensors(view.layout, view.tensors)
    spans = view.spans
    pasts = [past for _, past in spans]
    written = {}
    for tensor in flat:
        begin = tensor.data_ptr()
        at = bisect_right(pasts, begin)
        if at == len(spans):
            continue
        first = spans[at][0]
        # Most tensors need no look at their strides.
        if first <= begin or first < begin + reach(tensor.shape, tensor.stride()) * tensor.itemsize:
            base = tensor if tensor._base is None else tensor._base
            written[id(base)] = base
    return tuple(written.values())
