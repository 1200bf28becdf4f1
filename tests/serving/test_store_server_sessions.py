# SPDX-License-Identifier: Apache-2.0
"""Sessions of a rank's client: how one ends, and the next one begins."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.store_server_host import KEYS, Host, caches, hosts, same
from support.waits import LIMIT, until

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    PeerError,
    PortaKVError,
)
from portakv.serving import Place, ServerIndex, StoreClient
from portakv.serving.server import link as store_server_link
from portakv.serving.server.client import MappedRows, ServerTransfer
from portakv.storage import BlockForm, BlockStore


@pytest.fixture
def host() -> Iterator[Callable[..., Host]]:
    with hosts() as made:
        yield made


def test_a_client_joins_only_after_its_session_has_ended_here(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of the session before begins once the server may take its rows back."""
    view = caches()
    client = host(view).join(view)
    link = client.link
    address = Place.address
    joins = threading.Event()
    early = list[bool]()

    def asked(place: Place) -> str:
        joins.set()
        return address(place)

    def slow(client: StoreClient) -> None:
        link.wake()
        early.append(joins.wait(0.5))  # without the rule it comes at once

    assert link.session is not None
    with monkeypatch.context() as patch:
        patch.setattr(Place, "address", asked)
        patch.setattr(StoreClient, "close_all", slow)
        link.lose(link.session, "of this test")
    assert early == [False]
    assert client.wait(LIMIT)


