# SPDX-License-Identifier: Apache-2.0
"""Replace LMCache's ops between its host memory and a device, by addresses.

The ops copy objects without staging (LMCache 0.5.6 and newer), and bytes.

LMCache registers its memory in pieces, and a driver's copy must not cross from one piece to the
next. `lmcache_memcpy_async` gets the end of the pieces from LMCache and cuts there, because PortaKV
does not know memory that LMCache registered without the integration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, SupportsInt

import numpy as np
import torch

from portakv import Index, Unsupported, copy_runs
from portakv.arguments import kind_of
from portakv.host.memcpy import copy_
from portakv.integrations import IntegrationError
from portakv.integrations.lmcache.formats import (
    LAYOUTS,
    Pool,
    ShapeDesc,
    blocks_of,
    caches_of,
    check_chunk,
    format_of,
    objects_of,
    pool_of,
)
from portakv.integrations.lmcache.ops import is_store, move
from portakv.runtime.devices import indexed, usual_device


class DirectCopyGroupSpec(NamedTuple):
    """Caches of one kind in a direct copy; LMCache passes the fields in this order."""

    paged_layer_ptrs: Sequence[int]
    shape_desc: ShapeDesc
    engine_kv_format: SupportsInt
    slots_per_chunk: int
    byte_offset_in_object: int
    block_ids: Sequence[int]


class DirectCopyObject(NamedTuple):
    """An object on the host in a direct copy; ``host_offset`` counts from LMCache's allocation."""

    host_ptr: int
    host_offset: int
    nbytes: int
    chunk_idx: int
    skip_prefix_n_blocks: Sequence[int]


def batch_memcpy_supported() -> bool:
    """Return True: `execute_direct_copy_transfer` works on every device that PortaKV supports."""
    return True


def direct_copy_format_supported(engine_kv_format: SupportsInt) -> bool:
    """Return whether caches of a format can be copied by addresses.

    Formats whose caches are tuples of tensors cannot.
    """
    return int(engine_kv_format) in LAYOUTS and int(engine_kv_format) not in (16, 17)


def execute_direct_copy_transfer(
    direction: SupportsInt,
    device: torch.device | str,
    host_buffer_alignment: int,
    group_specs: Sequence[DirectCopyGroupSpec],
    objects: Sequence[DirectCopyObject],
) -> None:
    """Copy blocks of several groups of caches to or from objects on the host, by addresses.

    Groups are copied one after the other. An error leaves its group unmoved.

    Args:
        direction: LMCache's TransferDirection.
        device: the device of the caches.
        host_buffer_alignment: bytes of one registration of the host's memory, a power of two.
        group_specs: the groups of caches.
        objects: the objects; each holds a part of every group.

    Raises:
        IntegrationError: a group and an object contradict each other, or a cache has no block with
            a requested id.
        Unsupported: `direct_copy_format_supported` is False for a group's format.
        ValueError: an alignment that is not a power of two, or chunks that hold no whole blocks.
    """
    _check_power(host_buffer_alignment, "host_buffer_alignment")
    store = is_store(direction)
    device = indexed(device)
    for place, spec in enumerate(group_specs):
        _copy_group(store, device, place, spec, objects)


def _copy_group(
    store: bool,
    device: torch.device,
    place: int,
    spec: DirectCopyGroupSpec,
    objects: Sequence[DirectCopyObject],
) -> None:
    """Copy the blocks of the group with number ``place``."""
    form = format_of(spec.engine_kv_format)
    if not direct_copy_format_supported(form.number):
        raise Unsupported(
            f"A direct copy of caches of LMCache's format {form.number}",
            "its caches are tuples of tensors; call multi_layer_block_kv_transfer with them",
        )
    pool = pool_of(spec.shape_desc)
    slots = spec.slots_per_chunk
    check_chunk(slots, pool.block_size, "slots_per_chunk")
    nbytes = (2 if form.two_planes else 1) * pool.layers * slots * pool.heads * pool.row
    ids, places = _blocks_of_group(place, spec, objects, pool, nbytes)
    if not ids:  # no objects, or all their blocks are skipped
        return

    caches = caches_of(form.number, spec.paged_layer_ptrs, pool, device)
    at = [each.host_ptr + spec.byte_offset_in_object for each in objects]
    chunks = objects_of(form, caches, at, slots, torch.device("cpu"))
    blocks = blocks_of(ids, pool.block_size)
    positions = Index.of(places, pool.block_size)
    move(store, caches, chunks, blocks, positions, len(ids) * pool.block_size)


