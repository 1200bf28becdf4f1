# SPDX-License-Identifier: Apache-2.0
"""The arguments of a pull of weights, and the tensors that it fills."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch

from portakv.arguments import flag, instance, invalid, rate, seconds
from portakv.migrate.channel import Channel
from portakv.migrate.messages import listed
from portakv.migrate.transports import check_transport
from portakv.runtime import tracing
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, refuse_capture
from portakv.tasks import Work
from portakv.weights.lanes import follower, on_streams
from portakv.weights.parameters import (
    Parameters,
    check_destinations,
    facts_of,
    named,
    tensors_of,
)
from portakv.weights.plan import Plan

T = TypeVar("T")

# Bytes that are copied and compared together. Between two kernels of tiles the link is idle for
# some 30 us, and the checksums of the last batch are waited for.
_BATCH = 2 << 30
_PACED = 32 << 20  # the same with a rate, or on the host

_Plans: TypeAlias = Bounded[object, Plan]
# By the facts of tensors, which have passed all checks: the plans of their pulls, by the owners'
# descriptions.
_known: Bounded[object, _Plans] = Bounded("checked destinations of weights", 16)


class PullRequest:
    """The arguments of a pull, which it checks.

    Raises `InvalidTerms` or `LayoutError` for wrong ones.

    Attributes:
        tensors: of the parameters, by name.
        devices: of the tensors.
        plans: the plans of pulls into tensors with these facts.
        until: the time at which the pull ends.
        batch: the bytes of a batch.
        began: the beginning of the pull's span.
    """

    def __init__(
        self,
        channel: Channel,
        tickets: bytes | Sequence[bytes],
        parameters: Parameters,
        some: bool,
        max_gbps: float | None,
        timeout: float | None,
        transport: str | None,
        wait: bool = True,
    ) -> None:
        self.timeout = seconds("timeout", timeout, above=True, optional=True)
        self.until = time.monotonic() + self.timeout
        self.channel = instance("channel", channel, Channel)
        self.some = flag("some", some)
        self.parameters, self.tensors, self.plans = _checked_destinations(parameters)
        self.rate = None if max_gbps is None else rate("max_gbps", max_gbps)
        self.devices = frozenset({tensor.device for tensor in self.tensors.values()})
        if any(map(capturing, self.devices)):
            raise refuse_capture("Pulling weights", "processes exchange messages; do it before")
        device = next((x.device for x in self.tensors.values()), torch.device("cpu"))
        check_transport(transport, device)
        self.transport = transport
        self.tickets = listed(tickets, "Pass Published.ticket.")
        on_host = any(device.type == "cpu" for device in self.devices)
        self.batch = _PACED if self.rate or on_host else _BATCH
        self.wait = flag("wait", wait)
        self.began = tracing.begin()
        devices = [device for device in self.devices if device.type != "cpu"]
        streams = [torch.accelerator.current_stream(device.index) for device in devices]
        #: The caller's, or private ones if the caller does not wait.
        self._streams = streams if self.wait else [follower(device) for device in devices]

    def work(self, call: Callable[..., T], *arguments: object) -> Work[T]:
        """Return work of the pull, for which the pull's streams are current."""

        def on_streams_of_pull() -> T:
            with on_streams(self._streams):
                return call(*arguments)

        return Work(on_streams_of_pull)


def _checked_destinations(
    parameters: Parameters,
) -> tuple[Parameters, dict[str, torch.Tensor], _Plans]:
    """Return parameters that can be filled, their tensors, and the plans of pulls into tensors with
    the same facts.

    Parameters with the facts of others that passed all checks are not checked again.
    """
    if not isinstance(parameters, Mapping):
        raise invalid("parameters", "a mapping of names to tensors", parameters)
    parameters = dict(parameters.items())  # once: another mapping may make tensors
    facts = facts_of(parameters)
    plans = None if facts is None else _known.get(facts)
    if plans is None:
        check_destinations(named("parameters", parameters))
        plans = _Plans("plans of weights", 4)
        if facts is not None:
            plans = _known.setdefault(facts, plans)
    return parameters, tensors_of(parameters), plans
