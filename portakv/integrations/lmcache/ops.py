# SPDX-License-Identifier: Apache-2.0
"""Replace LMCache's transfer ops, with LMCache's names and arguments, over `copy_rows`.

The module imports no engine; the ops accept the numbers of LMCache's enums. The ops order their
work on the current stream and do not wait for it. A copy to or from pageable memory is waited for,
since no stream orders it. An argument of another type raises `ArgumentError`, which is a TypeError.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple, SupportsInt

import numpy as np
import torch

from portakv import (
    CopyOptions,
    Index,
    InvalidTerms,
    KVView,
    LateErrors,
    LayoutError,
    SlotError,
    Unsupported,
    copy_rows,
    copy_runs,
)
from portakv.arguments import kind_of
from portakv.host.memcpy import copy_
from portakv.integrations import IntegrationError
from portakv.integrations.checks import described, typed
from portakv.integrations.lmcache.formats import (
    FUSED,
    LAYOUTS,
    MLA,
    Caches,
    Pool,
    ShapeDesc,
    blocks_of,
    caches_of,
    check_chunk,
    format_of,
    likeness_of,
    objects_of,
    pool_of,
)
from portakv.interconnect.strategy import Terms
from portakv.runtime.devices import indexed, usual_device
from portakv.view.index import index_of

# LMCache's TransferDirection: object to cache, cache to object
H2D = 0
D2H = 1


@cache
def terms() -> dict[str, Any]:
    """Return the terms for copies between a device and the host, from the user's variables.

    Raises:
        InvalidTerms: a variable has a value that its term cannot have. The error names the
            variable.
    """
    chosen: dict[str, Any] = {}
    for name in ("overlap", "max_thread_blocks"):
        variable = f"PORTAKV_LMCACHE_{name.upper()}"
        if text := os.environ.get(variable, "").strip():
            chosen[name] = int(text) if text.isdecimal() else text
            try:
                Terms(**{name: chosen[name]})
            except InvalidTerms as error:
                raise InvalidTerms(f"{variable}={text} was set. {error}") from None
    return chosen


class _Options(threading.local):
    """The options of the copies of a thread, with the errors that an op detects late, such as a bad
    id on a device. The next op of the same thread raises them, because an op of another thread has
    other caches.

    Attributes:
        inside: for copies in the memory of one device.
    """

    def __init__(self) -> None:
        self._late = LateErrors()
        self.inside = CopyOptions(late=self._late)

    @cached_property
    def across(self) -> CopyOptions:
        """Return the options for copies between a device and the host. Raises as `terms`."""
        return CopyOptions(late=self._late, **terms())


_options = _Options()


def is_store(direction: SupportsInt | str) -> bool:
    """Return True for a copy from the caches to an object.

    Raises:
        ValueError: the direction is neither H2D nor D2H.
    """
    if isinstance(direction, str) or int(direction) not in (H2D, D2H):
        raise ValueError(
            f"Expected the direction to be H2D (0) or D2H (1), got {direction!r}. Pass a number."
        )
    return int(direction) == D2H


def move(
    store: bool, caches: KVView, chunk: KVView, ids: Index, positions: Index, count: int
) -> None:
    """Copy rows between the caches and a chunk, ordered after the current stream's work.

    A load may name a block several times, as engines do with their null block. If its ids are on
    the host, the last row counts. On a device the result is undefined, as with LMCache's own ops.

    Args:
        store: copy from the caches to the chunk; else back.
        caches: the caches.
        chunk: the memory objects.
        ids: the rows of the caches.
        positions: the rows of the chunk.
        count: the number of rows; nothing is done for 0 or less.
    """
    if count <= 0:
        return
    options = _options.inside if caches.device == chunk.device else _options.across
    if store:
        transfer = copy_rows(caches, chunk, ids, positions, count=count, options=options)
    else:
        if ids.on_host:
            ids = ids.without_repeats(count)
        transfer = copy_rows(chunk, caches, positions, ids, count=count, options=options)
    if not transfer.ordered:
        transfer.synchronize()


@typed
def multi_layer_kv_transfer(
    key_value: torch.Tensor,
    key_value_ptrs: Caches,
    slot_mapping: torch.Tensor,
    paged_memory_device: torch.device | str,
    page_buffer_size: int,
    direction: SupportsInt,
    engine_kv_format: SupportsInt,
    block_size: int = 0,
    head_size: int = 0,
    skip_prefix_n_tokens: int = 0,
    block_stride_elems: int = 0,
) -> None:
    """Copy rows of all layers between an object ``[kv, layers, tokens, row]`` and slots of caches.

    Args:
        key_value: the object.
        key_value_ptrs: addresses of the layers, int64 or uint64 on host or device; or tensors.
        slot_mapping: int32 or int64 ``[tokens]``; negative slots are skipped.
        paged_memory_device: the device of the caches.
        page_buffer_size: slots of the caches; 0: unknown, as for MLA.
        direction: LMCache's TransferDirection.
        engine_kv_format: LMCache's EngineKVFormat.
        block_size: tokens of a block; 0: 1.
        head_size: elements of a head; in `FUSED` formats of its keys alone.
        skip_prefix_n_tokens: tokens at the beginning that are neither read nor written.
        block_stride_elems: elements from a block to the next in `FUSED` formats; 0: dense blocks.

    Raises:
        ValueError: slots that are not whole blocks, or rows that are not whole heads.
        SlotError, LayoutError, Unsupported: see `portakv.copy_rows`.
    """
    # This op reads caches of format 0 layer by layer.
    form = format_of(int(engine_kv_format) or 1)
    if key_value.dim() != 4:
        raise LayoutError(
            f"Expected an object [kv, layers, tokens, row], got {described(key_value)}. Pass one."
        )
    tokens = key_value.shape[2]
    if slot_mapping.numel() != tokens:
        raise SlotError(
            f"Expected a slot for each of the object's {tokens} tokens, got "
            f"{slot_mapping.numel()} slots. Pass as many."
        )
    left = tokens - skip_prefix_n_tokens
    if left <= 0:
        return

    width = key_value.element_size()
    row = key_value.shape[3] * width
    per_block = block_size or 1

    # Only in layouts with heads before tokens the rows of a token's heads lie apart.
    head = row
    heads = 1
    if head_size and 0 <= form.layout.find("head") < form.layout.find("token"):
        head = head_size * width * (2 if form.number in FUSED else 1)
        heads = row // head
    if per_block < 1 or page_buffer_size % per_block or head < 1 or row % head:
        raise ValueError(
            f"Expected whole blocks and whole heads, got {page_buffer_size} slots in blocks of "
            f"{block_size}, and rows of {row} bytes in heads of {head}. Correct the sizes."
        )
    blocks = page_buffer_size // per_block or -1

    # LMCache's connectors pass the stride of their first caches for all. Its kernel uses the stride
    # in these formats only.
    step = block_stride_elems * width if form.number in FUSED else 0
    pool = Pool(key_value.shape[1], blocks, per_block, heads, row // heads, step)
    caches = caches_of(form.number, key_value_ptrs, pool, indexed(paged_memory_device))
    slots = Index.of(slot_mapping).shifted(skip_prefix_n_tokens)
    chunk = objects_of(form, caches, [key_value], tokens, caches.device)
    positions = Index(offset=skip_prefix_n_tokens)
    move(is_store(direction), caches, chunk, slots, positions, left)


def multi_layer_kv_transfer_unilateral(
    key_value: torch.Tensor,
    key_value_ptrs: Caches,
    slot_mapping: torch.Tensor,
    paged_memory_device: torch.device | str,
    page_buffer_size: int,
    direction: SupportsInt,
    engine_kv_format: SupportsInt,
) -> None:
    """Copy rows as `multi_layer_kv_transfer` does, with separate caches for keys and values.

    ``key_value_ptrs`` has the addresses of all keys, then of all values. MLA has one list.
    """
    number = int(engine_kv_format)
    multi_layer_kv_transfer(
        key_value,
        key_value_ptrs,
        slot_mapping,
        paged_memory_device,
        page_buffer_size,
        direction,
        engine_kv_format if number in MLA else 4,
    )


@typed
def single_layer_kv_transfer(
    lmc_key_value_cache: torch.Tensor,
    vllm_key_value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    direction: SupportsInt,
    engine_kv_format: SupportsInt,
    token_major: bool = False,
) -> None:
    """Copy rows of one layer between a buffer and slots of its cache.

    The buffer is ``[tokens, 2, row]`` if ``token_major``, else ``[2, tokens, row]``. For MLA it is
    ``[tokens, row]``.
    """
    cache = vllm_key_value_cache
    pool = Pool(1, 1, 1, 1, 1)  # the tensor has the real extents
    caches = caches_of(engine_kv_format, [cache], pool, cache.device)
    _one_layer(caches, lmc_key_value_cache, slot_mapping, direction, token_major)


@typed
def single_layer_kv_transfer_sgl(
    lmc_key_value_cache: torch.Tensor,
    sgl_key_cache: torch.Tensor,
    sgl_value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    direction: SupportsInt,
    token_major: bool = False,
) -> None:
    """Copy rows of one layer as `single_layer_kv_transfer` does.

    Keys and values are ``[blocks, block_size, heads, dim]``.
    """
    text = "kv | block token head dim"
    caches = KVView([sgl_key_cache, sgl_value_cache], text, reinterpret=True)
    _one_layer(caches, lmc_key_value_cache, slot_mapping, direction, token_major)


def load_and_reshape_flash(
    key_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer_idx: int,
) -> None:
    """Store one layer of ``key_value``, ``[2, layers, tokens, row]``.

    The caches are ``[blocks, block_size, heads, dim]``.
    """
    layer = key_value[:, layer_idx]
    single_layer_kv_transfer_sgl(layer, key_cache, value_cache, slot_mapping, D2H)


def reshape_and_cache_back_flash(
    key_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer_idx: int,
) -> None:
    """Load one layer, as the reverse of `load_and_reshape_flash`."""
    layer = key_value[:, layer_idx]
    single_layer_kv_transfer_sgl(layer, key_cache, value_cache, slot_mapping, H2D)


def _one_layer(
    caches: KVView,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    direction: SupportsInt,
    token_major: bool,
) -> None:
    text = "token (head dim)"
    if caches.kv == 2:
        text = "token kv (head dim)" if token_major else "kv token (head dim)"
    chunk = KVView(buffer, text, heads=caches.heads, reinterpret=True)
    move(is_store(direction), caches, chunk, Index.of(slots), Index(), slots.numel())


@typed
def multi_layer_block_kv_transfer(
    paged_buffer_ptrs_tensor: torch.Tensor | list[Any],
    lmcache_objects_ptrs: list[int] | list[torch.Tensor],
    block_ids: torch.Tensor | list[int],
    device: torch.device | str,
    direction: SupportsInt,
    shape_desc: ShapeDesc,
    lmcache_chunk_size: int,
    engine_kv_format: SupportsInt,
    skip_prefix_n_blocks: int,
) -> None:
    """Copy whole blocks of all layers between any number of objects and blocks of caches.

    Args:
        paged_buffer_ptrs_tensor: addresses of the layers, int64 or uint64; or tensors.
        lmcache_objects_ptrs: objects ``[2, layers, tokens, row]``, or with one plane ``[layers,
            tokens, row]``. An object at an address has ``lmcache_chunk_size`` tokens. Its memory is
            on ``device``; for CUDA and ROCm the driver reports where it is. LMCache reads this
            parameter's annotation, which says that tensors may be passed.
        block_ids: int32 or int64. If the objects hold more blocks, only their beginning is copied.
        device: the device of the caches.
        direction: LMCache's TransferDirection.
        shape_desc: LMCache's ``PageBufferShapeDesc``.
        lmcache_chunk_size: tokens of an object.
        engine_kv_format: LMCache's EngineKVFormat.
        skip_prefix_n_blocks: blocks to skip, counted over all objects.

    Raises:
        ValueError: a chunk that holds no whole blocks, or a negative number to skip.
        SlotError, LayoutError, Unsupported: see `portakv.copy_rows`.
    """
    block_size = int(shape_desc.bs)
    chunk = lmcache_chunk_size
    check_chunk(chunk, block_size, "lmcache_chunk_size")
    if skip_prefix_n_blocks < 0:
        raise ValueError(
            f"Expected skip_prefix_n_blocks to be 0 or more, got {skip_prefix_n_blocks}. Pass a "
            f"number of blocks."
        )
    store = is_store(direction)
    per_object = chunk // block_size
    device = indexed(device)
    form = format_of(engine_kv_format)
    caches = caches_of(form.number, paged_buffer_ptrs_tensor, pool_of(shape_desc), device)
    target = None if device.type == "cuda" else device

    # One launch copies all neighbouring objects of one kind. On the host there are no launches to
    # save, so each object is a separate copy.
    kinds = [likeness_of(each) for each in lmcache_objects_ptrs]
    separate = device.type == "cpu"
    first = 0
    for _, run in groupby(range(len(kinds)), lambda at: at if separate else kinds[at]):
        objects = [lmcache_objects_ptrs[at] for at in run]
        ids = block_ids[first * per_object : (first + len(objects)) * per_object]
        begin = max(skip_prefix_n_blocks - first * per_object, 0) * block_size
        first += len(objects)

        # A single object may be shorter than a chunk.
        order = None if len(objects) == 1 else range(len(objects))
        positions = index_of(order, chunk).shifted(begin)
        chunks = objects_of(form, caches, objects, chunk, target)
        blocks = blocks_of(ids, block_size).shifted(begin)
        move(store, caches, chunks, blocks, positions, len(ids) * block_size - begin)


# ------------------------------------------------------------------------------------------------
# Ops by addresses: objects without staging (LMCache 0.5.6 and newer), and bytes.
#
# LMCache registers its memory in pieces, and a driver's copy must not cross from one piece to the
# next. `lmcache_memcpy_async` gets the end of the pieces from LMCache and cuts there, because
# PortaKV does not know memory that LMCache registered without the integration.


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
            continue

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
