# SPDX-License-Identifier: Apache-2.0
"""Connectors of vLLM that put a fault into the rows of a load when it ends, in the process of a
real engine.

`put` chooses the fault for the next loads. A connector derives from the one that it damages, and
the witness wraps it by its module path, as it wraps any other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)
from vllm.v1.simple_kv_offload import copy_backend, cuda_mem_ops, worker

from portakv.integrations.vllm.caches import BY_TOKEN, GONE, kernels_of, views_of
from portakv.integrations.vllm.connector import PortaKVConnector
from support.vllm_cpu import OnACpu

MODULE = __name__
#: A plane of rows: blocks first. Of attention also head, token and dim.
Plane = torch.Tensor


@dataclass
class Loaded:
    """A load that has ended, as a fault sees it.

    Attributes:
        blocks: of each group the engine's blocks that were loaded.
        planes: of each group, by layer its planes: keys and values, or states.
        before: the rows of each plane before the load, by group, layer and plane.
        keys: of the blocks, if there is one group.
    """

    blocks: list[list[int]]
    planes: list[list[list[Plane]]]
    before: list[list[list[torch.Tensor]]]
    keys: list[bytes]

    def whole(self) -> int:
        """Return the group of attention with the most blocks."""
        sizes = [len(ids) for ids in self.blocks]
        return max(range(len(sizes)), key=lambda at: (sizes[at], at))

    def all(self) -> Iterator[tuple[Plane, torch.Tensor, list[int]]]:
        """Return each plane of `whole`, its rows before the load, and the blocks."""
        at = self.whole()
        for planes, before in zip(self.planes[at], self.before[at], strict=True):
            for plane, old in zip(planes, before, strict=True):
                yield plane, old, self.blocks[at]


def _flip(load: Loaded) -> None:
    plane, _, ids = next(load.all())
    row = plane[ids[1]].contiguous()
    row.view(torch.uint8).flatten()[3] ^= 0x40  # the exponent of a number
    plane[ids[1]] = row


def _swap(load: Loaded) -> None:
    for plane, _, ids in load.all():
        plane[[ids[1], ids[2]]] = plane[[ids[2], ids[1]]].clone()


def _shift(load: Loaded) -> None:
    for plane, _, ids in load.all():
        plane[ids[1:]] = plane[ids[:-1]].clone()


def _shift_tokens(load: Loaded) -> None:
    for plane, _, ids in load.all():
        plane[ids[1]] = plane[ids[1]].roll(plane.shape[2] // 2, dims=1)


def _stale(load: Loaded) -> None:
    for plane, old, ids in load.all():
        plane[ids[1]] = old[1]


def _half(load: Loaded) -> None:
    for plane, old, ids in load.all():
        half = plane.shape[2] // 2
        plane[ids[1], :, half:] = old[1][:, half:]


_late = list[tuple[Plane, list[int], torch.Tensor]]()  # rows of copies that have not ended
#: Planes that were written after their load was reported.
ended_late = list[Plane]()


def _early(load: Loaded) -> None:
    """Report a copy in its middle: half of the blocks are there, and half of the next block.
    The rest is written when the next step has computed."""
    for plane, old, ids in load.all():
        half = len(ids) // 2
        tokens = plane.shape[2] // 2
        rest = plane[ids[half:]].clone()
        plane[ids[half + 1 :]] = old[half + 1 :]
        plane[ids[half], :, tokens:] = old[half][:, tokens:]
        _late.append((plane, ids[half:], rest))


def _end_copies() -> None:
    """Write the rows of copies that had not ended."""
    for plane, ids, rows in _late:
        plane[ids] = rows
        ended_late.append(plane)
    _late.clear()


def _missing_layer(load: Loaded) -> None:
    at = load.whole()
    for plane, old in zip(load.planes[at][-1], load.before[at][-1], strict=True):
        plane[load.blocks[at]] = old


def _heads(load: Loaded) -> None:
    for plane, _, ids in load.all():
        plane[ids[1]] = plane[ids[1]][[1, 0, *range(2, plane.shape[1])]].clone()


def _few_tokens(load: Loaded) -> None:
    """Leave two tokens unwritten, as the end of a run of rows that was cut."""
    for plane, old, ids in load.all():
        plane[ids[1], :, -2:] = old[1][:, -2:]


def _planes(load: Loaded, heads: int = 2) -> None:
    at = load.whole()
    block = load.blocks[at][1]
    for keys, values in load.planes[at]:
        both = keys[block, :heads].clone(), values[block, :heads].clone()
        keys[block, :heads] = both[1]
        values[block, :heads] = both[0]


def _layers(load: Loaded) -> None:
    at = load.whole()
    block = load.blocks[at][1]
    for first, second in zip(load.planes[at][0], load.planes[at][1], strict=True):
        both = first[block].clone(), second[block].clone()
        first[block] = both[1]
        second[block] = both[0]


def _zeros(load: Loaded) -> None:
    for plane, _, ids in load.all():
        plane[ids[1]] = 0


def _other(load: Loaded) -> None:
    """Leave rows of a block that was not loaded, as if the list had a wrong number."""
    for plane, _, ids in load.all():
        plane[ids[1]] = plane[ids[-1]].clone()


#: By key the rows that engines with other numbers of ranks have computed: of each rank, by layer,
#: its planes.
_by_ranks = dict[bytes, list[list[list[torch.Tensor]]]]()


def _other_ranks(load: Loaded) -> None:
    """Leave the pages of some ranks, one after the other, as if they were those of this engine.
    They have whole heads."""
    at = load.whole()
    pages = [torch.stack(planes, 1) for rank in _by_ranks[load.keys[1]] for planes in rank]
    layers = torch.cat(pages).unflatten(0, (len(load.planes[at]), -1))
    for planes, rows in zip(load.planes[at], layers, strict=True):
        for plane, some in zip(planes, rows.unbind(1), strict=True):
            plane[load.blocks[at][1]] = some


def learn_ranks(folder: Path) -> None:
    """Read the rows that each rank has left by `save_rows`."""
    _by_ranks.clear()
    for file in sorted(folder.iterdir()):
        for key, rows in torch.load(file).items():
            _by_ranks.setdefault(key, []).append(rows)


def save_rows(file: Path, keys: dict[int, bytes]) -> None:
    """Write the rows of some of this worker's blocks into a file, by their keys."""
    rows = {
        key: [[plane[block].clone() for plane in planes] for planes in _planes_of[0]]
        for block, key in keys.items()
    }
    torch.save(rows, file)


