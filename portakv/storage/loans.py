# SPDX-License-Identifier: Apache-2.0
"""`Loan`: rows of the host tier that a load reads in the thread of its caller.

Such a load takes no lock and needs no helper thread: it publishes the keys that it reads, and looks
for their rows only then. Whoever evicts a key takes it from its row first, and only then looks
whether a loan has it. So one of the two sees the other, in any order of their steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from weakref import ref

import torch

from portakv.runtime.streams import completion, ignoring_captures
from portakv.runtime.transfer import Completion

#: Bytes of the first part of a copy that a caller's thread issues; a copy of less than twice as
#: many is one part.
FIRST_PART = 32 << 20


class Loan:
    """Keys of the host tier that keep their rows until the end of a copy.

    Attributes:
        keys: the keys.
        rows: the row of each key; None for a key without one.
        stream: the stream of the copy, once it may have begun; None on the host.
        end: the end of the copy, once it was issued.
    """

    __slots__ = ("_caller", "_thread", "end", "keys", "rows", "stream")

    def __init__(self, keys: Sequence[bytes], caller: object) -> None:
        self.keys = keys
        self.rows: Sequence[int | None] = ()
        self.stream: torch.Stream | None = None
        self.end: Completion | None = None
        self._caller = ref(caller)
        self._thread = get_ident()

    def cancel(self) -> None:
        """End a loan that nothing reads."""
        self.end = Completion()

    def was_left(self) -> bool:
        """Return True if this thread was interrupted before a copy could begin.

        Only a thread that is not inside the loan's call any more, but whose traceback retains it,
        may ask.
        """
        return self._thread == get_ident() and self.end is None and self.stream is None

    def ended(self) -> bool:
        """Return True if no copy reads the rows; never block.

        A loan without an end, whose caller is gone, was interrupted. If its copy may have begun,
        the present work of the stream is its end.
        """
        gone = self._caller() is None  # read first: the end is set while the caller lives
        if self.end is None:
            if not gone:
                return False
            if self.stream is None:
                return True
            self.end = completion(self.stream.device, self.stream)
        event = self.end.event
        if event is None:
            return self.end.ended()
        with ignoring_captures(event.device):
            return self.end.ended()


class Loans:
    """The loans of a host tier. All calls but `begin` and `end_left` are made under the tier's
    lock."""

    def __init__(self) -> None:
        self._all = list[Loan]()
        self._counted = list[Loan]()  # the loans of `_keys`
        self._keys: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self._all)

    def begin(self, keys: Sequence[bytes], caller: object) -> Loan:
        """Return a new loan, which ends with its copy, or with the life of ``caller`` if no copy
        was issued.

        Callers look for rows after this call. It needs no lock.
        """
        loan = Loan(keys, caller)
        self._all.append(loan)
        return loan

    def end_left(self) -> None:
        """End the loans of this thread whose calls were interrupted; needs no lock."""
        for loan in [*self._all]:
            if loan.was_left():
                loan.cancel()

    def __contains__(self, key: object) -> bool:
        """Return True if a loan has a key, also one that has ended and was not forgotten."""
        now = [*self._all]
        if now != self._counted:
            self._keys = frozenset(key for loan in now for key in loan.keys)
            self._counted = now
        return key in self._keys

    def forget_ended(self) -> None:
        """Forget the loans that have ended."""
        for loan in [*self._all]:
            if loan.ended():
                self._all.remove(loan)

    def rows(self) -> set[int]:
        """Return the rows of all loans."""
        return {row for loan in [*self._all] for row in loan.rows if row is not None}


def copy_parts(many: int, nbytes: int) -> list[slice]:
    """Return the parts of a copy of so many blocks, each of ``nbytes``.

    The first part is short, so that its copy begins soon. Each next part has twice as many blocks.
    """
    most = max(1, FIRST_PART // nbytes)
    parts = list[slice]()
    first = 0
    while many - first > 2 * most:
        parts.append(slice(first, first + most))
        first += most
        most *= 2
    return [*parts, slice(first, many)]
