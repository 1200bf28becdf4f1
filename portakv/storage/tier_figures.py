# SPDX-License-Identifier: Apache-2.0
"""Figures for operators from what tier stores report about themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from portakv.graph.trace import Figures


def tier_figures(tiers: Iterable[Mapping[str, Any]]) -> Figures:
    """Return the slots of folders, and which object stores are left alone.

    ``tiers``: what `TierStore.statistics` returns, each with the ``form`` of its blocks. A tier
    store of another package adds no figures.
    """
    slots: list[dict[str, str | float]] = []
    evicted: list[dict[str, str | float]] = []
    left_alone: list[dict[str, str | float]] = []
    for tier in tiers:
        form = tier["form"]
        if "left_alone" in tier:
            url = str(tier.get("url", ""))
            left_alone.append({"form": form, "url": url, "value": bool(tier["left_alone"])})
        for place, facts in tier.items():
            if not isinstance(facts, Mapping) or "broken" not in facts:
                continue
            folder = os.path.dirname(place)  # which has a folder for each form
            free = facts["count"] - facts["used"] - facts["broken"]
            states = {"used": facts["used"], "free": free, "broken": facts["broken"]}
            for state, value in states.items():
                slots.append({"form": form, "folder": folder, "state": state, "value": value})
            evicted.append({"form": form, "folder": folder, "value": facts["evicted"]})
    return {"disk_slots": slots, "disk_evicted_total": evicted, "remote_left_alone": left_alone}
