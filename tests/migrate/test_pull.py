# SPDX-License-Identifier: Apache-2.0
"""Rows that readers pull from owners of other shardings, layouts and block sizes: every byte right
by the oracle, nothing else touched, whether they are mapped or moved."""

from __future__ import annotations

import gc
from pathlib import Path
from secrets import token_bytes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ambient import STATES
from support.migrate_cases import WIDTHS, Held, drawn_model, ranks
from support.migrate_channels import SECRET, Network
from support.migrate_pulls import LAYOUT, SMALL, Couple, Rows, Sides, sides
from support.waits import LIMIT, until

from portakv import CopyOptions, Index, InvalidTerms, KVView
from portakv.migrate import Ticket
from portakv.migrate import reader as issue
from portakv.migrate.channel import Channel
from portakv.migrate.owner import Owner
from portakv.migrate.plan import Step, planned
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import shared_empty

extents = st.integers(1, 4).flatmap(
    lambda layers: st.tuples(st.just(layers), st.integers(1, 4), st.integers(1, 200))
)


def listed(caches: Held, slots: bool) -> Any:
    """Its tokens as blocks or, if it has not all of them, as slots."""
    return Index(torch.from_numpy(caches.slots)) if slots else caches.blocks


def pull_all(made: Sides, extents: Any, data: st.DataObject, expose: str, most: Any) -> None:
    widths = data.draw(st.sampled_from([*WIDTHS]))
    layers, heads, tokens = extents
    heads = 1 if len(widths) == 1 else heads
    model = drawn_model(layers, tokens, heads, widths)
    presets = WIDTHS[widths].split()
    caches = []
    for size in data.draw(st.tuples(*[st.sampled_from([16, 64, 5])] * 2)):
        drawn = data.draw(ranks(layers, heads, tokens, most))
        kinds = [data.draw(st.sampled_from(presets)) for _ in drawn]
        both = zip(drawn, kinds, strict=True)
        caches.append([Held(x, kind, widths, size, n, True) for n, (x, kind) in enumerate(both)])
    owners = []
    for one in caches[0]:
        one.fill(model)
        owners.append(made.owner(one.shard, expose=expose, staging=SMALL))
    slots = any(not x.rank.tokens.all() for x in caches[0])
    for one in caches[1][:2]:
        reader = made.reader(one.shard)
        first = data.draw(st.integers(0, tokens - 1))
        wanted = one.written(model, first)
        offers = [
            owner.offer(listed(x, slots), tokens=tokens)
            for owner, x in zip(owners, caches[0], strict=True)
        ]
        terms: dict[str, Any] = {
            "by_layer": data.draw(st.booleans()),
            "verify": data.draw(st.booleans()),
            "max_gbps": data.draw(st.sampled_from([None, None, 50.0])),
            "overlap": data.draw(st.sampled_from(["compute", "idle"])),
        }
        by_layer = terms["by_layer"]
        local = listed(one, not one.rank.tokens.all())
        if data.draw(st.booleans()):
            verify = terms.pop("verify")
            terms = {"options": CopyOptions(**terms), "verify": verify}
        pulled = reader.pull([x.ticket for x in offers], local, first=first, **terms)
        if by_layer:
            for end in pulled.layers:
                end.synchronize(LIMIT)
        pulled.synchronize(LIMIT)
        assert pulled.published
        assert all(offer.taken(LIMIT) for offer in offers)
        assert not [*wanted.changes(type(wanted).snapshot(one.cache.tensors))]


