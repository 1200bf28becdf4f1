# SPDX-License-Identifier: Apache-2.0
"""A rank's client of a server of the same process: loads and saves, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ambient import STATES
from support.device_cases import delay
from support.pool_processes import Child
from support.store_server_host import HEADS, KEYS, SIZE, Host, caches, hosts, same
from support.waits import LIMIT, until

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    SlotError,
    StoreError,
    TransferTimeout,
)
from portakv.serving import Place, ServerIndex, StoreClient, StoreServer, StoreTerms
from portakv.serving.server.client import ServerTransfer
from portakv.serving.server.messages import MOST_KEYS
from portakv.storage import BlockForm, BlockStore, Disk, prefix_keys
from portakv.storage.memory import SHORT_COPY, Crossing
from portakv.tasks import Work


@pytest.fixture
def host() -> Iterator[Callable[..., Host]]:
    with hosts() as made:
        yield made


def test_blocks_come_back(host: Callable[..., Host]) -> None:
    """By the caller's thread, ordered as the handle of a store is."""
    view = caches()
    blocks = host(view).join(view).blocks[0]
    saved = blocks.save(view, range(10), KEYS[:10])
    assert saved.released is not None
    saved.released.wait()
    assert saved.released.done()
    saved.synchronize(LIMIT)
    assert saved.landed.all()
    assert not saved.cancel()
    target = caches()
    loaded = blocks.load(target, range(12), KEYS[:12], deadline=5.0)
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [True] * 10 + [False] * 2
    assert loaded.released is None
    loaded = blocks.load(target, range(10), KEYS[:10])
    assert loaded.done()  # a short copy has ended with the call
    loaded.wait()
    assert loaded.landed.all()
    assert same(target, view, 10)


def test_several_prompts_in_one_save(host: Callable[..., Host]) -> None:
    """The end of the one used least recently goes, as in a store of this process."""
    view = caches()
    made = host(view, rows=8)
    blocks = made.join(view).blocks[0]
    other = prefix_keys(range(1000, 1000 + 6 * SIZE), SIZE)
    keys = [*KEYS[:4], *other[:3]]
    saved = blocks.save(view, range(7), keys, after=[None, *KEYS[:3], None, *other[:2]])
    saved.synchronize(LIMIT)
    assert saved.landed.all()
    blocks.load(caches(), range(3), other[:3]).synchronize(LIMIT)
    blocks.save(view, range(7, 10), other[3:], after=other[2]).synchronize(LIMIT)
    loaded = blocks.load(caches(), range(10), [*KEYS[:4], *other])
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == [True, True, False, False] + [True] * 6
    with pytest.raises(InvalidTerms, match="for each of the 2 keys, got 1"):
        blocks.save(view, range(2), KEYS[:2], after=[None])


def test_a_large_load_is_copied_by_workers(host: Callable[..., Host]) -> None:
    view = caches(dim=4096)
    at = host(view)
    assert 10 * at.form.payload_bytes > SHORT_COPY
    blocks = at.join(view).blocks[0]
    blocks.save(view, range(10), KEYS[:10]).synchronize(LIMIT)
    target = caches(dim=4096)
    loaded = blocks.load(target, range(10), KEYS[:10])
    loaded.wait()
    assert loaded.done()
    assert loaded.landed.all()
    assert same(target, view, 10)


@pytest.mark.parametrize("dim", [8, 4096])
def test_a_load_by_layer_has_an_end_for_each_layer(host: Callable[..., Host], dim: int) -> None:
    """With and without blocks that are missing; by the caller's thread, or by workers."""
    view = caches(dim=dim)
    blocks = host(view).join(view).blocks[0]
    blocks.save(view, range(10), KEYS[:10]).synchronize(LIMIT)
    for many in (10, 12):
        target = caches(dim=dim)
        loaded = blocks.load(target, range(many), KEYS[:many], by_layer=True)
        assert len(loaded.layers) == 2
        for layer in loaded.layers:
            layer.wait()
        loaded.wait()
        assert loaded.landed.tolist() == [True] * 10 + [False] * (many - 10)
        assert same(target, view, 10)
    assert blocks.load(view, [0], KEYS[:1]).layers == []


