# SPDX-License-Identifier: Apache-2.0
"""The one exception tree of PortaKV.

Every message is a sentence that says what was asked, what was found, what was expected and
what to do. After any of these errors no byte outside the addressed rows has changed.
"""

from __future__ import annotations


class PortaKVError(Exception):
    """Base of everything that PortaKV raises on purpose."""


class LayoutError(PortaKVError, ValueError):
    """A layout string, or tensors that contradict it, or two views that cannot hold each other."""


class SlotError(PortaKVError, ValueError):
    """A bad index: wrong dtype, a slot past the end, a range past the list, a duplicate."""


class DeviceMismatch(PortaKVError, ValueError):
    """Tensors that should be on one device are on several, or on one that is not served."""


class BackendUnavailable(PortaKVError, RuntimeError):
    """A backend that was asked for by name is unknown or cannot run here, or none serves a device;
    ``trace`` is what each candidate said (`Decision`), as far as candidates were asked."""

    trace: tuple[object, ...] = ()


class Unsupported(PortaKVError, NotImplementedError):
    """A plan that this backend cannot carry out, or none can: ``what`` was asked, and ``why`` it
    cannot be done, with what to do instead."""

    def __init__(self, what: str, why: str) -> None:
        sentence = f"{what}: {why}"
        super().__init__(sentence if sentence[-1] in ".\n" or "\n" in why else f"{sentence}.")
        self.what = what
        self.why = why


class InvalidTerms(PortaKVError, ValueError):
    """An argument that says how to copy, and is none of the values that it may have."""


class TransferError(PortaKVError, RuntimeError):
    """A transfer that was launched did not end well, or its completion cannot be asked here."""


class TransferTimeout(TransferError, TimeoutError):
    """A transfer has not ended within the time that was allowed; it goes on."""


class TransferCancelled(TransferError):
    """A transfer was cancelled, so that some of its blocks were not moved."""


class PeerError(TransferError):
    """Another process that cannot be reached, refuses, or is gone; nothing was published."""


class OfferGone(PeerError):
    """An offer of rows that holds no more; what was read of it was not published."""


class StoreError(PortaKVError, RuntimeError):
    """A block store that cannot be made, opened, read or written as asked."""


class StoreBusy(StoreError):
    """A folder that another store has open, whose process the sentence names; or a killed one's
    writes, which have not landed yet."""


class HostMemoryError(PortaKVError, RuntimeError):
    """Host memory that cannot be had, registered or given back as asked."""


class PoolExhausted(HostMemoryError):
    """A pool has no block to give, at once or within the time that was allowed."""
