# SPDX-License-Identifier: Apache-2.0
"""The registry: which backend carries a plan out, and why not the others.

Candidates are asked in order and every answer is kept. Backends are imported when asked; third
parties register through the entry-point group ``portakv.backends`` or `register_backend`.
"""

from __future__ import annotations

import difflib
import logging
import os
import pkgutil
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import NamedTuple, cast

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Tells
from portakv.errors import BackendUnavailable
from portakv.registry.self_check import SelfCheck, self_check
from portakv.runtime.devices import DeviceAbsent, devices_present, indexed

#: The backends that PortaKV brings, in the order in which they are asked. Nowhere else does the
#: library know a vendor's name.
BUILT_IN = {
    "cuda": "portakv.backends.cuda:Cuda",
    "hip": "portakv.backends.hip:Hip",
    "ascend": "portakv.backends.ascend:Ascend",
    "mlu": "portakv.backends.mlu:Mlu",
    "triton": "portakv.backends.triton:Triton",
    "host": "portakv.engines.choose:Host",
    "staged": "portakv.engines.staged:Staged",
    "descriptors": "portakv.engines.descriptors:Descriptors",
    "direct": "portakv.engines.direct:Direct",
    "ring": "portakv.engines.pageable:Ring",
    "compiled": "portakv.backends.compiled:Compiled",
    "reference": "portakv.backends.reference:Reference",
}
#: Engines: between a device and the host only, for the backend that serves the device. The first
#: one chooses among the others.
ENGINES = ("host", "staged", "descriptors", "direct", "ring")
#: What comes last on every device: they run everywhere, and never faster than a native one.
LAST = ("compiled", "reference")
#: By device type, what is used only when asked for: on a CPU it gains less than compiling costs.
ONLY_ASKED = {"cpu": ("compiled",)}
#: The one type of device that a candidate is made for; the others run on several.
MADE_FOR = {"cuda": "cuda", "hip": "cuda", "ascend": "npu", "mlu": "mlu"}
#: Environment variable that beats the ``backend=`` argument, which beats the automatic choice.
ENVIRONMENT = "PORTAKV_BACKEND"
ENTRY_POINTS = "portakv.backends"

_USABLE = (SelfCheck.NOT_YET, SelfCheck.PASSED, SelfCheck.WAIVED)
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_log = logging.getLogger(__name__)


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


class _Answer(NamedTuple):
    """What one candidate said of one device; ``backend`` is None if its probe rejected it."""

    name: str
    backend: Backend | None
    reason: str
    check: SelfCheck = SelfCheck.NOT_YET

    @property
    def decision(self) -> Decision:
        usable = self.backend is not None and self.check in _USABLE
        unchecked = usable and self.check is SelfCheck.NOT_YET
        return Decision(self.name, usable, "(not self-checked yet) " * unchecked + self.reason)

    def checked(self, state: SelfCheck, reason: str) -> _Answer:
        return self._replace(check=state, reason=f"{self.reason}; {reason}")


