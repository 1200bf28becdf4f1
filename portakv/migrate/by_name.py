# SPDX-License-Identifier: Apache-2.0
"""Begin pulls of offers by name, in a worker when their offers exist; see `named`."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch

from portakv.errors import PortaKVError, TransferCancelled
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.connections import Connections
from portakv.migrate.housekeeping import Housekeeper
from portakv.migrate.issue import Issuer, Request
from portakv.migrate.named import LateLayer, Wanted
from portakv.migrate.pull import CANCELLED, Pull, known
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Transfer

WIDTH = 4  # pulls that begin together


class ByName:
    """The pulls by name of one reader."""

    def __init__(
        self, graph: Graph, owners: Connections, issuer: Issuer, keeper: Housekeeper
    ) -> None:
        self._graph = graph
        self._owners = owners
        self._issuer = issuer
        self._keeper = keeper
        self._queue = graph.queue("named", width=WIDTH)

    def pull(self, tickets: list[bytes], request: Request, until: float) -> Pull | None:
        """Return a pull that waits for its offers, and then begins after the caller's stream; None
        if no ticket is a name."""
        wanted = Wanted.of(tickets)
        if wanted is None:
            return None
        pull = Pull((), until, self._keeper.wake)
        pull.requested.wanted = wanted
        if request.options.by_layer:
            layers = sum(shard.view.layers for shard in self._issuer.shards)
            pull.layers = [LateLayer() for _ in range(layers)]
        after = StreamFence(self._issuer.device)
        pull.task = Task(
            lambda *_: self._begin(pull, wanted, request, after),
            1,
            queue=self._queue,
            name="begin",
        )
        wanted.start = partial(self._start, pull, pull.task)
        try:
            self._keeper.add(pull)
            self._keeper.wake()
            return pull
        except BaseException:  # an interrupt: the caller gets no handle of rows that come later
            pull.cancel()
            raise

    def _start(self, pull: Pull, task: Task) -> None:
        """Have a worker begin a pull."""
        try:
            self._graph.submit([task], priority="urgent")
        except PortaKVError as error:  # the reader is closed
            _fail(pull, pull.layers, error)

    def _begin(self, pull: Pull, wanted: Wanted, request: Request, after: StreamFence) -> None:
        """Issue the copies of a pull, in a worker; end a pull that was stopped before."""
        promised = pull.layers
        try:
            if pull.over:
                raise TransferCancelled(CANCELLED)
            with torch.inference_mode(False), after.inside():
                pull.sources = self._owners.resolve(wanted.tickets, pull.until)
                tasks = self._issuer.issue(pull, request)
            for promise, layer in zip(promised, pull.layers, strict=True):
                if isinstance(promise, LateLayer):
                    promise.settle(layer)
            pull.layers = promised
            if tasks:
                self._graph.submit(tasks, priority="urgent")
            else:
                pull.task = None
                self._keeper.wake()
        except BaseException as error:
            _fail(pull, promised, error)


def _fail(pull: Pull, promised: list[Transfer], error: BaseException) -> None:
    """End a pull that could not begin, after the copies in flight."""
    reason = known(error) or TransferCancelled(CANCELLED)
    pull.stop(reason)
    for copy in pull.copies:
        with suppress(PortaKVError):  # the owner may be gone
            copy.synchronize()
    pull.layers = promised
    pull.task = None
    pull.conclude(reason)
    for promise in promised:
        if isinstance(promise, LateLayer):
            promise.settle(Transfer(), pull.error)
