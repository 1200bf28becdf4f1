# SPDX-License-Identifier: Apache-2.0
"""Measure pulls through staging buffers, packed, raw and as the owner chooses, in turns, between
two processes.

The transports are slower than packing: gloo through host buffers on one device, and between two
devices NCCL over sockets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from portakv import Unsupported
from portakv_benchmarks.encodings.suite import EncodingBench
from portakv_benchmarks.host.suite import KB
from portakv_benchmarks.shared.harness import Row, Rows, Step, short
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import Sample, Trials

if TYPE_CHECKING:
    from portakv_benchmarks.migration.moved import Two
    from portakv_benchmarks.migration.suite import MigrationBench

#: The case of `migration.cases` whose values are as caches have them.
LIKE_CACHES = "values as in caches"
#: Keep NCCL away from NVLink and shared memory.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
RAW = "raw"
#: The raw pulls measure the transport, whose rate the owner chooses by.
METHODS = (RAW, "pack", "auto")
#: Payload on a CPU, where packing has no target.
LITTLE = 256 * KB


def transport_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each transport that can be used here."""
    try:
        migration = import_module("portakv_benchmarks.migration.suite")
        import_module("portakv_benchmarks.migration.moved")
    except ImportError as error:
        raise Unsupported("Pulls through staging buffers", str(error)) from None
    if getattr(bench.module, "EMULATED", False):
        why = "the second process does not have a device that is emulated in this one"
        raise Unsupported("Pulls through staging buffers", why)
    yield "gloo", partial(_measure, bench, migration, "gloo")
    if bench.device.type != "cpu" and bench.module.device_count() > 1:
        yield "NCCL over sockets", partial(_measure, bench, migration, "NCCL over sockets")


def _measure(bench: EncodingBench, migration: Any, transport: str) -> Rows:
    """Return the rows of both methods for each payload."""
    pair: MigrationBench = migration.MigrationBench(
        bench.device, migration.MIGRATION_PRESETS["full"]
    )
    pair.environment = SOCKETS
    pair.trials = Trials(bench.sizes.rounds, 0.0, bench.left_out)
    if transport == "gloo":
        pair.there = bench.device  # nccl does not serve two processes on one device
    sizes = bench.sizes.sent if pair.on else (LITTLE,)
    rows: Rows = []
    moved = import_module("portakv_benchmarks.migration.moved")
    with moved.two(pair) as sides:
        terms = {"expose": "staging", "transport": "distributed"}
        dense = sides.owner.do("give", LIKE_CACHES, max(sizes), **terms)
        sides.reader.do("take", LIKE_CACHES, max(sizes), dense, transport="distributed")
        for nbytes in sizes:
            rows += _rows(pair, sides, transport, nbytes)
    return rows


def _rows(pair: MigrationBench, sides: Two, transport: str, nbytes: int) -> Rows:
    """Return a row for the pulls of each method, of so many bytes."""
    ticket = sides.owner.do("offer", nbytes)
    wire = dict[str, int]()

    def pull(name: str) -> Sample:
        encoding = "" if name == RAW else name
        began, ended = sides.reader.do("timed", "pull", nbytes, ticket, encoding=encoding)
        wire[name] = sides.reader.do("crossed")
        return Sample(ended - began, 0.0)

    methods = [sides.method(name, partial(pull, name), nbytes) for name in METHODS]
    fields: Row = {"kind": "encoding_transport", "shape": transport, "op": in_words(nbytes)}
    payload = sides.reader.do("payload", nbytes)
    rows = pair.compared(fields, payload, methods, {"of_raw": RAW})
    for row in rows:
        row["code_bits"] = 4
        row["payload_bytes"] = payload
        row["wire_bytes"] = wire[row["backend"]]
        row["payload_to_wire"] = short(payload / row["wire_bytes"])
    return rows
