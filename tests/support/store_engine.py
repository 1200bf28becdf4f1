# SPDX-License-Identifier: Apache-2.0
"""An engine of the model over a block store of its process."""

from __future__ import annotations

import random

from portakv import KVView
from portakv.serving import GroupCache
from portakv.serving.local import GroupView, LocalIndex, StoreTerms
from portakv.storage import BlockForm
from support.model_worker import ModelWorker, caches
from support.serving_model import Draw, Engine

STEP = 5e-4  # seconds of a step in which workers of the store go on


class RealStore(LocalIndex):
    """A block store of the model's rows, as its index."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        super().__init__()
        draw.workers = 1
        view = caches(2, 8)[1]
        size = BlockForm.of(view, "model", block_size=draw.stored_size).image_bytes
        room = chance.choice([6, 40]) * size  # the host tier evicts
        terms = StoreTerms(staging=room + 8 * size, host=room)
        (self.blocks,) = self.open([GroupView(view)], terms, "model", draw.stored_size)
        self.expected = dict[bytes, list[int]]()
        self.wrong = 0.0

    def age(self) -> None:
        """Nothing is damaged; the store evicts."""


class StoreWorker(ModelWorker):
    """A worker over a block store."""

    step = STEP

    @staticmethod
    def cache(engine: Engine, view: KVView, number: int) -> GroupCache:
        return GroupCache(view, engine.store.blocks)
