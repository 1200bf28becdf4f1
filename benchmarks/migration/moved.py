# SPDX-License-Identifier: Apache-2.0
"""Measure pulls through staging buffers, and pulls of scattered blocks from mapped memory.

The former are compared with one buffer of as many bytes by the same library, the latter with
transport libraries that have a descriptor for each block. Both processes are separate from this
one: a crash or a hang ends only its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter

from portakv_benchmarks.migration.cases import BLOCKS, CASES, USUAL
from portakv_benchmarks.migration.pulls import AHEAD, MAPPED
from portakv_benchmarks.migration.side import Far
from portakv_benchmarks.migration.suite import PEERS, MigrationBench
from portakv_benchmarks.shared.harness import Row, Rows, Step
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import Method, Sample

GROUP = "distributed"
WEIGHTS = 16  # tensors that are published together


def staged_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for each transport that can be used here."""
    if bench.across == "one device":
        bench.left_out.append(f"staged, {GROUP}: NCCL needs a device for each process")
    else:
        yield GROUP, partial(_staged, bench, GROUP)
    for name in PEERS:
        if name not in bench.absent:
            yield name, partial(_staged, bench, name)


def scattered_steps(bench: MigrationBench) -> Iterator[Step]:
    """Yield a step for each installed engine."""
    for name in PEERS:
        if name not in bench.absent:
            yield name, partial(_scattered, bench, name)


class Two:
    """The process that gives and the one that takes."""

    def __init__(self, bench: MigrationBench) -> None:
        self.bench = bench
        self.owner = bench.started(bench.there)
        self.reader = bench.started(bench.device)

    def change(self) -> None:
        salt = next(self.bench.salts)
        self.owner.do("change", salt)
        self.reader.do("expect", salt)

    def group(self) -> None:
        """Let them meet in a group of torch.distributed."""
        self.reader.do("join", self.owner.do("join"))
        self.owner.begin("meet")
        self.reader.do("meet")
        self.owner.end()

    def engine(self, name: str) -> None:
        """Start NIXL or Mooncake in both."""
        for side in (self.owner, self.reader):
            side.do("start", name)

    def will_read(self, remote: str, local: str, nbytes: int) -> None:
        reach, results = self.owner.do("lies", remote, nbytes)
        self.reader.do("will_read", local, nbytes, reach, results)

    def crossed(self, nbytes: int) -> Sample:
        """Send one message of the group."""
        at = perf_counter() + AHEAD
        self.owner.begin("timed", "send", nbytes, at=at)
        ended = self.reader.do("timed", "receive", nbytes, at=at)[1]
        self.owner.end()
        return Sample(ended - at, 0.0)

    def timed(self, what: str, nbytes: int, ticket: str = "") -> Sample:
        began, ended = self.reader.do("timed", what, nbytes, ticket)
        return Sample(ended - began, 0.0)

    def method(
        self, name: str, run: Callable[[], Sample], nbytes: int, raw: bool = False, peer: str = ""
    ) -> Method:
        """Return a method whose bytes are checked each time."""
        seen = list[bool]()

        def call() -> Sample:
            sample = run()
            seen.append(self.reader.do("right", nbytes, raw))
            return sample

        return Method(name, call, self.change, lambda: all(seen), peer)


@contextmanager
def two(bench: MigrationBench) -> Iterator[Two]:
    """Make two processes, and end them afterwards."""
    made = list[Far]()
    bench.apart()
    try:
        sides = Two(bench)
        made += [sides.owner, sides.reader]
        yield sides
    finally:
        for one in made:
            one.close()


def _staged(bench: MigrationBench, transport: str) -> Rows:
    sizes = bench.sizes.moved[bench.on]
    rows = Rows()
    with two(bench) as sides:
        raw = sides.owner.do("give", USUAL, max(sizes), expose="staging", transport=transport)
        sides.reader.do("take", USUAL, max(sizes), raw, transport=transport)
        sides.group() if transport == GROUP else sides.engine(transport)
        for nbytes in sizes:
            own = partial(sides.crossed, nbytes)
            if transport != GROUP:
                sides.will_read("dense", "landed", nbytes)
                own = partial(sides.timed, "read", nbytes)
            ticket = sides.owner.do("offer", nbytes)
            pull = partial(sides.timed, "pull", nbytes, ticket)
            methods = [sides.method("staged", pull, nbytes), sides.method("own", own, nbytes, True)]
            rows += _rows(bench, "staged", transport, nbytes, methods, {"of_own": "own"})
        raw_copy = sides.method("own", own, nbytes, True)
        rows += _weights(bench, sides, transport, nbytes, raw_copy)
    return rows


def _weights(bench: MigrationBench, sides: Two, name: str, nbytes: int, raw: Method) -> Rows:
    """Measure published weights that a transport sends, of as many bytes as the raw copy."""
    payload = CASES[USUAL].payload(nbytes)
    ticket = sides.owner.do("publish_staged", WEIGHTS, payload, name)
    sides.reader.do("want", WEIGHTS, payload)
    seen = list[bool]()

    def call() -> Sample:
        sample = sides.timed("weights", nbytes, ticket)
        seen.append(sides.reader.do("has_weights"))
        return sample

    pull = Method("pull_weights", call, sides.change, lambda: all(seen), "")
    label = f"weights by {name}"
    return _rows(bench, "staged", label, nbytes, [pull, raw], {"of_own": "own"})


def _scattered(bench: MigrationBench, name: str) -> Rows:
    nbytes = bench.sizes.large[bench.on]
    with two(bench) as sides:
        raw = sides.owner.do("give", BLOCKS, nbytes)
        sides.reader.do("take", BLOCKS, nbytes, raw)
        sides.engine(name)
        sides.will_read("source", "target", nbytes)
        pull = partial(sides.timed, "pull", nbytes, sides.owner.do("offer", nbytes))
        read = partial(sides.timed, "read", nbytes)
        methods = [sides.method(MAPPED, pull, nbytes), sides.method(name, read, nbytes, peer=name)]
        return _rows(bench, "scattered", name, nbytes, methods, {"of_peer": name})


def _rows(
    bench: MigrationBench,
    kind: str,
    name: str,
    nbytes: int,
    methods: list[Method],
    compared_with: Mapping[str, str],
) -> Rows:
    case = USUAL if kind == "staged" else BLOCKS
    fields: Row = {"kind": f"migrate_{kind}", "shape": name, "op": in_words(nbytes)}
    return bench.compared(fields, CASES[case].payload(nbytes), methods, compared_with)
