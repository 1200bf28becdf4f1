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
import warnings
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from inspect import isabstract
from typing import NamedTuple, cast

import torch

from portakv.backends.base import Backend, Capabilities, Decision, FormatCheck
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
#: Former names of transfer strategies. They stand in recorded results and in calibration files, and
#: callers may still pass them; they go in 0.2.0.
OLD_NAMES = {
    "direct": "zero_copy",
    "descriptors": "batched_memcpy",
    "ring": "pageable",
    "bounced": "bounce",
}
#: What comes last on every device: they run everywhere, and never faster than a native one.
LAST = ("compiled", "reference")
#: By device type, what is used only when asked for: on a CPU it gains less than compiling costs.
EXPLICIT_ONLY = {"cpu": ("compiled",)}
#: The one type of device that a candidate is made for; the others run on several.
MADE_FOR = {"cuda": "cuda", "hip": "cuda", "ascend": "npu", "mlu": "mlu"}
#: Environment variable that beats the ``backend=`` argument, which beats the automatic choice.
ENVIRONMENT = "PORTAKV_BACKEND"
# Of a variable that is not set, `os.environ` raises two errors inside: 2 us of a copy's 26. What it
# keeps its variables in says so at once.
_variables: Container[object] = getattr(os.environ, "_data", os.environ)
_KEY = os.environ.encodekey(ENVIRONMENT)

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
    """What one candidate said of one device."""

    backend: Backend | None  # None: its probe rejected it, or bytes were wrong
    reason: str
    right: bool | None = None  # None: not self-checked yet

    def decision(self, name: str) -> Decision:
        usable = self.backend is not None and self.right is not False
        unchecked = usable and self.right is None
        return Decision(name, usable, "(not self-checked yet) " * unchecked + self.reason)