def test_an_index_tells_what_was_stored_and_lost(host: Callable[..., Host]) -> None:
    """As a local index does, for an engine that publishes events."""
    view = caches()
    at = host(view, 8)
    blocks = at.join(view).blocks[0]
    with ServerIndex(at.store_server.place, at.engine) as index:
        assert index.wait(LIMIT)
        assert index.take_events() == []
        index.record()
        losses = index.losses
        blocks.save(view, range(6), KEYS[:6]).synchronize(LIMIT)
        assert until(lambda: index.leading(KEYS) == 6, LIMIT)
        assert index.losses == losses
        events = index.take_events()
        assert {event.key for event in events} == {*KEYS[:6]}
        assert {(event.tier, event.stored) for event in events} == {("host", True)}
        blocks.save(view, range(6), KEYS[8:14]).synchronize(LIMIT)  # evicts some
        assert until(lambda: index.losses > losses, LIMIT)
        lost = [event for event in index.take_events() if not event.stored]
        assert {event.why for event in lost} == {"evicted"}
        assert index.bytes_of({"landed_blocks": 2, "stored_blocks": 3}) == {
            "landed_bytes": 2 * at.form.payload_bytes,
            "stored_bytes": 3 * at.form.payload_bytes,
        }
        assert index.bytes_of({})["landed_bytes"] == 0
    names = at.store_server.figures()
    assert "host_form_bytes" in names
    at.store_server.close()
    assert at.store_server.figures() == {}


def test_requests_of_many_keys_are_cut(host: Callable[..., Host]) -> None:
    many = 2 * MOST_KEYS + 10
    view = caches(many, 1, 1)
    at = host(view, 2 * many)
    blocks = at.join(view, (0, 1), of=1).blocks[0]
    keys = prefix_keys(range(many * SIZE), SIZE)
    saved = blocks.save(view, range(many), keys)
    saved.synchronize(LIMIT)
    assert saved.landed.all()
    target = caches(many, 1, 1)
    loaded = blocks.load(target, range(many), keys)
    loaded.synchronize(LIMIT)
    assert loaded.landed.all()
    assert same(target, view, many)
    with ServerIndex(at.store_server.place, at.engine) as index:
        assert index.wait(LIMIT)
        assert index.leading(keys) == many


def test_parts_of_a_folder_of_ranks_are_read(host: Callable[..., Host], tmp_path: Path) -> None:
    """A store of each rank has written the folder, in parts; ranks of any split read it."""
    view = caches()
    for first in (0, 2):
        part = view.slice(heads=slice(first, first + 2))
        form = BlockForm.of(part, "model", heads=(first, first + 2, HEADS))
        tier = Disk(tmp_path / "store", capacity=32 << 20)
        with BlockStore(form, staging=1 << 20, tiers=[tier]) as store:
            store.save(part, range(6), KEYS[:6]).synchronize(LIMIT)
    at = host(view, folder=str(tmp_path / "store"), capacity=32 << 20)
    for heads in ((0, 4), (0, 2), (2, 4), (3, 4)):
        target = caches(heads=heads[1] - heads[0])
        loaded = at.join(target, heads).blocks[0].load(target, range(8), KEYS[:8])
        loaded.synchronize(LIMIT)
        assert loaded.landed.tolist() == [True] * 6 + [False] * 2
        assert same(target, view, 6, slice(*heads))


def test_a_folder_of_one_rank_is_that_of_a_store_server(
    host: Callable[..., Host], tmp_path: Path
) -> None:
    """What an engine of one rank has stored is stored in whole blocks: the index has it."""
    view = caches()
    folder = tmp_path / "store"
    tier = Disk(folder, capacity=32 << 20)
    with BlockStore(BlockForm.of(view, "model"), staging=1 << 20, tiers=[tier]) as store:
        store.save(view, range(6), KEYS[:6]).synchronize(LIMIT)
    forms = [path.name for path in folder.iterdir() if path.is_dir()]
    at = host(view, folder=str(folder), capacity=32 << 20)
    target = caches(heads=2)
    at.join(target, (2, 4))
    with ServerIndex(at.store_server.place, at.engine) as index:
        assert index.wait(LIMIT)
        assert index.leading(KEYS) == 6
    assert [path.name for path in folder.iterdir() if path.is_dir()] == forms


