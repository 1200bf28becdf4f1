# SPDX-License-Identifier: Apache-2.0
"""Routes: the one bounded cache of plans with their launches.

New memory objects, reallocated caches and other layers of known form hit it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.plan.plan import CopyPlan
from portakv.registry.ids import bring
from portakv.registry.registry import Choice, prepare
from portakv.view.form import Form
from portakv.view.index import Index

CAPACITY = 1024  # launches


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A plan, the launch that carries it out, and what its backend can do."""

    plan: CopyPlan
    launch: Launch
    choice: Choice
    can: Capabilities
    home_of_ids: torch.device

    def place(self, index: Index) -> Index:
        """An index with its ids where, and in a dtype that, the backend reads."""
        if index.ids is None or self.can.index_on == "any":
            return index
        if index.fleeting:
            bring((index,), self.home_of_ids, self.can.index_dtypes)
        return index.placed(self.home_of_ids, self.can.index_dtypes)


Key = tuple[Form, Form, int, int, int | None, Choice]
_routes: OrderedDict[Key, Route] = OrderedDict()
_lock = threading.Lock()


def route(
    src: Form, dst: Form, src_step: int, dst_step: int, unit: int | None, choice: Choice
) -> Route:
    """The route between two forms; made on the first call, looked up after that.

    Raises:
        LayoutError, Unsupported: as `CopyPlan` and `registry.prepare` do.
    """
    key = (src, dst, src_step, dst_step, unit, choice)
    found = _routes.get(key)
    if found is not None:
        return found
    plan = CopyPlan(src, dst, src_step, dst_step, unit)
    launch, taken = prepare(plan, choice.backend.device, choice)
    found = Route(plan, launch, taken, taken.can, taken.can.home_of_ids(taken.backend.device))
    with _lock:
        # Another thread may have been here first: one launch for all, with its one lock.
        found = _routes.setdefault(key, found)
        # Oldest first: a use does not move a route, which would cost every call a lock.
        while len(_routes) > CAPACITY:
            _routes.popitem(last=False)
    return found