class Registry:
    """Names of backends, what each said of each device, and those that were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._targets: dict[str, str | type[Backend]] = dict(BUILT_IN)
        self._answers: dict[tuple[str, torch.device], _Answer] = {}
        self._choices: dict[tuple[torch.device, str | None], Choice] = {}
        self._tells: dict[torch.device, tuple[Tells, ...]] = {}
        self._installed: set[str] = set()
        self._refused_entries: list[Decision] = []
        self._logged: set[tuple[torch.device, str, str]] = set()
        self._scanned = False

    def register(self, name: str, target: str | type[Backend]) -> None:
        """Register a backend under a name; see `register_backend`."""
        with self._lock:
            self._scan()
            if not name or not isinstance(name, str):
                raise BackendUnavailable(
                    f"A backend was to be registered as {name!r}; its name is a word that is not "
                    f"empty."
                )
            if name in self._targets:
                raise BackendUnavailable(
                    f"A backend named {name!r} is registered already; silent replacement is "
                    f"refused. Choose another name."
                )
            if not isinstance(target, str):
                _check_class(target, name)
            elif not _TARGET.fullmatch(target):
                raise BackendUnavailable(
                    f"Backend {name!r} was to be registered as {target!r}; expected "
                    f"'package.module:Class', or the class."
                )
            self._targets[name] = target
            self._forget(name)  # it may have been asked for in vain

    def unregister(self, name: str) -> None:
        """Forget a backend that was registered; unknown and built-in names are errors."""
        with self._lock:
            if name in BUILT_IN or name not in self._targets:
                why = "cannot be removed: only registered ones can."
                raise BackendUnavailable(f"Backend {name!r} {why}")
            del self._targets[name]
            self._installed.discard(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._choices.clear()
        self._tells.clear()
        self._answers = {key: said for key, said in self._answers.items() if key[0] != name}

    def names(self) -> list[str]:
        """Every candidate, in the order in which they are asked."""
        with self._lock:
            self._scan()
            return sorted(self._targets, key=lambda name: name in LAST and 1 + LAST.index(name))

    def automatic(self, device: torch.device) -> list[str]:
        """The candidates that are used without being asked for, in their order. On the CPU none of
        an entry point is: a package does not become the default there by being installed."""
        asked = {*ONLY_ASKED.get(device.type, ()), *ENGINES}
        names = self.names()
        if device.type == "cpu":
            asked |= self._installed
        return [name for name in names if name not in asked]

    def ask(
        self, name: str, device: torch.device, *, check: bool
    ) -> tuple[Backend | None, Decision]:
        """One candidate's answer for ``device``; with ``check`` it is also self-checked, once."""
        answer = self._answer(name, device, check)
        return (answer.backend if answer.decision.accepted else None), answer.decision

    def _answer(self, name: str, device: torch.device, check: bool) -> _Answer:
        with self._lock:
            answer = self._answers.get((name, device)) or self._probe(name, device)
            if check and answer.backend is not None and answer.check is SelfCheck.NOT_YET:
                answer = answer.checked(*self_check(answer.backend))
            if name in self._targets:
                self._answers[name, device] = answer
            return answer

    def admit(self, name: str, device: torch.device) -> Decision:
        """Take a backend without its self-check, for a caller that judges it; its probe counts."""
        with self._lock:
            answer = self._answer(name, device, False)
            if answer.backend is not None and answer.check is SelfCheck.NOT_YET:
                answer = answer.checked(SelfCheck.WAIVED, "not self-checked, as was asked")
                self._answers[name, device] = answer
            return answer.decision

    def choose(self, device: torch.device | str, asked: str | None) -> Choice:
        """The backend for a device; see `choose`."""
        forced = os.environ.get(ENVIRONMENT) or asked
        known = self._choices.get((device, forced)) if isinstance(device, torch.device) else None
        if known is not None:
            return known
        device = found(device)
        with self._lock:
            if (device, forced) not in self._choices:
                made = self._choices[device, forced] = self._choose(device, forced)
                _log.info("%s: backend %s, %s", device, made.name, made.trace[-1].reason)
            return self._choices[device, forced]

    def _choose(self, device: torch.device, forced: str | None) -> Choice:
        trace: list[Decision] = []
        for name in self.automatic(device) if forced is None else [forced]:
            answer = self._answer(name, device, True)
            trace.append(answer.decision)
            # A backend that takes no test pattern is used only when it is named.
            usable = trace[-1].accepted or (forced and answer.check is SelfCheck.UNCHECKABLE)
            if usable and answer.backend is not None:
                can = answer.backend.capabilities()
                return Choice(answer.backend, tuple(trace), forced is not None, can)
        raise _unavailable(device, forced, trace, self.trace(device))

    def trace(self, device: torch.device) -> tuple[Decision, ...]:
        """What every candidate says of ``device``, without choosing; see `trace`."""
        automatic, decisions = self.automatic(device), list[Decision]()
        for name in self.names():
            said = self._answer(name, device, False).decision
            if said.accepted and name not in automatic:
                reason = f"{said.reason}; on {device.type} it is used only when asked for"
                said = Decision(name, True, reason)
            decisions.append(said)
        return (*decisions, *self._refused_entries)

    def trace_absent(self, absent: DeviceAbsent) -> tuple[Decision, ...]:
        """What every candidate lacks for a device that torch cannot use; none accepts."""
        with self._lock:
            device = cast(torch.device, absent.device)  # or a name, of which a probe reads the type
            said = [self._probe(name, device, make=False).decision for name in self.names()]
        return (*said, *self._refused_entries)

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
                # Not suppressed: without an answer bytes of a private format might be moved.
                told = [cls.hides(device) for cls in classes]
                self._tells[device] = tuple(tell for tell in told if tell is not None)
            return self._tells[device]

    def log_fallback(self, device: torch.device, chosen: str, why: str, taken: str) -> None:
        """Log, once for each pair, that another backend than the chosen one takes a plan."""
        if (device, chosen, taken) not in self._logged:
            self._logged.add((device, chosen, taken))
            told = "%s: backend %s in place of %s, which rejects a plan: %s"
            _log.info(told, device, taken, chosen, why)

    def _class(self, name: str) -> type[Backend]:
        target = self._targets[name]
        found = pkgutil.resolve_name(target) if isinstance(target, str) else target
        return _check_class(found, name)

    def _probe(self, name: str, device: torch.device, *, make: bool = True) -> _Answer:
        """What a candidate says; with ``make`` its backend is made if it accepts."""
        self._scan()
        if name not in self._targets:
            return _Answer(name, None, self.unknown(name).reason)
        try:
            cls = self._class(name)
            decision = cls.probe(device)
            if not decision.accepted:
                return _Answer(name, None, decision.reason)
            if not make:
                return _Answer(name, None, "it needs the device")
            backend = cls(device)
        except (Exception, SystemExit) as error:  # a broken package must not take others down
            return _Answer(name, None, f"it failed to load: {type(error).__name__}: {error}")
        backend.name = name
        return _Answer(name, backend, decision.reason)

    def unknown(self, name: str) -> Decision:
        """The answer for a name that no candidate has."""
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=1)
        meant = f" did you mean {near[0]}?" if near else ""
        return Decision(name, False, f"no such backend;{meant} known are {', '.join(names)}")

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for entry in entry_points(group=ENTRY_POINTS):
            if entry.name in self._targets:
                why = f"the entry point {entry.value!r} would replace a backend of that name"
                self._refused_entries.append(Decision(entry.name, False, f"{why}; refused"))
            else:
                self._targets[entry.name] = f"{entry.module}:{entry.attr}"
                self._installed.add(entry.name)


