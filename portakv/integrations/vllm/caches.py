# SPDX-License-Identifier: Apache-2.0
"""What PortaKV reads of vLLM's configuration, caches and requests for the connector."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import accumulate
from math import lcm
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from portakv.arguments import flag
from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.runtime.bounded import Bounded
from portakv.serving import Group
from portakv.serving.handover import (
    KEY,
    HandoverTerms,
    Identity,
    parameters_of,
    rows_in,
)
from portakv.serving.local import TOKENS, TOKENS_ON_CPU, GroupView, StoreTerms, checksum_if_here
from portakv.serving.plan import Blocks, RemoteRows
from portakv.serving.scheduler import NO_STATES
from portakv.view import KVView

# ------------------------------------------------------------------------------------------------
# Views of vLLM's KV caches: pages that move whole, or keys and values by head and token.

#: Attention backends that keep the key and the value of a token and a head next to each other.
FUSED = (
    "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "vllm.v1.attention.backends.flashinfer.FlashInferBackend",
    "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
)
#: Attention backends that keep one latent row for each token.
LATENT = (
    "vllm.v1.attention.backends.mla.amx_mla.AMXMLABackend",
    "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend",
    "vllm.v1.attention.backends.mla.cutlass_mla.CutlassMLABackend",
    "vllm.v1.attention.backends.mla.flashattn_mla.FlashAttnMLABackend",
    "vllm.v1.attention.backends.mla.flashattn_mla_sparse.FlashAttnMLASparseBackend",
    "vllm.v1.attention.backends.mla.flashinfer_mla.FlashInferMLABackend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse.FlashInferMLASparseSM120Backend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse.FlashInferMLASparseTRTLLMBackend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse_sm90.FlashInferMLASparseSM90Backend",
    "vllm.v1.attention.backends.mla.flashmla.FlashMLABackend",
    "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend",
    "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend",
)
#: Bytes of a latent row with its scales, as ``fp8_ds_mla`` has it for DeepSeek V3.2. In packed
#: latent rows of other sizes the scales follow the rows of a block, or their order is not known.
PACKED = 656
#: The index next to latent rows: the values of a block's keys, then a scale of each key.
INDEX = "vllm.v1.attention.backends.mla.indexer.DeepseekV32IndexerBackend"
INDEX_KEY = (128, 4)
#: Values of vLLM's ``indexer_kv_dtype`` with which an index has keys in 8 bits.
USUAL = ("", "auto", "fp8")
#: Attention on a CPU, by the kernels whose order of keys is known: a head's keys as [dim, token].
BY_DIM = (
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec16",
)
#: Where no attention backend is known.
NO_KERNELS: Mapping[str, str] = MappingProxyType({})
#: The names of classes that vLLM derives from an attention backend, whose pages are the backend's.
WRAPPED = "ChunkedLocalAttention_"
#: What a user does if rows cannot be read, for blocks of a fixed size, for several workers, and for
#: engines that hand requests over.
BY_TOKEN = (
    "Stored blocks of a fixed size need it: leave block_size out of kv_connector_extra_config."
)
BY_HEAD = "Several workers need it: run one worker, or choose the OffloadingConnector."
HANDED = (
    "Engines that hand requests over need it: leave hand_over out of kv_connector_extra_config and "
    "set kv_role to 'kv_both', or choose another connector for this model."
)
#: The instruction set of kernels for bf16 on a CPU, and what a user does then.
AMX = "amx"
OTHER_DTYPE = " On a CPU with AMX, --dtype float32 chooses pages that PortaKV can read."
#: The attributes of a layer with the scales of its quantized keys and values.
SCALES = ("_k_scale", "_v_scale")


def _layers_in(config: Any) -> Mapping[str, Any]:
    """Return the layers with caches of a worker, by name."""
    compilation = getattr(config, "compilation_config", None)
    return getattr(compilation, "static_forward_context", None) or {}


def scales_of(config: Any, workers: Workers) -> str:
    """Return what names the scales outside of the pages of a quantized cache; empty if all are 1.

    The bytes of rows depend on them. Layers have those of the checkpoint once it is loaded.

    Raises `IntegrationError` for scales that the workers of an engine do not have in common.
    """
    found = dict[str, object]()
    for name, layer in _layers_in(config).items():
        for attribute in SCALES:
            scale = getattr(layer, attribute, None)
            if scale is None or bool((scale == 1).all()):
                continue
            if workers.stages > 1 or (workers.size > 1 and scale.numel() > 1):
                raise IntegrationError(
                    f"Expected scales of the cache that all {workers.size} workers have, got "
                    f"{attribute.strip('_')} {scale.flatten().tolist()} of {name}: heads or stages "
                    f"with scales of their own are stored by one worker. Run one, or leave "
                    f"--kv-cache-dtype out."
                )
            found[name + attribute] = scale.flatten().tolist()
        quantized = str(getattr(layer, "kv_cache_dtype", "")).startswith("fp8")
        if quantized and torch.version.hip:  # some AMD GPUs have an fp8 of their own
            found["device"] = torch.cuda.get_device_properties(0).gcnArchName
    text = json.dumps(found, sort_keys=True)
    return f":scales {sha256(text.encode()).hexdigest()[:16]}" if found else ""


def kernels_of(config: Any) -> dict[str, str]:
    """Return the attention backend of each layer, with what its pages also depend on: the kernels'
    instruction set on a CPU, the numbers of an index if they are not the usual ones.

    A layer whose backend is not known has an empty name.
    """
    made = dict[str, str]()
    attention = getattr(config, "attention_config", None)
    index = str(getattr(attention, "indexer_kv_dtype", ""))
    if getattr(attention, "use_fp4_indexer_cache", False):  # before 0.32
        index = "mxfp4"
    for name, layer in _layers_in(config).items():
        backend_of = getattr(layer, "get_attn_backend", None)
        if backend_of is None:
            continue
        backend = backend_of()
        if backend.__name__.startswith(WRAPPED):
            backend = backend.__base__
        parts = [f"{backend.__module__}.{backend.__qualname__}"]
        if isa := getattr(layer, "isa", ""):
            parts.append(str(isa))
        if backend.__name__.endswith("IndexerBackend") and index not in USUAL:
            parts.append(index)
        made[name] = " ".join(parts)
    return made


def views_of(
    kv_caches: Mapping[str, Any],
    kv_cache_config: Any,
    kernels: Mapping[str, str] = NO_KERNELS,
    reason: str | None = None,
    ranks: Ranks | None = None,
) -> list[GroupView]:
    """Return a view of each group's layers; of layers with pages of several kinds one for each.

    Args:
        kv_caches: by the name of a layer its tensor, or of a recurrent layer perhaps one for each
            of its states.
        kernels: by the name of a layer, its attention backend as `kernels_of` has it.
        reason: why rows are read by head and token, and what a user does if they cannot be, for the
            error. None: blocks are pages that move whole.
        ranks: states are divided by their heads, so that other numbers of ranks find them; None:
            they are not.

    Layers of a group that share a tensor are one. Layers of several groups may share it too.
    Else states of recurrent layers move as they are: the bytes of a layer's states in a block.

    Raises `IntegrationError` for caches without an axis of blocks, and for kernels whose order of
    rows in a page is not known.
    """
    blocks = kv_cache_config.num_blocks
    views = list[GroupView]()
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        by_address = dict[int, str]()
        for name in group.layer_names:
            by_address.setdefault(_address(kv_caches[name]), name)
        for names in _alike(kv_caches, [*by_address.values()]):
            tensors = [kv_caches[name] for name in names]
            specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
            spec = group.kv_cache_spec if specs is None else specs[names[0]]
            if type(spec).__name__ == STATES:
                if ranks is not None and (parts := parts_of_states(spec)):
                    divided = _divided(tensors, blocks, spec, parts, ranks)
                    views += [each._replace(group=number) for each in divided]
                    continue
                made = _states(tensors, blocks, spec)
            else:
                used = [kernels.get(name, "") for name in names]
                if reason is None:
                    made = _pages(tensors, blocks, spec.block_size, used)
                else:
                    made = _rows(tensors, blocks, spec, used, reason)
            views.append(made._replace(group=number))
    return views


def _alike(kv_caches: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Return layers by the kind of their pages, in their order.

    vLLM puts layers of unequal width into one group if they need the same blocks, such as latent
    rows and the index next to them.
    """
    kinds = dict[Any, list[str]]()
    for name in names:
        cache = kv_caches[name]
        parts = [cache] if isinstance(cache, torch.Tensor) else cache
        kind = tuple((*each.shape, *each.stride(), each.dtype) for each in parts)
        kinds.setdefault(kind, []).append(name)
    return [*kinds.values()]


