# SPDX-License-Identifier: Apache-2.0
"""Pull a model's weights from processes that serve it, whatever TP and PP either side has.

`publish` makes tensors available; `pull_weights` fills the tensors of another process. Memory that
a pull opened stays open for the next pull, until the connection to the owner ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal, cast, overload

import torch

from portakv.arguments import flag
from portakv.errors import PortaKVError, TransferError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.channel import Channel
from portakv.migrate.figures import WEIGHTS
from portakv.migrate.figures import count_weights as count_weights
from portakv.migrate.parameters import Parameters
from portakv.migrate.published import Published as Published
from portakv.migrate.published import publish as publish
from portakv.migrate.weight_pull import PullRequest, begun, checked, opened, pull
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Completion, Pending, Transfer

_WORKERS = 4  # pulls at the same time whose callers do not wait

# The graph whose workers run pulls; a forked process makes another.
_graphs: Bounded[int, Graph] = Bounded("graphs of pulls of weights", 1)


class WeightsPull(Transfer):
    """A pull of weights in flight, which `pull_weights` returns with ``wait=False``.

    The tensors are valid after `synchronize` or `done` returned without an error, which raise the
    errors of `pull_weights`, and `TransferCancelled`. Until then they must not be read or written.
    """

    def __init__(self, request: PullRequest) -> None:
        fences = [StreamFence(device) for device in request.devices]
        self._stopped = threading.Event()
        self._result = list[int]()
        result = self._result
        stopped = self._stopped
        graph = _graphs.get_or_make(os.getpid(), Graph)

        def ends() -> bool:
            """Return True for a cancelled pull, and at the end of the process."""
            return stopped.is_set() or graph.closed.is_set()

        def work(*_: object) -> None:
            with ExitStack() as stack:
                for fence in fences:
                    stack.enter_context(fence.inside())
                result.append(WEIGHTS.pull(partial(pull, request, ends)))

        self._task = Task(work, 1, queue=graph.queue("weights", _WORKERS), name="pull")
        super().__init__([Completion(pendings=cast("tuple[Pending, ...]", (self._task,)))])
        try:
            graph.submit([self._task])
        except BaseException:  # the caller does not get the handle of the pull
            stopped.set()
            raise

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
    transport: str | None = None,
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
    transport: str | None = None,
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
    transport: str | None = None,
    wait: bool = True,
) -> int | WeightsPull:
    """Fill tensors from owners that publish the same names, and return the bytes.

    Blocks until checksums agree, or with ``wait=False`` returns a `WeightsPull` immediately. Copies
    on the current stream, or then on a separate stream that is ordered after it. The memory of
    owners on this host is mapped, and stays open for the next pull. Other owners send the weights
    by a transport.

    Args:
        tickets: preferred owners first.
        some: owners have further parameters (the reader is one stage of a pipeline).
        max_gbps: the most 10^9 bytes in a second.
        timeout: seconds for the whole pull; None for no limit.
        transport: the name of the transport for memory that cannot be mapped. None: the transport
            that the owner names, else the first that runs here.
        wait: block until the end.

    Raises `LayoutError`, which lists all differences, and `InvalidTerms`, before it writes a byte.
    After any other error the tensors are undefined until a pull succeeds: `OfferGone`, `PeerError`,
    `TransferTimeout`, `Unsupported` if an owner's memory can neither be mapped nor sent,
    `TransferError` if weights changed meanwhile, or with the names whose checksums differ.
    """
    replies = begun(channel, tickets, timeout) if wait is True else {}
    request = checked(channel, tickets, parameters, some, max_gbps, timeout, transport)
    if flag("wait", wait):
        request.begun.update(replies)
        return WEIGHTS.pull(partial(pull, request, bool))
    return WeightsPull(request)


def prepare_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    timeout: float | None = 600.0,
    transport: str | None = None,
) -> str:
    """Open the owners' memory, or connect to those whose memory cannot be mapped, and plan the
    copies, so that `pull_weights` does not have to.

    Returns a line for each owner: how its weights cross, and why. Writes nothing. Takes the
    arguments, and raises the errors, of `pull_weights`.
    """
    request = checked(channel, tickets, parameters, some, None, timeout, transport)
    return "\n".join(opened(request)[-1].explain())
