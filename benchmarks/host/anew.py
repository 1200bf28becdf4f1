# SPDX-License-Identifier: Apache-2.0
"""Measure what a call costs the host before its launch: a new view, a plan, a copy by new ids.

All tensors lie on the CPU, so no device is needed. The copy goes through the backend `reference`,
which times its own launches; a row has the time of the call without that of the launch. The least
of many times says what the code costs, the median what the machine's load adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter

import torch

from portakv import CopyOptions, CopyPlan, KVView, copy_blocks
from portakv.backends.base import Launch
from portakv.backends.reference import Reference
from portakv.core.plan import plan_words
from portakv.registry.registry import REGISTRY
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.shared.harness import Rows, Step, short, uncollected

_LAYERS = 32
_BLOCKS = 16
_BLOCK_SIZE = 16
_HEADS = 2
_DIM = 8
#: Blocks of a copy.
_COPIED = 6
_PAGED = "layer | kv block token head dim"
_POOL = "block layer kv token head dim"
#: Calls that are not timed.
_WARM_UP = 20


class TimedReference(Reference):
    """`reference`, which adds up the seconds of its launches."""

    name = "timed-reference"
    spent = 0.0

    def prepare(self, plan: CopyPlan) -> Launch:
        launch = super().prepare(plan)
        for name in ("copy", "enqueue"):  # by units, and by indices
            setattr(launch, name, _timed(getattr(launch, name)))
        return launch


def _timed(launch: Callable[..., object]) -> Callable[..., object]:
    """Return a launch that adds up its seconds."""

    def timed(*arguments: object) -> object:
        began = perf_counter()
        try:
            return launch(*arguments)
        finally:
            TimedReference.spent += perf_counter() - began

    return timed


def anew_steps(bench: Bench) -> Iterator[Step]:
    """Yield the one step."""
    yield "host time: views, plans and copies by new ids on the CPU", partial(_measure, bench)


def _measure(bench: Bench) -> Rows:
    caches = [
        torch.arange(2 * _BLOCKS * _BLOCK_SIZE * _HEADS * _DIM, dtype=torch.int16)
        .add_(layer)
        .view(2, _BLOCKS, _BLOCK_SIZE, _HEADS, _DIM)
        for layer in range(_LAYERS)
    ]
    pool = torch.zeros(_BLOCKS, _LAYERS, 2, _BLOCK_SIZE, _HEADS, _DIM, dtype=torch.int16)
    src = KVView(caches, _PAGED)
    dst = KVView(pool, _POOL)
    src_blocks = torch.randperm(_BLOCKS, generator=torch.Generator().manual_seed(1))[:_COPIED]
    dst_blocks = torch.arange(_COPIED).flip(0) + 3

    calls = bench.preset.anew
    options = CopyOptions(backend=TimedReference.name)
    # The library has not seen the lists that each copy takes.
    lists = [(src_blocks.clone(), dst_blocks.clone()) for _ in range(calls + _WARM_UP + 1)]

    def copy() -> None:
        copy_blocks(src, dst, *lists.pop(), options=options)

    def plan() -> object:
        return plan_words(src.form.address, dst.form.address, _BLOCK_SIZE, _BLOCK_SIZE, 0)

    REGISTRY.register(TimedReference.name, TimedReference)
    try:
        copy()
        right = all(
            torch.equal(pool[there, layer], cache[:, here])
            for here, there in zip(src_blocks.tolist(), dst_blocks.tolist(), strict=True)
            for layer, cache in enumerate(caches)
        )
        measured = {
            f"view of {_LAYERS} layers": _times(lambda: KVView(caches, _PAGED), calls),
            "plan": _times(plan, calls),
            "copy_blocks by new ids, less its launch": _times(copy, calls),
        }
    finally:
        REGISTRY.unregister(TimedReference.name)
    return [
        {
            "kind": "wall_anew",
            "shape": what,
            "least_us": short(min(times)),
            "host_us": short(median(times)),
            "rounds": len(times),
            "verified": right,
        }
        for what, times in measured.items()
    ]


def _times(call: Callable[[], object], calls: int) -> list[float]:
    """Return the microseconds of each call, without those of launches."""
    times = list[float]()
    with uncollected():
        for n in range(-_WARM_UP, calls):
            launches = TimedReference.spent
            began = perf_counter()
            call()
            elapsed = perf_counter() - began - (TimedReference.spent - launches)
            if n >= 0:
                times.append(elapsed * 1e6)
    return times
