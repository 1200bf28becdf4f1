# SPDX-License-Identifier: Apache-2.0
"""A block store against a dict of bytes, by Hypothesis: saves, loads, prefetches, lookups, cancels,
deadlines, restarts and kills in any order, by any rank's part of the model, over a disk tier whose
bytes rot, whose requests wait, fail or end short, and a far tier that fails."""

from __future__ import annotations

import shutil
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_model
from support.storage_cases import FakeTier, counts_of, key_of
from support.store_model import Call, Troubled, WatchedDisk, World
from support.waits import LIMIT

from portakv.storage.eviction import FIRST
from portakv.storage.form import BlockForm
from portakv.storage.io.choose import choose
from portakv.storage.memory import Want
from portakv.storage.store import BlockStore


def of(**choices: Any) -> Any:
    """Return arguments that Hypothesis draws."""
    return {name: st.sampled_from(x) for name, x in choices.items()}


PRIORITIES = ("urgent", "normal", "background")
DEADLINES = (None, None, 0.0, 0.0, 0.002, LIMIT)
RUN: Any = {"run": st.tuples(st.integers(0, 99), st.sampled_from((1, 2, 5, 12)), st.booleans())}
SAVE = {**RUN, **of(which=(0, 1, 2), priority=PRIORITIES, deadline=DEADLINES)}
LOAD = {**SAVE, **of(missing=("raise", "skip"), by_layer=(False, True))}
SIZES = of(slots=(8, 20), staging=(1, 3, 9), host=(0, 1, 6), rank=(0, 0, 0, *range(7)))
TIERS = of(tiers=("disk", "disk", "disk far", "far"), admit=("always", "always", "second"))
STORE = {**SIZES, **TIERS, **of(full=("drop", "wait"), io=(None, "threads"))}
REQUESTS = ("EIO", "short", "flip")
FAULTS = ("far flip", "far error", "gone", "refuse", "hold")
AT: Any = {"at": st.integers(0, 1 << 30)}
FREE = precondition(lambda self: len(self.open) < 12)


def cells(form: BlockForm) -> set[tuple[int, int]]:
    """Return each head of each layer that blocks of a form have."""
    return {*product(range(*form.layers[:2]), range(*form.heads[:2]))}


