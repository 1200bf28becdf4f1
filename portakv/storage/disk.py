# SPDX-License-Identifier: Apache-2.0
"""`Disk` is a block store's tier of folders, each of which stands alone: one for each device, that
may be added or lost. A block goes to the folder with the fewest bytes queued."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from portakv.arguments import invalid, number, one_of, whole
from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.graph.graph import Graph, Link
from portakv.runtime.bounded import Bounded
from portakv.storage.chains import Chains
from portakv.storage.choose import choose
from portakv.storage.engine import LOST, Engine, Request
from portakv.storage.form import HEADER, BlockForm
from portakv.storage.image import Header, Row, header, predecessor, verify
from portakv.storage.slots import PAGE, Place, Slots, Track, form_in


class Disk:
    """Blocks in ``folders``, each of which holds an equal part of ``capacity`` bytes.

    ``admit="second"``: a block is stored when it is offered the second time. ``workers``: how many
    nodes read or write in a folder at once. ``io``: "ring", "threads", an engine; None: what runs.
    ``track`` shows how far a recovery is, as `rich.progress.track` does: it passes items on.
    """

    def __init__(
        self,
        *folders: str | Path,
        capacity: int,
        admit: str = "always",
        workers: int = 4,
        io: str | Engine | None = None,
        track: Track = lambda items, _: items,
    ) -> None:
        if not folders:
            raise invalid("folders", "one folder or more", folders, "Pass a folder.")
        for folder in folders:
            if not isinstance(folder, str | Path) or not str(folder):
                raise invalid("folders", "texts or Paths", folder, "Pass a path.")
            if "://" in str(folder):
                raise InvalidTerms("Expected folders, got a URL. Pass the URL to `Remote`.")
        if io is not None and (isinstance(io, str) or not hasattr(io, "run")):
            one_of("io", io, ("ring", "threads"))
        if not callable(track):
            raise invalid("track", "a function", track, "Leave it out, or pass one.")
        number("capacity", capacity, 1, (1 << 63) - 1024, "a number of bytes, 1 or more")

        self.folders = [Path(folder) for folder in folders]
        self.capacity = int(capacity)
        self.admit = one_of("admit", admit, ("always", "second"))
        self.workers = whole("workers", workers, 1)
        self.io = io
        self.track = track

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Other forms of the same cache that lie in the folders."""
        found = dict[BlockForm, None]()
        for place in (x / y for x in self.folders for y in sorted(glob("*", root_dir=x))):
            with suppress(StoreError, OSError):
                other = form_in(place)
                if other != form and other.name == place.name and form.same_cache(other):
                    found[other] = None
        return [*found]

    def open(
        self, graph: Graph, rows: Any, forms: Sequence[BlockForm], generation: int = 0
    ) -> list[DiskShelf]:
        """A shelf of the first form, which is made, and of each other one that lies here, to read;
        of these, what cannot be had is left out with a note. Requests go to ``rows.memory``.

        A folder after the first one that another store has is left out with a note. Raises
        `StoreBusy` for the first folder, and `StoreError` for any folder of the first form.
        """
        engine, notes = self.io, list[str]()
        if engine is None or isinstance(engine, str):
            engine, said = choose(rows.memory, engine)
            notes = [str(each) for each in said]
        shelves: list[DiskShelf] = []
        busy = set[Path]()
        with ExitStack() as undo:
            undo.callback(engine.close)
            for form in forms:
                own, parts = form == forms[0], list[tuple[Slots, Link]]()
                chains = Chains[bytes]()  # of all folders, as a prefix may lie in several
                for folder in self.folders:
                    place, room = folder / form.name, self.capacity // len(self.folders)
                    if not own and (folder in busy or not (place / "form.json").exists()):
                        continue
                    try:
                        slots = Slots(
                            place, form, room if own else None, engine, self.track, chains
                        )
                    except StoreError as error:
                        # The other folders serve without one that another store has.
                        if own and isinstance(error, StoreBusy) and parts:
                            busy.add(folder)
                            notes.append(f"It does without {folder}. {error}")
                            continue
                        if own:
                            raise
                        shelves[0].notes.append(str(error))
                        continue
                    undo.callback(slots.close)
                    parts.append((slots, graph.link(f"disk:{folder}", width=self.workers)))
                    notes += slots.notes
                if parts:
                    shelves.append(DiskShelf(graph, form, parts, engine, own, notes))
                    notes = []
            if self.admit == "second":
                count = sum(slots.count for slots, _ in shelves[0].parts)
                shelves[0].offered = Bounded("keys offered once", count)
            undo.pop_all()
        return shelves


