# SPDX-License-Identifier: Apache-2.0
"""Begin pulls that wait: for owners that are not connected yet and for offers by name, in a worker
when the offers exist, see `named`; and for the rows of offers that are not complete, see
`followed`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from weakref import ref

import torch

from portakv.errors import PortaKVError, TransferCancelled
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.connecting import Connector
from portakv.migrate.connections import ANY, Connections, Sources
from portakv.migrate.followed import incomplete
from portakv.migrate.follower import Follower
from portakv.migrate.housekeeping import Housekeeper
from portakv.migrate.issue import Issuer, Request
from portakv.migrate.messages import any_named
from portakv.migrate.named import Finder, LateLayer, Wanted
from portakv.migrate.pull import CANCELLED, Part, Pull, fail
from portakv.runtime.streams import StreamFence, own_stream

WIDTH = 4  # pulls that begin together


class ByName:
    """The pulls of one reader that wait for owners, offers or rows."""

    def __init__(
        self, graph: Graph, owners: Connections, issuer: Issuer, keeper: Housekeeper
    ) -> None:
        self._graph = graph
        self._owners = owners
        self._issuer = issuer
        self._keeper = keeper
        self._follower = Follower(graph, issuer, keeper)
        self._begins = graph.queue("named", width=WIDTH)
        self._connector = Connector(graph, owners, keeper.note_connection)
        #: The pull of the last call that has asked owners itself.
        self._asked: ref[Pull] | None = None
        self._stream: torch.Stream | None = None

    def pull(self, tickets: list[bytes], request: Request, until: float) -> Pull | None:
        """Return a pull whose copies were issued if its offers exist, as their owners' tables or
        the owners say; else one that waits for them, and then begins after the caller's stream.
        None if no ticket is a name.

        The pull ends with the errors of its owners and rows.
        """
        if not any_named(tickets):
            return None
        wanted = Wanted.of(tickets)
        finder = self._have_finder()
        pull = self._promised(request, until)
        wanted.look_up(self._owners.ticket_of)
        connected = all(self._owners.knows(*owner) for owner in wanted.owners)
        if connected and not wanted.names:
            return self._begin_here(pull, wanted, request)
        if connected and self._may_ask(wanted):
            self._asked = ref(pull)
            try:
                found = finder.find_now(wanted)
            except BaseException:  # an interrupt: the next call does not wait for this pull
                self._asked = None
                raise
            if found:
                return self._begin_here(pull, wanted, request)
        return self._waiting(pull, wanted, request)

    def pull_connected(self, tickets: list[bytes], request: Request, until: float) -> Pull:
        """Return a pull of plain tickets that begins in a worker when all of their owners are
        connected, after the caller's stream.

        The call raises the errors of its arguments. The pull ends with those of its owners and
        rows.
        """
        request.check(tickets, self._issuer.shards)
        self._have_finder()
        pull = self._promised(request, until)
        return self._waiting(pull, Wanted.of(tickets), request)

    def _promised(self, request: Request, until: float) -> Pull:
        """Return a pull that has not begun, with the layers that it will have."""
        pull = Pull((), until, self._keeper.report)
        pull.begun = False  # the next call looks at it
        pull.layers = self._follower.promised(request)
        return pull

    def prepare(self, address: str) -> Part:
        """Connect to the owner at an address in a worker, and return the end."""
        return Part((), [self._connector.begin((address, ANY)).task])

    def _may_ask(self, wanted: Wanted) -> bool:
        """Return True if a call may ask owners itself: they are connected, and the pull of the last
        such call has ended, so that many pulls that begin together need one request."""
        last = None if self._asked is None else self._asked()
        if last is not None and not last.ended:
            return False
        return all(self._owners.knows(one.address, one.epoch) for one in wanted.names.values())

    def _begin_here(self, pull: Pull, wanted: Wanted, request: Request) -> Pull:
        """Issue the copies of a pull whose offers exist, as those of plain tickets are issued."""
        added = False
        try:
            pull.sources = self._owners.resolve(wanted.tickets, pull.until)
            with torch.inference_mode(False), self.apart(pull.sources):
                if self.waits(pull):
                    self._follower.begin(pull, request)
                    pull.begun = True
                    return pull
                tasks, pull.layers = self._issuer.issue(pull, request)
            pull.begun = True
            self._keeper.add(pull)
            added = True
            if tasks:
                self._graph.submit(tasks, priority="urgent")
            elif self._issuer.device.type == "cpu":  # without a rate its copies have ended
                pull.look()
        except PortaKVError as error:
            fail(pull, error)
            if not added:
                self._keeper.add(pull)
        except BaseException:  # an interrupt: the caller gets no handle of rows that come later
            pull.drop()
            raise
        return pull

    def apart(self, sources: Sources) -> AbstractContextManager[object]:
        """Make a private stream current, after the caller's, if an owner's device still writes the
        rows: the caller's stream must not wait for another process."""
        if not self._issuer.late_events(sources):
            return nullcontext()
        device = self._issuer.device
        if self._stream is None:
            self._stream = own_stream(device)
        return StreamFence(device).on(self._stream)

    def _waiting(self, pull: Pull, wanted: Wanted, request: Request) -> Pull:
        """Return a pull that waits for its offers, and then begins after the caller's stream."""
        pull.requested.wanted = wanted
        after = StreamFence(self._issuer.device)

        def run(*_: object) -> None:
            self._begin(pull, wanted, request, after)

        pull.task = wanted.task = task = Task(run, 1, queue=self._begins, name="begin")
        wanted.start = partial(self._start, pull, task)
        pull.begun = True
        try:
            self._keeper.add(pull)  # wakes its thread
            if self._keeper.closing:  # its thread may have ended before
                wanted.begin(ended=True)
            return pull
        except BaseException:  # an interrupt: the caller gets no handle of rows that come later
            pull.cancel()
            raise

    def waits(self, pull: Pull) -> bool:
        """Return True if a pull has to wait for rows of its offers."""
        return incomplete(pull.sources)

    def follow(self, pull: Pull, request: Request) -> Pull:
        """Return a pull that follows the marks of its offers; raise as `Reader.pull` does."""
        self._have_finder()
        return self._follower.begin(pull, request)

    def _have_finder(self) -> Finder:
        """Let the reader's thread ask owners for names and marks."""
        finder = self._keeper.finder
        if finder is None:
            self._keeper.finder = finder = Finder(self._owners.channel, self._connector)
        return finder

    def _start(self, pull: Pull, task: Task, ended: bool) -> None:
        """Have a worker begin a pull, or end a pull that was stopped before it began."""
        try:
            if ended:
                raise TransferCancelled(CANCELLED)
            self._graph.submit([task], priority="urgent")
        except PortaKVError as error:  # also of a graph that is closed
            fail(pull, error)

    def _begin(self, pull: Pull, wanted: Wanted, request: Request, after: StreamFence) -> None:
        """Issue the copies of a pull, in a worker; end a pull that was stopped before."""
        promised = pull.layers
        try:
            with torch.inference_mode(False), after.inside():
                sources = self._owners.resolve(wanted.tickets, pull.until)
                if pull.over:  # also while the owners were resolved
                    raise TransferCancelled(CANCELLED)
                pull.sources = sources
                if incomplete(sources):
                    self._follower.follow(pull, wanted, request, after)
                    self._follower.wake_for(wanted)
                    return
                tasks, layers = self._issuer.issue(pull, request)
            if tasks:
                self._graph.submit(tasks, priority="urgent")
            for promise, layer in zip(promised, layers, strict=True):
                if isinstance(promise, LateLayer):
                    promise.settle(layer)
            if not tasks:
                pull.task = None
                self._keeper.wake()
        except BaseException as error:
            fail(pull, error)
        finally:
            wanted.task = None
