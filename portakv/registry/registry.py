# SPDX-License-Identifier: Apache-2.0
"""The registry: which backend carries a plan out, and why not the others.

Candidates are asked in order and every answer is kept. Backends are imported when asked; third
parties register through the entry-point group ``portakv.backends`` or `register_backend`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import cast

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch, Tells
from portakv.errors import BackendUnavailable, Unsupported
from portakv.plan.plan import CopyPlan
from portakv.registry.builtin import BUILT_IN, ENGINES, LAST, ONLY_ASKED
from portakv.registry.launches import OneAtATime, PlainOnly
from portakv.registry.self_check import UNCHECKABLE, self_check
from portakv.runtime.devices import DeviceAbsent, indexed

#: Environment variable that beats the ``backend=`` argument, which beats the automatic choice.
ENVIRONMENT = "PORTAKV_BACKEND"
ENTRY_POINTS = "portakv.backends"


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What was chosen for a device, and every answer on the way. Compared by identity."""

    backend: Backend
    trace: tuple[Decision, ...]
    forced: bool
    can: Capabilities

    @property
    def name(self) -> str:
        """The name of the chosen backend."""
        return self.backend.name


class Registry:
    """Names of backends, what each said of each device, and those that were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loaders: dict[str, Callable[[], object]] = {}
        self._known: dict[tuple[str, torch.device], tuple[Backend | None, Decision]] = {}
        self._choices: dict[tuple[torch.device, str | None], Choice] = {}
        self._unchecked: dict[tuple[str, torch.device], Backend] = {}
        self._tells: dict[torch.device, tuple[Tells, ...]] = {}
        self._broken: dict[str, str] = {}
        self._scanned = False
        for name, target in BUILT_IN.items():
            self._loaders[name] = _importer(target)

    def register(self, name: str, target: str | type[Backend]) -> None:
        """Register a backend under a name; see `register_backend`."""
        with self._lock:
            self._scan()
            if not name or not isinstance(name, str):
                raise BackendUnavailable(
                    f"A backend was to be registered as {name!r}; its name is a word that is not "
                    f"empty."
                )
            if name in self._loaders:
                raise BackendUnavailable(
                    f"A backend named {name!r} is registered already; silent replacement is "
                    f"refused. Choose another name."
                )
            self._loaders[name] = _importer(target) if isinstance(target, str) else lambda: target
            self._choices.clear()
            self._forget(name)  # somebody may have asked for it in vain

    def unregister(self, name: str) -> None:
        """Forget a backend that was registered; unknown and built-in names are errors."""
        with self._lock:
            if name in BUILT_IN or name not in self._loaders:
                raise BackendUnavailable(
                    f"Backend {name!r} cannot be removed: only registered ones can."
                )
            del self._loaders[name]
            self._choices.clear()
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._tells.clear()
        self._known = {key: kept for key, kept in self._known.items() if key[0] != name}
        self._unchecked = {key: kept for key, kept in self._unchecked.items() if key[0] != name}

    def names(self) -> list[str]:
        """Every candidate, in the order in which they are asked."""
        with self._lock:
            self._scan()
            first = [name for name in self._loaders if name not in LAST]
            return [*first, *(name for name in LAST if name in self._loaders)]

    def automatic(self, device: torch.device) -> list[str]:
        """The candidates that nobody has to ask for, in their order."""
        asked = (*ONLY_ASKED.get(device.type, ()), *ENGINES)
        return [name for name in self.names() if name not in asked]

    def ask(
        self, name: str, device: torch.device, *, check: bool
    ) -> tuple[Backend | None, Decision]:
        """One candidate's answer for ``device``; with ``check`` it is also self-checked, once."""
        with self._lock:
            known = self._known.get((name, device))
            if known is None:
                known = self._known[name, device] = self._probe(name, device)
            backend, decision = known
            if backend is not None and check and decision.reason.startswith(_UNCHECKED):
                checked = self_check(backend)
                reason = f"{decision.reason[len(_UNCHECKED) :]}; {checked.reason}"
                decision = Decision(name, checked.accepted, reason)
                if checked.reason.startswith(UNCHECKABLE):
                    self._unchecked[name, device] = backend
                known = (backend if checked.accepted else None, decision)
                self._known[name, device] = known
            return known

    def admit(self, name: str, device: torch.device) -> Decision:
        """Take a backend without its self-check, for who judges it himself; its probe counts."""
        with self._lock:
            backend, decision = self.ask(name, device, check=False)
            if backend is not None and decision.reason.startswith(_UNCHECKED):
                reason = f"{decision.reason[len(_UNCHECKED) :]}; not self-checked, as was asked"
                decision = Decision(name, True, reason)
                self._known[name, device] = (backend, decision)
            return decision

    def choose(self, device: torch.device, asked: str | None) -> Choice:
        """The backend for a device; see `choose`."""
        forced = os.environ.get(ENVIRONMENT) or asked
        with self._lock:
            known = self._choices.get((device, forced))
            if known is None:
                known = self._choices[device, forced] = self._choose(device, forced)
            return known

    def choose_plainly(self, device: torch.device, name: str) -> Choice:
        """A named backend whatever the environment says: for work that is not the user's copy."""
        with self._lock:
            return self._choices.get((device, name)) or self._choices.setdefault(
                (device, name), self._choose(device, name)
            )

    def _choose(self, device: torch.device, forced: str | None) -> Choice:
        trace: list[Decision] = []
        candidates = self.automatic(device) if forced is None else [forced]
        for name in candidates:
            backend, decision = self.ask(name, device, check=True)
            if backend is None and forced is not None:
                backend = self._unchecked.get((name, device))
            trace.append(decision)
            if backend is not None:
                return Choice(backend, tuple(trace), forced is not None, backend.capabilities())
        raise self._unavailable(device, forced, trace)

    def trace(self, device: torch.device) -> tuple[Decision, ...]:
        """What every candidate says of ``device``, without choosing; see `trace`."""
        decisions = []
        automatic = self.automatic(device)
        for name in self.names():
            decision = self.ask(name, device, check=False)[1]
            if decision.accepted and name not in automatic:
                reason = f"{decision.reason}; on {device.type} it is used only when asked for"
                decision = Decision(name, decision.accepted, reason)
            decisions.append(decision)
        decisions += [Decision(name, False, why) for name, why in self._broken.items()]
        return tuple(decisions)

    def trace_absent(self, absent: DeviceAbsent) -> tuple[Decision, ...]:
        """What every candidate lacks for a device that torch cannot use; none accepts."""
        with self._lock:
            device = cast(torch.device, absent.device)  # or a name, of which a probe reads the type
            said = [self._asked(name, device)[1] for name in self.names()]
        needs = "it needs the device"
        decisions = [Decision(d.name, False, needs) if d.accepted else d for d in said]
        decisions += [Decision(name, False, why) for name, why in self._broken.items()]
        return tuple(decisions)

    def tells(self, device: torch.device) -> tuple[Tells, ...]:
        """What tells, of tensors on a device, those that no backend may move by their strides."""
        # Only what extends torch can have formats that torch knows nothing of.
        if device.type != torch._C._get_privateuse1_backend_name():
            return ()
        with self._lock:
            if device not in self._tells:
                classes = []
                for name in self.names():
                    with suppress(Exception, SystemExit):  # what does not load knows of no tensors
                        classes.append(self._class(name))
                told = [cls.hides(device) for cls in classes]
                self._tells[device] = tuple(tell for tell in told if tell is not None)
            return self._tells[device]

    def _class(self, name: str) -> type[Backend]:
        cls = self._loaders[name]()
        if not (isinstance(cls, type) and issubclass(cls, Backend)):
            raise TypeError(f"{cls!r} is not a portakv Backend class")
        return cls

    def _asked(self, name: str, device: torch.device) -> tuple[type[Backend] | None, Decision]:
        """What a candidate's probe says, and its class where it accepts."""
        self._scan()
        if name not in self._loaders:
            return None, self.unknown(name)
        try:
            cls = self._class(name)
            decision = cls.probe(device)
        except (Exception, SystemExit) as error:  # a broken package must not take others down
            return None, _failed(name, error)
        accepted = decision.accepted
        return (cls if accepted else None), Decision(name, accepted, decision.reason)

    def _probe(self, name: str, device: torch.device) -> tuple[Backend | None, Decision]:
        cls, decision = self._asked(name, device)
        if cls is None:
            return None, decision
        try:
            backend = cls(device)
        except (Exception, SystemExit) as error:
            return None, _failed(name, error)
        if backend.name != name:
            backend.name = name
        return backend, Decision(name, True, _UNCHECKED + decision.reason)

    def unknown(self, name: str) -> Decision:
        """The answer for a name that no candidate has."""
        near = difflib.get_close_matches(name, self.names(), n=1)
        meant = f"; did you mean {near[0]}?" if near else ";"
        reason = f"no such backend{meant} known are {', '.join(self.names())}"
        return Decision(name, False, reason)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for entry in entry_points(group=ENTRY_POINTS):
            if entry.name in self._loaders:
                self._broken[entry.name] = (
                    f"the entry point {entry.value!r} would replace a backend of that name; refused"
                )
            else:
                self._loaders[entry.name] = entry.load

    def _unavailable(
        self, device: torch.device, forced: str | None, trace: list[Decision]
    ) -> BackendUnavailable:
        forced_to = f"Backend {forced!r} was forced, but it cannot"
        asked = "No backend can" if forced is None else forced_to
        rest = [d for d in self.trace(device) if d.name not in {t.name for t in trace}]
        lines = "\n".join(f"  {d}" for d in [*trace, *rest])
        if os.environ.get(ENVIRONMENT):
            todo = f"Unset {ENVIRONMENT} to let the registry choose, or mend the reason."
        elif forced is not None:
            todo = "Name no backend to let the registry choose, or mend the reason."
        else:
            todo = "Mend one of the reasons."
        return BackendUnavailable(f"{asked} serve {device}. The candidates said:\n{lines}\n{todo}")


