# SPDX-License-Identifier: Apache-2.0
"""Chunks and slot mappings whose storage was made smaller: also a repeated copy refuses them,
although their shapes stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.packed_backend import Packing
from support.simdev_cases import DEVICE

from portakv import AdaptiveConnector, PortaKVError
from portakv.copy.repeat_chunks import ChunkRepeats

pytestmark = pytest.mark.simdev

LAYERS = 2
TOKENS = 16


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdaptiveConnector]:
    """A connector whose copies are repeated, with registered caches."""
    monkeypatch.setenv("PORTAKV_BACKEND", "packing")
    with registered(packing=Packing):
        made = AdaptiveConnector(
            DEVICE, None, "layer | kv block token head dim", "kv layer token (head dim)"
        )
        made.register_kv_caches([*torch.zeros(LAYERS, 2, 8, 4, 2, 8).to(DEVICE)])
        yield made


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each copy whether it was repeated."""
    taken: list[bool] = []
    transfer = ChunkRepeats.transfer

    def noted(self: ChunkRepeats, *args: Any) -> object:
        made = transfer(self, *args)
        taken.append(made is not None)
        return made

    monkeypatch.setattr(ChunkRepeats, "transfer", noted)
    return taken


@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
@pytest.mark.parametrize("what", ["chunk", "slots"])
def test_memory_that_became_too_short_is_refused(
    what: str, store: bool, connector: AdaptiveConnector, repeated: list[bool]
) -> None:
    chunk = torch.zeros(2, LAYERS, TOKENS, 16).to(DEVICE)
    slots = torch.arange(TOKENS).to(DEVICE)
    move = connector.from_gpu if store else connector.to_gpu
    for _ in range(3):
        move(chunk, slot_mapping=slots).synchronize()
    assert repeated[-1]
    short = chunk if what == "chunk" else slots
    short.untyped_storage().resize_(64)
    with pytest.raises(PortaKVError):
        move(chunk, slot_mapping=slots).synchronize()
    assert not repeated[-1]
