# SPDX-License-Identifier: Apache-2.0
"""Events of a store for routers: what is sent, that routers get it, and that a server sends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import InvalidTerms, PeerError
from portakv.serving import Described, StoreClient, StoreServer, StoreTerms
from portakv.serving.kv_events import (
    MOST_BLOCKS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
    events_of,
)
from portakv.storage import BlockForm, prefix_keys
from portakv.storage.calls import Change

KEYS = prefix_keys(range(32), 8)
NUMBERS = [int.from_bytes(key, "big") & ((1 << 64) - 1) for key in KEYS]
#: A batch as vLLM 0.32 encodes it: blocks stored on the host, one lost on disk, and all cleared.
BY_VLLM = bytes.fromhex(
    "93cb3ff8000000000000938aa474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392cf8182"
    "838485868788cf9192939495969798b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f69647390aa"
    "626c6f636b5f73697a6500a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c0a967726f"
    "75705f69647801a86c6f63616c697479a54c4f43414c84a474797065ac426c6f636b52656d6f766564ac626c6f63"
    "6b5f68617368657391cf8182838485868788a66d656469756da753544f52414745a86c6f63616c697479a54c4f43"
    "414c81a474797065b0416c6c426c6f636b73436c6561726564c0"
)


def changes(
    tier: str, stored: bool, keys: Sequence[bytes], form: str = "", first: int = 1
) -> list[Change]:
    return [Change(first + n, key, tier, stored, "", form) for n, key in enumerate(keys)]


class Router:
    """A subscriber, which reads batches as vLLM's own example does."""

    def __init__(self, publisher: EventPublisher) -> None:
        self.context = zmq.Context()
        self._publisher = publisher
        self._socket = self.context.socket(zmq.SUB)
        self._socket.connect(publisher.endpoint)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self.batches = list[tuple[int, EventBatch]]()

    def take(self) -> list[Any]:
        """Return the events that have come until now."""
        while self._socket.poll(50):
            _, number, batch = self._socket.recv_multipart()
            read = msgspec.msgpack.decode(batch, type=EventBatch)
            self.batches.append((int.from_bytes(number, "big"), read))
        return [event for _, batch in self.batches for event in batch.events]

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def publisher() -> Iterator[EventPublisher]:
    made = EventPublisher("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", now=lambda: 1.5)
    yield made
    made.close()


@pytest.fixture
def router(publisher: EventPublisher) -> Iterator[Router]:
    made = Router(publisher)

    def arrives() -> bool:
        publisher.clear()
        return bool(made.take())

    assert until(arrives, LIMIT)  # a subscription takes effect some time after it was made
    made.batches.clear()
    yield made
    made.close()


def test_an_event_names_blocks_of_a_form_and_a_medium() -> None:
    made = events_of(
        [
            *changes("host", True, KEYS[:2], "a"),
            *changes("disk", True, KEYS[:1], "a"),
            *changes("disk 2", True, KEYS[:1], "b"),
            *changes("disk 2", False, KEYS[:2], "b"),
        ],
        ["a", "b"],
    )
    facts: dict[str, Any] = {
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 0,
        "lora_id": None,
        "lora_name": None,
        "locality": "LOCAL",
    }
    assert made == [
        BlockStored(block_hashes=NUMBERS[:2], medium="CPU", group_idx=0, **facts),
        BlockStored(block_hashes=NUMBERS[:1], medium="STORAGE", group_idx=0, **facts),
        BlockStored(block_hashes=NUMBERS[:1], medium="STORAGE", group_idx=1, **facts),
        BlockRemoved(NUMBERS[:2], "STORAGE", 1, "LOCAL"),
    ]


def test_blocks_that_are_described_have_tokens_and_a_parent() -> None:
    """A block without a description is a separate event, without tokens."""
    tokens = [*range(32)]

    def describe(key: bytes) -> Described | None:
        at = KEYS.index(key)
        after = KEYS[at - 1] if at else None
        return None if at == 3 else Described(after, tuple(tokens[8 * at : 8 * at + 8]), None)

    made = events_of(changes("host", True, KEYS), describe=describe, block_size=8)
    assert [each.token_ids for each in made if isinstance(each, BlockStored)] == [tokens[:24], []]
    assert [each.block_size for each in made if isinstance(each, BlockStored)] == [8, 0]
    second = events_of(changes("host", True, KEYS[1:3]), describe=describe, block_size=8)
    assert [each.parent_block_hash for each in second if isinstance(each, BlockStored)] == [
        NUMBERS[0]
    ]


