# SPDX-License-Identifier: Apache-2.0
"""Ways of moving a case again and again, for what is measured beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch

from portakv.errors import PortaKVError
from portakv.runtime.transfer import Transfer
from portakv_benchmarks.host.cases import Case, case_of, scene
from portakv_benchmarks.host.memory import Sides
from portakv_benchmarks.host.suite import KB, Bench
from portakv_benchmarks.host.ways import DESCRIPTORS, MEMCPY, Way, plain

#: Lengths of rows that are moved beside something else; `descriptors` has blocks.
RUNS = (2 * KB, 256)
BLOCK_RUN = 32 * KB
#: Transfers in the queue at a time: several milliseconds of the link's time, in which the host
#: issues what is measured and the next ones.
AHEAD = 4
#: What goes wrong with a way, and is told in place of its figures.
_FAILURES = (PortaKVError, RuntimeError, TypeError, ValueError)


@dataclass
class Mover:
    """A way of moving a case, and what came of it beside something else.

    Attributes:
        labels: what identifies it in the results.
        issue: moves the case once behind the current stream; a handle that tells the end, or None
            where that stream does.
        poison, right: as in `harness.Variant`.
        payload: bytes of one transfer.
        way: the engine and its terms; None of a peer, and of memcpy.
        verified: every byte was right whenever it was checked.
    """

    labels: dict[str, Any]
    issue: Callable[[], object]
    poison: Callable[[], None]
    right: Callable[[], bool]
    payload: int
    way: Way | None = None
    verified: bool = True

    def __str__(self) -> str:
        return f"{self.labels['backend']} {self.labels['shape']}"

    def once(self) -> None:
        """Move once while nothing else runs, and look at every byte."""
        self.poison()
        done = self.issue()
        self.verified &= self.right()
        if self.way is not None and isinstance(done, Transfer):
            self.labels |= self.way.taken(done)


@dataclass
class Queue:
    """Keeps transfers of a mover following each other on a stream.

    Attributes:
        stamps: seconds on the host's clock at which one was seen to have ended.
        dry: how often all had ended when the next was issued.
    """

    module: Any
    mover: Mover
    stream: torch.Stream
    stamps: list[float] = field(default_factory=list)
    dry: int = 0
    _flying: deque[Callable[[], bool]] = field(default_factory=deque)

    def fill(self) -> None:
        """Issue as many as there may be in the queue."""
        while len(self._flying) < AHEAD:
            self._issue()

    def go_on(self) -> None:
        """See which have ended, and issue one more where there is room."""
        self.land()
        if len(self._flying) < AHEAD:
            self.dry += not self._flying
            self._issue()

    def land(self) -> None:
        """See which have ended."""
        while self._flying and self._flying[0]():
            self._flying.popleft()
            self.stamps.append(perf_counter())

    def _issue(self) -> None:
        with self.module.stream(self.stream):
            done = self.mover.issue()
            if isinstance(done, Transfer):
                self._flying.append(done.done)
            else:
                self._flying.append(recorded(self.module, self.stream).query)


def recorded(module: Any, stream: torch.Stream) -> Any:
    """An event behind what a stream holds; one that tells no time."""
    event = module.Event()
    event.record(stream)
    return event


class Ways:
    """Keeps the ways apart: what one of them does wrong is told, and the others go on for as long
    as the device can be used.

    Attributes:
        usable: no failure has taken the device.
    """

    def __init__(self, bench: Bench, place: str, left_out: list[str]) -> None:
        self._bench, self._place, self._left_out = bench, place, left_out
        self.usable = True

    def tried(self, mover: Mover, action: Callable[[Mover], object]) -> bool:
        """Whether a mover could be put to some use; what has failed by then is this mover's."""
        if not self.usable:
            return False
        try:
            action(mover)
            self._bench.module.synchronize()
        except _FAILURES as error:
            self._tell(f"{mover}: {_line(error)}")
        else:
            return True
        try:
            self._bench.module.synchronize()
        except RuntimeError as error:
            self.usable = False
            self._tell(f"the device cannot be used any more ({_line(error)}); the others stopped")
        return False

    def _tell(self, line: str) -> None:
        self._left_out.append(f"{self._place}, {line}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Kept:
    """Chunks of the host with rows of some bytes, over one region, each made once."""

    def __init__(self, bench: Bench) -> None:
        self._payload = bench.preset.beside
        self._region = bench.region(max(*bench.preset.payloads, self._payload))
        self._known: dict[int, Sides] = {}

    def at(self, run: int) -> Sides:
        """Rows of ``run`` bytes, or blocks of so many in a plane."""
        if run not in self._known:
            case = case_of(scene(run), self._payload)
            assert case is not None, f"{self._payload} bytes are no whole runs of {run}"
            self._known[run] = Sides(case, self._region)
            self._known[run].settle()
        return self._known[run]


def by_memcpy(kept: Kept, direction: str) -> Mover:
    """Plain memcpys of as many bytes; fills the source of all that move in this direction."""
    dense = kept.at(RUNS[0])
    dense.fill(direction)
    return Mover(
        {"shape": "dense", "backend": MEMCPY, "engine": MEMCPY},
        lambda: plain(dense, direction),
        lambda: dense.poison_plain(direction),
        lambda: dense.plain_right(direction),
        dense.case.payload,
    )


def by_way(kept: Kept, way: Way, direction: str, run: int | None = None) -> Mover:
    """An engine; rows of ``run`` bytes, or what suits the engine."""
    sides = kept.at(run or (BLOCK_RUN if way.engine == DESCRIPTORS.engine else RUNS[0]))
    issue = partial(way.move, sides, direction)
    mover = by_call(sides, way.name, way.engine, direction, issue)
    mover.way = way
    if "max_thread_blocks" in way.terms:
        mover.labels["thread_blocks"] = way.terms["max_thread_blocks"]
    return mover


def by_call(
    sides: Sides, name: str, engine: str, direction: str, issue: Callable[[], object]
) -> Mover:
    """Any call that moves a case."""
    case: Case = sides.case
    labels = {"shape": case.scene.name, "backend": name, "engine": engine,
              "row_bytes": case.scene.row}  # fmt: skip
    return Mover(
        labels, issue, lambda: sides.poison(direction), lambda: sides.right(direction), case.payload
    )
