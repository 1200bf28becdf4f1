# SPDX-License-Identifier: Apache-2.0
"""Each handle of the library has the same members, and may be awaited in any event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from support.migrate_pulls import Couple, sides
from support.slot_cases import ended_well, forked
from support.store_server_host import KEYS, caches, hosts
from support.waits import LIMIT, until
from support.weight_cases import shared

from portakv import BlockTransfer, CopyOptions, Transfer, copy_blocks
from portakv.errors import TransferCancelled, TransferError
from portakv.migrate import Channel, Pull, pull_weights
from portakv.migrate.pull import LayerTransfer
from portakv.runtime.transfer import Completion, PendingCalls, Statistics
from portakv.serving import ServerTransfer
from portakv.storage import BlockForm, BlockStore, Disk
from portakv.storage.work import End, Graph, Handle
from portakv.weights import WeightsPull, publish

MEMBERS = (
    *("done", "wait", "synchronize", "cancel", "layers", "landed", "released", "statistics"),
    "__await__",
)
#: Makes the handles of an operation.
Make = Callable[[ExitStack], list[Transfer]]


def copies(stack: ExitStack) -> list[Transfer]:
    whole = caches()
    ids = range(4)
    options = CopyOptions(cancellable=True)
    handles = [
        copy_blocks(whole, caches(), ids, ids),
        copy_blocks(whole, caches(), ids, ids, options=options),
    ]
    return [*handles, Transfer.join(handles)]


def pulls(stack: ExitStack, **terms: Any) -> list[Transfer]:
    both = Couple(stack.enter_context(sides()), **terms)
    pull = both.pull(both.offer(), by_layer=True)
    return [pull, *pull.layers]


def staged_pulls(stack: ExitStack) -> list[Transfer]:
    return pulls(stack, method="staging")


def weights(stack: ExitStack) -> list[Transfer]:
    whole = np.arange(60, dtype=np.int32).reshape(12, 5)
    owner, reader = (stack.enter_context(closing(Channel(timeout=LIMIT))) for _ in range(2))
    published = publish(owner, {"w": shared(whole)})
    stack.enter_context(closing(published))
    into = torch.zeros(12, 5, dtype=torch.int32)
    return [pull_weights(reader, published.ticket, {"w": into}, wait=False)]


def stores(stack: ExitStack) -> list[Transfer]:
    whole = caches()
    form = BlockForm.of(whole, "model")
    folder = stack.enter_context(TemporaryDirectory())
    size = 16 * form.image_bytes
    tiers = [Disk(folder, capacity=1 << 24)]
    store = stack.enter_context(BlockStore(form, staging=size, tiers=tiers))
    save = store.save(whole, range(4), KEYS[:4])
    assert save.released is not None
    save.synchronize(LIMIT)
    load = store.load(caches(), range(4), KEYS[:4], by_layer=True)
    return [save, save.released, load, *load.layers]


def servers(stack: ExitStack) -> list[Transfer]:
    whole = caches()
    blocks = stack.enter_context(hosts())(whole).join(whole).blocks[0]
    save = blocks.save(whole, range(4), KEYS[:4])
    assert save.released is not None
    save.synchronize(LIMIT)
    return [save, save.released, blocks.load(caches(), range(4), KEYS[:4])]


#: The kinds of handles that each operation has.
OPERATIONS: dict[Make, set[type[Transfer]]] = {
    copies: {BlockTransfer, Transfer},
    pulls: {Pull, LayerTransfer},
    staged_pulls: {Pull, LayerTransfer},
    weights: {WeightsPull},
    stores: {Handle, Transfer},
    servers: {ServerTransfer, Transfer},
}


async def result_of(handle: Any) -> Any:
    return await handle


@pytest.mark.parametrize("policy", ["asyncio", "uvloop"])
@pytest.mark.parametrize("make", OPERATIONS)
def test_each_handle_is_awaited_and_has_all_members(make: Make, policy: str) -> None:
    new = pytest.importorskip(policy).new_event_loop

    async def all_ended(handles: list[Transfer]) -> None:
        together = asyncio.gather(*[result_of(handle) for handle in handles])
        assert await asyncio.wait_for(together, LIMIT) == [None] * len(handles)

    with ExitStack() as stack:
        handles = make(stack)
        assert {type(handle) for handle in handles} == OPERATIONS[make]
        with closing(new()) as loop:
            loop.run_until_complete(all_ended(handles))
        for handle in handles:
            judge(handle)


def judge(handle: Transfer) -> None:
    """Judge the members of a handle that has ended well."""
    assert not [name for name in MEMBERS if not hasattr(type(handle), name)]
    assert handle.done()
    handle.wait()
    handle.synchronize(LIMIT)
    assert not handle.cancel()
    figures = handle.statistics
    assert isinstance(figures, Statistics)
    assert figures.blocks == figures.blocks_requested == len(handle.landed)
    assert handle.landed.all()
    assert bool(figures.nbytes) == (figures.seconds is not None)
    assert figures.strategy
    assert not figures.cancelled
    released = handle.released
    assert released is None or released.done()
    assert all(isinstance(layer, Transfer) for layer in _layers_of(handle))


def _layers_of(handle: Transfer) -> Any:
    try:
        return handle.layers
    except TransferError:  # a copy that was not requested by layer
        return ()


# --- what has not ended

Gate = tuple[Any, Callable[[Any], object]]


@contextmanager
def polled() -> Iterator[Gate]:
    """Yield a transfer whose end no one reports, and what ends it, perhaps with an error."""
    ended = threading.Event()
    end = Completion(pendings=[PendingCalls(ended.is_set, ended.wait)])

    def settle(error: Any) -> None:
        end.error = error
        ended.set()

    yield Transfer([end]), settle


@contextmanager
def reported() -> Iterator[Gate]:
    """Yield a layer of a pull, which ends with work that reports it."""
    layer = LayerTransfer()
    yield layer, layer.fail


@contextmanager
def of_graph() -> Iterator[Gate]:
    """Yield a handle of a graph."""
    graph = Graph()
    end = End(graph.runtime, 3)

    def settle(error: Any) -> None:
        landed = np.full(3, error is None)
        graph.runtime.change(lambda: end.finish(landed, error=error))

    yield Handle(end), settle
    assert graph.close(LIMIT)


GATES = [polled, reported, of_graph]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_a_loop_goes_on_while_it_awaits_a_handle_and_gets_its_error(
    gate: Callable[[], Any], fails: bool
) -> None:
    """A thread ends the transfer after the loop has done other work meanwhile."""
    error = TransferError("The disk has gone.") if fails else None
    with gate() as (transfer, settle):

        async def engine() -> None:
            awaiting = asyncio.ensure_future(result_of(transfer))
            for _ in range(3):
                await asyncio.sleep(2e-3)
                assert not awaiting.done()
            thread = threading.Timer(0.0, settle, [error])
            thread.start()
            await asyncio.wait_for(awaiting, LIMIT)

        if not fails:
            asyncio.run(engine())
            return
        with pytest.raises(TransferError, match="The disk has gone"):
            asyncio.run(engine())
        with pytest.raises(TransferError, match="The disk has gone"):
            transfer.synchronize()


@pytest.mark.parametrize("gate", GATES)
def test_a_loop_that_gives_up_leaves_nothing_and_the_transfer_goes_on(
    gate: Callable[[], Any],
) -> None:
    with gate() as (transfer, settle):
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                asyncio.run(asyncio.wait_for(result_of(transfer), 1e-3))
        assert not transfer.done()
        for completion in transfer.completions:
            for pending in completion.pendings:
                assert not getattr(pending, "_calls", ())
        settle(None)
        transfer.synchronize(LIMIT)


@pytest.mark.parametrize("gate", [reported, of_graph])
def test_a_forked_process_awaits_nothing_of_its_parent(gate: Callable[[], Any]) -> None:
    with gate() as (transfer, settle):

        def learn() -> None:
            with pytest.raises(TransferError, match="forked from"):
                asyncio.run(asyncio.wait_for(result_of(transfer), LIMIT))

        assert ended_well(forked(learn))
        settle(None)
        asyncio.run(result_of(transfer))


def test_a_captured_copy_is_not_awaited() -> None:
    end = Completion()
    end.standing = True
    with pytest.raises(TransferError, match=r"await, got a captured one"):
        asyncio.run(result_of(Transfer([end])))


def test_a_copy_that_was_cancelled_has_landed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portakv.copy.submit.SLICE", 1 << 14)
    whole = caches(64)
    into = caches(64)
    options = CopyOptions(cancellable=True, max_gbps=1e-6)
    copy = copy_blocks(whole, into, range(64), range(64), options=options)
    assert until(lambda: copy.statistics.blocks, LIMIT)
    assert copy.cancel()
    with pytest.raises(TransferCancelled):
        asyncio.run(result_of(copy))
    landed = copy.landed
    assert landed.any()
    assert not landed.all()
    assert landed.sum() == copy.statistics.blocks
    for mine, other in zip(whole.tensors, into.tensors, strict=True):
        assert torch.equal(mine[landed], other[landed])
