# SPDX-License-Identifier: Apache-2.0
"""Measure block stores whose blocks are raw, packed, or as a store chooses, in turns: saves and
loads by the wall clock, and how many blocks the same bytes of a tier hold.

Random bits cannot be packed: there a store that chooses should cost nothing. A second raw store
shows by how much two equal stores differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from portakv import TransferError
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore, FormStore
from portakv.storage.tiers.disk import Disk
from portakv.storage.tiers.remote import Remote
from portakv_benchmarks.encodings.suite import Case, EncodingBench, Memory
from portakv_benchmarks.host.suite import MB
from portakv_benchmarks.shared.harness import Row, Rows, Step, having, short
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import Method, Trials, timed

LIMIT = 120.0  # seconds of a call, which hangs then
RAW = "raw"
AUTO = "auto"
PACK = "pack"
ANOTHER = "a second raw store"
NORMAL = "normal bits"
RANDOM = "random bits"
METHODS = {NORMAL: (RAW, AUTO, PACK), RANDOM: (RAW, AUTO, ANOTHER)}
HOST = "host tier"
DISK = "disk"
BUCKET = "bucket"
#: Seconds before each trial, as of the benchmark of disks.
PAUSE = 0.3
#: How many times as many rounds there are in host memory, where a call takes a few milliseconds:
#: medians of nine differ by 3 % for two equal stores.
ROUNDS = 5
#: How many times as many blocks are saved as a tier holds.
OVER = 2
#: Blocks that are saved together there.
FEW = 10
#: Layers of these blocks, at most: with 256 KiB the header of an image counts.
FEW_LAYERS = 4


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        moved: bytes of raw rows in one save or load.
        held: the raw blocks that a tier has room for.
    """

    moved: int
    held: int


FULL = Sizes(256 * MB, 200)
#: On a CPU, where packing has no target.
ON_CPU = Sizes(4 * MB, 200)
TINY = Sizes(1 * MB, 40)


