# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``torch_mlu_ops`` on the simulated device: its signatures, by torch indexing.

It proves call shapes and bytes by assumption: signatures and semantics are those of the sources
that `portakv.backends.mlu` names, which the vendor has not confirmed. What is documented is
enforced; so is what is likely for a kernel that takes addresses (contiguous tensors, the current
device). The results are exact and asynchronous; they prove nothing about speed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from importlib.util import find_spec
from types import ModuleType

import torch

EMULATED = True
#: What has to be true for a result on this stand-in to be one on the device; reports say it.
ASSUMPTION = "by assumption: the vendor has not confirmed the ops' signatures"
#: The source of each function's signature; a record of R1 lists them (`contents`).
SOURCES = {
    "torch_mlu_ops.reshape_paged_cache": (
        "Cambricon/vllm-mlu@8fa99fd, vllm_mlu/_mlu_ops.py: what the vendor's own code passes, all "
        "but direction; that is of miznchimaki/domesticated_torch_mlu_ops@9fbf7df, _ops.py, a "
        "third party's copy of a wheel"
    ),
    "torch_mlu_ops.multi_layer_kv_transfer": (
        "miznchimaki/domesticated_torch_mlu_ops@9fbf7df, _ops.py, a third party's copy of a wheel"
    ),
}
#: How often each op was called in this process.
CALLS: Counter[str] = Counter()
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class KVFormat(IntEnum):
    """The memory that one pointer of `multi_layer_kv_transfer` points to."""

    TWO_NB_HN_BS_HS = 0
    NB_TWO_HN_BS_HS = 1
    NB_HN_BS_HS = 2


class TransferDirection(IntEnum):
    """H2D: from the chunk to the cache; D2H: from the cache to the chunk."""

    H2D = 0
    D2H = 1


def install(*, direction: bool = True, transfer: bool = True) -> None:
    """Let ``import torch_mlu_ops`` and ``import torch_mlu`` find the stand-ins, unless they are
    there already. Older releases have no ``direction`` in `reshape_paged_cache`, or no
    `multi_layer_kv_transfer`."""
    scatter = reshape_paged_cache if direction else _reshape_to_cache
    ops: dict[str, Callable[..., object]] = {"reshape_paged_cache": scatter}
    if transfer:
        ops |= {
            each.__name__: each for each in (multi_layer_kv_transfer, KVFormat, TransferDirection)
        }
    for name, members in (("torch_mlu", {}), ("torch_mlu_ops", ops)):
        if name not in sys.modules and find_spec(name) is None:
            module = ModuleType(name, "A stand-in; see portakv_conformance.vendor.mlu_standin.")
            module.__dict__.update(members, EMULATED=True, __version__="stand-in")
            sys.modules[name] = module


def reshape_paged_cache(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    direction: bool = False,
) -> object:
    """Scatter ``k``, ``v`` [tokens, heads, size] into caches [blocks, heads, block_size, size], or
    with ``direction`` gather; a negative slot moves nothing. `RuntimeError` for a dtype, shape,
    stride or device that the op does not take."""
    CALLS["reshape_paged_cache"] += 1
    _check((v is None) == (v_cache is None), "v and v_cache are given together or not at all")
    _check_slots(slot_mapping, k)
    pairs = [(k, k_cache), (v, v_cache)] if v is not None else [(k, k_cache)]
    for rows, cache in pairs:
        assert rows is not None
        assert cache is not None
        _check_tensor("rows", rows, 3)
        _check_tensor("cache", cache, 4)
        _, heads, size, width = cache.shape
        wanted = (slot_mapping.numel(), heads, width)
        _check(rows.shape == wanted, f"rows are {tuple(rows.shape)}, expected {wanted}")
        _check(rows.dtype == cache.dtype == k.dtype, "rows and caches have one dtype")
        _check(rows.shape == k.shape, f"v is {tuple(rows.shape)}, expected the shape of k")
        _move(rows, cache.transpose(1, 2), slot_mapping, size, direction)
    result = (k, v) if direction else (k_cache, v_cache)
    return result if v is not None else result[0]


