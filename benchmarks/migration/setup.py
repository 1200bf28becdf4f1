# SPDX-License-Identifier: Apache-2.0
"""Measure the wait before readers can pull: for an `Owner` of many allocations, and for published
weights of many allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from statistics import median
from time import perf_counter

import torch

from portakv import KVView
from portakv.migrate import Channel, Owner, Reader, Shard
from portakv.weights import publish, pull_weights
from portakv_benchmarks.migration.cases import DTYPE, memory
from portakv_benchmarks.migration.suite import MigrationBench
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import fill

SHAPE = (4, 2, 16, 2, 64)  # of an allocation: blocks, kv, tokens, heads, dim; 32 KiB
LAYOUT = "layer | block kv token head dim"


def setup_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for each of both kinds."""
    yield "Owner", partial(_measured, bench, "Owner", _owner)
    yield "publish", partial(_measured, bench, "publish", _publish)


def _measured(
    bench: MigrationBench,
    shape: str,
    once: Callable[[list[torch.Tensor]], tuple[float, bool]],
) -> Rows:
    """Return a row: the wall clock of the call, over allocations that are new each time."""
    count = bench.sizes.allocations
    times = list[float]()
    right = True
    for round_ in range(bench.trials.rounds):
        tensors = [memory(SHAPE, DTYPE, bench.device) for _ in range(count)]
        for number, tensor in enumerate(tensors):
            fill(tensor.view(-1).view(torch.int64), 1 + round_ * count + number)
        seconds, same = once(tensors)
        times.append(seconds)
        right &= same
    row: Row = {
        "kind": "migrate_setup",
        "shape": shape,
        "op": f"{count:,} allocations",
        "backend": "portakv",
        "across": "processes",
        "payload_bytes": sum(tensor.nbytes for tensor in tensors),
        "ms": short(median(times) * 1e3),
        "p90_ms": short(quantile(times, 0.9) * 1e3),
        "rounds": len(times),
        "verified": right,
    }
    return [row]


def _owner(tensors: list[torch.Tensor]) -> tuple[float, bool]:
    """Make an owner of a cache whose layers are these tensors; another channel pulls a block."""
    into = [torch.zeros_like(tensor) for tensor in tensors]
    with ExitStack() as undo:
        there, here = (undo.enter_context(closing(Channel(timeout=60.0))) for _ in range(2))
        shard = Shard(KVView(tensors, LAYOUT))
        began = perf_counter()
        owner = Owner(there, shard, model="m")
        seconds = perf_counter() - began
        undo.callback(owner.close)
        reader = Reader(here, Shard(KVView(into, LAYOUT)), model="m")
        undo.callback(reader.close)
        reader.pull(owner.offer([3], tokens=SHAPE[2]).ticket, [1]).synchronize(60)
        same = all(_equal(a[3], b[1]) for a, b in zip(tensors, into, strict=True))
    return seconds, same


def _publish(tensors: list[torch.Tensor]) -> tuple[float, bool]:
    """Publish these tensors; another channel pulls them."""
    into = {str(number): torch.zeros_like(tensor) for number, tensor in enumerate(tensors)}
    with ExitStack() as undo:
        there, here = (undo.enter_context(closing(Channel(timeout=60.0))) for _ in range(2))
        named = {str(number): tensor for number, tensor in enumerate(tensors)}
        began = perf_counter()
        published = publish(there, named)
        seconds = perf_counter() - began
        undo.callback(published.close)
        pull_weights(here, [published.ticket], into)
        same = all(_equal(named[name], into[name]) for name in named)
    return seconds, same


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the bits are the same."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
