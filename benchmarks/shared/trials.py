# SPDX-License-Identifier: Apache-2.0
"""Measure several methods of a disk or a server in a random order, after equal pauses.

Disks have burst allowances, which a pause refills, so all methods get the same allowance. A ratio
of two methods is the median over the rounds, since rates drift. Bytes are checked before and after
the rounds.
"""

from __future__ import annotations

import random
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
    cpu: float  # of all threads of the working process
    first: float = 0.0  # until the first part of the work ended


class Method(NamedTuple):
    """One method of moving the bytes of a case."""

    name: str
    run: Callable[[], Sample]
    prepare: Callable[[], object] = lambda: None  # before the pause
    right: Callable[[], bool] = lambda: True  # whether every byte of the last run arrived
    peer: str = ""  # the owner of the method, if not PortaKV


def timed(call: Callable[[], object]) -> Sample:
    """Return the time of a call, and the processor time of this process."""
    began = time.perf_counter()
    cpu = cpu_seconds()
    call()
    return Sample(time.perf_counter() - began, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Return the processor seconds of this process."""
    import resource  # only where disks are measured, since Linux alone has it

    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True, slots=True)
class Trials:
    """The number of rounds and the pause of trials."""

    rounds: int
    pause: float  # seconds before each trial
    left_out: list[str]  # a line for each thing that was not measured
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def rows(
        self, fields: Row, nbytes: int, methods: Sequence[Method], compared_with: Mapping[str, str]
    ) -> Rows:
        """Return a row for each method of moving ``nbytes``.

        ``compared_with`` maps fields to prefixes of names. A field is the method's rate / that of
        the fastest other method whose name has the prefix.
        """
        checked = {method.name: self._checked(fields, method) for method in methods}
        able = [method for method in methods if checked[method.name] is not None]
        results: dict[str, list[Sample]] = {method.name: [] for method in able}
        for _ in range(self.rounds):
            for method in self.random.sample(able, len(able)):
                method.prepare()
                time.sleep(self.pause)
                results[method.name].append(method.run())
        return [
            {
                **fields,
                "backend": method.name,
                "payload_bytes": nbytes,
                **_figures(results[method.name], nbytes),
                **(
                    {"peer": method.peer}
                    if method.peer
                    else _ratios(method.name, compared_with, results)
                ),
                "verified": bool(checked[method.name] and self._checked(fields, method)),
            }
            for method in able
        ]

    def _checked(self, fields: Row, method: Method) -> bool | None:
        """Return whether a run moves every byte; None, with a line in `left_out`, if it fails."""
        try:
            method.prepare()
            method.run()
            return method.right()
        except (*FAILURES, OSError, subprocess.SubprocessError) as error:
            place = (
                f"{fields['kind']} {fields.get('shape', '')} {fields.get('op', '')}, {method.name}"
            )
            line = f"{place}, {method.name}: {in_a_line(error)}"
            self.left_out.append(line if method.peer else Failed(line))
            return None


def _figures(own: Sequence[Sample], nbytes: int) -> Row:
    times = [sample.elapsed for sample in own]
    p10, p50, p90 = (quantile(times, q) for q in (0.1, 0.5, 0.9))
    cpu = median(sample.cpu for sample in own) * 1e6 / (nbytes / (1 << 20))
    fields: Row = {"p10_us": p10 * 1e6, "p50_us": p50 * 1e6, "p90_us": p90 * 1e6}
    fields |= {"gb_per_s": nbytes / p50 / 1e9, "cpu_us_per_mib": cpu}
    if any(sample.first for sample in own):
        fields["first_us"] = median(sample.first for sample in own) * 1e6
        fields["first_of_whole"] = median(sample.first / sample.elapsed for sample in own)
    fields = {name: short(value) for name, value in fields.items()}
    return {**fields, "rounds": len(own), "noisy": p90 > NOISY * p50}


def _ratios(
    name: str, compared_with: Mapping[str, str], results: Mapping[str, list[Sample]]
) -> Row:
    """Return the rate / that of the fastest method with each prefix, as medians of the rounds."""
    fields: Row = {}
    for field_, begin in compared_with.items():
        peers = [own for each, own in results.items() if each.startswith(begin) and each != name]
        if peers:
            best = min(peers, key=lambda own: median(sample.elapsed for sample in own))
            pairs = zip(best, results[name], strict=True)
            fields[field_] = short(median(peer.elapsed / own.elapsed for peer, own in pairs))
    return fields
