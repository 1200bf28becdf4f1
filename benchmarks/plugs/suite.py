# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the benchmark of integrations: sizes, memory of both sides, and measurements.

A transfer is measured by an engine's own code, by PortaKV and by a plain copy, in turns.

Every byte is judged by plain indexing. Own code that is not here, or that fails, is left out, and
the others are measured all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from math import prod
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from portakv.cli.sides import Shape
from portakv.host import pinned
from portakv_benchmarks.host import interference, traffic_sources
from portakv_benchmarks.host.suite import HOST_PRESETS, KB, MB, MEMCPY, Bench, plain_copy
from portakv_benchmarks.host.traffic_sources import LOOPS, Traffic
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Step, Variant, having, short
from portakv_benchmarks.shared.shapes import POISON, fill, moved, planes, sizes

#: Names of the methods in rows: the engine's own code, and the integration.
OWN = "own"
OURS = "portakv"
#: What shapes have that say no more.
LIKE = Shape("", "none", "benchmarks/plugs", "", "", 1, 1, "bfloat16", 1, 1)
Call = Callable[[], object]
T = TypeVar("T")
#: Limits: meetings of a loop with each method, its seconds, and seconds of rounds after five.
_REPEATS = 3
_LOOP = 0.2
_ROUNDS = 0.25


@dataclass(frozen=True, slots=True)
class IntegrationPreset:
    """Set the amount of measurement; sizes in bytes."""

    layers: int
    payloads: tuple[int, ...]  # of LMCache's ops
    blocks: int  # of one of vLLM's jobs
    pages: tuple[int, ...]  # of a block in one layer, in vLLM
    pool: int  # payload of SGLang's transfers of all layers
    jobs: tuple[tuple[int, int, int], ...]  # of vLLM in a step: layers, page, blocks
    counted: int  # layers of the caches whose calls are counted
    formats: tuple[int, ...] = ()  # of LMCache; none: all


_JOBS = tuple(
    (layers, page, blocks)
    for layers, page in ((32, 64 * KB), (1, 2 << 20), (32, 8 * KB))
    for blocks in (6, 256)
)
INTEGRATION_PRESETS: Mapping[str, IntegrationPreset] = {
    "full": IntegrationPreset(
        32,
        (32 * MB, 1 * MB),
        1000,
        (64 * KB, 8 * KB),
        256 * MB,
        _JOBS,
        32,
    ),
    "tiny": IntegrationPreset(
        2,
        (128 * KB,),
        8,
        (512,),
        512 * KB,
        ((2, 512, 4), (1, 2048, 2)),
        2,
        (0, 1, 4, 6, 8, 12, 16, 17),
    ),
}


class IntegrationBench(Bench):
    """The device, what times it, and which releases of engines are installed."""

    def __init__(self, device: torch.device, preset: str) -> None:
        of_loops = HOST_PRESETS[preset]
        most = {"repeats": _REPEATS, "loop_seconds": _LOOP, "seconds": _ROUNDS}
        fewer = {name: min(getattr(of_loops, name), limit) for name, limit in most.items()}
        super().__init__(device, replace(of_loops, **fewer))
        self.sizes = INTEGRATION_PRESETS[preset]
        self.absent = {}
        self.installed: dict[str, str] = {}

    @property
    def releases(self) -> dict[str, str]:
        """Return the release of each engine whose own code is measured, by name."""
        return self.installed

    def memory(self, nbytes: int, on_host: bool, salt: int | None = None) -> torch.Tensor:
        """Return bytes that name their places, or poison, as uint8.

        On the host they are pinned if there is an accelerator.
        """
        if on_host and self.device.type != "cpu":
            made = pinned.empty(nbytes, torch.uint8)
        else:
            made = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if salt is None:
            return made.fill_(POISON)
        fill(made.view(torch.int64), salt)
        return made


# --- Bytes ----------------------------------------------------------------------------------------


