# SPDX-License-Identifier: Apache-2.0
"""Measure small copies: integers that a stream can use.

*Idle* sends follow one another on an idle device. The others follow a finished large copy and, 300
us earlier, the submission of another copy: one as large that still runs (*busy*), or one of 4 KB
that is over (*paced*), so that the host's caches are as cold as for *busy*.

The device's events, recorded on that stream right before and after the call, are reported next to
the host's latency. Every method gets the same numpy array of int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.host import pinned
from portakv.host.small import to_device
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.shared.harness import Row, Rows, Step, having, short

Values = npt.NDArray[np.int64]

OURS = "to_device"
PINNED = "pinned copy"
PLAIN = "torch.tensor"
WARM_UP = 3
#: Seconds in which a large copy has to begin, and a short one to end.
_HEAD_START = 3e-4
SHORT = 4096  # bytes
_CADENCE = (
    f"each send comes {_HEAD_START * 1e6:.0f} us after another copy was issued, after a large one "
    f"that has ended: as large and still flying (busy), or of {SHORT} bytes (paced); idle sends "
    f"follow one another, the methods in turns"
)
#: The count of integers of the performance targets; others take less of the time.
_JUDGED_COUNT = 64
_FEWER = 3
TURNS = 3  # of idle sends


class Route(NamedTuple):
    """A method for values."""

    send: Callable[[Values], torch.Tensor]  # is timed: makes them usable on the current stream
    before: Callable[[Values], object] = id  # what was done with them before


class Seen(NamedTuple):
    """One send, in microseconds."""

    landed: float
    host: float
    device: float
    busy: bool  # the large copy was still under way at its end
    right: bool


def small_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each count of integers."""
    for count in bench.preset.small:
        yield f"small copies: {count}", partial(_measure, bench, count)


def _measure(bench: Bench, count: int) -> Rows:
    methods = _methods(bench, count)
    with bench.module.stream(bench.stream()):
        seen = sends_of(bench, methods, count, Large(bench))
    rows = [row_of(bench, name, count, sends) for name, sends in seen.items()]
    compare(rows)
    return rows


class Large:
    """A large copy from pinned memory, on a separate stream."""

    def __init__(self, bench: Bench) -> None:
        self._module = bench.module
        self._stream = bench.stream()
        region = bench.region(bench.preset.large)
        nbytes = bench.preset.large
        self._source = region.host[:nbytes]
        self._target = region.device[:nbytes]
        self._ended = torch.Event(bench.device)

    def pass_by(self) -> None:
        """Begin it, and wait for everything to end."""
        self._issue(self._source, self._target)
        self._module.synchronize()

    def start(self, flies: bool) -> None:
        """Begin it, and wait until it has surely begun; or do the same with a few bytes of it, and
        wait until they have landed."""
        part = slice(None if flies else SHORT)
        self._issue(self._source[part], self._target[part])
        began = perf_counter()
        # Either asks at least once, so that the driver is as warm for the one as for the other.
        while perf_counter() - began < _HEAD_START or (self.flying and not flies):
            pass

    def _issue(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._ended.record(self._stream)

    @property
    def flying(self) -> bool:
        """Return True while the copy is under way."""
        return not self._ended.query()


def row_of(bench: Bench, name: str, count: int, seen: Mapping[str, list[Seen]]) -> Row:
    figures: Row = {}
    for state, sends in seen.items():
        figures[f"{state}_us"] = short(median(one.landed for one in sends))
        figures[f"{state}_host_us"] = short(median(one.host for one in sends))
        figures[f"{state}_device_us"] = short(median(one.device for one in sends))
    busy, paced = (median(one.landed for one in seen[state]) for state in ("busy", "paced"))
    return {
        "kind": "host_small",
        "shape": f"{count} int64",
        "backend": name,
        "op": "h2d",
        "integers": count,
        "payload_bytes": 8 * count,
        "large_bytes": bench.preset.large,
        **figures,
        "overtook": sum(one.busy for one in seen["busy"]),
        "samples": len(seen["busy"]),
        "idle_samples": len(seen["idle"]),
        "cadence": _CADENCE,
        "busy_to_idle": short(busy / paced),
        "verified": all(one.right for sends in seen.values() for one in sends),
    }


def sends_of(
    bench: Bench, methods: Mapping[str, Route], count: int, large: Large
) -> dict[str, dict[str, list[Seen]]]:
    """Time every send of every method, idle, paced and busy.

    The methods take turns, each with many sends: the first send of all would meet a colder driver,
    and a method that alternates would meet the caches of the others.
    """
    seen = {name: {state: list[Seen]() for state in ("idle", "paced", "busy")} for name in methods}

    def send(name: str, state: str, n: int) -> None:
        alongside = None if state == "idle" else large
        seen[name][state].append(timed(bench, methods[name], count, n, alongside, state == "busy"))
        bench.module.synchronize()

    samples = bench.preset.small_samples
    if count != _JUDGED_COUNT:
        samples = max(1, samples // _FEWER)
    for method, n in product(methods.values(), range(WARM_UP)):
        timed(bench, method, count, n)
    bench.module.synchronize()
    for _, name, n in product(range(TURNS), methods, range(samples)):
        send(name, "idle", n)
    for name in methods:
        large.pass_by()  # waits for the copy that ran alongside the last send
        for n in range(samples):
            send(name, "paced", n)
            large.pass_by()
            send(name, "busy", n)
    return seen


def compare(rows: Rows) -> None:
    """Write ``idle_to_pinned`` and ``paced_to_pinned`` into each row: its latency on an idle device
    / that of a pinned non-blocking copy of the same values."""
    for known, row, state in product(having(rows, backend=PINNED), rows, ("idle", "paced")):
        row[f"{state}_to_pinned"] = short(row[f"{state}_us"] / known[f"{state}_us"])


def timed(
    bench: Bench, method: Route, count: int, n: int, large: Large | None = None, flies: bool = False
) -> Seen:
    """Send other values than before."""
    values = np.arange(n + 1, n + 1 + count, dtype=np.int64) * 0x10001
    stream = bench.module.current_stream(bench.device)
    first, last = (bench.module.Event(enable_timing=True) for _ in range(2))
    method.before(values)
    if large is not None:
        large.start(flies)
    first.record(stream)
    start = perf_counter()
    landed = method.send(values)
    host = perf_counter() - start
    last.record(stream)
    stream.synchronize()
    took = perf_counter() - start
    busy = flies and large is not None and large.flying
    device = float(first.elapsed_time(last)) * 1e3
    right = bool((landed.cpu().numpy().reshape(-1) == values).all())
    return Seen(took * 1e6, host * 1e6, device, busy, right)


def _methods(bench: Bench, count: int) -> dict[str, Route]:
    """Return every method by its name."""
    device = bench.device
    tensors = pinned.empty(count, torch.int64)
    target = torch.empty(count, dtype=torch.int64, device=device)

    def fill(values: Values) -> None:
        tensors.numpy()[:] = values

    def copy(values: Values) -> torch.Tensor:
        return target.copy_(tensors, non_blocking=True)

    def fill_and_copy(values: Values) -> torch.Tensor:
        fill(values)
        return copy(values)

    return {
        OURS: Route(lambda values: to_device(values, device)),
        PINNED: Route(fill_and_copy),
        f"{PINNED}, filled before": Route(copy, fill),
        PLAIN: Route(lambda values: torch.tensor(values, device=device)),
    }
