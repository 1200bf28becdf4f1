# SPDX-License-Identifier: Apache-2.0
"""`Link`: the connection of a process to the keeper of its host, made again whenever it ends."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from portakv.errors import InvalidTerms, PeerError, PortaKVError, StoreError, TransferError
from portakv.host.shared import process_space, started
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Message, Refused
from portakv.runtime.interrupts import Condition
from portakv.runtime.resources import start_thread
from portakv.serving.keeper_messages import (
    PROTOCOL,
    Alive,
    AskProtocol,
    Farewell,
    Later,
    Leave,
    Process,
    Protocol,
)
from portakv.serving.place import Place

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: Seconds for an answer to a load, for which an engine waits: no longer for a keeper that hangs,
#: and once, since the session then ends. Seconds for all other answers.
ASKING = 2.0
PATIENT = 5.0
#: Seconds between two signs of life, and between tries to reach a keeper that is not there, is
#: not ready, or has refused.
BEAT = 1.0
ABSENT = 0.2
BUSY = 0.05
REFUSED = 2.0
#: What the log says of the end of a session, whose keeper said that it ends or did not.
ENDED = "The keeper of %s has ended: blocks count as missing until another one serves. %s"
GONE = "The keeper of %s is gone: blocks count as missing until another one serves. %s"
#: Seconds without a keeper after which a warning is logged.
LONELY = 30.0


class Session(NamedTuple):
    """A session of a keeper. ``data``: what its user has made at its begin."""

    address: str
    number: int
    data: Any


class Known(NamedTuple):
    """The last keeper that answered: its address, and whether it has the version of this
    process."""

    address: str
    alike: bool


class Refusal(NamedTuple):
    """Why a session could not begin; empty: it could, or no one refused it."""

    why: str
    by_keeper: bool


NONE = Refusal("", False)


class Said(NamedTuple):
    """The last line in the log since the last session, other than that of its end, and the level
    of the loudest one."""

    text: str
    level: int


NOTHING = Said("", logging.INFO)


class Sides(NamedTuple):
    """What the user of a link does.

    Attributes:
        hello: returns the request for a session, from the number of the session before.
        kind: the type of its answer.
        ready: returns whether a session may begin: nothing of the session before is under way.
        began: makes the data of a session from the keeper's address and the answer with which it
            begins.
        ended: is called with a session that has ended, in any thread, before the next one begins;
            be quick.
        look: is called with a session now and then, and after `Link.wake`.
    """

    hello: Callable[[int], Message]
    kind: type[Any]
    ready: Callable[[], bool]
    began: Callable[[str, Any], object]
    ended: Callable[[Session], object]
    look: Callable[[Session], object] = lambda _: None


class Link:
    """The connection of a process to the keeper of a place.

    A thread makes it, looks whether it stands, and makes it again.

    Args:
        place: where the address of the keeper stands.
        channel: of the process, to which the keeper also sends; the link closes it.

    Attributes:
        session: of the keeper; None while there is none.
    """

    def __init__(self, place: Place, channel: Channel, sides: Sides) -> None:
        self.session: Session | None = None
        self._place = place
        self._channel = channel
        self._sides = sides
        self._before = 0  # the number of the last session
        self._known = Known("", True)
        self._changed = Condition()
        self._refusal = NONE
        self._said = NOTHING
        channel.serve(Farewell, self._farewell)
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="portakv keeper link", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises `StoreError` if the system gives no more."""
        try:
            start_thread(self._thread, StoreError)
        except StoreError:
            self._channel.close()
            raise

    def wake(self) -> None:
        """Have the thread look at the session now."""
        self._wake.set()

    def wait(self, timeout: float) -> bool:
        """Wait for a session, at most so many seconds; return whether there is one.

        Returns at once if the keeper is of another version, which a later one may not be. Raises
        `InvalidTerms` with the sentence of a keeper that refuses the blocks of this process.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.session or self._refusal.why or not self._known.alike, timeout
            )
            if self.session is None and self._refusal.why:
                raise InvalidTerms(self._refusal.why)
            return self.session is not None

    @property
    def refused(self) -> bool:
        """Return whether a keeper refused the session, or that of the ranks of this engine."""
        return self._refusal.by_keeper

    def ask(self, session: Session, message: Message, kind: type[T], timeout: float = PATIENT) -> T:
        """Return the answer of the keeper. Raises `PeerError` and the like without one.

        The session ends if the keeper does not answer within so many seconds.
        """
        try:
            return self._channel.ask(session.address, message, kind, timeout)
        except Refused:
            self._wake.set()  # look whether the session stands
            raise
        except TransferError as error:
            self.lose(session, str(error))
            raise

    def tell(self, session: Session, message: Message) -> None:
        """Send a message, if the session stands. The session ends if the keeper does not take
        it."""
        if self.session is not session:
            return
        try:
            self._channel.tell(session.address, message, PATIENT)
        except PortaKVError as error:
            self.lose(session, str(error))

    def lose(self, session: Session, why: str, in_order: bool = False) -> None:
        """End a session, and log why; ``in_order``: its keeper said that it ends."""
        with self._changed:
            if self.session is not session:
                return
            self.session = None
            self._sides.ended(session)  # under the lock: before the thread can join again
            self._changed.notify_all()
        if not self._stopped:
            level = logging.INFO if in_order else logging.WARNING
            self._said = Said("", level)
            _log.log(level, ENDED if in_order else GONE, self._place.name, why)
        self._wake.set()

    def close(self) -> None:
        """End the session and the thread, and close the channel."""
        self._stopped = True
        self._wake.set()
        self._thread.join()
        session = self.session
        if session is not None:
            if self._sides.ready():
                self.tell(session, Leave(session.number))
            self.lose(session, "")
        self._channel.close()

    # --- the thread

    def _run(self) -> None:
        """Have a session, until the link is closed."""
        since = time.monotonic()
        while not self._stopped:
            with self._changed:
                session = self.session
            try:
                pause = self._join() if session is None else self._look(session)
            except Exception as error:  # the next try may succeed
                self._say(f"A process failed to reach its keeper, and tries again: {error!r}")
                pause = REFUSED
            now = time.monotonic()
            if self.session is not None:
                since = now
            elif now > since + LONELY and not self._said.text:  # the log has no reason yet
                self._say(f"No keeper serves {self._place.name}: nothing is stored or loaded.")
            self._wake.wait(pause)
            self._wake.clear()

    def _look(self, session: Session) -> float:
        """Look whether a session stands; return the seconds until the next look."""
        try:
            self._channel.ask(session.address, Alive(session.number), Alive, PATIENT)
            self._sides.look(session)
        except PortaKVError as error:
            self.lose(session, str(error))
            return 0.0
        return BEAT

    def _join(self) -> float:
        """Try to begin a session; return the seconds until the next step."""
        try:
            address = self._place.address()
        except PortaKVError as error:
            self._refuse(str(error))
            return REFUSED
        if not address or address != self._known.address:
            self._forget_keeper()
        if not address or not self._sides.ready():
            return ABSENT
        try:
            if not self._speaks_to(address):
                return REFUSED
            kind: Any = self._sides.kind | Later
            answer = self._channel.ask(address, self._sides.hello(self._before), kind, PATIENT)
        except Refused as error:
            self._refuse(sentence_of(error), by_keeper=True)
            return REFUSED
        except TransferError:
            return ABSENT
        if isinstance(answer, Later):
            return BUSY
        return self._begin(address, answer)

    def _forget_keeper(self) -> None:
        """Forget why the last keeper did not serve this process; another one may."""
        with self._changed:
            if self._refusal.why or not self._known.alike:
                self._said = self._said._replace(text="")
            self._known = Known("", True)
            self._refusal = NONE

    def _speaks_to(self, address: str) -> bool:
        """Return whether a keeper has the version of this process."""
        if self._known == (address, True):
            return True
        version = self._channel.ask(address, AskProtocol(PROTOCOL), Protocol, PATIENT).version
        alike = version == PROTOCOL
        with self._changed:
            self._known = Known(address, alike)
            self._changed.notify_all()
        if not alike:
            self._say(
                f"Expected a keeper of version {PROTOCOL} in {self._place.name}, got version "
                f"{version}: nothing is stored or loaded. Run one release of PortaKV on a host."
            )
        return alike

    def _begin(self, address: str, answer: Any) -> float:
        """Begin a session; return the seconds until the next step."""
        self._before = answer.session
        try:
            session = Session(address, answer.session, self._sides.began(address, answer))
        except PeerError:  # the keeper has ended since its answer; another one may serve soon
            return ABSENT
        except PortaKVError as error:
            self._refuse(str(error))
            return REFUSED
        with self._changed:
            self.session = session
            self._refusal = NONE
            self._changed.notify_all()
        # The return of a keeper is as loud as its loss, or as why there was none.
        _log.log(self._said.level, "The keeper of %s serves this process.", self._place.name)
        self._said = NOTHING
        self._channel.watch(address, partial(self._gone, session.number))
        return 0.0

    def _farewell(self, peer: Peer, message: Farewell) -> Farewell:
        """End a session whose keeper ends in order, in the thread of the channel."""
        session = self.session
        if session is not None and session.number == message.session:
            self.lose(session, "", in_order=True)
        return message

    def _gone(self, number: int) -> None:
        """End a session whose connection has ended.

        A connection may outlive sessions, so it retains the number alone.
        """
        session = self.session
        if session is not None and session.number == number:
            self.lose(session, "Its connection ended.")

    def _refuse(self, why: str, by_keeper: bool = False) -> None:
        """Note why there is no session, and log it once."""
        with self._changed:
            self._refusal = Refusal(why, by_keeper)
            self._changed.notify_all()
        self._say(f"Nothing is stored or loaded through the keeper of {self._place.name}: {why}")

    def _say(self, text: str) -> None:
        """Log a line, once."""
        if self._said.text != text:
            self._said = Said(text, logging.WARNING)
            _log.warning("%s", text)


def this_client() -> Process:
    """Return the namespace, the number and the start of this process."""
    pid = os.getpid()
    return process_space(), pid, started(pid) or 0


def sentence_of(error: PeerError) -> str:
    """Return what a keeper says, without the sentence of the channel before it."""
    text = str(error)
    _, mark, sentence = text.partition(" was rejected: ")
    return sentence if mark else text