def test_a_batch_is_that_of_vllm() -> None:
    """Byte for byte, as vLLM's own encoder writes it."""
    numbers = [0x8182838485868788, 0x9192939495969798]
    stored = BlockStored(numbers, None, [], 0, None, "CPU", None, group_idx=1, locality="LOCAL")
    removed = BlockRemoved(numbers[:1], "STORAGE", locality="LOCAL")
    batch = EventBatch(1.5, [stored, removed, AllBlocksCleared()])
    assert msgspec.msgpack.encode(batch) == BY_VLLM
    assert msgspec.msgpack.decode(BY_VLLM, type=EventBatch) == batch


def is_list(low: int, high: int) -> Callable[[Any], bool]:
    return lambda x: type(x) is list and all(type(n) is int and low <= n < high for n in x)


#: What a type of `LLM_D` takes.
TAKEN: dict[str, Callable[[Any], bool]] = {
    "list of uint64": is_list(0, 1 << 64),
    "list of uint32": is_list(0, 1 << 32),
    "uint64 or none": lambda x: x is None or (type(x) is int and 0 <= x < 1 << 64),
    "int": lambda x: type(x) is int,
    "int or none": lambda x: x is None or (type(x) is int and x >= 0),
    "str or none": lambda x: x is None or type(x) is str,
    "list or none": lambda x: x is None or type(x) is list,
    "not read": lambda _: True,
}


#: The fields that the sources of llm-d-router read in November 2026, and their types. The former
#: llm-d-kv-cache reads only lists, which vLLM sent before. llm-d itself was not run.
LLM_D: dict[str, dict[str, str]] = {
    "BlockStored": {
        "block_hashes": "list of uint64",
        "parent_block_hash": "uint64 or none",
        "token_ids": "list of uint32",
        "block_size": "int",
        "lora_id": "int or none",
        "medium": "str or none",
        "lora_name": "str or none",
        "extra_keys": "list or none",
        "group_idx": "int or none",
        "kv_cache_spec_kind": "str or none",
        "kv_cache_spec_sliding_window": "int or none",
        "locality": "not read",
    },
    "BlockRemoved": {
        "block_hashes": "list of uint64",
        "medium": "str or none",
        "group_idx": "int or none",
        "locality": "not read",
    },
    "AllBlocksCleared": {},
}


def llm_d_refuses(frames: Sequence[bytes]) -> list[str]:
    """Return what llm-d cannot read in a message.

    A message has three frames: a topic ``kv@POD@MODEL``, a number of 8 bytes and a batch, which is
    a list of a time, events and a rank.
    """
    topic, number, payload = frames
    refused = []
    if len(topic.split(b"@")) != 3 or not topic.startswith(b"kv@"):
        refused.append(f"topic {topic!r}")
    if len(number) != 8:
        refused.append("number")
    at, events, *_ = msgspec.msgpack.decode(payload)
    assert type(at) is float
    for event in events:
        known = LLM_D[event.pop("type")]
        refused += sorted({*event} - {*known})
        refused += [x for x, kind in known.items() if not TAKEN[kind](event.get(x))]
    return refused


def test_llm_d_reads_the_fields_of_its_table() -> None:
    """All events, with tokens and without. The controls are messages that it cannot read."""

    def describe(key: bytes) -> Described | None:
        at = KEYS.index(key)
        return None if at == 3 else Described(KEYS[at - 1] if at else None, (1, 2), None)

    some = [*changes("host", True, KEYS, "a"), *changes("disk", False, KEYS[:2], "b")]
    events: list[Any] = events_of(some, ["a", "b"], describe, 2)
    assert len(events) == 3
    batch = msgspec.msgpack.encode(EventBatch(1.5, [*events, AllBlocksCleared()]))
    assert llm_d_refuses([b"kv@a pod@a model", bytes(8), batch]) == []

    assert llm_d_refuses([b"", bytes(4), batch]) == ["topic b''", "number"]
    wrong = msgspec.msgpack.decode(batch)
    del wrong[1][0]["block_size"]
    wrong[1][1]["medium"] = 7
    wrong[1][2]["new"] = None
    frames = [b"kv@a pod@a model", bytes(8), msgspec.msgpack.encode(wrong)]
    assert llm_d_refuses(frames) == ["block_size", "medium", "new"]


