# SPDX-License-Identifier: Apache-2.0
"""Ways for staged slots to cross if memory cannot be mapped, and which one is used."""

from __future__ import annotations

import os
import warnings

import torch

from portakv.arguments import one_of
from portakv.backends.base import Decision
from portakv.errors import BackendUnavailable
from portakv.migrate.transports.base import Transport
from portakv.migrate.transports.distributed import Distributed
from portakv.migrate.transports.onesided import Mooncake, Nixl

#: As they are asked; Mooncake only by name, since who reaches its port can write into slots.
TRANSPORTS: dict[str, type[Transport]] = {x.name: x for x in (Distributed, Nixl, Mooncake)}
ONLY_ASKED = ("mooncake",)
ENVIRONMENT = "PORTAKV_MOVER"


def forced(name: str | None = None) -> str | None:
    """Return the transport that ``PORTAKV_MOVER`` or else ``name`` forces; raise `InvalidTerms` for
    an unknown name."""
    asked = os.environ.get(ENVIRONMENT) or name
    if asked is None:
        return None
    return one_of(ENVIRONMENT if os.environ.get(ENVIRONMENT) else "transport", asked, TRANSPORTS)


def check_transport(name: str | None, device: torch.device) -> None:
    """Raise `InvalidTerms` for another name, and `BackendUnavailable` if that transport can carry
    slots neither of the device nor of the host here."""
    if name is None:
        return
    transport = TRANSPORTS[one_of("transport", name, TRANSPORTS)]
    said = [transport.probe(each) for each in dict.fromkeys((device, torch.device("cpu")))]
    if not any(each.accepted for each in said):
        found = "; ".join(map(str, said))
        error = BackendUnavailable(
            f"Expected transport to be one that runs here, got {name!r}: {found}. Install it, "
            f"or pass another."
        )
        error.trace = tuple(said)
        raise error


def choose(device: torch.device, name: str | None = None) -> Transport:
    """The first transport that can carry slots of ``device``, or the one that is `forced`.

    Raises:
        InvalidTerms: there is no transport of that name.
        BackendUnavailable: the forced one cannot run here, or none can; ``trace`` tells why.
    """
    asked = forced(name)
    said = list[Decision]()
    for each in (asked,) if asked else TRANSPORTS:
        if not asked and each in ONLY_ASKED:
            said.append(Decision(each, False, "it is used only if it is asked for by name"))
            continue
        said.append(TRANSPORTS[each].probe(device))
        if said[-1].accepted:
            made = TRANSPORTS[each](device)
            made.why = "; ".join(map(str, said)) + "; it was asked for" * bool(asked)
            return made
    what = f"Transport {asked!r} was" if asked else "A transport was"
    found = "; ".join(map(str, said))
    error = BackendUnavailable(f"{what} asked for {device}: {found}. Install it, or another.")
    error.trace = tuple(said)
    raise error


def renamed(transport: str | None, mover: str | None) -> str | None:
    """Return the transport that the deprecated argument ``mover`` names, or else ``transport``."""
    if mover is None:
        return transport
    warnings.warn(
        "The argument mover= is deprecated and goes in 0.2.0. Pass transport=.",
        DeprecationWarning,
        stacklevel=3,
    )
    return one_of("mover", mover, TRANSPORTS)