def _missing_group(load: Loaded) -> None:
    for planes, before in zip(load.planes[0], load.before[0], strict=True):
        for plane, old in zip(planes, before, strict=True):
            plane[load.blocks[0]] = old


_states = list[list[list[torch.Tensor]]]()  # of the first load


def _other_state(load: Loaded) -> None:
    """Leave the state of another load, which has ended at another position."""
    block = load.blocks[0][-1]
    rows = [[plane[block].clone() for plane in planes] for planes in load.planes[0]]
    if _states:
        for planes, others in zip(load.planes[0], _states[0], strict=True):
            for plane, other in zip(planes, others, strict=True):
                plane[block] = other
    _states.append(rows)


FAULTS: dict[str, Callable[[Loaded], None]] = {
    "a flipped byte": _flip,
    "swapped blocks": _swap,
    "a shifted list": _shift,
    "shifted tokens": _shift_tokens,
    "stale rows": _stale,
    "a half copy": _half,
    "a copy without its last tokens": _few_tokens,
    "a copy that has not ended": _early,
    "a missing layer": _missing_layer,
    "exchanged heads": _heads,
    "exchanged planes": _planes,
    "exchanged planes of a head": partial(_planes, heads=1),
    "exchanged layers": _layers,
    "zeros": _zeros,
    "another block": _other,
}
#: Of an engine with other numbers of ranks beside it.
FAULTS_OF_RANKS: dict[str, Callable[[Loaded], None]] = {"heads of other ranks": _other_ranks}
#: Of models with states in their first group.
FAULTS_OF_STATES: dict[str, Callable[[Loaded], None]] = {
    "a missing group": _missing_group,
    "another state": _other_state,
}
_fault: list[Callable[[Loaded], None] | None] = [None]
damaged = list[str]()  # requests


def put(fault: Callable[[Loaded], None] | None) -> None:
    """Put a fault into loads that end from now on; None: into no load."""
    _fault[0] = fault
    damaged.clear()