def view_across_layers(
    kv_cache: torch.Tensor, kv_cache_config: Any, kernels: Mapping[str, str] = NO_KERNELS
) -> GroupView:
    """Return the view of a cache whose blocks hold the rows of all layers next to each other.

    Args:
        kv_cache: of all layers; the engine's blocks are the outermost axis in memory.
        kernels: as for `views_of`.

    Raises `IntegrationError` if blocks are not whole pages.
    """
    blocks = kv_cache_config.num_blocks
    (group,) = kv_cache_config.kv_cache_groups
    order = sorted(range(kv_cache.dim()), key=lambda axis: -kv_cache.stride()[axis])
    pages = kv_cache.permute(order)
    if pages.shape[0] != blocks or not pages[0].is_contiguous():
        raise IntegrationError(
            f"Expected one cache of {blocks} blocks with all layers of a block next to each other, "
            f"got the shape {[*kv_cache.shape]} and the strides {[*kv_cache.stride()]}. Choose the "
            f"OffloadingConnector for this model."
        )
    # The number of blocks may change from start to start.
    page = [n for axis, n in enumerate(kv_cache.shape) if axis != order[0]]
    by = _orders(kernels.values())
    notes = f"all layers: axes {order} of {page} {kv_cache.dtype}{by}"
    return GroupView(_whole([pages], 1), notes, group.kv_cache_spec.block_size)


def layer_numbers(kv_caches: Mapping[str, Any], kv_cache_config: Any) -> dict[str, int]:
    """Return the position of each layer's tensor in the view of its group."""
    numbers = dict[str, int]()
    for group in kv_cache_config.kv_cache_groups:
        seen = dict[int, int]()
        for name in group.layer_names:
            address = _address(kv_caches[name])
            numbers[name] = seen.setdefault(address, len(seen))
    return numbers


def _orders(kernels: Iterable[str]) -> str:
    """Return what the notes of pages say of kernels: those whose pages of one shape differ.

    On a CPU the order of a page depends on the instruction set, which vLLM chooses by the host; and
    an index of 4 bits has the shape of one of 8. Else shape and strides say the order.
    """
    some = sorted({kernel for kernel in kernels if len(kernel.split()) > 1})
    return f" by {' and '.join(some)}" if some else ""


def _pages(
    tensors: Sequence[torch.Tensor], blocks: int, size: int, kernels: Sequence[str]
) -> GroupView:
    """Return a view whose blocks are pages that nothing looks into.

    Its notes say where a row lies in a page, so that no engine loads one that its kernels read
    otherwise: the shape of a block in the order of its memory, and see `_orders`.
    """
    # A kernel may have smaller blocks than the engine.
    tensors = [
        x.unflatten(0, (blocks, -1))
        if x.dim() == 4 and len(x) > blocks and len(x) % blocks == 0
        else x
        for x in tensors
    ]
    shape = tensors[0].shape
    strides = tensors[0].stride()
    outer = 1 if shape[0] == blocks else 2
    if shape[outer - 1] != blocks or (outer == 2 and shape[0] != 2):
        raise IntegrationError(
            f"Expected caches whose first or second axis is {blocks} blocks, got "
            f"{[*shape]} for the first layer. Choose the OffloadingConnector for this model."
        )
    # vLLM's tensors name the heads before the tokens, whatever their order in memory.
    inner = sorted(range(outer, len(shape)), key=lambda axis: -strides[axis])
    pages = [tensor.permute(*range(outer), *inner) for tensor in tensors]
    notes = f"axes {inner} of {[*shape[outer:]]} {tensors[0].dtype}{_orders(kernels)}"
    return GroupView(_whole(pages, outer), notes, size)


def _address(cache: Any) -> int:
    """Return where the cache of a layer begins: a tensor, or the states of a recurrent layer."""
    return int((cache if isinstance(cache, torch.Tensor) else cache[0]).data_ptr())


def _states(caches: Sequence[Any], blocks: int, spec: Any) -> GroupView:
    """Return a view whose blocks are the states of a recurrent layer, of several shapes and dtypes.

    ``caches``: of each layer one tensor whose blocks are bytes, or a tensor of each state. The
    states of a block follow each other without a gap; the page of a block may be longer.
    """
    kinds = [*zip(spec.shapes, spec.dtypes, strict=True)]
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
    pages = [_state_bytes(cache, blocks, kinds, nbytes) for cache in caches]
    notes = "states: " + ", ".join(f"{[*shape]} {dtype}" for shape, dtype in kinds)
    view = KVView([page.unsqueeze(2) for page in pages], "layer | block token head dim")
    return GroupView(view, notes, None, replicated=bool(getattr(spec, "tp_replicated", False)))


