# SPDX-License-Identifier: Apache-2.0
"""How long a caller waits by the wall clock, in turns with raw copies: for a mapped pull of each
size and arrangement, by a ticket and by a name, and for a ticket."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter

from portakv_benchmarks.host.suite import MB
from portakv_benchmarks.migration.cases import ALL_CASES, BLOCKS, CASES, SEVERAL, TWO_OWNERS, USUAL
from portakv_benchmarks.migration.pulls import MAPPED, RAW
from portakv_benchmarks.migration.suite import MigrationBench
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import in_words

#: Bytes of a pull whose time is mostly fixed: 16 tokens of the usual arrangement, the fewest.
SMALL = 2 * MB
#: Rounds before the timed ones: the first pulls of a process, or of an owner, take up to twice as
#: long.
WARM = 20
#: Bytes from which on pulls have a target as a share of a raw copy's rate.
LARGE = 512 * MB
#: The arrangements that are pulled in that size too: the usual one and the slowest one.
OF_LARGE = (USUAL, "MLA, rows of 1152 B")
BY_NAME = "mapped, by name"


def waiting_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for small pulls, for large ones of each arrangement, for tickets, and for pulls
    from several owners."""
    most = bench.sizes.large[bench.on]
    if most >= SMALL:
        yield f"wall clock: {in_words(SMALL)}", partial(_pulls, bench, USUAL, SMALL)
    for case in CASES:
        if case == BLOCKS:
            continue
        for nbytes in _large(most) if case in OF_LARGE else [most]:
            name = f"wall clock: {case}, {in_words(nbytes)}"
            yield name, partial(_pulls, bench, case, nbytes)
    yield "wall clock: tickets", partial(_tickets, bench)
    yield "wall clock: several owners", partial(_several, bench, most)


def _large(most: int) -> list[int]:
    """Return the sizes of large pulls, of which the last one is the most."""
    return [LARGE, most] if LARGE < most else [most]


def _several(bench: MigrationBench, most: int) -> Rows:
    """Return rows for pulls from several owners, each a process with its share of the heads."""
    rows = Rows()
    with bench.several(max(case.owners for case in SEVERAL.values())):
        if most >= SMALL:
            rows += _pulls(bench, TWO_OWNERS, SMALL)
        for case in SEVERAL:
            for nbytes in _large(most):
                rows += _pulls(bench, case, nbytes)
    return rows


def _pulls(bench: MigrationBench, case: str, nbytes: int) -> Rows:
    """Return a row for pulls, for pulls by name, and for raw copies of as many bytes."""
    near = bench.near
    bench.meet(case, nbytes)
    owners = bench.owners(ALL_CASES[case])
    tickets = [one.do("offer", nbytes) for one in owners]
    name = secrets.token_bytes(16)
    by_name = [one.do("offer", nbytes, name.hex()) for one in owners]

    pull = near.pulling(_only(tickets), nbytes, overlap="idle")
    pull_by_name = near.pulling(_only(by_name), nbytes, overlap="idle")

    def raw() -> None:
        near.copy(nbytes)
        near.settle()

    calls: dict[str, tuple[Callable[[], object], Callable[[], bool]]] = {
        MAPPED: (
            lambda: pull().synchronize(),
            partial(near.right, nbytes),
        ),
        BY_NAME: (
            lambda: pull_by_name().synchronize(),
            partial(near.right, nbytes),
        ),
        RAW: (raw, partial(near.right, nbytes, True)),
    }
    payload = ALL_CASES[case].payload(nbytes)
    times: dict[str, list[float]] = {method: [] for method in calls}
    right = dict.fromkeys(calls, True)
    rounds = _rounds(bench, payload)
    for n in range(-min(WARM, rounds), rounds):
        if n % 10 == 0:
            bench.change()
        for method, (call, check) in calls.items():
            near.settle()
            call()  # after one of its kind, as in a server
            near.settle()
            began = perf_counter()
            call()
            if n >= 0:
                times[method].append(perf_counter() - began)
            right[method] &= check()
    fields: Row = {"kind": "migrate_wall", "shape": case, "op": in_words(nbytes)}
    fields |= {"across": bench.across, "owners": len(owners), "payload_bytes": payload}
    rows = Rows()
    for method, seconds in times.items():
        row = {**fields, "backend": method, **_figures(seconds), "verified": right[method]}
        if method != RAW:
            row["of_raw"] = short(median(times[RAW]) / median(seconds))
            row["over_raw_us"] = short((median(seconds) - median(times[RAW])) * 1e6)
        rows.append(row)
    return rows


def _only(tickets: list[str]) -> str | list[str]:
    """Return the ticket of a single owner by itself, as servers pass it."""
    return tickets[0] if len(tickets) == 1 else tickets


def _tickets(bench: MigrationBench) -> Rows:
    """Return a row for the call that makes an offer and its ticket."""
    near = bench.near
    nbytes = min(SMALL, bench.sizes.large[bench.on])
    bench.apart()
    near.give(USUAL, nbytes)
    seconds = list[float]()
    for _ in range(bench.sizes.calls):
        offer = near.offering(nbytes)
        near.settle()
        near.withdraw()
        began = perf_counter()
        offer()
        seconds.append(perf_counter() - began)
    near.withdraw()
    fields: Row = {"kind": "migrate_ticket", "shape": USUAL, "op": in_words(nbytes)}
    labels = {"backend": "portakv", "across": bench.across, "payload_bytes": nbytes}
    return [{**fields, **labels, **_figures(seconds), "verified": True}]


def _rounds(bench: MigrationBench, payload: int) -> int:
    """Return how often each method is called: the smaller, the more often."""
    return bench.sizes.calls if payload <= SMALL else bench.trials.rounds


def _figures(seconds: list[float]) -> Row:
    """Return the median and the 90th percentile of times."""
    return {
        "us": short(median(seconds) * 1e6),
        "p90_us": short(quantile(seconds, 0.9) * 1e6),
        "rounds": len(seconds),
    }
