# SPDX-License-Identifier: Apache-2.0
"""`Keeper`: serves one block store to the processes of a host."""

from __future__ import annotations

import atexit
import logging
import os
import select
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from portakv.arguments import instance, seconds, text
from portakv.errors import PortaKVError, StoreBusy, StoreError
from portakv.migrate.channel import Channel
from portakv.runtime import resources
from portakv.runtime.devices import this_process
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.keeper import PATIENCE
from portakv.serving.keeper_processes import Processes
from portakv.serving.keeper_service import Service
from portakv.serving.keeper_store import OpenStore
from portakv.serving.local import SHARE, StoreTerms
from portakv.serving.place import Place

if TYPE_CHECKING:
    from portakv.serving.kv_events import EventPublisher

_logger = logging.getLogger(__name__)
_log = RateLimitedLog(_logger)
#: Seconds between two tries to serve, and between two looks at what takes too long.
LOOK = 0.25
#: Seconds for which a folder may be busy: a process that was killed may have writes under way.
BUSY = 10.0


class Keeper:
    """Serves one block store to the processes of a host, or stands by.

    One process for each folder serves: the first one that may. The others stand by, and one of
    them serves when that process has ended, except those whose terms have ``shared="attach"``. A
    store is opened when the first rank joins, whose blocks name its forms; ranks of other blocks
    are refused as long as ranks have joined.

    Args:
        terms: where blocks are stored, and how much memory the store takes.
        engine: the name of the engine, by which its processes find a keeper without a folder.
        patience: seconds for which a save waits for all ranks of its engine.
        events: an `EventPublisher` for routers, which the caller closes after the keeper.

    Raises `InvalidTerms` for wrong terms, `StoreError` for a folder that cannot be used, and
    `PeerError` or `StoreError` if the process has no descriptor or thread left.
    """

    def __init__(
        self,
        terms: StoreTerms,
        engine: str = "",
        patience: float = PATIENCE,
        events: EventPublisher | None = None,
    ) -> None:
        self.terms = instance("terms", terms, StoreTerms)
        self.place = place_of(terms, engine)
        self._patience = seconds("patience", patience, above=True)
        self._events = events
        self._busy_since: float | None = None
        self._stopped = threading.Event()
        self._process = this_process()
        self._processes = Processes()
        self._thread = threading.Thread(target=self._run, name="portakv keeper", daemon=True)
        self._channel = Channel()
        with ExitStack() as undo:
            undo.callback(self._channel.close)
            try:
                self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            except OSError as error:
                why = resources.reason(error)
                raise StoreError(f"Expected a descriptor for a keeper, but {why}.") from None
            undo.callback(os.close, self._event)
            self._service = Service(self._channel, self._wake, self)
            undo.callback(self.place.release)
            self._serve_if_possible()
            resources.start_thread(self._thread, StoreError)
            undo.pop_all()
        atexit.register(self._take_leave)  # before the channel closes at the interpreter's end

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def serves(self) -> bool:
        """Return whether this process serves; others may."""
        return self.place.claimed

    def statistics(self) -> dict[str, int]:
        """Return the sessions, leases and requests now, and the counters."""
        opened = self._service.opened
        return {} if opened is None else opened.state.statistics()

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of the store, as `BlockStore.statistics`, those of the keeper, and
        those of its channel; only the last ones while the store is closed, and none after
        `close`."""
        figures = dict[str, list[dict[str, Any]]]()
        if not self._stopped.is_set():
            figures = self._channel.figures()
        opened = self._service.opened
        if opened is not None:
            figures |= opened.state.figures()
            with suppress(StoreError):  # it was closed meanwhile
                figures |= opened.store.statistics()
        return figures

    def close(self, timeout: float = 10.0) -> None:
        """Serve no longer: close the store within so many seconds. Clients go on with misses."""
        timeout = seconds("timeout", timeout)
        if self._process.forked or self._stopped.is_set():
            return
        atexit.unregister(self._take_leave)
        self._stopped.set()
        self._wake()
        self._thread.join()
        self._take_leave()
        self._channel.close()
        self._close_store(timeout)
        self.place.release()
        os.close(self._event)

    def _take_leave(self) -> None:
        """Tell clients and followers that this keeper ends in order."""
        if not self._process.forked:
            self._service.take_leave()

    # --- the thread

    def _wake(self) -> None:
        with suppress(OSError):  # the counter is full, or the keeper was closed
            os.eventfd_write(self._event, 1)

    def _run(self) -> None:
        """Go on until the keeper is closed."""
        while not self._stopped.is_set():
            try:
                self._wait()
                self._serve_if_possible()
                self._open_if_wanted()
                self._advance()
            except Exception as error:  # the other clients must be served
                _log.warning("step", "A keeper failed, and goes on: %r. Report it.", error)
                self._stopped.wait(LOOK)

    def _wait(self) -> None:
        """Wait until something happens, or for `LOOK` seconds; note processes that have ended."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        opened = self._service.opened
        if opened is not None and not opened.store.graph.closed.is_set():
            poll.register(opened.store.finished_fd(), select.POLLIN)
            poll.register(opened.store.listen_fd(), select.POLLIN)
            self._processes.watch(opened.state.processes())
        for descriptor in self._processes.descriptors():
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(LOOK * 1000)}
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        for process in self._processes.take_ended(ready):
            if opened is not None:
                opened.state.process_ended(process)

    def _serve_if_possible(self) -> None:
        """Serve, unless another process does, or the terms leave it to a store server."""
        if self.terms.attaches:
            return
        if not self.place.claimed and self.place.claim():
            self.place.publish(self._channel.address)
            _logger.info("This process keeps the blocks in %s.", self.place.name)

    def _open_if_wanted(self) -> None:
        """Open the store for the forms that a client waits for."""
        service = self._service
        wanted = service.wanted
        if not wanted or not self.serves:
            return
        self._close_store(BUSY)
        refusal: PortaKVError | None = None
        try:
            service.opened = OpenStore(self.terms, wanted, self._wake, self._patience, self._events)
        except StoreBusy as error:
            now = time.monotonic()
            self._busy_since = self._busy_since or now
            if now < self._busy_since + BUSY:
                return
            refusal = StoreBusy(f"{error} {SHARE}")
        except PortaKVError as error:
            refusal = error
        self._busy_since = None
        service.wanted = ()
        if refusal is not None:
            service.refusal = wanted, refusal
            _log.warning("open", "The store of a keeper cannot be opened: %s", refusal)

    def _close_store(self, timeout: float) -> None:
        """Close the store, if it is open."""
        opened = self._service.opened
        self._service.opened = None
        self._processes.close()
        error = None if opened is None else opened.close(timeout)
        if error is not None:
            _log.warning("close", "The store of a keeper could not be closed: %s", error)

    def _advance(self) -> None:
        """Go on with what the store has done, and tell clients and routers."""
        if self._events is not None:
            self._events.answer()
        opened = self._service.opened
        if opened is None or opened.store.graph.closed.is_set():  # the interpreter ends
            return
        opened.store.graph.sweep()  # loads end in time also if a disk holds all workers
        for handle in opened.store.finished():
            opened.state.ended(handle)
        opened.state.advance()
        for client, progress in opened.state.take():
            self._service.tell(client.address, progress, partial(opened.state.lost, client))
        while opened.looked_up:
            follower, answer = opened.looked_up.popleft()
            self._service.tell(follower.address, answer, partial(opened.feed.lost, follower))
        for follower, changes in opened.feed.announce(opened.changes()):
            self._service.tell(follower.address, changes, partial(opened.feed.lost, follower))


def place_of(terms: StoreTerms, engine: str) -> Place:
    """Return where the processes of an engine find their keeper.

    Raises `InvalidTerms` for an engine without a name, if there is no folder.
    """
    if terms.folders:
        return Place.of_folder(terms.folders[0])
    return Place.of_engine(text("engine", engine))
