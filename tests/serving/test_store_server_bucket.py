# SPDX-License-Identifier: Apache-2.0
"""A server whose store has a bucket: ranks load what only the bucket has, and no one waits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.held_bucket import HeldBucket, TermsWith
from support.waits import LIMIT, until

from portakv import KVView
from portakv.serving import ServerIndex, StoreClient, StoreServer, StoreTerms
from portakv.storage import BlockForm, prefix_keys

SIZE = 8
KEYS = prefix_keys(range(8 * SIZE), SIZE)
names = itertools.count()


class Engine:
    """A server with a bucket, one rank of an engine, and the index of its scheduler."""

    def __init__(self, stack: ExitStack, terms: StoreTerms) -> None:
        name = f"bucket {os.getpid()} {next(names)}"
        self.view = KVView([torch.zeros(8, 2, SIZE, 4, 8)] * 1, "layer | block kv token head dim")
        form = BlockForm.of(self.view, "model")
        self.store_server = stack.enter_context(StoreServer(terms, name))
        self.client = stack.enter_context(StoreClient(self.store_server.place, [form], name))
        assert self.client.wait(LIMIT)
        self.index = stack.enter_context(ServerIndex(self.store_server.place, name))
        assert self.index.wait(LIMIT)


@pytest.fixture
def engine() -> Iterator[Callable[[StoreTerms], Engine]]:
    with ExitStack() as stack:
        yield lambda terms: Engine(stack, terms)


ROOM: dict[str, Any] = {"host": 0, "staging": 1 << 20}


def test_a_rank_loads_what_only_a_bucket_has(
    engine: Callable[[StoreTerms], Engine], tmp_path: Path
) -> None:
    """Two servers over one bucket, of which the second one has nothing else."""
    terms = StoreTerms(bucket=f"file://{tmp_path / 'bucket'}", **ROOM)
    first = engine(terms)
    first.view.tensors[0].fill_(7.0)
    first.client.blocks[0].save(first.view, range(5), KEYS[:5]).synchronize(LIMIT)
    second = engine(terms)
    assert second.index.leading(KEYS) is None
    assert until(lambda: second.index.leading(KEYS) == 5, LIMIT)
    assert second.index.has(KEYS[4])
    assert not second.index.has(KEYS[5])
    load = second.client.blocks[0].load(second.view, range(5), KEYS[:5], deadline=LIMIT)
    load.synchronize(LIMIT)
    assert (second.view.tensors[0][:5] == 7.0).all()
    assert not second.view.tensors[0][5:].any()


def test_a_scheduler_does_not_wait_for_a_store_server_whose_bucket_does_not_answer(
    engine: Callable[[StoreTerms], Engine],
) -> None:
    bucket = HeldBucket()
    made = engine(TermsWith.a_bucket(bucket, **ROOM))
    made.view.tensors[0].fill_(7.0)
    made.client.blocks[0].save(made.view, range(3), KEYS[:3]).synchronize(LIMIT)
    # The store knows its own save, and the index does not: the bucket's blocks are in no feed.
    bucket.hold()
    other = prefix_keys(range(100, 100 + 3 * SIZE), SIZE)
    assert made.index.leading(other) is None
    assert until(lambda: bucket.waiting > 0, LIMIT)
    assert until(lambda: made.index.leading(other) == 0, LIMIT)
    assert bucket.waiting > 0
    # The server goes on meanwhile: it answers other lookups without the bucket.
    assert until(lambda: made.index.leading(KEYS[:3]) == 3, LIMIT)
    bucket.release()


def test_an_index_without_a_bucket_sends_no_lookup(
    engine: Callable[[StoreTerms], Engine],
) -> None:
    made = engine(StoreTerms(host=1 << 20, staging=1 << 20))
    assert made.index.leading(KEYS) == 0
    losses = made.index.losses
    assert made.index.losses == losses