def test_a_long_run_is_several_events() -> None:
    many = [n.to_bytes(32, "big") for n in range(2 * MOST_BLOCKS + 1)]
    sizes = [len(each.block_hashes) for each in events_of(changes("host", False, many))]
    assert sizes == [MOST_BLOCKS, MOST_BLOCKS, 1]


def test_a_router_gets_each_batch_once_in_order(publisher: EventPublisher, router: Router) -> None:
    publisher.publish(changes("host", True, KEYS[:2]))
    publisher.publish([])  # sends nothing
    publisher.publish(changes("host", False, KEYS[:2]))
    publisher.clear()
    assert until(lambda: len(router.take()) == 3, LIMIT)
    stored, removed, cleared = router.take()
    assert (stored.block_hashes, removed.block_hashes) == (NUMBERS[:2], NUMBERS[:2])
    assert cleared == AllBlocksCleared()
    numbers = [number for number, _ in router.batches]
    assert numbers == [*range(numbers[0], numbers[0] + 3)]
    assert {batch.ts for _, batch in router.batches} == {1.5}


def test_a_router_that_has_missed_batches_gets_them(
    publisher: EventPublisher, router: Router
) -> None:
    publisher.clear()
    assert until(lambda: router.take()[-1:], LIMIT)
    first = router.batches[-1][0] + 1
    for _ in range(3):
        publisher.publish(changes("host", True, KEYS[:2]))
    dealer = router.context.socket(zmq.DEALER)
    dealer.connect(publisher.replay)
    dealer.send_multipart([b"", (first + 1).to_bytes(8, "big")])
    dealer.send_multipart([b"no router"])  # is not answered
    got = list[int]()

    def ended() -> bool:
        publisher.answer()
        while dealer.poll(10):
            got.append(int.from_bytes(dealer.recv_multipart()[2], "big", signed=True))
        return got[-1:] == [-1]

    assert until(ended, LIMIT)
    assert got == [first + 1, first + 2, -1]


def test_routers_do_not_hold_the_thread(publisher: EventPublisher, router: Router) -> None:
    """A call answers four requests; later calls answer the others."""
    dealer = router.context.socket(zmq.DEALER)
    dealer.connect(publisher.replay)
    for _ in range(12):
        dealer.send_multipart([b"", bytes(8)])
    ends = 0
    calls = 0

    def answered() -> bool:
        nonlocal calls, ends
        publisher.answer()
        calls += 1
        while dealer.poll(10):
            ends += dealer.recv_multipart()[2] == b"\xff" * 8
        assert ends <= 4 * calls
        return ends == 12

    assert until(answered, LIMIT)


def test_wrong_addresses_are_refused(publisher: EventPublisher) -> None:
    with pytest.raises(PeerError, match="at which events can be published"):
        EventPublisher(publisher.endpoint)
    with pytest.raises(InvalidTerms, match="endpoint"):
        EventPublisher("")
    with pytest.raises(InvalidTerms, match="topic"):
        EventPublisher("tcp://127.0.0.1:0", topic=1)  # type: ignore[arg-type]


def test_a_store_server_publishes_what_its_store_has(
    publisher: EventPublisher, router: Router, tmp_path: Path
) -> None:
    """Blocks that ranks save, those that a store has when it opens again, and its end."""
    caches = [torch.ones(8, 2, 4, 4, 8, dtype=torch.int16, device="cpu") for _ in range(2)]
    view = KVView(caches, "layer | block kv token head dim")
    form = BlockForm.of(view, "model")
    terms = StoreTerms.of(
        {"folder": (str(tmp_path),), "host": 1 << 20, "staging": 1 << 20, "capacity": 8 << 20}
    )
    for again in (False, True):
        with (
            StoreServer(terms, events=publisher) as store_server,
            StoreClient(store_server.place, [form], "an engine") as client,
        ):
            assert client.wait(LIMIT)
            if not again:
                client.blocks[0].save(view, range(4), KEYS).synchronize(LIMIT)

            def media() -> set[str]:
                stored = [x for x in router.take() if isinstance(x, BlockStored)]
                return {str(x.medium) for x in stored if {*x.block_hashes} & {*NUMBERS}}

            assert until(lambda again=again: media() >= ({"STORAGE"} if again else {"CPU"}), LIMIT)
        assert until(lambda: router.take()[-1:] == [AllBlocksCleared()], LIMIT)
        router.batches.clear()
