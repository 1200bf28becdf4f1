# SPDX-License-Identifier: Apache-2.0
"""LMCache's transfer ops, with LMCache's names and arguments, over `copy_rows`.

No engine is imported; numbers are taken for its enums. Ops order their work on the current stream,
and do not wait for it; an object in pageable memory is waited for, since no stream orders that.
Arguments of another type are refused by an `ArgumentError`, which is a TypeError.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from itertools import groupby
from typing import Any

import torch

from portakv import Index, InvalidTerms, KVView, LateErrors, LayoutError, SlotError, copy_rows
from portakv.integrations.arguments import described, typed
from portakv.integrations.lmcache_formats import (
    FUSED,
    MLA,
    Held,
    Pool,
    blocks_of,
    caches_of,
    check_chunk,
    kind_of,
    layout_of,
    objects_of,
    pool_of,
)
from portakv.interconnect.strategy import Terms
from portakv.runtime.devices import indexed

# LMCache's TransferDirection: object to cache, cache to object
H2D = 0
D2H = 1


#: What an op finds late, such as a bad id on a device, is raised by the next op of the same thread:
#: another one's knows nothing of these caches.
_late = threading.local()


@cache
def terms() -> dict[str, Any]:
    """How copies between a device and the host are carried out, as the user's variables say.

    Raises:
        InvalidTerms: a value that a term cannot have; it names the variable.
    """
    found: dict[str, Any] = {}
    for name in ("overlap", "max_thread_blocks"):
        variable = f"PORTAKV_LMCACHE_{name.upper()}"
        if text := os.environ.get(variable, "").strip():
            found[name] = int(text) if text.isdecimal() else text
            try:
                Terms(**{name: found[name]})
            except InvalidTerms as error:
                raise InvalidTerms(f"{variable}={text} was set. {error}") from None
    return found


def is_store(direction: Any) -> bool:
    if isinstance(direction, str) or int(direction) not in (H2D, D2H):
        raise ValueError(f"The direction {direction!r} was asked for; expected H2D (0) or D2H (1).")
    return int(direction) == D2H


def move(
    store: bool, caches: KVView, chunk: KVView, ids: Index, positions: Index, count: int
) -> None:
    """Copy rows between the caches, under the ids, and a chunk; behind the current stream. Of a
    block that a load names several times, as engines do with the one that stands for none, the last
    counts; on a device nothing is promised, as by LMCache's own ops."""
    if count <= 0:
        return
    src = caches
    dst = chunk
    mine = ids
    theirs = positions
    if not store:
        src = chunk
        dst = caches
        mine = positions
        theirs = ids
        if ids.on_host:
            theirs = ids.without_repeats(count)
    across = terms() if caches.device != chunk.device else {}
    late = vars(_late).setdefault("errors", LateErrors())
    transfer = copy_rows(src, dst, mine, theirs, count=count, late=late, **across)
    if not transfer.ordered:
        transfer.synchronize()


@typed
def multi_layer_kv_transfer(
    key_value: torch.Tensor,
    key_value_ptrs: Held,
    slot_mapping: torch.Tensor,
    paged_memory_device: torch.device | str,
    page_buffer_size: int,
    direction: Any,
    engine_kv_format: Any,
    block_size: int = 0,
    head_size: int = 0,
    skip_prefix_n_tokens: int = 0,
    block_stride_elems: int = 0,
) -> None:
    """Rows of all layers between an object ``[kv, layers, tokens, row]`` and the slots of a list.

    Args:
        key_value_ptrs: addresses of the layers, int64 or uint64 on host or device; or tensors.
        slot_mapping: int32 or int64 ``[tokens]``; negative ones are skipped.
        page_buffer_size: slots of the caches; 0: unknown, as for MLA.
        head_size: elements of a head, of keys alone where a row holds keys and values.
        skip_prefix_n_tokens: tokens at the begin that are neither read nor written.
        block_stride_elems: elements from block to block of `FUSED` formats; 0: blocks are dense.

    Raises:
        ValueError: slots that are no whole blocks, or rows that are no whole heads.
        SlotError, LayoutError, Unsupported: see `portakv.copy_rows`.
    """
    # Of format 0 this op reads the layers one by one.
    number, text, _ = layout_of(int(engine_kv_format) or 1)
    if key_value.dim() != 4:
        raise LayoutError(
            f"Expected an object [kv, layers, tokens, row], got {described(key_value)}. Pass one."
        )
    tokens = key_value.shape[2]
    width = key_value.element_size()
    if slot_mapping.numel() != tokens:
        raise SlotError(
            f"{slot_mapping.numel()} slots were given for an object of {tokens} tokens; expected "
            f"one for each token."
        )
    if tokens <= skip_prefix_n_tokens:
        return
    row = key_value.shape[3] * width
    per_block = block_size or 1
    heads = 1
    head = row
    if head_size and 0 <= text.find("head") < text.find("token"):
        head = head_size * width * (2 if number in FUSED else 1)
        heads = row // head
    if per_block < 1 or page_buffer_size % per_block or head < 1 or row % head:
        raise ValueError(
            f"Caches of {page_buffer_size} slots in blocks of {block_size}, and rows of {row} "
            f"bytes in heads of {head}, were asked for; expected whole blocks and whole heads."
        )
    blocks = page_buffer_size // per_block or -1
    # Its connectors hand over the step of their first caches for all, and its kernel heeds it here.
    step = block_stride_elems * width if number in FUSED else 0
    pool = Pool(key_value.shape[1], blocks, per_block, heads, row // heads, step)
    caches = caches_of(number, key_value_ptrs, pool, indexed(paged_memory_device))
    slots = Index.of(slot_mapping).shifted(skip_prefix_n_tokens)
    chunk = objects_of(number, caches, [key_value], tokens, caches.device)
    positions = Index(offset=skip_prefix_n_tokens)
    left = tokens - skip_prefix_n_tokens
    move(is_store(direction), caches, chunk, slots, positions, left)


def multi_layer_kv_transfer_unilateral(
    key_value: torch.Tensor,
    key_value_ptrs: Held,
    slot_mapping: torch.Tensor,
    paged_memory_device: torch.device | str,
    page_buffer_size: int,
    direction: Any,
    engine_kv_format: Any,
) -> None:
    """As `multi_layer_kv_transfer`, for caches of keys and of values apart: the addresses of all
    keys, then of all values. MLA has one list."""
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
    direction: Any,
    engine_kv_format: Any,
    token_major: bool = False,
) -> None:
    """Rows of one layer between a buffer, ``[tokens, 2, row]`` if ``token_major``, else ``[2,
    tokens, row]`` (MLA: ``[tokens, row]``), and the slots of a list."""
    cache = vllm_key_value_cache
    pool = Pool(1, 1, 1, 1, 1)  # all is read from the tensor
    caches = caches_of(engine_kv_format, [cache], pool, cache.device)
    _one_layer(caches, lmc_key_value_cache, slot_mapping, direction, token_major)