def _unavailable(
    device: torch.device, forced: str | None, tried: Sequence[Decision], said: Sequence[Decision]
) -> BackendUnavailable:
    """The error if no backend serves a device: the reason first, other answers on request."""
    if forced is not None:
        unset = f"Unset {ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else "Name no backend"
        todo = f"{unset} to let the registry choose, or mend the reason."
        asked = f"Backend {forced!r} was forced, but it cannot serve {device}: {tried[-1].reason}."
    else:
        close = [d for d in tried if MADE_FOR.get(d.name, device.type) == device.type]
        asked = "\n".join([f"No backend can serve {device}:", *(f"  {d}" for d in close)])
        todo = "Mend one of the reasons."
    error = BackendUnavailable(
        f"{asked}\n{todo} `portakv backends --device {device}` shows what every candidate says."
    )
    error.trace = (*tried, *(d for d in said if d.name not in {t.name for t in tried}))
    return error


def _check_class(found: object, name: str) -> type[Backend]:
    """The class of a backend; raises `BackendUnavailable` for anything else."""
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendUnavailable(
            f"Backend {name!r} is {found!r}, which is not a portakv Backend class; expected a "
            f"subclass of portakv.backends.base.Backend."
        )
    return found


REGISTRY = Registry()


def register_backend(name: str, target: str | type[Backend]) -> None:
    """Register a backend: ``"pkg.mod:Class"`` (imported when asked) or the class.

    It is asked behind PortaKV's native backends and before `compiled` and `reference`.

    Raises:
        BackendUnavailable: the name is taken, or the target is no backend.
    """
    REGISTRY.register(name, target)


def choose(device: torch.device | str, backend: str | None = None) -> Choice:
    """The backend for ``device``: ``PORTAKV_BACKEND``, else ``backend``, else the first accepted.

    Raises:
        BackendUnavailable: with the trace; a forced backend never falls back.
    """
    if backend is not None and not isinstance(backend, str):
        raise BackendUnavailable(
            f"backend={backend!r} was asked for; expected the name of a backend. Name none to let "
            f"the registry choose."
        )
    return REGISTRY.choose(device, backend)


def trace(device: torch.device | str) -> tuple[Decision, ...]:
    """Every candidate's answer for ``device``; nothing is self-checked that was not already.

    Of a device that torch cannot use here each says what it lacks, and none accepts.
    """
    try:
        place = found(device)
    except BackendUnavailable as absent:
        return cast("tuple[Decision, ...]", absent.trace)
    return REGISTRY.trace(place)


def found(device: torch.device | str) -> torch.device:
    """The device with its index; a vendor's package is imported if torch does not know it.

    Raises:
        BackendUnavailable: torch cannot use it here; ``trace`` is what each candidate says of it.
    """
    try:
        return indexed(device)
    except DeviceAbsent as absent:
        said = REGISTRY.trace_absent(absent)
        with suppress(DeviceAbsent, RuntimeError, TypeError):
            torch.device(device)  # what a candidate imports may have brought it
            return indexed(device)
        todo, more = "" if absent.meant else ".", ""
        if absent.known:
            todo += " Mend that, or pass"
            more = f" `portakv backends --device {device}` shows what every candidate says."
        else:
            todo += " Pass"
        error = BackendUnavailable(
            f"Device {str(device)!r} was asked for, but {absent}{todo} a device of this machine: "
            f"{', '.join(map(str, devices_present()))}.{more}"
        )
        error.trace = said
        raise error from absent
