# SPDX-License-Identifier: Apache-2.0
"""Distribution of tests to pytest-xdist's workers: by groups, and the others by short runs.

pytest-xdist hands out one test at a time, counts after each all that a worker ever had, and has
each worker make the fixtures of each module. pytest 9.2 no longer has the attribute to which xdist
writes its own groups; so workers leave the groups in a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

LONGEST = 12  # so that no worker is left with much at the end


def groups_file() -> Path:
    """Return the file in which the workers of this process leave the groups of tests."""
    return Path(tempfile.gettempdir(), f"portakv-tests-{os.getpid()}.json")


def tell_groups(items: Iterable[pytest.Item], worker: dict[str, str]) -> None:
    """Write the groups of a worker's tests, which are those of every worker. Tests of the simulated
    device are a separate group, and so stay after all others."""
    groups = {}
    for item in items:
        if mark := item.get_closest_marker("xdist_group"):
            simulated = item.get_closest_marker("simdev") is not None
            groups[item.nodeid] = f"{mark.args[0]}, {simulated}"
    draft = Path(f"{worker['groups']}.{worker['workerid']}")
    draft.write_text(json.dumps(groups), encoding="utf-8")
    draft.replace(worker["groups"])


class Runs(LoadScopeScheduling):  # type: ignore[misc]
    """One worker has the tests of an ``xdist_group``, and up to a dozen others that were collected
    one after the other in one module, so that those of the simulated device stay the last."""

    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # else the short ones come after the last
        self._scopes: dict[str, str] | None = None
        self._places: dict[str, int] = {}  # of each test in the collection
        self._module = ""
        self._first = 0

    def _split_scope(self, nodeid: str) -> str:
        """Return the group or run of a test; xdist calls this first in the order of the
        collection."""
        if self._scopes is None:
            self._scopes = dict(json.loads(groups_file().read_text(encoding="utf-8")))
        if nodeid not in self._scopes:
            module = nodeid.partition("::")[0]
            count = len(self._scopes)
            if module != self._module or count - self._first == LONGEST:
                self._module = module
                self._first = count
            self._scopes[nodeid] = f"run {self._first}"
        return self._scopes[nodeid]

    def _assign_work_unit(self, node: Any) -> None:
        """Give a worker two tests, without which it begins none. A worker that takes the place of
        one that ended gets what is left of a unit, once it has collected its tests: xdist also
        asks for one that still collects, if two ended at a time."""
        if node not in self.registered_collections:
            return
        if not self._places:
            self._places = {nodeid: place for place, nodeid in enumerate(self.collection)}
        work = self.assigned_work[node]
        while True:
            scope, unit = self.workqueue.popitem(last=False)
            work[scope] = unit
            left = [self._places[nodeid] for nodeid, completed in unit.items() if not completed]
            node.send_runtest_some(left)
            if not self.workqueue or self._pending_of(work) >= 2:
                return

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """Forget a unit once all its tests have run: xdist counts them after each test."""
        nodeid = self.collection[item_index]
        scope = self._split_scope(nodeid)
        work = self.assigned_work[node]
        work[scope][nodeid] = True
        if all(work[scope].values()):
            del work[scope]
        self._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """Hand on what a worker leaves, but not the test that ended it, such as one that hangs:
        xdist would run that again and again. It would also hand on units without a test to run,
        and a worker with such a one and a single test waits for ever."""
        ended = None
        units = self.assigned_work[node]
        for name, unit in list(units.items()):
            for nodeid, completed in unit.items():
                if not completed and ended is None:
                    ended = nodeid
                    unit[nodeid] = True
            if all(unit.values()):
                del units[name]
        super().remove_node(node)
        return ended
