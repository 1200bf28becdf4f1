# SPDX-License-Identifier: Apache-2.0
"""Measure the host time that a registered call adds to its backend's launch, in microseconds.

The call is ``connector.from_gpu(chunk, slot_mapping=...)`` with its caches registered; the launch
is the prepared one, handed the same views and ids. The payload is one token of one layer, so that
the difference is not lost in the copy. Both are called in turns of several calls, as an engine
makes them, each with another memory object, which is a tensor that no call has seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch

from portakv import AdaptiveConnector, Index, KVView
from portakv.cli.sides import Shape
from portakv.registry.prepared import prepared
from portakv.registry.registry import choose
from portakv_benchmarks.shared.harness import SEED, Row, Rows, uncollected
from portakv_benchmarks.shared.peers import LMCache

#: Takes a memory object's number, and a new tensor over it.
Call = Callable[[int, torch.Tensor], object]

CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"

_BLOCKS = 8
_BLOCK_SIZE = 16
_DIM = 8
_OBJECTS = 64
_SLOT = 37
# turns; calls of one kind in a row
_WARM_UP = 13
_TURN = 16


def measure_overhead(
    backend: str, device: torch.device, rounds: int, peers: Sequence[LMCache] = ()
) -> Rows:
    """Return a row for each kind of index list.

    The kinds are an `Index` that the caller keeps, and raw tensors. ``peers`` make the same copy in
    the same turns, with slots on the device; a row has the time of a call, divided by the peer's.
    """
    size = (2, _BLOCKS, _BLOCK_SIZE, 1, _DIM)
    cache = torch.arange(prod(size), dtype=torch.int16, device=device).view(size)
    caches = [cache.view(torch.float16)]
    expected = cache[:, _SLOT // _BLOCK_SIZE, _SLOT % _BLOCK_SIZE].reshape(2, 1, 1, -1)
    chunks = [
        torch.empty((2, 1, 1, _DIM), dtype=torch.float16, device=device) for _ in range(_OBJECTS)
    ]
    connector = AdaptiveConnector(device, backend, CACHE, CHUNK)
    connector.register_kv_caches(caches)
    view = KVView(caches, CACHE)
    chunk_views = [KVView(chunk, CHUNK, heads=1) for chunk in chunks]
    prepared_copy = prepared(view.form, chunk_views[0].form, 1, 0, None, choose(device, backend))
    host = torch.tensor([_SLOT])
    ids: Row = {"kept Index": Index(host), "host tensor": host}
    if device.type != "cpu":
        ids["device tensor"] = host.to(device)
    placed = prepared_copy.place(ids["kept Index"])
    whole = Index()

    def registered(slots: Any) -> Call:
        return lambda i, chunk: connector.from_gpu(chunk, slot_mapping=slots)

    def launched(i: int, chunk: torch.Tensor) -> object:
        return prepared_copy.launch(view, chunk_views[i], placed, whole, 1, None, None)

    calls: dict[str, Call] = {
        "launch": launched,
        **{name: registered(slots) for name, slots in ids.items()},
        **{peer.name: _by_peer(peer, host, caches) for peer in peers},
    }
    verified = {name: _right(call, chunks, expected) for name, call in calls.items()}
    times = in_turns(calls, chunks, rounds, device)
    launches = times["launch"]
    return [
        {
            "kind": "overhead",
            "backend": backend,
            "ids": name,
            "added_us": round(median(a - b for a, b in zip(times[name], launches, strict=True)), 2),
            "call_us": round(median(times[name]), 2),
            "launch_us": round(median(launches), 2),
            **{f"of_{x.name}": _of(times[name], times[x.name]) for x in peers},
            "rounds": rounds,
            "verified": all(verified[x] for x in (name, "launch", *(y.name for y in peers))),
        }
        for name in ids
    ]


def _right(call: Call, chunks: Sequence[torch.Tensor], expected: torch.Tensor) -> bool:
    """Return whether a call moves the row into each chunk."""
    for chunk in chunks:
        chunk.view(torch.int16).fill_(-1)
    for i, chunk in enumerate(chunks):
        call(i, chunk.detach())
    return all(torch.equal(chunk.view(torch.int16), expected) for chunk in chunks)


def _of(times: list[float], others: list[float]) -> float:
    """Return a median as a multiple of another one."""
    return round(median(times) / median(others), 2)


def _by_peer(peer: LMCache, slots: torch.Tensor, caches: list[torch.Tensor]) -> Call:
    """Return a peer's call of the same copy, with everything that can be made beforehand."""
    shape = Shape(
        name="overhead",
        model="",
        source="",
        cache=CACHE,
        chunk=CHUNK,
        layers=1,
        dim=_DIM,
        dtype="float16",
        block_size=_BLOCK_SIZE,
        tokens=_BLOCK_SIZE,
        pool=_BLOCKS,
    )
    move = peer.move_by("slot kernel", shape, slots, caches)
    return lambda i, chunk: move(chunk, True)


def in_turns(
    calls: Mapping[str, Call], chunks: Sequence[torch.Tensor], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the microseconds of each call, several of one kind in a row.

    Each call gets a new tensor over one of ``chunks``, and the number of that memory object.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    drawn = Random(SEED)
    with uncollected():
        turns = -(-rounds // _TURN)
        for n in range(-min(_WARM_UP, turns), turns):
            torch.get_device_module(device).synchronize()  # launches must not queue up
            order = drawn.sample(names, len(names))
            for (turn, name), i in product(enumerate(order), range(_TURN)):
                at = (n + turn + i) % len(chunks)
                fresh = chunks[at].detach()  # a new tensor over the same memory
                start = perf_counter()
                calls[name](at, fresh)
                elapsed = (perf_counter() - start) * 1e6
                if n >= 0:
                    times[name].append(elapsed)
    return times
