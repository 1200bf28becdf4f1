# SPDX-License-Identifier: Apache-2.0
"""Ways for staged slots to cross if memory cannot be mapped, and which one is used."""

from __future__ import annotations

import os

import torch

from portakv.arguments import one_of
from portakv.backends.base import Decision
from portakv.errors import BackendUnavailable
from portakv.migrate.transports.base import Mover
from portakv.migrate.transports.distributed import Distributed
from portakv.migrate.transports.onesided import Mooncake, Nixl

#: As they are asked; Mooncake only by name, since who reaches its port can write into slots.
MOVERS: dict[str, type[Mover]] = {x.name: x for x in (Distributed, Nixl, Mooncake)}
ONLY_ASKED = ("mooncake",)
ENVIRONMENT = "PORTAKV_MOVER"


def forced(name: str | None = None) -> str | None:
    """The mover that ``PORTAKV_MOVER`` or else ``name`` forces; raises `InvalidTerms` if there is
    none of that name."""
    asked = os.environ.get(ENVIRONMENT) or name
    if asked is None:
        return None
    return one_of(ENVIRONMENT if os.environ.get(ENVIRONMENT) else "mover", asked, MOVERS)


def check_mover(name: str | None, device: torch.device) -> None:
    """Raise `InvalidTerms` for another name, and `BackendUnavailable` if that mover can carry
    slots neither of the device nor of the host here."""
    if name is None:
        return
    mover = MOVERS[one_of("mover", name, MOVERS)]
    said = [mover.probe(each) for each in dict.fromkeys((device, torch.device("cpu")))]
    if not any(each.accepted for each in said):
        found = "; ".join(map(str, said))
        error = BackendUnavailable(
            f"Expected mover to be one that runs here, got {name!r}: {found}. Install it, or pass "
            f"another."
        )
        error.trace = tuple(said)
        raise error


def choose(device: torch.device, name: str | None = None) -> Mover:
    """The first mover that can carry slots of ``device``, or the one that is `forced`.

    Raises:
        InvalidTerms: there is no mover of that name.
        BackendUnavailable: the forced one cannot run here, or none can; ``trace`` tells why.
    """
    asked = forced(name)
    said = list[Decision]()
    for each in (asked,) if asked else MOVERS:
        if not asked and each in ONLY_ASKED:
            said.append(Decision(each, False, "it is used only if it is asked for by name"))
            continue
        said.append(MOVERS[each].probe(device))
        if said[-1].accepted:
            made = MOVERS[each](device)
            made.why = "; ".join(map(str, said)) + "; it was asked for" * bool(asked)
            return made
    what = f"Mover {asked!r} was" if asked else "A mover was"
    found = "; ".join(map(str, said))
    error = BackendUnavailable(f"{what} asked for {device}: {found}. Install it, or another.")
    error.trace = tuple(said)
    raise error
