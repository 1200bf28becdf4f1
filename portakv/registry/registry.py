# SPDX-License-Identifier: Apache-2.0
"""The registry: decide which backend executes a plan, record why the others do not, and check each
backend once on its device before it serves.

Candidates are probed in order, and every decision is recorded. Backends are imported when they are
probed. Third parties register through the entry-point group ``portakv.backends`` or
`register_backend`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, cast

import torch

from portakv.backends.base import Backend, Capabilities, FormatCheck
from portakv.errors import BackendUnavailable, Unsupported
from portakv.plan.plan import CopyPlan
from portakv.runtime.bounded import making
from portakv.runtime.devices import DeviceAbsent, Named, devices_present, indexed
from portakv.selection import Catalog, Decision, Kind, select, unavailable
from portakv.view.index import Index
from portakv.view.view import KVView

#: The backends of PortaKV, in the order in which they are probed. No other place in the library
#: names a vendor.
BUILT_IN = {
    "cuda": "portakv.backends.cuda:Cuda",
    "hip": "portakv.backends.hip:Hip",
    "ascend": "portakv.backends.ascend:Ascend",
    "mlu": "portakv.backends.mlu:Mlu",
    "triton": "portakv.backends.triton:Triton",
    "host": "portakv.interconnect.choose:Host",
    "staged": "portakv.interconnect.staged:Staged",
    "batched_memcpy": "portakv.interconnect.batched_memcpy:BatchedMemcpy",
    "zero_copy": "portakv.interconnect.zero_copy:ZeroCopy",
    "pageable": "portakv.interconnect.pageable:Pageable",
    "compiled": "portakv.backends.compiled:Compiled",
    "reference": "portakv.backends.reference:Reference",
}
#: Transfer strategies copy between a device and the host only, for the backend that serves the
#: device. The first one, `host`, chooses among the other four.
STRATEGIES = ("host", "staged", "batched_memcpy", "zero_copy", "pageable")
#: The last candidates on every device: they run everywhere, and never faster than a native one.
LAST = ("compiled", "reference")
#: The backend of which the automatic choice warns on a device that a native one is made for.
SLOWEST = "reference"
#: For each device type, the backends that are used only by name: on a CPU, compiling costs more
#: than the compiled copy gains.
EXPLICIT_ONLY = {"cpu": ("compiled",)}
#: The one device type of a candidate; candidates that are not listed run on several types.
MADE_FOR = {"cuda": "cuda", "hip": "cuda", "ascend": "npu", "mlu": "mlu"}
#: The candidate that runs on the host only by an interpreter, which a variable asks for, and why it
#: does not run there without the variable.
INTERPRETED = "triton"
INTERPRET = "TRITON_INTERPRET"
NOT_INTERPRETED = (
    f"it needs a GPU; on the host only its interpreter runs: set {INTERPRET}=1 for that"
)
#: Environment variable that overrides the ``backend=`` argument, which overrides the automatic
#: choice.
ENVIRONMENT = "PORTAKV_BACKEND"
# For an unset variable `os.environ` raises two internal errors: 2 us of a copy's 26. A look into
# its private dictionary avoids them.
VARIABLES: Container[object] = getattr(os.environ, "_data", os.environ)
OVERRIDE = os.environ.encodekey(ENVIRONMENT)

#: How backends are named in messages, and how one is forced.
KIND = Kind("backend", ENVIRONMENT, "backend", listing="portakv backends --device {target}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The backend chosen for a device, and every decision before it. Compared by identity."""

    backend: Backend
    trace: tuple[Decision, ...]
    forced: bool
    can: Capabilities

    @property
    def name(self) -> str:
        """Return the name of the chosen backend."""
        return self.backend.name


class _Answer(NamedTuple):
    """The result of probing one candidate on one device."""

    backend: Backend | None  # None: its probe rejected the device, or bytes were wrong
    reason: str
    right: bool | None = None  # None: not self-checked yet

    def decision(self, name: str) -> Decision:
        """Return the answer as a decision under the candidate's name."""
        usable = self.backend is not None and self.right is not False
        reason = self.reason
        if usable and self.right is None:
            reason = f"(not self-checked yet) {reason}"
        return Decision(name, usable, reason)


