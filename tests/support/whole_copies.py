# SPDX-License-Identifier: Apache-2.0
"""Which copies the core makes as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from portakv.copy import rows
from portakv.copy.inside import ChunkCopies, copied
from portakv.view.form import plain_reader

#: Of tests that watch how the core makes copies. It reads their tensors by the exchange API and by
#: handles.
needs_whole_copies = pytest.mark.skipif(
    plain_reader() is None, reason="this torch has no exchange API of DLPack, or no handles"
)


def watch_whole_copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets for each later copy of one chunk whether the core made it."""
    _skip_without_reader()
    made: list[bool] = []
    find = ChunkCopies.transfer

    def transfer(copies: ChunkCopies, *arguments: Any) -> Any:
        result = find(copies, *arguments)
        made.append(result is not None)
        return result

    monkeypatch.setattr(ChunkCopies, "transfer", transfer)
    return made


def watch_copies_of_views(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets for each later copy between views whether the core made it."""
    _skip_without_reader()
    made: list[bool] = []

    def watched(*arguments: Any) -> Any:
        result = copied(*arguments)
        made.append(result is not None)
        return result

    monkeypatch.setattr(rows, "copied", watched)
    return made


def _skip_without_reader() -> None:
    if needs_whole_copies.args[0]:
        pytest.skip(needs_whole_copies.kwargs["reason"])