class Ranks(NamedTuple):
    """The ranks of tensor parallelism.

    Attributes:
        size: how many there are.
        groups: of heads in Mamba 2, of the whole model; 0: not known. Ranks have equal ones if
            there are fewer than ranks.
    """

    size: int
    groups: int = 0


class StatePart(NamedTuple):
    """A part of a layer's states that tensor parallelism divides by heads.

    Attributes:
        state: its number among the layer's states: 0 of the convolution, 1 the recurrent one.
        first: where it begins in a row of that state.
        heads: of a rank.
        dim: numbers of a head.
        grouped: its heads are groups of Mamba 2.
    """

    state: int
    first: int
    heads: int
    dim: int
    grouped: bool = False


def parts_of_states(spec: Any) -> list[StatePart]:
    """Return the parts of recurrent layers' states, as a rank has them; none if they are not known.

    The convolution's rows have the channels of queries, keys and values (GDN), or of inputs and of
    two projections (Mamba 2), next to each other. vLLM's NIXL connector divides them so
    (``derive_mamba_conv_split``).
    """
    kind = getattr(getattr(spec, "mamba_type", None), "name", "")
    shapes = [tuple(shape) for shape in spec.shapes]
    if kind not in DIVIDED or [len(shape) for shape in shapes] != [2, 3]:
        return []
    if getattr(spec, "tp_replicated", False) or shapes[0][0] > shapes[0][1]:
        return []
    (_, channels), (heads, dim, other) = shapes
    groups = (channels - heads * dim) // (2 * other)
    if groups < 1 or heads * dim + 2 * groups * other != channels:
        return []
    if kind == DIVIDED[0]:
        keys = [StatePart(0, n * groups * other, groups, other) for n in range(2)]
        conv = [*keys, StatePart(0, 2 * groups * other, heads, dim)]
    else:
        first = heads * dim
        both = [StatePart(0, first + n * groups * other, groups, other, True) for n in range(2)]
        conv = [StatePart(0, 0, heads, dim), *both]
    return [*conv, StatePart(1, 0, heads, dim * other)]


def _divided(
    caches: Sequence[Any], blocks: int, spec: Any, parts: Sequence[StatePart], ranks: Ranks
) -> list[GroupView]:
    """Return a view of each part of recurrent layers' states, by head. Raises
    `IntegrationError`."""
    kinds = [*zip(spec.shapes, spec.dtypes, strict=True)]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    pages = [_state_bytes(cache, blocks, kinds, sum(sizes)) for cache in caches]
    made = list[GroupView]()
    for number, (state, first, heads, dim, grouped) in enumerate(parts):
        shape, dtype = kinds[state]
        rows = shape[0] if state == 0 else 1
        width = math.prod(shape) // rows
        before = sum(sizes[:state])
        views = list[torch.Tensor]()
        for page in pages:
            raw = page[:, 0, before : before + sizes[state]].view(dtype)
            some = raw.unflatten(1, (rows, width))[:, :, first : first + heads * dim]
            views.append(some.unflatten(2, (heads, dim)))
        notes = f"part {number} of states, {dtype}"
        view = KVView(views, "layer | block token head dim")
        total = ranks.groups if grouped and ranks.groups else heads * ranks.size
        made.append(GroupView(view, notes, None, heads=total))
    return made


def _state_bytes(
    cache: Any, blocks: int, kinds: Sequence[tuple[Any, torch.dtype]], nbytes: int
) -> torch.Tensor:
    """Return the states of a layer as bytes, uint8 ``[blocks, 1, nbytes]``. Raises
    `IntegrationError`."""
    parts = [cache] if isinstance(cache, torch.Tensor) else [*cache]
    first = parts[0]
    page = first.stride(0) * first.itemsize
    places = [each.data_ptr() - first.data_ptr() for each in parts]
    whole = [math.prod(each.shape[1:]) * each.itemsize for each in parts]
    fits = all(
        len(each) == blocks
        and each.stride(0) * each.itemsize == page
        and each[0].is_contiguous()
        and place == before
        for each, place, before in zip(parts, places, accumulate(whole, initial=0), strict=False)
    )
    if not fits or sum(whole) != nbytes or page < nbytes:
        shapes = ", ".join(f"{[*each.shape]} {each.dtype}" for each in parts)
        raise IntegrationError(
            f"Expected states of {blocks} blocks, of which each has {nbytes} bytes next to each "
            f"other, got {shapes}. Choose the OffloadingConnector for this model."
        )
    raw = first.view(torch.uint8) if first.itemsize == 1 else _raw(first)
    start = first.storage_offset() * first.itemsize
    return raw.as_strided((blocks, 1, nbytes), (page, nbytes, 1), start)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _whole(pages: Sequence[torch.Tensor], outer: int) -> KVView:
    """Return a view in which each page counts as one row, so that a stored block may have several.

    Args:
        pages: of each layer, in the order of their memory.
        outer: the axes that come before those of a page: blocks, or keys and values and blocks.

    Raises `IntegrationError` for pages with gaps.
    """
    layout = "layer | block token dim" if outer == 1 else "layer | kv block token dim"
    try:
        rows = [page.view(*page.shape[:outer], 1, -1).view(torch.uint8) for page in pages]
    except RuntimeError as error:
        raise IntegrationError(
            f"Expected caches whose pages have no gaps, got the shape {[*pages[0].shape]} and the "
            f"strides {[*pages[0].stride()]}: {error}. Choose the OffloadingConnector for this "
            f"model."
        ) from None
    return KVView(rows, layout)