class Side(NamedTuple):
    """Tensors of one side, and which of their rows a transfer touches."""

    tensors: list[torch.Tensor]
    layout: str  # of each tensor; after "|" if there are several
    shape: Shape
    rows: torch.Tensor  # slots, int64 on the host
    only: slice  # the planes that are touched

    @classmethod
    def make(
        cls,
        bench: IntegrationBench,
        layout: str,
        shape: Shape,
        seed: int | None,
        *,
        tensors: int = 1,
        on_host: bool = False,
        salt: int | None = None,
        only: slice = slice(None),
    ) -> Side:
        """Return memory for so many tensors.

        It holds poison, or with a ``salt`` bytes that name their places. A ``seed`` draws the
        blocks; else they are in order.
        """
        extents = sizes(layout, shape, shape.blocks, shape.block_size)
        dtype = shape.torch_dtype
        nbytes = prod(extents) * dtype.itemsize
        made = [bench.memory(nbytes, on_host, salt and salt + 7 * n) for n in range(tensors)]
        blocks = torch.arange(shape.blocks)
        if seed is not None:
            blocks = torch.randperm(shape.blocks, generator=torch.Generator().manual_seed(seed))
        rows = (blocks[:, None] * shape.block_size + torch.arange(shape.block_size)).flatten()
        views = [each.view(dtype).view(extents) for each in made]
        return cls(views, layout, shape, rows[: shape.tokens], only)

    @property
    def payload(self) -> int:
        touched = len(range(self.shape.layers * self.shape.kv)[self.only])
        return touched * self.shape.tokens * self.shape.row_bytes

    def places(
        self, device: torch.device, tensors: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return the planes that are touched, and where in them each row is."""
        shape = self.shape
        size = self.shape.block_size
        at = self.rows // size, self.rows % size
        if "(block token)" in self.layout:
            shape = replace(shape, tokens=shape.slots)
            at = (torch.zeros_like(self.rows), self.rows)
        touched = planes(tensors if "|" in self.layout else tensors[0], self.layout, shape)
        return touched[self.only], tuple(each.to(device) for each in at)


class Sides(NamedTuple):
    """Hold the memory of one transfer, and check its bytes."""

    bench: IntegrationBench
    source: Side
    target: Side

    def poison(self, i: int = 0) -> None:
        self.bench.module.synchronize()
        for each in self.target.tensors:
            each.view(torch.uint8).fill_(POISON)
        self.bench.module.synchronize()

    def right(self, i: int = 0) -> bool:
        """Return whether the target holds the source's rows and poison elsewhere, every byte.

        Overwrite those rows if they are on the device.
        """
        self.bench.module.synchronize()
        device = self.bench.device
        copies = [[x.to(device) for x in side.tensors] for side in (self.source, self.target)]
        src, out_of = self.source.places(device, copies[0])
        dst, into = self.target.places(device, copies[1])
        same = moved(src, out_of, dst, into)
        return bool(same) and all(bool((x.view(torch.uint8) == POISON).all()) for x in copies[1])


def memcpy(bench: IntegrationBench, payload: int, op: str, to_host: bool) -> Variant:
    """Return one plain copy of as many bytes between device and host, or inside the device."""
    source, target = turned(op, bench.memory(payload, False), bench.memory(payload, to_host))
    fill(source.view(torch.int64), 1)

    def right(i: int) -> bool:
        bench.module.synchronize()
        return torch.equal(*(each.to(bench.device) for each in (target, source)))

    fields = {"backend": MEMCPY, "op": op}
    poison = partial(target.fill_, POISON)
    return Variant(fields, lambda i: plain_copy(target, source), lambda i: poison(), right)


def turned(op: str, device: T, other: T) -> tuple[T, T]:
    """Return the source and the destination out of the device's side and the other side."""
    return (device, other) if op == "d2h" else (other, device)


def addresses(tensors: Iterable[torch.Tensor], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return the start addresses of tensors, on the host."""
    return torch.tensor([each.data_ptr() for each in tensors], dtype=dtype)


# --- Measuring ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One transfer of an engine, and the ways to carry it out."""

    labels: Row  # ``shape``, and what else identifies it
    op: str  # d2h or h2d
    payload: int
    methods: list[Variant]
    on_host: bool = True  # one side is host memory
    streams: bool = False  # methods use separate streams: the host's clock times them
    busy: bool = False  # each call follows one of its kind, as in a serving engine


def labels(name: str, op: str, engine: str) -> Row:
    """Return the fields that distinguish one method from others; an engine's own is a peer."""
    return {"backend": name, "op": op, **({"peer": engine} if name == OWN else {})}


def case(
    bench: IntegrationBench,
    engine: str,
    fields: Row,
    op: str,
    device: Side,
    other: Side,
    makes: Mapping[str, Callable[[], Call]],
) -> Case:
    """Return methods by name, each made by its first call."""
    sides = Sides(bench, *turned(op, device, other))
    methods = []
    for name, make in makes.items():
        move = partial(_first_made, cache(make))
        methods.append(Variant(labels(name, op, engine), move, sides.poison, sides.right))
    return Case(fields, op, device.payload, methods, other.tensors[0].is_cpu)


def _first_made(make: Callable[[], Call], i: int) -> None:
    make()()


class PlannedCase(NamedTuple):
    """A case to measure, made when it is due."""

    name: str
    make: Callable[[], Case]
    alongside: bool = False  # also measured while loops of compute run
    late: bool = False  # comes after those


def steps(bench: IntegrationBench, part: str, planned: Iterable[PlannedCase]) -> Iterator[Step]:
    """Yield a step for each case; then one for each loop alongside the cases that request it, and
    late cases."""
    alone = bench.device.type == "cpu"
    if alone:
        bench.left_out.append(f"{part}: alongside a loop: there is no accelerator that computes")
    cases = [*planned]
    of_cases = [(one.late, (one.name, partial(_measure, bench, part, one))) for one in cases]
    yield from (step for late, step in of_cases if not late)
    for one, loop in product(cases, () if alone else LOOPS):
        if one.alongside:
            yield f"{one.name}, alongside {loop}", partial(_alongside, bench, part, one, loop)
    yield from (step for late, step in of_cases if late)


def _measure(bench: IntegrationBench, part: str, planned: PlannedCase) -> Rows:
    case = planned.make()
    methods = harness.usable(case.methods, f"{part}: {planned.name}", bench.left_out)
    if not methods:
        return []
    ceiling = memcpy(bench, case.payload, case.op, case.on_host)
    timer = bench.host_timer if case.streams else bench.timer
    if case.busy:
        timer = bench.busy_timer
    measurements = bench.measure(ceiling, methods, case.payload, timer)
    fields = {
        "kind": "plug_copy",
        **case.labels,
        "payload_bytes": case.payload,
        "timer": timer.name,
    }
    rows = [{**fields, **one.labels, **one.row(case.payload)} for one in measurements]
    compare(rows)
    return rows


def compare(rows: Rows) -> None:
    """Write into PortaKV's rows ``of_own``, ``host_of_own`` and ``whole_of_own``: its time, the
    host's part of it and both together / those of the engine's own code."""
    for own, row in product(having(rows, backend=OWN), having(rows, backend=OURS)):
        if own["verified"]:
            row["of_own"] = short(row["p50_us"] / own["p50_us"])
            row["host_of_own"] = short(row["host_us"] / own["host_us"])
            row["whole_of_own"] = short(_whole(row) / _whole(own))


def _whole(row: Row) -> float:
    """Return the microseconds of a call and its copy, one after the other."""
    return float(row["p50_us"] + (row["host_us"] if row["host_hidden"] else 0.0))


def medians(rows: Rows) -> Rows:
    """Return a row for each engine.

    It holds the median of ``of_own`` over its cases, except for those in ``aside``.
    """
    figures = []
    for part in harness.grouped(having(rows, kind="plug_copy", backend=OURS), "part"):
        known = [row for row in part if "of_own" in row and not row.get("aside")]
        if known:
            figure = short(median(row["of_own"] for row in known))
            fields = {"part": known[0]["part"], "backend": OURS, "shape": f"{len(known)} cases"}
            right = all(row["verified"] for row in known)
            figures.append({"kind": "plug_median", **fields, "of_own": figure, "verified": right})
    return figures


def _alongside(bench: IntegrationBench, part: str, planned: PlannedCase, loop: str) -> Rows:
    case = planned.make()
    methods = [memcpy(bench, case.payload, case.op, case.on_host), *case.methods]
    traffic = [Traffic(one, case.payload, **case.labels) for one in methods]
    meeting = interference.Meeting(
        bench, loop, traffic_sources.DEFAULT, case.op, f"{part}: {planned.name}, "
    )
    names = {MEMCPY, OWN, OURS}
    rows = meeting.rows(lambda *_: traffic, bench.preset.repeats, names)
    for own, row in product(having(rows, backend=OWN), having(rows, backend=OURS)):
        row["over_own"] = round(row["slowdown_pct"] - own["slowdown_pct"], 2)
        row["over_noise"] = round(row["over_own"] - noise(rows), 2)
        row["link_to_own"] = short(row["link_gb_per_s"] / own["link_gb_per_s"])
    return [{**row, "kind": "plug_interference"} for row in rows]


def noise(rows: Rows) -> float:
    """Return the points of slow-down that mean nothing.

    They are the distance of repeats alongside a memcpy or the engine's own code, or the points by
    which the loop was ever faster alongside something.
    """
    slowdowns = {row["backend"]: row["slowdowns_pct"] for row in rows}
    apart = [max(x) - min(x) for name, x in slowdowns.items() if name != OURS]
    return float(max(*apart, *(-min(x) for x in slowdowns.values())))
