# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of channels, owners and readers raise an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from support.migrate_channels import SECRET, Ping, Pong
from support.migrate_pulls import MODEL, Couple, Rows, Sides, sides
from support.waits import LIMIT

from portakv import Index, KVView
from portakv.errors import BackendUnavailable, InvalidTerms, LayoutError, PeerError, SlotError
from portakv.migrate import Channel, Owner, Reader, Shard, open_shared, share
from portakv.migrate.messages import Handshake, Hello
from portakv.migrate.shared_memory import shared_empty
from portakv.migrate.transports.onesided import Nixl
from portakv.weights import open_model, pull_weights


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as made:
        yield made


#: Arguments of a channel that raise `InvalidTerms`, with the argument that the error names.
WRONG_CHANNELS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("address", {"address": address, "secret": SECRET})
        for address in (
            "tcp://127.0.0.1:99999",
            "tcp://127.0.0.1",
            "tcp://127.0.0.1:\0",
            "ipc:///tmp/somewhere",
        )
    ),
    ("address", {"address": 5}),
    ("address", {"address": ""}),
    ("", {"address": "tcp://127.0.0.1:0"}),
    *(("secret", {"secret": secret}) for secret in (5, b"", b"short")),
    ("secret", {"address": "tcp://127.0.0.1:0", "secret": b"short"}),
    *(("timeout", {"timeout": value}) for value in (0, -1, "5", float("nan"))),
]
#: Addresses at which no channel listens: of every interface, or of another host.
WRONG_HOSTS = (
    "*",
    "0.0.0.0",
    "0",
    "0x0",
    "000.0.0.0",
    "[::]",
    "[::0]",
    "[0:0:0:0:0:0:0:0]",
    "203.0.113.9",
)
#: Addresses to which a channel sends nothing: without a secret, and with one.
WRONG_PEERS: dict[bytes | None, tuple[str, ...]] = {
    None: (
        "tcp://127.0.0.1:1",
        "ipc://@name",
        "ipc:///nothing/there",
        "inproc://a",
        "",
        "x" * 99,
    ),
    SECRET: ("tcp://example.invalid:1", "tcp://a\0b:1", "ipc:///\0"),
}


@pytest.mark.parametrize(("argument", "terms"), WRONG_CHANNELS)
def test_a_wrong_argument_of_a_channel_is_named(argument: str, terms: dict[str, Any]) -> None:
    with pytest.raises(InvalidTerms, match=f"Expected (a )?{argument}"):
        Channel(**terms)


@pytest.mark.parametrize("host", WRONG_HOSTS)
def test_where_a_channel_may_listen(host: str) -> None:
    with pytest.raises(PeerError, match="at which a channel can listen"):
        Channel(f"tcp://{host}:0", secret=SECRET)


@pytest.mark.parametrize("secret", WRONG_PEERS)
def test_a_wrong_address_of_a_peer_is_looked_up_nowhere(secret: bytes | None) -> None:
    with closing(Channel(secret=secret, timeout=3.0)) as channel:
        for address in WRONG_PEERS[secret]:
            expected = "numeric address" if secret else "Expected an address of a channel"
            with pytest.raises(PeerError, match=expected):
                channel.ask(address, Ping(), Pong)


@pytest.mark.parametrize("kind", [Owner, Reader])
def test_owners_and_readers_name_the_argument(kind: Any) -> None:
    rows = Rows()
    channel = Channel()
    try:
        for wrong in (rows.view, [rows.whole], None):
            with pytest.raises(InvalidTerms, match=r"Expected shards .* Shard\(view\)"):
                kind(channel, wrong, model=MODEL)
        with pytest.raises(LayoutError, match="Expected shards"):
            kind(channel, model=MODEL)
        with pytest.raises(InvalidTerms, match="Expected channel to be a Channel, got None"):
            kind(None, rows.shard, model=MODEL)
        terms: list[dict[str, Any]] = [{"model": ""}, {"model": 5}, {"transport": "pigeon"}]
        if kind is Owner:
            terms += [{"staging": x} for x in ("1G", 100, True, None)]
            terms += [{"expose": x} for x in ("all", None)]
        for each in terms:
            with pytest.raises(InvalidTerms, match=f"Expected {next(iter(each))} to be"):
                kind(channel, rows.shard, **{"model": MODEL, **each})
        kind(channel, rows.shard, model=MODEL).close()
    finally:
        channel.close()


