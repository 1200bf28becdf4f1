# SPDX-License-Identifier: Apache-2.0
"""`mlu`: Cambricon MLU, by ops of ``torch_mlu_ops`` for paged caches, and by torch indexing.

The first op that takes the plan, and the call, executes it:

    op                         side with ids                    other side
    multi_layer_kv_transfer    HND, a tensor for each layer     one whole chunk [kv, L, T, h*d]
                               in a shape of KVFormat
    reshape_paged_cache        HND, each plane in one piece     planes [T, h*d]
    index_select, index_copy_  any                              any

`reshape_paged_cache` gathers only in releases that have ``direction``. Both ops take heads of whole
32 bytes here: they are known with head sizes of 16 elements and more, and a third party's script
shows a release that left half of a cache unwritten if a head had 8 bytes. They skip negative
slots, and the host does not wait. Before indexing, bad ids are removed, and the host waits.

Written against documentation; nothing here has run on an MLU. `torch_mlu_ops` has no public source.
Sources of its signatures:

- `reshape_paged_cache`, the first five parameters: what Cambricon/vllm-mlu@8fa99fd passes
  (vllm_mlu/_mlu_ops.py), so the vendor's own use.
- its ``direction``, `multi_layer_kv_transfer`, ``KVFormat`` and ``TransferDirection``: a third
  party's copy of an installed wheel (miznchimaki/domesticated_torch_mlu_ops@9fbf7df, _ops.py),
  which the vendor has not confirmed.

So a signature is read before its op is used, and numbers are taken from the package's enumerations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch

from portakv.backends._vendor_rows import (
    HND,
    HND_IN_BLOCKS,
    TOKENS,
    GuardedRows,
    apart,
    by_ids_first,
    guarded_slots,
    packed,
    planes,
    steps,
)
from portakv.backends.base import Backend, Capabilities, Decision, Launch, MoveLaunch
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import VENDOR_PACKAGES, Unusable, imported, version_of
from portakv.view.form import Form
from portakv.view.view import KVView

# The dtypes that both ops move; any other dtype goes as int8.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_HEAD = 32  # bytes
# Bytes of an element for indexing: torch_mlu does not promise 64-bit integers.
_ELEMENT = 4
_INT32 = 2**31 - 1
#: The parameters of `reshape_paged_cache` in older releases, and in releases that also gather.
SCATTER = ("k", "v", "k_cache", "v_cache", "slot_mapping")
WITH_DIRECTION = (*SCATTER, "direction")
#: The parameters of `multi_layer_kv_transfer`.
TRANSFER = (
    "key_value",
    "kv_cache_ptrs",
    "slot_mapping",
    "paged_memory_device",
    "page_buffer_size",
    "direction",
    "kv_format",
    "block_size",
    "head_size",
    "skip_prefix_n_tokens",
)


class Mlu(Backend):
    """Cambricon MLU through torch_mlu and torch_mlu_ops."""

    name = "mlu"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ops = load_ops()
        self.emulated = self._ops.emulated

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "mlu":
            return Decision(cls.name, False, f"it runs on mlu devices, not on {device.type}")
        try:
            return Decision(cls.name, True, load_ops().summary)
        except Unusable as error:
            return Decision(cls.name, False, str(error))

    def capabilities(self) -> Capabilities:
        places = frozenset({("device", "device")})
        return Capabilities(places, skips_negative=True, guards=True)

    def check(self, plan: CopyPlan) -> Decision:
        decision = super().check(plan)
        fitting = _ops_for(plan, self._ops)
        by = fitting[0].op if fitting else "index_select and index_copy_, after a wait"
        by = f"takes the plan by {by}"
        return replace(decision, reason=by) if decision.accepted else decision

    def prepare(self, plan: CopyPlan) -> Launch:
        return _MluLaunch(self.device, plan, _ops_for(plan, self._ops))


class _Call(NamedTuple):
    """One launch as the ops receive it."""

    cache: KVView
    dense: KVView
    first: int
    tokens: int
    dtype: torch.dtype


class _Layers:
    """`multi_layer_kv_transfer`: one call for all layers of a whole chunk."""

    op = "multi_layer_kv_transfer"

    def __init__(self, cache: Form, dense: Form, gather: bool, ops: Ops) -> None:
        self._op = ops.transfer
        self._cache = cache
        self._dense = dense
        self._direction = ops.directions.get("D2H" if gather else "H2D")
        self._row = cache.heads * cache.widths[0]  # bytes of a token in one plane
        page = cache.block_size * self._row
        # Bytes from key to value, if both lie in each block.
        self._inside = page if packed(cache, HND_IN_BLOCKS) and apart(cache) == page else 0
        name = "NB_TWO_HN_BS_HS" if self._inside else "TWO_NB_HN_BS_HS"
        self._format = ops.formats.get("NB_HN_BS_HS" if cache.kv == 1 else name)

    @property
    def fits(self) -> bool:
        known = None not in (self._op, self._format, self._direction)
        hnd = self._inside or packed(self._cache, HND)
        if not (known and hnd) or len(set(self._cache.widths)) > 1:
            return False
        pair = None not in (apart(self._cache), apart(self._dense))
        return self._cache.kv == 1 or (self._cache.kv == 2 and pair)

    def takes(self, call: _Call) -> bool:
        """Return True if the op can execute this call.

        The chunk must be one dense block of just these tokens. Keys and values must be as far apart
        as the format has them; forms do not know counts.
        """
        tokens = call.dense.slots
        layers = self._cache.layers
        inner = [(layers, 0, tokens * self._row)] if layers > 1 else []
        apiece = self._inside or call.cache.slots * self._row
        return (
            (call.first, call.tokens) == (0, tokens)
            and steps(self._dense.parts[0], "layer") == inner
            and apart(self._dense) in (None, layers * tokens * self._row)
            and apart(self._cache) in (None, apiece)
        )

    def __call__(self, call: _Call, slots: torch.Tensor) -> None:
        plane = planes(call.dense, call.dtype)[0][0]
        tokens, heads, width = plane.shape
        size = [call.dense.kv, call.dense.layers, tokens, heads * width][call.dense.kv == 1 :]
        assert self._op is not None  # `fits` has checked it
        self._op(
            key_value=plane.as_strided(size, [prod(size[at:]) for at in range(1, len(size) + 1)]),
            kv_cache_ptrs=_pointers(call),
            slot_mapping=slots,
            paged_memory_device=call.cache.device,
            page_buffer_size=call.cache.slots,
            direction=self._direction,
            kv_format=self._format,
            block_size=self._cache.block_size,
            head_size=width,
            skip_prefix_n_tokens=0,
        )


def _pointers(call: _Call) -> torch.Tensor:
    """Return the address of each layer's cache, on the device; cached for each stream.

    No other stream is ordered after the copy that brings the addresses there.
    """
    key = (_pointers, torch.accelerator.current_stream(call.cache.device).stream_id)
    if key not in call.cache.derived:
        addresses = [layer[0].data_ptr() for layer in planes(call.cache, call.dtype)]
        with torch.inference_mode(False):
            call.cache.derived[key] = torch.tensor(addresses).to(call.cache.device)
    return call.cache.derived[key]  # type: ignore[no-any-return]


class _Planes:
    """`reshape_paged_cache`: a call for each layer, or for each plane if widths differ."""

    op = "reshape_paged_cache"

    def __init__(self, cache: Form, dense: Form, gather: bool, ops: Ops) -> None:
        self._op = ops.reshape
        self._more = {"direction": gather} if ops.gathers else {}
        self.fits = packed(cache, HND) and (ops.gathers or not gather)

    def takes(self, call: _Call) -> bool:
        return True

    def __call__(self, call: _Call, slots: torch.Tensor) -> None:
        last = call.first + call.tokens
        layers = zip(planes(call.dense, call.dtype), planes(call.cache, call.dtype), strict=True)
        for tokens, caches in layers:
            rows = [plane[call.first : last] for plane in tokens]
            pages = [plane.transpose(1, 2) for plane in caches]
            if len(rows) == 2 and rows[0].shape == rows[1].shape:
                self._op(*rows, *pages, slots, **self._more)
                continue
            for row, page in zip(rows, pages, strict=True):
                self._op(row, None, page, None, slots, **self._more)


def _ops_for(plan: CopyPlan, ops: Ops) -> list[_Layers | _Planes]:
    """Return the vendor's ops that a plan fits, in the order of this module's table."""
    gather = plan.src_step > 0
    cache, dense = (plan.src, plan.dst) if gather else (plan.dst, plan.src)
    whole = all(width % _HEAD == 0 for width in cache.widths)
    if gather == (plan.dst_step > 0) or not (whole and packed(dense, TOKENS)):
        return []
    known = (_Layers(cache, dense, gather, ops), _Planes(cache, dense, gather, ops))
    return [op for op in known if op.fits]


class _MluLaunch(MoveLaunch):
    tables = False, False

    # The ops are not known to make their tensors' device current by themselves.
    def __init__(self, device: torch.device, plan: CopyPlan, ops: list[_Layers | _Planes]) -> None:
        self.device = device
        self._plan = plan
        self._ops = ops
        self._rest = GuardedRows(plan, device, _ELEMENT)

    @torch.no_grad()
    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        cache, index, dense, rows = by_ids_first(move)
        dtype = cache.owners[0].dtype
        if dtype not in _DTYPES or dtype.itemsize > self._plan.vector:
            dtype = torch.int8
        call = _Call(cache, dense, rows.offset, move.count, dtype)
        op = next((op for op in self._ops if op.takes(call)), None)
        if op is None or cache.slots > _INT32:
            self._rest(move, status)
        else:
            op(call, guarded_slots(cache, index, move.count, dense.device, status))


@dataclass(frozen=True)
class Ops:
    """The ops of the installed package."""

    reshape: Callable[..., object]  # `reshape_paged_cache`
    gathers: bool  # it has a direction
    transfer: Callable[..., object] | None  # `multi_layer_kv_transfer`, if its parameters are known
    formats: dict[str, object]  # members of ``KVFormat`` by name
    directions: dict[str, object]  # members of ``TransferDirection``
    emulated: bool  # the package declares itself a stand-in
    summary: str  # all this as a sentence


def load_ops() -> Ops:
    """Import the installed package and return its ops.

    Raises:
        Unusable: there is no package, it does not load, or `reshape_paged_cache` has other
            parameters.
    """
    package = imported("torch_mlu_ops", VENDOR_PACKAGES["mlu"][1])
    name = f"torch_mlu_ops {version_of(package)}"
    reshape: Any = getattr(package, "reshape_paged_cache", None)
    signature = parameters(reshape)
    if signature not in (SCATTER, WITH_DIRECTION):
        has = written("reshape_paged_cache", signature) if callable(reshape) else "no such op"
        raise Unusable(
            f"reshape_paged_cache is wanted of {name}, which has {has}; expected "
            f"{written('reshape_paged_cache', WITH_DIRECTION)}, or the same without direction: "
            f"install a release that has it"
        )
    gathers = signature == WITH_DIRECTION
    directions_text = (
        "to and from the cache" if gathers else "to the cache only, since it has no direction"
    )
    transfer = getattr(package, "multi_layer_kv_transfer", None)
    more = "multi_layer_kv_transfer"
    if not callable(transfer):
        more = "no multi_layer_kv_transfer"
    elif parameters(transfer) != TRANSFER:
        another = written("multi_layer_kv_transfer", parameters(transfer))
        transfer = None
        more = f"a {another} that is not the known one and is not used"
    emulated = bool(getattr(package, "EMULATED", False))
    label = " (emulated)" if emulated else ""
    enumerations = [getattr(package, x, None) for x in ("KVFormat", "TransferDirection")]
    formats, directions = (dict(getattr(x, "__members__", {})) for x in enumerations)
    summary = f"{name}{label} has reshape_paged_cache ({directions_text}) and {more}"
    return Ops(reshape, gathers, transfer, formats, directions, emulated, summary)


def parameters(function: Any) -> tuple[str, ...]:
    """Return the names of a function's parameters; empty if it has no signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def written(name: str, names: Sequence[str]) -> str:
    """Format a signature for a reader: ``name(a, b)``."""
    return f"{name}({', '.join(names) or '...'})"
