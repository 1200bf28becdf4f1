# SPDX-License-Identifier: Apache-2.0
"""The engine `ring`: the core's io_uring for block stores."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from portakv.core.io import OLD, System
from portakv.runtime import resources
from portakv.storage.io.base import DEPTH
from portakv.storage.io.threads import Threads


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
