# SPDX-License-Identifier: Apache-2.0
"""The block store of an engine whose scheduler and only worker are one process."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from portakv.arguments import nbytes, seconds, text, whole
from portakv.errors import InvalidTerms, PortaKVError
from portakv.runtime.bounded import Bounded
from portakv.storage import BlockForm, BlockStore, Disk
from portakv.view import KVView


@dataclass(frozen=True)
class StoreTerms:
    """Where the blocks of an engine are stored.

    Attributes:
        folder: of the disk tier; None: no disk.
        capacity: bytes of the disk tier.
        host: bytes of host memory that cache blocks.
        staging: bytes of pinned memory for transfers.
        deadline: seconds after which a load gives up what has not landed.

    Raises `InvalidTerms` for values that a term cannot have, and for no tier at all.
    """

    folder: str | None = None
    capacity: int = 64 << 30
    host: int = 4 << 30
    staging: int = 1 << 30
    deadline: float = 10.0

    def __post_init__(self) -> None:
        if self.folder is not None:
            text("folder", self.folder)
            check_private(self.folder)
        for name in ("capacity", "host", "staging"):
            nbytes(name, getattr(self, name))
        seconds("deadline", self.deadline, above=True)
        if self.folder is None and not self.host:
            raise InvalidTerms(
                "Expected a host tier or a folder for a disk tier, got host=0 and no folder. Pass "
                "one of them."
            )

    @classmethod
    def of(cls, terms: Mapping[str, object]) -> StoreTerms:
        """Return terms as a configuration file has them.

        Raises `InvalidTerms` for a name that is not a term.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in terms if name not in names]
        if unknown:
            raise InvalidTerms(
                f"Expected some of {', '.join(names)}, got {unknown[0]!r}. Correct it, or leave it "
                f"out."
            )
        return cls(**terms)  # type: ignore[arg-type]


def check_private(folder: str) -> None:
    """Raise `InvalidTerms` for a folder that exists and that others may write.

    Who can write a folder decides what an engine computes with.
    """
    try:
        entry = os.stat(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidTerms(f"Expected a folder, got {folder!r}: {error}. Pass another.") from None
    if not stat.S_ISDIR(entry.st_mode):
        raise InvalidTerms(f"Expected a folder, got {folder!r}, which is a file. Pass another.")
    if entry.st_mode & 0o022 or entry.st_uid not in (os.getuid(), 0):
        raise InvalidTerms(
            f"Expected a folder that only this user may write, got {folder!r}, which others may "
            f"write. Run chmod go-w on it, or pass another."
        )


class LocalIndex:
    """The index of the blocks that a process can load; it knows none without a store.

    An engine makes its scheduler's side and its worker's side separately, in one process. They
    share the index of the engine's name.
    """

    def __init__(self) -> None:
        self.store: BlockStore | None = None

    @staticmethod
    def of(engine: str) -> LocalIndex:
        """Return the index of an engine."""
        return _indices.get_or_make(engine, LocalIndex)

    def leading(self, keys: Sequence[bytes]) -> int:
        """Return how many leading blocks can be loaded."""
        return next((n for n, key in enumerate(keys) if not self.has(key)), len(keys))

    def has(self, key: bytes) -> bool:
        """Return whether a block can be loaded."""
        store = self.store
        try:
            return store is not None and store.has(key)
        except PortaKVError:  # it was closed
            return False


_indices: Bounded[str, LocalIndex] = Bounded("indices of engines", 256)


def opened_store(
    view: KVView, terms: StoreTerms, model: str, block_size: int | None, notes: str = ""
) -> BlockStore:
    """Return the store of the blocks of a view.

    Args:
        model: the name of the model, which blocks of another model do not have.
        block_size: the tokens of a stored block; None: of the view's blocks.
        notes: what else fixes the bytes of a block, such as the kernel that writes them.

    Raises:
        InvalidTerms: a size that blocks of this view cannot have.
        StoreError, StoreBusy: memory for no block; a folder that another process has.
    """
    if block_size is not None:
        whole("block_size", block_size, 1)
    form = BlockForm.of(view, model, block_size=block_size, notes=notes)
    tiers = [Disk(terms.folder, capacity=terms.capacity)] if terms.folder is not None else []
    return BlockStore(form, staging=terms.staging, host=terms.host, tiers=tiers)