_UNCHECKED = "(not self-checked yet) "


def _failed(name: str, error: BaseException) -> Decision:
    return Decision(name, False, f"it failed to load: {type(error).__name__}: {error}")


def _importer(target: str) -> Callable[[], object]:
    def load() -> object:
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)

    return load


REGISTRY = Registry()


def register_backend(name: str, target: str | type[Backend]) -> None:
    """Register a backend: ``"pkg.mod:Class"`` (imported when asked) or the class.

    Raises:
        BackendUnavailable: the name is taken.
    """
    REGISTRY.register(name, target)


def choose(device: torch.device | str, backend: str | None = None) -> Choice:
    """The backend for ``device``: ``PORTAKV_BACKEND``, else ``backend``, else the first accepted.

    Raises:
        BackendUnavailable: with the trace; a forced backend never falls back.
    """
    return REGISTRY.choose(found(device), backend)


def trace(device: torch.device | str) -> tuple[Decision, ...]:
    """Every candidate's answer for ``device``; nothing is self-checked that was not already.

    Of a device that torch cannot use here each says what it lacks, and none accepts.
    """
    place = _sought(device)
    return REGISTRY.trace(place) if isinstance(place, torch.device) else place[1]


def found(device: torch.device | str) -> torch.device:
    """The device with its index; a vendor's package is imported where torch does not know it.

    Raises:
        BackendUnavailable: torch cannot use it here; with what each candidate says of it.
    """
    place = _sought(device)
    if isinstance(place, torch.device):
        return place
    absent, said = place
    lines = "\n".join(f"  {d}" for d in said)
    why = absent.told(d.reason for d in said)
    raise BackendUnavailable(
        f"Device {str(device)!r} was asked for, but {why}. The candidates said:\n{lines}\n"
        f"Mend one of the reasons, or pass a device that torch lists, such as 'cpu'."
    ) from absent


