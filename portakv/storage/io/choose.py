# SPDX-License-Identifier: Apache-2.0
"""The I/O engines `ring` and `threads`, and which one a disk tier takes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TypeGuard

from portakv.core.io import OLD, Check, Files, System
from portakv.errors import InvalidTerms, StoreError
from portakv.runtime import resources
from portakv.runtime.devices import this_process
from portakv.selection import Catalog, Decision, Kind, select
from portakv.storage.io.base import DEPTH, Ended, Engine, Request

# ------------------------------------------------------------------------------------------------
# The engine `threads`: the core's plain calls for block stores, if the system refuses `ring`.


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


# ------------------------------------------------------------------------------------------------
# The engine `ring`: the core's io_uring for block stores.


class Ring(Threads):
    """A ring in a thread of the core, which is replaced if it fails; threads serve without it."""

    name = "ring"
    ring = True

    def __init__(
        self,
        memory: Sequence[tuple[int, int]] = (),
        depth: int = DEPTH,
        system: System | None = None,
    ) -> None:
        """Make the engine, as `Engine`; raise `OSError` if the kernel refuses it."""
        try:
            super().__init__(memory, depth, system)
        except OSError as error:
            raise _rejected(error.errno or 0) from None

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the engine does without on this system."""
        state = self._files.state()
        if state.refused < 0:
            return (f"a thread had no ring ({_rejected(-state.refused).strerror})",)
        if state.registered < 0:
            why = _refusal(-state.registered)
            return (f"no buffers are registered ({why}); it costs CPU",)
        return ()


def _rejected(number: int) -> OSError:
    """Return the error for a ring that the kernel refuses."""
    if number == OLD:
        return OSError(errno.ENOSYS, "its io_uring is too old; Linux 6.1 is needed")
    return OSError(number, f"the kernel rejects io_uring: {_refusal(number)}")


def _refusal(number: int) -> str:
    """Return why the kernel refuses a ring or its buffers, with what to look at."""
    text = os.strerror(number)
    if number == errno.ENOMEM:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        allowed = "any number of" if soft == resource.RLIM_INFINITY else str(soft)
        return f"{text}; see ulimit -l, which allows {allowed} bytes, and the memory of the cgroup"
    if number in resources.NONE_FREE:
        return f"{text}; {resources.reason(OSError(number, text))}"
    if number in (errno.EPERM, errno.EACCES):
        return f"{text}; see kernel.io_uring_disabled, and the container's profile"
    if number == errno.ENOSYS:
        return f"{text}; the kernel has no io_uring, or the container's profile hides it"
    return text


# ------------------------------------------------------------------------------------------------
# Choose the I/O engine of a disk tier.

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