@dataclass(eq=False, repr=False)
class DiskShelf:
    """The blocks of one form in all folders of a disk tier, as `BlockStore` knows a tier. The one
    that is ``writable`` ends the engine of all: it is closed last."""

    graph: Graph
    form: BlockForm
    parts: list[tuple[Slots, Link]]
    engine: Engine
    writable: bool
    notes: list[str]
    offered: Bounded[bytes, None] | None = None  # once, if the second time is to be waited for
    tier = "disk"

    @property
    def generation(self) -> int:
        """The highest that was found."""
        return max(slots.generation for slots, _ in self.parts)

    def has(self, keys: Sequence[bytes], _: float | None = None) -> list[bool]:
        """Which blocks are there."""
        return [any(key in slots.index for slots, _ in self.parts) for key in keys]

    known = has  # nobody is asked

    def wants(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks are not there, and admitted."""
        lacks, once = [not there for there in self.has(keys)], self.offered
        if once is not None:
            for i, key in enumerate(keys):
                if lacks[i] and once.pop(key, self) is self:
                    once[key], lacks[i] = None, False
        return lacks

    def link(self, key: bytes) -> Link:
        """What a block is read by."""
        return next((link for slots, link in self.parts if key in slots.index), self.parts[0][1])

    def link_for_write(self, nbytes: int) -> Link:
        """What a block is written by: the folder with the fewest bytes queued, of several the one
        that has taken the fewest blocks."""
        return min(self.parts, key=lambda x: (x[1].queued_bytes, len(x[0].index) + x[0].evicted))[1]

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Note that a prefix was used; ``follows``: what each of its blocks follows."""
        for slots, _ in self.parts:
            slots.touch(keys, follows)

    def read(
        self,
        keys: Sequence[bytes],
        rows: Sequence[Row],
        segments: Sequence[int] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[bool]:
        """Read images, or only some segments of them, into rows; which ones came, and are right. A
        block that nobody read, as the engine could not or nobody waits, is a miss this time."""
        landed, size = [False] * len(keys), self.form.image_bytes
        found = [(i, *place) for i, key in enumerate(keys) if (place := self.pin(key))]
        spans = [(0, size)]
        if segments is not None:  # whole pages, and the header with the first one
            parts = [self.form.segments[i] for i in segments]
            ends = [HEADER + -(-(x.offset + x.nbytes) // PAGE) * PAGE for x in parts]
            starts = [HEADER + x.offset if x.offset else 0 for x in parts]
            spans = list(zip(starts, ends, strict=True))
        bad = set[int]()  # blocks that came and are wrong, or that the device has lost
        awaited = [len(spans)] * len(found)  # spans of each block

        def ended(number: int, result: int) -> None:
            """Check a block whose last span came, while the disk brings others."""
            n, span = divmod(number, len(spans))
            i, _, (_, told) = found[n]
            if result != spans[span][1] - spans[span][0]:
                bad.update([i] if result >= 0 or -result in LOST else [])
                return
            awaited[n] -= 1
            if not awaited[n]:
                landed[i] = self._right(rows[i], told, segments)
                bad.update([] if landed[i] else [i])

        try:
            asks = [
                Request(slots.fd, slot * size + a, rows[i].ctypes.data + a, b - a, False)
                for i, slots, (slot, _) in found
                for a, b in spans
            ]
            if stop is None or not stop():
                self.engine.run(asks, ended)
        finally:
            for i, slots, at in found:
                slots.unpin(at, good=i not in bad)
        hits, there, wrong = sum(landed), len(found), len(bad)
        self.graph.count(self.tier, "load", "hit", hits, hits * sum(b - a for a, b in spans))
        self.graph.count(self.tier, "load", "fault", wrong)
        self.graph.count(self.tier, "load", "late", there - hits - wrong)
        self.graph.count(self.tier, "load", "miss", len(keys) - there)
        return landed

    def write(
        self,
        link: Link,
        keys: Sequence[bytes],
        rows: Sequence[Row],
        generations: Sequence[int],
        checksums: Sequence[Sequence[int]],
        own: Mapping[bytes, int] | None = None,
        evict: bool = True,
    ) -> list[bool]:
        """Write sealed images in the link's folder; return which blocks are there now. A block that
        would evict one that comes before it in ``own``, all of a call's, is dropped; without
        ``evict`` also one that would evict any. A folder that cannot evict a block, as all of its
        blocks have successors, leaves it to the other folders."""
        first = next(slots for slots, each in self.parts if each is link)
        folders = [first, *(slots for slots, _ in self.parts if slots is not first)]
        landed = self.has(keys)
        new = [i for i, there in enumerate(landed) if not there]
        size = self.form.image_bytes

        taken = list[tuple[int, Slots, int]]()
        moved = list[int]()
        try:
            for i in new:
                mark = predecessor(rows[i])
                for slots in folders:
                    slot = slots.take(keys[i], own, mark, evict)
                    if slot is not None:
                        taken.append((i, slots, slot))
                        break
            asks = [
                Request(slots.fd, slot * size, rows[i].ctypes.data, size, True)
                for i, slots, slot in taken
            ]
            moved = self.engine.run(asks)
        finally:  # the last block first, so that a prefix outlives its suffix
            results = moved or [0] * len(taken)
            for (i, slots, slot), got in reversed([*zip(taken, results, strict=True)]):
                if got == size:
                    landed[i] = slots.seal(slot, keys[i], generations[i], checksums[i])
                else:
                    slots.give(slot, broken=got == -errno.EIO)
        hits = sum(landed[i] for i in new)
        self.graph.count(self.tier, "save", "hit", hits, hits * size)
        self.graph.count(self.tier, "save", "fault", len(taken) - hits)
        self.graph.count(self.tier, "save", "dropped", len(new) - len(taken))
        return landed

    def statistics(self) -> dict[str, Any]:
        """Numbers of slots by folder."""
        told = ("count", "broken", "evicted", "direct")
        return {
            str(slots.folder): {"io": self.engine.name, "used": len(slots.index)}
            | {name: getattr(slots, name) for name in told}
            for slots, _ in self.parts
        }

    def close(self) -> None:
        """Put all on the devices, and let go of the folders."""
        for slots, _ in self.parts:
            slots.close()
        if self.writable:
            self.engine.close()

    def _right(self, row: Row, told: Header, segments: Sequence[int] | None) -> bool:
        """Whether segments that were read, the first with the header, are what was sealed."""
        if (segments is None or 0 in segments) and header(row, self.form) != told:
            return False
        return verify(row, self.form, told.checksums, told.generation, segments)

    def pin(self, key: bytes) -> tuple[Slots, Place] | None:
        for slots, _ in self.parts:
            if (place := slots.pin(key)) is not None:
                return slots, place
        return None