def test_a_transport_that_cannot_run_here_is_refused_by_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if Nixl.probe(Rows().view.device).accepted:
        pytest.skip("nixl runs here")
    rows = Rows()
    channel = Channel()
    try:
        for kind in (Owner, Reader):
            with pytest.raises(BackendUnavailable, match=r"Expected transport .* 'nixl'"):
                kind(channel, rows.shard, model=MODEL, transport="nixl")
    finally:
        channel.close()


@pytest.mark.parametrize("wrong", [[[0, 1]], None, "view"])
def test_a_shard_takes_a_view(wrong: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected view to be a KVView"):
        Shard(wrong)


@pytest.mark.parametrize("axis", ["layers", "heads"])
@pytest.mark.parametrize(
    "wrong", [3, "abc", [], (0, 1), (0.0, 2, 2), (0, True, 4), (0, 4, 2**70), object()]
)
def test_a_window_is_three_numbers(axis: str, wrong: Any) -> None:
    with pytest.raises(LayoutError, match=rf"{axis}=.*\(from, to, of\)"):
        Shard(Rows().view, **{axis: wrong})


#: Terms of an offer that raise `InvalidTerms`.
WRONG_TERMS: dict[str, list[Any]] = {
    "max_lease": ["1", 0, -1, 29.0, float("nan"), float("inf"), 2e6, None, True],
    "tokens": [0, "4", 1.5, True, None],
    "lease": ["1", 0, -1, float("nan"), float("inf"), 1e9, 2**63, None, True],
    "readers": [0, "2", True],
}
#: Lists of blocks that an owner of 16 blocks does not offer, and the clause that names them.
WRONG_LISTS: list[tuple[Any, int, str]] = [
    (([3, 3],), 32, "blocks"),
    ((["a"],), 32, "blocks"),
    ((5,), 32, "blocks"),
    (([99],), 16, "blocks"),
    (([16],), 16, "blocks"),
    (([3, 1 << 20],), 32, "blocks"),
    (([1 << 40],), 16, "blocks"),
    (([0.5],), 16, "blocks"),
    (([1, 2],), 33, "longer list"),
    (([1], [1]), 3, "Expected blocks to be 1 lists"),
]


def test_offers_name_the_argument(made: Sides) -> None:
    """Fault 16. No list reads past the region; negative ids are allowed, repeated ones are not."""
    both = Couple(made)
    for name, values in WRONG_TERMS.items():
        for value in values:
            with pytest.raises(InvalidTerms, match=f"Expected {name} to be"):
                both.owner.offer(both.blocks, **{"tokens": 16, name: value})
    for lists, tokens, clause in WRONG_LISTS:
        with pytest.raises(SlotError, match=rf"\b{clause}\b"):
            both.owner.offer(*lists, tokens=tokens)
    with pytest.raises(InvalidTerms, match="blocks"):
        both.owner.offer(None, tokens=16)  # type: ignore[arg-type]
    assert both.owner.statistics()["held"] == 0
    offer = both.offer()
    for timeout in ("x", -1, float("nan"), True):
        with pytest.raises(InvalidTerms, match="Expected timeout to be"):
            offer.taken(timeout=timeout)  # type: ignore[arg-type]
    offer.revoke()


def test_more_than_a_ticket_or_a_handshake_holds_is_refused_at_once(made: Sides) -> None:
    tall = shared_empty((1 << 21, 1, 8), torch.int8)
    owner = made.owner(Shard(KVView(tall, "(block token) head dim", block_size=1)))
    many = (1 << 20) + 1
    with pytest.raises(SlotError, match="Expected blocks to have at most 1048576 ids"):
        owner.offer(torch.arange(many), tokens=many)
    tensors = [shared_empty((2, 16, 1, 8), torch.int8) for _ in range(1024)]
    with pytest.raises(LayoutError, match="at most 1023 allocations, got 1024"):
        made.owner(Shard(KVView(tensors, "layer | block token head dim")))


#: Terms of a pull that raise `InvalidTerms`.
WRONG_PULLS: dict[str, list[Any]] = {
    "first": [-1, "1", True, None, 75, 2**63],
    "timeout": [-1, float("nan"), "1", True],
    "by_layer": [1, None],
    "verify": [1, None],
    "overlap": ["iddle", "never"],
    "max_gbps": [0, -1, "2", True, float("inf"), torch.tensor([1, 2]), np.array([1, 2])],
    "max_thread_blocks": [0, "2", True],
}


def test_pulls_name_the_argument(made: Sides) -> None:
    both = Couple(made)
    ticket = both.offer().ticket
    for wrong in (None, 5, [5], [], "x", object(), torch.tensor(3.0)):
        with pytest.raises(InvalidTerms, match="Expected tickets"):
            both.reader.pull(wrong, both.into)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="Expected tickets"):
        both.reader.pull(b"", both.into)
    for name, values in WRONG_PULLS.items():
        for value in values:
            with pytest.raises(InvalidTerms, match=f"Expected {name} to be"):
                both.reader.pull(ticket, both.into, **{name: value})
    for into in ([6, 6, 6], ["a"], 5, [99, 1, 4], [6]):
        with pytest.raises(SlotError, match=r"\bblocks\b"):
            both.reader.pull(ticket, into)  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match=r"Expected blocks to be ids .* of 32 tokens, got None"):
        both.reader.pull(ticket, None)
    assert (both.dst.whole == -1).all()
    both.reader.pull(ticket, both.into).synchronize(LIMIT)
    assert both.right()
    assert both.spared()


