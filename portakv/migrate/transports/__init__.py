# SPDX-License-Identifier: Apache-2.0
"""Transports carry staging buffers between processes whose memory cannot be mapped. Choose one."""

from __future__ import annotations

from contextlib import suppress

import torch

from portakv.arguments import shown
from portakv.errors import BackendUnavailable, InvalidTerms
from portakv.migrate.shared_memory import where
from portakv.migrate.transports.base import Transport
from portakv.selection import Catalog, Decision, Kind, select

ENVIRONMENT = "PORTAKV_MOVER"
KIND = Kind("transport", ENVIRONMENT, "transport", unknown=InvalidTerms)
#: The transports of PortaKV, in the order in which they are tried.
BUILT_IN = {
    "distributed": "portakv.migrate.transports.distributed:Distributed",
    "nixl": "portakv.migrate.transports.onesided:Nixl",
    "mooncake": "portakv.migrate.transports.onesided:Mooncake",
}
#: All transports. Peers name them to each other, so that a name imports nothing but these.
TRANSPORTS = Catalog[Transport](KIND, Transport, BUILT_IN, "portakv.transports", paths=False)
#: Used only by name: whoever reaches Mooncake's port can write into staging buffers.
ONLY_BY_NAME = ("mooncake",)


def forced(name: str | None = None) -> str | None:
    """Return the transport that ``PORTAKV_MOVER`` or else ``name`` forces; None: none.

    Raises:
        InvalidTerms: no transport has that name.
    """
    wanted = KIND.forced(name)
    return None if wanted is None else TRANSPORTS.check(KIND.source(), wanted)


def load(name: str) -> type[Transport]:
    """Return the class of a transport.

    Raises:
        InvalidTerms: no transport has that name.
        BackendUnavailable: it is not a class of a transport, or the class has another name.
    """
    transport = TRANSPORTS.load(name)
    # Peers send each other the class's name: under another name a peer does not find the transport.
    if transport.name != name:
        raise BackendUnavailable(
            f"Expected transport {name!r} to be a class with name = {name!r}, got "
            f"{shown(transport.name)}. Give the entry point and the class the same name."
        )
    return transport


def check_transport(name: str | None, device: torch.device) -> None:
    """Check that a transport can carry staging buffers of the device, or else of the host.

    Raises:
        InvalidTerms: no transport has that name.
        BackendUnavailable: it cannot run here; ``trace`` has the decisions.
    """
    if name is None:
        return
    transport = load(TRANSPORTS.check("transport", name))
    decisions = [transport.probe(each) for each in dict.fromkeys((device, torch.device("cpu")))]
    if not any(each.accepted for each in decisions):
        reasons = "; ".join(map(str, decisions))
        error = BackendUnavailable(
            f"Expected transport to be one that runs here, got {name!r}: {reasons}. Install it, or "
            f"pass another."
        )
        error.trace = tuple(decisions)
        raise error


def choose(device: torch.device, name: str | None = None) -> Transport:
    """Return the first transport for staging buffers of ``device``, or the one that is `forced`.

    Its ``why`` has the decision on each transport that was tried.

    Raises:
        InvalidTerms: no transport has that name.
        BackendUnavailable: the forced one cannot run here, or none can; ``trace`` has the reasons.
    """
    wanted = forced(name)

    def consider(each: str) -> tuple[Transport | None, Decision]:
        if wanted is None and each in ONLY_BY_NAME:
            return None, Decision(each, False, "it is used only if it is requested by name")
        kind = load(each)
        decision = kind.probe(device)
        return (kind(device) if decision.accepted else None), decision

    selected = select(KIND, f"{device} memory", BUILT_IN, consider, wanted)
    transport = selected.value
    transport.why = selected.why + ("; it was requested by name" if wanted else "")
    return transport


def choose_between(device: torch.device, remote: str, name: str | None = None) -> Transport:
    """Return the transport for buffers between a device and an owner's device, or on the host.

    Args:
        remote: the owner's device, by `shared_memory.where`.

    Raises as `choose` on the host.
    """
    # Another device of the same type: NCCL does not serve two processes on one.
    if remote.partition(" ")[0] == device.type and remote != where(device):
        with suppress(BackendUnavailable):
            return choose(device, name)
    return choose(torch.device("cpu"), name)
