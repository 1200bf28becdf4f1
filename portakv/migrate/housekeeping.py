# SPDX-License-Identifier: Apache-2.0
"""One thread of a reader looks after all of its pulls.

It renews leases, notices deadlines and dead owners, commits pulls that no caller looks at, and
reports the ends to owners. A caller that waits for a pull commits the pull itself, and does not
wait for this thread.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty
from time import monotonic

import torch

from portakv.errors import PortaKVError, TransferError, TransferTimeout
from portakv.migrate.connections import Source
from portakv.migrate.figures import Began, PullCounts, begin_span
from portakv.migrate.followed import Followed, Stop
from portakv.migrate.messages import Begin, Close, Message, Renew
from portakv.migrate.named import Finder, Wanted
from portakv.migrate.pull import Pull
from portakv.migrate.questions import PAUSE
from portakv.runtime.finished import Finished
from portakv.runtime.inbox import Inbox
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import ignore_captures_elsewhere

_log = logging.getLogger(__name__)
FIRST_LOOK = 1e-3  # seconds until the first look at a pull
#: Seconds after which a pull is reported to its owners as begun, at most a third of a lease. The
#: message would take the interpreter from a caller whose pull ends soon.
BEGIN = 4e-3
LOOK = 0.05  # the most seconds between two looks at a pull
PROMPT = 1e-3  # the same if somebody waits for `Reader.finished`, or a pull for a mark
GATHER = 1e-3  # seconds after the end of a pull in which further ends are reported together
IDLE = 40  # looks without a pull, after which the thread waits until it is woken
RENEWAL = 0.5  # the most seconds between two renewals: much of a lease may be over at the pull
SENDING = 0.5  # the most seconds for a message to an owner
BUSY = 0.5  # seconds without a message to an owner, after one could not be sent
CLOSING = 2.0  # the most seconds in which the last messages are sent


@dataclass
class _Watched:
    """A pull in flight."""

    began: float
    begun: bool = False  # reported to the owners that do not learn it by a request for rows
    renew: float = 0.0  # when its leases are renewed next
    ended: bool = False  # reported to this process, perhaps not to all owners yet
    span: Began = field(default_factory=begin_span)


class Wakes:
    """Wake a thread immediately, or within `GATHER` if a pull has ended.

    A caller that pulls on has the interpreter until then, and one look reports several ends.

    Attributes:
        gathering: the thread waits for further ends, or for a reason to look immediately.
    """

    def __init__(self) -> None:
        self.gathering = False
        self._queue = Inbox[bool]()  # True: look immediately

    def look(self) -> None:
        """Have the thread look immediately."""
        self._queue.put(True)

    def end(self) -> None:
        """Have the thread look soon; several ends wake it once."""
        if not self.gathering:
            self._queue.put(False)

    def wait(self, seconds: float | None) -> bool:
        """Wait until the thread has to look; return False after ``seconds`` without a wake."""
        try:
            now = self._queue.get(timeout=seconds)
        except Empty:
            return False
        with suppress(Empty):
            until = monotonic() + GATHER
            self.gathering = True
            while not now:
                now = self._queue.get(timeout=max(0.0, until - monotonic()))
        self.gathering = False  # before the look, which sees all that ended until then
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        return True


class Housekeeper:
    """The thread and the pulls that it looks after.

    A pull is added by one step, so that no interrupt leaves a half of it.
    """

    def __init__(self, device: torch.device) -> None:
        #: The pulls that have ended, for `Reader.finished`; and what they have brought.
        self.finished: Finished[Pull] = Finished()
        self.counts = PullCounts()
        self._device = device
        #: Finds offers by their names, and marks; None before the first pull that waits.
        self.finder: Finder | None = None
        self._most = LOOK  # seconds between two looks; less if a pull waits for a name or a mark
        self._pulls = dict[Pull, _Watched]()
        self._busy = dict[str, float]()  # addresses, with the time of the next message
        self._wakes = Wakes()
        self._parked = True
        self._closing = False
        self._lock = threading.Lock()  # for the beginning of the thread
        self._thread: threading.Thread | None = None

    @property
    def pulls(self) -> list[Pull]:
        """Return the pulls that have not ended, or whose end is not reported yet."""
        return [*self._pulls]

    @property
    def ends(self) -> Counter[str]:
        """Return the numbers of pulls by how they ended."""
        return self.counts.ends

    def figures(self, owners: int) -> dict[str, list[dict[str, str | float]]]:
        """Return the figures of a reader that has so many owners; see `Reader.figures`."""
        ages = [pull.age for pull in self.pulls if not pull.ended]
        return {
            "pulls_in_flight": [{"value": len(ages)}],
            "pull_oldest_seconds": [{"value": max(ages, default=0.0)}],
            "pull_owners": [{"value": owners}],
            **self.counts.figures(),
        }

    @property
    def closing(self) -> bool:
        """Return True once no thread looks after pulls any more."""
        return self._closing

    def add(self, pull: Pull) -> None:
        """Look after a pull from now on."""
        self._pulls[pull] = _Watched(monotonic())
        waits = pull.requested.wanted is not None
        if self._parked or self.finished.started or waits:
            self.wake()

    def wake(self) -> None:
        """Have the thread look immediately; begin it at the first call."""
        self._wakes.look()
        if self._thread is None:
            uninterrupted(self._begin)

    def report(self) -> None:
        """Have the thread look soon, for a pull that has ended; begin it at the first call."""
        self._wakes.end()
        if self._thread is None:
            uninterrupted(self._begin)

    def note_connection(self) -> None:
        """Have the thread look at pulls that may wait for the end of a handshake."""
        if self._pulls:
            self._wakes.look()

    def wait(self, seconds: float) -> None:
        """Wait for the pulls in flight, and cancel those that last longer."""
        until = monotonic() + seconds
        for pull in self.pulls:
            wanted = pull.requested.wanted
            if wanted is not None:
                task = wanted.task
                if task is not None and wanted.started.is_set() and not pull.concluded:
                    task.wait(max(0.0, until - monotonic()))  # then it is known what it waits for
                if wanted.waits:
                    pull.cancel()
            try:
                pull.synchronize(max(0.0, until - monotonic()))
            except TransferTimeout:
                pull.cancel()
            except PortaKVError:  # its caller gets the error by which it ended
                continue

    def close(self) -> None:
        """Report the ends of pulls that have ended, and stop the thread."""
        uninterrupted(self._close)

    def _begin(self) -> None:
        """Start the thread, unless another caller has."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="portakv pulls", daemon=True)
                thread.start()
                self._thread = thread
                atexit.register(self.close)

    def _close(self) -> None:
        """Stop the thread after its last messages."""
        atexit.unregister(self.close)
        self._closing = True
        thread = self._thread
        if thread is not None:
            self._wakes.look()
            thread.join(CLOSING)
        self.finished.close()

    # --- in the thread

    def _run(self) -> None:
        """Look at all pulls until the reader is closed."""
        ignore_captures_elsewhere(self._device)
        idle = 0
        pause = FIRST_LOOK
        looked_after = False
        while True:
            # Also a pull that began and ended between two turns: others follow it.
            idle = 0 if self._pulls or looked_after else idle + 1
            self._parked = idle > IDLE
            if self._pulls:  # also one that was added before it could see that this thread waits
                self._parked = False
            seconds = pause if self._pulls else LOOK
            if self._wakes.wait(None if self._parked else seconds):
                pause = FIRST_LOOK
            most = PROMPT if self.finished.started else self._most
            pause = min(2 * pause, most) if self._pulls else FIRST_LOOK
            looked_after = self._look_at_all()
            if self._closing:
                return

    def _look_at_all(self) -> bool:
        """Look at each pull; report the ends. Return True if there are pulls."""
        if self._closing or not self._pulls:  # these are the last messages, or there are none
            self._busy.clear()
        try:
            pulls = [*self._pulls.items()]
        except RuntimeError:  # a pull was added meanwhile; the next look is soon
            return True
        try:
            self._find([pull for pull, _ in pulls])
        except Exception:  # one answer must not stop the others' pulls
            _log.exception("The offers and marks of pulls that wait could not be found.")
        for pull, watched in pulls:
            try:
                # A caller that waits for a pull notices its end, and needs the interpreter then.
                if pull.concluded or (not pull.has_waiter and pull.look()):
                    self._report_end(pull, watched)
                else:
                    self._look_after(pull, watched)
            except Exception as error:  # one pull must not stop the others
                _log.exception("A pull failed.")
                pull.stop(TransferError(f"The pull failed: {error!r}."))
        return bool(pulls)

    def _find(self, pulls: list[Pull]) -> None:
        """Ask for the offers of pulls by name, and start those that wait no more; look at the marks
        of pulls that wait for them."""
        waiting = list[tuple[Wanted, Stop]]()
        following = list[tuple[Followed, Stop]]()
        for pull in pulls:
            wanted = pull.requested.wanted
            if wanted is None or not wanted.waits:
                continue
            pull.stop_after_failure()
            if pull.over or self._closing:
                wanted.end()
            elif not wanted.started.is_set():
                waiting.append((wanted, pull.stop))
            elif wanted.followed is not None:
                following.append((wanted.followed, pull.stop))
        self._most = PROMPT if following else PAUSE if waiting else LOOK
        if self.finder is not None:
            self.finder.look(waiting)
            self.finder.marker.look(following)

    def _report_end(self, pull: Pull, watched: _Watched) -> None:
        """Report the end of a pull to its owners and to `Reader.finished`.

        An owner whose connection is busy gets it at a later look.
        """
        if not watched.ended:
            watched.ended = True
            self.finished.add(pull)
            self._count(pull, watched)
            pull.requested.quiet = ()
        left = list[Source]()
        for source in pull.sources:
            about = source.ticket.epoch, source.ticket.offer
            if not self._tell(source, Close(*about, pull.published)):
                left.append(source)
        pull.sources = left  # a handle retains no memory of owners
        if not left:
            self._pulls.pop(pull, None)

    def _count(self, pull: Pull, watched: _Watched) -> None:
        """Count a pull that has ended, and record its span."""
        requested = pull.requested
        traceparent = next((each.ticket.traceparent for each in pull.sources), "")
        self.counts.add(requested.strategy[0], int(requested.nbytes), pull.published, pull.age)
        self.counts.end_span(watched.span, pull, traceparent)

    def _look_after(self, pull: Pull, watched: _Watched) -> None:
        """Stop a pull that cannot be committed any more; else renew its leases."""
        now = monotonic()
        if pull.over:
            pull.stop_copies()  # an interrupt may have come before that
            return
        error = pull.lost()
        if error is not None:
            pull.stop(error)
            return
        self._tend(pull, now - watched.began)
        wanted = pull.requested.wanted
        waits = wanted is not None and wanted.waits
        # A worker renews the others if it does not wait.
        shared = [source for source in pull.sources if waits or source.word is not None]
        if not watched.begun and now >= watched.began + min(BEGIN, _third(shared)):
            watched.begun = wanted is None or pull.requested.pieces > 0  # else it has not begun
            watched.renew = now + _third(shared)
            for source in pull.requested.quiet:
                self._tell(source, Begin(source.ticket.epoch, source.ticket.offer))
        elif watched.begun and now >= watched.renew:
            watched.renew = now + _third(shared)
            for source in shared:
                ticket = source.ticket
                self._tell(source, Renew(ticket.epoch, ticket.offer, ticket.lease))

    @staticmethod
    def _tend(pull: Pull, seconds: float) -> None:
        """Have a worker renew the offers of a pull that has lasted for some seconds, before a third
        of their leases is over; a shorter pull needs no such worker."""
        tend = pull.requested.tend
        if tend is None or seconds < _third([*pull.sources]) - LOOK:
            return
        pull.requested.tend = None
        with suppress(PortaKVError):  # the graph is closed, so the pull ends
            tend()

    def _tell(self, source: Source, message: Message) -> bool:
        """Send a message to an owner, unless the owner is gone; return False if its connection is
        busy."""
        owner = source.owner
        if owner.gone:
            return True
        if monotonic() < self._busy.get(owner.address, 0.0):
            return False
        self._busy.pop(owner.address, None)
        try:
            owner.channel.tell(owner.address, message, SENDING)
        except TransferTimeout:  # another thread waits for an answer by this connection
            self._busy[owner.address] = monotonic() + BUSY
            return False
        except PortaKVError:  # the owner may be gone
            pass
        return True


def _third(sources: list[Source]) -> float:
    """Return the seconds until leases are to be renewed, at most `RENEWAL`."""
    third = min((source.ticket.lease for source in sources), default=1.0) / 3
    return max(FIRST_LOOK, min(third, RENEWAL))
