# SPDX-License-Identifier: Apache-2.0
"""The exception tree of PortaKV.

Every message is a sentence that says what was expected, what came and what to do. After any of
these errors no byte outside the addressed rows has changed.
"""

from __future__ import annotations


class PortaKVError(Exception):
    """The base of all errors that PortaKV raises on purpose.

    ``trace`` has the `Decision` of each candidate that was considered, if one of several backends,
    strategies, transports or I/O engines could not be chosen. Empty for other errors.
    """

    trace: tuple[object, ...] = ()


class LayoutError(PortaKVError, ValueError):
    """A layout string is wrong, tensors contradict it, or two views do not fit each other."""


class SlotError(PortaKVError, ValueError):
    """An index is bad: wrong dtype, a slot past the end, a range past the list, a duplicate."""


class DeviceMismatch(PortaKVError, ValueError):
    """Tensors that should be on one device are on several, or on a device that is not served."""


class BackendUnavailable(PortaKVError, RuntimeError):
    """A backend that was requested by name is unknown or cannot run here, or none serves a
    device."""


class Unsupported(PortaKVError, NotImplementedError):
    """This backend, or every backend, cannot run a plan.

    ``what`` names the request, and ``why`` the reason, with what to do instead.
    """

    def __init__(self, what: str, why: str) -> None:
        sentence = f"{what}: {why}"
        super().__init__(sentence if sentence[-1] in ".\n" or "\n" in why else f"{sentence}.")
        self.what = what
        self.why = why


class InvalidTerms(PortaKVError, ValueError):
    """An argument has a value that it cannot have."""


class TransferError(PortaKVError, RuntimeError):
    """A launched transfer failed, or its completion cannot be checked here."""


class PackOverflow(TransferError):
    """Blocks do not fit into packed slots, or packed slots hold the flag of such blocks.

    Copy these blocks raw. All other blocks were moved. A pull does not commit them: it asks no
    owner whether its offer held, and verifies no rows. The error names the blocks of all layers,
    slices and owners. The handle of one layer of a copy by layer names the blocks that do not fit
    in that layer.

    Attributes:
        src_blocks, dst_blocks: the numbers of these blocks in the source and in the destination.
    """

    def __init__(
        self, message: str, src_blocks: tuple[int, ...] = (), dst_blocks: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.src_blocks = src_blocks
        self.dst_blocks = dst_blocks

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.src_blocks, self.dst_blocks)


class TransferTimeout(TransferError, TimeoutError):
    """A transfer has not ended within the allowed time; it goes on."""


class TransferCancelled(TransferError):
    """A transfer was cancelled, so that some of its blocks were not moved."""


class PeerError(TransferError):
    """Another process cannot be reached, refuses, or is gone; nothing was committed."""


class OfferGone(PeerError):
    """An offer of rows is no longer valid; the rows read from it were not committed."""


class StoreError(PortaKVError, RuntimeError):
    """A block store cannot be made, opened, read or written."""


class StoreBusy(StoreError):
    """Another store has the folder open, or writes of a killed store have not landed yet.

    The message names the process of the other store.
    """


class HostMemoryError(PortaKVError, RuntimeError):
    """Host memory cannot be allocated, registered or returned."""


class PoolExhausted(HostMemoryError):
    """A pool has no free block, now or within the allowed time."""
