# SPDX-License-Identifier: Apache-2.0
"""`Witness`: compare the fingerprints of restored blocks with those of the stored blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal, TypeAlias

from portakv.errors import TransferError
from portakv.view import KVView
from portakv.witness.faults import Fault

Check: TypeAlias = Literal["off", "sample", "all"]
Action: TypeAlias = Literal["log", "recompute", "raise"]


class WrongRows(TransferError):
    """Restored blocks differ from the stored ones; ``faults`` lists them. Compute them again."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(" ".join(fault.sentence for fault in faults))
        self.faults = list(faults)


@dataclass
class Figures:
    """Counts since a witness was made, of blocks in one group each.

    Attributes:
        fingerprinted: stored blocks whose fingerprints are or were known.
        compared: restored blocks that were compared with a known fingerprint.
        unknown: restored blocks that should be compared, without a known fingerprint.
        older: restored blocks that equal an older version of their key, which is accepted.
        faults: by their kind.
        dropped: fingerprints that newer ones evicted from the table.
        reports: files that were written.
    """

    fingerprinted: int = 0
    compared: int = 0
    unknown: int = 0
    older: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    reports: int = 0


class Comparison:
    """The comparison of the restored blocks of one call."""

    @property
    def is_done(self) -> bool:
        """Return whether `faults` waits for nothing."""
        raise NotImplementedError

    @property
    def faults(self) -> list[Fault]:
        """Return the faults. Block the host until the device has computed the fingerprints.

        Raises:
            WrongRows: there is a fault, and the witness has ``action="raise"``.
        """
        raise NotImplementedError

    @property
    def failed(self) -> set[int]:
        """Return the blocks that the engine computes again: those with a fault if the witness has
        ``action="recompute"``, else none. Block the host as `faults` does."""
        raise NotImplementedError


class Witness:
    """Fingerprints of the blocks of views, by the engine's keys.

    Args:
        views: a paged view, or one by the name of each group.
        check: which blocks; ``sample``: those that ``rate`` chooses by their keys, and those that
            `stored` marks as first.
        rate: the part of keys for ``sample``.
        action: with a fault.
        nbytes: of host memory for the table of all groups; the oldest fingerprints are evicted.
        file: that contains the table, and survives a restart. Each rank has its own.
        others: files of other ranks, in which the names of faults are looked up.
        older: an older version of a key's rows is accepted, or a fault. Engines that compute a
            block twice get other rounding, so both versions are right unless weights have changed.
        reports: a folder for a file about each fault, a few for each kind; None: no files.
    """

    def __init__(
        self,
        views: KVView | Mapping[str, KVView],
        *,
        check: Check = "sample",
        rate: float = 1 / 16,
        action: Action = "log",
        nbytes: int = 256 << 20,
        file: str | PathLike[str] | None = None,
        others: Sequence[str | PathLike[str]] = (),
        older: Literal["accept", "fault"] = "accept",
        reports: str | PathLike[str] | None = None,
    ) -> None:
        raise NotImplementedError

    def stored(
        self,
        blocks: Sequence[int],
        keys: Sequence[bytes],
        group: str = "",
        *,
        first: Collection[int] = (),
    ) -> None:
        """Take fingerprints of blocks whose rows are complete on the current stream.

        Waits for nothing. ``first``: positions in ``keys`` that are taken whatever the rate.
        """
        raise NotImplementedError

    def restored(self, blocks: Sequence[int], keys: Sequence[bytes], group: str = "") -> Comparison:
        """Compare blocks, whose rows have landed on the current stream, with their fingerprints.

        Waits for nothing. Also compares keys that the rate does not choose but `stored` has taken.
        """
        raise NotImplementedError

    def settle(self, wait: bool = False) -> None:
        """Count and log what the device has computed; ``wait``: all of it."""
        raise NotImplementedError

    @property
    def block_bytes(self) -> dict[str, int]:
        """Return the bytes of a fingerprint of a block of each group."""
        raise NotImplementedError

    def figures(self) -> dict[str, Figures]:
        """Return the counts of each group."""
        raise NotImplementedError

    def close(self) -> None:
        """Settle, and write the table to its file. May be called again."""
        raise NotImplementedError
