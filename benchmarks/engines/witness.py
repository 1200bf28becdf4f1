# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of a witness: in one engine in turns with and without it, and of its parts.

    python -m portakv_benchmarks.engines.witness FOLDER [--model tiny] [--parts ...] [--out FILE]
    python -m portakv_benchmarks.engines.witness --table FILE

The part ``engine`` serves prompts through a connector alone, through the same connector with a
witness that checks a sample of the blocks, and with one that checks all of them. Each has a
separate store. Tokens must be equal. A third witness computes wrong blocks again: one byte of each
loaded block is flipped. The other parts need no engine: they time what the host does in each step.
``--table`` prints the tables of benchmarks/notes/engines.md from a result.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, product
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.integrations.vllm.notes import BlockNotes
from portakv.serving import Group
from portakv.witness import Witness
from portakv.witness.fingerprint import Geometry
from portakv.witness.table import Ring, Table
from portakv_benchmarks.cli import RESULT_FORMAT, describe
from portakv_benchmarks.engines.models import MODELS
from portakv_benchmarks.shared.harness import Row, Rows, short

PARTS = ("notes", "table", "rates", "engine")
#: Sizes of a step: requests that fill a block each, and a long load.
BLOCKS = (8, 256)
#: Parts of the blocks that are chosen.
RATES = (1 / 64, 1 / 16, 1 / 4, 1)
#: Bytes of a table, which knows 21,000 blocks of Llama-3-8B.
TABLE_BYTES = 256 << 20
REPEATS = 200
KEY_BYTES = 32
#: A fingerprint of a block of Llama-3-8B.
LLAMA = Geometry(layers=32, kv=2, heads=8, segments=16, tokens=1, unit=8, widths=(256, 256))


def _microseconds(call: Callable[[], object], before: Callable[[], object]) -> float:
    """Return the median time of a call, each after a preparation that is not timed."""
    times = list[float]()
    for _ in range(REPEATS):
        before()
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return short(1e6 * median(times))


# --- without an engine


def measure_table() -> Rows:
    """Return the time of the table for a step's blocks: new and known ones, empty and full."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for memory, path in (("memory", None), ("file", Path(folder) / "fingerprints")):
            table = Table({"": LLAMA}, TABLE_BYTES, path)
            ring = table.rings[""]
            for state in ("empty", "full"):
                if state == "full":
                    _fill(ring, table.slots)
                for many in BLOCKS:
                    row = {"kind": "witness_table", "table": state, "file": path is not None}
                    rows += [row | each for each in _times_of_ring(ring, many)]
            del ring
            table.close()
            print(f"table in {memory} ends", flush=True)
    return rows


_numbers = count()


def _keys(many: int) -> list[bytes]:
    """Return keys that no one has used."""
    return [next(_numbers).to_bytes(KEY_BYTES, "little") for _ in range(many)]


def _sums(many: int) -> Any:
    return np.random.default_rng(next(_numbers)).integers(1, 1 << 62, (many, LLAMA.count))


def _fill(ring: Ring, slots: int) -> None:
    """Add new keys until each slot has one."""
    sums = _sums(BLOCKS[-1])
    for _ in range(-(-slots // len(sums)) + 1):
        ring.add(_keys(len(sums)), range(len(sums)), sums)


def _times_of_ring(ring: Ring, many: int) -> Iterator[Row]:
    """Yield the time of new blocks, of known ones, and of the comparison of a load."""
    blocks = [*range(many)]
    sums = _sums(many)
    keys = list[bytes]()

    def draw() -> None:
        keys[:] = _keys(many)

    def add() -> None:
        ring.forget(blocks)
        ring.add(keys, blocks, sums)

    new = _microseconds(add, draw)
    known = _microseconds(add, lambda: None)
    heads = sums[:, : LLAMA.head_sums]
    assert all(ring.agree(keys, heads))
    compared = _microseconds(lambda: ring.agree(keys, heads), lambda: None)
    for op, took in (("new blocks", new), ("known blocks", known), ("a load", compared)):
        yield {"op": op, "blocks": many, "us": took}


def measure_rates() -> Rows:
    """Return the time of all that a step's new blocks take, by the rate of a sample. The cache is
    so small that its sums take little."""
    cache = [torch.randn(2, max(BLOCKS), 16, 2, 8) for _ in range(2)]
    view = KVView(cache, "layer | kv block token head dim")
    rows: Rows = []
    for rate, many in product(RATES, BLOCKS):
        witness = Witness(view, check="sample", rate=rate, nbytes=1 << 20)
        keys = list[bytes]()

        def draw(keys: list[bytes] = keys, many: int = many) -> None:
            keys[:] = [os.urandom(KEY_BYTES) for _ in range(many)]  # chosen as hashes are

        def store(witness: Witness = witness, keys: list[bytes] = keys) -> None:
            witness.stored([*range(len(keys))], keys)
            witness.settle(wait=True)

        took = _microseconds(store, draw)
        rows.append({"kind": "witness_rate", "rate": rate, "blocks": many, "us": took})
    return rows


def measure_notes() -> Rows:
    """Return the time of the scheduler's notes of a step, and of their way to workers."""
    rows: Rows = []
    for requests in BLOCKS:
        for op, made in (
            ("each ends a block", 1),
            ("within blocks", 0),
            ("new prompts of 64 blocks", 64),
        ):
            rows.append(_times_of_notes(op, made, requests))
    return rows


