# SPDX-License-Identifier: Apache-2.0
"""Choose the I/O engine of a disk tier."""

from __future__ import annotations

from collections.abc import Sequence

from portakv.errors import InvalidTerms, StoreError
from portakv.selection import Catalog, Decision, Kind, select
from portakv.storage.io.base import DEPTH, Engine
from portakv.storage.io.io_uring import Ring
from portakv.storage.io.threads import Threads

KIND = Kind("I/O engine", "PORTAKV_IO", "io", error=StoreError, unknown=InvalidTerms)
#: The engines of PortaKV, in the order in which they are tried.
BUILT_IN: dict[str, type[Engine]] = {"ring": Ring, "threads": Threads}
#: All engines. Those of other packages are used only by name.
ENGINES = Catalog[Engine](KIND, None, BUILT_IN, "portakv.io_engines")


def choose(
    memory: Sequence[tuple[int, int]] = (), name: str | None = None, depth: int = DEPTH
) -> tuple[Engine, list[Decision]]:
    """Return the I/O engine that ``PORTAKV_IO`` or else ``name`` forces, else the first that runs
    here, and the decision on each that was tried.

    Args:
        memory: (address, bytes) of host memory, for the engine to register with the kernel.
        name: a built-in engine, one of an installed package, or ``package.module:Class``.
        depth: the most requests under way at a time for each worker.

    Raises:
        InvalidTerms: no engine has that name.
        StoreError: the forced engine cannot run here.
    """
    forced = KIND.forced(name)
    if forced is not None:
        ENGINES.check(KIND.source(), forced)

    def consider(each: str) -> tuple[Engine | None, Decision]:
        try:
            engine: Engine = ENGINES.load(each)(memory, depth)
        except OSError as error:
            return None, Decision(each, False, str(error.strerror))
        return engine, Decision(each, True, "; ".join(engine.notes) or "it has all that it uses")

    selected = select(KIND, "a disk tier", BUILT_IN, consider, forced)
    return selected.value, list(selected.trace)
