# SPDX-License-Identifier: Apache-2.0
"""Carry out a pull of weights, in the thread that calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from operator import is_
from typing import NamedTuple, TypeAlias, cast
from weakref import ref

import torch

from portakv.arguments import flag, instance, invalid, items, rate, seconds
from portakv.errors import PeerError, TransferError
from portakv.migrate.channel import Channel
from portakv.migrate.parameters import (
    Parameters,
    check_destinations,
    facts_of,
    forms_of,
    is_fixed,
    items_of,
    named,
    plan,
    tensors_of,
)
from portakv.migrate.transports import check_transport
from portakv.migrate.weight_copy import Copies
from portakv.migrate.weight_owner import Owner, Reply, begin_all
from portakv.migrate.weight_plan import Plan, plan_of
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.worker import RateLimit

# Bytes that are copied and compared together. Between two kernels of tiles the link is idle for
# some 30 us, and the checksums of the last batch are waited for.
_BATCH = 2 << 30
_PACED = 32 << 20  # the same with a rate, or on the host

_referent = ref.__call__  # by `map`: without a step of Python for each

_Plans: TypeAlias = Bounded[object, Plan]
# By the facts of tensors, which have passed all checks: the plans of their pulls, by the owners'
# descriptions.
_known: Bounded[object, _Plans] = Bounded("checked destinations of weights", 16)


class _Latest(NamedTuple):
    """Parameters that passed all checks.

    Attributes:
        values: the tensors or `Parameter` of the mapping; weak.
        forms: of the tensors, by `forms_of`.
    """

    values: list[ref[object]]
    forms: object
    plans: _Plans


# By names: a pull into the very same objects compares a third of the facts.
_latest: Bounded[tuple[str, ...], _Latest] = Bounded("latest destinations of weights", 16)


@dataclass(frozen=True)
class PullRequest:
    """The checked arguments of a pull.

    Attributes:
        parameters: as they were passed.
        tensors: of the parameters, by name.
        devices: of the tensors.
        plans: the plans of pulls into tensors with these facts.
        begun: of `begin_all`.
    """

    channel: Channel
    tickets: Sequence[bytes]
    parameters: Parameters
    tensors: Mapping[str, torch.Tensor]
    devices: frozenset[torch.device]
    plans: _Plans
    some: bool
    rate: float | None
    limit: float
    until: float
    transport: str | None = None
    begun: dict[bytes, Reply] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Return the bytes of a batch."""
        on_host = any(device.type == "cpu" for device in self.devices)
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
    parameters, tensors, plans = _checked_destinations(parameters)
    if max_gbps is not None:
        rate("max_gbps", max_gbps)
    devices = frozenset({tensor.device for tensor in tensors.values()})
    if any(map(capturing, devices)):
        raise refuse_capture("Pulling weights", "processes exchange messages; do it before")
    device = next((x.device for x in tensors.values()), torch.device("cpu"))
    check_transport(transport, device)
    packed = _check_tickets(tickets)
    return PullRequest(
        channel=channel,
        tickets=packed,
        parameters=parameters,
        tensors=tensors,
        devices=devices,
        plans=plans,
        some=some,
        rate=max_gbps,
        limit=limit,
        until=until,
        transport=transport,
    )


def _checked_destinations(
    parameters: Parameters,
) -> tuple[Parameters, dict[str, torch.Tensor], _Plans]:
    """Return parameters that can be filled, their tensors, and the plans of pulls into tensors with
    the same facts.

    Parameters with the facts of others that passed all checks are not checked again.
    """
    if isinstance(parameters, Mapping):
        listed = dict(parameters.items())  # once: another mapping may make tensors
        latest = _latest.get(tuple(listed))
        if latest is not None and all(map(is_, map(_referent, latest.values), listed.values())):
            tensors = tensors_of(listed)
            if forms_of([*tensors.values()]) == latest.forms:
                return listed, tensors, latest.plans
        facts = facts_of(listed)
        known = None if facts is None else _known.get(facts)
        if known is not None:
            _note_latest(listed, known)
            return listed, tensors_of(listed), known
        parameters = listed
    checked = named("parameters", parameters)
    check_destinations(checked)
    plans = _Plans("plans of weights", 4)
    facts = facts_of(checked)
    if facts is not None:
        plans = _known.setdefault(facts, plans)
    return checked, tensors_of(checked), plans


def _note_latest(parameters: Parameters, plans: _Plans) -> None:
    """Note parameters that passed all checks, if nothing can change their terms."""
    if is_fixed(parameters):
        values: list[ref[object]] = [ref(value) for value in parameters.values()]
        forms = forms_of([*tensors_of(parameters).values()])
        _latest[tuple(parameters)] = _Latest(values, forms, plans)


def begun(channel: object, tickets: object, timeout: object) -> dict[bytes, Reply]:
    """Ask the owners for the begin of a pull, while its arguments are checked; see `begin_all`.

    Asks nothing for wrong arguments, which `checked` refuses.
    """
    listed = [tickets] if isinstance(tickets, bytes) else tickets
    known = timeout is None or (isinstance(timeout, int | float) and timeout > 0)
    if not (isinstance(channel, Channel) and known and isinstance(listed, list | tuple)):
        return {}
    limit = float(cast("float", timeout or inf))
    return begin_all(channel, [x for x in listed if isinstance(x, bytes)], limit)


def opened(
    request: PullRequest, stopped: Callable[[], bool] = bool
) -> tuple[Sequence[Owner], Plan, Copies]:
    """Return the owners of a pull, its plan, and its copies, for which all owners are open."""
    owners = [
        Owner(
            request.channel,
            ticket,
            request.limit,
            request.until,
            stopped,
            request.begun.pop(ticket, None),
        )
        for ticket in request.tickets
    ]
    planned = _plan(request, owners)
    copies = Copies(owners, request.tensors, request.devices, request.transport)
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
        # While the devices copy. A change that comes after the answers is noticed at the end.
        answers = [owner.sums(planned, number) for number, owner in enumerate(owners)]
        copies.wait_for_bytes()
        # Nothing is read there any more. The last checksums are computed while the owners answer.
        confirmations = [owner.begin_to_confirm() for owner in owners]
        here = copies.sums(len(planned.cells))
    except PeerError:
        for owner in owners:
            owner.confirm()  # the end of a publication is the better reason
        raise
    finally:
        copies.synchronize()

    wrong = list[str]()
    for numbers, there, owner in zip(planned.numbers, answers, owners, strict=True):
        if there != [here[n] for n in numbers]:
            differs = [n for n, sum in zip(numbers, there, strict=True) if here[n] != sum]
            wrong += [planned.cells[n].name for n in differs]
            owner.refuse()
    for confirm in confirmations:
        confirm()
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise TransferError(
            f"Expected the owners' checksums of {len(request.tensors)} weights, got others of "
            f"{names}. Do not use any of the weights; pull again."
        )
    return planned.nbytes


def _plan(request: PullRequest, owners: Sequence[Owner]) -> Plan:
    """Return the plan of a pull, cached by the facts of both sides."""
    digests = tuple(owner.publication.digest for owner in owners)
    return request.plans.get_or_make(
        (digests, request.some, request.batch), lambda: _make_plan(request, owners)
    )


def _make_plan(request: PullRequest, owners: Sequence[Owner]) -> Plan:
    described = items_of(named("parameters", request.parameters))
    cells = plan(described, [x.publication.items for x in owners], request.some)
    itemsizes = {name: tensor.itemsize for name, tensor in request.tensors.items()}
    return plan_of(cells, described, itemsizes, request.batch, len(owners))


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
