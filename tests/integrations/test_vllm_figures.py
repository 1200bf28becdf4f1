# SPDX-License-Identifier: Apache-2.0
"""The connector's figures and events, without vLLM: its classes are stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from portakv.integrations.vllm_events import Kinds, are_wanted, events_of
from portakv.integrations.vllm_metrics import SUPPORTED, Figures, stats_of
from portakv.serving import Described, Group, Ledger
from portakv.serving.local import LocalIndex
from portakv.storage import prefix_keys
from portakv.storage.changes import Change


def test_counters_are_reported_as_what_they_have_grown_by() -> None:
    """And once in an interval."""
    time = [0.0]
    counts = {"loads": 3, "requests": 7, "steps/worker": 0.0}
    figures = Figures(1.0, lambda: time[0])
    assert figures.take(lambda: counts) == {}
    time[0] = 1.0
    assert figures.take(lambda: counts) == {"loads": 3}
    counts["loads"] = 5
    counts["steps/worker"] = 4
    assert figures.take(lambda: counts) == {}
    time[0] = 2.0
    assert figures.take(lambda: counts) == {"loads": 2, "steps/worker": 4}
    time[0] = 3.0
    assert figures.take(lambda: counts) == {}


@pytest.mark.skipif(SUPPORTED, reason="vLLM is installed")
def test_a_release_without_figures_has_none() -> None:
    assert stats_of({"loads": 1}) is None


@dataclass
class Stored:
    """vLLM's event of blocks that were stored."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None


@dataclass
class Removed:
    """vLLM's event of blocks that were lost."""

    block_hashes: list[int]
    medium: str


KINDS = Kinds(Stored, Removed)


def changes(tier: str, stored: bool, keys: list[bytes]) -> list[Change]:
    return [Change(number, key, tier, stored) for number, key in enumerate(keys)]


def test_blocks_that_follow_each_other_are_one_event() -> None:
    """A block that nothing describes is no event; it may have been stored by an earlier engine."""
    tokens = [*range(100, 124)]
    keys = prefix_keys(tokens, 8)
    ledger = Ledger(8, [Group(8)], 1, LocalIndex())
    ledger.describe_blocks()
    adapter = SimpleNamespace(lora_int_id=4, lora_name="adapter")
    about = SimpleNamespace(lora_request=adapter)
    ledger.add("a", tokens, about=about)
    ledger.scheduled("a", 0, 24, ((1, 2, 3),), replaced=True)
    assert ledger.described(keys[1]) == Described(keys[0], tuple(tokens[8:16]), about)
    unknown = prefix_keys(range(8), 8)
    made = events_of(
        [
            *changes("host", True, keys[:2]),
            *changes("disk", True, [keys[0]]),
            *changes("disk", True, [keys[2]]),
            *changes("disk", True, unknown),
            *changes("host", False, keys[:2]),
        ],
        ledger.described,
        8,
        KINDS,
    )
    numbers = [int.from_bytes(key, "big") & ((1 << 64) - 1) for key in keys]  # as vLLM's
    assert made == [
        Stored(numbers[:2], None, tokens[:16], 8, 4, "CPU", "adapter"),
        Stored([numbers[0]], None, tokens[:8], 8, 4, "STORAGE", "adapter"),
        Stored([numbers[2]], numbers[1], tokens[16:], 8, 4, "STORAGE", "adapter"),
        Removed(numbers[:2], "CPU"),
    ]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (SimpleNamespace(), False),
        (SimpleNamespace(kv_events_config=None), False),
        (SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True)), True),
    ],
)
def test_events_are_made_if_the_engine_publishes_them(config: Any, wanted: bool) -> None:
    assert are_wanted(config, KINDS) is wanted
    assert not are_wanted(config, None)
    assert events_of(changes("host", False, [b"key"]), lambda _: None, 8, None) == []
