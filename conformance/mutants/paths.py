# SPDX-License-Identifier: Apache-2.0
"""Mutants of which one path alone is wrong: many tensors, two lists of ids, merged runs, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from portakv import Index, KVView, Unsupported
from portakv.plan.plan import Loop, Nest
from portakv_conformance.mutants.addressing import ThirtyTwoBitOffset, narrow
from portakv_conformance.mutants.base import Call, DeviceRows, HostRows, Int64, Mask, Pair, Runs


def _of_both(call: Call) -> bool:
    """Return True if both sides have ids, as in copies between caches."""
    return call.src_index.ids is not None and call.dst_index.ids is not None


@HostRows.mutate("address")
def TableOf64(right: HostRows, view: KVView, entry: Int64, byte: Int64) -> Int64:
    """The table travels in the arguments and has room for 64 addresses; more wrap around."""
    return right.address(view, entry % 64, byte)


@HostRows.mutate("address")
def TableOf256(right: HostRows, view: KVView, entry: Int64, byte: Int64) -> Int64:
    """The table has room for 256 addresses; of a list of more blocks the others wrap around."""
    return right.address(view, entry % 256, byte)


@HostRows.mutate("offsets")
def BlocksInThirtyTwoBits(
    right: HostRows, nest: Nest, name: str, numbers: Int64, index: Index, unit: int
) -> Pair:
    """Byte offsets have 64 bits where tokens move one by one, and 32 where whole blocks do."""
    entry, byte = right.offsets(nest, name, numbers, index, unit)
    return entry, byte if unit == 1 else narrow(byte)


@HostRows.mutate("pieces")
def MigrationsInThirtyTwoBits(right: HostRows, call: Call) -> list[Runs]:
    """The path for ids on both sides works out byte offsets in 32 bits."""
    wrong = ThirtyTwoBitOffset(torch.device("cpu"))
    return (wrong if _of_both(call) else right).pieces(call)


@DeviceRows.mutate("address", profile="full")
def FarChunkOnTheDevice(right: DeviceRows, view: KVView, entry: Int64, byte: Int64) -> Int64:
    """The byte offsets of a chunk on the device are computed in 32 bits and wrap past 2 GiB."""
    return right.address(view, entry, byte if view.block_size else narrow(byte))


@DeviceRows.mutate("walk", profile="full")
def FarPlanesOnTheDevice(right: DeviceRows, loop: Loop, name: str) -> Pair:
    """The stride between planes on the device is cut to 32 bits."""
    entries, steps = right.walk(loop, name)
    return entries, narrow(steps)


@HostRows.mutate("units")
def MigrationsClipped(right: HostRows, call: Call) -> int:
    """The grid of the path for ids on both sides is clipped at 65535 units."""
    return min(right.units(call), 65535 if _of_both(call) else call.count)


@HostRows.mutate("bad")
def GuardsSourceOnly(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """With ids on both sides only the source's are guarded: a bad destination is the last slot."""
    if _of_both(call):
        np.minimum(dst, call.ends[1] - 1, out=dst)
    return right.bad(src, dst, call)


@HostRows.mutate("bad")
def PaddingHidesBadIds(right: HostRows, src: Int64, dst: Int64, call: Call) -> Mask:
    """A bad id that faces padding on the other side is skipped with it, and not reported."""
    return right.bad(src, dst, call) & right.moved(src, dst)


def _by_source(runs: Runs) -> Runs:
    return runs.at(np.argsort(runs.src, kind="stable"))


@HostRows.mutate("move")
def MergedBySourceAlone(right: HostRows, runs: Runs, call: Call) -> None:
    """Runs are merged where they are neighbours in the source, wherever the destination is."""
    runs = _by_source(runs)
    at = np.arange(len(runs.src))
    follows = np.diff(runs.src, prepend=-1) == runs.nbytes
    begins = np.maximum.accumulate(np.where(follows, 0, at))
    right.move(replace(runs, dst=runs.dst[begins] + (at - begins) * runs.nbytes), call)


@HostRows.mutate("move")
def LastRunLost(right: HostRows, runs: Runs, call: Call) -> None:
    """A merged run is sent when the next begins; one that ends the list is never sent."""
    runs = _by_source(runs)
    follows = (np.diff(runs.src) == runs.nbytes) & (np.diff(runs.dst) == runs.nbytes)
    if follows.size and follows[-1]:
        begins = np.nonzero(~follows)[0]
        runs = runs.at(slice(begins[-1] + 1 if begins.size else 0))
    right.move(runs, call)


@HostRows.mutate("pieces")
def OnlyFirstNest(right: HostRows, call: Call) -> list[Runs]:
    """Only the first nest of a plan with a nest for each kv is carried out."""
    return right.pieces(call)[:1]


@HostRows.mutate("move")
def ErrorAfterPartialWrite(right: HostRows, runs: Runs, call: Call) -> None:
    """That a row is not of whole words is found, and refused, after half of the rows are moved."""
    right.move(runs.at(slice(len(runs.dst) // (1 if runs.vector > 1 else 2))), call)
    if runs.vector == 1:
        raise Unsupported("Moving single bytes", "rows have to be whole words of 2 bytes")