def _rows(
    tensors: Sequence[torch.Tensor], blocks: int, spec: Any, kernels: Sequence[str], reason: str
) -> GroupView:
    """Return a view that reads rows by head and token. Raises `IntegrationError`."""
    (kernel, *others) = {*kernels}
    size = spec.block_size
    first = tensors[0]
    wide = spec.head_size
    packed = getattr(spec, "state_content_bytes", None)
    if packed is not None:  # keys with their scales, then values with theirs; or a latent row
        wide = packed // (1 if kernel in LATENT else 2) // first.itemsize
    shapes = {tuple(tensor.shape) for tensor in tensors}
    has_both = shapes == {(blocks, spec.num_kv_heads, size, 2 * wide)}
    if not others:
        if has_both and kernel in FUSED:
            dims = (wide, wide)
            view = KVView(tensors, "layer | block head token (kv dim)", kv=2, dim=dims)
            return GroupView(view, "")
        if has_both and kernel in BY_DIM:
            pairs = [_keys_and_values(tensor) for tensor in tensors]
            return GroupView(KVView(pairs, "layer kv | block head token dim"), "")
        is_latent = shapes <= {(blocks, size, wide), (blocks, 1, size, wide)}
        if is_latent and kernel in LATENT and packed in (None, PACKED):
            planes = [tensor.reshape(blocks, size, wide) for tensor in tensors]
            return GroupView(KVView(planes, "layer | block token dim"), "")
        if is_latent and kernel == INDEX and _is_known_index(first, wide):
            pages = [tensor.view(blocks, size * wide) for tensor in tensors]
            view = KVView(
                pages, "layer | block (kv token dim)", kv=2, dim=INDEX_KEY, block_size=size
            )
            return GroupView(view, "", replicated=True)
    by_amx = kernel.split()[-1:] == [AMX]
    mode = getattr(spec, "kv_quant_mode", None)
    raise IntegrationError(
        f"Expected an attention backend whose pages PortaKV can read by token, got "
        f"{' and '.join(sorted({*kernels})) or 'none'} with {first.dtype} {[*first.shape]}"
        f"{f' ({mode.name})' if mode else ''}. {reason}{OTHER_DTYPE if by_amx else ''}"
    )


def _is_known_index(cache: torch.Tensor, wide: int) -> bool:
    """Return whether an index has keys in 8 bits. AMD's kernels may shuffle them in a block."""
    is_whole = cache[0].is_contiguous() and torch.version.hip is None
    return is_whole and cache.dtype == torch.uint8 and wide == sum(INDEX_KEY)


def _keys_and_values(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the keys and the values of a layer of vLLM's attention on a CPU.

    ``tensor``: [blocks, heads, tokens, 2 * dim]. In a block and a head the keys come first, as
    [dim, token], then the values, as [token, dim]. Both results are [blocks, heads, tokens, dim].
    """
    blocks, heads, tokens, wide = tensor.shape
    dim = wide // 2
    halves = tensor.view(blocks, heads, 2, tokens * dim)
    keys = halves[:, :, 0].view(blocks, heads, dim, tokens).transpose(2, 3)
    values = halves[:, :, 1].view(blocks, heads, tokens, dim)
    return [keys, values]


# ------------------------------------------------------------------------------------------------
# What PortaKV reads of vLLM's configuration, caches and requests to hand requests over.

#: Of each role whether its engine offers rows, and whether it pulls them.
ROLES = {"kv_producer": (True, False), "kv_consumer": (False, True), "kv_both": (True, True)}
#: The term of `HandoverTerms` in ``kv_connector_extra_config``.
TERM = "hand_over"
#: The term there that turns spans on.
SPANS = "spans"
#: How a request ends whose prompt was computed.
COMPLETE = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
#: What stands for all of a prompt's images, which blocks of several sizes have in common.
WHOLE = 1 << 40
#: Where torch puts host memory that processes share.
SHARED_MEMORY = "/dev/shm"


class Handing(NamedTuple):
    """How an engine hands requests over.

    Attributes:
        terms: of the hand-over.
        offers: it computes prompts for other engines.
        pulls: it goes on with prompts that others have computed.
    """

    terms: HandoverTerms
    offers: bool
    pulls: bool


class Roles(NamedTuple):
    """What an engine does, by its role and terms.

    Attributes:
        handing: how it hands requests over; None: it does not.
        stores: it has a store.
        store: the terms of the store.
        spans: it makes spans of loads, offers and pulls.
    """

    handing: Handing | None
    stores: bool
    store: Mapping[str, Any]
    spans: bool = False


def roles_of(role: object, extra: Mapping[str, Any]) -> Roles:
    """Return what an engine does.

    Args:
        role: ``kv_role`` of vLLM's configuration.
        extra: ``kv_connector_extra_config``.

    Raises:
        IntegrationError: another role.
        InvalidTerms: wrong terms of the hand-over, or ``spans`` that is neither true nor false.
    """
    if role not in ROLES:
        raise IntegrationError(
            f"Expected kv_role {' or '.join(map(repr, ROLES))} for PortaKVConnector, got {role!r}. "
            f"Correct it."
        )
    store = {name: value for name, value in extra.items() if name not in (TERM, SPANS)}
    handing = None
    try:
        if role != "kv_both" or TERM in extra:
            terms = HandoverTerms.of(extra.get(TERM, {}))
            handing = Handing(terms, *ROLES[str(role)])
        spans = flag(SPANS, extra.get(SPANS, False))
    except InvalidTerms as error:
        raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
    return Roles(handing, role == "kv_both" or bool(store), store, spans)


def share_caches(kv_caches: Iterable[torch.Tensor]) -> None:
    """Move caches of the host to memory that other engines can map. All views of them follow.

    Raises `IntegrationError` if there is not enough shared memory.
    """
    storages = {
        cache.untyped_storage().data_ptr(): cache.untyped_storage()
        for cache in kv_caches
        if cache.device.type == "cpu" and not cache.is_shared()
    }
    nbytes = sum(storage.nbytes() for storage in storages.values())
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
    if nbytes > free:
        raise IntegrationError(
            f"Expected {nbytes} bytes free in {SHARED_MEMORY} for the caches of an engine that "
            f"offers rows, got {free}. Mount a larger one (docker: --shm-size), or give the engine "
            f"a smaller cache."
        )
    for storage in storages.values():
        storage.share_memory_()


def worker_numbers(parallel: Any) -> tuple[int, int]:
    """Return the number of a worker in its engine, and among the workers of all copies of it."""
    copy = getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))
    number = int(getattr(parallel, "rank", 0))
    return number, int(copy or 0) * int(parallel.world_size) + number


def leave_last_token(request: Any) -> None:
    """Let a request for another engine compute all tokens of its prompt but the last.

    The other engine computes that one. It needs the state before it, or the rows of a window that
    ends there. vLLM's own connectors shorten requests in the same way.
    """
    params = getattr(request, "kv_transfer_params", None) or {}
    if params.get("do_remote_decode") and len(request.prompt_token_ids) > 1:
        request.prompt_token_ids = request.prompt_token_ids[:-1]
        del request._all_token_ids[-1]
        request.num_prompt_tokens -= 1
        request.max_tokens = 1


def remote_rows_of(
    request: Any, identify: Callable[[Any, int], Identity], left: int = 0
) -> RemoteRows | None:
    """Return the rows of a request that another engine has; None: it has none of them.

    The log has a line if the request carries other ones. ``identify`` is called only if the
    request carries any: it reads so many tokens of the prompt. ``left``: tokens at the end of a
    prompt that this engine computes itself.
    """
    params = getattr(request, "kv_transfer_params", None) or {}
    if not params.get("do_remote_prefill"):
        return None
    tokens = len(request.prompt_token_ids) - left
    return rows_in(params, identify(request, tokens), tokens)


def is_wanted(request: Any) -> bool:
    """Return whether another engine is to go on with a request that has ended here."""
    params = getattr(request, "kv_transfer_params", None) or {}
    if not params.get("do_remote_decode") or request.prompt_token_ids is None:
        return False
    computed = request.num_computed_tokens >= len(request.prompt_token_ids)
    return request.status.name in COMPLETE and computed


def parameters_for(
    request: Any, rows: RemoteRows, identity: Identity, engine: str, workers: int
) -> dict[str, Any]:
    """Return the ``kv_transfer_params`` of a request that another engine goes on with.

    Args:
        engine: the name of this engine.
        workers: how many it has.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine,
        "remote_request_id": request.request_id,
        "remote_num_tokens": rows.tokens,
        "tp_size": workers,
        KEY: parameters_of(rows, identity),
    }


