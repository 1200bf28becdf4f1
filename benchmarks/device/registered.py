# SPDX-License-Identifier: Apache-2.0
"""Measure the host time of registered calls of 32 layers, next to a peer's op for the same copy.

`from_gpu` and `to_gpu` return a transfer, whose end an event reports. LMCache's op returns nothing,
so it is also called with an event that is recorded after it. Calls of one kind follow each other in
turns, each with a tensor that no call has seen before, and nothing waits in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from portakv import AdaptiveConnector, Index
from portakv.cli.sides import load_shapes
from portakv_benchmarks.device.overhead import Call, in_turns
from portakv_benchmarks.device.suite import COMPILING, accepted_backends
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.shared.harness import Row, Rows, Step, short
from portakv_benchmarks.shared.peers import PEERS, LMCache, PeerMissing, load_peer

_INDEX = "random"
_OPS = {"gather": "from_gpu", "scatter": "to_gpu"}
_OBJECTS = 3


def registered_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each direction, with the requested peers or those that are installed."""
    peers = list(bench.peers)
    if not peers and bench.device.type == "cuda":
        for name in PEERS:
            try:
                peers.append(load_peer(name))
            except PeerMissing as error:
                bench.left_out.append(f"registered: {error}")
    for op in _OPS:
        yield f"host time: registered {_OPS[op]}", partial(_measure, bench, peers, op)


def _measure(bench: Bench, peers: list[LMCache], op: str) -> Rows:
    shapes = load_shapes()
    name, tokens = bench.preset.registered
    work = Workload(replace(shapes[name], tokens=tokens), "apart", bench.device, _OBJECTS)
    objects = work.stored if op == "gather" else work.loaded
    calls = _own_calls(bench, work, op)
    for peer in peers:
        calls |= _peer_calls(bench, work, peer, op)
    verified = {labels: _right(work, op, call) for labels, call in calls.items()}
    named = {" ".join(labels): call for labels, call in calls.items()}
    times = in_turns(named, objects, bench.preset.registered_rounds, bench.device)
    rows: Rows = []
    for labels, right in verified.items():
        backend, ids = labels
        taken = times[" ".join(labels)]
        rows.append(
            {
                "kind": "wall_registered",
                "shape": f"{name}, {tokens} tokens",
                "backend": backend,
                "op": _OPS[op],
                "ids": ids,
                "host_us": short(median(taken)),
                "least_us": short(min(taken)),
                "payload_bytes": work.shape.payload,
                "rounds": len(taken),
                "verified": right,
                **({"peer": backend.split()[0]} if backend.split()[0] in PEERS else {}),
            }
        )
    _relate(rows, [peer.name for peer in peers])
    return rows


#: Name and ids of a call.
Labels = tuple[str, str]


def _own_calls(bench: Bench, work: Workload, op: str) -> dict[Labels, Call]:
    """Return registered calls of the backends that do not compile, by kind of their slots."""
    slots = work.slots(_INDEX)
    kinds: dict[str, Any] = {"kept Index": Index(slots), "host tensor": slots}
    kinds["device tensor"] = slots.to(bench.device)
    calls: dict[Labels, Call] = {}
    for name in accepted_backends(bench.device):
        if name in COMPILING:
            continue
        connector = AdaptiveConnector(bench.device, name, work.shape.cache, work.shape.chunk)
        connector.register_kv_caches(work.source if op == "gather" else work.target)
        move = connector.from_gpu if op == "gather" else connector.to_gpu
        for kind, ids in kinds.items():
            calls[name, kind] = partial(_registered, move, ids)
    return calls


def _registered(move: Any, ids: Any, i: int, chunk: torch.Tensor) -> object:
    # A list in a host tensor is new in each call, as that of a scheduler is.
    slots = ids.clone() if isinstance(ids, torch.Tensor) and ids.device.type == "cpu" else ids
    return move(chunk, slot_mapping=slots)


def _peer_calls(bench: Bench, work: Workload, peer: LMCache, op: str) -> dict[Labels, Call]:
    """Return a peer's op, and the op with an event after it."""
    caches = work.source if op == "gather" else work.target
    store = op == "gather"
    move = peer.move_by("slot kernel", work.shape, work.slots(_INDEX), caches)
    event = bench.module.Event()

    def alone(i: int, chunk: torch.Tensor) -> object:
        return move(chunk, store)

    def with_event(i: int, chunk: torch.Tensor) -> object:
        move(chunk, store)
        return event.record()

    return {
        (peer.name, "device tensor"): alone,
        (f"{peer.name} and event", "device tensor"): with_event,
    }


def _right(work: Workload, op: str, call: Call) -> bool:
    """Return whether one call moves every byte, and no other."""
    if op == "gather":
        work.poison_stored(0)
        call(0, work.stored[0])
    else:
        work.poison_target()
        call(0, work.loaded[0])
    torch.get_device_module(work.device).synchronize()
    return work.stored_right(0, _INDEX) if op == "gather" else work.target_right(0, _INDEX)


def _relate(rows: Rows, peers: list[str]) -> None:
    """Write each call's time as a multiple of a peer's op, and of the op and an event."""
    for row in rows:
        for peer in peers:
            for field, name in ((f"of_{peer}", peer), (f"of_{peer}_event", f"{peer} and event")):
                other: Row = next(each for each in rows if each["backend"] == name)
                row[field] = short(row["host_us"] / other["host_us"])