def _sought(
    device: torch.device | str,
) -> torch.device | tuple[DeviceAbsent, tuple[Decision, ...]]:
    """A device, or why it is not here and what the candidates say of that."""
    try:
        return indexed(device)
    except DeviceAbsent as absent:
        said = REGISTRY.trace_absent(absent)
        with suppress(DeviceAbsent, RuntimeError, TypeError):
            torch.device(device)  # what a candidate imports may have brought it
            return indexed(device)
        return absent, said


def prepare(plan: CopyPlan, device: torch.device, choice: Choice) -> tuple[Launch, Choice]:
    """Prepare a launch through the chosen backend, or, unless forced, the next that takes it.

    Raises:
        Unsupported: nobody takes the plan (or the forced backend does not), with the trace.
    """
    refused: list[Decision] = []
    names = [choice.name]
    if not choice.forced:
        order = REGISTRY.automatic(device)
        names += order[order.index(choice.name) + 1 :] if choice.name in order else order
    for name in names:
        backend, decision = REGISTRY.ask(name, device, check=True)
        if name == choice.name:
            backend = choice.backend
        if backend is not None:
            launch, decision = _prepare(backend, plan)
            if launch is not None:
                won = Decision(name, True, decision.reason)
                can = backend.capabilities()
                if not can.threads:
                    launch = OneAtATime(launch)
                tells = REGISTRY.tells(device)
                if tells:
                    launch = PlainOnly(launch, tells)
                return launch, Choice(backend, (*refused, won), choice.forced, can)
        refused.append(Decision(name, False, decision.reason))
    lines = "\n".join(f"  {d}" for d in refused)
    forced = f"backend {choice.name!r} was forced and" if choice.forced else "no backend"
    raise Unsupported("This copy", f"{forced} does not take its plan:\n{lines}\n{plan}")


def _prepare(backend: Backend, plan: CopyPlan) -> tuple[Launch | None, Decision]:
    """The launch of one backend, or None and the reason."""
    try:
        decision = backend.check(plan)
        return (backend.prepare(plan) if decision.accepted else None), decision
    except Unsupported as error:
        why = str(error)
    except Exception as error:  # a compiler that fails must not take the other backends down
        why = f"it failed to prepare: {type(error).__name__}: {error}"
    return None, Decision(backend.name, False, why)