class Registry:
    """Names of backends, what each said of each device, and those that were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._answers: dict[tuple[str, torch.device], _Answer] = {}
        self.choices: dict[tuple[torch.device, str | None], Choice] = {}
        self._format_checks: dict[torch.device, tuple[FormatCheck, ...]] = {}
        self._installed: set[str] = set()
        self._refused_entries: list[Decision] = []
        self._logged: set[tuple[torch.device, str, str]] = set()
        self.logged_strategies: dict[torch.device, set[str]] = {}

    @cached_property
    def _targets(self) -> dict[str, str | type[Backend]]:
        """Where the candidates are. Entry points are read when the first one is asked for."""
        found: dict[str, str | type[Backend]] = dict(BUILT_IN)
        for entry in entry_points(group="portakv.backends"):
            if entry.name in found or entry.name in OLD_NAMES:
                why = f"the entry point {entry.value!r} would replace a backend of that name"
                self._refused_entries.append(Decision(entry.name, False, f"{why}; refused"))
            else:
                found[entry.name] = f"{entry.module}:{entry.attr}"
                self._installed.add(entry.name)
        return found

    def register(self, name: str, target: str | type[Backend]) -> None:
        """Register a backend under a name; see `register_backend`."""
        with self._lock:
            why = ""
            if not name or not isinstance(name, str):
                why = "its name is a word that is not empty"
            elif name in self._targets or name in OLD_NAMES:
                why = "it is registered already; silent replacement is refused, use another name"
            elif not isinstance(target, str):
                _check_class(target, name)
            elif not _TARGET.fullmatch(target):
                why = f"found {target!r}; expected 'package.module:Class', or the class"
            if why:
                raise BackendUnavailable(f"A backend was to be registered as {name!r}: {why}.")
            self._targets[name] = target
            self._forget(name)  # it may have been asked for in vain

    def unregister(self, name: str) -> None:
        """Forget a backend that `register` added; raises `BackendUnavailable` if it added none."""
        with self._lock:
            if not isinstance(name, str) or name not in self._targets or name in BUILT_IN:
                raise BackendUnavailable(
                    f"Backend {name!r} was to be unregistered, but none was registered under that "
                    f"name; pass a name that was passed to register_backend."
                )
            del self._targets[name]
            self._forget(name)

    def _forget(self, name: str) -> None:
        self.choices.clear()
        self._format_checks.clear()
        self._answers = {key: said for key, said in self._answers.items() if key[0] != name}

    def names(self) -> list[str]:
        """Every candidate, in the order in which they are asked."""
        with self._lock:
            return sorted(self._targets, key=lambda name: name in LAST and 1 + LAST.index(name))

    def automatic(self, device: torch.device) -> list[str]:
        """The candidates that are used without being asked for, in their order. On the CPU none of
        an entry point is: a package does not become the default there by being installed."""
        names = self.names()
        asked = {*STRATEGIES, *EXPLICIT_ONLY.get(device.type, ())}
        if device.type == "cpu":
            asked |= self._installed
        return [name for name in names if name not in asked]

    def ask(
        self, name: str, device: torch.device, *, check: bool
    ) -> tuple[Backend | None, Decision]:
        """One candidate's answer for ``device``; with ``check`` it is also self-checked, once."""
        answer = self._answer(name, device, check)
        decision = answer.decision(name)
        return (answer.backend if decision.accepted else None), decision

    def admit(self, name: str, device: torch.device) -> Decision:
        """Take a backend without its self-check, for a caller that judges it; its probe counts."""
        with self._lock:
            backend, reason, right = answer = self._answer(name, device, False)
            if backend is not None and right is None:
                answer = _Answer(backend, f"{reason}; not self-checked, as was asked", True)
                self._answers[name, device] = answer
            return answer.decision(name)

    def _answer(self, name: str, device: torch.device, check: bool) -> _Answer:
        with self._lock:
            answer = self._answers.get((name, device)) or self._probe(name, device)
            backend, reason, right = answer
            if check and backend is not None and right is None:
                state, why = self_check(backend)
                right = state is SelfCheck.PASSED
                backend = None if state is SelfCheck.FAILED else backend
                answer = _Answer(backend, f"{reason}; {why}", right)
            if name in self._targets:
                self._answers[name, device] = answer
            return answer

    def choose(self, device: torch.device, forced: str | None) -> Choice:
        """The backend for a device, chosen once; raises `BackendUnavailable` as `choose` does."""
        with self._lock:
            if (device, forced) in self.choices:
                return self.choices[device, forced]
            said: list[Decision] = []
            for name in self.automatic(device) if forced is None else [forced]:
                answer = self._answer(name, device, True)
                said.append(answer.decision(name))
                # One that takes no test pattern is used only when it is named.
                if answer.backend is not None and (answer.right or forced is not None):
                    _log.info("%s: backend %s, %s", device, name, said[-1].reason)
                    can = answer.backend.capabilities()
                    made = Choice(answer.backend, tuple(said), forced is not None, can)
                    return self.choices.setdefault((device, forced), made)
        raise _unavailable(device, forced, said, self.trace(device))

    def trace(self, device: torch.device, here: bool = True) -> tuple[Decision, ...]:
        """What every candidate says of ``device``, without choosing; if torch cannot use it
        ``here``, what each lacks: none accepts."""
        automatic = self.automatic(device)
        found = list[Decision]()
        for name in self.names():
            answer = self._answer(name, device, False) if here else self._probe(name, device, False)
            said = answer.decision(name)
            if said.accepted and name not in automatic:
                reason = f"{said.reason}; on {device.type} it is used only when asked for"
                said = Decision(name, True, reason)
            found.append(said)
        return (*found, *self._refused_entries)

    def serves(self, device: torch.device) -> bool:
        """Whether a third party's probe accepts a device, which need not be here."""
        for name in self.names():
            with suppress(Exception, SystemExit):  # what does not load serves nothing
                if name not in BUILT_IN and self.class_of(name).probe(device).accepted:
                    return True
        return False

    def format_checks(self, device: torch.device) -> tuple[FormatCheck, ...]:
        """What tells, of tensors on a device, those that no backend may move by their strides."""
        # Only what extends torch can have formats that torch knows nothing of.
        if device.type != torch._C._get_privateuse1_backend_name():
            return ()
        with self._lock:
            if device not in self._format_checks:
                classes = []
                for name in self.names():
                    with suppress(Exception, SystemExit):  # what does not load knows of no tensors
                        classes.append(self.class_of(name))
                # Not suppressed: without an answer bytes of a private format might be moved.
                told = (cls.hides(device) for cls in classes)
                self._format_checks[device] = tuple(tell for tell in told if tell is not None)
            return self._format_checks[device]

    def log_fallback(self, device: torch.device, chosen: str, why: str, taken: str) -> None:
        """Log, once for each pair, that another backend than the chosen one takes a plan."""
        if (device, chosen, taken) not in self._logged:
            self._logged.add((device, chosen, taken))
            told = "%s: backend %s in place of %s, which rejects a plan: %s"
            _log.info(told, device, taken, chosen, why)

    def class_of(self, name: str) -> type[Backend]:
        target = self._targets[name]
        return (
            _check_class(pkgutil.resolve_name(target), name) if isinstance(target, str) else target
        )

    def _probe(self, name: str, device: torch.device, make: bool = True) -> _Answer:
        """What a candidate says; with ``make`` its backend is made if it accepts."""
        if name not in self._targets:
            return _Answer(None, self.unknown(name).reason)
        try:
            cls = self.class_of(name)
            decision = cls.probe(device)
            if not (decision.accepted and make):
                needs = "; it needs the device, which is not here" * decision.accepted
                return _Answer(None, decision.reason + needs)
            backend = cls(device)
        except (Exception, SystemExit) as error:  # a broken package must not take others down
            return _Answer(None, f"it failed to load: {type(error).__name__}: {error}")
        backend.name = name
        return _Answer(backend, decision.reason)

    def unknown(self, name: str) -> Decision:
        """The answer for a name that no candidate has."""
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=1)
        meant = f" did you mean {near[0]}?" if near else ""
        return Decision(name, False, f"no such backend;{meant} known are {', '.join(names)}")


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
    if not (isinstance(found, type) and issubclass(found, Backend)) or isabstract(found):
        raise BackendUnavailable(
            f"Backend {name!r} is {found!r}, which is not a portakv Backend class; expected a "
            f"subclass of portakv.backends.base.Backend, with its probe, capabilities and prepare."
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
    forced = backend
    if _KEY in _variables:
        forced = os.environ.get(ENVIRONMENT) or backend
    known = REGISTRY.choices.get((device, forced)) if isinstance(device, torch.device) else None
    if known is not None:
        return known
    return REGISTRY.choose(
        available_device(device), None if forced is None else current_name(forced)
    )


def current_name(name: str) -> str:
    """Return the name of a backend, with the former name of a transfer strategy replaced by the new
    one. Warns of a former name."""
    if name not in OLD_NAMES:
        return name
    warnings.warn(
        f"The transfer strategy {name!r} is now {OLD_NAMES[name]!r}. The former name ships in "
        f"0.1.0 and goes in 0.2.0.",
        DeprecationWarning,
        stacklevel=3,
    )
    return OLD_NAMES[name]


def trace(device: torch.device | str) -> tuple[Decision, ...]:
    """Every candidate's answer for ``device``; nothing is self-checked that was not already. Of a
    device that torch cannot use here each says what it lacks, and none accepts."""
    try:
        return REGISTRY.trace(available_device(device))
    except BackendUnavailable as absent:
        return cast("tuple[Decision, ...]", absent.trace)


def available_device(device: torch.device | str) -> torch.device:
    """The device with its index; a vendor's package is imported if torch does not know it.

    Raises:
        BackendUnavailable: torch cannot use it here; ``trace`` is what each candidate says of it.
    """
    try:
        return indexed(device)
    except DeviceAbsent as absent:
        # A name, if no torch.device can be made of it: a probe reads the type alone.
        said = REGISTRY.trace(cast(torch.device, absent.device), here=False)
        with suppress(DeviceAbsent, RuntimeError, TypeError):
            torch.device(device)  # what a candidate imports may have brought it
            return indexed(device)
        todo = "Mend that, or pass" if absent.known else "Pass"
        more = f" `portakv backends --device {absent.device}` shows what every candidate says."
        here = ", ".join(map(str, devices_present()))
        stop = "" if absent.meant else "."
        asked = str(device) if isinstance(device, torch.device) else device
        error = BackendUnavailable(
            f"Device {asked!r} was asked for, but {absent}{stop} {todo} a device of this "
            f"machine: {here}.{more * absent.known}"
        )
        error.trace = said
        raise error from absent