#: Blocks of a reader of 8 blocks of 32 tokens for 75 tokens, and the sentence that refuses them.
WRONG_BLOCKS: list[tuple[Any, str]] = [
    ([6, 1, 8], "to be ids from 0 to 7, the blocks of the view, got 8 at position 2"),
    ([6, 1, 1 << 40], "to be ids from 0 to 7, the blocks of the view, got 1099511627776 at"),
    ([6, 1, 6], "to name each block once, got 6 at positions 0 and 2"),
    ([6, 1], "to hold 75 tokens from token 0 on, 3 ids of 32 tokens, got 2"),
    ([6, 1, 4, 7], "to be 3 ids, of 32 tokens each, for the 75 tokens of the tickets, got 4"),
    ([6, 1, 4, -1], "to be 3 ids, of 32 tokens each, for the 75 tokens of the tickets, got 4"),
    (Index(range(80)), "to be 75 ids, of 1 tokens each, for the 75 tokens of the tickets, got 80"),
    ([6, "a", 4], "to be whole numbers in a list, an array or a tensor, got 'a'"),
    (torch.tensor([6.0, 1.0, 4.0]), "to be whole numbers .*, got dtype torch.float32"),
    (5, "to be whole numbers in a list, an array or a tensor, got an int"),
]


@pytest.mark.parametrize("known", [True, False])
def test_wrong_blocks_of_a_reader(made: Sides, known: bool) -> None:
    """The sentence names the id, its place and the range; the call raises it with a new owner,
    too."""
    both = Couple(made)
    if known:
        both.reader.prepare(both.owner.channel.address).synchronize(LIMIT)
    ticket = both.offer().ticket
    for into, sentence in WRONG_BLOCKS:
        with pytest.raises(SlotError, match=f"^Expected blocks {sentence}"):
            both.reader.pull(ticket, into)
    for into in ([1, 4], [6, 1, 4, 7]):  # also for the tokens after the first ones
        with pytest.raises(SlotError, match="Expected blocks to"):
            both.reader.pull(ticket, into, first=70)
    assert (both.dst.whole == -1).all()
    both.reader.pull(ticket, [-1, -1, 4], first=70).synchronize(LIMIT)
    assert torch.equal(
        both.dst.rows([4], 32)[:, :, 6:11], both.src.rows(both.blocks, 75)[:, :, 70:]
    )


def test_wrong_blocks_of_a_second_group(made: Sides) -> None:
    groups = [Rows(), Rows()]
    owner = made.owner(*(each.shard for each in groups))
    with pytest.raises(SlotError, match=r"^Expected blocks\[1\] to be ids from 0 to 15, .* got 16"):
        owner.offer([3], [16], tokens=16)
    ticket = owner.offer([3], [4], tokens=16).ticket
    into = [Rows(8, 32, fill=-1), Rows(8, 32, fill=-1)]
    reader = made.reader(*(each.shard for each in into))
    with pytest.raises(SlotError, match=r"^Expected blocks\[1\] to be 1 ids, of 32 tokens each"):
        reader.pull(ticket, [1], [2, 3])
    with pytest.raises(InvalidTerms, match=r"^Expected blocks\[0\] to be ids of the view's blocks"):
        reader.pull(ticket, None, [2])