def check_handed(groups: Sequence[Group], config: Any = None) -> None:
    """Refuse layers whose rows or states are not handed over.

    ``config``: vLLM's; None: not known. Raises `IntegrationError`.
    """
    if not any(group.states for group in groups):
        return
    speculates = getattr(config, "speculative_config", None) is not None
    if speculates or all(group.states for group in groups):
        raise IntegrationError(
            f"Expected layers that keep rows beside states, and no speculative decoding, to hand "
            f"requests over, got {'speculative decoding' if speculates else 'states alone'}. Leave "
            f"{TERM} out and set kv_role to 'kv_both', or choose another connector."
        )


_log = logging.getLogger(__name__)
#: The kind of group whose blocks are states of recurrent layers.
STATES = "MambaSpec"
#: The kinds of KV groups that the connector serves.
SERVED = (
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowSpec",
    "SlidingWindowMLASpec",
    "ChunkedLocalAttentionSpec",
    STATES,
)
#: The kinds that keep a window.
WINDOWS = ("SlidingWindowSpec", "SlidingWindowMLASpec")
#: The kinds that the connector does not serve, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "CircularBufferSpec": "a request's last keys lie in a ring, and are not cached by prefix",
        "CrossAttentionSpec": "rows of an encoder's tokens do not depend on the prompt alone",
        "EncoderOnlyAttentionSpec": "layers of an encoder keep no rows",
        "HiddenStateCacheSpec": "hidden states are not rows of attention",
        "HiSparseHotSpec": "vLLM moves their rows between the device and the host",
        "HiSparseResidentSpec": "vLLM moves their rows between the device and the host",
        "RSWASpec": "windows of generated tokens begin at the end of each prompt",
        "SinkFullAttentionSpec": "rows of sinks lie in blocks of the cache that no request has",
        "TQFullAttentionSpec": "in 0.26 TurboQuant has this kind for its packed pages",
    }
)
#: How the name of a layer ends that has the index next to latent rows.
INDEX_LAYER = ".indexer.k_cache"
#: The most blocks of a group of layers in a stored block that several groups share: shorter prompts
#: are not stored.
MOST_BLOCKS = 4
#: The kinds of recurrent layers whose states ranks divide by heads: GDN, Mamba 2.
DIVIDED = ("GDN_ATTN", "MAMBA2")
#: By vLLM's mode of caching states, which ones are kept.
MODES: Mapping[str, Literal["every", "last"]] = {"all": "every", "align": "last"}
#: The field of a step by which vLLM tells which blocks have states.
TOLD = "kv_connector_block_state"
#: The hook of vLLM's connectors that reports a failed load by its request, from 0.32 on.
RESULTS = "get_transfer_results"
#: What vLLM appends to the name of each data-parallel copy of an engine.
COPY = re.compile(r"_dp[0-9]+\Z")
#: The id of a block that a group has given up, or never had.
GONE = 0


class Workers(NamedTuple):
    """The workers of an engine.

    Attributes:
        size: how many there are, of all ranks.
        local: there is one, in the scheduler's process, and no second copy of the engine.
        stages: of a pipeline, which have equal shares of the workers.
        copies: of the engine, by data parallelism, that may compute in step with each other.
    """

    size: int
    local: bool
    stages: int = 1
    copies: int = 1


def needs_server(store: StoreTerms, workers: Workers) -> bool:
    """Return whether a store has to be that of the host's server: several processes use it."""
    return bool(store.shared) or not workers.local


class Settings(NamedTuple):
    """What the configuration of an engine says.

    Attributes:
        engine: the name of the engine, which its scheduler and its worker have in common.
        model: of the weights, and what else decides what a row is.
        block_size: the tokens of a stored block.
        groups: of layers.
        store: where blocks are stored.
        workers: that save and load them.
        handing: how the engine hands requests over to other ones; None: it does not.
        parts: of each group how many parts of it a store server has.
        ranks: by which states are divided.
        stores: it has a store. Else ``store`` has the usual terms, which nothing uses.
        spans: it makes spans of loads, offers and pulls.
    """

    engine: str
    model: str
    block_size: int
    groups: tuple[Group, ...]
    store: StoreTerms
    workers: Workers
    handing: Handing | None = None
    stores: bool = True
    spans: bool = False
    parts: tuple[int, ...] = (1,)
    ranks: Ranks = Ranks(1)

    @property
    def uses_store_server(self) -> bool:
        """Return whether blocks are stored by the server of the host."""
        return self.stores and needs_server(self.store, self.workers)

    @property
    def reads_rows(self) -> bool:
        """Return whether blocks are stored by head and token: for engines of another shape, or
        packed."""
        read = self.store.block_size is not None or self.store.encoding is not None
        return self.uses_store_server or read

    @property
    def has_whole_blocks(self) -> bool:
        """Return whether a block may hold all layers next to each other: one run for a copy.

        Not where layers are loaded one by one, or where rows are read by head and token, as other
        engines read them.
        """
        apart = self.store.by_layer or self.reads_rows or self.handing is not None
        return len(self.groups) == 1 and not apart

    @property
    def shows_idle(self) -> bool:
        """Return whether an engine does nothing else if a step computes nothing.

        Not with stages of a pipeline: requests that are in flight are left out of the next step.
        Not with data parallelism: the ranks of some models compute in step with each other.
        """
        return self.workers.stages == 1 and self.workers.copies == 1

    @property
    def fails_by_request(self) -> bool:
        """Return whether a load that fails is reported by its request, not by its blocks.

        A report does not say of which group an id is, and where blocks before a window are
        gone, a request cannot go on in the middle of a load.
        """
        return len(self.groups) > 1 or not all(group.is_whole for group in self.groups)


