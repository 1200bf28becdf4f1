# SPDX-License-Identifier: Apache-2.0
"""The scheduler side, step by step, and by random walks against a model of an engine."""

from __future__ import annotations

import ast
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import pytest
from support.serving_faults import GivenBackAtOnce, NotHeld, NotStopped
from support.serving_model import Draw, Engine, Holder, Pool

from portakv.errors import InvalidTerms
from portakv.serving import Group, Job, Plan, Report, SchedulerSide
from portakv.serving.plan import NO_PLAN, Blocks
from portakv.serving.scheduler import NO_STATES, PATIENCE
from portakv.storage import prefix_keys

WALKS = 10_000  # in all, in the default run
PARTS = 20
STEPS = 12  # of a walk, before it serves the requests that are left
TOKENS = [*range(100, 140)]


@pytest.mark.parametrize("module", ["scheduler", "plan", "handover"])
def test_it_imports_no_torch_and_starts_no_thread(module: str) -> None:
    """Nor do the modules of what it tells workers."""
    names = set[str]()
    text = files("portakv.serving").joinpath(f"{module}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert "__future__" in names
    packages = {name.partition(".")[0] for name in names}
    assert packages.isdisjoint({"torch", "threading", "concurrent", "asyncio", "multiprocessing"})


@cache
def walked(part: int) -> Counter[str]:
    """Return what the walks of a part counted."""
    counts = Counter[str]()
    for seed in range(part * WALKS // PARTS, (part + 1) * WALKS // PARTS):
        engine = Engine(SchedulerSide, seed)
        engine.run(STEPS)
        counts.update(engine.scheduler_side.counts)
    return counts


def test_walks_load_save_and_fail() -> None:
    """Otherwise they show nothing of these. It stands before the walks, next to the first part."""
    counts = walked(0)
    assert counts["saves"] > 1000
    assert counts["landed_blocks"] > 100
    assert counts["failed_loads"] > 10
    assert counts["promised"] > counts["landed_blocks"]


@pytest.mark.parametrize("part", range(PARTS))
def test_any_walk_of_an_engine(part: int) -> None:
    """No block in two hands, no end twice, and every request ends."""
    walked(part)


@pytest.mark.full
def test_longer_walks_of_an_engine() -> None:
    for seed in range(WALKS, 2 * WALKS):
        Engine(SchedulerSide, seed).run(5 * STEPS)


# --- walks find a scheduler side with a bug


class TooEarly(SchedulerSide):
    """A scheduler side that saves blocks before all their rows exist."""

    def scheduled(
        self,
        request: str,
        computed: int,
        until: int,
        blocks: Blocks = (),
        replaced: bool = False,
        states: Mapping[int, Mapping[int, int]] = NO_STATES,
    ) -> None:
        super().scheduled(request, computed, until + self._size, blocks, replaced, states)


class OfferedAgain(SchedulerSide):
    """A scheduler side that offers blocks again which did not land."""

    def take(self, report: Report) -> None:
        super().take(report)
        self._failed.clear()
        for request in self._requests.values():
            request.limit = sys.maxsize


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (GivenBackAtOnce, "a save read rows of something else"),
        (NotStopped, "a save read rows of something else"),
        (NotHeld, "a save read rows of something else"),
        (TooEarly, "a save read rows of something else"),
        (OfferedAgain, "a request loads again and again"),
    ],
)
def test_walks_find_a_scheduler_side_with_a_bug(made: type[SchedulerSide], what: str) -> None:
    def walks() -> None:
        for seed in range(400):
            Engine(made, seed).run(STEPS)

    with pytest.raises(AssertionError, match=what):
        walks()


# --- step by step


