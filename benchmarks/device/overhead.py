# SPDX-License-Identifier: Apache-2.0
"""What a registered call adds to its backend's launch, in microseconds of host time.

The call is ``connector.from_gpu(chunk, slot_mapping=...)`` with its caches registered; the launch
is the prepared one, handed the same views and ids. The payload is one token of one layer, so that
the difference is not lost in the copy. Both are called in turns of several calls, as an engine
makes them, each with another memory object, which is a tensor that no call has seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from portakv import AdaptiveConnector, Index, KVView
from portakv.registry.prepared import prepared
from portakv.registry.registry import choose
from portakv_benchmarks.shared.harness import quantile, uncollected

CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"

_BLOCKS, _BLOCK_SIZE, _HEADS, _DIM = 8, 16, 1, 8
_OBJECTS = 64
_SLOT = 37
_WARM_UP = 13  # turns
_TURN = 16  # calls of one kind in a row


class _Tiny:
    """A cache of one layer, and memory objects of one token."""

    def __init__(self, backend: str, device: torch.device) -> None:
        size = (2, _BLOCKS, _BLOCK_SIZE, _HEADS, _DIM)
        count = 2 * _BLOCKS * _BLOCK_SIZE * _HEADS * _DIM
        cache = torch.arange(count, dtype=torch.int16, device=device).view(size)
        self.caches = [cache.view(torch.float16)]
        self.expected = cache[:, _SLOT // _BLOCK_SIZE, _SLOT % _BLOCK_SIZE].reshape(2, 1, 1, -1)
        chunk = (2, 1, 1, _HEADS * _DIM)
        self.chunks = [
            torch.empty(chunk, dtype=torch.float16, device=device) for _ in range(_OBJECTS)
        ]
        self.connector = AdaptiveConnector(device, backend, CACHE, CHUNK)
        self.connector.register_kv_caches(self.caches)
        self.view = KVView(self.caches, CACHE)
        self.chunk_views = [KVView(chunk, CHUNK, heads=_HEADS) for chunk in self.chunks]
        self.fresh = self.chunks[0]
        forms = self.view.form, self.chunk_views[0].form
        self.way = prepared(*forms, 1, 0, None, choose(device, backend))

    def renew(self, i: int) -> None:
        """Make ``fresh`` a new tensor over the memory of chunk ``i``."""
        self.fresh = self.chunks[i].detach()

    def poison(self) -> None:
        for chunk in self.chunks:
            chunk.view(torch.int16).fill_(-1)

    def right(self) -> bool:
        return all(torch.equal(chunk.view(torch.int16), self.expected) for chunk in self.chunks)


def measure_overhead(backend: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of index list: an `Index` that the caller keeps, and raw tensors."""
    tiny = _Tiny(backend, device)
    host = torch.tensor([_SLOT])
    kept = Index(host)
    placed, whole = tiny.way.place(kept), Index()
    on_device = host.to(device)

    def launch(i: int) -> object:
        views = tiny.view, tiny.chunk_views[i]
        return tiny.way.launch(*views, placed, whole, 1, None, None)

    def call(slots: Any) -> Callable[[int], object]:
        return lambda i: tiny.connector.from_gpu(tiny.fresh, slot_mapping=slots)

    calls: dict[str, Callable[[int], object]] = {
        "launch": launch,
        "kept Index": call(kept),
        "host tensor": call(host),
    }
    if device.type != "cpu":
        calls["device tensor"] = call(on_device)
    verified = {name: _check(tiny, each) for name, each in calls.items()}
    times = _time(calls, tiny.renew, rounds, device)
    return [
        {
            "kind": "overhead",
            "backend": backend,
            "ids": name,
            "added_us": round(_median_difference(times[name], times["launch"]), 2),
            "call_us": round(quantile(times[name], 0.5), 2),
            "launch_us": round(quantile(times["launch"], 0.5), 2),
            "rounds": rounds,
            "verified": verified[name] and verified["launch"],
        }
        for name in calls
        if name != "launch"
    ]


def _check(tiny: _Tiny, call: Callable[[int], object]) -> bool:
    tiny.poison()
    for i in range(_OBJECTS):
        tiny.renew(i)
        call(i)
    return tiny.right()


def _time(
    calls: Mapping[str, Callable[[int], object]],
    renew: Callable[[int], None],
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    with uncollected():
        for n in range(-_WARM_UP, -(-rounds // _TURN)):
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()  # launches must not queue up
            for turn in range(len(names)):
                name = names[(n + turn) % len(names)]
                for i in range(_TURN):
                    renew((n + turn + i) % _OBJECTS)
                    start = perf_counter()
                    calls[name]((n + turn + i) % _OBJECTS)
                    elapsed = (perf_counter() - start) * 1e6
                    if n >= 0:
                        times[name].append(elapsed)
    return times


def _median_difference(mine: list[float], theirs: list[float]) -> float:
    return quantile([a - b for a, b in zip(mine, theirs, strict=True)], 0.5)
