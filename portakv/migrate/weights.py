# SPDX-License-Identifier: Apache-2.0
"""Pull a model's weights from processes that serve it, whatever TP and PP either side has.

`publish` makes tensors available; `pull_weights` fills the tensors of another process. Memory that
a pull opened stays open for the next pull, until the connection to the owner ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast, overload

import torch

from portakv.arguments import flag, instance, invalid, items, seconds
from portakv.errors import PortaKVError, TransferError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
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
from portakv.migrate.published import Published as Published
from portakv.migrate.published import publish as publish
from portakv.migrate.weight_copy import Copies, Plan, plan_of
from portakv.migrate.weight_owner import Owner
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Completion, Pending, Transfer
from portakv.runtime.worker import RateLimit

_BATCH = 256 << 20  # bytes that are copied and compared together
_PACED = 32 << 20  # the same with a rate, or on the host
_WORKERS = 4  # pulls at the same time whose callers do not wait

_plans: Bounded[object, Plan] = Bounded("plans of weights", 16)
# The graph whose workers run pulls; a forked process makes another.
_graphs: Bounded[int, Graph] = Bounded("graphs of pulls of weights", 1)


@dataclass(frozen=True)
class _Request:
    """The checked arguments of a pull."""

    channel: Channel
    tickets: Sequence[bytes]
    parameters: Mapping[str, Parameter]
    some: bool
    rate: float | None
    limit: float
    until: float
    prepare: bool

    @property
    def batch(self) -> int:
        """Return the bytes of a batch."""
        on_host = any(x.tensor.is_cpu for x in self.parameters.values())
        return _PACED if self.rate or on_host else _BATCH


class WeightsPull(Transfer):
    """A pull of weights in flight, which `pull_weights` returns with ``wait=False``.

    The tensors are valid after `synchronize` or `done` returned without an error, which raise the
    errors of `pull_weights`, and `TransferCancelled`. Until then they must not be read or written.
    """

    def __init__(self, request: _Request) -> None:
        devices = {x.tensor.device for x in request.parameters.values()}
        fences = [StreamFence(device) for device in devices]
        self._stopped = threading.Event()
        self._result = list[int]()
        result = self._result
        stopped = self._stopped

        def work(*_: object) -> None:
            with ExitStack() as stack:
                for fence in fences:
                    stack.enter_context(fence.inside())
                result.append(_pull(request, stopped.is_set))

        graph = _graphs.get_or_make(os.getpid(), Graph)
        self._task = Task(work, 1, queue=graph.queue("weights", _WORKERS), name="pull")
        super().__init__([Completion(pendings=cast("tuple[Pending, ...]", (self._task,)))])
        graph.submit([self._task])

    @property
    def nbytes(self) -> int:
        """Return the bytes that were pulled; 0 before the end and after an error."""
        return sum(self._result)

    @property
    def ended(self) -> bool:
        """Return True if the pull has ended, with or without an error; never block or raise."""
        return self._task.ended

    @property
    def error(self) -> PortaKVError | None:
        """Return the error of a pull that has ended; never block or raise."""
        error = self._task.error if self._task.ended else None
        if error is None or isinstance(error, PortaKVError):
            return error
        failure = TransferError(f"The pull of weights failed: {error!r}.")
        failure.__cause__ = error
        return failure

    def cancel(self) -> bool:
        """Copy no further batch; return False if the pull has ended."""
        self._stopped.set()
        return not self._task.ended

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block the host, because no stream orders the checksums. Raises as `done`."""
        super().wait(stream)
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        if not self._task.ended:
            raise TransferError(
                "The pull runs in the process that this one was forked from. Wait for it there."
            )
        if (error := self.error) is not None:
            raise error


