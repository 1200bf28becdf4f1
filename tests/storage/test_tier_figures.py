# SPDX-License-Identifier: Apache-2.0
"""Figures for operators from what tier stores report."""

from __future__ import annotations

from portakv.storage.tiers.base import tier_figures

SLOTS = {
    "io": "threads",
    "used": 5,
    "count": 9,
    "limit": 16,
    "configured": 20,
    "broken": 1,
    "missing": 11,
    "free_bytes": 4096,
    "lost": False,
    "writable": True,
    "evicted": 3,
}


def test_slots_are_counted_by_state_and_folder() -> None:
    """Each folder has a folder for each form, which the label `form` names."""
    figures = tier_figures([{"tier": "disk", "form": "a", "/kv/0f": SLOTS, "/other/0f": SLOTS}])
    slots = {(x["folder"], x["state"]): x["value"] for x in figures["disk_slots"]}
    states = {"used": 5, "free": 3, "broken": 1}
    assert slots == {(x, state): n for x in ("/kv", "/other") for state, n in states.items()}
    assert [x["value"] for x in figures["disk_evicted_total"]] == [3, 3]
    assert figures["remote_left_alone"] == []


def test_how_full_and_how_sound_folders_are() -> None:
    """Two forms share a folder. One of them is only read there, and has no part of its capacity."""
    other = {**SLOTS, "used": 4, "configured": 16, "missing": 0}
    lost = {**SLOTS, "free_bytes": None, "lost": True}
    read = {**SLOTS, "writable": False, "missing": 0}
    figures = tier_figures(
        [
            {"tier": "disk", "form": "a", "/kv/0f": SLOTS, "/other/0f": lost},
            {"tier": "disk", "form": "b", "/kv/1f": other},
            {"tier": "disk", "form": "c", "/kv/2f": read},
        ]
    )
    assert figures["disk_fill_ratio"] == [
        {"folder": "/kv", "value": 0.5},
        {"folder": "/other", "value": 0.25},
    ]
    assert figures["disk_free_bytes"] == [{"folder": "/kv", "value": 4096}]
    by_form = {(x["form"], x["folder"]): x["value"] for x in figures["disk_missing_slots"]}
    assert by_form == {("a", "/kv"): 11, ("a", "/other"): 11, ("b", "/kv"): 0, ("c", "/kv"): 0}
    assert [x["value"] for x in figures["disk_lost"]] == [False, True, False, False]


def test_an_object_store_says_whether_it_is_left_alone() -> None:
    tiers = [
        {"tier": "remote", "form": "a", "url": "s3://b", "left_alone": True, "error": "403"},
        {"tier": "another package's", "form": "a", "depth": 3},
    ]
    figures = tier_figures(tiers)
    assert figures["remote_left_alone"] == [{"form": "a", "url": "s3://b", "value": True}]
    assert figures["disk_slots"] == []