def settings_of(config: Any, kv_cache_config: Any, tells: bool = False) -> Settings:
    """Return the settings of an engine.

    ``tells``: it tells in each step which blocks have states.

    Raises:
        IntegrationError: parallelism, or kinds of layers, that the connector does not serve.
        InvalidTerms: wrong terms in ``kv_connector_extra_config``.
    """
    transfer = config.kv_transfer_config
    workers = workers_of(config.parallel_config, transfer.engine_id)
    role = getattr(transfer, "kv_role", "kv_both")
    roles = roles_of(role, transfer.kv_connector_extra_config)
    groups = groups_of(kv_cache_config, tells)
    if roles.handing is not None:
        check_handed(groups, config)
    if workers.stages > 1:
        check_stages(config, groups)
    try:
        store = StoreTerms.of(roles.store)
        device = getattr(getattr(config, "device_config", None), "device_type", "")
        size = stored_block(store, groups, least_tokens(device, store))
    except InvalidTerms as error:
        raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
    if any(group.states for group in groups):
        check_states(store, workers)
    if store.by_layer and workers.size > 1:
        raise IntegrationError(
            f"Expected one worker for by_layer, got {workers.size}: a worker does not know in time "
            f"what another one lacks. Leave by_layer out of kv_connector_extra_config."
        )
    if store.by_layer and schedules_ahead(config):
        raise IntegrationError(
            "Expected --no-async-scheduling for by_layer, got asynchronous scheduling: there vLLM "
            "cannot compute the blocks anew of a load that fails in its step. Add it, or leave "
            "by_layer out of kv_connector_extra_config."
        )
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise IntegrationError(
            "Expected scales of the cache that the checkpoint has, got calculate_kv_scales: an "
            "engine computes its own from its first prompt, so that no other one can read its "
            "rows. Leave --calculate-kv-scales out, or choose the OffloadingConnector."
        )
    model = config.model_config
    folder = os.path.abspath(model.model) if os.path.isdir(model.model) else model.model
    names = (
        folder,
        model.revision,
        model.quantization,
        config.cache_config.cache_dtype,
        *sorted(getattr(config.cache_config, "kv_cache_dtype_skip_layers", None) or ()),
        _checksum_of(model, folder),
        checksum_if_here(str(folder)),
    )
    return Settings(
        engine=transfer.engine_id,
        model=":".join(str(name) for name in names),
        block_size=size,
        groups=tuple(groups),
        store=store,
        workers=workers,
        handing=roles.handing,
        stores=roles.stores,
        spans=roles.spans,
        parts=tuple(
            _parts_of(group) if needs_server(store, workers) else 1
            for group in kv_cache_config.kv_cache_groups
        ),
        ranks=Ranks(workers.size, _groups_of_heads(model)),
    )


def _parts_of(group: Any) -> int:
    """Return how many parts of a group's caches a store server has.

    A scheduler has the kind of one layer of a group. Latent rows and the index next to them are two
    parts, which the names of layers show. A worker refuses caches of another number of parts.
    """
    (spec, *_) = _layers_of(group)
    if type(spec).__name__ == STATES:
        return max(1, len(parts_of_states(spec)))
    return max(1, len({name.endswith(INDEX_LAYER) for name in group.layer_names}))


def _groups_of_heads(model: Any) -> int:
    """Return the groups of heads of a model with Mamba 2; 0 for others."""
    config = getattr(model, "hf_text_config", None)
    found = (getattr(config, name, None) for name in ("n_groups", "mamba_n_groups"))
    return next((int(each) for each in found if each), 0)


def schedules_ahead(config: Any) -> bool:
    """Return whether an engine schedules a step before the one before it has ended."""
    return bool(getattr(getattr(config, "scheduler_config", None), "async_scheduling", False))


def least_tokens(device: str, store: StoreTerms) -> int:
    """Return the tokens that a stored block has at least, unless ``block_size`` says otherwise, or
    the engine keeps states.

    Engines without states that share a store have one number, whatever their own blocks are.
    ``device``: the kind of the engine's device.
    """
    return TOKENS_ON_CPU if device == "cpu" and not store.shared else TOKENS


def stored_block(store: StoreTerms, groups: Sequence[Group], tokens: int) -> int:
    """Return the tokens of a stored block: those of ``block_size``, else of `whole_blocks`.

    Raises `InvalidTerms` for terms that do not fit the blocks of the engine's groups of layers.
    """
    size = store.block_size or whole_blocks(groups, tokens)
    if store.encoding is not None:  # packed blocks are those of the engine
        sizes = sorted({group.block_size for group in groups})
        if len(sizes) > 1:
            raise InvalidTerms(
                f"Expected encoding for groups of layers with blocks of one size, got {sizes}: a "
                f"packed block moves only whole. Leave encoding out."
            )
        (size,) = sizes
        if store.block_size not in (None, size):
            raise InvalidTerms(
                f"Expected block_size to be {size} with encoding, as the engine's blocks have, got "
                f"{store.block_size}: a packed block moves only whole. Leave block_size out, or "
                f"start the engine with --block-size {store.block_size}."
            )
    for group in groups:
        group.check(size)
    return size


