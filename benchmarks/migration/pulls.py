# SPDX-License-Identifier: Apache-2.0
"""Measure pulls from mapped memory, and raw copies of as many bytes.

Parts: idle devices, both directions at the same time, the host's cost, and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from time import perf_counter

import torch

from portakv.migrate import open_shared
from portakv.weights import Parameter, pull_weights
from portakv.weights.plan import copy_pairs, tiles_of
from portakv_benchmarks.host.suite import MB
from portakv_benchmarks.migration.cases import BLOCKS, CASES, USUAL
from portakv_benchmarks.migration.suite import MigrationBench
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import fill, in_words
from portakv_benchmarks.shared.trials import Method, Sample

AHEAD = 0.05  # seconds from which on both processes begin at one time
RAW = "raw copy"
RAW_APART = "raw copy, one process"
ROWS = "copy_rows"
MAPPED = "mapped"


def mapped_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for each case in each size."""
    for case in CASES:
        if case != BLOCKS:
            yield case, partial(_mapped, bench, case)


def _mapped(bench: MigrationBench, case: str) -> Rows:
    sizes = bench.sizes.sizes[bench.on]
    near = bench.near
    rows = Rows()
    for nbytes in sizes:
        bench.meet(case, nbytes)
        ticket = bench.far.do("offer", nbytes)
        right = partial(near.right, nbytes)
        methods = [
            bench.method(MAPPED, partial(near.pull, ticket, nbytes, overlap="idle"), right),
            bench.method(RAW, partial(near.copy, nbytes), partial(right, True)),
        ]
        compared_with = {"of_raw": "raw copy"}
        if bench.on:
            methods += _between(bench, CASES[case].payload(nbytes))
        else:
            methods.append(bench.method(ROWS, partial(near.rows, nbytes), right))
            compared_with["of_rows"] = ROWS
        fields: Row = {"kind": "migrate_mapped", "shape": case, "op": in_words(nbytes)}
        fields["row_bytes"] = CASES[case].row_bytes
        rows += bench.rows(fields, CASES[case].payload(nbytes), methods, compared_with)
    return rows