class Known:
    """An index of given keys. ``answers``: whether it knows. ``queried``: how many keys, in all."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        self.keys = {*keys}
        self.answers = True
        self.losses = 0
        self.queried = 0

    def lose(self, key: bytes) -> None:
        """Forget a key."""
        self.keys.remove(key)
        self.losses += 1

    def leading(self, keys: Sequence[bytes], first: int = 0) -> int | None:
        self.queried += len(keys)
        if not self.answers:
            return None
        return next((n for n, key in enumerate(keys) if key not in self.keys), len(keys))

    def has(self, key: bytes, states: bool = True) -> bool:
        return key in self.keys


def landed(scheduler_side: SchedulerSide, job: Job, missing: frozenset[int] = frozenset()) -> None:
    """Report the end of a load by one worker."""
    report = Report()
    report.end(job.number, missing)
    scheduler_side.take(report)


def stored(scheduler_side: SchedulerSide, job: Job) -> None:
    """Report the end of a save by one worker."""
    report = Report()
    report.released[job.number] += 1
    report.end(job.number)
    scheduler_side.take(report)


def test_a_waiting_request_is_not_looked_up_again() -> None:
    """Only from the first block on that was not found, until a block was lost."""
    keys = prefix_keys(TOKENS[:40], 8)
    index = Known(keys[:3])
    scheduler_side = SchedulerSide(8, [Group(4)], 1, index)
    scheduler_side.add("a", TOKENS[:40])
    assert scheduler_side.leading("a", 0) == 24
    assert index.queried == 4
    assert scheduler_side.leading("a", 0) == 24
    assert index.queried == 5
    index.keys.add(keys[3])
    assert scheduler_side.leading("a", 0) == 32
    assert scheduler_side.leading("a", 0) == 32
    assert index.queried == 6
    index.lose(keys[1])
    assert scheduler_side.leading("a", 0) == 8
    assert index.queried == 10
    assert scheduler_side.leading("a", 8) == 0


def test_blocks_of_a_window_are_held_while_a_save_reads_them() -> None:
    held = list[int]()

    class Holder:
        def hold(self, blocks: Sequence[int]) -> None:
            held.extend(blocks)

        def give_back(self, blocks: Sequence[int]) -> None:
            for block in blocks:
                held.remove(block)

    groups = [Group(8), Group(8, 16)]
    scheduler_side = SchedulerSide(8, groups, 1, Known(), holder=Holder())
    scheduler_side.add("a", TOKENS[:16])
    scheduler_side.allocated("a", 0, 0, ((), ()))
    scheduler_side.scheduled("a", 0, 16, ((1, 2), (3, 4)), replaced=True)
    (job,) = scheduler_side.plan().saves
    assert held == [3, 4]
    assert scheduler_side.retains
    report = Report()
    report.released[job.number] += 1
    scheduler_side.take(report)
    assert held == []
    assert not scheduler_side.retains


def test_a_save_that_no_worker_knows_holds_nothing() -> None:
    """A request is preempted in the step in which its save was planned."""
    pool = Pool(Draw(random.Random(0)))
    blocks = pool.take(1) or []
    scheduler_side = SchedulerSide(8, [Group(8, 8)], 1, Known(), holder=Holder(pool))
    scheduler_side.add("a", TOKENS[:9])
    scheduler_side.scheduled("a", 0, 8, (tuple(blocks),), replaced=True)
    pool.release(blocks)
    assert blocks[0] not in pool.free
    scheduler_side.preempted("a")
    assert blocks[0] in pool.free
    assert scheduler_side.plan() is NO_PLAN
    assert Plan() == NO_PLAN


def test_what_is_stored_is_offered_without_the_last_token() -> None:
    keys = prefix_keys(TOKENS[:32], 8)
    scheduler_side = SchedulerSide(8, [Group(4)], 1, Known(keys))
    scheduler_side.add("a", TOKENS[:32])
    scheduler_side.add("b", TOKENS[:33])
    assert scheduler_side.leading("a", 0) == 24
    assert scheduler_side.leading("b", 0) == 32
    assert scheduler_side.leading("b", 8) == 24
    assert scheduler_side.leading("b", 32) == 0


def test_a_load_touches_no_block_that_the_engine_has_computed() -> None:
    """The engine's blocks of 4 end inside a stored block of 8: its first half is not written."""
    keys = prefix_keys(TOKENS[:32], 8)
    scheduler_side = SchedulerSide(8, [Group(4)], 1, Known(keys))
    scheduler_side.add("a", TOKENS)
    assert scheduler_side.leading("a", 12) == 20
    scheduler_side.allocated("a", 12, 20, ((10, 11, 12, 13, 14, 15, 16, 17),))
    (load,) = scheduler_side.plan().loads
    assert load.keys == tuple(keys[1:4])
    assert load.after == keys[0]
    assert load.first == 1
    assert load.blocks == ((-1, 13, 14, 15, 16, 17),)


