# SPDX-License-Identifier: Apache-2.0
"""LMCache's ops between its host memory and a device, by addresses: copies of objects without
staging (0.5.6 and newer), and of bytes.

LMCache registers its memory in pieces, and a driver's copy must not cross from one to the next.
`lmcache_memcpy_async` is told where they end, and cuts there: what was registered past the plug is
unknown to PortaKV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv import Index, Unsupported, copy_runs
from portakv.host.memcpy import copy_
from portakv.integrations import IntegrationError
from portakv.integrations.lmcache_formats import (
    LAYOUTS,
    blocks_of,
    caches_of,
    check_chunk,
    layout_of,
    objects_of,
    pool_of,
)
from portakv.integrations.lmcache_ops import is_store, move
from portakv.runtime.devices import indexed, usual_device


class DirectCopyGroupSpec(NamedTuple):
    """Caches of one kind in a direct copy; the order of fields is LMCache's."""

    paged_layer_ptrs: Sequence[int]
    shape_desc: Any
    engine_kv_format: Any
    slots_per_chunk: int
    byte_offset_in_object: int
    block_ids: Sequence[int]


class DirectCopyObject(NamedTuple):
    """An object on the host in a direct copy; ``host_offset`` is that in LMCache's allocation."""

    host_ptr: int
    host_offset: int
    nbytes: int
    chunk_idx: int
    skip_prefix_n_blocks: Sequence[int]


def batch_memcpy_supported() -> bool:
    """True: `execute_direct_copy_transfer` works wherever PortaKV does."""
    return True


def direct_copy_format_supported(engine_kv_format: Any) -> bool:
    """Whether caches of a format, handed over by addresses, can be copied without staging: all but
    those that are tuples of tensors."""
    return int(engine_kv_format) in LAYOUTS and int(engine_kv_format) not in (16, 17)


def execute_direct_copy_transfer(
    direction: Any,
    device: torch.device | str,
    host_buffer_alignment: int,
    group_specs: Sequence[DirectCopyGroupSpec],
    objects: Sequence[DirectCopyObject],
) -> None:
    """Blocks of several groups of caches between them and objects on the host, by addresses.

    Args:
        host_buffer_alignment: bytes of one registration of the host's memory, a power of two.

    Raises:
        IntegrationError: what a group or an object says of itself contradicts the other, or a block
            id that no cache has; nothing of the group was moved.
        Unsupported: caches of a format that `direct_copy_format_supported` denies.
    """
    _check_power(host_buffer_alignment, "host_buffer_alignment")
    store = is_store(direction)
    device = indexed(device)
    for place, spec in enumerate(group_specs):
        number, _, two_planes = layout_of(spec.engine_kv_format)
        if not direct_copy_format_supported(number):
            raise Unsupported(
                f"A direct copy of caches of LMCache's format {number} was asked for",
                "its caches are tuples of tensors; call multi_layer_block_kv_transfer with them",
            )
        pool = pool_of(spec.shape_desc)
        slots = spec.slots_per_chunk
        check_chunk(slots, pool.block_size, "slots_per_chunk")
        per_chunk = slots // pool.block_size
        row = pool.heads * pool.row
        nbytes = (2 if two_planes else 1) * pool.layers * slots * row
        ids: list[int] = []
        places: list[int] = []
        for order, each in enumerate(objects):
            skips = each.skip_prefix_n_blocks
            first = each.chunk_idx * per_chunk
            skip = skips[place] if place < len(skips) else -1
            begin = spec.byte_offset_in_object
            if (
                not 0 <= begin <= each.nbytes - nbytes
                or not 0 <= skip <= per_chunk
                or not 0 <= first <= len(spec.block_ids) - per_chunk
            ):
                raise IntegrationError(
                    f"Group {place} with {len(spec.block_ids)} blocks of {pool.block_size} tokens "
                    f"and {slots} tokens for each object, from byte {begin} to {begin + nbytes} of "
                    f"it, was asked for, but object {each.chunk_idx} has {each.nbytes} bytes and "
                    f"skips {skips} blocks of the groups; expected whole blocks in both, none of "
                    f"them past the object size."
                )
            ids += spec.block_ids[first + skip : first + per_chunk]
            places += range(order * per_chunk + skip, (order + 1) * per_chunk)
        bad = [block for block in ids if not 0 <= block < pool.blocks]
        if bad:
            raise IntegrationError(
                f"The block id {bad[0]} was asked for in group {place}, whose caches have "
                f"{pool.blocks} blocks; nothing of the group was moved. Correct the ids."
            )
        if not ids:  # no objects, or none of their blocks
            continue
        caches = caches_of(number, spec.paged_layer_ptrs, pool, device)
        at = [each.host_ptr + spec.byte_offset_in_object for each in objects]
        chunks = objects_of(number, caches, at, slots, torch.device("cpu"))
        blocks = blocks_of(ids, pool.block_size)
        units = Index.of(places, pool.block_size)
        move(store, caches, chunks, blocks, units, len(ids) * pool.block_size)


def lmcache_memcpy_async(
    dest: int | torch.Tensor,
    src: int | torch.Tensor,
    nbytes: int,
    direction: Any,
    host_buffer_offset: int,
    host_buffer_alignments: int,
    *,
    device_type: str | None = None,
) -> None:
    """Bytes between the host and the current device, cut where one registration of the host's
    memory ends: at multiples of ``host_buffer_alignments``, counted from ``host_buffer_offset``
    before the host's address. ``device_type`` None: the process's accelerator, else the host."""
    _check_power(host_buffer_alignments, "host_buffer_alignments")
    store = is_store(direction)
    if nbytes < 0:
        raise ValueError(f"nbytes={nbytes} was asked for; expected a number of bytes from 0 on.")
    if isinstance(dest, int) and isinstance(src, int):
        there = indexed(device_type) if device_type else usual_device()
        to, of = ("cpu", there) if store else (there, "cpu")
        before = host_buffer_offset % host_buffer_alignments
        cuts = np.arange(-before, nbytes, host_buffer_alignments).clip(0)
        sizes = np.diff(cuts, append=nbytes)
        if nbytes:
            copy_runs(src + cuts, dest + cuts, sizes, src_device=of, dst_device=to)
    elif isinstance(dest, int) or isinstance(src, int):
        raise TypeError(
            f"A copy from a {type(src).__name__} to a {type(dest).__name__} was asked for; "
            f"expected two addresses or two tensors."
        )
    elif nbytes % dest.element_size():
        raise ValueError(
            f"nbytes={nbytes} was asked of elements of {dest.element_size()} bytes; nbytes must "
            f"align with the tensor's element size."
        )
    else:
        flat = [each.view(-1).view(torch.uint8)[:nbytes] for each in (dest, src)]
        copy_(flat[0], flat[1], non_blocking=True)


def _check_power(value: int, name: str) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name}={value} was asked for; it must be power of two.")
