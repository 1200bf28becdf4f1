# SPDX-License-Identifier: Apache-2.0
"""Prepared copies: a plan with the launch that executes it, cached by the two forms.

New memory objects, reallocated caches and other layers of known forms reuse prepared copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch

from portakv.backends.base import (
    Backend,
    Capabilities,
    Decision,
    FormatCheck,
    Launch,
    PackLaunch,
    refusal,
)
from portakv.core.rows import MOST_LISTED
from portakv.errors import Unsupported
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.registry import registry
from portakv.registry.registry import Choice, turn
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Pending, event_pool
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

AnyPlan: TypeAlias = CopyPlan | PackPlan
CAPACITY = 1024  # launches
#: Types of devices to which the library sends ids by a small copy, without blocking the host. To
#: others torch copies the ids, and the host waits for all work on the stream.
ASYNCHRONOUS = frozenset({"cuda"})
_HOST = torch.device("cpu")
_INT64 = frozenset({torch.int64})


class Picks(Protocol):
    """A launch that picks a strategy for each copy; a caller may call the picked one directly."""

    def picked_for(self, move: Move) -> tuple[Prepared, tuple[str, str]]:
        """Return what executes a copy, and its name with the reason for the pick."""

    def instead_of(self, carried: tuple[str, str]) -> tuple[Prepared, tuple[str, str]] | None:
        """Return what executes a copy that the picked strategy had no memory of the device for.
        None: nothing else does."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A plan and the launch that executes it, with the capabilities of the backend.

    Attributes:
        can: the capabilities of the backend.
        ids_device: where ids must be for the backend.
        tables: for each side, whether the launch reads the view's table of addresses.
        carried: the backend, and the reason for the choice.
        launch: a `PackLaunch` if the plan packs or unpacks; see `pack`.
        bare: the same launch for a caller that retains memory of the host until the work has ended.
        unowned: the launch has an own `bare`, since nothing else knows that it uses that memory.
        carries_ids: few ids of the host travel with its launches.
        picks: the launch, if it picks a strategy for each copy.
    """

    plan: AnyPlan
    choice: Choice
    can: Capabilities
    ids_device: torch.device
    tables: tuple[bool, bool]
    carried: tuple[str, str]
    launch: Launch
    bare: Launch
    unowned: bool
    carries_ids: bool
    picks: Picks | None

    @classmethod
    def of(
        cls, plan: AnyPlan, launch: Launch, choice: Choice, carried: tuple[str, str]
    ) -> Prepared:
        """Return the launch of a plan, which a backend prepared, with what a call needs of it."""
        device = choice.backend.device
        bare: Launch = getattr(launch, "bare", launch)
        return cls(
            plan=plan,
            choice=choice,
            can=choice.can,
            ids_device=choice.can.home_of_ids(device),
            tables=getattr(launch, "tables", _looked_up(plan)),
            carried=carried,
            launch=launch,
            bare=bare,
            unowned=bare is not launch,
            carries_ids=device.type != "cpu" and getattr(launch, "carries_ids", False),
            picks=cast("Picks", launch) if hasattr(launch, "picked_for") else None,
        )

    def place_both(self, move: Move) -> Move:
        """Return a copy with the ids of both sides placed as `place` places them."""
        src, dst, src_index, dst_index, count = move
        if src_index.temporary and dst_index.temporary:
            self._bring(src_index, dst_index)  # together
        return Move(src, dst, self.place(src_index), self.place(dst_index), count)

    def place(self, index: Index) -> Index:
        """Return an index with its ids where the backend reads them, in a dtype that it reads."""
        can = self.can
        if index.ids is None or can.index_on == "any":
            return index
        if index.temporary:
            if self._carries(index):
                return index.placed(_HOST, can.index_dtypes)
            self._bring(index)
        return index.placed(self.ids_device, can.index_dtypes)

    def _bring(self, *indices: Index) -> None:
        """Send ids of one call that do not travel with the launch."""
        if self.can.index_on != "any" and self.ids_device.type in ASYNCHRONOUS:
            new = [each for each in indices if not self._carries(each)]
            bring(new, self.ids_device, self.can.index_dtypes)

    def _carries(self, index: Index) -> bool:
        """Return whether ids of the host travel with the launch."""
        ids = index.ids
        new = self.carries_ids and index.temporary and index.on_host
        return new and ids is not None and ids.numel() <= MOST_LISTED

    def pack(
        self,
        move: Move,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
        overflow: torch.Tensor,
    ) -> Pending | None:
        """Pack or unpack a copy whose ids are placed.

        Args:
            stream, status: as for `PackLaunch`.
            overflow: the same, but on the host, and pinned if the backend's device is another one.
                Kernels write there only for blocks that do not fit, so no word is cleared on the
                device or copied.
        """
        launch = cast("PackLaunch", self.launch)
        device = self.choice.backend.device
        if device.type == "cpu" or getattr(launch, "overflow_on_host", False):
            return launch(*move, stream, status, overflow)
        with inside(device if stream is None else stream):
            words = torch.zeros(overflow.shape, dtype=overflow.dtype, device=device)
            pending = launch(*move, stream, status, words)
            overflow.copy_(words, non_blocking=True)
        return pending


#: Prepared copies by the arguments of `prepared`, the forms by the addresses of their words: an
#: entry keeps its forms. A caller that knows the addresses looks here first. A plan that packs has
#: its type as one value more, and so have the stages of a copy that packs across the link.
PREPARED: Bounded[tuple[Any, ...], Any] = Bounded("prepared copies", CAPACITY)


def prepared(
    src: Form,
    dst: Form,
    src_step: int,
    dst_step: int,
    unit: int | None,
    choice: Choice,
    kind: type[AnyPlan] = CopyPlan,
) -> Prepared:
    """Return the prepared copy between two forms; made on the first call, looked up after that.

    ``kind``: `PackPlan` if one of the two forms is packed and the other is raw.

    Raises as the plan and `prepare` do.
    """
    key: tuple[Any, ...] = (src.address, dst.address, src_step, dst_step, unit, choice)
    if kind is not CopyPlan:
        key = (*key, kind)
    ready: Prepared | None = PREPARED.get(key)
    if ready is not None:
        return ready
    plan = kind(src, dst, src_step, dst_step, unit)
    launch, used = prepare(plan, choice)
    reasons = [used.trace[-1].reason]
    if isinstance(plan, PackPlan):
        reasons += [f"{each.name}: {each.reason}" for each in used.trace[:-1]]
    made = Prepared.of(plan, launch, used, (used.name, "; ".join(reasons)))
    # Another thread may have stored one first: all threads use that launch, with its one lock.
    return PREPARED.setdefault(key, made)  # type: ignore[no-any-return]


def _looked_up(plan: AnyPlan) -> tuple[bool, bool]:
    """Return for each side whether a nest looks addresses up."""
    nests = plan.nests
    return any(nest.src_tabled for nest in nests), any(nest.dst_tabled for nest in nests)


def prepare(plan: AnyPlan, choice: Choice) -> tuple[Launch, Choice]:
    """Prepare a launch by the chosen backend, else by the next that takes the plan, unless forced.

    Raises:
        Unsupported: no backend takes the plan (or the forced one does not), with the trace.
    """
    known = registry.REGISTRY
    device = choice.backend.device
    # The chosen backend comes first, then the candidates after it; only it if it is forced.
    order = [] if choice.forced else known.automatic(device)
    if choice.name in order:
        order = order[order.index(choice.name) + 1 :]
    rejected: list[Decision] = []
    for name in (choice.name, *order):
        backend, decision = known.ask(name, device, check=True)
        if name == choice.name:
            # The chosen backend may be one that takes no test pattern, or one with terms.
            backend = choice.backend
        launch = None
        if backend is not None:
            launch, decision = prepare_by(backend, plan)
        if backend is None or launch is None:
            rejected.append(Decision(name, False, decision.reason))
            continue
        if rejected:
            known.log_fallback(device, choice.name, rejected[0].reason, name)
        trace = (*rejected, Decision(name, True, decision.reason))
        can = backend.capabilities()
        return _checked(launch, can, device), Choice(backend, trace, choice.forced, can)

    lines = "\n".join(f"  {decision}" for decision in rejected)
    subject = "no backend takes"
    if choice.forced:
        subject = f"backend {choice.name!r} was forced and does not take"
    raise Unsupported("This copy", f"{subject} its plan:\n{lines}\n{plan}")


def _checked(launch: Launch, can: Capabilities, device: torch.device) -> Launch:
    """Return the launch, inside a `_CheckedLaunch` if its backend or its device needs one."""
    checks = registry.REGISTRY.format_checks(device)
    if not checks and can.threads:
        return launch
    kind = _CheckedPicks if hasattr(launch, "picked_for") else _CheckedLaunch
    return cast("Launch", kind(launch, can.threads, checks))


def prepare_by(backend: Backend, plan: AnyPlan) -> tuple[Launch | None, Decision]:
    """Return the launch of one backend, or None, and the decision.

    A backend that does not claim the encoding of a `PackPlan` is not asked.
    """
    try:
        if isinstance(plan, CopyPlan):
            decision = backend.check(plan)
            return (backend.prepare(plan) if decision.accepted else None), decision
        if plan.encoding not in backend.capabilities().encodings:
            why = refusal(backend.capabilities(), plan) or ""
            return None, Decision(backend.name, False, why)
        decision = backend.check_pack(plan)
        packs = backend.prepare_pack(plan) if decision.accepted else None
        return cast("Launch | None", packs), decision  # `Prepared.pack` calls it
    except Unsupported as error:
        why = str(error)
    except Exception as error:  # a compiler that fails must not take the other backends down
        why = f"it failed to prepare: {type(error).__name__}: {error}"
    return None, Decision(backend.name, False, why)


def bring(
    indices: Iterable[Index], device: torch.device, dtypes: frozenset[torch.dtype] = _INT64
) -> None:
    """Send ids on the host to a device in one small copy, ordered on the current stream.

    `Index.ids_on` then finds them there. Only this stream, and streams that wait for it, may use
    the indices from then on. The host does not wait, as it would if `Index.ids_on` sent them.
    """
    if device.type not in ASYNCHRONOUS or torch.int64 not in dtypes:
        return
    distinct = dict.fromkeys(indices)
    sent = [x for x in distinct if x.on_host and not x.has_ids_on(device, dtypes)]
    if sent:
        from portakv.host.small import to_device  # not before it is needed

        arrays = [index.host_ids() for index in sent]
        ids = to_device(np.concatenate(arrays), device, torch.int64)
        for index, part in zip(sent, ids.split([each.size for each in arrays]), strict=True):
            index.add_copy(part)


def bring_table(
    view: KVView, device: torch.device, stream: torch.Stream | None = None, captured: bool = False
) -> None:
    """Send a view's table of addresses to a device, ordered before the work on ``stream``.

    ``stream`` is None for the current stream. ``captured``: a graph is being captured, in which
    nothing waits for the table. The table is sent once. The host does not wait if the
    type of the device is in `ASYNCHRONOUS`.

    Raises:
        Unsupported: the table would be sent inside graph capture.
    """
    if view.device == device and device.type not in ASYNCHRONOUS:
        view.table  # noqa: B018 - creates the table
    elif view.table_on(device) is None:
        from portakv.host.small import to_device  # not before it is needed

        sent = to_device(view.addresses_for(device), device, torch.int64, stream=stream)
        view.keep_table(sent, None if view.temporary else event_pool(device).recorded(stream))
    if not captured:
        view.follow_table(device, stream)


_PLAIN = "bytes lie where strides say"


class _CheckedLaunch:
    """A launch that checks views first, or that runs in one thread at a time.

    For a backend that does not claim ``threads``, and for a device whose tensors may be in a
    private format. Each view is checked once, before anything is moved, and caches that it passed.
    """

    def __init__(
        self, launch: Launch | PackLaunch, threads: bool, checks: Sequence[FormatCheck]
    ) -> None:
        self._launch = launch
        self._checks = checks
        self._threads = threads

    def __call__(self, src: KVView, dst: KVView, *rest: Any, **named: Any) -> Pending | None:
        self.check_formats(src, dst)
        with turn(self._threads):
            return self._launch(src, dst, *rest, **named)

    def check_formats(self, *views: KVView) -> None:
        """Raise `Unsupported` if a tensor of a view is in a private format."""
        for view in views if self._checks else ():
            if _PLAIN not in view.derived:
                self._check_format(view)

    def _check_format(self, view: KVView) -> None:
        # Raw addresses have no tensor that could be in a private format.
        if view.form.place == "device" and not view.raw:
            for owner, check in product(view.retained, self._checks):
                why = check(owner)
                if why:
                    what = f"A copy of tensors of {view.layout.text!r}"
                    raise Unsupported(what, f"{why}; nothing was moved")
        view.derived[_PLAIN] = True


class _CheckedPicks(_CheckedLaunch):
    """The same for a launch that picks a strategy for each copy."""

    def picked_for(self, move: Move) -> tuple[Prepared, tuple[str, str]]:
        """See `Picks`."""
        self.check_formats(move.src, move.dst)
        return cast(Picks, self._launch).picked_for(move)

    def instead_of(self, carried: tuple[str, str]) -> tuple[Prepared, tuple[str, str]] | None:
        """See `Picks`."""
        return cast(Picks, self._launch).instead_of(carried)