@overload
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    wait: Literal[True] = True,
) -> int: ...
@overload
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    wait: Literal[False],
) -> WeightsPull: ...
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    wait: bool = True,
) -> int | WeightsPull:
    """Fill tensors from owners that publish the same names, and return the bytes.

    Blocks until checksums agree, or with ``wait=False`` returns a `WeightsPull` immediately. Copies
    on the current stream, or then on a separate stream that is ordered after it. The owners' memory
    stays open for the next pull.

    Args:
        tickets: preferred owners first.
        some: owners have further parameters (the reader is one stage of a pipeline).
        max_gbps: the most 10^9 bytes in a second.
        timeout: seconds for the whole pull; None for no limit.
        wait: block until the end.

    Raises `LayoutError`, which lists all differences, and `InvalidTerms`, before it writes a byte.
    After any other error the tensors are undefined until a pull succeeds: `OfferGone`, `PeerError`,
    `TransferTimeout`, `Unsupported` if an owner's memory cannot be mapped here, `TransferError` if
    weights changed meanwhile, or with the names whose checksums differ.
    """
    request = _checked(channel, tickets, parameters, some, max_gbps, timeout, False)
    if flag("wait", wait):
        return _pull(request, bool)
    return WeightsPull(request)


def prepare_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    timeout: float | None = 600.0,
) -> None:
    """Open the owners' memory and plan the copies, so that `pull_weights` does not have to.

    Writes nothing. Takes the arguments, and raises the errors, of `pull_weights`.
    """
    _pull(_checked(channel, tickets, parameters, some, None, timeout, True), bool)


def _checked(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    some: bool,
    max_gbps: float | None,
    timeout: float | None,
    prepare: bool,
) -> _Request:
    """Return the arguments of a pull; raise `InvalidTerms` or `LayoutError` for wrong ones."""
    limit = seconds("timeout", timeout, above=True, optional=True)
    until = time.monotonic() + limit
    instance("channel", channel, Channel)
    flag("some", some)
    destinations = named("parameters", parameters)
    check_destinations(destinations)
    rate = Terms(max_gbps=max_gbps).max_gbps
    _refuse_capture(destinations)
    packed = _check_tickets(tickets)
    return _Request(channel, packed, destinations, some, rate, limit, until, prepare)


def _pull(request: _Request, stopped: Callable[[], bool]) -> int:
    """Pull weights in this thread, and return the bytes."""
    owners = [
        Owner(request.channel, ticket, request.limit, request.until, stopped)
        for ticket in request.tickets
    ]
    planned = _plan(request, owners)
    copies = Copies(owners, request.parameters)
    copies.open(planned)
    if request.prepare:
        return 0

    pace = RateLimit(request.rate) if request.rate else None
    try:
        for batch in planned.batches:
            owner = owners[batch.pieces[0].cell.owner]
            _wait_for_turn(pace, batch.nbytes, owner)
            copies.copy(batch)
    finally:
        copies.synchronize()

    here = copies.sums(len(planned.cells))
    wrong = list[str]()
    for number, owner in enumerate(owners):
        numbers = [n for n, cell in enumerate(planned.cells) if cell.owner == number]
        cells = [planned.cells[n] for n in numbers]
        there = owner.sums(cells) if cells else []
        differ = [here[n] != sum for n, sum in zip(numbers, there, strict=True)]
        wrong += [cell.name for cell, differs in zip(cells, differ, strict=True) if differs]
        if any(differ):
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


def _plan(request: _Request, owners: Sequence[Owner]) -> Plan:
    """Return the plan of a pull, cached by the descriptions of both sides."""
    local = tuple(_signature(name, x) for name, x in request.parameters.items())
    digests = tuple(owner.publication.digest for owner in owners)
    return _plans.get_or_make(
        (local, digests, request.some, request.batch), lambda: _make_plan(request, owners)
    )


def _make_plan(request: _Request, owners: Sequence[Owner]) -> Plan:
    described = items_of(request.parameters)
    cells = plan(described, [x.publication.items for x in owners], request.some)
    itemsizes = {name: x.tensor.itemsize for name, x in request.parameters.items()}
    return plan_of(cells, described, itemsizes, request.batch)


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
    if any(capturing(each.tensor.device) for each in parameters.values()):
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
