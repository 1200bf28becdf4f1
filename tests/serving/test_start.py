# SPDX-License-Identifier: Apache-2.0
"""Copies before an engine's first step: they run both ways, and leave the caches as they are."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ready
from support.model_worker import caches

from portakv.errors import StoreError
from portakv.serving import worker
from portakv.storage import BlockForm, BlockStore


def random_caches(blocks: int, size: int) -> tuple[torch.Tensor, Any]:
    memory, view = caches(blocks, size)
    drawn = torch.Generator(device="cpu").manual_seed(4)
    memory.view(torch.uint8).random_(0, 256, generator=drawn)
    return memory, view


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(("engines", "stored"), [(8, 8), (4, 8), (8, 4), (4, 12)])
@pytest.mark.parametrize("blocks", [1, 12])
def test_the_caches_keep_their_bytes(
    monkeypatch: pytest.MonkeyPatch, by_layer: bool, engines: int, stored: int, blocks: int
) -> None:
    """Whatever the sizes of the engine's blocks and of the stored ones."""
    made = list[tuple[str, int]]()

    class Recording(BlockStore):
        def save(self, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
            made.append(("save", len(keys)))
            return super().save(view, blocks, keys, **terms)

        def load(self, view: Any, blocks: Any, keys: Any, **terms: Any) -> Any:
            made.append(("load", len(keys)))
            return super().load(view, blocks, keys, **terms)

    monkeypatch.setattr(worker, "BlockStore", Recording)
    memory, view = random_caches(blocks, engines)
    before = memory.view(torch.uint8).clone()
    form = BlockForm.of(view, "model", block_size=stored)
    worker.warm_up(view, form, by_layer)
    assert torch.equal(memory.view(torch.uint8), before)
    together = math.lcm(engines, stored)  # tokens of whole blocks of both
    some = blocks * engines // together
    counts = {min(1, some), some} - {0}
    expected = [count * together // stored for count in sorted(counts) for _ in ("save", "load")]
    assert [count for _, count in made] == expected
    assert [name for name, _ in made] == ["save", "load"] * len(counts)


def test_a_store_that_cannot_be_opened_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise StoreError("Expected memory, got none.")

    monkeypatch.setattr(worker, "BlockStore", fail)
    _, view = caches(4, 8)
    with caplog.at_level(logging.WARNING):
        worker.warm_up(view, BlockForm.of(view, "model"))
    assert "will be slow: Expected memory, got none." in caplog.text


FIRST = """
import sys, threading, torch
from portakv import KVView
from portakv.serving import Group, GroupCache, WorkerSide, SchedulerSide, Plan
from portakv.serving.local import GroupView, LocalIndex, StoreTerms
from portakv.serving.worker import warm_up
tensors = [torch.ones(32, 16, 2, 8, device="cpu") for _ in range(3)]
view = KVView(tensors, "layer | block token head dim")
index = LocalIndex.of("engine")
folder = sys.argv[1]
terms = StoreTerms(folder, 1 << 20, host=0, staging=1 << 20) if folder else StoreTerms(host=1 << 20)
parts = index.open([GroupView(view)], terms, "model", 32)
if sys.argv[2] == "warm":
    warm_up(view, parts[0].form)
worker_side = WorkerSide([GroupCache(view, parts[0])])
scheduler_side = SchedulerSide(32, (Group(16),), 1, index)
before = {*sys.modules}
tokens = [*range(96)]


def step(plan):
    worker_side.stop(plan)
    worker_side.load(plan)
    worker_side.save(plan)
    scheduler_side.take(worker_side.report())
    worker_side.ended()


def end():
    while scheduler_side.statistics()["jobs"]:
        step(scheduler_side.plan())


scheduler_side.add("a", tokens)
assert scheduler_side.leading("a", 0) == 0
scheduler_side.scheduled("a", 0, 96, (tuple(range(6)),), True)
step(scheduler_side.plan())
end()
scheduler_side.finished("a")
scheduler_side.add("b", [*tokens, 1])
assert scheduler_side.leading("b", 0) == 96
scheduler_side.allocated("b", 0, 96, (tuple(range(8, 15)),))
step(scheduler_side.plan())
end()
assert scheduler_side.statistics()["landed_blocks"] == 3
print(*sorted({*sys.modules} - before))
index.close()
"""


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_first_save_and_load_import_nothing(tmp_path: Path, tier: str, start: str) -> None:
    """All backends of a device are asked and checked when the engine starts."""
    folder = str(tmp_path / "store") if tier == "disk" else ""
    done = ready.run("-c", FIRST, folder, start)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    if start == "warm":
        assert imported == []
    else:
        assert "portakv.backends.reference" in imported
