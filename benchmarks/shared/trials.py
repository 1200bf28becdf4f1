# SPDX-License-Identifier: Apache-2.0
"""Trials of several ways in a random order, behind equal pauses, for what a disk or a server does.

Disks have burst allowances, which a pause refills, so that all ways get the same one. A way's ratio
to another is the median over the rounds, since rates drift; bytes are checked before and behind
the rounds.
"""

from __future__ import annotations

import random
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from portakv_benchmarks.shared.harness import (
    FAILURES,
    Failed,
    Row,
    Rows,
    in_a_line,
    quantile,
    short,
)

#: A row whose p90 is above this many times its median is flagged as noisy.
NOISY = 1.5


class Sample(NamedTuple):
    """One trial, in seconds."""

    elapsed: float
    cpu: float  # of all threads of the process that did the work
    first: float = 0.0  # until the first part of the work had ended


class Way(NamedTuple):
    """One way of moving the bytes of a case."""

    name: str
    run: Callable[[], Sample]
    prepare: Callable[[], object] = lambda: None  # before the pause
    right: Callable[[], bool] = lambda: True  # whether every byte of the last run landed
    peer: str = ""  # whose way it is, if not PortaKV's


def timed(call: Callable[[], object]) -> Sample:
    """The time of a call, and that of the processor for this process."""
    began = time.perf_counter()
    cpu = cpu_seconds()
    call()
    return Sample(time.perf_counter() - began, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Seconds that processors have worked for this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True, slots=True)
class Trials:
    """How often, and behind which pause, ways are tried."""

    rounds: int
    pause: float  # seconds before each trial
    left_out: list[str]  # a line for each thing that was not measured
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def rows(self, told: Row, nbytes: int, ways: Sequence[Way], beside: Mapping[str, str]) -> Rows:
        """A row for each way of moving ``nbytes``. ``beside``: fields, and how the names of ways
        begin of whose fastest they are the ratio of the rates."""
        checked = {way.name: self._checked(told, way) for way in ways}
        able = [way for way in ways if checked[way.name] is not None]
        found: dict[str, list[Sample]] = {way.name: [] for way in able}
        for _ in range(self.rounds):
            for way in self.random.sample(able, len(able)):
                way.prepare()
                time.sleep(self.pause)
                found[way.name].append(way.run())
        return [
            {
                **told,
                "backend": way.name,
                "payload_bytes": nbytes,
                **_figures(found[way.name], nbytes),
                **({"peer": way.peer} if way.peer else _ratios(way.name, beside, found)),
                "verified": bool(checked[way.name] and self._checked(told, way)),
            }
            for way in able
        ]

    def _checked(self, told: Row, way: Way) -> bool | None:
        """Whether a run moves every byte; None, and a line, if it fails."""
        try:
            way.prepare()
            way.run()
            return way.right()
        except (*FAILURES, OSError, subprocess.SubprocessError) as error:
            place = f"{told['kind']} {told.get('shape', '')} {told.get('op', '')}, {way.name}"
            line = f"{place}: {in_a_line(error)}"
            self.left_out.append(line if way.peer else Failed(line))
            return None


def _figures(own: Sequence[Sample], nbytes: int) -> Row:
    times = [sample.elapsed for sample in own]
    p10, p50, p90 = (quantile(times, q) for q in (0.1, 0.5, 0.9))
    cpu = median(sample.cpu for sample in own) * 1e6 / (nbytes / (1 << 20))
    told: Row = {"p10_us": p10 * 1e6, "p50_us": p50 * 1e6, "p90_us": p90 * 1e6}
    told |= {"gb_per_s": nbytes / p50 / 1e9, "cpu_us_per_mib": cpu}
    if any(sample.first for sample in own):
        told["first_us"] = median(sample.first for sample in own) * 1e6
        told["first_of_whole"] = median(sample.first / sample.elapsed for sample in own)
    told = {name: short(value) for name, value in told.items()}
    return {**told, "rounds": len(own), "noisy": p90 > NOISY * p50}


def _ratios(name: str, beside: Mapping[str, str], found: Mapping[str, list[Sample]]) -> Row:
    """The medians over the rounds of the rate, of the fastest of the ways that begin so."""
    told: Row = {}
    for field_, begin in beside.items():
        peers = [own for each, own in found.items() if each.startswith(begin) and each != name]
        if peers:
            best = min(peers, key=lambda own: median(sample.elapsed for sample in own))
            pairs = zip(best, found[name], strict=True)
            told[field_] = short(median(peer.elapsed / own.elapsed for peer, own in pairs))
    return told
