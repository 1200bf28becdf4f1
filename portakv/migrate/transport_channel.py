# SPDX-License-Identifier: Apache-2.0
"""The part of a channel that a transport's lane uses, for one agreement between two sides."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from portakv.errors import TransferTimeout
from portakv.tasks import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from portakv.errors import PeerError
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
        ended: returns the error of a message once the agreement has ended; None before.
    """

    def __init__(
        self,
        channel: Channel,
        ended: Callable[[], PeerError | None] = lambda: None,
    ) -> None:
        self.channel = channel
        self.id = channel.id
        self.address = channel.address
        self.timeout = channel.timeout
        self.watch = channel.watch
        self._ended = ended

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
            return self._ended() is not None or stop()

        with self._end_as_error():
            return await self.channel.answer(address, self.enclosed(message), kind, timeout, stops)

    def tell(self, address: str, message: Message, timeout: float | None = None) -> None:
        """Send a message without an answer; see `Channel.tell`. Raises `PeerError` after the
        end."""
        with self._end_as_error():
            self.channel.tell(
                address, self.enclosed(message), timeout, lambda: self._ended() is not None
            )

    def enclosed(self, message: Message) -> Message:
        """Return the message that carries a message."""
        return message

    @contextmanager
    def _end_as_error(self) -> Iterator[None]:
        """Raise the error of the agreement's end in place of that of a message that it stopped."""
        try:
            yield
        except TransferTimeout:
            error = self._ended()
            if error is not None:
                raise error from None
            raise