@dataclass
class _Begun:
    """A load that has begun, its rows before, and its keys."""

    blocks: list[list[int]]
    before: list[list[list[torch.Tensor]]]
    keys: list[bytes]


_begun = dict[str, _Begun]()  # by request
_computed = dict[str, int]()
_planes_of = list[list[list[Plane]]]()  # by group and layer


class _Damages:
    """What a damaged connector adds to its hooks. Both sides are in one process."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        self.engine = vllm_config
        self.caches = kv_cache_config

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)  # type: ignore[misc]
        views = views_of(kv_caches, self.caches, kernels_of(self.engine), BY_TOKEN)
        _planes_of.clear()
        _planes_of.extend([] for _ in self.caches.kv_cache_groups)
        for each in views:
            tensors: Any = each.view.tensors
            layers = [x if isinstance(x, list | tuple) else [x] for x in tensors]
            _planes_of[each.group or 0] += [[*x] for x in layers]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        _computed[request.request_id] = num_computed_tokens
        return super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[misc]

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        if not num_external_tokens or _fault[0] is None:
            return
        first = _computed[request.request_id]
        past = first + num_external_tokens
        loaded = list[list[int]]()
        groups = self.caches.kv_cache_groups
        for ids, group in zip(blocks.get_block_ids(), groups, strict=True):
            size = group.kv_cache_spec.block_size
            some = ids[first // size : past // size]
            loaded.append([x for x in some if x != GONE])
        before = [
            [[plane[ids].clone() for plane in planes] for planes in layers]
            for ids, layers in zip(loaded, _planes_of, strict=True)
        ]
        keys = [*request.block_hashes[first // size : past // size]]
        _begun[request.request_id] = _Begun(loaded, before, keys)

    def damage(self, name: str) -> None:
        begun = _begun.pop(name, None)
        fault = _fault[0]
        if begun is not None and fault is not None:
            fault(Loaded(begun.blocks, _planes_of, begun.before, begun.keys))
            damaged.append(name)


class DamagesAtTheEnd(_Damages):
    """Loads that end some steps later."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        _end_copies()
        results = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        for name in results.finished_recving:
            self.damage(name)
        return results


class DamagedPortaKV(DamagesAtTheEnd, PortaKVConnector):
    """PortaKV's connector with faults."""


class MultiConnector(DamagesAtTheEnd, multi_connector.MultiConnector):  # type: ignore[misc]
    """vLLM's connector of several, with faults. vLLM treats connectors of this name differently."""


class DamagedOffloading(DamagesAtTheEnd, OffloadingConnector):  # type: ignore[misc]
    """vLLM's offloading to host memory, with faults."""


class _Stream(OnACpu):
    """A stream of a device, with the names that vLLM's simple offloading reads."""

    cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the lowest and the highest priority."""
        return 0, 0


def _copy_batch(targets: int, sources: int, sizes: int, count: int, *_: Any) -> int:
    """Copy pieces of host memory, in place of the driver's batch of copies."""
    words = ctypes.c_uint64 * count
    for target, source, size in zip(
        words.from_address(targets),
        words.from_address(sources),
        words.from_address(sizes),
        strict=True,
    ):
        ctypes.memmove(target, source, size)
    return 0


#: torch for vLLM's simple offloading, which has streams and events of CUDA.
_ON_A_CPU = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("empty", "zeros", "int8", "device", "Tensor")},
    Event=OnACpu,
    cuda=SimpleNamespace(Stream=_Stream, current_stream=_Stream),
)


class DamagedSimple(DamagesAtTheEnd, SimpleCPUOffloadConnector):  # type: ignore[misc]
    """vLLM's simple offloading to host memory, with faults. A CPU lacks its copies and streams."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        for module in (worker, copy_backend):
            vars(module)["torch"] = _ON_A_CPU
        vars(cuda_mem_ops)["_batch_memcpy"] = _copy_batch, 1
        super().register_kv_caches(kv_caches)


class DamagedExample(_Damages, ExampleConnector):  # type: ignore[misc]
    """vLLM's example, which loads within a step, with faults."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        _end_copies()
        super().start_load_kv(forward_context, **kwargs)
        for name in [*_begun]:
            self.damage(name)
