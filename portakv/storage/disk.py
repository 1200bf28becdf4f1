# SPDX-License-Identifier: Apache-2.0
"""`Disk` is a tier of folders, one for each device. A folder may be added or lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from portakv.arguments import invalid, number, one_of, whole
from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.graph.graph import Graph
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.chains import Chains
from portakv.storage.disk_store import DiskStore
from portakv.storage.files import forms_in, open_to_others
from portakv.storage.form import BlockForm, size_notes
from portakv.storage.io.base import DEPTH, Engine
from portakv.storage.io.choose import ENGINES, choose
from portakv.storage.slots import Slots, Track
from portakv.storage.space import Space

_warnings = RateLimitedLog(logging.getLogger(__name__))


class Disk:
    """A tier of blocks in ``folders``.

    Args:
        capacity: bytes of all forms and folders together, which may be a float such as 64e9; a
            fraction of a byte is cut. Each folder has an equal part. Saves allocate the space.
        admit: "second" stores a block when it is offered the second time.
        workers: the number of tasks that read or write in a folder at a time.
        io: "ring", "threads" or an I/O engine; None: the first that runs.
        depth: the most requests under way at a time for each worker of a folder, 1 to 32,768.
            Thousands of small blocks may gain by 1,024 or 2,048. "threads" has as many threads for
            all workers, at most 8; an engine that is passed as an object has its own depth.
        track: shows the progress of a recovery, as `rich.progress.track` does: it passes items on.
    """

    def __init__(
        self,
        *folders: str | Path,
        capacity: int,
        admit: Literal["always", "second"] = "always",
        workers: int = 4,
        io: str | Engine | None = None,
        depth: int = DEPTH,
        track: Track = lambda items, _: items,
    ) -> None:
        if not folders:
            raise invalid("folders", "one folder or more", folders, "Pass a folder.")
        for folder in folders:
            if not isinstance(folder, str | Path) or not str(folder):
                raise invalid("folders", "texts or Paths", folder, "Pass a path.")
            if "\0" in str(folder) or not _can_encode(str(folder)):
                raise invalid("folders", "paths that the system can hold", folder, "Pass a path.")
            if "://" in str(folder):
                raise InvalidTerms("Expected folders, got a URL. Pass the URL to `Remote`.")
        if len({os.path.realpath(folder) for folder in folders}) < len(folders):
            raise invalid("folders", "different folders", folders, "Pass each once.")
        if io is not None and (isinstance(io, str) or not hasattr(io, "run")):
            ENGINES.check("io", io)
        if not callable(track):
            raise invalid("track", "a function", track, "Leave it out, or pass one.")
        number("capacity", capacity, 1, (1 << 63) - 1024, "a number of bytes, 1 or more")

        self.folders = [Path(folder) for folder in folders]
        self.capacity = int(capacity)
        self.admit = one_of("admit", admit, ("always", "second"))
        self.workers = whole("workers", workers, 1, 1 << 16)
        self.io = io
        self.depth = whole("depth", depth, 1, 1 << 15)  # the most entries of a ring
        self.track = track
        self._present: list[BlockForm] = []  # at the last look

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return the other forms of the same cache that lie in the folders."""
        self._present = self._stored()
        return [other for other in self._present if other != form and form.same_cache(other)]

    def _stored(self) -> list[BlockForm]:
        """Return all forms that lie in the folders and can be read."""
        forms = dict[BlockForm, None]()
        for folder in self.folders:
            forms |= dict.fromkeys(forms_in(folder))
        return [*forms]

    def open(
        self, graph: Graph, rows: Any, forms: Sequence[BlockForm], own: int = 1
    ) -> list[DiskStore]:
        """Return a tier store of each of the first ``own`` forms, which are created, and a tier
        store to read each other form.

        Leaves out, with a note: another form that cannot be opened, and a folder after the first
        one that another block store has. Requests go to ``rows.memory``.

        Raises `StoreBusy` for the first folder, and `StoreError` for any folder of an own form.
        """
        engine = self.io
        notes = list[str]()
        if engine is None or isinstance(engine, str):
            engine, answers = choose(rows.memory, engine, self.depth)
            notes = [str(each) for each in answers]
        with ExitStack() as undo:
            undo.callback(engine.close)
            opening = _Opening(self, graph, engine, undo, notes)
            for number, form in enumerate(forms):
                opening.open_form(form, own=number < own)
            first = opening.tier_stores[0]
            first.owns_engine = True
            for tier_store in opening.tier_stores if self.admit == "second" else ():
                if tier_store.writable:
                    tier_store.offer_twice()
            folders = ", ".join(map(str, self.folders))
            for note in filter(None, map(open_to_others, self.folders)):
                first.found.append(note)
                _warnings.warning(note, "%s", note, lines=1)
            for note in size_notes(forms[:own], self._present):
                first.found.append(note)
                _warnings.warning(f"{note} {folders}", "%s: %s", folders, note)
            undo.pop_all()
        return opening.tier_stores


class _Opening:
    """Open the forms of a disk tier one after the other, the store's own forms first.

    The own forms have one lock, since each may take slots of another one.
    """

    def __init__(
        self, disk: Disk, graph: Graph, engine: Engine, undo: ExitStack, notes: list[str]
    ) -> None:
        self.disk = disk
        self.graph = graph
        self.engine = engine
        self.undo = undo
        self.notes = notes  # for the next store of a tier
        self.tier_stores = list[DiskStore]()
        self.capacity = disk.capacity // len(disk.folders)
        self.spaces = {folder: Space(folder, self.capacity) for folder in disk.folders}
        self.busy = set[Path]()
        self.lock = Lock()

    def open_form(self, form: BlockForm, own: bool) -> None:
        """Open a form in every folder that has it, or makes it if it is the store's ``own``."""
        # Of all folders, as a prefix may lie in several.
        chains = Chains[bytes](self.lock if own else None)
        opened = dict[Path, Slots]()
        for folder in self.disk.folders:
            slots = self._open_folder(folder, form, own, chains, bool(opened))
            if slots is not None:
                opened[folder] = slots
        siblings = [*opened.values()]
        for slots in siblings:
            slots.fit(siblings)
        if own:
            for folder in opened:
                self.spaces[folder].others = [other for other in opened if other != folder]
        if opened:
            parts = [
                (slots, self.graph.queue(f"disk:{folder}", width=self.disk.workers))
                for folder, slots in opened.items()
            ]
            self.tier_stores.append(
                DiskStore(self.graph, form, parts, self.engine, own, self.notes)
            )
            self.notes = []

    def _open_folder(
        self, folder: Path, form: BlockForm, own: bool, chains: Chains[bytes], others: bool
    ) -> Slots | None:
        """Open a form in one folder.

        Returns None, with a note, if the store works without it: ``others`` have opened the own
        form, or the form is only read.
        """
        place = folder / form.name
        if folder in self.busy or not (own or (place / "form.json").exists()):
            return None
        capacity = self.capacity if own else None
        space = self.spaces[folder]
        try:
            slots = Slots(place, form, capacity, self.engine, self.disk.track, chains, space)
        except StoreError as error:
            # The other folders serve without a folder that another store has.
            if own and isinstance(error, StoreBusy) and others:
                self.busy.add(folder)
                self.notes.append(f"It does without {folder}. {error}")
                return None
            if own:
                raise
            self.tier_stores[0].found.append(str(error))
            return None
        self.undo.callback(slots.close)
        if own:
            space.writers.add(slots)
        else:
            space.readers.add(slots)
        return slots


def _can_encode(path: str) -> bool:
    """Return whether a path can be handed to the system; a lone surrogate cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