class Registry:
    """The candidates' names, their answers for each device, and the choices made."""

    def __init__(self) -> None:
        self.catalog = Catalog[Backend](KIND, Backend, BUILT_IN, "portakv.backends", LAST)
        self._answers: dict[tuple[str, torch.device], _Answer] = {}
        self.choices: dict[tuple[torch.device, str | None], Choice] = {}
        self._format_checks: dict[torch.device, tuple[FormatCheck, ...]] = {}
        self._logged: set[tuple[torch.device, str, str]] = set()
        self._warned: set[str] = set()  # types of devices
        self.logged_strategies: dict[torch.device, set[str]] = {}

    def register(self, name: str, target: str | type[Backend]) -> None:
        """Register a backend under a name; see `register_backend`."""
        with making():
            self.catalog.register(name, target)
            self._forget(name)  # an earlier probe of this name may have failed

    def unregister(self, name: str) -> None:
        """Remove a backend that `register` added; raise `BackendUnavailable` if it added none."""
        with making():
            self.catalog.unregister(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        self.choices = {}  # who chooses meanwhile stores the choice in the former one
        self._format_checks.clear()
        others = {key: answer for key, answer in self._answers.items() if key[0] != name}
        self._answers = others

    def names(self) -> list[str]:
        """Return every candidate, in the order in which they are probed."""
        with making():
            return self.catalog.names()

    def automatic(self, device: torch.device) -> list[str]:
        """Return the candidates that are used without being named, in order.

        On the CPU this leaves out every entry point: installing a package does not make it the
        default there.
        """
        names = self.names()
        explicit = {*STRATEGIES, *EXPLICIT_ONLY.get(device.type, ())}
        if device.type == "cpu":
            explicit |= self.catalog.installed
        return [name for name in names if name not in explicit]

    def ask(
        self, name: str, device: torch.device, *, check: bool
    ) -> tuple[Backend | None, Decision]:
        """Return one candidate's backend and decision for ``device``.

        With ``check``, also self-check the backend, once.
        """
        answer = self._answer(name, device, check)
        decision = answer.decision(name)
        return (answer.backend if decision.accepted else None), decision

    def admit(self, name: str, device: torch.device) -> Decision:
        """Accept a backend without its self-check, for a caller that tests it; its probe still
        counts."""
        with making():
            backend, reason, right = answer = self._answer(name, device, False)
            if backend is not None and right is None:
                answer = _Answer(backend, f"{reason}; not self-checked, as requested", True)
                self._answers[name, device] = answer
            return answer.decision(name)

    def _answer(self, name: str, device: torch.device, check: bool) -> _Answer:
        """Return what is known of a candidate; with ``check``, also from its self-check.

        The self-check copies. Its copies wait for locks of a stream's buffers, which other threads
        have while they ask here. So it runs without the lock, and several first calls may each run
        it.
        """
        with making():
            answers = self._answers
            answer = answers.get((name, device)) or self._probe(name, device)
            if name in self.catalog:
                answers[name, device] = answer
        if not check or answer.backend is None or answer.right is not None:
            return answer
        state, why = self_check(answer.backend)
        backend = None if state is SelfCheck.FAILED else answer.backend
        checked = _Answer(backend, f"{answer.reason}; {why}", state is SelfCheck.PASSED)
        with making():
            known = answers.get((name, device), checked)
            if known.right is None:
                answers[name, device] = known = checked
            return known

    def choose(self, device: torch.device, forced: str | None) -> Choice:
        """Return the backend for a device, chosen once; raise `BackendUnavailable` as `choose`
        does."""
        choices = self.choices
        known = choices.get((device, forced))
        if known is not None:
            return known
        try:
            made = select(
                KIND,
                device,
                self.automatic(device),
                lambda name: self._consider(name, device, forced is not None),
                forced,
            )
        except BackendUnavailable as error:
            raise self._complete(error, device, forced) from None
        backend = made.value
        choice = Choice(backend, made.trace, forced is not None, backend.capabilities())
        kept = choices.setdefault((device, forced), choice)
        if kept is choice:
            _log.info("%s: backend %s, %s", device, made.name, made.trace[-1].reason)
            if forced is None and made.name == SLOWEST:
                self._warn_of_slowest(device, made.trace)
        return kept

    def _warn_of_slowest(self, device: torch.device, tried: Sequence[Decision]) -> None:
        """Warn, once for each type of device, if a faster backend is made for a device that gets
        the slowest one.

        A warning of Python's would be an error in processes that make errors of them.
        """
        fitting = [
            each
            for each in tried
            if each.name not in LAST and MADE_FOR.get(each.name, device.type) == device.type
        ]
        # Others run on several types, and lack nothing if they do not know this one.
        unknown = _Answer(None, "")  # it was unregistered meanwhile
        meant = any(
            each.name in MADE_FOR or self._answers.get((each.name, device), unknown).right is False
            for each in fitting
        )
        with making():  # one of several threads warns
            warns = meant and device.type not in self._warned
            if warns:
                self._warned.add(device.type)
        if warns:
            reasons = "; ".join(f"{each.name}: {each.reason}" for each in fitting)
            message = (
                "%s: copies are slow, by backend %s, since no faster one serves the device: %s. "
                "Install what is missing, or pass backend=%r to accept it. `portakv backends "
                "--device %s` lists every decision."
            )
            _log.warning(message, device, SLOWEST, reasons, SLOWEST, device)

    def _consider(
        self, name: str, device: torch.device, named: bool
    ) -> tuple[Backend | None, Decision]:
        """Return a candidate's backend and decision; None if it may not be used.

        A backend that takes no test pattern is used only when it is named.
        """
        answer = self._answer(name, device, True)
        usable = answer.right is True or named
        return (answer.backend if usable else None), answer.decision(name)

    def _complete(
        self, error: BackendUnavailable, device: torch.device, forced: str | None
    ) -> BackendUnavailable:
        """Return the error of a choice with every candidate's decision in its trace.

        Its message leaves out backends that are made for another device type.
        """
        tried = cast("tuple[Decision, ...]", error.trace)
        if forced is None:
            close = [d for d in tried if MADE_FOR.get(d.name, device.type) == device.type]
            error = cast(BackendUnavailable, unavailable(KIND, device, close))
        names = {decision.name for decision in tried}
        error.trace = (*tried, *(d for d in self.trace(device) if d.name not in names))
        return error

    def trace(self, device: torch.device, here: bool = True) -> tuple[Decision, ...]:
        """Return every candidate's decision for ``device``, without choosing.

        With ``here`` false, torch cannot use the device: the decisions list what each candidate
        lacks, and none accepts.
        """
        automatic = self.automatic(device)
        decisions = list[Decision]()
        for name in self.names():
            answer = self._answer(name, device, False) if here else self._probe(name, device, False)
            decision = answer.decision(name)
            if decision.accepted and name not in automatic:
                reason = f"{decision.reason}; on {device.type} it is used only when named"
                decision = Decision(name, True, reason)
            decisions.append(decision)
        return (*decisions, *self.catalog.refused())

    def serves(self, device: torch.device) -> bool:
        """Return True if a third party's probe accepts a device, which need not be present."""
        for name in self.names():
            with suppress(Exception, SystemExit):  # a package that does not load serves nothing
                if name not in BUILT_IN and self.class_of(name).probe(device).accepted:
                    return True
        return False

    def format_checks(self, device: torch.device) -> tuple[FormatCheck, ...]:
        """Return the functions that detect tensors on a device which no backend may move by
        strides."""
        # Only devices that extend torch can have formats that torch does not know.
        if device.type != torch._C._get_privateuse1_backend_name():
            return ()
        with making():
            if device not in self._format_checks:
                classes = []
                for name in self.names():
                    # A package that does not load has no check.
                    with suppress(Exception, SystemExit):
                        classes.append(self.class_of(name))
                # Errors pass through: without a check, bytes of a private format might be moved.
                checks = (cls.hides(device) for cls in classes)
                self._format_checks[device] = tuple(each for each in checks if each is not None)
            return self._format_checks[device]

    def log_fallback(self, device: torch.device, chosen: str, why: str, taken: str) -> None:
        """Log, once for each pair, that a fallback takes a plan in place of the chosen backend."""
        if (device, chosen, taken) not in self._logged:
            self._logged.add((device, chosen, taken))
            message = "%s: backend %s in place of %s, which rejects a plan: %s"
            _log.info(message, device, taken, chosen, why)

    def class_of(self, name: str) -> type[Backend]:
        """Return the class of a candidate, imported if need be."""
        return self.catalog.load(name)

    def _probe(self, name: str, device: torch.device, make: bool = True) -> _Answer:
        """Probe a candidate; with ``make``, create its backend if it accepts."""
        if name not in self.catalog:
            return _Answer(None, self.catalog.unknown(name))
        # What the probe of the candidate would say, without its import.
        only = MADE_FOR.get(name, device.type)
        if only != device.type:
            return _Answer(None, f"it runs on {only} devices, not on {device.type}")
        if name == INTERPRETED and device.type == "cpu" and not os.environ.get(INTERPRET):
            return _Answer(None, NOT_INTERPRETED)
        try:
            cls = self.class_of(name)
            decision = cls.probe(device)
            if not decision.accepted:
                return _Answer(None, decision.reason)
            if not make:
                return _Answer(None, f"{decision.reason}; it needs the device, which is not here")
            backend = cls(device)
        except (Exception, SystemExit) as error:  # a broken package must not stop the others
            return _Answer(None, f"it failed to load: {type(error).__name__}: {error}")
        backend.name = name
        return _Answer(backend, decision.reason)


REGISTRY = Registry()


def register_backend(name: str, target: str | type[Backend]) -> None:
    """Register a backend: ``"pkg.mod:Class"`` (imported when probed) or the class.

    It is probed after PortaKV's native backends and before `compiled` and `reference`.

    Raises:
        BackendUnavailable: the name is taken, or the target is not a backend.
    """
    REGISTRY.register(name, target)


def choose(device: torch.device | str, backend: str | None = None) -> Choice:
    """Return the backend for ``device``: ``PORTAKV_BACKEND``, else ``backend``, else the first
    accepted.

    Raises:
        BackendUnavailable: with the trace; a forced backend never falls back.
    """
    if backend is not None and not isinstance(backend, str):
        raise BackendUnavailable(
            f"Expected the name of a backend, got backend={backend!r}. Pass None to let the "
            f"registry choose."
        )
    forced = backend
    if OVERRIDE in VARIABLES:
        forced = os.environ.get(ENVIRONMENT) or backend
    known = REGISTRY.choices.get((device, forced)) if isinstance(device, torch.device) else None
    if known is not None:
        return known
    return REGISTRY.choose(available_device(device), forced)


def trace(device: torch.device | str) -> tuple[Decision, ...]:
    """Return every candidate's decision for ``device``; runs no self-check.

    If torch cannot use the device here, each decision says what the candidate lacks, and none
    accepts.
    """
    try:
        return REGISTRY.trace(available_device(device))
    except BackendUnavailable as absent:
        return cast("tuple[Decision, ...]", absent.trace)


def available_device(device: torch.device | str) -> torch.device:
    """Return the device with its index; import a vendor's package if torch does not know the
    device.

    Raises:
        BackendUnavailable: torch cannot use it here; ``trace`` has each candidate's decision.
    """
    try:
        return indexed(device)
    except DeviceAbsent as absent:
        # This is a `Named` if torch has no such device: a probe reads only the type. A text that
        # names no device is a type of its own, so that no backend imports its vendor's package.
        whole = isinstance(device, torch.device) or str(absent.device) == device
        place = absent.device if whole else Named(str(device))
        decisions = REGISTRY.trace(cast(torch.device, place), here=False)
        # torch still has no such device, or the name is not one of torch.
        with suppress(DeviceAbsent, RuntimeError, TypeError, ValueError):
            torch.device(device)  # a candidate's import may have added it to torch
            return indexed(device)
        todo = "Fix that, or pass" if absent.known else "Pass"
        more = ""
        if absent.known:
            more = f" `portakv backends --device {absent.device}` lists every candidate's decision."
        here = ", ".join(map(str, devices_present()))
        stop = "" if absent.meant else "."
        name = str(device) if isinstance(device, torch.device) else device
        error = BackendUnavailable(
            f"Expected a device of this machine, got {name!r}: {absent}{stop} {todo} a device of "
            f"this machine: {here}.{more}"
        )
        error.trace = decisions
        raise error from absent


# ------------------------------------------------------------------------------------------------
# The power-on self-check: copy a known pattern on the device, and compare every byte.
#
# The copy goes through a backend's ``check``, ``prepare`` and launch, as the library calls them.

_LAYERS = 2
_BLOCKS = 4
_BLOCK_SIZE = 16
_HEADS = 2
_DIM = 32
_SLOTS = [37, 2, 63, 16, 15, 0, 48, 21]
#: Of all launches whose backends do not claim ``threads``: they may share more than a launch.
_one_at_a_time: threading.Lock


def turn(threads: bool) -> AbstractContextManager[object]:
    """Return the context of a launch by a backend that claims ``threads``, or that does not."""
    return nullcontext() if threads else _one_at_a_time


def _renew() -> None:
    """Begin with a free lock: a forked process lacks the thread of its parent that may have it."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


_renew()
os.register_at_fork(after_in_child=_renew)


class SelfCheck(Enum):
    """The result of a self-check."""

    PASSED = auto()
    FAILED = auto()
    UNCHECKABLE = auto()  # the backend takes no test pattern, so that its bytes stay unchecked


#: Tried in turn: a backend need take only one of them.
_PATTERNS = (
    "layer | kv block token head dim",
    "layer | kv block head token dim",
    "layer kv | block token head dim",
    "layer kv | block head token dim",
)


def self_check(backend: Backend) -> tuple[SelfCheck, str]:
    """Gather and scatter the pattern; return the result, and the reason as a phrase.

    The check fails at the first wrong byte, and if the backend raises.
    """
    refused = ""
    for layout in _PATTERNS:
        try:
            why = _try_pattern(backend, layout)
        except Unsupported as error:
            refused = str(error)
            continue
        except Exception as error:  # any error of a backend is its failure
            return SelfCheck.FAILED, f"its self-check raised {type(error).__name__}: {error}"
        if why:
            return SelfCheck.FAILED, f"its self-check failed: {why}"
        return SelfCheck.PASSED, "self-check passed, every byte right"
    why = f"it could not be self-checked, since it takes no test pattern ({refused}); it is used "
    return SelfCheck.UNCHECKABLE, f"{why}only when forced"


def _try_pattern(backend: Backend, layout: str) -> str | None:
    """Copy the pattern there and back; return the first fault, or None."""
    size = (_LAYERS, 2, _BLOCKS, _BLOCK_SIZE, _HEADS, _DIM)
    # Distinct bytes of every value, including NaN patterns, at odd distances.
    numbers = torch.arange(math.prod(size), dtype=torch.int64, device="cpu")
    known = (numbers * 2654435761 % 65521).to(torch.int16).view(size)
    heads_first = "head token" in layout
    ordered = known.transpose(3, 4) if heads_first else known
    pool = [layer.contiguous().to(backend.device) for layer in ordered]
    target = [torch.full_like(layer, -1) for layer in pool]
    paged = _view_of(pool, layout)
    empty = _view_of(target, layout)

    expected = known.flatten(2, 3)[:, :, _SLOTS].transpose(0, 1)
    chunk = torch.full_like(expected.contiguous(), -1)
    places = backend.capabilities().places
    if ("device", "device") in places:
        chunk = chunk.to(backend.device)
    elif ("device", "pinned") in places:  # a transfer strategy
        chunk = chunk.pin_memory()
    dense = KVView(chunk, "kv layer token head dim")

    _copy(backend, paged, dense, 1, 0)
    if not chunk.cpu().equal(expected):
        return f"{_wrong(chunk.cpu(), expected)} gathering {layout!r}"

    _copy(backend, dense, empty, 0, 1)
    wanted = torch.full_like(known, -1)
    wanted.flatten(2, 3)[:, :, _SLOTS] = expected.transpose(0, 1)
    arrived = torch.stack([layer.cpu() for layer in target])
    wanted = wanted.transpose(3, 4) if heads_first else wanted
    return None if arrived.equal(wanted) else f"{_wrong(arrived, wanted)} scattering {layout!r}"


def _view_of(layers: list[torch.Tensor], layout: str) -> KVView:
    """Return a view of layers whose first axis is kv, which some layouts name as a container."""
    if "layer kv |" in layout:
        return KVView([tuple(layer) for layer in layers], layout)
    return KVView(layers, layout)


def _copy(backend: Backend, src: KVView, dst: KVView, src_step: int, dst_step: int) -> None:
    plan = CopyPlan(src.form, dst.form, src_step, dst_step)
    decision = backend.check(plan)
    if not decision.accepted:
        raise Unsupported(f"The self-check through {backend.name}", decision.reason)
    launch = backend.prepare(plan)
    can = backend.capabilities()
    ids = Index(_SLOTS).placed(can.home_of_ids(backend.device), can.index_dtypes)
    indices = (ids, Index()) if src_step else (Index(), ids)
    with turn(can.threads):
        pending = launch(src, dst, *indices, len(_SLOTS), None, None)
    if pending is not None:
        pending.wait()
    if backend.device.type != "cpu":
        torch.accelerator.synchronize(backend.device)


def _wrong(actual: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = (actual != expected).nonzero()
    return f"{len(wrong)} of {expected.numel()} elements wrong, first at {wrong[0].tolist()},"
