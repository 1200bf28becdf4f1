# SPDX-License-Identifier: Apache-2.0
"""Groups of torch.distributed over a channel: apart from the default one, several together."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import torch
from support.migrate_channels import SECRET
from torch._C._distributed_c10d import PrefixStore

from portakv.errors import InvalidTerms, PeerError, TransferTimeout, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.transports import distributed
from portakv.migrate.transports.distributed import ChannelStore, pair, rendezvous, unique_id


@pytest.fixture(params=[None, "tcp://127.0.0.1:0"], ids=["unix", "tcp"])
def stores(request: pytest.FixtureRequest) -> Iterator[tuple[ChannelStore, ChannelStore]]:
    secret = SECRET if request.param else None
    one = Channel(request.param, secret=secret)
    other = Channel(secret=secret)
    try:
        yield rendezvous(one), rendezvous(other, one.address)
    finally:
        other.close()
        one.close()


def test_keys_are_the_same_on_both_sides(stores: tuple[ChannelStore, ChannelStore]) -> None:
    here, there = stores
    there.set("a", b"\0\xff")
    here.set("b", "text")
    assert (here.get("a"), there.get("b")) == (b"\0\xff", b"text")
    assert (here.add("n", 3), there.add("n", -1), there.get("n")) == (3, 2, b"2")
    assert there.check(["a", "b"])
    assert not there.check(["a", "c"])
    there.wait(["a", "n"], timedelta(seconds=1))
    assert there.delete_key("a")
    assert not here.delete_key("a")
    assert not here.check(["a"])
    assert here.num_keys() == 2
    assert PrefixStore("p", there).add("n", 1) == 1
    assert here.get("p/n") == b"1"


def test_a_get_waits_until_the_key_is_set(stores: tuple[ChannelStore, ChannelStore]) -> None:
    here, there = stores
    threading.Timer(0.1, here.set, ("late", b"x")).start()
    assert there.get("late") == b"x"


def test_a_wait_ends(stores: tuple[ChannelStore, ChannelStore]) -> None:
    for store in stores:
        for setting in (store, PrefixStore("p", store)):  # torch sets it through those
            setting.set_timeout(timedelta(seconds=0.05))
            with pytest.raises(TransferTimeout, match=r"No rank set never in 0\.05 s"):
                store.get("never")
            store.set_timeout(timedelta(seconds=300))
        with pytest.raises(TransferTimeout):
            store.wait(["never"], timedelta(seconds=0.01))


def test_a_store_keeps_so_many_keys(
    stores: tuple[ChannelStore, ChannelStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "KEYS", 2)
    here, there = stores
    there.set("a", b"")
    there.set("b", b"")
    there.set("b", b"1")
    for store in (here, there):
        with pytest.raises(PeerError, match="at most 2 keys"):
            store.set("c", b"")
    with pytest.raises(PeerError, match="message is not known"):
        there.set("a", bytes(20 << 10))


def test_a_channel_keeps_one_rendezvous(stores: tuple[ChannelStore, ChannelStore]) -> None:
    """Otherwise a request for the first group's keys would get those of the second."""
    here, there = stores
    here.set("a", b"1")
    with pytest.raises(InvalidTerms, match="without a rendezvous"):
        rendezvous(here._channel)
    assert there.get("a") == b"1"


def test_two_pairs_of_one_store_send_at_once(stores: tuple[ChannelStore, ChannelStore]) -> None:
    """Each pair is a separate group; the store lives as long as its group."""

    def work(names: tuple[int, str]) -> torch.Tensor:
        rank, name = names
        group = pair(stores[rank], rank, 2, "cpu", 20.0, name)
        gc.collect()
        data = torch.arange(1 << 16, dtype=torch.int32, device="cpu").view(torch.uint8)
        data = data + (0 if name == "a" else 1)
        into = torch.zeros_like(data)
        if rank:
            group.recv([into], 0, 7).wait()
        else:
            group.send([data], 1, 7).wait()
        return into if rank else data

    with ThreadPoolExecutor(4) as pool:
        sent_a, sent_b, got_a, got_b = pool.map(work, [(0, "a"), (0, "b"), (1, "a"), (1, "b")])
    assert torch.equal(sent_a, got_a)
    assert torch.equal(sent_b, got_b)
    assert not torch.distributed.is_initialized()


def test_a_pair_whose_other_side_never_comes_ends(
    stores: tuple[ChannelStore, ChannelStore],
) -> None:
    with pytest.raises(PeerError, match=r"at rank 1: .* Pair by another"):
        pair(stores[1], 1, 2, "cpu", 0.3)


def test_a_pair_whose_store_is_gone_ends() -> None:
    with closing(Channel()) as channel:
        gone = Channel()
        gone.close()
        with pytest.raises(PeerError):
            pair(rendezvous(channel, gone.address), 1, 2, "cpu", 5.0)


def test_what_torch_does_not_have_is_unsupported(
    stores: tuple[ChannelStore, ChannelStore],
) -> None:
    with pytest.raises(Unsupported, match="A process group for meta"):
        pair(stores[0], 0, 2, "meta")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="no NCCL"):
            unique_id()


@pytest.mark.gpu
def test_a_unique_id_is_that_of_nccl() -> None:
    assert len(unique_id()) == 128


@pytest.mark.parametrize("channel", [None, 5, "tcp://127.0.0.1:1"])
def test_what_is_not_a_channel_is_named(channel: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected channel to be a Channel"):
        rendezvous(channel)
