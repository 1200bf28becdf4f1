# SPDX-License-Identifier: Apache-2.0
"""The picture of a trace in docs/storage.md: ``python docs/images/trace.py [trace.json]``.

Without a file it makes the trace: saves into a disk and an object store in memory, and, while
they are written, an urgent load of blocks that were saved before. Needs ``portakv[bench,remote]``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from portakv import KVView
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys

PICTURE = Path(__file__).resolve().with_suffix(".svg")
SAVED, LOADED = 96, 24  # blocks of 1 MiB
COLOURS = {"load": "#2f6fde", "save": "#0f9d8f"}  # as in tiers.svg


def make(path: Path) -> None:
    """Write a trace of saves and of a load that overtakes them."""
    torch.manual_seed(0)
    caches = [torch.randn(2, SAVED + 2 * LOADED, 16, 8, 128) for _ in range(8)]
    view = KVView(caches, "layer | kv block token head dim")
    keys = prefix_keys(list(range(16 * (SAVED + LOADED))), 16)
    form = BlockForm.of(view, model="a trace")
    remote = Remote("memory://")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        os.chdir(folder)
        for first in (True, False):
            tiers = [Disk("nvme0", capacity=256 << 20), remote]
            store = BlockStore(form, staging=128 << 20, tiers=tiers, full="wait")
            if first:
                saved = store.save(view, list(range(LOADED)), keys[:LOADED])
            else:  # stored blocks are loaded while others are saved
                new = list(range(LOADED, LOADED + SAVED))
                saved = store.save(view, new, keys[LOADED:], after=keys[LOADED - 1])
                time.sleep(0.02)
                there = list(range(LOADED + SAVED, 2 * LOADED + SAVED))
                store.load(view, there, keys[:LOADED], deadline=10.0).synchronize()
            saved.synchronize()
            store.trace(path)
            store.close()


def draw(events: list[dict[str, Any]]) -> Figure:
    """A row for each worker of each link, a bar for each node, a line along each dependency."""
    links = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    rows = sorted({(links[e["pid"]], e["tid"]) for e in spans}, reverse=True)
    began = min(e["ts"] for e in spans)
    figure = Figure(figsize=(9.5, 0.34 * len(rows) + 1.1))
    axes = figure.subplots()
    for e in spans:
        row = rows.index((links[e["pid"]], e["tid"]))
        colour = COLOURS.get(e["name"], "#777777")
        span = [((e["ts"] - began) / 1e3, max(e["dur"], 50) / 1e3)]
        axes.broken_barh(span, (row - 0.36, 0.72), facecolors=colour, edgecolors="white", lw=0.4)
    begun: dict[Any, dict[str, Any]] = {}
    for e in events:
        if e["ph"] == "s":
            begun[e["id"]] = e
        elif e["ph"] == "f" and (s := begun.get(e["id"])):
            ends = [
                ((x["ts"] - began) / 1e3, rows.index((links[x["pid"]], x["tid"]))) for x in (s, e)
            ]
            axes.plot(*zip(*ends, strict=True), color="#555555", lw=0.4, alpha=0.6, zorder=3)
    axes.set_yticks(range(len(rows)), [f"{link}, worker {worker}" for link, worker in rows])
    for name, colour in COLOURS.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(words: list[str]) -> None:
    """Draw a trace, the one that is named or a new one."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(words[0]) if words else Path(folder, "trace.json").resolve()
        if not words:
            make(path)
        events = json.loads(path.read_text())["traceEvents"]
    with matplotlib.rc_context({"svg.hashsalt": "portakv", "font.size": 9}):
        draw(events).savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