def whole_blocks(groups: Sequence[Group], tokens: int = TOKENS) -> int:
    """Return the tokens of a stored block that whole blocks of all groups fill: at least
    ``tokens``, unless that is more than the window of a group and than its blocks.

    With states it has no more than one block of each group: an engine may keep a state at the end
    of any block, and no hit can end within a stored block.

    Raises `InvalidTerms` if only very large blocks would do.
    """
    sizes = sorted({group.block_size for group in groups})
    least = lcm(*sizes)
    if least > MOST_BLOCKS * sizes[-1]:
        raise InvalidTerms(
            f"Expected block_size for a model whose groups of layers have blocks of {sizes} "
            f"tokens, got none: whole blocks of all groups have {least}. Pass a multiple or a "
            f"divisor of each."
        )
    if any(group.states is not None for group in groups):
        return least
    size = least * -(-tokens // least)
    try:
        for group in groups:
            group.check(size)
    except InvalidTerms:
        return least
    return size


def workers_of(parallel: Any, engine: str) -> Workers:
    """Return the workers of an engine.

    Raises `IntegrationError` for kinds of parallelism, and executors, that the connector does not
    serve.
    """
    for name, kind in (
        ("prefill_context_parallel_size", "prefill context"),
        ("decode_context_parallel_size", "decode context"),
    ):
        many = getattr(parallel, name, 1)
        if many != 1:
            raise IntegrationError(
                f"Expected tensor, pipeline or data parallelism for PortaKVConnector, got {many} "
                f"ranks of {kind} parallelism. Leave --{name.replace('_', '-')} out, or choose the "
                f"OffloadingConnector."
            )
    hosts = getattr(parallel, "nnodes", 1)
    executor = getattr(parallel, "distributed_executor_backend", None)
    if hosts != 1 or executor not in (None, "uni", "mp"):
        raise IntegrationError(
            f"Expected workers that are processes of one host for PortaKVConnector, got {hosts} "
            f"hosts and the executor {executor!r}. Run one host with "
            f"--distributed-executor-backend mp, or choose the OffloadingConnector."
        )
    copies = getattr(parallel, "data_parallel_size", 1)
    # vLLM lets copies that know nothing of each other have the size 1, and numbers their names.
    several = copies != 1 or COPY.search(engine) is not None
    workers = parallel.world_size
    local = workers == 1 and executor != "mp" and not several
    return Workers(workers, local, getattr(parallel, "pipeline_parallel_size", 1), copies)


def check_stages(config: Any, groups: Sequence[Group]) -> None:
    """Refuse what cannot be served with several stages of pipeline parallelism.

    Raises `IntegrationError`.
    """
    do = "Leave --pipeline-parallel-size out, or choose the OffloadingConnector."
    if len(groups) > 1:
        raise IntegrationError(
            f"Expected one group of layers for pipeline parallelism, got {len(groups)}: a stage "
            f"does not know its place among the layers of each group. {do}"
        )
    # In vLLM's first model runner, both hold for the stages before the last one.
    if getattr(config, "speculative_config", None) is not None:
        raise IntegrationError(
            f"Expected no speculative decoding with pipeline parallelism, got one: only the last "
            f"stage calls the hook wait_for_save then. {do}"
        )
    if getattr(config.model_config, "runner_type", "generate") == "pooling":
        raise IntegrationError(
            f"Expected a model that generates tokens for pipeline parallelism, got one that pools: "
            f"only the last stage returns its reports then. {do}"
        )


def check_states(store: StoreTerms, workers: Workers) -> None:
    """Refuse what the states of recurrent layers cannot be stored by.

    Raises `IntegrationError`.
    """
    if store.bucket is not None and needs_server(store, workers):
        raise IntegrationError(
            "Expected no bucket in the store of a host for a model with recurrent layers, got one: "
            "a store server looks up rows there, and no states. Leave bucket out of "
            "kv_connector_extra_config, or run one worker without shared."
        )


def never_fails(base: type, settings: Settings) -> bool:
    """Return whether no load may fail: the installed release of vLLM has no way to report it.

    Args:
        base: vLLM's class of connectors.

    Raises `IntegrationError` if loads of the store may fail, or for by_layer.
    """
    if not settings.fails_by_request:
        return False
    check_by_layer(settings.store)
    if hasattr(base, RESULTS):
        return False
    got = ""
    if settings.handing is not None and settings.handing.pulls:
        got = "an engine that takes over prompts"
    elif settings.uses_store_server:
        got = "the store of a host's server"
    elif not settings.store.host:
        got = "host: 0"
    if got:
        raise IntegrationError(
            f"Expected host memory of one worker for a model with several groups of layers or a "
            f"sliding window, since this release of vLLM lacks the hook {RESULTS}, got {got}. "
            f"Pass host to one worker without shared or a role, or install a later release."
        )
    return True


def check_by_layer(store: StoreTerms) -> None:
    """Raise `IntegrationError` for by_layer with a model that has several groups of layers, or a
    sliding window."""
    if store.by_layer:
        raise IntegrationError(
            "Expected a model with one group of layers that keep all tokens for by_layer, got "
            "several groups or a sliding window. Leave by_layer out of kv_connector_extra_config."
        )


def _checksum_of(model: Any, name: str) -> str:
    """Return a checksum of a model's configuration, with what the user has overridden.

    The configuration repeats the path that the user gave; ``name`` stands for it.
    """
    config = getattr(model, "hf_config", None)
    text = config.to_json_string(use_diff=False) if config is not None else ""
    path, absolute = (f'"_name_or_path": {json.dumps(str(each))}' for each in (model.model, name))
    return sha256(text.replace(path, absolute).encode()).hexdigest()[:16]


def warn_of_policy(config: Any) -> None:
    """Log a warning if a block that cannot be loaded would end its request with an error."""
    policy = getattr(config.kv_transfer_config, "kv_load_failure_policy", "recompute")
    if policy != "recompute":
        _log.warning(
            "kv_load_failure_policy is %r: a stored block that is damaged, or was evicted "
            "meanwhile, ends its request with an error. Set it to 'recompute'.",
            policy,
        )


def groups_of(kv_cache_config: Any, tells: bool = False, whole: bool = False) -> list[Group]:
    """Return the groups of layers as a scheduler side takes them.

    Args:
        tells: the engine tells in each step which blocks have states.
        whole: pages are only read as they are, whatever their rows mean.

    Raises `IntegrationError` for kinds of layers that the connector does not serve.
    """
    specs = specs_of(kv_cache_config)
    kinds = [type(spec).__name__ for spec in specs]
    every = [spec for group in kv_cache_config.kv_cache_groups for spec in _layers_of(group)]
    refused = {
        type(spec).__name__: reason for spec in every if (reason := _refusal_of(spec, whole))
    }
    if refused or not kinds:
        got = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        raise IntegrationError(
            f"Expected layers of {', '.join(SERVED)} for PortaKVConnector, got {got or 'none'}. "
            f"Choose the OffloadingConnector for this model."
        )
    made = list[Group]()
    if any(getattr(spec, "non_causal", False) for spec in every):
        raise IntegrationError(
            "Expected causal attention for PortaKVConnector, got layers whose rows depend on "
            "later tokens. Choose the OffloadingConnector for this model."
        )
    for kind, spec in zip(kinds, specs, strict=True):
        window = None
        if kind in WINDOWS:
            window = spec.sliding_window + getattr(spec, "extra_retained_tokens", 0)
        chunk = spec.attention_chunk_size if kind == "ChunkedLocalAttentionSpec" else None
        states = _kept_states(spec, tells) if kind == STATES else None
        made.append(Group(spec.block_size, window, chunk, states))
    return made


def _refusal_of(spec: Any, whole: bool) -> str:
    """Return why the connector does not serve layers of a kind; empty if it does. ``whole``: as for
    `groups_of`."""
    name = type(spec).__name__
    if name not in SERVED:
        return REFUSED.get(name, "this kind is not known")
    if whole:
        return ""
    ratios = ("tokens_per_state", "compress_ratio")  # the latter in 0.26
    if name != STATES and any(getattr(spec, ratio, 1) != 1 for ratio in ratios):
        return "a row stands for several tokens, or a token has several"
    version = getattr(spec, "model_version", None)
    if version is not None:
        return f"pages of {version} keep rows and their scales apart, with padding"
    if getattr(spec, "bounded_replay", False):
        return "vLLM computes their windows again after a hit"
    return ""


def specs_of(kv_cache_config: Any) -> list[Any]:
    """Return the kind of each group as a scheduler has it: of layers of unequal width one of
    them."""
    return [_layers_of(group)[0] for group in kv_cache_config.kv_cache_groups]


def _layers_of(group: Any) -> list[Any]:
    """Return the kinds of layers in a group."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return [group.kv_cache_spec] if specs is None else [*specs.values()]


def _kept_states(spec: Any, tells: bool) -> Literal["every", "last", "told"]:
    """Return which states of recurrent layers an engine keeps. Raises `IntegrationError`."""
    mode = getattr(spec, "mamba_cache_mode", "none")
    kept = MODES.get(mode)
    if kept is None:
        raise IntegrationError(
            f"Expected recurrent layers whose states are kept at the ends of blocks, got the mode "
            f"{mode!r}. Start vLLM with --enable-prefix-caching and --mamba-cache-mode align."
        )
    if tells and kept == "last":
        return "told"
    others = ("num_speculative_blocks", "num_prefill_checkpoint_blocks")
    some = [name for name in others if getattr(spec, name, 0)]
    if some:
        raise IntegrationError(
            f"Expected a release of vLLM that tells which blocks have states, or recurrent layers "
            f"without {some[0]}, got {getattr(spec, some[0])}. Leave speculative decoding out, or "
            f"choose the OffloadingConnector."
        )
    return kept


def states_in(step: Any, request: str) -> Mapping[int, Mapping[int, int]]:
    """Return the blocks with the states of a request that a step of vLLM tells of: by a number of
    tokens and the number of a group, as `SchedulerSide.scheduled` takes them."""
    told = getattr(getattr(step, TOLD, None), "boundary_state_offloads", None)
    entries = told.get(request) if told else None
    if not entries:
        return NO_STATES
    made: dict[int, dict[int, int]] = {}
    for group, block, tokens in entries:
        made.setdefault(tokens, {})[group] = block
    return made


def ids_of(blocks: Iterable[Iterable[int]] | None) -> Blocks:
    """Return the engine's blocks of each group; -1 in place of those that are gone."""
    if not blocks:
        return ()
    return tuple(tuple(-1 if x == GONE else x for x in ids) for ids in blocks)


class PoolHolder:
    """Keeps blocks of vLLM's pool from reuse, as a request that shares them does."""

    def __init__(self) -> None:
        self.pool: Any = None  # vLLM binds it after it has made the connector

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep blocks from reuse."""
        self.pool.touch([self.pool.blocks[block] for block in blocks])

    def give_back(self, blocks: Sequence[int]) -> None:
        """Keep blocks no longer."""
        self.pool.free_blocks([self.pool.blocks[block] for block in blocks])


def is_served(request: Any) -> bool:
    """Return whether what the rows of a request depend on is known by its keys.

    Others are computed by the engine: requests with embeddings in place of tokens, with images or
    sounds that have no identifier, and sessions whose later parts are added to them.
    """
    embeds = getattr(request, "prompt_embeds", None)
    resumable = getattr(request, "resumable", False)
    named = all(getattr(each, "identifier", None) for each in request.mm_features or ())
    return embeds is None and named and not resumable


def needs_all_tokens(request: Any) -> bool:
    """Return whether an engine has to compute every token of a prompt, such as for
    ``prompt_logprobs``. Releases up to 0.26 leave it to connectors to offer nothing then."""
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def extra_of(request: Any, block_size: int) -> dict[int, bytes]:
    """Return what the stored blocks of a request depend on besides its tokens and salt.

    The tokens of an image or a sound are placeholders; its identifier names its content.

    Returns:
        By the number of a stored block, a checksum of the images and sounds that it touches, and of
        their positions.
    """
    touching = dict[int, list[tuple[str, int]]]()
    for feature in request.mm_features or ():
        place = feature.mm_position
        past = place.offset + place.length
        for number in range(place.offset // block_size, -(-past // block_size)):
            named = (feature.identifier, place.offset - number * block_size)
            touching.setdefault(number, []).append(named)
    return {number: sha256(repr(each).encode()).digest() for number, each in touching.items()}


def salt_of(request: Any) -> bytes:
    """Return what keeps the blocks of a request apart from those of other tenants and adapters."""
    adapter = request.lora_request
    parts = [request.cache_salt or ""]
    if adapter is not None:
        path = getattr(adapter, "lora_path", "")
        parts += adapter.lora_name, path, _checksum_of_adapter(path)
    if not any(parts):
        return b""
    texts = [part.encode() for part in parts]
    if any(b"\0" in text for text in texts):  # which could pass for several parts
        texts = [sha256(text).digest() for text in texts]
    return sha256(b"\0".join(texts)).digest()


def _checksum_of_adapter(folder: str) -> str:
    """Return a checksum of the weights in an adapter's folder; empty if it is not a folder here.

    An adapter may be trained further, and loaded again under its name. The weights are read once
    for each change of a file.
    """
    try:
        files = [entry.stat() for entry in os.scandir(folder)] if folder else []
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        return checksum_if_here(folder)  # which logs why it cannot be read
    state = (folder, *sorted((each.st_ino, each.st_size, each.st_mtime_ns) for each in files))
    return _adapters.get_or_make(state, lambda: checksum_if_here(folder))


_adapters: Bounded[tuple[object, ...], str] = Bounded("checksums of adapters", 256)