def test_none_is_for_a_view_that_is_not_paged(made: Sides) -> None:
    src = Rows()
    owner = made.owner(src.shard)
    whole = torch.full((2, 2, 40, 4, 8), -1, dtype=torch.int16)
    reader = made.reader(Shard(KVView(whole, "layer kv token head dim")))
    reader.pull(owner.offer([3, 1], tokens=20).ticket, None).synchronize(LIMIT)
    assert torch.equal(whole[:, :, :20], src.rows([3, 1], 20))
    assert (whole[:, :, 20:] == -1).all()
    small = torch.full((2, 2, 10, 4, 8), -1, dtype=torch.int16)
    reader = made.reader(Shard(KVView(small, "layer kv token head dim")))
    with pytest.raises(SlotError, match="a view of 20 tokens or more, got a view of 10"):
        reader.pull(owner.offer([3, 1], tokens=20).ticket, None)


#: What is no ticket, and the clause that says so; `TICKET` stands for the bytes of one.
WRONG_TICKETS: list[tuple[Callable[[bytes], Any], str]] = [
    (bytes.hex, r"bytes, got a text of hexadecimal digits\. Convert it by bytes\.fromhex\(text\)"),
    (bytearray, r"bytes, got a bytearray\. Convert it by bytes\(value\)"),
    (memoryview, r"bytes, got a memoryview\. Convert it by bytes\(value\)"),
    (lambda _: "a ticket", r"bytes, got a text\. Pass (Offer|Published)\.ticket"),
]


@pytest.mark.parametrize(("wrong", "clause"), WRONG_TICKETS)
def test_what_is_no_ticket_is_not_shown(
    made: Sides, wrong: Callable[[bytes], Any], clause: str
) -> None:
    """A ticket is a secret: the sentence says what its bytes became, and shows none of them."""
    both = Couple(made)
    ticket = both.offer().ticket
    value = wrong(ticket)
    calls: list[Callable[[], object]] = [
        lambda: both.reader.pull(value, both.into),
        lambda: both.reader.pull([value], both.into),
        lambda: both.reader.extend(value, 5.0),
        lambda: both.reader.explain(value),
        lambda: both.owner.revoke(value),
        lambda: pull_weights(both.reader.channel, value, {"w": torch.zeros(1)}),
        lambda: pull_weights(both.reader.channel, [value], {"w": torch.zeros(1)}),
    ]
    for call in calls:
        with pytest.raises(
            InvalidTerms, match=rf"^Expected tickets?(\[0\])? to be {clause}"
        ) as error:
            call()
        assert ticket.hex()[:16] not in str(error.value)


def test_bytes_of_shared_memory_are_bytes() -> None:
    data = share(shared_empty((2,), torch.int8))
    calls: list[Callable[[Any], object]] = [
        open_shared,
        lambda value: open_model(torch.nn.Linear(1, 1), value),
    ]
    for call in calls:
        with pytest.raises(
            InvalidTerms, match=r"^Expected data to be bytes, got a text of hexadec"
        ):
            call(data.hex())


def test_numbers_of_numpy_count(made: Sides) -> None:
    both = Couple(made)
    terms: dict[str, Any] = {"tokens": np.int64(75), "readers": np.int32(1)}
    offer = both.owner.offer(both.blocks, **terms)
    both.reader.pull(offer.ticket, both.into, first=np.int64(0)).synchronize(LIMIT)
    assert both.right()


def test_infinite_times_and_rates(made: Sides) -> None:
    """No lease and no rate is infinite; a wait without a limit is."""
    both = Couple(made)
    offer = both.offer()
    weights = {"w": torch.zeros(1)}
    extension = r"^Expected seconds to be a number of seconds from 0 to 10\^6"
    for wrong in (float("inf"), float("nan"), -1.0, 2e6):
        with pytest.raises(InvalidTerms, match=extension):
            offer.extend(wrong)
        with pytest.raises(InvalidTerms, match=extension):
            both.reader.extend(offer.ticket, wrong)
    for wrong in (float("inf"), float("nan"), -1.0, 0):
        with pytest.raises(InvalidTerms, match=r"^Expected max_gbps to be a number of 10\^9"):
            pull_weights(both.reader.channel, b"x", weights, max_gbps=wrong)
    channel = both.reader.channel
    address = both.owner.channel.address
    for timeout in ("5", True, float("nan"), [1]):
        with pytest.raises(InvalidTerms, match=r"^Expected timeout to be a number of seconds"):
            channel.ask(address, Hello(MODEL), Handshake, timeout)  # type: ignore[arg-type]
    assert channel.ask(address, Hello(MODEL), Handshake, float("inf"))
    both.reader.pull(offer.ticket, both.into, timeout=float("inf")).synchronize(float("inf"))
    assert both.right()
