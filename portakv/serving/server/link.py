# SPDX-License-Identifier: Apache-2.0
"""`Link`: the connection of a process to the server of its host, made again whenever it ends."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

from portakv.errors import InvalidTerms, PeerError, PortaKVError, StoreError, TransferError
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Message, Refused
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.server.messages import (
    PROTOCOL,
    Alive,
    AskProtocol,
    Farewell,
    Later,
    Leave,
    ServerProtocol,
)
from portakv.storage.tiers.folder import (
    cause_of,
    check_folder,
    lock,
    make_folder,
    read_file,
    unusable,
)
from portakv.tasks import Signal, Work, runtime

# ------------------------------------------------------------------------------------------------
# Where the processes of a host find the server that serves them.

#: The file in a folder of a disk tier. The process that has it locked serves the folder.
NAME = "keeper"
#: Memory in which the processes of a host share files, and the folder of this user there.
_MEMORY = Path("/dev/shm")
_warnings = RateLimitedLog(logging.getLogger(__name__))
_ADDRESS = re.compile(r"ipc:///proc/[0-9]{1,10}/fd/[0-9]{1,10}\n")


class Place:
    """A file with the address of a server, which only this user may write.

    The process that serves has the file locked. The kernel drops the lock with the process, so
    that another one may serve.

    Args:
        file: in a private folder.
        temporary: remove the file after use.
    """

    def __init__(self, file: Path, temporary: bool = False) -> None:
        self._file = file
        self._temporary = temporary
        self._lock = -1  # the descriptor of the file while this process serves

    def __repr__(self) -> str:
        return f"Place({str(self._file)!r})"

    @classmethod
    def of_folder(cls, folder: str | Path) -> Place:
        """Return the place of the server of a folder of a disk tier."""
        return cls(Path(folder) / NAME)

    @classmethod
    def of_engine(cls, engine: str) -> Place:
        """Return the place of the server of an engine without a folder, in memory of this host."""
        name = sha256(engine.encode(errors="replace")).hexdigest()[:32]
        return cls(_MEMORY / f".portakv-{os.geteuid()}" / name, temporary=True)

    @property
    def name(self) -> str:
        """Return the folder, for messages."""
        return str(self._file.parent)

    @property
    def claimed(self) -> bool:
        """Return whether this process serves."""
        return self._lock >= 0

    def address(self) -> str:
        """Return the address of the channel of the server, as far as is known; empty without one.

        The server may have ended since then. Raises `StoreError` for a file of another user. The
        log says why a file that is there cannot be read.
        """
        try:
            text = read_file(self._file, 256).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            text = "The address of the store server in %s cannot be read: %s."
            _warnings.warning(f"{self._file}", text, self._file, cause_of(error), lines=1)
            return ""
        return text.strip() if _ADDRESS.fullmatch(text) else ""

    def claim(self) -> bool:
        """Lock the file; return whether this process serves now. Another one may serve.

        Raises `StoreError` for a folder or a file that cannot be used, or that others may write.
        """
        if self.claimed:
            return True
        folder = self._file.parent
        try:
            make_folder(folder)
            check_folder(folder)
            if folder.stat().st_mode & 0o022:
                raise StoreError(
                    f"Expected a folder that only this user may write, got {folder}, which others "
                    f"may write. Run chmod go-w on it, or pass another."
                )
            self._lock = lock(self._file)
        except OSError as error:
            raise unusable(folder, error) from None
        if self.claimed:
            _claimed.add(self)
            os.ftruncate(self._lock, 0)  # the address of a server that has ended
        return self.claimed

    def publish(self, address: str) -> None:
        """Write the address of this process's channel.

        Raises `StoreError` if the device is full. This process does not serve then.
        """
        try:
            os.pwrite(self._lock, f"{address}\n".encode(), 0)
        except OSError as error:
            self.drop()  # another one may serve, or this one later
            raise unusable(self._file, error) from None

    def release(self) -> None:
        """Serve no longer."""
        if self.claimed:
            # An address that stays is that of a channel that is closed, so no client joins there.
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
                if self._temporary:
                    self._file.unlink(missing_ok=True)
            self.drop()

    def drop(self) -> None:
        """Close the file, in a forked process too, which must not keep the lock."""
        descriptor = self._lock
        self._lock = -1
        if descriptor >= 0:
            os.close(descriptor)


_claimed: WeakSet[Place] = WeakSet()


def _drop_all() -> None:
    """Close the files in a forked child: it would keep the lock of its parent."""
    for place in [*_claimed]:
        place.drop()


os.register_at_fork(after_in_child=_drop_all)


_log = logging.getLogger(__name__)
T = TypeVar("T")
#: Seconds for an answer to a load, for which an engine waits: no longer for a server that hangs,
#: and once, since the session then ends. Seconds for all other answers.
ASKING = 2.0
PATIENT = 5.0
#: Seconds between two signs of life, and between tries to reach a server that is not there, is
#: not ready, or has refused.
BEAT = 1.0
ABSENT = 0.2
BUSY = 0.05
REFUSED = 2.0
#: What the log says of the end of a session, whose server said that it ends or did not.
ENDED = "The store server of %s has ended: blocks count as missing until another one serves. %s"
GONE = "The store server of %s is gone: blocks count as missing until another one serves. %s"
#: Seconds without a server after which a warning is logged.
LONELY = 30.0


class Session(NamedTuple):
    """A session of a server. ``data``: what its user has made at its begin."""

    address: str
    number: int
    data: Any


class Link:
    """The connection of a process to the server of a place.

    A coroutine makes it, looks whether it stands, and makes it again.

    Args:
        place: where the address of the server stands.
        channel: of the process, to which the server also sends; the link closes it.
        hello: returns the request for a session, from the number of the session before.
        kind: the type of its answer.
        began: a coroutine that makes the data of a session, from the server's address and the
            answer with which it begins.
        ended: is called in a step with a session that has ended, before the next one begins.
        ready: returns whether a session may begin: nothing of the session before is under way.
        refresh: a coroutine that runs with a session now and then, and after `Link.wake`.

    Attributes:
        session: of the server; None while there is none.
        refused: a server refused the session, or that of the ranks of this engine.
    """

    def __init__(
        self,
        place: Place,
        channel: Channel,
        hello: Callable[[int], Message],
        kind: type[Any],
        began: Callable[[str, Any], Awaitable[object]],
        ended: Callable[[Session], object],
        ready: Callable[[], bool] = lambda: True,
        refresh: Callable[[Session], Awaitable[object]] | None = None,
    ) -> None:
        self.session: Session | None = None
        self.refused = False
        self._place = place
        self._channel = channel
        self._hello = hello
        self._kind = kind
        self._began = began
        self._ended = ended
        self._ready = ready
        self._refresh = refresh
        self._runtime = runtime()
        self._before = 0  # the number of the last session
        self._known = ""  # the address of the last server that answered
        self._alike = True  # it has the version of this process
        self._refusal = ""  # why a session could not begin
        # The last line in the log since the last session, but that of its end; the loudest level.
        self._said = ""
        self._level = logging.INFO
        self._changed = Signal(self._runtime)  # also after `wake`
        self._looks_now = False
        self._stopped = False
        channel.serve(Farewell, self._farewell)

    def start(self) -> None:
        """Start the coroutine."""
        self._keeper = self._runtime.start(self._keep())

    def wake(self) -> None:
        """Have the session looked at now."""
        with self._runtime.lock:
            self._looks_now = True
            self._changed.notify()

    def wait(self, timeout: float) -> bool:
        """Wait for a session, at most so many seconds; return whether there is one.

        Returns at once if the server is of another version, which a later one may not be. Raises
        `InvalidTerms` with the sentence of a server that refuses the blocks of this process.
        """
        self._changed.block(lambda: self.session or self._refusal or not self._alike, timeout)
        refusal = self._refusal
        if self.session is None and refusal:
            raise InvalidTerms(refusal)
        return self.session is not None

    async def ask(
        self, session: Session, message: Message, kind: type[T], timeout: float = PATIENT
    ) -> T:
        """Return the answer of the server. Raises `PeerError` and the like without one.

        The session ends if the server does not answer within so many seconds.
        """
        try:
            return await self._channel.answer(session.address, message, kind, timeout)
        except Refused:
            self.wake()  # look whether the session stands
            raise
        except TransferError as error:
            self.lose(session, str(error))
            raise

    async def tell(self, session: Session, message: Message) -> None:
        """Send a message, if the session stands. The session ends if the server does not take
        it."""
        if self.session is not session:
            return
        try:
            await self._channel.send(session.address, message, PATIENT)
        except PortaKVError as error:
            self.lose(session, str(error))

    def post(self, session: Session, message: Message) -> None:
        """Send a message as `tell` does, and wait for nothing."""
        self._runtime.start(self.tell(session, message))

    def lose(self, session: Session, why: str, in_order: bool = False) -> None:
        """End a session, and log why; ``in_order``: its server said that it ends."""
        with self._runtime.lock:
            if self.session is not session:
                return
            self.session = None
            self._ended(session)  # in this step: before the next session can begin
            self.wake()
        if not self._stopped:
            self._said = ""
            self._level = logging.INFO if in_order else logging.WARNING
            _log.log(self._level, ENDED if in_order else GONE, self._place.name, why)

    def close(self) -> None:
        """End the session and the coroutine, and close the channel."""
        self._stopped = True
        self.wake()
        self._keeper.synchronize()
        session = self.session
        if session is not None:
            if self._ready():
                self._runtime.run(self.tell, session, Leave(session.number))
            self.lose(session, "")
        self._channel.close()

    # --- the coroutine

    async def _keep(self) -> None:
        """Have a session, until the link is closed."""
        since = self._runtime.time()
        while not self._stopped:
            self._looks_now = False
            session = self.session
            try:
                pause = await (self._join() if session is None else self._look(session))
            except Exception as error:  # the next try may succeed
                self._say(f"A process failed to reach its store server, and tries again: {error!r}")
                pause = REFUSED
            now = self._runtime.time()
            if self.session is not None:
                since = now
            elif now > since + LONELY and not self._said:  # the log has no reason yet
                self._say(
                    f"No store server serves {self._place.name}: nothing is stored or loaded."
                )
            await self._changed.wait_for(lambda: self._looks_now, now + pause)

    async def _look(self, session: Session) -> float:
        """Look whether a session stands; return the seconds until the next look."""
        try:
            alive = Alive(session.number)
            await self._channel.answer(session.address, alive, Alive, PATIENT)
            if self._refresh is not None:
                await self._refresh(session)
        except PortaKVError as error:
            self.lose(session, str(error))
            return 0.0
        return BEAT

    async def _join(self) -> float:
        """Try to begin a session; return the seconds until the next step."""
        try:
            address = await Work(self._place.address)
        except PortaKVError as error:
            self._refuse(str(error))
            return REFUSED
        if not address or address != self._known:
            self._forget_store_server()
        if not address or not self._ready():
            return ABSENT
        try:
            if not await self._speaks_to(address):
                return REFUSED
            kind: Any = self._kind | Later
            hello = self._hello(self._before)
            answer = await self._channel.answer(address, hello, kind, PATIENT)
        except Refused as error:
            self._refuse(error.reason, by_store_server=True)
            return REFUSED
        except TransferError:
            return ABSENT
        if isinstance(answer, Later):
            return BUSY
        return await self._begin(address, answer)

    def _forget_store_server(self) -> None:
        """Forget why the last server did not serve this process; another one may."""
        if self._refusal or not self._alike:
            self._said = ""
        self._known = ""
        self._alike = True
        self._refusal = ""
        self.refused = False

    async def _speaks_to(self, address: str) -> bool:
        """Return whether a server has the version of this process."""
        if self._known == address and self._alike:
            return True
        question = AskProtocol(PROTOCOL)
        answer = await self._channel.answer(address, question, ServerProtocol, PATIENT)
        self._known = address
        self._alike = answer.version == PROTOCOL
        self._changed.notify()
        if not self._alike:
            self._say(
                f"Expected a store server of version {PROTOCOL} in {self._place.name}, got version "
                f"{answer.version}: nothing is stored or loaded. Run one release of PortaKV on a "
                f"host."
            )
        return self._alike

    async def _begin(self, address: str, answer: Any) -> float:
        """Begin a session; return the seconds until the next step."""
        self._before = answer.session
        try:
            data = await self._began(address, answer)
        except PeerError:  # the server has ended since its answer; another one may serve soon
            return ABSENT
        except PortaKVError as error:
            self._refuse(str(error))
            return REFUSED
        self.session = Session(address, answer.session, data)
        self._refusal = ""
        self.refused = False
        self._changed.notify()
        # The return of a server is as loud as its loss, or as why there was none.
        _log.log(self._level, "The store server of %s serves this process.", self._place.name)
        self._said = ""
        self._level = logging.INFO
        self._channel.watch(address, partial(self._gone, answer.session))
        return 0.0

    def _farewell(self, peer: Peer, message: Farewell) -> Farewell:
        """End a session whose server ends in order."""
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

    def _refuse(self, why: str, by_store_server: bool = False) -> None:
        """Note why there is no session, and log it once."""
        self._refusal = why
        self.refused = by_store_server
        self._changed.notify()
        self._say(
            f"Nothing is stored or loaded through the store server of {self._place.name}: {why}"
        )

    def _say(self, text: str) -> None:
        """Log a line, once."""
        if self._said != text:
            self._said = text
            self._level = logging.WARNING
            _log.warning("%s", text)
