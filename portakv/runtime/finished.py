# SPDX-License-Identifier: Apache-2.0
"""A queue of what has ended, with a descriptor that an event loop can wait for."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

from portakv.errors import HostMemoryError
from portakv.runtime.devices import Process, this_process
from portakv.runtime.linux import require_linux

T = TypeVar("T")

#: The most items that wait for a consumer.
LIMIT = 65536


class _Waiting(Generic[T]):
    """The items of one process, and the eventfd that it owns once a consumer asks for it.

    The descriptor lives as long as this object. A thread that adds an item refers to the object, so
    that it never writes to a number that another file has by now.

    At most one write comes between two reads of the descriptor. ``written`` is set before the write
    and cleared after the read, and each add looks at it after its item is there. So an add that
    writes nothing saw it set, before the consumer cleared it, and the consumer takes items only
    after that: it finds the item. Cleared before the read, the flag would stay set after the read
    of the write that set it, and later items would wake no one.
    """

    fd = -1  # there is none before `fileno`

    def __init__(self, limit: int) -> None:
        self.items: deque[T] = deque(maxlen=limit)
        self.written = False

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def fileno(self) -> int:
        """Return the descriptor, which is readable if items wait already."""
        if self.fd < 0:
            made = _eventfd()
            if vars(self).setdefault("fd", made) != made:  # another thread was first
                os.close(made)
        if self.items:  # they came before the descriptor; the add of a later one writes
            self.wake()
        return self.fd

    def wake(self) -> None:
        """Make the descriptor readable, if there is one."""
        if self.fd < 0 or self.written:
            return
        try:
            self.written = True
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:  # the counter is full, so the descriptor is readable
            pass
        except BaseException:  # an interrupt, maybe before the write
            self.written = False
            raise

    def clear(self) -> None:
        """Make the descriptor not readable until the next `wake`."""
        if self.fd < 0:
            return
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:  # nothing has come
            pass
        finally:
            self.written = False


def _eventfd() -> int:
    """Return a new descriptor; raise `HostMemoryError` if none is free."""
    require_linux("a descriptor of finished transfers")
    try:
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError as error:
        raise HostMemoryError(
            f"Expected a descriptor to be free for an eventfd, got: {error}. Close files, or raise "
            f"the limit of open files."
        ) from None


class Finished(Generic[T]):
    """A bounded queue of what has ended, with one consumer. Any thread may add to it.

    Nothing is kept before `start`, which `take` and `fileno` call. The oldest item is dropped when
    ``limit`` items wait. No method blocks or needs a thread. A forked process starts
    with its own empty queue, and never reads the descriptor of its parent.

    Attributes:
        dropped: the number of items that were dropped because nothing took them.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.dropped = 0
        self._limit = limit
        self._closed = False
        #: At most one entry, except in a process that was forked after `start`.
        self._waiting = dict[Process, _Waiting[T]]()

    @property
    def started(self) -> bool:
        """Return True if items are kept."""
        return this_process() in self._waiting

    @property
    def is_idle(self) -> bool:
        """Return True if `take` would return nothing and change nothing.

        Never with a descriptor, which may be readable although no item waits.
        """
        waiting = self._waiting.get(this_process())
        return waiting is not None and not waiting.items and waiting.fd < 0

    def start(self) -> None:
        """Keep the items that are added from now on. Does nothing after `close`."""
        self._started()

    def add(self, item: T) -> None:
        """Keep an item for the consumer, and make the descriptor readable."""
        waiting = self._waiting.get(this_process())
        if waiting is None:
            return
        try:
            if len(waiting.items) == self._limit:
                self.dropped += 1
            waiting.items.append(item)
        finally:  # also if the caller is interrupted, or the consumer would miss the item
            waiting.wake()

    def take(self) -> list[T]:
        """Return the items since the last call, the oldest first.

        The descriptor is not readable after that, until another item comes. It can become readable
        once more for an item that was taken while another thread added it, so a call after a wait
        can return nothing.
        """
        waiting = self._started()
        if waiting is None:
            return []
        # The descriptor first: an item that comes after that makes it readable again.
        waiting.clear()
        taken = list[T]()
        for _ in range(len(waiting.items)):
            with suppress(IndexError):  # another thread took it
                taken.append(waiting.items.popleft())
        return taken

    def fileno(self) -> int:
        """Return the descriptor, for ``select``, ``epoll`` or an event loop; -1 after `close`.

        It is readable while items wait. It belongs to this object: do not read or close it. The
        first call makes it: without one, no item costs a system call.

        Raises `HostMemoryError` without a free descriptor.
        """
        waiting = self._started()
        if waiting is None:
            return -1
        fd = waiting.fileno()
        return -1 if self._closed else fd

    def close(self) -> None:
        """Drop the items, keep none from now on, and release the descriptor."""
        self._closed = True
        if waiting := self._waiting.get(this_process()):
            waiting.written = False
            waiting.wake()  # who sleeps on the descriptor
        self._waiting.clear()

    def _started(self) -> _Waiting[T] | None:
        """Return the items of this process, kept from now on; None after `close`."""
        process = this_process()
        waiting = self._waiting.get(process)
        if waiting is not None or self._closed:
            return waiting
        for other in [*self._waiting]:  # the parent's
            if other.forked:
                self._waiting.pop(other, None)
        return self._waiting.setdefault(process, _Waiting(self._limit))
