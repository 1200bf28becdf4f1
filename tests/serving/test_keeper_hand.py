# SPDX-License-Identifier: Apache-2.0
"""Hands whose blocks a keeper stores, in the model of an engine with one rank or with two."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence

import pytest
import torch
from support.serving_model import NOTHING, Draw, Engine

from portakv import KVView
from portakv.serving import (
    GroupCache,
    Hand,
    Keeper,
    KeeperClient,
    KeeperIndex,
    Ledger,
    Plan,
    Report,
    StoreTerms,
)
from portakv.storage import BlockForm

LAYOUT = "layer | block kv token head dim"
STEP = 5e-3  # seconds of a step in which workers go on
LIMIT = 30.0  # seconds; nothing here takes as long


def caches(blocks: int, size: int) -> tuple[torch.Tensor, KVView]:
    memory = torch.full((blocks, 2, size, 1, 1), NOTHING, dtype=torch.int64)
    return memory, KVView([memory], LAYOUT)


class KeptStore:
    """A keeper, its ranks and a scheduler's index of it."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.workers = chance.choice([1, 2])
        self.workers = draw.workers
        self.size = draw.stored_size
        form = self.form(caches(2, 8)[1], 0)
        whole = BlockForm.of(caches(2, 8)[1], "model", block_size=self.size).image_bytes
        room = chance.choice([6, 40]) * max(whole, 2 * form.image_bytes)
        name = f"hands {os.getpid()} {id(self)}"
        self.keeper = Keeper(StoreTerms(host=room, staging=2 * room), name)
        self.index = KeeperIndex(self.keeper.place, name)
        self.name = name
        self.clients = list[KeeperClient]()
        self.expected = dict[bytes, list[int]]()
        self.wrong = 0.0

    def form(self, view: KVView, number: int) -> BlockForm:
        heads = (number, number + 1, self.workers)
        return BlockForm.of(view, "model", block_size=self.size, heads=heads)

    def join(self, view: KVView, number: int) -> KeeperClient:
        client = KeeperClient(self.keeper.place, [self.form(view, number)], self.name)
        self.clients.append(client)
        assert client.wait(LIMIT)
        return client

    def leading(self, keys: Sequence[bytes]) -> int:
        return self.index.leading(keys)

    def has(self, key: bytes) -> bool:
        return self.index.has(key)

    @property
    def losses(self) -> int:
        return self.index.losses

    def age(self) -> None:
        """Nothing is damaged; the store evicts."""

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.index.close()
        self.keeper.close()


class HandWorker:
    """A rank of the model, whose rows lie in caches that a hand saves and loads."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._memory, view = caches(engine.draw.blocks, engine.draw.block_size)
        client = engine.store.join(view, number)
        self._hand = Hand([GroupCache(view, client.blocks[0])])
        self._said = Report()
        self.freed = set[str]()

    @property
    def busy(self) -> bool:
        return self._hand.busy

    @property
    def report(self) -> Report:
        return self._said.merged(self._hand.report())

    @report.setter
    def report(self, empty: Report) -> None:
        self._said = empty

    def row(self, block: int, at: int) -> int:
        both = {int(x) for x in self._memory[block, :, at, 0, 0]}
        return both.pop() if len(both) == 1 else NOTHING

    def write(self, block: int, at: int, row: int) -> None:
        self._memory[block, :, at] = row

    def before_step(self, plan: Plan) -> None:
        self._hand.stop(plan)

    def after_step(self, plan: Plan) -> None:
        self._hand.load(plan)
        self._hand.save(plan)
        self._said = self._said.merged(self._hand.report())
        self.freed |= self._hand.ended().freed
        if self._hand.busy:
            time.sleep(STEP)


@pytest.mark.parametrize("seed", range(4))
def test_walks_of_an_engine_over_a_keeper(seed: int) -> None:
    walk(seed)


@pytest.mark.full
def test_many_walks_of_an_engine_over_a_keeper() -> None:
    for seed in range(100, 200):
        walk(seed)


def walk(seed: int) -> None:
    """Run a walk, whose rows the model judges."""
    engine = Engine(Ledger, seed, KeptStore, HandWorker)
    try:
        engine.run(12)
    finally:
        engine.store.close()