@typed
def single_layer_kv_transfer_sgl(
    lmc_key_value_cache: torch.Tensor,
    sgl_key_cache: torch.Tensor,
    sgl_value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    direction: Any,
    token_major: bool = False,
) -> None:
    """As `single_layer_kv_transfer`, of keys and values ``[blocks, block_size, heads, dim]``."""
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
    """Store one layer: slots of ``[blocks, block_size, heads, dim]`` to ``[2, layers, tokens,
    row]``."""
    layer = key_value[:, layer_idx]
    single_layer_kv_transfer_sgl(layer, key_cache, value_cache, slot_mapping, D2H)


def reshape_and_cache_back_flash(
    key_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer_idx: int,
) -> None:
    """Load one layer: the reverse of `load_and_reshape_flash`."""
    layer = key_value[:, layer_idx]
    single_layer_kv_transfer_sgl(layer, key_cache, value_cache, slot_mapping, H2D)


def _one_layer(
    caches: KVView, buffer: torch.Tensor, slots: torch.Tensor, direction: Any, token_major: bool
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
    direction: Any,
    shape_desc: Any,
    lmcache_chunk_size: int,
    engine_kv_format: Any,
    skip_prefix_n_blocks: int,
) -> None:
    """Whole blocks of all layers between any number of objects and the blocks of a list.

    Args:
        paged_buffer_ptrs_tensor: addresses of the layers, int64 or uint64; or tensors.
        lmcache_objects_ptrs: objects ``[2, layers, tokens, row]`` (one plane: ``[layers, tokens,
            row]``); at an address there are ``lmcache_chunk_size`` tokens, on CUDA and ROCm where
            the driver says, else on ``device``. Its annotation tells LMCache that tensors may be
            passed.
        block_ids: int32 or int64; fewer than the objects hold are moved to their begin.
        shape_desc: LMCache's ``PageBufferShapeDesc``.
        skip_prefix_n_blocks: of all objects together.

    Raises:
        ValueError: a chunk that holds no whole blocks, or a negative number to skip.
        SlotError, LayoutError, Unsupported: see `portakv.copy_rows`.
    """
    bs = int(shape_desc.bs)
    chunk = lmcache_chunk_size
    skip = skip_prefix_n_blocks
    check_chunk(chunk, bs, "lmcache_chunk_size")
    if skip < 0:
        raise ValueError(f"skip_prefix_n_blocks={skip} was asked for; expected at least 0.")
    store = is_store(direction)
    per_object = chunk // bs
    device = indexed(device)
    number = layout_of(engine_kv_format)[0]
    caches = caches_of(number, paged_buffer_ptrs_tensor, pool_of(shape_desc), device)
    # One launch moves those that are alike; on the host, where nothing is launched, each is by
    # itself.
    kinds = [kind_of(each) for each in lmcache_objects_ptrs]
    first = 0
    apart = device.type == "cpu"
    for _, run in groupby(range(len(kinds)), lambda at: at if apart else kinds[at]):
        objects = [lmcache_objects_ptrs[at] for at in run]
        held = block_ids[first * per_object : (first + len(objects)) * per_object]
        begin = max(skip - first * per_object, 0) * bs
        first += len(objects)
        # An object alone may be shorter than a chunk.
        order = None if len(objects) == 1 else range(len(objects))
        positions = Index.of(order, chunk).shifted(begin)
        home = None if device.type == "cuda" else device
        chunks = objects_of(number, caches, objects, chunk, home)
        blocks = blocks_of(held, bs).shifted(begin)
        move(store, caches, chunks, blocks, positions, len(held) * bs - begin)
