# SPDX-License-Identifier: Apache-2.0
"""The subject of a run: one backend on one device, called as a user and as the library does."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch

from portakv import BackendUnavailable, CopyPlan, Index, KVView, Transfer, Unsupported, copy_rows
from portakv.backends.base import Backend, Capabilities, Decision, Launch, Pending
from portakv.registry.registry import (
    REGISTRY,
    available_device,
    choose,
    register_backend,
)

#: Devices that are simulated, and so have to be loaded before torch knows them.
SIMULATED = "simdev"
_WRITTEN = re.compile(r"\w+(:\d+)?")  # a device


@dataclass(frozen=True)
class Subject:
    """One backend on one device. If the backend does not say what it claims, ``flaw`` is why none
    of its claims can be judged, and ``can`` claims nothing, or is what it says instead."""

    name: str  # under which it is registered; what ``copy_rows(backend=...)`` is given
    target: str  # ``module:Class``
    backend: Backend
    device: torch.device
    can: Capabilities
    trace: tuple[Decision, ...]  # the registry's answers
    emulated: bool = False
    flaw: str = ""

    def copy(self, *arguments: Any, **how: Any) -> Transfer:
        """Copy as a user does: by ``copy_rows`` with this backend forced, or a named one."""
        return copy_rows(*arguments, **{"backend": self.name, **how})

    def prepare(self, plan: CopyPlan) -> Launch:
        """Return the launch, by the backend's own ``check`` and ``prepare``.

        `Unsupported`: either of them rejects the plan.
        """
        decision = self.backend.check(plan)
        if not decision.accepted:
            raise Unsupported(f"This plan through {self.name!r}", decision.reason)
        return self.backend.prepare(plan)

    def launch(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        *,
        status: torch.Tensor | None = None,
        unit: int | None = None,
    ) -> Pending | None:
        """Prepare and launch directly, with nothing of the library in between but that ids are
        brought where the backend reads them; ``count`` is a multiple of the plan's unit."""
        plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step, unit)
        own = self.place(src_index)
        other = self.place(dst_index)
        return self.prepare(plan)(src, dst, own, other, count, None, status)

    def place(self, index: Index) -> Index:
        """Return an index with its ids where the backend claims to read them."""
        return index.placed(self.can.home_of_ids(self.device), self.can.index_dtypes)


def subject(name: str, device: str | torch.device = "cpu", *, emulated: bool = False) -> Subject:
    """Return the backend of a name, or of a class written ``pkg.mod:Class``, on a device.

    ``simdev`` loads the simulated device, ``simdev:mlu`` under that name, as does ``mlu`` with
    ``emulated``; a stand-in takes the place of the vendor's package then. Raises ValueError for a
    name or a device that is malformed, `BackendUnavailable` with the probe's reason.
    """
    place, simulated = _device(device, emulated)
    if ":" in name:
        name = _register(name, place)
    place = available_device(place)
    # Judging wrong bytes is the suite's work: a self-check that failed must not end it early.
    decision = REGISTRY.admit(name, place)
    backend = REGISTRY.ask(name, place, check=False)[0]
    if backend is None:
        raise BackendUnavailable(
            f"Expected backend {name!r} to serve {place}, but {decision.reason}. Install what is "
            f"missing, name the device that it serves with --device, or pass pkg.mod:Class."
        )
    can, flaw = _claims(backend)
    trace = (decision,) if flaw else (*choose(place, name).trace,)
    target = f"{type(backend).__module__}:{type(backend).__qualname__}"
    return Subject(name, target, backend, place, can, trace, simulated, flaw)


def _claims(backend: Backend) -> tuple[Capabilities, str]:
    expected = "expected a portakv.backends.base.Capabilities. Without it no case can be judged."
    try:
        can = backend.capabilities()
        wrong = "" if isinstance(can, Capabilities) else f"returned {can!r}"
    except Exception as error:  # a vendor's code may fail in any way
        can = Capabilities(places=frozenset())
        wrong = f"raised {type(error).__name__}: {error}"
    return can, wrong and f"capabilities() {wrong}; {expected}"


def _device(device: str | torch.device, emulated: bool) -> tuple[torch.device, bool]:
    simulated = emulated or str(device).partition(":")[0] == SIMULATED
    requested = str(device)
    device = torch_name(str(device))
    kind = device.partition(":")[0]
    from portakv_conformance import simdev
    from portakv_conformance.vendor import standins

    if simulated:
        if not standins.enter(kind):
            try:
                simdev.load(kind)
            except simdev.SimulatedDeviceError as error:
                raise BackendUnavailable(f"Expected device {requested!r}. {error}") from error
            standins.install(kind)
    elif not _WRITTEN.fullmatch(device):
        raise ValueError(
            f"Expected a device such as cpu or npu:1, got {requested!r}. Correct --device."
        )
    else:
        try:  # a vendor's package is imported where torch does not know the device
            available_device(device)
        except BackendUnavailable as error:
            if kind not in standins.STANDINS:
                raise
            advice = "Pass --emulated to run on the simulated device under that name."
            raise BackendUnavailable(f"{error}\n{advice}") from error
    try:
        return torch.device(device), simulated
    except RuntimeError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Expected a device that torch knows, got {requested!r}: {why}. Correct --device."
        ) from error


def torch_name(device: str) -> str:
    """Return the name that torch gets: ``mlu:1`` for ``simdev:mlu:1``. ``simdev:1`` stays."""
    kind, _, rest = device.partition(":")
    named = kind == SIMULATED and rest and not rest.partition(":")[0].isdigit()
    return rest if named else device


def _register(target: str, device: torch.device) -> str:
    module, _, attribute = target.partition(":")
    if not (all(word.isidentifier() for word in module.split(".")) and attribute.isidentifier()):
        raise ValueError(
            f"Expected a backend's name, or a class as pkg.mod:Class, got {target!r}. Correct "
            f"NAME; `portakv backends` lists the names."
        )
    try:
        made = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # somebody else's module may fail in any way
        why = f"{type(error).__name__}: {error}"
        raise BackendUnavailable(
            f"Expected {target!r} to load, but it does not: {why}. Pass pkg.mod:Class of an "
            f"installed package, or of a module in the current folder."
        ) from None
    if not (isinstance(made, type) and issubclass(made, Backend)) or inspect.isabstract(made):
        raise BackendUnavailable(
            f"Expected {target!r} to name a backend, got {made!r}. Pass a class of "
            f"portakv.backends.base.Backend that implements probe, capabilities and prepare."
        )
    for name in (made.name or attribute, target):  # the first name may be another's
        if name not in REGISTRY.names():
            register_backend(name, made)
            break
        if type(REGISTRY.ask(name, available_device(device), check=False)[0]) is made:
            break
    return name
