# SPDX-License-Identifier: Apache-2.0
"""Prepared copies: a plan with the launch that carries it out, remembered by its two forms, so that
new memory objects, reallocated caches and other layers of known form find theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portakv.backends.base import Backend, Capabilities, Decision, FormatCheck, Launch
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan, Move
from portakv.registry import registry
from portakv.registry.registry import Choice
from portakv.runtime.bounded import Bounded
from portakv.runtime.transfer import Pending, event_pool
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

CAPACITY = 1024  # launches
#: Types of devices to which ids go by a small copy that the host does not wait for. To others torch
#: copies them, and the host waits for everything that the stream holds.
ASYNCHRONOUS = frozenset({"cuda"})


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A plan, the launch that carries it out, and what its backend can do."""

    plan: CopyPlan
    launch: Launch
    choice: Choice
    can: Capabilities
    ids_device: torch.device
    #: For each side whether the launch reads the view's table of addresses.
    tables: tuple[bool, bool]
    _backend: tuple[str, str]

    @property
    def carried(self) -> tuple[str, str]:
        """What carried out the launch that this thread made last, and why that one: the backend,
        or the engine that was picked."""
        return getattr(self.launch, "carried", None) or self._backend

    def claims(self, move: Move) -> Capabilities:
        """What carries this copy out can do: if an engine is picked for each copy, that one."""
        told: Callable[[Move], Capabilities] | None = getattr(self.launch, "claims", None)
        return self.can if told is None else told(move)

    def place(self, index: Index) -> Index:
        """An index with its ids on the device, and in a dtype, that the backend reads."""
        if self.can.index_on == "any":
            return index
        if index.fleeting:
            bring((index,), self.ids_device, self.can.index_dtypes)
        return index.placed(self.ids_device, self.can.index_dtypes)

    def place_both(self, move: Move) -> Move:
        """A copy with the ids of both sides where `place` puts them."""
        if self.can.index_on == "any":
            return move
        src, dst, mine, theirs, count = move
        home = self.ids_device
        dtypes = self.can.index_dtypes
        if mine.fleeting or theirs.fleeting:
            bring((mine, theirs), home, dtypes)
        read = mine.placed(home, dtypes)
        written = theirs.placed(home, dtypes)
        if read is mine and written is theirs:
            return move
        return Move(src, dst, read, written, count)


_prepared: Bounded[tuple[Form, Form, int, int, int | None, Choice], Prepared]
_prepared = Bounded("prepared copies", CAPACITY)


def prepared(
    src: Form, dst: Form, src_step: int, dst_step: int, unit: int | None, choice: Choice
) -> Prepared:
    """The prepared copy between two forms; made on the first call, looked up after that. Raises as
    `CopyPlan` and `prepare` do."""
    key = (src, dst, src_step, dst_step, unit, choice)
    found = _prepared.get(key)
    if found is not None:
        return found
    plan = CopyPlan(src, dst, src_step, dst_step, unit)
    launch, taken = prepare(plan, choice)
    home = taken.can.home_of_ids(taken.backend.device)
    looked_up = (
        any(x.src.tabled or any(y.src_table for y in x.loops) for x in plan.nests),
        any(x.dst.tabled or any(y.dst_table for y in x.loops) for x in plan.nests),
    )
    tables = getattr(launch, "tables", looked_up)
    by = taken.name, taken.trace[-1].reason
    found = Prepared(plan, launch, taken, taken.can, home, tables, by)
    # Another thread may have been here first: one launch for all, with its one lock.
    return _prepared.setdefault(key, found)


def prepare(plan: CopyPlan, choice: Choice) -> tuple[Launch, Choice]:
    """Prepare a launch through the chosen backend, or, unless forced, the next that takes it.

    Raises:
        Unsupported: no backend takes the plan (or the forced one does not), with the trace.
    """
    known = registry.REGISTRY
    device = choice.backend.device
    refused = list[Decision]()
    order = [] if choice.forced else known.automatic(device)
    later = order[order.index(choice.name) + 1 :] if choice.name in order else order
    for name in (choice.name, *later):
        backend, decision = known.ask(name, device, check=True)
        if name == choice.name:
            backend = choice.backend  # also one that no test pattern suits, or on terms
        launch = None
        if backend is not None:
            launch, decision = prepare_by(backend, plan)
        if backend is None or launch is None:
            refused.append(Decision(name, False, decision.reason))
            continue
        if refused:
            known.log_fallback(device, choice.name, refused[0].reason, name)
        can = backend.capabilities()
        tells = known.format_checks(device)
        if tells or not can.threads:
            launch = _Careful(launch, not can.threads, tells)
        trace = (*refused, Decision(name, True, decision.reason))
        return launch, Choice(backend, trace, choice.forced, can)
    lines = "\n".join(f"  {d}" for d in refused)
    forced = f"backend {choice.name!r} was forced and does not take"
    why = f"{forced if choice.forced else 'no backend takes'} its plan:\n{lines}\n{plan}"
    raise Unsupported("This copy", why)