@pytest.mark.parametrize(
    "error",
    [PeerError("The process ended."), LayoutError("Another layout.")],
    ids=["gone", "wrong"],
)
def test_a_store_server_that_ends_as_it_answers_is_no_refusal(
    error: PortaKVError, host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was killed between its answer and the mapping of its rows has a successor."""
    view = caches()
    client = host(view).join(view)
    link = client.link
    tries = list[bool]()

    def mapped(*args: Any) -> MappedRows:
        tries.append(True)
        if len(tries) < 3:
            raise error
        return MappedRows(*args)

    monkeypatch.setattr("portakv.serving.server.client.MappedRows", mapped)
    assert link.session is not None
    link.lose(link.session, "of this test")
    if isinstance(error, PeerError):
        assert client.wait(LIMIT)
        assert len(tries) == 3
    else:
        with pytest.raises(InvalidTerms, match="Another layout"):
            client.wait(LIMIT)


def test_a_connection_retains_no_store_that_was_replaced(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index stays while ranks of other blocks follow those of before."""
    stores = list[weakref.ref[BlockStore]]()

    def made(*args: Any, **terms: Any) -> BlockStore:
        store = BlockStore(*args, **terms)
        stores.append(weakref.ref(store))
        return store

    monkeypatch.setattr("portakv.serving.server.server.BlockStore", made)
    view = caches()
    at = host(view)
    index = at.stack.enter_context(ServerIndex(at.store_server.place, at.engine))
    client = at.join(view)
    assert index.wait(LIMIT)
    client.close()
    at.join(caches(dim=16))
    assert index.wait(LIMIT)
    assert until(lambda: gc.collect() >= 0 and stores[0]() is None, LIMIT)
    assert stores[1]() is not None


def test_a_connection_retains_no_rows_of_a_session_before(host: Callable[..., Host]) -> None:
    view = caches()
    client = host(view).join(view)
    link = client.link
    assert link.session is not None
    rows = weakref.ref(link.session.data)
    link.lose(link.session, "of this test")
    assert client.wait(LIMIT)
    assert until(lambda: gc.collect() >= 0 and rows() is None, LIMIT)


def test_an_interrupted_load_keeps_no_rows(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its client can join again: it counts no copy that never ends."""
    view = caches()
    at = host(view)
    client = at.join(view)
    blocks = client.blocks[0]
    blocks.save(view, range(8), KEYS[:8]).synchronize(LIMIT)
    start_copy = ServerTransfer.start_copy

    def start(transfer: ServerTransfer, issued: bool = False) -> bool:
        begun = start_copy(transfer, issued)
        signal.raise_signal(signal.SIGINT)
        return begun

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(ServerTransfer, "start_copy", start)
        with pytest.raises(KeyboardInterrupt):
            blocks.load(caches(), range(8), KEYS[:8])
    finally:
        signal.signal(signal.SIGINT, before)
        monkeypatch.undo()
    assert until(lambda: at.store_server.statistics()["leases"] == 0, LIMIT)
    assert client.wait(LIMIT)
    target = caches()
    loaded = blocks.load(target, range(8), KEYS[:8])
    loaded.synchronize(LIMIT)
    assert loaded.landed.all()
    assert same(target, view, 8)


@pytest.mark.parametrize("first", ["index", "rank"])
def test_an_index_of_ranks_that_are_refused_waits_no_longer(
    first: str, host: Callable[..., Host]
) -> None:
    """It has the sentence of its ranks. Both join once the ranks that disagree have left."""
    at = host(caches())
    serving = at.join(caches())
    other = BlockForm.of(caches(dim=16), "model")
    place = at.store_server.place
    with ExitStack() as stack:
        if first == "index":
            index = stack.enter_context(ServerIndex(place, "other"))
        client = stack.enter_context(StoreClient(place, [other], "other"))
        with pytest.raises(InvalidTerms) as refused:
            client.wait(LIMIT)
        if first == "rank":
            index = stack.enter_context(ServerIndex(place, "other"))
        with pytest.raises(InvalidTerms) as known:
            index.wait(LIMIT)
        assert str(known.value) == str(refused.value)
        assert "Expected blocks with widths=(8, 8)" in str(refused.value)
        serving.close()
        assert until(lambda: joined(client) and joined(index), LIMIT)


def test_an_index_of_ranks_that_agree_waits_for_one(host: Callable[..., Host]) -> None:
    """Control: another rank of the engine, or a rank of another engine, was refused."""
    at = host(caches())
    at.join(caches())
    place = at.store_server.place
    wrong = BlockForm.of(caches(dim=16), "model")
    with ExitStack() as stack:
        for engine in (at.engine, "other"):
            client = stack.enter_context(StoreClient(place, [wrong], engine))
            with pytest.raises(InvalidTerms):
                client.wait(LIMIT)
        with ServerIndex(place, at.engine) as index:
            assert index.wait(LIMIT)
        with ServerIndex(place, "third") as index:
            assert not index.wait(0.5)  # its ranks may join later
            with StoreClient(place, [at.form], "third") as client:
                assert client.wait(LIMIT)
                assert index.wait(LIMIT)


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "no store server"])
def test_a_process_without_a_store_server_logs_one_line(
    refused: bool,
    host: Callable[..., Host],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refused process tries again, and is refused again, for as long as others are served."""
    monkeypatch.setattr(store_server_link, "REFUSED", 0.01)
    monkeypatch.setattr(store_server_link, "ABSENT", 0.01)
    (tmp_path / "disk").mkdir(mode=0o700)
    # The line names a folder, which clients of other tests may have if it is that of all engines.
    at = host(caches(), folder=f"{tmp_path}/disk", capacity=1 << 26)
    at.join(caches())
    place = at.store_server.place if refused else Place.of_folder(tmp_path)
    tries = list[str]()
    address = Place.address

    def counted(place: Place) -> str:
        tries.append(place.name)
        return address(place)

    monkeypatch.setattr(Place, "address", counted)
    caplog.clear()
    with StoreClient(place, [BlockForm.of(caches(dim=16), "model")], "other"):
        if refused:  # on a busy machine the server may answer later than others try
            assert until(lambda: any(place.name in each for each in caplog.messages), LIMIT)
        monkeypatch.setattr(store_server_link, "LONELY", 0.0)
        past = tries.count(place.name) + 20
        assert until(lambda: tries.count(place.name) > past, LIMIT)
    lines = [each for each in caplog.messages if place.name in each]
    assert ["Expected blocks" in line for line in lines] == [refused], lines


def test_a_refusal_ends_with_its_store_server(
    host: Callable[..., Host],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process waits for another one, and the log says that there is none."""
    at = host(caches())
    serving = at.join(caches())
    place = at.store_server.place
    with StoreClient(place, [BlockForm.of(caches(dim=16), "model")], "other") as client:
        with pytest.raises(InvalidTerms):
            client.wait(LIMIT)
        monkeypatch.setattr(store_server_link, "LONELY", 0.0)
        serving.close()
        at.store_server.close()
        assert until(
            lambda: any("No store server serves" in each for each in caplog.messages), LIMIT
        )
        assert not client.wait(0)


def joined(side: StoreClient | ServerIndex) -> bool:
    """Return whether a server serves a process, which it may have refused before."""
    try:
        return side.wait(0)
    except InvalidTerms:
        return False
