# SPDX-License-Identifier: Apache-2.0
"""The contract of a tier of a block store: `portakv.storage.tiers.base`.

Every check gets a `Tiers`, which makes the tier in a separate folder and opens it for forms, as a
`BlockStore` does. Blocks are sealed and verified here, past the tier, so that a tier that returns
wrong bytes as right is found.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.storage import image, reasons
from portakv.storage.form import BlockForm
from portakv.storage.memory import Rows
from portakv.storage.reasons import Reason
from portakv.storage.work import Graph
from portakv_conformance.contract.runner import expect, run_threads
from portakv_conformance.draw.arrangement import Keywords

Bytes = npt.NDArray[np.uint8]
#: The byte of rows that no read has written.
_UNREAD = 0x5A
_KINDS = {
    reasons.DAMAGED,
    reasons.UNREACHABLE,
    reasons.REFUSED,
    reasons.EVICTED,
    reasons.MISSING,
    reasons.LATE,
    reasons.DROPPED,
}


def _form(**other: object) -> BlockForm:
    """Return a form of four layers and two heads with 2,048 bytes of payload in each segment."""
    fields: Keywords = {
        "model": "contract/model@1",
        "dtype": "float16",
        "kv": 2,
        "widths": (32, 32),
        "block_size": 16,
        "layers": (0, 4, 4),
        "heads": (0, 2, 2),
        "layout": "block layer head kv token dim",
    }
    return BlockForm(**{**fields, **other})


FORM = _form()
#: Blocks of 1 MiB in several segments.
LARGE = _form(block_size=1024)
#: The same cache, of which another rank stores one head.
HALF = _form(heads=(0, 1, 2))
#: Another model: nothing of it may come for `FORM`.
STRANGER = replace(FORM, model="contract/other@1")


def _key(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def _checksums(rows: Bytes, form: BlockForm) -> list[tuple[int, ...]]:
    """Return the checksums in the headers of sealed images."""
    heads = [image.header(row, form) for row in rows]
    return [head.checksums for head in heads if not isinstance(head, str)]


class Opened:
    """A tier that is open for some forms, and what its stores reported."""

    def __init__(self, tier: Any, folder: Path, forms: Sequence[BlockForm], own: int = 1) -> None:
        self.graph = Graph()
        size = max(form.image_bytes for form in forms)
        self.rows = Rows([size], 64 * size, 0, pin=False)
        self.reports: list[tuple[bytes, Reason]] = []
        self._lock = threading.Lock()
        try:
            # As a store does: a tier of an earlier release opens one form.
            several = [own] if own > 1 else []
            self.stores = list(tier.open(self.graph, self.rows, list(forms), *several))
        except BaseException:  # any failure to open, or Ctrl-C: the graph's threads must end
            self.graph.close()
            raise
        self.own = self.stores[0]

    def report(self, key: bytes, reason: Reason) -> None:
        """Note a reason, as the caller of a read or write does."""
        with self._lock:
            self.reports.append((key, reason))

    def seal(self, keys: Sequence[bytes], form: BlockForm = FORM, generation: int = 1) -> Bytes:
        """Return images of random payloads that a key decides, uint8 ``[keys, image bytes]``."""
        rows = np.zeros((len(keys), form.image_bytes), np.uint8)
        for row, key in zip(rows, keys, strict=True):
            seed = int.from_bytes(key[:8], "little") ^ int.from_bytes(form.digest[:4], "little")
            row[image.HEADER :] = np.frombuffer(
                np.random.default_rng(seed).bytes(form.image_bytes - image.HEADER), np.uint8
            )
            image.seal(row, form, key, generation)
        return rows

    def write(
        self, keys: Sequence[bytes], form: BlockForm = FORM, generation: int = 1, evict: bool = True
    ) -> list[bool]:
        """Write blocks as a save does; return which are there now."""
        rows = self.seal(keys, form, generation)
        checksums = _checksums(rows, form)
        place = self.own.queue_for_write(len(keys) * form.image_bytes)
        order = {key: number for number, key in enumerate(keys)}
        generations = [generation] * len(keys)
        known = (generations, checksums, order, evict)
        landed = self.own.write(place, list(keys), [*rows], *known, report=self.report)
        return [bool(each) for each in landed]

    def read(
        self,
        keys: Sequence[bytes],
        segments: Sequence[int] | None = None,
        stop: Callable[[], bool] = bool,
        store: Any = None,
    ) -> tuple[list[bool], Bytes]:
        """Read blocks as a load does; return which came, and the rows."""
        store = store or self.own
        rows = self.rows.array[: len(keys)]
        rows[:] = _UNREAD
        landed = store.read(list(keys), [*rows], segments, stop, self.report)
        expect(len(landed) == len(keys), "a read returned another number of blocks")
        return [bool(each) for each in landed], rows

    def expect_right(
        self,
        keys: Sequence[bytes],
        landed: Sequence[bool],
        rows: Bytes,
        segments: Sequence[int] | None = None,
        form: BlockForm = FORM,
    ) -> None:
        """Expect that each block that came holds the bytes of its key."""
        wanted = self.seal(keys, form)
        chosen = range(len(form.segments)) if segments is None else segments
        for number in np.flatnonzero(landed):
            for segment in chosen:
                part = form.segments[segment]
                start = image.HEADER + part.offset
                span = slice(start, start + part.nbytes)
                same = np.array_equal(rows[number, span], wanted[number, span])
                expect(same, f"block {number} was returned as right, and its bytes are wrong")

    def close(self) -> None:
        """Close the stores, the first one last, as a `BlockStore` does."""
        while self.stores:
            self.stores.pop().close()
        self.graph.close()


class Tiers:
    """Makes the tier that is checked, again and again in one folder."""

    def __init__(self, make: Callable[[Path], Any], folder: Path) -> None:
        self._make = make
        self._folder = folder / "tier"
        self._folder.mkdir()

    def make(self) -> Any:
        """Return the tier, not open."""
        return self._make(self._folder)

    @contextmanager
    def opened(self, *own: BlockForm) -> Iterator[Opened]:
        """Open the tier for forms, by default `FORM`, and for the other forms that it finds."""
        tier = self.make()
        own = own or (FORM,)
        others = [other for form in own for other in tier.forms(form)]
        forms = dict.fromkeys([*own, *others])
        opened = Opened(tier, self._folder, [*forms], len(own))
        try:
            yield opened
        finally:
            opened.close()


def check_written_blocks_come_back(tiers: Tiers, folder: Path) -> None:
    """`write` returns which blocks are there; `read` brings exactly these, in right bytes."""
    keys = [_key(number) for number in range(12)]
    with tiers.opened() as tier:
        expect(all(tier.write(keys)), "blocks of a small write are not there")
        landed, rows = tier.read(keys[::-1])
        expect(all(landed), f"{landed.count(False)} of 12 blocks did not come back")
        tier.expect_right(keys[::-1], landed, rows)


def check_missing_blocks_are_misses(tiers: Tiers, folder: Path) -> None:
    """A block that is not there is returned as not landed, wherever it stands among others."""
    keys = [_key(number) for number in range(10)]
    with tiers.opened() as tier:
        tier.write(keys[::2])
        landed, rows = tier.read(keys)
        expect(landed == [True, False] * 5, f"every second block is there, and the read: {landed}")
        tier.expect_right(keys, landed, rows)


def check_a_reason_for_each_block_that_did_not_come(tiers: Tiers, folder: Path) -> None:
    """`read` reports why for each block that did not land, once or more, and for no other."""
    keys = [_key(number) for number in range(10)]
    with tiers.opened() as tier:
        tier.write(keys[::2])
        tier.reports.clear()
        landed, _ = tier.read(keys)
        lost = {key for key, came in zip(keys, landed, strict=True) if not came}
        reported = {key for key, _ in tier.reports}
        expect(reported == lost, f"{len(lost)} blocks did not land, {len(reported)} have a reason")
        for _, reason in tier.reports:
            expect(reason.kind in _KINDS, f"the reason is {reason.kind!r}")
            expect(bool(reason.where), "the reason names no place")


def check_what_is_known(tiers: Tiers, folder: Path) -> None:
    """`has` and `known` return which blocks are there, and `wants` the others, after a write."""
    keys = [_key(number) for number in range(6)]
    with tiers.opened() as tier:
        expect(list(tier.own.wants(keys)) == [True] * 6, "an empty tier does not want blocks")
        tier.write(keys[:3])
        there = [True] * 3 + [False] * 3
        expect(list(tier.own.has(keys, 10.0)) == there, "`has` is wrong")
        expect(list(tier.own.known(keys)) == there, "`known` is wrong after `has`")
        wanted = [not each for each in there]
        expect(list(tier.own.wants(keys)) == wanted, "`wants` is wrong")
        expect(list(tier.own.has([], 10.0)) == [], "`has` of no keys")


def check_segments(tiers: Tiers, folder: Path) -> None:
    """`read` with ``segments`` brings at least these parts of each block, verified."""
    keys = [_key(number) for number in range(4)]
    last = len(LARGE.segments) - 1
    with tiers.opened(LARGE) as tier:
        expect(all(tier.write(keys, LARGE)), "four blocks of 1 MiB are not there")
        for segments in ([0], [last], [1, 2], list(range(last + 1))):
            landed, rows = tier.read(keys, segments)
            expect(all(landed), f"segments {segments} did not come")
            tier.expect_right(keys, landed, rows, segments, LARGE)


def check_a_second_write_changes_nothing(tiers: Tiers, folder: Path) -> None:
    """A write of blocks that are there returns them as there, and they stay right."""
    keys = [_key(number) for number in range(5)]
    with tiers.opened() as tier:
        tier.write(keys)
        expect(all(tier.write(keys, generation=2)), "blocks that were there are not there any more")
        landed, rows = tier.read(keys)
        expect(all(landed), "blocks that were written twice did not come")
        tier.expect_right(keys, landed, rows)


def check_blocks_are_of_one_form(tiers: Tiers, folder: Path) -> None:
    """A key of one form is not there for another form, also of another model."""
    keys = [_key(number) for number in range(4)]
    with tiers.opened(STRANGER) as tier:
        tier.write(keys, STRANGER)
    with tiers.opened() as tier:
        expect(not any(tier.own.has(keys, 10.0)), "blocks of another model are there")
        landed, _ = tier.read(keys)
        expect(not any(landed), "blocks of another model came")
        expect(all(store.form != STRANGER for store in tier.stores), "another model was opened")


def check_own_forms_are_apart(tiers: Tiers, folder: Path) -> None:
    """A tier that is open for two own forms writes and reads both, and serves no block of one for
    the other."""
    keys = [_key(number) for number in range(4)]
    with tiers.opened(FORM, STRANGER) as tier:
        forms = [store.form for store in tier.stores[:2]]
        expect(
            forms == [FORM, STRANGER], "the first stores are not of the own forms in their order"
        )
        for store in tier.stores[:2]:
            expect(store.writable is True, "a store of an own form is not writable")
            expect(not any(store.has(keys, 10.0)), "blocks of another own form are there")
            tier.own = store
            expect(all(tier.write(keys, store.form)), "blocks of a small write are not there")
        for store in tier.stores[:2]:
            landed, rows = tier.read(keys, store=store)
            expect(all(landed), "blocks of an own form did not come back")
            tier.expect_right(keys, landed, rows[:, : store.form.image_bytes], form=store.form)


def check_other_forms_of_the_cache_are_read(tiers: Tiers, folder: Path) -> None:
    """`forms` finds other forms of the same cache, and `open` gives each a store to read from.

    The first store is of the first form. The others are not writable. A tier that keeps nothing
    after `close` finds none.
    """
    keys = [_key(number) for number in range(4)]
    with tiers.opened(HALF) as tier:
        tier.write(keys, HALF)
    other_forms = tiers.make().forms(FORM)
    wrong = [form for form in (FORM, STRANGER) if form in other_forms]
    expect(not wrong, f"`forms` returned {len(wrong)} wrong forms")
    with tiers.opened() as tier:
        expect(tier.own.form == FORM, "the first store is of another form")
        for store in tier.stores[1:]:
            expect(not store.writable, "a store of another form is writable")
            if store.form == HALF and HALF in other_forms:
                landed, rows = tier.read(keys, store=store)
                expect(all(landed), "blocks of another form did not come")
                tier.expect_right(keys, landed, rows[:, : HALF.image_bytes], form=HALF)


def check_a_closed_tier_opens_again(tiers: Tiers, folder: Path) -> None:
    """After `close`, the tier can be opened again; each block comes right or is a miss.

    ``generation`` is at least that of each block that is still there.
    """
    keys = [_key(number) for number in range(8)]
    with tiers.opened() as tier:
        tier.write(keys, generation=7)
    with tiers.opened() as tier:
        there = tier.own.has(keys, 10.0)
        landed, rows = tier.read(keys)
        expect(list(there) == landed, f"{sum(there)} blocks are there, and {sum(landed)} came")
        wanted = tier.seal(keys, generation=7)
        for number in np.flatnonzero(landed):
            payload = slice(image.HEADER, image.HEADER + FORM.payload_bytes)
            same = np.array_equal(rows[number, payload], wanted[number, payload])
            expect(same, "a block came wrong after the tier was opened again")
        generation = tier.own.generation
        expect(isinstance(generation, int) and generation >= 0, f"generation is {generation!r}")


def check_a_read_is_left_when_nothing_waits(tiers: Tiers, folder: Path) -> None:
    """`read` returns soon after ``stop()`` became true; blocks that came are right."""
    keys = [_key(number) for number in range(16)]
    with tiers.opened() as tier:
        tier.write(keys)
        began = time.monotonic()
        landed, rows = tier.read(keys, stop=lambda: True)
        expect(time.monotonic() - began < 10, "the read went on for 10 s")
        tier.expect_right(keys, landed, rows)


def check_a_write_without_eviction_keeps_what_is_there(tiers: Tiers, folder: Path) -> None:
    """`write` with ``evict`` false drops new blocks rather than old ones, and reports them."""
    old = [_key(number) for number in range(4)]
    with tiers.opened() as tier:
        expect(all(tier.write(old)), "four blocks are not there")
        for start in range(100, 700, 20):
            new = [_key(number) for number in range(start, start + 20)]
            tier.reports.clear()
            landed = tier.write(new, evict=False)
            dropped = {key for key, there in zip(new, landed, strict=True) if not there}
            reported = {key for key, _ in tier.reports}
            expect(dropped == reported, "a block that was dropped has no reason")
            if dropped:
                break
        expect(all(tier.own.has(old, 10.0)), "a block went for one that was not to evict any")
        landed, rows = tier.read(old)
        expect(all(landed), "an old block did not come")
        tier.expect_right(old, landed, rows)


def check_threads_read_and_write_together(tiers: Tiers, folder: Path) -> None:
    """Workers may call `read` and `write` together, also for the same keys."""
    keys = [_key(number) for number in range(6)]
    with tiers.opened() as tier:
        tier.write(keys)

        def work(seed: int) -> None:
            for turn in range(6):
                new = [_key(1000 + 10 * seed + turn), *keys[:2]]
                rows = tier.seal(new)
                checksums = _checksums(rows, FORM)
                place = tier.own.queue_for_write(len(new) * FORM.image_bytes)
                tier.own.write(place, new, [*rows], [1] * 3, checksums, report=tier.report)
                read = np.full((len(new), FORM.image_bytes), _UNREAD, np.uint8)
                landed = tier.own.read(new, [*read], None, bool, tier.report)
                tier.expect_right(new, list(landed), read)

        run_threads(work, range(4))


def check_use_is_noted_quietly(tiers: Tiers, folder: Path) -> None:
    """`touch` takes any keys, in order of the prefix, also some that are not there."""
    keys = [_key(number) for number in range(6)]
    with tiers.opened() as tier:
        tier.write(keys[:3])
        tier.own.touch(keys)
        tier.own.touch([])
        landed, rows = tier.read(keys[:3])
        expect(all(landed), "a block went because it was used")
        tier.expect_right(keys[:3], landed, rows)


def check_the_tier_says_what_it_is(tiers: Tiers, folder: Path) -> None:
    """``tier`` and ``where`` are texts, ``notes`` are sentences, statistics fit into JSON."""
    with tiers.opened() as tier:
        own = tier.own
        expect(isinstance(own.tier, str) and bool(own.tier), f"its tier is {own.tier!r}")
        expect(isinstance(own.where, str) and bool(own.where), f"it is at {own.where!r}")
        expect(all(isinstance(note, str) for note in own.notes), "a note is not a text")
        expect(own.writable is True, "the store of the first form is not writable")
        json.dumps(own.statistics())
