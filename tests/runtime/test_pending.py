# SPDX-License-Identifier: Apache-2.0
"""Work that is not ordered on a stream: a transfer waits for it, and what it touches stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from support.connector_cases import make_caches, make_chunk, rows
from support.guarded_memory import same
from support.small_backends import small_backend

from portakv import AdaptiveConnector, Transfer, register_backend
from portakv.registry import registry


class Later:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.waited = 0

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.waited += 1
        self.ended = True


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """A backend ``later`` whose launches return this, alone in a registry of its own."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    pending = Later()
    backend = small_backend("later", pending=pending)
    register_backend("later", backend)
    registry.choose("cpu", "later")  # its self-check waits as well
    backend.given.clear()  # it keeps views, which these tests are about
    backend.given = Forgetful()
    pending.ended, pending.waited = False, 0
    return pending


class Forgetful(list):  # type: ignore[type-arg]
    def append(self, given: object) -> None:
        """Keep nothing."""


def start() -> tuple[Transfer, torch.Tensor, list[Callable[[], object]]]:
    """A transfer, the chunk's expected content, and weak references to what it reads."""
    caches, chunk = make_caches(), make_chunk(3)
    wanted = rows(caches, [4, 1, 9])
    slots = torch.tensor([4, 1, 9])
    refs: list[Callable[[], object]] = [weakref.ref(x) for x in (*caches, slots, chunk)]
    connector = AdaptiveConnector("cpu", backend="later")
    transfer = connector.from_gpu(chunk, caches, slots)
    assert same(chunk, wanted)
    return transfer, wanted, refs


@pytest.mark.parametrize("how", ["synchronize", "wait", "done"])
def test_a_transfer_ends_when_its_work_does(later: Later, how: str) -> None:
    transfer, _, _ = start()
    assert not transfer.done()
    if how == "done":
        later.ended = True
    else:
        getattr(transfer, how)()
        assert later.waited == 1
    assert transfer.done()


def test_a_transfer_holds_views_and_ids_until_the_end(later: Later) -> None:
    transfer, _, refs = start()
    gc.collect()
    assert all(ref() is not None for ref in refs)
    transfer.synchronize()
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_memory_outlives_a_transfer_that_nobody_kept(later: Later) -> None:
    refs = start()[2]
    gc.collect()
    assert all(ref() is not None for ref in refs), "memory was freed below a copy in flight"


def test_a_batch_waits_for_all_of_its_work(later: Later) -> None:
    caches, chunks = make_caches(), [make_chunk(3), make_chunk(2)]
    connector = AdaptiveConnector("cpu", backend="later")
    transfer = connector.batched_from_gpu(chunks, caches, [4, 1, 9, 2, 3], [0, 3], [3, 5])
    assert not transfer.done()
    transfer.synchronize()
    assert later.waited == 2
    assert transfer.done()
