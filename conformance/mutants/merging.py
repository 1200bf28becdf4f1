# SPDX-License-Identifier: Apache-2.0
"""Mutants that go wrong between pieces: runs merged wrongly, nests and errors in the middle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from portakv import Unsupported
from portakv.plan.plan import CopyPlan
from portakv_conformance.mutants.base import Call, HostRows, Runs


def _by_source(runs: Runs) -> Runs:
    order = np.argsort(runs.src, kind="stable")
    return replace(runs, src=runs.src[order], dst=runs.dst[order])


class MergedBySourceAlone(HostRows):
    """Runs are merged where they are neighbours in the source, wherever the destination is."""

    def move(self, runs: Runs, call: Call) -> None:
        if not len(runs.src):
            return
        runs = _by_source(runs)
        follows = np.concatenate(([False], runs.src[1:] == runs.src[:-1] + runs.nbytes))
        begins = np.maximum.accumulate(np.where(follows, 0, np.arange(len(follows))))
        behind = (np.arange(len(follows)) - begins) * runs.nbytes
        super().move(replace(runs, dst=runs.dst[begins] + behind), call)


class LastRunLost(HostRows):
    """A merged run is sent when the next begins; one that ends the list is never sent."""

    def move(self, runs: Runs, call: Call) -> None:
        runs = _by_source(runs)
        follows = (runs.src[1:] == runs.src[:-1] + runs.nbytes) & (
            runs.dst[1:] == runs.dst[:-1] + runs.nbytes
        )
        if follows.size and follows[-1]:
            last = 1 + int(np.nonzero(~follows)[0][-1]) if not follows.all() else 0
            runs = replace(runs, src=runs.src[:last], dst=runs.dst[:last])
        super().move(runs, call)


class OnlyFirstNest(HostRows):
    """Of a plan with a nest for each kv only the first is carried out."""

    def pieces(self, plan: CopyPlan, call: Call) -> list[Runs]:
        return super().pieces(plan, call)[:1]


class ErrorAfterPartialWrite(HostRows):
    """That a row is not of whole words is found, and refused, after half of the rows are moved."""

    def move(self, runs: Runs, call: Call) -> None:
        if runs.vector > 1:
            super().move(runs, call)
            return
        half = len(runs.dst) // 2
        super().move(replace(runs, src=runs.src[:half], dst=runs.dst[:half]), call)
        raise Unsupported("Moving single bytes", "rows have to be whole words of 2 bytes")