class StoreModel(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.folder = world.folder / "kv"
        self.far = FakeTier("remote")
        self.open = list[Call]()
        self.contents = dict[Path, Any]()
        self.store = cast(Any, None)
        self.rotten = False
        self.loads = 0
        for cache in world.targets:
            cache.forget()

    @initialize(**STORE)
    def start(self, rank: int, io: Any, admit: Any, tiers: str, full: Any, **sizes: int) -> None:
        self.age = 0
        self.closing = False
        self.host = sizes["host"]
        self.admits_all = admit == "always"
        self.sure = self.admits_all and full == "wait"  # the other drops what waits for long
        form = self.world.form(rank)
        self.part = self.world.ranks[rank]
        self.engine = Troubled(choose((), io)[0])
        self.far.hold = self.engine.go
        capacity = sizes["slots"] * form.image_bytes
        self.disk = WatchedDisk(self.folder, capacity=capacity, admit=admit, io=self.engine)
        chosen = [getattr(self, name) for name in tiers.split()]
        self.parts = bool({*self.disk.forms(form), *self.far.forms(form)} - {form})
        memory: Any = {x: sizes[x] * self.world.form(0).image_bytes for x in ("staging", "host")}
        self.store = BlockStore(form, tiers=chosen, full=full, **memory)
        for folder, (keys, count) in self.disk.contents().items():
            before, least = self.contents.get(folder, (set(), 0))
            assert self.rotten or count < least or keys == before, "a sealed entry was lost"

    def take(self, at: int = -1) -> Call:
        call = self.open.pop(at % len(self.open))
        call.check(self.world, self.closing)
        return call

    def settle(self) -> None:
        self.engine.go.set()
        while self.open:
            self.take()
        graph = self.store.graph
        rows = self.store.rows
        until = time.monotonic() + LIMIT
        while graph.live and time.monotonic() < until:
            time.sleep(0.0005)
        with graph.lock:
            counts = counts_of(rows)
        assert not graph.live, "a deadlock"
        assert (counts["lent"], counts["free"] + counts["kept"]) == (0, len(rows.array)), "a leak"
        assert not any(queue.queued_bytes for queue in graph.queues.values())
        assert not any(slots._pins for slots in self.disk.slots()), "a leaked pin"
        assert self.rotten or graph.counts.blocks["disk", "load", "fault"] <= self.engine.fired
        assert all(cache.holds() for cache in self.world.targets), "a block of no load changed"

    @precondition(lambda self: self.age > 3)
    @rule(**STORE, **of(kill=(False, True), share=(0.0, 0.5, 1.0)))
    def restart(self, kill: bool, share: float, **store: Any) -> None:
        """Kill the process, which leaves its last requests half done, and start again."""
        self.closing = True
        self.engine.dead = kill
        self.engine.share = share
        for call in self.open if kill else ():
            call.cancel()
        self.engine.go.set()
        if not kill:
            self.store.close(LIMIT)  # which refuses if a fill was left
        self.settle()
        self.contents |= self.disk.contents()
        for number in range(self.store.rows.host):  # none is pinned: all that are kept can go
            (item,) = self.store.rows.take(1, Want(self.store.rows.row_bytes, False))
            kept = self.store.rows.keep([item], [b"new" + key_of(number)], [FIRST])
            assert kept == [True], "a leaked pin"
        if kill:
            self.disk.die()
            assert self.store.graph.close(LIMIT)
            self.engine.close()
        if store:  # it is not the end
            self.start(**store)

    @precondition(lambda self: self.age > 6)
    @rule(**RUN, **STORE, ranks=st.sampled_from(((1, 2), (5, 6, 2), (3, 4))))
    def others(self, run: Any, ranks: tuple[int, ...], rank: int, **store: Any) -> None:
        """Save the same blocks from all ranks of another split, before this one is there again."""
        for each in (*ranks, rank):
            self.restart(kill=False, share=0.0, rank=each, **store)
            if self.engine.go.is_set():
                self.save(run, 0, priority="urgent", deadline=None)
        self.undisturbed(run, 0)

    @invariant()
    def counted(self) -> None:
        self.age = self.age + 1
        self.world.steps = self.world.steps + 1

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.restart(kill=False, share=0.0)
        elif self.store:  # it failed, or Hypothesis goes no further; the caches are used again
            self.engine.go.set()
            self.store.close(LIMIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    @FREE
    @rule(**SAVE)
    def save(self, run: Any, which: int, **terms: Any) -> None:
        source = self.world.sources[which]
        size = self.world.size
        per = max(1, source.size // size)
        more = max(1, size // source.size)
        some = self.world.spread(run, per)
        blocks = [i * size // source.size + n for i in some[::per] for n in range(more)]
        keys = [key_of(i) for i in some]
        view = source.view.slice(**self.part)
        handle = self.store.save(view, blocks, keys, **terms)
        self.open.append(Call(handle, some, self.part, skip=not self.admits_all))

    @FREE
    @rule(**LOAD)
    def load(self, run: Any, which: int, **terms: Any) -> None:
        target = self.world.targets[which]
        self.loads = (self.loads + 1) % 1000
        some = self.world.spread(run)[: len(target.free) * target.size // self.world.size]
        blocks = target.lend(len(some) * self.world.size, self.loads)
        keys = [key_of(i) for i in some]
        view = target.view.slice(**self.part)
        handle = self.store.load(view, blocks, keys, **terms)
        skip = terms["missing"] == "skip"
        loose = terms["by_layer"] or self.parts
        self.open.append(Call(handle, some, self.part, skip, loose, target, blocks))

    @FREE
    @rule(**RUN)
    def ask(self, run: Any) -> None:
        some = self.world.spread(run)
        keys = [key_of(i) for i in some]
        assert 0 <= self.store.lookup(keys) <= len(some)
        if self.host:
            self.open.append(Call(self.store.prefetch(keys), some, self.part))

    @precondition(lambda self: self.open)
    @rule(**AT, **of(cancel=(False, True)))
    def end(self, at: int, cancel: bool) -> None:
        if cancel:
            self.open[at % len(self.open)].cancel()
        elif self.engine.go.is_set():
            self.take(at)

    @rule(**RUN, which=st.sampled_from((0, 1, 2)))
    def undisturbed(self, run: Any, which: int) -> None:
        """Check that known blocks are loaded, and that saved blocks are known and evict no more
        than they must."""
        self.settle()
        fired = self.engine.fired
        (first, many, apart) = run
        for key in map(key_of, self.world.spread(run)):
            parts = [x.form for x in self.disk.tier_stores if x.has([key])[0]]
            if cells(self.store.form) <= {cell for form in parts for cell in cells(form)}:
                assert self.store.lookup([key]), "what lies there in parts is not found"
        many = min(many, self.store.lookup([key_of(i) for i in self.world.spread(run)]))
        # Before the load, as a worker takes a fault from the list when it reads.
        unsound = self.rotten or any(self.far.faults.values())
        self.load((first, many, apart), which, missing="skip", by_layer=False)
        landed = self.take().handle.landed
        assert unsound or self.engine.fired > fired or landed.all(), "what was found did not land"
        before = [(slots, slots.evicted, {*slots.index}) for slots in self.disk.slots()[:1]]
        self.save((first, 5, False), which)
        call = self.take()
        keys = {key_of(i) for i in call.keys}
        full = any(x.limit - x.broken < 5 for x, *_ in before)
        if self.sure and not (full or self.far.refuse or self.engine.fired > fired):
            for slots, *_ in before:
                goes = slots.chains.next(slots.folder)
                # Its own, or what these follow; or its own went for one that comes before it.
                gone = any(keys & stored - {*one.index} for one, _, stored in before)
                refused = goes is None or goes in keys or gone
                assert refused or call.handle.landed.all(), "what was saved did not land"
            landed = zip(call.keys, call.handle.landed, strict=True)
            there = all(self.store.lookup([key_of(i)]) for i, well in landed if well)
            assert there, "what was saved is not there"
            for slots, evicted, stored in before if call.handle.landed.all() else ():
                free = slots.limit - slots.broken - len(stored)
                assert slots.evicted - evicted == max(0, len(keys - stored) - free), "a lost slot"

    # --- what goes wrong ---

    @rule(**AT, **of(kind=2 * (*REQUESTS, *FAULTS, "hold") + ("rot",)))
    def fault(self, at: int, kind: str) -> None:
        key = key_of(at % self.world.keys)
        go = self.engine.go
        if kind in REQUESTS:
            self.engine.faults[self.engine.count + at % 8] = kind
        elif kind == "gone":
            self.far.blocks.pop((self.store.form, key), None)
        elif kind == "refuse":
            self.far.refuse = not self.far.refuse
        elif kind == "hold":  # of both tiers, until it comes again
            (go.clear if go.is_set() else go.set)()
        elif kind != "rot":
            self.far.faults.setdefault(key, []).append(kind[4:])
        for path in self.folder.glob("*/slots" if at % 3 else "*/table") if kind == "rot" else ():
            if not path.stat().st_size:  # no slot is allocated yet
                continue
            self.rotten = True
            with path.open("r+b") as file:
                file.seek(at % (path.stat().st_size - 8))
                file.write(at.to_bytes(8, "big"))


SMALL = {"keys": 24, "size": 4, "layers": 3, "heads": 4, "dim": 12}  # a segment
LARGE = {"keys": 12, "size": 64, "layers": 4, "heads": 8, "dim": 128}  # four, of 256 KiB
WIDE = [pytest.param(*each, marks=pytest.mark.slow) for each in ((SMALL, 22.0), (LARGE, 1.0))]


@pytest.mark.parametrize(("shape", "times"), [(SMALL, 0.1), (LARGE, 0.02), *WIDE])
def test_any_order_of_calls(tmp_path: Path, shape: dict[str, int], times: float) -> None:
    world = World(tmp_path, **shape)
    many = max(1, int(times * settings().max_examples))
    chosen = settings(max_examples=many, stateful_step_count=50)
    run_model(cast(Any, lambda: StoreModel(world)), settings=chosen)
    assert world.steps > 40 * many
    assert all(cache.holds() for cache in world.sources)


class Quick(StoreModel):
    """A model whose loads have ended before their rule returns."""

    def load(self, *arguments: Any, **terms: Any) -> None:
        super().load(*arguments, **terms)
        self.open[-1].handle.wait()


def test_a_fault_that_a_load_takes_early_excuses_its_block(tmp_path: Path) -> None:
    """A worker reads, and takes the fault, before the caller of the load goes on."""
    model = Quick(World(tmp_path, **SMALL))
    sizes = {"slots": 8, "staging": 3, "host": 0, "rank": 0}
    model.start(**sizes, tiers="far", admit="always", full="wait", io="threads")
    model.save((0, 1, False), 0, priority="urgent", deadline=None)
    model.take()
    model.far.faults[key_of(0)] = ["flip"]
    model.undisturbed((0, 1, False), 0)
    assert not any(model.far.faults.values()), "the load met no fault"
    model.teardown()
