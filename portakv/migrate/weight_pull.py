# SPDX-License-Identifier: Apache-2.0
"""Carry out a pull of weights, in the thread that calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from portakv.arguments import flag, instance, invalid, items, seconds
from portakv.errors import PeerError, TransferError
from portakv.interconnect.strategy import Terms
from portakv.migrate.channel import Channel
from portakv.migrate.parameters import (
    Parameter,
    Parameters,
    check_destinations,
    items_of,
    named,
    plan,
)
from portakv.migrate.transports import check_transport
from portakv.migrate.weight_copy import Copies
from portakv.migrate.weight_owner import Owner
from portakv.migrate.weight_plan import Plan, plan_of
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.worker import RateLimit

_BATCH = 256 << 20  # bytes that are copied and compared together
_PACED = 32 << 20  # the same with a rate, or on the host

_plans: Bounded[object, Plan] = Bounded("plans of weights", 16)


@dataclass(frozen=True)
class PullRequest:
    """The checked arguments of a pull."""

    channel: Channel
    tickets: Sequence[bytes]
    parameters: Mapping[str, Parameter]
    some: bool
    rate: float | None
    limit: float
    until: float
    transport: str | None = None

    @property
    def batch(self) -> int:
        """Return the bytes of a batch."""
        on_host = any(x.tensor.is_cpu for x in self.parameters.values())
        return _PACED if self.rate or on_host else _BATCH


def checked(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    some: bool,
    max_gbps: float | None,
    timeout: float | None,
    transport: str | None,
) -> PullRequest:
    """Return the arguments of a pull; raise `InvalidTerms` or `LayoutError` for wrong ones."""
    limit = seconds("timeout", timeout, above=True, optional=True)
    until = time.monotonic() + limit
    instance("channel", channel, Channel)
    flag("some", some)
    destinations = named("parameters", parameters)
    check_destinations(destinations)
    rate = Terms(max_gbps=max_gbps).max_gbps
    _refuse_capture(destinations)
    device = next((x.tensor.device for x in destinations.values()), torch.device("cpu"))
    check_transport(transport, device)
    packed = _check_tickets(tickets)
    return PullRequest(channel, packed, destinations, some, rate, limit, until, transport)


def opened(
    request: PullRequest, stopped: Callable[[], bool] = bool
) -> tuple[Sequence[Owner], Plan, Copies]:
    """Return the owners of a pull, its plan, and its copies, for which all owners are open."""
    owners = [
        Owner(request.channel, ticket, request.limit, request.until, stopped)
        for ticket in request.tickets
    ]
    planned = _plan(request, owners)
    copies = Copies(owners, request.parameters, request.transport)
    copies.open(planned)
    return owners, planned, copies


def pull(request: PullRequest, stopped: Callable[[], bool]) -> int:
    """Pull weights in this thread, and return the bytes."""
    owners, planned, copies = opened(request, stopped)
    pace = RateLimit(request.rate) if request.rate else None
    try:
        with copies.incoming() as incoming:
            for batch in planned.batches:
                owner = owners[batch.pieces[0].cell.owner]
                _wait_for_turn(pace, batch.nbytes, owner)
                copies.copy(batch, incoming)
            incoming.finish()
    except PeerError:
        for owner in owners:
            owner.confirm()  # the end of a publication is the better reason
        raise
    finally:
        copies.synchronize()

    here = copies.sums(len(planned.cells))
    wrong = list[str]()
    for number, owner in enumerate(owners):
        numbers = planned.numbers[number]
        there = owner.sums(planned, number)
        if there != [here[n] for n in numbers]:
            differs = [n for n, sum in zip(numbers, there, strict=True) if here[n] != sum]
            wrong += [planned.cells[n].name for n in differs]
            owner.refuse()
    for owner in owners:
        owner.confirm()
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise TransferError(
            f"Expected the owners' checksums of {len(request.parameters)} weights, got others of "
            f"{names}. Do not use any of the weights; pull again."
        )
    return planned.nbytes


def _plan(request: PullRequest, owners: Sequence[Owner]) -> Plan:
    """Return the plan of a pull, cached by the descriptions of both sides."""
    local = tuple(_signature(name, x) for name, x in request.parameters.items())
    digests = tuple(owner.publication.digest for owner in owners)
    return _plans.get_or_make(
        (local, digests, request.some, request.batch), lambda: _make_plan(request, owners)
    )


def _make_plan(request: PullRequest, owners: Sequence[Owner]) -> Plan:
    described = items_of(request.parameters)
    cells = plan(described, [x.publication.items for x in owners], request.some)
    itemsizes = {name: x.tensor.itemsize for name, x in request.parameters.items()}
    return plan_of(cells, described, itemsizes, request.batch, len(owners))


def _signature(name: str, parameter: Parameter) -> object:
    """Return what the plan of a parameter depends on."""
    tensor = parameter.tensor
    # The address, because tied parameters have one.
    memory = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
    if parameter.shape is None and parameter.boxes is None:
        return name, memory, parameter.packing, tuple(parameter.block)
    boxes = parameter.boxes
    return (
        name,
        memory,
        parameter.packing,
        tuple(parameter.block),
        None if parameter.shape is None else tuple(parameter.shape),
        None if boxes is None else tuple(tuple(map(tuple, box)) for box in boxes),
    )


def _refuse_capture(parameters: Mapping[str, Parameter]) -> None:
    """Raise `Unsupported` while a graph capture records a device of the parameters."""
    if any(map(capturing, {each.tensor.device for each in parameters.values()})):
        raise refuse_capture("Pulling weights", "processes exchange messages; do it before")


def _check_tickets(tickets: bytes | Sequence[bytes]) -> Sequence[bytes]:
    """Return the tickets as a list; raise `InvalidTerms` for other arguments and for an empty
    list."""
    if isinstance(tickets, bytes):
        return [tickets]
    if not items("tickets", tickets, "tickets"):
        raise invalid("tickets", "one ticket or more", tickets, "Pass Published.ticket.")
    if not isinstance(tickets, Sequence) or isinstance(tickets, str):
        raise invalid("tickets", "bytes, or a list of them", tickets, "Pass `Published.ticket`.")
    return [*tickets]


def _wait_for_turn(pace: RateLimit | None, nbytes: int, owner: Owner) -> None:
    """Wait until the rate allows so many bytes; raise `TransferTimeout` after the pull's time."""
    if pace:
        start = pace.start_of(nbytes)
        while (wait := pace.left(start)) > 0.0:
            owner.check()
            time.sleep(min(wait, 0.1, max(0.0, owner.until - time.monotonic())))
    owner.check()