def test_a_save_begins_where_a_block_of_the_engine_begins() -> None:
    """Stored blocks of 4, of which the first is known, in the engine's blocks of 8."""
    keys = prefix_keys(TOKENS[:12], 4)
    scheduler_side = SchedulerSide(4, [Group(8)], 1, Known(keys[:1]))
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, 0, ((5, 6),))
    scheduler_side.scheduled("a", 0, 12)
    (save,) = scheduler_side.plan().saves
    assert save.keys == tuple(keys)
    assert save.first == 0
    assert save.after is None
    assert save.blocks == ((5, 6),)


def test_a_block_is_saved_once() -> None:
    """By the first of two requests, and not again when it is stored."""
    index = Known()
    scheduler_side = SchedulerSide(8, [Group(8)], 1, index)
    for name in ("a", "b"):
        scheduler_side.add(name, TOKENS[:16])
        scheduler_side.allocated(name, 0, 0, ((1, 2),))
        scheduler_side.scheduled(name, 0, 16)
    (save,) = scheduler_side.plan().saves
    assert save.request == "a"
    index.keys |= {*save.keys}
    stored(scheduler_side, save)
    assert not scheduler_side.finished("a")
    assert not scheduler_side.finished("b")
    scheduler_side.add("c", TOKENS[:16])
    scheduler_side.allocated("c", 0, 0, ((1, 2),))
    scheduler_side.scheduled("c", 0, 16)
    assert scheduler_side.plan().saves == []


def test_a_block_that_did_not_land_is_saved_anew_and_offered_then() -> None:
    keys = prefix_keys(TOKENS[:24], 8)
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(keys))
    scheduler_side.add("a", TOKENS)
    assert scheduler_side.leading("a", 0) == 24
    scheduler_side.allocated("a", 0, 24, ((1, 2, 3),))
    landed(scheduler_side, scheduler_side.plan().loads[0], frozenset([1]))
    scheduler_side.add("b", TOKENS)
    assert scheduler_side.leading("a", 0) == 8
    assert scheduler_side.leading("b", 0) == 8

    scheduler_side.scheduled("a", 8, 24)
    (save,) = scheduler_side.plan().saves
    assert save.keys == tuple(keys[1:2])
    stored(scheduler_side, save)
    assert scheduler_side.leading("b", 0) == 24
    assert scheduler_side.leading("a", 0) == 8  # not to the same request again


def test_an_answer_is_waited_for_in_vain_only_so_long() -> None:
    now = [0.0]
    index = Known(prefix_keys(TOKENS[:16], 8))
    index.answers = False
    scheduler_side = SchedulerSide(8, [Group(8)], 1, index, lambda: now[0])
    scheduler_side.add("a", TOKENS)
    assert scheduler_side.leading("a", 0) is None
    now[0] += PATIENCE / 2
    assert scheduler_side.leading("a", 0) is None
    now[0] += PATIENCE
    assert scheduler_side.leading("a", 0) == 0
    assert scheduler_side.statistics()["unanswered"] == 1
    index.answers = True
    assert scheduler_side.leading("a", 0) == 16


