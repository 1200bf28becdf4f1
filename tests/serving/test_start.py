# SPDX-License-Identifier: Apache-2.0
"""Copies before an engine's first step: they run both ways, and leave the caches as they are."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from support.hand_worker import caches

from portakv.errors import StoreError
from portakv.serving import start
from portakv.storage import BlockForm, BlockStore


def random_caches(blocks: int, size: int) -> tuple[torch.Tensor, Any]:
    memory, view = caches(blocks, size)
    drawn = torch.Generator(device="cpu").manual_seed(4)
    memory.view(torch.uint8).random_(0, 256, generator=drawn)
    return memory, view


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(("engines", "stored"), [(8, 8), (4, 8), (8, 4), (4, 12)])
@pytest.mark.parametrize("blocks", [1, 12])
def test_the_caches_keep_their_bytes(
    monkeypatch: pytest.MonkeyPatch, by_layer: bool, engines: int, stored: int, blocks: int
) -> None:
    """Whatever the sizes of the engine's blocks and of the stored ones."""
    made = list[tuple[str, int]]()

    class Recording(BlockStore):
        def save(self, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
            made.append(("save", len(keys)))
            return super().save(view, blocks, keys, **terms)

        def load(self, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
            made.append(("load", len(keys)))
            return super().load(view, blocks, keys, **terms)

    monkeypatch.setattr(start, "BlockStore", Recording)
    memory, view = random_caches(blocks, engines)
    before = memory.view(torch.uint8).clone()
    form = BlockForm.of(view, "model", block_size=stored)
    start.warm_up(view, form, by_layer)
    assert torch.equal(memory.view(torch.uint8), before)
    together = math.lcm(engines, stored)  # tokens of whole blocks of both
    some = blocks * engines // together
    counts = {min(1, some), some} - {0}
    expected = [count * together // stored for count in sorted(counts) for _ in ("save", "load")]
    assert [count for _, count in made] == expected
    assert [name for name, _ in made] == ["save", "load"] * len(counts)


def test_a_store_that_cannot_be_opened_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise StoreError("Expected memory, got none.")

    monkeypatch.setattr(start, "BlockStore", fail)
    _, view = caches(4, 8)
    with caplog.at_level(logging.WARNING):
        start.warm_up(view, BlockForm.of(view, "model"))
    assert "will be slow: Expected memory, got none." in caplog.text
