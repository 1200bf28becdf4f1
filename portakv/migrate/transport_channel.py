# SPDX-License-Identifier: Apache-2.0
"""The part of a channel that a transport's lane uses, for one agreement between two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from portakv.errors import PeerError, TransferTimeout
from portakv.tasks import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from portakv.migrate.channel import Channel
    from portakv.migrate.messages import Message

T = TypeVar("T")


class TransportChannel:
    """A channel that sends the messages of one agreement with an owner, and none after its end.

    A reader that connects again counts its slices from 1 again. A message that a thread of the
    agreement before wanted to send would then name a slice of this one. The channel looks at
    ``ended`` while it has the connection, immediately before it sends. An agreement that is marked
    as ended before the next handshake is sent therefore sends nothing after that handshake.

    Args:
        channel: the channel of the reader.
        ended: returns True once the agreement has ended.
        error: returns the error of a message after the end.
    """

    def __init__(
        self,
        channel: Channel,
        ended: Callable[[], bool] = bool,
        error: Callable[[], PeerError] | None = None,
    ) -> None:
        self.channel = channel
        self.id = channel.id
        self.address = channel.address
        self.timeout = channel.timeout
        self.watch = channel.watch
        self._ended = ended
        self._error = error

    def ask(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> T:
        """Return the owner's answer; see `Channel.ask`. Raises `PeerError` after the end."""
        answer: T = runtime().run(self.answer, address, message, kind, timeout, stop)
        return answer

    async def answer(
        self,
        address: str,
        message: Message,
        kind: type[T],
        timeout: float | None = None,
        stop: Callable[[], bool] = bool,
    ) -> T:
        """Return what `ask` returns, in a coroutine of the runtime."""

        def stops() -> bool:
            return self._ended() or stop()

        try:
            return await self.channel.answer(address, self.enclosed(message), kind, timeout, stops)
        except TransferTimeout:
            self._check()
            raise

    def tell(self, address: str, message: Message, timeout: float | None = None) -> None:
        """Send a message without an answer; see `Channel.tell`. Raises `PeerError` after the
        end."""
        try:
            self.channel.tell(address, self.enclosed(message), timeout, self._ended)
        except TransferTimeout:
            self._check()
            raise

    def enclosed(self, message: Message) -> Message:
        """Return the message that carries a message."""
        return message

    def _check(self) -> None:
        """Raise `PeerError` after the end."""
        if not self._ended():
            return
        if self._error is not None:
            raise self._error() from None
        raise PeerError(
            "Expected the agreement with the owner to stand, got its end. Pull again."
        ) from None
