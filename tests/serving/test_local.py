# SPDX-License-Identifier: Apache-2.0
"""The store of an engine whose scheduler and worker are one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from portakv import KVView
from portakv.errors import InvalidTerms
from portakv.serving.local import LocalIndex, StoreTerms, opened_store
from portakv.storage import prefix_keys

LIMIT = 20.0  # seconds; nothing here takes as long


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"host": 0}, "Expected a host tier or a folder"),
        ({"hosts": 1}, r"Expected some of folder, capacity, .* got 'hosts'"),
        ({"folder": 5}, "folder"),
        ({"host": -1}, "host"),
        ({"deadline": 0}, "deadline"),
    ],
)
def test_wrong_terms_are_refused(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        StoreTerms.of(terms)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    StoreTerms.of({"folder": str(folder)})
    folder.mkdir(mode=0o755)
    StoreTerms.of({"folder": str(folder)})
    folder.chmod(0o775)
    with pytest.raises(InvalidTerms, match="which others may write"):
        StoreTerms.of({"folder": str(folder)})
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidTerms, match="which is a file"):
        StoreTerms.of({"folder": str(file)})


def test_an_index_knows_what_its_store_has() -> None:
    """And nothing before the store was opened, or after it was closed."""
    index = LocalIndex.of("an engine")
    assert index is LocalIndex.of("an engine")
    keys = prefix_keys(range(24), 8)
    assert index.leading(keys) == 0
    view = KVView([torch.zeros(4, 2, 8)], "layer | block page", block_size=8)
    terms = StoreTerms(host=1 << 20, staging=1 << 20)
    with opened_store(view, terms, "model", 8) as store:
        index.store = store
        store.save(view, [0, 1], keys[:2]).synchronize(LIMIT)
        assert index.leading(keys) == 2
        assert index.has(keys[1])
        assert not index.has(keys[2])
    assert not index.has(keys[1])
    assert index.leading(keys) == 0