@settings(max_examples=settings().max_examples // 14)
@given(extents, st.data())
def test_rows_of_any_sharding_are_read_where_they_lie(
    extents: tuple[int, int, int], data: st.DataObject
) -> None:
    with sides() as made:
        pull_all(made, extents, data, "mapped", (2, 3, 3))


@settings(max_examples=settings().max_examples // 20)
@given(extents, st.data())
def test_rows_of_any_sharding_are_moved_through_small_slots(
    extents: tuple[int, int, int], data: st.DataObject
) -> None:
    with sides() as made:
        pull_all(made, extents, data, "staging", (2, 2, 2))


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_groups_have_views_ids_and_block_sizes_of_their_own(expose: str) -> None:
    with sides() as made:
        remote = [Rows(16, 16), Rows(8, 8)]
        local = [Rows(8, 32, fill=-1), Rows(16, 4, fill=-1)]
        owner = made.owner(*(x.shard for x in remote), expose=expose, staging=SMALL)
        reader = made.reader(*(x.shard for x in local))
        lists = [[9, 2, 4], [7, 0, 3, 2, 6]]
        into = [[3, 5], [*range(9, 0, -1)]]
        offer = owner.offer(*lists, tokens=36)
        pulled = reader.pull(offer.ticket, *into, by_layer=True, verify=True)
        assert len(pulled.layers) == 4
        pulled.synchronize(LIMIT)
        for one, other, a, b in zip(remote, local, lists, into, strict=True):
            assert torch.equal(one.rows(a, 36), other.rows(b, 36))
        assert pulled.statistics.nbytes == 2 * 36 * 2 * 2 * 4 * 16


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_whole_opaque_pages_are_pulled_by_layer_windows_alone(expose: str) -> None:
    remote = shared_empty((3, 9, 640), torch.uint8)
    local = torch.zeros(3, 9, 640, dtype=torch.uint8)
    remote.copy_(torch.randint(0, 256, remote.shape, dtype=torch.uint8))
    one, other = (KVView([*x], "layer | block page", block_size=64) for x in (remote, local))
    with sides() as made:
        owner = made.owner(Shard(one), expose=expose, staging=SMALL)
        reader = made.reader(Shard(other))
        offer = owner.offer([8, 1, 3, 4], tokens=256)
        reader.pull(offer.ticket, [0, 7, 2, 5], first=64, verify=True).synchronize(LIMIT)
    assert torch.equal(local[:, [7, 2, 5]], remote[:, [1, 3, 4]])
    assert not local[:, [0, 1, 3, 4, 6, 8]].any()


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_an_encoder_s_blocks_are_pulled_into_blocks_of_another_size(expose: str) -> None:
    """Embeddings of images: one plane, and the last block is not full."""
    remote, local = (shared_empty(shape, torch.int16) for shape in [(5, 48, 24), (9, 16, 24)])
    remote.copy_(torch.arange(remote.numel()).view(remote.shape))
    one, other = (Shard(KVView(x, "encoder-cache")) for x in (remote, local.fill_(-1)))
    with sides() as made:
        owner = made.owner(one, expose=expose, staging=SMALL)
        reader = made.reader(other)
        offer = owner.offer([3, 1], tokens=70)
        into = [8, 0, 2, 5, 1]
        reader.pull(offer.ticket, into, verify=True).synchronize(LIMIT)
    assert torch.equal(local[into].flatten(0, 1)[:70], remote[[3, 1]].flatten(0, 1)[:70])
    assert (local[into].flatten(0, 1)[70:] == -1).all()
    assert (local[[3, 4, 6, 7]] == -1).all()


@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_what_the_reader_does_not_want_nobody_has_to_hold(expose: str) -> None:
    """Blocks of -1 on both sides; digests are of what was brought alone."""
    with sides() as made:
        both = Couple(made, expose)
        offer = both.owner.offer([7, -1, 11, 0, 5, 9], tokens=96)
        both.reader.pull(offer.ticket, [-1, 4, 2], verify=True).synchronize(LIMIT)
        assert torch.equal(both.dst.rows([4, 2], 64), both.src.rows([11, 0, 5, 9], 64))
        assert (both.dst.whole[:, :, [0, 1, 3, 5, 6, 7]] == -1).all()


@pytest.mark.parametrize("expose", ["mapped", "staging"])
@pytest.mark.parametrize("state", STATES)
def test_nothing_of_the_callers_settings_matters(expose: str, state: str) -> None:
    with sides() as made:
        both = Couple(made, expose)
        offered = both.offer()
        with STATES[state](torch.device("cpu")):
            both.pull(offered, verify=True, by_layer=True).synchronize(LIMIT)
            again = both.owner.offer(both.blocks, tokens=both.tokens)
            both.pull(again, max_gbps=50.0).synchronize(LIMIT)
        assert both.right()
        assert both.spared()


@pytest.mark.parametrize(
    "options",
    [{"cancellable": True}, {"detached": True}, {"backend": "reference"}, {"check": "strict"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_a_pull_does_not_keep_are_refused(options: dict[str, Any]) -> None:
    with sides() as made:
        both = Couple(made)
        offered = both.offer()
        with pytest.raises(InvalidTerms, match=f"options for a pull .* got {next(iter(options))}"):
            both.pull(offered, options=CopyOptions(**options))
        with pytest.raises(InvalidTerms, match="got options and by_layer"):
            both.pull(offered, options=CopyOptions(), by_layer=True)
        both.pull(offered, options=CopyOptions(overlap="idle")).synchronize(LIMIT)
        assert both.right()


def test_a_second_pull_of_the_same_owners_plans_nothing_anew() -> None:
    with sides() as made:
        both = Couple(made)
        for first in (0, 5, 40):
            both.dst.whole.fill_(-1)
            both.pull(both.offer(), first=first).synchronize(LIMIT)
            rows = both.dst.rows(both.into, both.tokens)
            assert torch.equal(rows[:, :, first:], both.src.rows(both.blocks, 75)[:, :, first:])
            assert (rows[:, :, :first] == -1).all()
            assert both.spared()


def test_an_owner_that_is_gone_keeps_no_memory_beside_another() -> None:
    """The plan of a pull of both retained it: on a device, a dead owner's cache for ever."""
    with sides() as made:
        remote = [Rows(), Rows()]
        local = torch.zeros(4, 2, 8, 32, 4, 8, dtype=torch.int16)
        owners = [made.owner(Shard(x.view, (2 * n, 2 * n + 2, 4))) for n, x in enumerate(remote)]
        tickets = [owner.offer([1, 2], tokens=32).ticket for owner in owners]
        reader = made.reader(Shard(KVView([*local], LAYOUT)))
        reader.pull(tickets, [3]).synchronize(LIMIT)
        owners[1].channel.close()
        assert until(lambda: gc.collect() >= 0 and mappings(remote[1].whole) == 1, LIMIT)
        assert mappings(remote[0].whole) == 2


def mappings(tensor: torch.Tensor) -> int:
    """Count how often the file that a tensor lies in is mapped here."""
    lines = [x.split() for x in Path("/proc/self/maps").read_text().splitlines()]
    own = next(x for x in lines if x[0].startswith(f"{tensor.data_ptr():x}-"))
    return sum(x[3:5] == own[3:5] for x in lines)


def test_tokens_that_are_dealt_out_in_turns_come_from_all_owners() -> None:
    """Also if they overlap: each position is brought once, and digests still agree."""
    with sides() as made:
        remote = Rows()
        local = Rows(8, 32, fill=-1)
        slots = np.arange(60)
        owners = [made.owner(remote.shard) for _ in range(2)]
        has = [slots % 3 != 2, slots % 3 != 0]
        tickets = [
            owner.offer(Index(torch.from_numpy(np.where(x, slots, -1))), tokens=60).ticket
            for owner, x in zip(owners, has, strict=True)
        ]
        made.reader(local.shard).pull(tickets, [2, 1], verify=True).synchronize(LIMIT)
        assert torch.equal(local.rows([2, 1], 60), remote.rows([0, 1, 2, 3], 60))


@pytest.mark.parametrize(("other", "same"), [([0, 1], True), ([1, 0], False)])
def test_ids_that_owners_have_in_common_are_one_index(
    other: list[int], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they are checked once, and the second copy finds them where the first put them."""
    plans = list[tuple[list[Step], bool]]()

    def noted(*rest: Any) -> tuple[list[Step], bool]:
        plans.append(planned(*rest))
        return plans[-1]

    monkeypatch.setattr(issue, "planned", noted)
    with sides() as made:
        remote = [Rows(), Rows()]
        local = torch.zeros(4, 2, 8, 32, 4, 8, dtype=torch.int16)
        owners = [made.owner(Shard(x.view, (2 * n, 2 * n + 2, 4))) for n, x in enumerate(remote)]
        offered = [[0, 1], other]
        tickets = [
            owner.offer(ids, tokens=32).ticket for owner, ids in zip(owners, offered, strict=True)
        ]
        reader = made.reader(Shard(KVView([*local], LAYOUT)))
        reader.pull(tickets, [3]).synchronize(LIMIT)
        (one, two), _ = plans[-1]
        assert (one.src_index is two.src_index) is same
        for n, ids in enumerate(offered):
            assert torch.equal(local[2 * n : 2 * n + 2, :, 3], remote[n].rows(ids, 32))


@pytest.mark.parametrize("swapped", [False, True])
def test_of_owners_that_have_the_same_one_that_can_be_mapped_is_read(swapped: bool) -> None:
    with sides() as made:
        remote = Rows()
        local = Rows(8, 32, fill=-1)
        owners = [made.owner(remote.shard, expose=x) for x in ("mapped", "staging")]
        tickets = [owner.offer([1, 2], tokens=32).ticket for owner in owners]
        pulled = made.reader(local.shard).pull(tickets[:: -1 if swapped else 1], [2])
        pulled.synchronize(LIMIT)
        assert pulled.statistics.strategy == "mapped"


def test_each_layer_may_have_an_allocation_of_its_own() -> None:
    """Keys and values of 160 layers: an owner's answer to the greeting is over 64 KiB then."""
    shape = (4, 16, 1, 8)
    layout = "layer kv | block token head dim"
    pools = [tuple(shared_empty(shape, torch.uint8).fill_(n) for _ in "kv") for n in range(160)]
    local = [tuple(torch.zeros(shape, dtype=torch.uint8) for _ in "kv") for _ in pools]
    with sides() as made:
        owner = made.owner(Shard(KVView(pools, layout)))
        pull = made.reader(Shard(KVView(local, layout))).pull(
            owner.offer([1], tokens=16).ticket, [3]
        )
        pull.synchronize()
        assert all(bool((one[3] == n).all()) for n, both in enumerate(local) for one in both)


def test_tickets_say_the_address_that_a_channel_was_given() -> None:
    """A container's published port, or NAT: what it listens at is not what others reach."""
    local = Rows()
    remote = Rows()
    listening = Channel("tcp://127.0.0.1:0", secret=SECRET)
    asking = Channel(secret=SECRET)
    network = Network(listening.address)
    listening.address = network.address
    owner = Owner(listening, remote.shard, model="m")
    reader = Reader(asking, local.shard, model="m")
    offer = owner.offer([1], tokens=16)
    assert network.address in reader.explain(offer.ticket)
    reader.pull(offer.ticket, [2]).synchronize()
    for one in (reader, owner, asking, listening, network):
        one.close()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
@pytest.mark.parametrize("expose", ["mapped", "staging"])
def test_the_caller_may_change_its_ids_while_a_pull_waits(
    monkeypatch: pytest.MonkeyPatch, expose: str, guarded: bool
) -> None:
    """Without a copy of the ids the rows go to the blocks that the caller has written since."""
    if not guarded:
        monkeypatch.setattr(Index, "apart", lambda index: index)
    src = Rows()
    dst = Rows(fill=-1)
    name = token_bytes(16)
    ids = torch.tensor([5, 2])
    with sides() as made:
        owner = made.owner(src.shard, expose=expose, staging=SMALL)
        ticket = Ticket.of(owner.channel.address, owner.epoch, name)
        pulled = made.reader(dst.shard).pull(ticket, ids)
        ids.copy_(ids.flip(0))
        owner.offer([7, 3], tokens=32, name=name)
        pulled.synchronize(LIMIT)
    assert torch.equal(src.rows([7, 3], 32), dst.rows([5, 2], 32)) == guarded
