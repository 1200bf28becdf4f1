# SPDX-License-Identifier: Apache-2.0
"""Events of a store are read by the decoders of vLLM and of Dynamo, where these are installed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.waits import LIMIT, until

from portakv.serving.kv_events import EventPublisher, events_of
from portakv.serving.scheduler import Described
from portakv.storage import prefix_keys
from portakv.storage.calls import Change

SIZE = 4
TOKENS = [*range(16)]
KEYS = prefix_keys(TOKENS, SIZE)


def describe(key: bytes) -> Described:
    at = KEYS.index(key)
    tokens = TOKENS[SIZE * at : SIZE * at + SIZE]
    return Described(KEYS[at - 1] if at else None, (*tokens,), None)


def changes(tier: str, stored: bool, keys: list[bytes]) -> list[Change]:
    return [Change(n, key, tier, stored) for n, key in enumerate(keys)]


def test_vllm_reads_the_events() -> None:
    """Its own types, with the values that it would have made."""
    own = pytest.importorskip("vllm.distributed.kv_events", reason="vLLM is not installed")
    msgspec = pytest.importorskip("msgspec")
    from portakv.serving.kv_events import AllBlocksCleared, EventBatch

    made = [
        *events_of(changes("host", True, KEYS[:2]), describe=describe, block_size=SIZE),
        *events_of(changes("disk", True, KEYS[:2])),
        *events_of(changes("host", False, KEYS[:2])),
    ]
    data = msgspec.msgpack.encode(EventBatch(1.5, [*made, AllBlocksCleared()]))
    batch = msgspec.msgpack.decode(data, type=own.KVEventBatch)
    described, plain, removed, cleared = batch.events
    hashes = [int.from_bytes(key, "big") & ((1 << 64) - 1) for key in KEYS[:2]]
    assert isinstance(described, own.BlockStored)
    assert described.token_ids == TOKENS[: 2 * SIZE]
    assert (described.block_size, described.medium, described.locality) == (SIZE, "CPU", "LOCAL")
    assert isinstance(plain, own.BlockStored)
    assert (plain.token_ids, plain.block_size, plain.medium) == ([], 0, "STORAGE")
    assert described.block_hashes == plain.block_hashes == removed.block_hashes == hashes
    assert isinstance(removed, own.BlockRemoved)
    assert isinstance(cleared, own.AllBlocksCleared)
    assert msgspec.msgpack.encode(batch) == data


class Indexer:
    """Dynamo's indexer of blocks, in another process."""

    def __init__(self, endpoint: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        words = ["--port", str(self._port), "--block-size", str(SIZE), "--workers", f"1={endpoint}"]
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dynamo.indexer", *words],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                return json.loads(answer.read() or b"null")
        except (urllib.error.URLError, ConnectionError):
            return None

    def blocks(self) -> set[tuple[str, int]]:
        """Return the blocks that it has, each with the tier."""
        found = set[tuple[str, int]]()
        for index in (self.ask("/dump") or {}).values():
            for each in index["events"]:
                for block in each["event"]["data"]["stored"]["blocks"]:
                    found.add((each["storage_tier"], block["block_hash"]))
        return found

    def cached(self) -> Any:
        """Return how many of the tokens it finds in host memory."""
        answer = self.ask("/query", {"token_ids": TOKENS, "model_name": "default"}) or {}
        return answer.get("instances", {}).get("1", {}).get("cpu", 0)

    def says(self, text: str) -> bool:
        return text in self._log.read_text(errors="replace")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(LIMIT)


@pytest.fixture
def publisher() -> Iterator[EventPublisher]:
    made = EventPublisher("tcp://127.0.0.1:0")
    yield made
    made.close()


def test_dynamo_reads_the_events(publisher: EventPublisher, tmp_path: Path) -> None:
    """Blocks with tokens are found by tokens. Blocks that are lost, and cleared, are not."""
    pytest.importorskip("dynamo.llm", reason="ai-dynamo-runtime is not installed")
    indexer = Indexer(publisher.endpoint, tmp_path / "log")
    first = [int.from_bytes(key[-8:], "big") for key in KEYS]
    stored = events_of(changes("host", True, KEYS[:3]), describe=describe, block_size=SIZE)
    try:
        assert until(lambda: indexer.says("ready, starting recv loop"), LIMIT)

        def arrives() -> bool:
            publisher.send([*stored])
            return bool(indexer.cached() == 3 * SIZE)

        assert until(arrives, LIMIT)  # a subscription takes effect some time after it was made
        assert indexer.blocks() == {("host_pinned", number) for number in first[:3]}
        publisher.publish(changes("host", True, KEYS[3:]))  # without tokens: it is read, and unused
        publisher.publish(changes("host", False, KEYS[2:3]))
        assert until(lambda: indexer.cached() == 2 * SIZE, LIMIT)
        assert indexer.says("Block size is: 0")
        publisher.clear()
        assert until(lambda: indexer.blocks() == set(), LIMIT)
        assert not indexer.says("Failed to decode")
    finally:
        indexer.close()
