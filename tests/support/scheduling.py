# SPDX-License-Identifier: Apache-2.0
"""How pytest-xdist hands tests to its workers: by groups, and the others by short runs.

By itself it hands out one test at a time, counts after each what is left of all that a worker ever
had, and has each worker make the fixtures of each module.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadGroupScheduling

LONGEST = 12  # so that no worker is left with much at the end


class Runs(LoadGroupScheduling):  # type: ignore[misc]
    """One worker has the tests of an ``xdist_group``, and up to a dozen others that were collected
    behind each other in one module, so that those of the simulated device stay the last."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._runs: dict[str, str] = {}
        self._module, self._first = "", 0

    def _split_scope(self, nodeid: str) -> str:
        """The group or run of a test; xdist asks first in the order of the collection."""
        group: str = super()._split_scope(nodeid)
        if group == nodeid and nodeid not in self._runs:
            module, count = nodeid.partition("::")[0], len(self._runs)
            if module != self._module or count - self._first == LONGEST:
                self._module, self._first = module, count
            self._runs[nodeid] = f"run {self._first}"
        return self._runs.get(nodeid, group)