def prepare_by(backend: Backend, plan: CopyPlan) -> tuple[Launch | None, Decision]:
    """The launch of one backend, or None and the reason."""
    try:
        decision = backend.check(plan)
        return (backend.prepare(plan) if decision.accepted else None), decision
    except Unsupported as error:
        why = str(error)
    except Exception as error:  # a compiler that fails must not take the other backends down
        why = f"it failed to prepare: {type(error).__name__}: {error}"
    return None, Decision(backend.name, False, why)


def bring(indices: Sequence[Index], home: torch.device, dtypes: frozenset[torch.dtype]) -> None:
    """Send ids on the host to a device in one small copy, ordered on its current stream, where
    `Index.ids_on` then finds them. Only those of fleeting indices: they are used on no other stream
    than this one, and on streams that wait for it."""
    if home.type not in ASYNCHRONOUS or torch.int64 not in dtypes:
        return
    sent = [
        index
        for index in dict.fromkeys(indices)
        if index.fleeting and index.on_host and not index.has_ids_on(home, dtypes)
    ]
    if not sent:
        return
    from portakv.host.small import to_device  # not before it is needed

    if len(sent) == 1:
        sent[0].add_copy(to_device(sent[0].host_ids(), home, torch.int64))
        return
    listed = [index.host_ids() for index in sent]
    ids = to_device(np.concatenate(listed), home, torch.int64)
    for index, own in zip(sent, ids.split([each.size for each in listed]), strict=True):
        index.add_copy(own)


def bring_table(view: KVView, home: torch.device, stream: torch.Stream | None = None) -> None:
    """Have a view's table of addresses on a device, in time for what reads it on ``stream`` (None:
    the current one). It is sent once, by a small copy that the host does not wait for, if the
    device is of a type `ASYNCHRONOUS`. Raises `Unsupported` inside graph capture."""
    if view.device == home and home.type not in ASYNCHRONOUS:
        view.table  # noqa: B018 - made now, if it is not there
    elif view.table_on(home) is None:
        from portakv.host.small import to_device  # not before it is needed

        sent = to_device(view.addresses_for(home), home, torch.int64, stream=stream)
        view.keep_table(sent, None if view.fleeting else event_pool(home).recorded(stream))
    view.follow_table(home, stream)


_PLAIN = "bytes lie where strides say"


class _Careful:
    """A launch of a backend that does not claim ``threads``, or on a device whose tensors may be
    laid out otherwise than their strides say: each view is looked at once, before anything is
    moved, and remembers that it was right. It hides `Repeatable.again`: every transfer comes here.
    """

    def __init__(self, launch: Launch, one_at_a_time: bool, tells: Sequence[FormatCheck]) -> None:
        self._launch = launch
        self._tells = tells
        self._lock = threading.Lock() if one_at_a_time else nullcontext()

    def __call__(self, src: KVView, dst: KVView, *rest: Any, **named: Any) -> Pending | None:
        for view in (src, dst) if self._tells else ():
            if _PLAIN not in view.derived:
                # Of foreign memory there is no tensor that could have a private format.
                for owner in view.held if view.form.place == "device" and not view.foreign else ():
                    for why in filter(None, (tell(owner) for tell in self._tells)):
                        what = f"A copy of tensors of {view.layout.text!r}"
                        raise Unsupported(what, f"{why}; nothing was moved")
                view.derived[_PLAIN] = True
        with self._lock:
            return self._launch(src, dst, *rest, **named)

    @property
    def claims(self) -> Callable[[Move], Capabilities] | None:
        """What an engine that picks engines tells of a copy."""
        return getattr(self._launch, "claims", None)

    @property
    def carried(self) -> tuple[str, str] | None:
        """What an engine that picks engines tells of its last launch."""
        return getattr(self._launch, "carried", None)