def test_a_save_without_rows_is_dropped(host: Callable[..., Host]) -> None:
    view = caches()
    at = host(view, 4, staging=2 * BlockForm.of(view, "model").image_bytes)
    blocks = at.join(view).blocks[0]
    saved = blocks.save(view, range(10), KEYS[:10])
    saved.synchronize(LIMIT)
    assert 1 <= saved.landed.sum() <= 4
    target = caches()
    loaded = blocks.load(target, range(10), KEYS[:10])
    loaded.synchronize(LIMIT)
    assert loaded.landed.tolist() == saved.landed.tolist()


def test_wrong_arguments_are_refused(host: Callable[..., Host], tmp_path: Path) -> None:
    view = caches()
    at = host(view)
    blocks = at.join(view).blocks[0]
    with pytest.raises(InvalidTerms, match="differ"):
        blocks.load(view, [0, 1], [KEYS[0]] * 2)
    with pytest.raises(InvalidTerms, match="blocks to be 2 ids"):
        blocks.save(view, [0], KEYS[:2])
    with pytest.raises(SlotError):
        blocks.load(view, [99], KEYS[:1])
    with pytest.raises(InvalidTerms, match="missing"):
        blocks.load(view, [0], KEYS[:1], missing="raise")  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="deadline"):
        blocks.load(view, [0], KEYS[:1], deadline=-1.0)
    with pytest.raises(InvalidTerms, match="priority"):
        blocks.save(view, [0], KEYS[:1], priority="soon")  # type: ignore[arg-type]
    with pytest.raises(LayoutError):
        blocks.save(caches(heads=2), [0], KEYS[:1])
    with pytest.raises(InvalidTerms, match="forms"):
        StoreClient(Place.of_folder(tmp_path), [view])  # type: ignore[list-item]
    with pytest.raises(InvalidTerms, match="place"):
        StoreClient(tmp_path, [at.form])  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="terms"):
        StoreServer(None)  # type: ignore[arg-type]
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidTerms, match="others may write"):
        StoreTerms(folder=str(tmp_path))


def test_a_host_that_is_too_small_is_refused_in_one_sentence(host: Callable[..., Host]) -> None:
    view = caches(dim=128)  # a block takes more than the least host that terms may have
    at = host(view, host=2 * 4096, staging=1 << 20)
    with StoreClient(at.store_server.place, [at.form], at.engine) as client:
        with pytest.raises(InvalidTerms, match="Expected host to have room for a block of"):
            client.wait(LIMIT)
        loaded = client.blocks[0].load(view, [0], KEYS[:1])
        assert loaded.done()
        assert not loaded.landed.any()


def test_another_number_of_groups_is_refused(host: Callable[..., Host]) -> None:
    view = caches()
    at = host(view)
    at.join(view)
    with ServerIndex(at.store_server.place, at.engine, groups=2) as index:
        with pytest.raises(InvalidTerms, match="the index of 1 groups"):
            index.wait(LIMIT)
        assert index.leading(KEYS) == 0


@pytest.mark.parametrize("name", [*STATES])
def test_ambient_settings_change_nothing(name: str, host: Callable[..., Host]) -> None:
    view = caches()
    target = caches()
    with STATES[name](torch.device("cpu")):
        blocks = host(view).join(view).blocks[0]
        saved = blocks.save(view, range(10), KEYS[:10])
        saved.synchronize(LIMIT)
        assert saved.landed.all()
        loaded = blocks.load(target, range(10), KEYS[:10])
        loaded.synchronize(LIMIT)
        assert loaded.landed.all()
    assert same(target, view, 10)
    again = blocks.save(view, [10], [KEYS[10]])  # outside of the setting
    again.synchronize(LIMIT)
    assert again.landed.all()


def test_a_forked_process_is_no_client(host: Callable[..., Host]) -> None:
    view = caches()
    at = host(view)
    client = at.join(view)
    with ServerIndex(at.store_server.place, at.engine) as index:
        assert index.wait(LIMIT)
        client.blocks[0].save(view, range(10), KEYS[:10]).synchronize(LIMIT)
        assert until(lambda: index.leading(KEYS) == 10, LIMIT)

        def work(pipe: Connection) -> None:
            refused = ""
            try:
                client.blocks[0].load(view, [0], KEYS[:1])
            except StoreError as error:
                refused = str(error)
            leading = index.leading(KEYS)
            client.close()
            index.close()
            at.store_server.close()
            pipe.send((refused, leading))

        child = Child(work)
        refused, leading = child.receive()
        assert "was forked from" in refused
        assert leading == 0
        child.end()
    assert client.blocks[0].load(view, [0], KEYS[:1]).landed.all()


