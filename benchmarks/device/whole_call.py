# SPDX-License-Identifier: Apache-2.0
"""Measure copies inside a device by the wall clock, in turns with `copy_` of the same bytes.

A call is timed from its beginning on an idle device until the host sees its end. The caches are
registered, and the slots are an `Index` that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from portakv.cli.sides import Shape, load_shapes
from portakv_benchmarks.device.suite import (
    COMPILING,
    accepted_backends,
    ceiling,
    connector_methods,
    relate_copies,
)
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.host.suite import Bench
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Step
from portakv_benchmarks.shared.shapes import in_words

_INDEX = "random"


def inside_steps(bench: Bench) -> Iterator[Step]:
    """Yield a step for each shape and number of tokens of the preset."""
    shapes = load_shapes()
    for name, tokens in bench.preset.inside:
        shape = replace(shapes[name], tokens=tokens)
        place = f"{name}, {tokens} tokens, {in_words(shape.payload)}"
        yield f"wall clock: inside, {place}", partial(_measure, bench, shape)


def _measure(bench: Bench, shape: Shape) -> Rows:
    work = Workload(shape, "apart", bench.device, shape.objects)
    backends = [
        name for name in accepted_backends(bench.device) if shape.compiled or name not in COMPILING
    ]
    variants = [one for name in backends for one in connector_methods(work, name, _INDEX)]
    good = harness.usable(variants, shape.name, bench.left_out)
    timer = bench.busy_timer
    limits = shape.objects, bench.preset.rounds(shape.payload), bench.preset.seconds
    measured = harness.measure(ceiling(work), good, timer, *limits)
    rows = [_row(shape, timer.name, one) for one in measured]
    for direction in ("gather", "scatter"):
        relate_copies(harness.having(rows, op=direction))
    return rows


def _row(shape: Shape, timer: str, one: harness.Measured) -> Row:
    return {
        "kind": "wall_inside",
        "shape": shape.name,
        **one.labels,
        "row_bytes": shape.row_bytes,
        "tokens": shape.tokens,
        "payload_bytes": shape.payload,
        **one.row(2 * shape.payload),
        "timer": timer,
    }
