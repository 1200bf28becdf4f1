# SPDX-License-Identifier: Apache-2.0
"""Figures for operators from what tier stores report about themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from portakv.graph.trace import Figures


def tier_figures(tiers: Iterable[Mapping[str, Any]]) -> Figures:
    """Return the slots of folders, how full and how sound these are, and which object stores are
    left alone.

    ``tiers``: what `TierStore.statistics` returns, each with the ``form`` of its blocks. A tier
    store of another package adds no figures.
    """
    tiers = [*tiers]
    folders = [*_folders_of(tiers)]
    left_alone: list[dict[str, str | float]] = [
        {
            "form": tier["form"],
            "url": str(tier.get("url", "")),
            "value": bool(tier["left_alone"]),
        }
        for tier in tiers
        if "left_alone" in tier
    ]
    slots: list[dict[str, str | float]] = []
    fill = dict[str, float]()  # of all forms that the store saves there
    free_bytes = dict[str, float]()
    for form, folder, facts in folders:
        free = facts["count"] - facts["used"] - facts["broken"]
        states = {"used": facts["used"], "free": free, "broken": facts["broken"]}
        for state, value in states.items():
            slots.append({"form": form, "folder": folder, "state": state, "value": value})
        if facts["writable"]:
            fill[folder] = fill.get(folder, 0.0) + facts["used"] / facts["configured"]
        if facts["free_bytes"] is not None:
            free_bytes[folder] = facts["free_bytes"]
    figures: Figures = {
        "disk_slots": slots,
        "disk_fill_ratio": [{"folder": x, "value": share} for x, share in fill.items()],
        "disk_free_bytes": [{"folder": x, "value": free} for x, free in free_bytes.items()],
        "remote_left_alone": left_alone,
    }
    names = {"disk_evicted_total": "evicted", "disk_missing_slots": "missing", "disk_lost": "lost"}
    for name, fact in names.items():
        figures[name] = [
            {"form": form, "folder": folder, "value": facts[fact]}
            for form, folder, facts in folders
        ]
    return figures


def _folders_of(
    tiers: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the form, the folder and the facts of each folder of slots."""
    for tier in tiers:
        for place, facts in tier.items():
            if isinstance(facts, Mapping) and "broken" in facts:
                yield tier["form"], os.path.dirname(place), facts  # a folder has one for each form