def test_a_request_is_held_until_its_blocks_are_released() -> None:
    """By all workers; a name that is in use cannot be given again."""
    scheduler_side = SchedulerSide(8, [Group(8)], 2, Known())
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, 0, ((1, 2),))
    scheduler_side.scheduled("a", 0, 16)
    (save,) = scheduler_side.plan().saves
    assert scheduler_side.finished("a")
    assert scheduler_side.plan().retained == ["a"]
    with pytest.raises(InvalidTerms, match="'a', which is in use"):
        scheduler_side.add("a", TOKENS)
    report = Report()
    report.released[save.number] += 1
    scheduler_side.take(report)
    scheduler_side.take(report)
    scheduler_side.freed(["a"])
    scheduler_side.add("a", TOKENS)


def test_a_request_of_which_one_worker_still_reads_is_held() -> None:
    scheduler_side = SchedulerSide(8, [Group(8)], 2, Known())
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, 0, ((1, 2),))
    scheduler_side.scheduled("a", 0, 16)
    (save,) = scheduler_side.plan().saves
    one = Report()
    one.released[save.number] += 1
    scheduler_side.take(one)
    assert scheduler_side.finished("a")


def test_a_request_that_ends_during_its_load_is_not_held() -> None:
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(prefix_keys(TOKENS[:16], 8)))
    scheduler_side.add("a", TOKENS)
    scheduler_side.leading("a", 0)
    scheduler_side.allocated("a", 0, 16, ((1, 2),))
    (load,) = scheduler_side.plan().loads
    assert not scheduler_side.finished("a")
    assert scheduler_side.statistics()["requests"] == 1
    landed(scheduler_side, load)
    assert scheduler_side.statistics()["requests"] == 0


def test_a_preempted_request_stops_its_saves_also_those_not_planned_yet() -> None:
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known())
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, 0, ((1, 2),))
    scheduler_side.scheduled("a", 0, 8)
    (save,) = scheduler_side.plan().saves
    scheduler_side.scheduled("a", 8, 16)
    scheduler_side.preempted("a")
    plan = scheduler_side.plan()
    assert plan.saves == []
    assert plan.stop == [save.number]
    assert not scheduler_side.finished("a")


def test_rows_that_left_a_window_are_not_saved() -> None:
    """Full attention, and layers with a window of 8: their first blocks are gone at the resume."""
    scheduler_side = SchedulerSide(8, [Group(8), Group(4, window=8)], 1, Known())
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 16, 0, ((1, 2, 3), (-1, -1, -1, -1, 5, 6)))
    scheduler_side.scheduled("a", 16, 24)
    (save,) = scheduler_side.plan().saves
    assert save.keys == tuple(prefix_keys(TOKENS[:24], 8)[2:])
    assert save.blocks == ((3,), (5, 6))


@pytest.mark.parametrize(
    ("size", "group"), [(6, Group(4)), (0, Group(4)), (16, Group(4, window=8))]
)
def test_sizes_that_do_not_fit_are_refused(size: int, group: Group) -> None:
    with pytest.raises(InvalidTerms, match="Expected stored blocks of"):
        SchedulerSide(size, [group], 1, Known())


def test_a_stored_block_fits_into_a_block_that_is_longer_than_its_window() -> None:
    """The engine keeps that block as a whole."""
    SchedulerSide(32, [Group(32, window=5), Group(32, states="last")], 1, Known())
    with pytest.raises(InvalidTerms, match="at most 32 tokens"):
        SchedulerSide(64, [Group(32, window=5)], 1, Known())


def test_a_salt_and_an_extra_keep_requests_apart() -> None:
    keys = prefix_keys(TOKENS[:16], 8)
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(keys))
    scheduler_side.add("plain", TOKENS)
    scheduler_side.add("salted", TOKENS, salt=b"tenant")
    scheduler_side.add("image", TOKENS, extra={1: b"an image"})
    assert scheduler_side.leading("plain", 0) == 16
    assert scheduler_side.leading("salted", 0) == 0
    assert scheduler_side.leading("image", 0) == 8


