# SPDX-License-Identifier: Apache-2.0
"""`Disk` is a block store's tier of folders, each of which stands alone: one for each device, that
may be added or lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from glob import glob
from pathlib import Path
from typing import Any, Literal

from portakv.arguments import invalid, number, one_of, whole
from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.graph.graph import Graph, Link
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.chains import Chains
from portakv.storage.choose import choose
from portakv.storage.disk_shelf import DiskShelf
from portakv.storage.engine import Engine
from portakv.storage.files import form_in
from portakv.storage.form import BlockForm, block_size_notes
from portakv.storage.slots import Slots, Track
from portakv.storage.space import Space

_warnings = RateLimitedLog(logging.getLogger(__name__))


class Disk:
    """Blocks in ``folders``, each of which holds an equal part of ``capacity`` bytes, of all forms
    together. Space is allocated when blocks are saved.

    ``admit="second"``: a block is stored when it is offered the second time. ``workers``: how many
    nodes read or write in a folder at once. ``io``: "ring", "threads", an engine; None: what runs.
    ``track`` shows how far a recovery is, as `rich.progress.track` does: it passes items on.
    """

    def __init__(
        self,
        *folders: str | Path,
        capacity: int,
        admit: Literal["always", "second"] = "always",
        workers: int = 4,
        io: Literal["ring", "threads"] | Engine | None = None,
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
        if io is not None and (isinstance(io, str) or not hasattr(io, "run")):
            one_of("io", io, ("ring", "threads"))
        if not callable(track):
            raise invalid("track", "a function", track, "Leave it out, or pass one.")
        number("capacity", capacity, 1, (1 << 63) - 1024, "a number of bytes, 1 or more")

        self.folders = [Path(folder) for folder in folders]
        self.capacity = int(capacity)
        self.admit = one_of("admit", admit, ("always", "second"))
        self.workers = whole("workers", workers, 1, 1 << 16)
        self.io = io
        self.track = track
        self._size_notes: list[str] = []

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return the other forms of the same cache that lie in the folders."""
        stored = self._stored()
        self._size_notes = block_size_notes(form, stored)
        return [other for other in stored if other != form and form.same_cache(other)]

    def _stored(self) -> list[BlockForm]:
        """Return all forms that lie in the folders and can be read."""
        found = dict[BlockForm, None]()
        for folder in self.folders:
            for name in sorted(glob("*", root_dir=folder)):
                with suppress(StoreError, OSError):
                    form = form_in(folder / name)
                    if form.name == name:
                        found[form] = None
        return [*found]

    def open(
        self, graph: Graph, rows: Any, forms: Sequence[BlockForm], generation: int = 0
    ) -> list[DiskShelf]:
        """A shelf of the first form, which is made, and of each other one that lies here, to read;
        of these, what cannot be had is left out with a note. Requests go to ``rows.memory``.

        A folder after the first one that another store has is left out with a note. Raises
        `StoreBusy` for the first folder, and `StoreError` for any folder of the first form.
        """
        engine = self.io
        notes = list[str]()
        if engine is None or isinstance(engine, str):
            engine, said = choose(rows.memory, engine)
            notes = [str(each) for each in said]
        shelves: list[DiskShelf] = []
        busy = set[Path]()
        room = self.capacity // len(self.folders)
        spaces = {folder: Space(folder, room) for folder in self.folders}
        with ExitStack() as undo:
            undo.callback(engine.close)
            for form in forms:
                own = form == forms[0]
                parts = list[tuple[Slots, Link]]()
                chains = Chains[bytes]()  # of all folders, as a prefix may lie in several
                for folder in self.folders:
                    place = folder / form.name
                    space = spaces[folder]
                    if not own and (folder in busy or not (place / "form.json").exists()):
                        continue
                    try:
                        slots = Slots(
                            place, form, room if own else None, engine, self.track, chains, space
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
                    if not own:
                        space.readers.add(slots)
                    parts.append((slots, graph.link(f"disk:{folder}", width=self.workers)))
                    notes += slots.notes
                together = [slots for slots, _ in parts]
                for slots in together:
                    slots.fit(together)
                if own:
                    for folder in (slots.folder.parent for slots in together):
                        spaces[folder].others = [
                            x.folder.parent for x in together if x.folder.parent != folder
                        ]
                if parts:
                    shelves.append(DiskShelf(graph, form, parts, engine, own, notes))
                    notes = []
            if self.admit == "second":
                shelves[0].offer_twice()
            folders = ", ".join(map(str, self.folders))
            for note in self._size_notes:
                shelves[0].notes.append(note)
                _warnings.warning(f"{note} {folders}", "%s: %s", folders, note)
            undo.pop_all()
        return shelves


def _can_encode(path: str) -> bool:
    """Return whether a path can be handed to the system; a lone surrogate cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