def _between(bench: MigrationBench, nbytes: int) -> list[Method]:
    """Return the raw copy of one process between two devices."""
    if bench.there == bench.device:
        return []
    source = fill(torch.empty(nbytes // 8, dtype=torch.int64, device=bench.there), 7)
    into, known = (torch.empty_like(source, device=bench.device) for _ in range(2))
    known.copy_(source)
    bench.module.synchronize(bench.there)
    call = partial(into.copy_, source, non_blocking=True)

    def right() -> bool:
        same = torch.equal(into, known)
        into.zero_()
        return same

    return [bench.method(RAW_APART, call, right)]


def both_steps(bench: MigrationBench) -> Iterator[Step]:
    """Let both processes pull from each other at the same time."""
    yield USUAL, partial(_both, bench)


def _both(bench: MigrationBench) -> Rows:
    nbytes = bench.sizes.large[bench.on]
    near = bench.near
    times = bench.sizes.times
    bench.meet(USUAL, nbytes)
    far = bench.far
    arguments = near.give(USUAL, nbytes)
    far.do("take", USUAL, nbytes, arguments)
    here = near.offer(nbytes)
    there = far.do("offer", nbytes)

    def change() -> None:
        salt = next(bench.salts)
        far.do("change", salt)
        near.change(salt + 1)
        near.expect(salt)
        far.do("expect", salt + 1)
        next(bench.salts)

    def run(what: str, seen: list[bool]) -> Sample:
        at = perf_counter() + AHEAD
        far.begin("timed", what, nbytes, here, times, at)
        ends = [near.timed(what, nbytes, there, times, at)[1], far.end()[1]]
        raw = what == "copy"
        seen.append(near.right(nbytes, raw) and far.do("right", nbytes, raw))
        return Sample(max(ends) - at, 0.0)

    methods = list[Method]()
    for name, what in ((MAPPED, "pull"), (RAW, "copy")):
        seen = list[bool]()
        methods.append(Method(name, partial(run, what, seen), change, partial(all, seen)))
    fields: Row = {"kind": "migrate_both", "shape": USUAL, "op": in_words(nbytes)}
    return bench.compared(
        fields, 2 * times * CASES[USUAL].payload(nbytes), methods, {"of_raw": RAW}
    )


def cost_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for the call of a pull, and one from a ticket to published rows."""
    yield "costs", partial(_costs, bench)


def _costs(bench: MigrationBench) -> Rows:
    nbytes = min(2 * MB, bench.sizes.sizes[bench.on][0])
    near = bench.near
    rows = Rows()
    bench.meet(USUAL, nbytes)
    ticket = bench.far.do("offer", nbytes)
    calls = list[float]()
    ends = list[float]()
    right = True
    for n in range(bench.sizes.calls):
        if n % 10 == 0:
            bench.change()
        near.settle()
        began = perf_counter()
        pulled = near.pull(ticket, nbytes, overlap="idle")
        calls.append(perf_counter() - began)
        pulled.synchronize()
        ends.append(perf_counter() - began)
        right &= near.right(nbytes)
    for shape, results in (("call of a mapped pull", calls), ("ticket to published rows", ends)):
        figures = {
            "us": short(median(results) * 1e6),
            "p90_us": short(quantile(results, 0.9) * 1e6),
        }
        fields = {"kind": "migrate_cost", "shape": shape, "op": in_words(nbytes)}
        labels = {"backend": MAPPED, "across": bench.across, "payload_bytes": nbytes}
        rows.append({**fields, **labels, **figures, "rounds": len(results), "verified": right})
    return rows


def weight_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for each set of tensors."""
    for name in bench.sizes.tensors[bench.on]:
        yield name, partial(_weights, bench, name)


def _weights(bench: MigrationBench, name: str) -> Rows:
    count, height, width = bench.sizes.tensors[bench.on][name]
    bench.apart()
    own, cut = (slice(width // 3), (0, 3)) if name.startswith("thirds") else (slice(None), (0, 1))
    nbytes = 2 * count * height * len(range(width)[own])
    ticket, shared, raw = bench.far.do("publish", [[height, width]] * count, nbytes)
    remote = [open_shared(bytes.fromhex(one), bench.device) for one in (*shared, raw)]
    known = [fill(torch.empty_like(x).view(-1).view(torch.int64), n) for n, x in enumerate(remote)]
    local = [torch.empty_like(x[:, own]) for x in remote[:-1]]
    landed = torch.empty_like(remote[-1])
    parts = [x[:, own] for x in remote[:-1]]
    named = {f"w{n}": Parameter.split(x, 1, [width], cut) for n, x in enumerate(local)}

    def right() -> bool:
        bits = [x.view(torch.int16).view(height, width)[:, own] for x in known[:-1]]
        same = all(torch.equal(x.view(torch.int16), y) for x, y in zip(local, bits, strict=True))
        torch._foreach_zero_(local)
        return same

    def raw_right() -> bool:
        same = torch.equal(landed.view(torch.int64), known[-1])
        landed.zero_()
        return same

    pull = partial(pull_weights, bench.near.channel, bytes.fromhex(ticket), named)
    pairs = [*zip(local, parts, strict=True)]
    methods = [bench.method("copies", partial(copy_pairs, pairs), right, True)]
    tiles, rest = tiles_of(pairs)
    if tiles and not rest:
        methods.append(bench.method("tiles", tiles[0].issue, right, True))
    methods += [
        bench.method("pull_weights", pull, right, True),
        bench.method(RAW, partial(landed.copy_, remote[-1]), raw_right, True),
    ]
    fields: Row = {"kind": "migrate_weights", "shape": name, "op": in_words(nbytes)}
    return bench.compared(fields, nbytes, methods, {"of_raw": RAW})