def test_what_was_forgotten_is_neither_offered_nor_saved() -> None:
    """Requests of before go on without; the same tokens have other keys after that."""
    index = Known()
    scheduler_side = SchedulerSide(8, [Group(8)], 1, index)
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, 0, ((1, 2, 3),))
    scheduler_side.scheduled("a", 0, 8)
    (first,) = scheduler_side.plan().saves
    scheduler_side.scheduled("a", 8, 16)  # planned, and not begun
    assert scheduler_side.forget()
    scheduler_side.scheduled("a", 16, 24)
    assert scheduler_side.plan().saves == []
    stored(scheduler_side, first)
    index.keys |= {*first.keys}
    scheduler_side.preempted("a")
    assert scheduler_side.leading("a", 0) == 0
    scheduler_side.add("b", TOKENS)
    assert scheduler_side.leading("b", 0) == 0
    scheduler_side.allocated("b", 0, 0, ((1, 2, 3),))
    scheduler_side.scheduled("b", 0, 16)
    (save,) = scheduler_side.plan().saves
    assert not {*save.keys} & {*first.keys}


def test_a_load_in_flight_brings_what_was_forgotten() -> None:
    """The engine is told that its reset was not whole."""
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(prefix_keys(TOKENS, 8)))
    scheduler_side.add("a", TOKENS)
    scheduler_side.allocated("a", 0, scheduler_side.leading("a", 0) or 0, ((1, 2, 3),))
    (load,) = scheduler_side.plan().loads
    assert not scheduler_side.forget()
    report = Report()
    report.end(load.number)
    scheduler_side.take(report)
    assert scheduler_side.forget()


def test_requests_that_are_not_known_are_left_alone() -> None:
    """Never added, or ended before a hook of the engine names them."""
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(prefix_keys(TOKENS, 8)))
    assert scheduler_side.leading("a", 0) == 0
    scheduler_side.allocated("a", 0, 0, ((1, 2),))
    scheduler_side.scheduled("a", 0, 16)
    scheduler_side.preempted("a")
    assert not scheduler_side.finished("a")
    assert scheduler_side.plan() == Plan()


def test_a_request_that_ends_during_its_load_announces_no_blocks() -> None:
    """Else an engine would wait for them before it preempts, as long as the load takes."""
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(prefix_keys(TOKENS, 8)))
    scheduler_side.add("a", TOKENS)
    scheduler_side.leading("a", 0)
    scheduler_side.allocated("a", 0, 16, ((1, 2),))
    assert not scheduler_side.finished("a")
    assert not scheduler_side.retains


def test_an_earlier_load_of_a_preempted_request_ends_as_a_load() -> None:
    keys = prefix_keys(TOKENS, 8)
    scheduler_side = SchedulerSide(8, [Group(8)], 1, Known(keys))
    scheduler_side.add("a", TOKENS)
    loads = list[Job]()
    for _ in range(2):
        scheduler_side.leading("a", 0)
        scheduler_side.allocated("a", 0, 16, ((1, 2),))
        loads += scheduler_side.plan().loads
        scheduler_side.preempted("a")
    stored = scheduler_side.statistics().get("stored_blocks")
    for load in loads:
        report = Report()
        report.end(load.number, frozenset([1]) if load is loads[0] else frozenset())
        scheduler_side.take(report)
    counts = scheduler_side.statistics()
    assert counts.get("stored_blocks") == stored
    assert (counts["landed_blocks"], counts["failed_loads"]) == (3, 1)


def test_reports_of_workers_add_up() -> None:
    one = Report()
    one.end(1, frozenset([0]))
    one.released[2] += 1
    two = Report()
    two.end(1, frozenset([3]))
    two.end(2, frozenset([1]))
    both = one.merged(two)
    assert both.missing == {1: frozenset([0, 3]), 2: frozenset([1])}
    assert both.ends == {1: 2, 2: 1}
    assert both.released == {2: 1}
