# SPDX-License-Identifier: Apache-2.0
"""The engine `threads`: the core's plain calls for block stores, if the system refuses `ring`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from portakv.core.io import Check, Files, System
from portakv.errors import StoreError
from portakv.runtime.devices import this_process
from portakv.storage.io.base import DEPTH, Ended, Engine, Request


class Threads:
    """Eight threads of the core, or ``depth`` if it is less, that each execute one request at a
    time.

    All workers share the threads, which start when there is work. The end of the interpreter does
    not wait for them.
    """

    name = "threads"
    ring = False

    def __init__(
        self,
        memory: Sequence[tuple[int, int]] = (),
        depth: int = DEPTH,
        system: System | None = None,
    ) -> None:
        """Make the engine, as `Engine`; ``system`` replaces the system's calls."""
        self._process = this_process()
        self._files = Files(self.ring, depth, memory, system)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the engine does without on this system."""
        return ()

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Carry out requests as `Engine.run`; raise `StoreError` in a forked process."""
        self._check_process()
        return self._files.run(requests, ended)

    def run_checked(self, requests: Sequence[Request], checks: Sequence[Check]) -> list[int]:
        """Carry out reads, and verify the bytes of each; a result may be `WRONG`."""
        self._check_process()
        return self._files.run(requests, checks=checks)

    def _check_process(self) -> None:
        if self._process.forked:
            raise StoreError(
                f"Expected the process that made the I/O engine {self.name!r}, got a forked "
                f"process. Make another there."
            )

    def close(self) -> None:
        """End the engine as `Engine.close`."""
        if not self._process.forked:
            self._files.close()


def verifies(engine: Engine) -> TypeGuard[Threads]:
    """Return True if an engine's reads may be verified by the core, which then carries them out.

    A subclass that changes `run` is called by it alone.
    """
    own: object = type(engine).run
    return isinstance(engine, Threads) and own is Threads.run