def _reshape_to_cache(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> object:
    return reshape_paged_cache(k, v, k_cache, v_cache, slot_mapping)


def multi_layer_kv_transfer(
    key_value: torch.Tensor,
    kv_cache_ptrs: torch.Tensor,
    slot_mapping: torch.Tensor,
    paged_memory_device: torch.device,
    page_buffer_size: int,
    direction: TransferDirection,
    kv_format: KVFormat,
    block_size: int,
    head_size: int,
    skip_prefix_n_tokens: int,
) -> None:
    """Move all layers between ``key_value`` [2, L, T, heads * head_size] ([L, T, ...] for
    NB_HN_BS_HS), on the host or the device, and the caches of the L pointers. `RuntimeError`
    for a dtype, shape, stride, device or number that the op does not take."""
    CALLS["multi_layer_kv_transfer"] += 1
    planes = _checked_planes(key_value, kv_cache_ptrs, slot_mapping, KVFormat(kv_format))
    hidden = planes.shape[-1]
    _check(paged_memory_device == slot_mapping.device, "the caches are on another device")
    _check(page_buffer_size % block_size == 0, "page_buffer_size is whole blocks")
    _check(hidden % head_size == 0, f"{hidden} is no whole number of heads of {head_size}")
    pages = (page_buffer_size // block_size, hidden // head_size, block_size, head_size)
    gather = TransferDirection(direction) is TransferDirection.D2H
    skip = skip_prefix_n_tokens
    slots = slot_mapping[skip:]
    there = planes.to(slot_mapping.device)
    # Reading the pointers waits for what wrote them, and for nothing else.
    for layer, address in enumerate(kv_cache_ptrs.cpu().tolist()):
        caches = _caches(address, pages, KVFormat(kv_format), key_value.dtype, slots.device)
        for kv, cache in enumerate(caches):
            rows = there[kv, layer, skip:].view(-1, *pages[1::2])
            _move(rows, cache.transpose(1, 2), slots, block_size, gather)
    if gather and there is not planes:
        planes.copy_(there, non_blocking=True)


def _checked_planes(
    key_value: torch.Tensor, pointers: torch.Tensor, slots: torch.Tensor, kv_format: KVFormat
) -> torch.Tensor:
    """``key_value`` as [kv, L, T, hidden], once it, the pointers and the slots fit each other."""
    single = kv_format is KVFormat.NB_HN_BS_HS
    _check_tensor("key_value", key_value, 3 if single else 4, host=True)
    planes = key_value.unsqueeze(0) if single else key_value
    _check(planes.shape[0] == (1 if single else 2), f"key_value is {tuple(key_value.shape)}")
    _check_slots(slots, planes[0, 0])
    wanted = (planes.shape[1],)
    fits = pointers.dtype == torch.int64 and pointers.shape == wanted
    result = f"kv_cache_ptrs are {pointers.dtype} {tuple(pointers.shape)}"
    _check(fits, f"{result}, expected int64 {wanted}")
    _check_device("kv_cache_ptrs", pointers)
    return planes


def _caches(
    address: int,
    pages: tuple[int, int, int, int],
    kv_format: KVFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """The planes [blocks, heads, block_size, head_size] of the cache at an address."""
    blocks, *page = pages
    shape = {
        KVFormat.TWO_NB_HN_BS_HS: (2, blocks, *page),
        KVFormat.NB_TWO_HN_BS_HS: (blocks, 2, *page),
        KVFormat.NB_HN_BS_HS: (1, blocks, *page),
    }[kv_format]
    count = torch.Size(shape).numel()
    storage = torch._C._construct_storage_from_data_pointer(address, device, count * dtype.itemsize)
    flat = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (count,), (1,))
    return [*flat.view(shape).unbind(int(kv_format is KVFormat.NB_TWO_HN_BS_HS))]


def _move(
    rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, size: int, gather: bool
) -> None:
    """Between rows [T, heads, width] and pages [blocks, size, heads, width]; nothing here waits.

    A position to be skipped does again what the first one does that is not.
    """
    if not slots.numel():
        return
    moved = slots >= 0
    here = torch.arange(slots.numel(), device=slots.device)
    at = torch.where(moved, here, moved.to(torch.int32).argmax())
    slot = slots[at].clamp(0).long()
    cells = (slot // size, slot % size)
    if gather:
        rows.copy_(torch.where(moved[:, None, None], pages[cells], rows))
    else:
        pages[cells] = torch.where(moved.any(), rows[at], pages[cells])


def _check_slots(slots: torch.Tensor, rows: torch.Tensor) -> None:
    _check_device("slot_mapping", slots)
    result = f"slot_mapping is {slots.dtype} {tuple(slots.shape)}"
    wanted = slots.dtype == torch.int32 and slots.shape == rows.shape[:1]
    _check(wanted and slots.is_contiguous(), f"{result}, expected int32 ({rows.shape[0]},)")


def _check_tensor(name: str, tensor: torch.Tensor, dims: int, *, host: bool = False) -> None:
    if not (host and tensor.is_cpu):
        _check_device(name, tensor)
    _check(tensor.dim() == dims, f"{name} has {tensor.dim()} dimensions, expected {dims}")
    _check(tensor.dtype in _DTYPES, f"{name} is {tensor.dtype}, expected one of {_DTYPES}")
    _check(tensor.is_contiguous(), f"{name} is not contiguous")


def _check_device(name: str, tensor: torch.Tensor) -> None:
    current = torch.accelerator.current_device_index()
    here = tensor.device.type == "mlu" and tensor.device.index == current
    _check(here, f"{name} is on {tensor.device}, the current device is mlu:{current}")


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise RuntimeError(f"torch_mlu_ops (stand-in): {sentence}.")