def _times_of_notes(op: str, blocks: int, requests: int) -> Row:
    """Return the times of a step in which each request fills so many blocks of 16 tokens."""
    notes = BlockNotes([Group(16)])
    computed = 16 if blocks else 20
    many = 16 * blocks if blocks > 1 else 1
    before = computed - many if blocks else computed
    length = 16 * (blocks + 4)
    hashes = [_keys(blocks + 4) for _ in range(requests)]
    ids = (tuple(range(blocks + 4)),)
    step = notes.take()

    def begin() -> None:
        for nth in range(requests):
            asked = SimpleNamespace(
                request_id=str(nth), num_tokens=length, block_hashes=hashes[nth]
            )
            notes.ended(str(nth))
            notes.offered(asked, 0, False)
            if blocks < 2:
                notes.scheduled(str(nth), 0, max(before, 1), ids, anew=True)
        notes.take()

    def schedule() -> None:
        nonlocal step
        for nth in range(requests):
            name = str(nth)
            if blocks > 1:
                notes.scheduled(name, 0, many, ids, anew=True)
            elif not notes.is_within_blocks(name, before, many):
                notes.scheduled(name, before, many, ((),), anew=False)
        step = notes.take()

    scheduled = _microseconds(schedule, begin)
    filled = sum(len(some.blocks) for some in step.filled.values())
    assert filled == blocks * requests, (op, filled)
    packed = pickle.dumps(step, pickle.HIGHEST_PROTOCOL)
    dumped = _microseconds(lambda: pickle.dumps(step, pickle.HIGHEST_PROTOCOL), lambda: None)
    loaded = _microseconds(lambda: pickle.loads(packed), lambda: None)
    return {
        "kind": "witness_notes",
        "op": op,
        "requests": requests,
        "blocks": filled,
        "us": scheduled,
        "pack_us": dumped,
        "unpack_us": loaded,
        "nbytes": len(packed),
    }


# --- the result


def table_of(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the tables in benchmarks/notes/engines.md."""
    rows: Rows = result["rows"]
    served: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "of_without" in row:
            tokens = f" of {row['tokens']:,} tokens" if "tokens" in row else ""
            served[str(row["op"]).replace(" prompt", f" prompt{tokens}")][str(row["check"])] = row
    lines = [
        "| of the connector alone, by the wall; processor | `sample` | `all` |",
        "|---|---|---|",
    ]
    for op, by_check in served.items():
        cells = [
            f"{by_check[check]['of_without']}; {by_check[check]['processor_of_without']}"
            for check in ("sample", "all")
        ]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    for row in rows:
        if row["kind"] == "witness_engine" and "of_new" in row:
            cell = f"{row['of_new']}; {row['processor_of_new']}"
            lines.append(f"| {row['op']}, {row['tokens']:,} tokens, of a new prompt | | {cell} |")
    for row in rows:
        if row["kind"] == "witness_host" and row["check"] == "sample":
            pair = [x for x in rows if x["kind"] == "witness_host" and x["op"] == row["op"]]
            (other,) = (x for x in pair if x["check"] == "all")
            op = f"a step of eight requests, in the hooks of {row['op']} (us)"
            lines.append(f"| {op} | {row['us']} | {other['us']} |")

    times: defaultdict[str, dict[int, Any]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "witness_notes" and row["op"] == "each ends a block":
            times["notes of the scheduler"][row["blocks"]] = row["us"]
            times["notes to a rank"][row["blocks"]] = short(row["pack_us"] + row["unpack_us"])
        if row["kind"] == "witness_table":
            place = "a file" if row["file"] else "memory"
            times[f"{row['op']}, {row['table']} table in {place}"][row["blocks"]] = row["us"]
        if row["kind"] == "witness_rate":
            times[f"new blocks of a small cache, rate {row['rate']:g}"][row["blocks"]] = row["us"]
    if times:
        heads = " | ".join(f"{many} blocks" for many in BLOCKS)
        lines += ["", f"| host time (us) | {heads} |", f"|---|{'---|' * len(BLOCKS)}"]
    for op, by_blocks in times.items():
        lines.append(f"| {op} | {' | '.join(str(by_blocks[many]) for many in BLOCKS)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure parts and write a result, or print the table of one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for the model's files")
    parser.add_argument("--model", choices=[*MODELS], default="tiny")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=12, help="pairs of each measurement")
    parser.add_argument("--out", type=Path, help="the file for the result")
    parser.add_argument("--note", default="", help="a sentence about the machine")
    parser.add_argument("--table", type=Path, help="print the table of this result")
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(*table_of(json.loads(args.table.read_text())), sep="\n")
        return 0
    if args.folder is None:
        parser.error("Expected a folder. Pass one for the model's files.")

    rows: Rows = []
    if "notes" in args.parts:
        rows += measure_notes()
    if "table" in args.parts:
        rows += measure_table()
    if "rates" in args.parts:
        rows += measure_rates()
    releases = dict[str, Any]()
    if "engine" in args.parts:
        from portakv_benchmarks.engines.witness_turns import measure_engine

        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            rows += measure_engine(MODELS[args.model], Path(place), args.rounds)
        import vllm

        releases["vllm"] = vllm.__version__
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "format": RESULT_FORMAT,
        "suite": "engines",
        "name": args.out.stem if args.out else "witness",
        "machine": {**describe(device), **releases, "load": short(os.getloadavg()[0])},
        "asked": {"parts": [*args.parts], "model": args.model, "rounds": args.rounds},
        "note": args.note,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    # The engine imports `turns` by its name; the turn must be the same variable there and here.
    from portakv_benchmarks.engines import witness as this

    code = this.main()
    os._exit(code)  # an engine in this process ends slowly
