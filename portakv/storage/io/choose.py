# SPDX-License-Identifier: Apache-2.0
"""Which engine carries a disk tier's requests out here."""

from __future__ import annotations

import os
from collections.abc import Sequence

from portakv.backends.base import Decision
from portakv.errors import InvalidTerms, StoreError
from portakv.storage.io.base import Engine
from portakv.storage.io.io_uring import Ring
from portakv.storage.io.threads import Threads


def choose(
    memory: Sequence[tuple[int, int]] = (), name: str | None = None, entries: int = 512
) -> tuple[Engine, list[Decision]]:
    """The first engine that runs here, or the one that ``PORTAKV_IO`` or else ``name`` forces, and
    what each that was asked said. ``memory`` (address, bytes) is registered with the kernel."""
    asked = os.environ.get("PORTAKV_IO") or name
    said = list[Decision]()
    if asked not in (None, "ring", "threads"):
        raise InvalidTerms(f"I/O engine {asked!r} was asked for; expected ring or threads.")
    for each in (asked,) if asked else ("ring", "threads"):
        try:
            engine = Ring(memory, entries) if each == "ring" else Threads()
        except OSError as error:
            said.append(Decision(each, False, str(error.strerror)))
        else:
            said.append(Decision(each, True, "; ".join(engine.notes) or "it has all that it uses"))
            return engine, said
    raise StoreError(
        f"I/O engine {asked!r} was asked for, and found was {said[0]}. Mend that, or take threads."
    )
