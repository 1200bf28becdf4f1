# SPDX-License-Identifier: Apache-2.0
"""Views of vLLM's KV caches: pages that move whole, or keys and values by head and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from portakv.integrations import IntegrationError
from portakv.serving.local import GroupView
from portakv.view import KVView

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
    "vllm.v1.attention.backends.mla.flashinfer_mla.FlashInferMLABackend",
    "vllm.v1.attention.backends.mla.flashmla.FlashMLABackend",
    "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend",
)
#: Attention on a CPU, by the kernels whose order of keys is known: a head's keys as [dim, token].
BY_DIM = (
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec16",
)
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
#: The dtypes whose rows are numbers without scales.
PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def kernels_of(config: Any) -> dict[str, str]:
    """Return the attention backend of each layer, with the kernels' instruction set if it has one.

    A layer whose backend is not known has an empty name.
    """
    compilation = getattr(config, "compilation_config", None)
    layers = getattr(compilation, "static_forward_context", None) or {}
    made = dict[str, str]()
    for name, layer in layers.items():
        backend_of = getattr(layer, "get_attn_backend", None)
        if backend_of is None:
            continue
        backend = backend_of()
        parts = [f"{backend.__module__}.{backend.__qualname__}"]
        if isa := getattr(layer, "isa", ""):
            parts.append(str(isa))
        made[name] = " ".join(parts)
    return made


def views_of(
    kv_caches: Mapping[str, torch.Tensor],
    kv_cache_config: Any,
    kernels: Mapping[str, str] | None = None,
    reason: str = BY_TOKEN,
) -> list[GroupView]:
    """Return a view of each group's layers.

    Args:
        kernels: by the name of a layer, its attention backend as `kernels_of` has it; then rows are
            read by head and token. None: blocks are pages that move whole.
        reason: why rows are read, and what a user does if they cannot be; for the error.

    Layers of a group that share a tensor are one. Layers of several groups may share it too.

    Raises `IntegrationError` for caches without an axis of blocks, and for kernels whose order of
    rows in a page is not known.
    """
    blocks = kv_cache_config.num_blocks
    views = list[GroupView]()
    for group in kv_cache_config.kv_cache_groups:
        names = list[str]()
        seen = set[int]()
        for name in group.layer_names:
            address = kv_caches[name].data_ptr()
            if address not in seen:
                seen.add(address)
                names.append(name)
        tensors = [kv_caches[name] for name in names]
        spec = group.kv_cache_spec
        if kernels is None:
            views.append(_pages(tensors, blocks, spec.block_size))
        else:
            used = [kernels.get(name, "") for name in names]
            views.append(_rows(tensors, blocks, spec, used, reason))
    return views


def view_across_layers(kv_cache: torch.Tensor, kv_cache_config: Any) -> GroupView:
    """Return the view of a cache whose blocks hold the rows of all layers next to each other.

    Args:
        kv_cache: of all layers; the engine's blocks are the outermost axis in memory.

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
    notes = f"all layers: axes {order} of {page} {kv_cache.dtype}"
    return GroupView(_whole([pages], 1), notes, group.kv_cache_spec.block_size)


def layer_numbers(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> dict[str, int]:
    """Return the position of each layer's tensor in the view of its group."""
    numbers = dict[str, int]()
    for group in kv_cache_config.kv_cache_groups:
        seen = dict[int, int]()
        for name in group.layer_names:
            address = kv_caches[name].data_ptr()
            numbers[name] = seen.setdefault(address, len(seen))
    return numbers


def _pages(tensors: Sequence[torch.Tensor], blocks: int, size: int) -> GroupView:
    """Return a view whose blocks are pages that nothing looks into.

    Its notes say where a row lies in a page: the shape of a block in the order of its memory. What
    lies in a page also depends on the attention's kernel; a page that is moved whole is right for
    each of them.
    """
    tensors = [_by_block(tensor, blocks) for tensor in tensors]
    shapes = {(tuple(tensor.shape), tensor.stride()) for tensor in tensors}
    shape, strides = shapes.pop()
    outer = 1 if shape[0] == blocks else 2
    if shapes or shape[outer - 1] != blocks or (outer == 2 and shape[0] != 2):
        raise IntegrationError(
            f"Expected caches of one shape whose first or second axis is {blocks} blocks, got "
            f"{[*shape]} for the first layer. Choose the OffloadingConnector for this model."
        )
    # vLLM's tensors name the heads before the tokens, whatever their order in memory.
    inner = sorted(range(outer, len(shape)), key=lambda axis: -strides[axis])
    pages = [tensor.permute(*range(outer), *inner) for tensor in tensors]
    notes = f"axes {inner} of {[*shape[outer:]]} {tensors[0].dtype}"
    return GroupView(_whole(pages, outer), notes, size)


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


def _by_block(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return a cache whose first axis is the engine's blocks, if its kernel has smaller ones."""
    many = tensor.shape[0]
    if many > blocks and many % blocks == 0 and tensor.dim() == 4:
        return tensor.view(blocks, many // blocks, *tensor.shape[1:])
    return tensor


def _rows(
    tensors: Sequence[torch.Tensor], blocks: int, spec: Any, kernels: Sequence[str], reason: str
) -> GroupView:
    """Return a view that reads rows by head and token. Raises `IntegrationError`."""
    (kernel, *others) = {*kernels}
    size = spec.block_size
    first = tensors[0]
    heads = spec.num_kv_heads
    wide = spec.head_size
    both = (blocks, heads, size, 2 * wide)
    latent = ((blocks, size, wide), (blocks, 1, size, wide))
    known = not others and first.dtype in PLAIN
    if known and all(tensor.shape == both for tensor in tensors):
        if kernel in FUSED:
            dims = (wide, wide)
            view = KVView(tensors, "layer | block head token (kv dim)", kv=2, dim=dims)
            return GroupView(view, "")
        if kernel in BY_DIM:
            pairs = [_keys_and_values(tensor) for tensor in tensors]
            return GroupView(KVView(pairs, "layer kv | block head token dim"), "")
    if known and kernel in LATENT and all(tensor.shape in latent for tensor in tensors):
        planes = [tensor.reshape(blocks, size, wide) for tensor in tensors]
        return GroupView(KVView(planes, "layer | block token dim"), "")
    by_amx = kernel.split()[-1:] == [AMX]
    raise IntegrationError(
        f"Expected an attention backend whose pages PortaKV can read by token, got "
        f"{' and '.join(sorted({*kernels})) or 'none'} with {first.dtype} {[*first.shape]}. "
        f"{reason}{OTHER_DTYPE if by_amx else ''}"
    )


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
