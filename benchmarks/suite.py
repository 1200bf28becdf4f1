# SPDX-License-Identifier: Apache-2.0
"""The suite: which shapes, arrangements, index lists and backends a preset measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from portakv import AdaptiveConnector, Index, KVView, copy_blocks, copy_rows
from portakv.registry import trace

from .harness import Measured, Variant, measure
from .machine import free_memory
from .shapes import Shape
from .timers import Timer
from .workload import Workload

_OBJECTS = 3
#: Share of the free memory that one workload may take.
_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Preset:
    """How much is measured. ``seconds`` bounds the rounds of one workload."""

    shapes: tuple[str, ...] | None  # None: all
    index: tuple[str, ...]
    together: bool  # also with all layers in one allocation
    rounds: int
    seconds: float
    overhead_rounds: int


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(("seed",), ("random", "blocks"), False, 15, 5.0, 500),
    "core": Preset(
        ("seed", "seed-fp8", "llama3-8b-chunk", "llama3-70b-tp8", "deepseek-mla"),
        ("random", "blocks"), True, 41, 20.0, 3000,
    ),
    "full": Preset(None, ("random", "contiguous", "blocks"), True, 41, 20.0, 3000),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """One workload to measure, or why it is left out."""

    shape: Shape
    arrangement: str
    left_out: str = ""


def accepted_backends(device: torch.device) -> list[str]:
    """Names of the backends that serve a device, in the registry's order."""
    return [decision.name for decision in trace(device) if decision.accepted]


def tasks(preset: Preset, shapes: Sequence[Shape], device: torch.device) -> Iterator[Task]:
    """The workloads of a preset; those that the machine's memory cannot hold are left out."""
    for shape in shapes:
        arrangements = ["apart"] if shape.layered else ["together"]
        if preset.together and shape.layered:
            arrangements.append("together")
        for arrangement in arrangements:
            needed = shape.payload * (2 * shape.pool + 2 * _OBJECTS)
            free = free_memory(device)
            why = ""
            if needed > _SHARE * free:
                why = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            yield Task(shape, arrangement, why)


def run_task(
    task: Task, preset: Preset, backends: Sequence[str], timer: Timer, device: torch.device
) -> list[dict[str, Any]]:
    """Measure one workload with every backend; a row for each, that of `copy_` first."""
    shape = task.shape
    work = Workload(shape, task.arrangement, device, _OBJECTS)
    ceiling = Variant(
        {"backend": "copy_", "op": "copy_", "index": "none", "call": "Tensor.copy_"},
        lambda i: work.stored[i].copy_(work.loaded[i]),
        work.poison_stored,
        work.copied_right,
    )
    variants = [
        variant
        for backend in backends
        for index in shape.index
        if index in preset.index
        for variant in _both_ways(work, backend, index)
    ]
    measured = measure(
        ceiling, variants, timer, objects=_OBJECTS, rounds=preset.rounds, seconds=preset.seconds
    )
    return [_row(task, timer, one) for one in measured]


def _both_ways(work: Workload, backend: str, index: str) -> Iterator[Variant]:
    name, store, load = (_by_blocks if index == "blocks" else _by_slots)(work, backend, index)
    labels = {"backend": backend, "index": index}
    yield Variant(
        {**labels, "op": "gather", "call": name[0]},
        store,
        work.poison_stored,
        lambda i: work.stored_right(i, index),
    )
    yield Variant(
        {**labels, "op": "scatter", "call": name[1]},
        load,
        lambda i: work.poison_target(),
        lambda i: work.target_right(i, index),
    )


Ways = tuple[tuple[str, str], Callable[[int], object], Callable[[int], object]]


def _by_slots(work: Workload, backend: str, index: str) -> Ways:
    """Through registered connectors, with an `Index` that the caller keeps."""
    kept = Index(work.ids(index))
    source, target = (_connector(work, backend, caches) for caches in (work.source, work.target))
    return (
        ("from_gpu", "to_gpu"),
        lambda i: source.from_gpu(work.stored[i], slot_mapping=kept),
        lambda i: target.to_gpu(work.loaded[i], slot_mapping=kept),
    )


def _by_blocks(work: Workload, backend: str, index: str) -> Ways:
    """Through `copy_blocks`; on an accelerator with an `Index` that the caller keeps, since ids
    that are copied to the device in each call would make the host wait in the middle of it."""
    shape, ids = work.shape, work.ids(index)
    source, target = (_cache_view(shape, caches) for caches in (work.source, work.target))
    if work.device.type == "cpu":
        return (
            ("copy_blocks", "copy_blocks"),
            lambda i: copy_blocks(source, _chunk_view(shape, work.stored[i]), ids, None,
                                  backend=backend),
            lambda i: copy_blocks(_chunk_view(shape, work.loaded[i]), target, None, ids,
                                  backend=backend),
        )  # fmt: skip
    kept = Index(ids, step=shape.block_size)
    return (
        ("copy_rows", "copy_rows"),
        lambda i: copy_rows(source, _chunk_view(shape, work.stored[i]), kept, backend=backend),
        lambda i: copy_rows(
            _chunk_view(shape, work.loaded[i]), target, None, kept, backend=backend
        ),
    )


def _connector(work: Workload, backend: str, caches: Any) -> AdaptiveConnector:
    shape = work.shape
    made = AdaptiveConnector(work.device, backend, shape.cache, shape.chunk)
    made.register_kv_caches(caches)
    return made


def _cache_view(shape: Shape, caches: Any) -> KVView:
    return KVView(caches, shape.cache)


def _chunk_view(shape: Shape, chunk: torch.Tensor) -> KVView:
    merged = "(head dim)" in shape.chunk
    kv = shape.kv if "kv" in shape.chunk else None
    return KVView(chunk, shape.chunk, kv=kv, heads=shape.heads if merged else None)


def _row(task: Task, timer: Timer, one: Measured) -> dict[str, Any]:
    shape = task.shape
    return {
        "kind": "copy",
        "shape": shape.name,
        "layers": task.arrangement,
        **one.labels,
        "cache": shape.cache,
        "chunk": shape.chunk,
        "dtype": shape.dtype,
        "row_bytes": shape.row_bytes,
        "payload_bytes": shape.payload,
        "pool_slots": shape.blocks * shape.block_size,
        "slots_used": round(1 / shape.pool, 4),
        "p10_us": _short(one.p10),
        "p50_us": _short(one.p50),
        "p90_us": _short(one.p90),
        "gb_per_s": _short(2 * shape.payload / one.p50 / 1e3),
        "ratio": _short(one.ratio),
        "ratio_p10": _short(one.ratio_p10),
        "ratio_p90": _short(one.ratio_p90),
        "host_us": _short(one.host),
        "rounds": one.rounds,
        "timer": timer.name,
        "host_hidden": one.hidden,
        "noisy": one.noisy,
        "verified": one.verified,
    }


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
