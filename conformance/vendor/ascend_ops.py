# SPDX-License-Identifier: Apache-2.0
"""The ops of torch_npu that ``portakv.backends.ascend`` calls, in torch, and what they forbid.

The constraints are those of the docstrings in torch_npu 2.13.0 and of CANN's pages on
aclnnScatterPaKvCache, aclnnGatherPaKvCache, aclnnScatterNdUpdate, aclnnIndexSelect and
aclnnInplaceIndexCopy, for Atlas A2 and A3. If the hardware would fault, or write more than
requested, these raise `Refused`. They run on tensors of any device; numbers that only the device
knows are checked if they can be read without waiting: on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMAS = Path(__file__).with_name("ascend_schemas.toml")

_PAGED = (torch.float16, torch.bfloat16, torch.int8)
_SCATTER_ND = (torch.float32, *_PAGED, torch.int64, torch.bool)
_INDEX = (*_SCATTER_ND, torch.int32, torch.int16, torch.uint8, torch.float64)
_IDS = (torch.int32, torch.int64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TOKEN_BYTES = 148 * 1024


class Refused(RuntimeError):
    """A call that the vendor's documents forbid."""


def check_current(name: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raise `Refused` if an op is called with tensors of another device than the current one,
    on which torch_npu would launch it."""
    current = torch.accelerator.current_device_index()
    for where in (tensor.device for tensor in tensors):
        if where.type == "npu" and where.index != current:
            reported = f"a tensor on {where}; the current device is npu:{current}"
            raise Refused(f"{name} was called with {reported}.")


def pinned_schemas(whose: str) -> dict[str, str]:
    """Return the pinned schemas of the ``vendor``'s ops, or of ``torch``'s own, by qualified
    name."""
    return dict(tomllib.loads(SCHEMAS.read_text(encoding="utf-8"))[whose])


def scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    compress_lens: torch.Tensor | None = None,
    compress_seq_offsets: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write row ``i`` of key and value to slot ``slot_mapping[i]`` of the caches."""
    need = _needs("npu_scatter_pa_kv_cache")
    need(cache_mode in (None, "Norm"), f"cache_mode {cache_mode!r} is for NZ; these are ND")
    need(compress_lens is compress_seq_offsets is seq_lens is None, "compression is not emulated")
    tensors = (key, value, key_cache, value_cache)
    _check_dense(need, (*tensors, slot_mapping))
    _check_pages(need, key, value, key_cache, value_cache)
    need(slot_mapping.dtype in _IDS, f"slot_mapping is {slot_mapping.dtype}, not int32 or int64")
    need(slot_mapping.shape == key.shape[:1], "slot_mapping has not one slot for each token")
    _check_range(need, slot_mapping, key_cache.shape[0] * key_cache.shape[1], "slot_mapping")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        bits = _BITS[rows.element_size()]
        cache.flatten(0, 1).view(bits).index_copy_(0, slot_mapping.long(), rows.view(bits))


def gather_pa_kv_cache(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    seq_offset: torch.Tensor | None = None,
    is_seq_lens_cumsum: bool = False,
) -> None:
    """Read the tokens of one sequence, block by block, into key and value."""
    need = _needs("npu_gather_pa_kv_cache")
    need(seq_offset is None and not is_seq_lens_cumsum, "offsets and sums are not emulated")
    _check_dense(need, (key, value, key_cache, value_cache, block_tables, seq_lens))
    _check_pages(need, key, value, key_cache, value_cache)
    for ids, name in ((block_tables, "block_tables"), (seq_lens, "seq_lens")):
        need(ids.dtype == torch.int32, f"{name} is {ids.dtype}; A2 and A3 read int32")
    need(block_tables.dim() == 2 and block_tables.shape[0] == 1, "one sequence is emulated")
    need(seq_lens.shape == (1,), "seq_lens has not one length for each sequence")
    blocks, size = key_cache.shape[:2]
    tokens = key.shape[0]
    need(tokens <= block_tables.shape[1] * size, "the block table is shorter than the sequence")
    _check_range(need, block_tables, blocks, "block_tables")
    if seq_lens.is_cpu:
        need(int(seq_lens) == tokens, f"seq_lens says {int(seq_lens)}, key has {tokens} tokens")
    numbers = block_tables[0].long()[:, None] * size + torch.arange(size, device=key.device)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        bits = _BITS[rows.element_size()]
        slots = numbers.view(-1)[:tokens]
        torch.index_select(cache.flatten(0, 1).view(bits), 0, slots, out=rows.view(bits))


def scatter_nd_update_(
    input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    """Write row ``i`` of updates to row ``indices[i, 0]`` of input."""
    need = _needs("npu_scatter_nd_update_")
    need(input.dtype in _SCATTER_ND, f"{input.dtype} is not among its dtypes")
    need(updates.dtype == input.dtype, f"updates are {updates.dtype}, input is {input.dtype}")
    need(indices.dtype in _IDS, f"indices are {indices.dtype}, not int32 or int64")
    need(indices.dim() == 2 and indices.shape[1] == 1, "indices [rows, 1] are emulated")
    need(updates.shape == (indices.shape[0], *input.shape[1:]), "updates have another shape")
    _check_range(need, indices, input.shape[0], "indices")
    return input.index_copy_(0, indices[:, 0].long(), updates)


def index_select(rows: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Do `torch.index_select`, within the dtypes of aclnnIndexSelect."""
    _check_index_select(rows, dim, index)
    return torch.index_select(rows, dim, index)


def index_select_out(
    rows: torch.Tensor, dim: int, index: torch.Tensor, *, out: torch.Tensor
) -> torch.Tensor:
    """Run `index_select` into ``out``, which CANN does not resize."""
    need = _check_index_select(rows, dim, index)
    need(out.shape == (*rows.shape[:dim], *index.shape, *rows.shape[dim + 1 :]), "out is resized")
    need(out.dtype == rows.dtype, f"out is {out.dtype}, self is {rows.dtype}")
    return torch.index_select(rows, dim, index, out=out)


def index_copy_(
    rows: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    """Do `torch.Tensor.index_copy_`, within the dtypes of aclnnInplaceIndexCopy."""
    need = _needs("index_copy_")
    need(rows.dtype in _INDEX, f"{rows.dtype} is not among its dtypes")
    need(source.dtype == rows.dtype, f"source is {source.dtype}, self is {rows.dtype}")
    _check_range(need, index, rows.shape[dim], "index")
    return rows.index_copy_(dim, index, source)


def _check_index_select(rows: torch.Tensor, dim: int, index: torch.Tensor) -> _Need:
    need = _needs("index_select")
    need(rows.dtype in _INDEX, f"{rows.dtype} is not among its dtypes")
    need(index.dtype in _IDS, f"the index is {index.dtype}, not int32 or int64")
    _check_range(need, index, rows.shape[dim], "index")
    return need


_Need = Callable[[object, str], None]


def _needs(name: str) -> _Need:
    def need(holds: object, why: str) -> None:
        if not holds:
            raise Refused(f"{name} was called against its documents: {why}.")

    return need


def _check_dense(need: _Need, tensors: tuple[torch.Tensor, ...]) -> None:
    for tensor in tensors:
        need(tensor.is_contiguous(), f"a tensor with strides {tensor.stride()} is not contiguous")
        need(tensor.numel(), "a tensor is empty")


def _check_pages(need: _Need, *tensors: torch.Tensor) -> None:
    key, value, key_cache, value_cache = tensors
    dtypes = {tensor.dtype for tensor in tensors}
    need(len(dtypes) == 1 and dtypes <= set(_PAGED), f"dtypes {sorted(map(str, dtypes))}")
    need(key.dim() == value.dim() == 3, "key and value are not [tokens, heads, dim]")
    need(key.shape[:2] == value.shape[:2], "key and value differ in tokens or heads")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        need(cache.dim() == 4, "a cache is not [blocks, block_size, heads, dim]")
        need(cache.shape[2:] == rows.shape[1:], "a cache has other heads or dims than its rows")
        need(rows[0].numel() * rows.element_size() <= _TOKEN_BYTES, "a token is over 148 KiB")
    need(key_cache.shape[:2] == value_cache.shape[:2], "the caches differ in blocks")


def _check_range(need: _Need, ids: torch.Tensor, end: int, name: str) -> None:
    if ids.is_cpu and ids.numel():
        low = int(ids.min())
        high = int(ids.max())
        need(low >= 0 and high < end, f"{name} holds {low if low < 0 else high}, of 0 to {end - 1}")