def stored_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for each place and kind of rows."""
    sizes = sizes_of(bench)
    case = bench.sizes.linked[0]
    for bits in METHODS:
        for place in (HOST, DISK):
            yield f"{place}, {bits}", partial(_measure, bench, case, sizes.moved, bits, place)


def held_steps(bench: EncodingBench) -> Iterator[Step]:
    """Yield a step for what tiers hold."""
    held = sizes_of(bench).held
    yield "blocks in the same bytes", partial(_held, bench, bench.sizes.linked[0], held)


def sizes_of(bench: EncodingBench) -> Sizes:
    """Return how much is measured on a device."""
    if bench.sizes.rounds == 1:
        return TINY
    return ON_CPU if bench.device.type == "cpu" else FULL


class Stored:
    """A store, and the rows that it saves and loads.

    Args:
        memory: the rows.
        method: how the store keeps blocks.
        terms: of the store.
    """

    def __init__(self, memory: Memory, method: str, **terms: Any) -> None:
        self.memory = memory
        self.blocks = memory.order.tolist()
        self.chosen = ""
        view = memory.case.view(memory.rows)
        raw = BlockForm.of(view, "bench")
        forms: Any = raw
        if method == PACK:
            forms = {PACK: BlockForm.of(view, "bench", encoding=PACK), RAW: raw}
        elif method == AUTO:
            terms["encoding"] = AUTO
        self.store = BlockStore(forms, full="wait", **terms)
        self.of_form: BlockStore | FormStore = self.store
        if method == PACK:
            self.of_form = self.store.of(PACK)
        self._numbers = count(1)
        self.keys = list[bytes]()

    def __enter__(self) -> Stored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.store.close()

    def name_blocks(self) -> None:
        """Choose new keys, so that the next save stores all blocks."""
        self.keys = [next(self._numbers).to_bytes(32, "big") for _ in self.blocks]

    def save(self) -> None:
        """Save all blocks."""
        view = self.memory.case.view(self.memory.rows)
        handle = self.of_form.save(view, self.blocks, self.keys)
        handle.synchronize(LIMIT)
        self.chosen = handle.form

    def save_in_order(self) -> None:
        """Save all blocks a few at a time, until one has no room: workers that save many at the
        same time may store later blocks first."""
        view = self.memory.case.view(self.memory.rows)
        for first in range(0, len(self.blocks), FEW):
            some = slice(first, first + FEW)
            after = self.keys[first - 1] if first else None
            handle = self.of_form.save(view, self.blocks[some], self.keys[some], after=after)
            handle.synchronize(LIMIT)

    def save_new(self) -> None:
        """Save all blocks under new keys."""
        self.name_blocks()
        self.save()

    def load(self) -> None:
        """Load all blocks."""
        view = self.memory.case.view(self.memory.written)
        self.of_form.load(view, self.blocks, self.keys).synchronize(LIMIT)

    def loaded_right(self) -> bool:
        """Return whether a load, into rows that hold nothing, brings every byte."""
        self.memory.poison()
        self.load()
        return self.memory.right(self.memory.blocks)


def rows_of(bench: EncodingBench, case: Case, nbytes: int, bits: str) -> Memory:
    """Return rows of a kind."""
    memory = Memory(case, nbytes, bench.device)
    if bits == RANDOM:
        memory.rows.view(torch.int16).random_()
    return memory


def terms_of(place: str, nbytes: int, folder: Path) -> dict[str, Any]:
    """Return the terms of a store whose blocks are in a place.

    A disk holds the blocks of two saves, so that later saves replace blocks, as in a full tier.
    """
    room = nbytes + nbytes // 4  # images have headers
    if place == HOST:
        return {"staging": 2 * room, "host": room}
    return {"staging": 4 * room, "tiers": [Disk(folder, capacity=2 * room)]}


def _measure(bench: EncodingBench, case: Case, nbytes: int, bits: str, place: str) -> Rows:
    """Return the rows of saves and loads of each method."""
    memory = rows_of(bench, case, nbytes, bits)
    payload = memory.blocks * case.block_bytes
    few = bench.sizes.rounds
    on_disk = place == DISK
    rounds = few if on_disk or few == 1 else few * ROUNDS
    trials = Trials(rounds, PAUSE if on_disk and few > 1 else 0.0, bench.left_out)
    rows: Rows = []
    with ExitStack() as stack:
        stores = dict[str, Stored]()
        for number, method in enumerate(METHODS[bits]):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / str(number)
            terms = terms_of(place, nbytes, folder)
            stores[method] = stack.enter_context(Stored(memory, method, **terms))
        for op in ("save", "load"):
            fields: Row = {
                "kind": "encoding_store",
                "shape": f"{bits}, {place}",
                "bits": bits,
                "tier": place,
                "op": op,
                "code_bits": case.bits,
            }
            methods = [_method(bench, name, store, op) for name, store in stores.items()]
            made = trials.rows(fields, payload, methods, {"of_raw": RAW})
            for row in made:
                row["form"] = stores[row["backend"]].chosen or RAW
            _compare_with_equals(made)
            rows += made
    return rows


def _compare_with_equals(rows: Rows) -> None:
    """Add the rate of the store that chooses, of the slower of two raw stores: equal stores differ
    by several percent on a disk."""
    rates = {row["backend"]: row["gb_per_s"] for row in rows}
    for row in having(rows, backend=AUTO):
        if ANOTHER in rates:
            row["of_raws"] = short(rates[AUTO] / min(rates[RAW], rates[ANOTHER]))


def _method(bench: EncodingBench, name: str, store: Stored, op: str) -> Method:
    """Return saves under new keys, or loads of blocks that were saved just before."""

    def ended(call: Callable[[], None]) -> None:
        call()
        if bench.device.type != "cpu":
            bench.module.synchronize()

    if op == "save":
        run = partial(timed, partial(ended, store.save))
        return Method(name, run, store.name_blocks, store.loaded_right)
    run = partial(timed, partial(ended, store.load))
    return Method(name, run, store.save_new, store.loaded_right)


def _held(bench: EncodingBench, case: Case, blocks: int) -> Rows:
    """Return how many blocks each tier holds in the bytes of so many raw ones."""
    case = replace(case, layers=min(case.layers, FEW_LAYERS))
    memory = rows_of(bench, case, OVER * blocks * case.block_bytes, NORMAL)
    nbytes = blocks * BlockForm.of(case.view(memory.rows), "bench").image_bytes
    rows: Rows = []
    for tier in (HOST, DISK, BUCKET):
        held = {method: _blocks_held(memory, method, tier, nbytes) for method in (RAW, PACK)}
        for method, (number, right) in held.items():
            rows.append(
                {
                    "kind": "encoding_capacity",
                    "shape": f"{in_words(nbytes)}, {tier}",
                    "tier": tier,
                    "backend": method,
                    "code_bits": case.bits,
                    "block_bytes": case.block_bytes,
                    "tier_bytes": nbytes,
                    "blocks": short(number),
                    "verified": right,
                }
            )
        (packed,) = having(rows, tier=tier, backend=PACK)
        packed["of_raw"] = short(held[PACK][0] / held[RAW][0])
    return rows


def _blocks_held(memory: Memory, method: str, tier: str, nbytes: int) -> tuple[float, bool]:
    """Return how many blocks a tier holds in so many bytes, and whether they are right.

    A save evicts none of its earlier blocks, so the blocks in front are those that fit. A bucket
    has no bound: there the bytes of all objects count.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tier"
        terms: dict[str, Any] = {"staging": 3 * nbytes}
        if tier == HOST:
            terms["host"] = nbytes
        elif tier == DISK:
            terms["tiers"] = [Disk(folder, capacity=nbytes)]
        else:
            folder.mkdir(mode=0o700)
            terms["tiers"] = [Remote(f"file://{folder}")]
        with Stored(memory, method, **terms) as stored:
            stored.name_blocks()
            with suppress(TransferError):  # blocks without room
                stored.save_in_order()
            present = stored.of_form.lookup(stored.keys)
            view = memory.case.view(memory.written)
            memory.poison()
            loaded = stored.of_form.load(view, stored.blocks[:present], stored.keys[:present])
            loaded.synchronize(LIMIT)
            right = present > 0 and memory.right(present)
        if tier != BUCKET:
            return present, right
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return present * nbytes / written, right
