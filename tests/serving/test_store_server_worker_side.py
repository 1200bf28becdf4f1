# SPDX-License-Identifier: Apache-2.0
"""Worker sides whose blocks a server stores, in the model of an engine with ranks or stages."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
from support.model_worker import ModelWorker, caches
from support.serving_model import Draw, Engine
from support.serving_stages import StagedEngine
from support.waits import LIMIT

from portakv import KVView
from portakv.serving import (
    GroupCache,
    SchedulerSide,
    ServerIndex,
    StoreClient,
    StoreServer,
    StoreTerms,
)
from portakv.storage import BlockForm

STEP = 5e-3  # seconds of a step in which workers go on


class KeptStore:
    """A server, its ranks and a scheduler's index of it."""

    numbers = 1  # of a row

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.workers = chance.choice([1, 2])
        self.workers = draw.workers
        self.size = draw.stored_size
        view = caches(2, 8, self.numbers)[1]
        form = self.form(view, 0)
        whole = BlockForm.of(view, "model", block_size=self.size).image_bytes
        room = chance.choice([6, 40]) * max(whole, 2 * form.image_bytes)
        name = f"sides {os.getpid()} {id(self)}"
        self.store_server = StoreServer(StoreTerms(host=room, staging=2 * room), name)
        self.index = ServerIndex(self.store_server.place, name)
        self.name = name
        self.clients = list[StoreClient]()
        self.expected = dict[bytes, list[int]]()
        self.wrong = 0.0

    def form(self, view: KVView, number: int) -> BlockForm:
        heads = (number, number + 1, self.workers)
        return BlockForm.of(view, "model", block_size=self.size, heads=heads)

    def join(self, view: KVView, number: int) -> StoreClient:
        client = StoreClient(self.store_server.place, [self.form(view, number)], self.name)
        self.clients.append(client)
        assert client.wait(LIMIT)
        return client

    def leading(self, keys: Sequence[bytes], first: int = 0) -> int | None:
        return self.index.leading(keys)

    def has(self, key: bytes, states: bool = True) -> bool:
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
        self.store_server.close()


class PackedKeptStore(KeptStore):
    """A server of packed blocks."""

    numbers = 32

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        draw.stored_size = draw.block_size  # a packed block moves only whole
        super().__init__(chance, draw)

    def form(self, view: KVView, number: int) -> BlockForm:
        heads = (number, number + 1, self.workers)
        return BlockForm.of(view, "model", block_size=self.size, heads=heads, encoding="pack")


class StagedKeptStore(KeptStore):
    """A server of an engine with two stages, which have a layer each."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        super().__init__(chance, draw)
        draw.workers = 2
        self.workers = 2

    def form(self, view: KVView, number: int) -> BlockForm:
        layers = (number, number + 1, 2)
        return BlockForm.of(view, "model", block_size=self.size, layers=layers)


class StoreServerWorker(ModelWorker):
    """A rank over a server."""

    step = STEP

    @staticmethod
    def cache(engine: Engine, view: KVView, number: int) -> GroupCache:
        return GroupCache(view, engine.store.join(view, number).blocks[0])


class PackedWorker(StoreServerWorker):
    """A rank with rows of bf16."""

    numbers = PackedKeptStore.numbers


@pytest.mark.parametrize("seed", range(4))
def test_walks_of_an_engine_over_a_store_server(seed: int) -> None:
    walk(seed)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 9))]
)
def test_walks_of_an_engine_over_a_store_server_of_packed_blocks(seed: int) -> None:
    walk(seed, PackedKeptStore, PackedWorker)


@pytest.mark.parametrize("seed", range(4))
def test_walks_of_an_engine_with_stages_over_a_store_server(seed: int) -> None:
    """Stages save and load the same blocks at different times, with two steps in flight."""
    engine = StagedEngine(SchedulerSide, seed, StagedKeptStore, StoreServerWorker)
    try:
        engine.run(12)
        assert engine.most == 2
    finally:
        engine.store.close()


@pytest.mark.full
def test_many_walks_of_an_engine_over_a_store_server() -> None:
    for seed in range(100, 200):
        walk(seed)


def walk(
    seed: int,
    store: type[KeptStore] = KeptStore,
    worker: type[StoreServerWorker] = StoreServerWorker,
) -> None:
    """Run a walk, whose rows the model judges."""
    engine = Engine(SchedulerSide, seed, store, worker)
    try:
        engine.run(12)
    finally:
        engine.store.close()
