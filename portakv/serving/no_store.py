# SPDX-License-Identifier: Apache-2.0
"""`NoStore`: in place of a store, for an engine that only hands requests over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from portakv.errors import StoreError
from portakv.storage import BlockForm
from portakv.storage.changes import Change


class NoStore:
    """An index without blocks, in which a ledger finds nothing and saves nothing."""

    losses = 0

    def leading(self, keys: Sequence[bytes], /) -> int:
        """Return that no block can be loaded."""
        return 0

    def has(self, key: bytes, /) -> bool:
        """Return that no block is to be saved."""
        return True

    def record(self) -> None:
        """Keep changes, of which there are none."""

    def take_events(self) -> list[Change]:
        """Return no change."""
        return []

    def bytes_of(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return no bytes."""
        return {}


class NoBlocks:
    """The blocks of a group of layers of which none is stored.

    Args:
        form: that stored blocks would have.
    """

    def __init__(self, form: BlockForm) -> None:
        self.form = form

    def save(self, *args: Any, **terms: Any) -> NoReturn:
        """Raise `StoreError`."""
        raise _no_store()

    def load(self, *args: Any, **terms: Any) -> NoReturn:
        """Raise `StoreError`."""
        raise _no_store()


def _no_store() -> StoreError:
    return StoreError(
        "Expected an engine with a store, got one that only hands requests over. Name a folder, "
        "host or bucket in kv_connector_extra_config."
    )