# --- how a transfer ends


class Held:
    """Copies of clients that wait until they may begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.waiting = threading.Event()
        real = ServerTransfer.copy

        async def copy(transfer: ServerTransfer, *terms: Any) -> None:
            self.waiting.set()
            assert await Work(self.go.wait, LIMIT)
            await real(transfer, *terms)

        monkeypatch.setattr(ServerTransfer, "copy", copy)


def test_a_cancelled_save_reads_no_block(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = caches()
    at = host(view)
    blocks = at.join(view).blocks[0]
    held = Held(monkeypatch)
    saved = blocks.save(view, range(10), KEYS[:10])
    assert held.waiting.wait(LIMIT)
    assert not saved.done()
    assert saved.released is not None
    assert not saved.released.done()
    with pytest.raises(TransferTimeout, match="timed out"):
        saved.synchronize(0.01)
    assert saved.cancel()
    saved.released.wait()  # the copies have not begun
    assert saved.done()
    assert not saved.landed.any()
    held.go.set()
    assert until(lambda: at.store_server.statistics()["requests"] == 0, LIMIT)
    assert until(lambda: at.store_server.statistics()["leases"] == 0, LIMIT)
    again = blocks.save(view, range(10), KEYS[:10])
    again.synchronize(LIMIT)
    assert again.landed.all()


def test_a_late_load_ends(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    view = caches(dim=4096)
    at = host(view)
    blocks = at.join(view).blocks[0]
    blocks.save(view, range(10), KEYS[:10]).synchronize(LIMIT)
    held = Held(monkeypatch)
    target = caches(dim=4096)
    before = [each.clone() for each in target.tensors]
    loaded = blocks.load(target, range(10), KEYS[:10], deadline=0.01)
    assert held.waiting.wait(LIMIT)
    loaded.synchronize(LIMIT)
    assert not loaded.landed.any()
    held.go.set()
    assert until(lambda: at.store_server.statistics()["leases"] == 0, LIMIT)
    assert all(torch.equal(a, b) for a, b in zip(target.tensors, before, strict=True))


def test_a_closed_client_moves_nothing(host: Callable[..., Host]) -> None:
    view = caches()
    at = host(view)
    client = at.join(view)
    blocks = client.blocks[0]
    blocks.save(view, range(10), KEYS[:10]).synchronize(LIMIT)
    client.close()
    assert until(lambda: at.store_server.statistics()["sessions"] == 0, LIMIT)
    for ended in (blocks.load(view, [0], KEYS[:1]), blocks.save(view, [0], KEYS[:1])):
        assert ended.done()
        assert not ended.landed.any()
        ended.wait()
        assert not ended.cancel()
    client.close()


def test_a_store_server_that_is_closed_twice_serves_nobody(host: Callable[..., Host]) -> None:
    view = caches()
    at = host(view)
    at.store_server.close()
    at.store_server.close()
    assert not at.store_server.serves
    assert at.store_server.statistics() == {}


def test_an_error_of_a_copy_is_a_miss(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise StoreError("the device is gone")

    view = caches()
    at = host(view)
    blocks = at.join(view).blocks[0]
    monkeypatch.setattr(Crossing, "copy", fail)
    saved = blocks.save(view, range(4), KEYS[:4])
    saved.synchronize(LIMIT)
    assert not saved.landed.any()
    monkeypatch.undo()
    saved = blocks.save(view, range(4), KEYS[:4])
    saved.synchronize(LIMIT)
    assert saved.landed.all()


# --- on a device


def load_on_a_busy_stream(
    device: torch.device, host: Callable[..., Host], by_layer: bool = False
) -> bool:
    """Load on a stream that is busy, and return whether the stream alone waits for the rows.

    They come after the work of the stream at the call, and before its later work.
    """
    view = caches(device=device)
    at = host(view)
    blocks = at.join(view, device=device).blocks[0]
    saved = blocks.save(view, range(10), KEYS[:10])
    saved.synchronize(LIMIT)
    assert saved.landed.all()
    target = caches(device=device)
    # Builds what the copy needs, for which the call would wait.
    blocks.load(target, range(10), KEYS[:10], by_layer=by_layer).synchronize(LIMIT)
    for tensor in target.tensors:
        tensor.zero_()
    torch.accelerator.synchronize(device)
    stream = torch.Stream(device)
    with stream:
        delay(stream)
        for tensor in target.tensors:
            tensor.fill_(7)
        loaded = blocks.load(target, range(10), KEYS[:10], by_layer=by_layer)
        assert not loaded.done()
        for layer in loaded.layers:
            layer.wait()
        loaded.wait()
        ordered = not loaded.done()
        assert loaded.landed.all()  # as the stream sees it
        copies = [tensor.clone() for tensor in target.tensors]
    loaded.synchronize(LIMIT)
    assert loaded.landed.all()
    assert same(target, view, 10)
    torch.accelerator.synchronize(device)
    pairs = zip(copies, view.tensors, strict=True)
    assert all(torch.equal(a[:10].cpu(), b[:10].cpu()) for a, b in pairs)
    assert until(lambda: at.store_server.statistics()["leases"] == 0, LIMIT)
    return ordered


def test_a_load_on_a_device_follows_the_callers_stream(
    accelerator: torch.device, host: Callable[..., Host]
) -> None:
    ordered = load_on_a_busy_stream(accelerator, host)
    assert ordered == (accelerator.type == "cuda")  # no other driver registers the rows


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_load_from_pinned_rows_is_issued_on_the_callers_stream(
    accelerator: torch.device,
    host: Callable[..., Host],
    monkeypatch: pytest.MonkeyPatch,
    by_layer: bool,
) -> None:
    def made(forms: Any, **terms: Any) -> BlockStore:
        return BlockStore(forms, **{**terms, "shared": False, "pin": True})

    monkeypatch.setattr("portakv.serving.server.server.BlockStore", made)
    monkeypatch.setattr("portakv.serving.server.server.share", lambda _: b"here")
    assert load_on_a_busy_stream(accelerator, host, by_layer)


def test_a_save_on_a_device_follows_the_callers_stream(
    accelerator: torch.device, host: Callable[..., Host]
) -> None:
    view = caches(device=accelerator)
    at = host(view)
    blocks = at.join(view, device=accelerator).blocks[0]
    blocks.save(view, [12], [KEYS[12]]).synchronize(LIMIT)  # builds what the copy needs
    expected = caches()
    stream = torch.Stream(accelerator)
    with stream:
        delay(stream)
        for tensor, right in zip(view.tensors, expected.tensors, strict=True):
            tensor.copy_(right)
        saved = blocks.save(view, range(10), KEYS[:10])
        assert not saved.done()
    saved.synchronize(LIMIT)
    assert saved.landed.all()
    target = caches(device=accelerator)
    blocks.load(target, range(10), KEYS[:10]).synchronize(LIMIT)
    assert same(target, expected, 10)


def test_what_begins_as_its_session_ends_copies_nothing(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client may join again at once, and the server then takes the rows of the session back.

    The session ends after a save or a load has found it, and the server does not know that yet.
    """
    view = caches()
    client = host(view).join(view)
    blocks = client.blocks[0]
    blocks.save(view, range(4), KEYS[:4]).synchronize(LIMIT)
    link = client.link
    begin = StoreClient.begin
    start_copy = ServerTransfer.start_copy
    copies = list[ServerTransfer]()

    def late(client: StoreClient, *args: Any) -> Any:
        assert link.session is not None
        link.lose(link.session, "of this test")
        return begin(client, *args)

    def start(transfer: ServerTransfer, issues: int = 0) -> bool:
        begun = start_copy(transfer, issues)
        copies.extend([transfer] * begun)
        return begun

    def moved(save: bool) -> ServerTransfer:
        with monkeypatch.context() as patch:
            patch.setattr(Place, "address", lambda _: "")  # the server retains the session
            patch.setattr(StoreClient, "begin", late)
            patch.setattr(ServerTransfer, "start_copy", start)
            if not save:
                transfer = blocks.load(caches(), range(4), KEYS[:4])
                transfer.wait()
                return transfer
            transfer = blocks.save(view, range(8), KEYS[8:])
            assert transfer.released is not None
            transfer.released.wait()
            return transfer

    for save in (True, False):
        moved(save)
        assert not copies
        assert client.wait(LIMIT)