def _blocks_of_group(
    place: int,
    spec: DirectCopyGroupSpec,
    objects: Sequence[DirectCopyObject],
    pool: Pool,
    nbytes: int,
) -> tuple[list[int], list[int]]:
    """Return the blocks of a group that are not skipped: ids in the caches, places in the objects.

    Args:
        place: the number of the group.
        spec: the group.
        objects: the objects.
        pool: the shape of the group's caches.
        nbytes: bytes of the group in an object.
    """
    per_chunk = spec.slots_per_chunk // pool.block_size
    begin = spec.byte_offset_in_object
    ids = list[int]()
    places = list[int]()
    for order, each in enumerate(objects):
        skips = each.skip_prefix_n_blocks
        first = each.chunk_idx * per_chunk
        skip = skips[place] if place < len(skips) else -1
        if (
            not 0 <= begin <= each.nbytes - nbytes
            or not 0 <= skip <= per_chunk
            or not 0 <= first <= len(spec.block_ids) - per_chunk
        ):
            raise IntegrationError(
                f"Group {place} has {len(spec.block_ids)} blocks of {pool.block_size} tokens, with "
                f"{spec.slots_per_chunk} tokens in bytes {begin} to {begin + nbytes} of each "
                f"object, but object {each.chunk_idx} has {each.nbytes} bytes and skips {skips} "
                f"blocks of the groups. Expected whole blocks in both, within the object size."
            )
        ids.extend(spec.block_ids[first + skip : first + per_chunk])
        places.extend(range(order * per_chunk + skip, (order + 1) * per_chunk))

    bad = [block for block in ids if not 0 <= block < pool.blocks]
    if bad:
        raise IntegrationError(
            f"Expected block ids from 0 to {pool.blocks - 1} in group {place}, got {bad[0]}. "
            f"Nothing of the group was moved. Correct the ids."
        )
    return ids, places


def lmcache_memcpy_async(
    dest: int | torch.Tensor,
    src: int | torch.Tensor,
    nbytes: int,
    direction: SupportsInt,
    host_buffer_offset: int,
    host_buffer_alignments: int,
    *,
    device_type: str | None = None,
) -> None:
    """Copy bytes between the host and the current device.

    A copy between addresses is cut where one registration of the host's memory ends: at multiples
    of ``host_buffer_alignments``, counted from ``host_buffer_offset`` bytes before the host's
    address.

    Args:
        dest: the address, or the tensor, to write.
        src: the address, or the tensor, to read.
        nbytes: the number of bytes.
        direction: LMCache's TransferDirection.
        host_buffer_offset: bytes from LMCache's allocation to the host's address.
        host_buffer_alignments: bytes of one registration, a power of two.
        device_type: the type of the device; None: the process's accelerator, else the host.

    Raises:
        TypeError: an address with a tensor.
        ValueError: a number that does not fit.
    """
    _check_power(host_buffer_alignments, "host_buffer_alignments")
    store = is_store(direction)
    if nbytes < 0:
        raise ValueError(f"Expected nbytes to be 0 or more, got {nbytes}. Pass a number of bytes.")
    if isinstance(dest, int) and isinstance(src, int):
        there = indexed(device_type) if device_type else usual_device()
        before = host_buffer_offset % host_buffer_alignments
        cuts = np.arange(-before, nbytes, host_buffer_alignments).clip(0)
        sizes = np.diff(cuts, append=nbytes)
        if nbytes:
            copy_runs(
                src + cuts,
                dest + cuts,
                sizes,
                src_device=there if store else "cpu",
                dst_device="cpu" if store else there,
            )
    elif isinstance(dest, int) or isinstance(src, int):
        raise TypeError(
            f"Expected two addresses or two tensors, got {kind_of(src)} to copy to "
            f"{kind_of(dest)}. Pass both in one form."
        )
    elif nbytes % dest.element_size():
        raise ValueError(
            f"Expected a multiple of {dest.element_size()} bytes, got nbytes={nbytes}; nbytes must "
            f"align with the tensor's element size."
        )
    else:
        to, of = (each.view(-1).view(torch.uint8)[:nbytes] for each in (dest, src))
        copy_(to, of, non_blocking=True)


def _check_power(value: int, name: str) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"Expected {name} to be a power of two, got {value}. Pass a power of two.")
