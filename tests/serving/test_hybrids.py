# SPDX-License-Identifier: Apache-2.0
"""Models whose layers are in several groups: a stored prefix is all of them at one position."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import pytest
from support import hybrid_rows
from support.hybrid_model import Draw, Wrong, walk
from support.hybrid_rows import FAMILIES, UNDIVIDED, Part, Rows

from portakv.errors import InvalidTerms
from portakv.serving import Group, Job, Report, SchedulerSide, Validity, WorkerSide
from portakv.serving.local import LocalIndex
from portakv.serving.plan import NO_PLAN
from portakv.storage import prefix_keys
from portakv.view import KVView

#: The ranks of engines that share a store server, by turns.
RANKS = ((2,), (2, 1), (4, 2), (1, 4))
#: The same where states are not divided by head.
EQUAL = ((2,), (2, 2), (4, 4), (1, 1))
#: Families of which walks of ranks are in the default run.
USUAL = ("GDN hybrid", "Mamba 2 hybrid", "window + full", "chunked + full", "MLA + indexer")
OTHERS = ("GDN hybrid", "Mamba 2 hybrid", "MLA + indexer", "MLA window compressed")
#: Walks of a family with a store here, and with a server: 5,040 of all families.
MANY = 420
OF_RANKS = 140
PIECES = 10


@pytest.mark.parametrize("family", FAMILIES)
def test_walks(family: str) -> None:
    """The controls below say whether walks load."""
    assert walks(family, range(2))["stored_blocks"]


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        pytest.param(family, seed, marks=() if family in USUAL else pytest.mark.full)
        for seed, family in enumerate(FAMILIES, 3)
    ],
)
def test_walks_of_ranks(family: str, seed: int) -> None:
    assert walks(family, range(seed, seed + 1), ranks_of(family))["stored_blocks"]


@pytest.mark.full
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_walks(family: str, piece: int) -> None:
    first = 10_000 + piece * MANY
    counts = walks(family, range(first, first + MANY // PIECES))
    check_counts(counts, MANY // PIECES)
    assert counts["preempted"] > 0


@pytest.mark.full
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_walks_of_ranks(family: str, piece: int) -> None:
    first = 10_000 + piece * OF_RANKS
    counts = walks(family, range(first, first + OF_RANKS // PIECES), ranks_of(family))
    check_counts(counts, OF_RANKS // PIECES)


def ranks_of(family: str) -> Sequence[Sequence[int]]:
    """Return the ranks of engines by turns."""
    return EQUAL if family in UNDIVIDED else RANKS


def walks(family: str, seeds: range, ranks: Sequence[Sequence[int]] = ((),)) -> Counter[str]:
    """Walk, and return what was counted."""
    counts = Counter[str]()
    for seed in seeds:
        counts += walk(seed, family, ranks=ranks[seed % len(ranks)])
    return counts


def check_counts(counts: Counter[str], least: int) -> None:
    """Check that walks prove something."""
    for name in ("loaded tokens", "landed_blocks", "stored_blocks", "checked blocks"):
        assert counts[name] > least


class Faulty(WorkerSide):
    """A worker side with a fault in one group."""

    group: int

    def is_faulty(self, number: int) -> bool:
        """Return whether a cache is the first one of the group."""
        return self._numbers.index(self.group) == number


class LeftOut(Faulty):
    """It does not load one group."""

    def _needed(self, job: Job, number: int) -> Any:
        return None if self.is_faulty(number) else super()._needed(job, number)


class Shifted(Faulty):
    """It loads of one group the blocks of the positions before."""

    def _needed(self, job: Job, number: int) -> Any:
        if self.is_faulty(number):
            keys = (job.keys[0], *job.keys[:-1])
            if len(keys) > 1 and job.blocks[self.group][0] >= 0:  # no key twice
                keys = (*job.keys[1:], job.keys[0])
            job = replace(job, keys=keys)
        return super()._needed(job, number)


class StatesAnywhere(SchedulerSide):
    """A scheduler side that takes any block in the list of a request for a state."""

    def _ends_of_states(
        self,
        state: Any,
        first: int,
        past: int,
        computed: int,
        until: int,
        told: Mapping[int, Mapping[int, int]],
    ) -> dict[int, list[int]]:
        ends = {n: self._blocks_at(state, past) for n in range(first, past)}
        return {n: ids for n, ids in ends.items() if min(ids) >= 0}


class ReadsWhatIsFreed(SchedulerSide):
    """A scheduler side that saves blocks before a window or chunk, which the engine has freed."""

    def _first_kept(self, group: Group, ids: Sequence[int], computed: int) -> int:
        return super()._first_kept(group, ids, 0)


class LeavesOutLate(SchedulerSide):
    """A scheduler side that skips stored blocks which end before a step: one whose last token is
    known late is saved by no step."""

    def scheduled(self, request: str, computed: int, *terms: Any) -> None:
        state = self._requests[request]
        if state.considered is not None:
            state.considered = max(state.considered, computed // self._size)
        super().scheduled(request, computed, *terms)


#: Of each family the number of a group, and how many there are.
PARTS = [(family, n) for family, kinds in FAMILIES.items() for n in range(len(kinds))]


@pytest.mark.parametrize("loads", [2, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_blocks_are_not_missed(family: str, loads: int, tmp_path: Path) -> None:
    """An engine that cannot be told of a failed load is offered what host memory keeps, with that
    of a disk once it was read. Walks until so many loads were made."""
    counts = Counter[str]()
    for seed in range(20 + loads):
        counts += walk(seed, family, keeping, folder=str(tmp_path / f"{seed}"))
        if counts["loads"] >= loads:
            break
    assert counts["loads"] >= loads
    assert counts["failed_loads"] == 0


def keeping(size: int, groups: Any, workers: int, index: LocalIndex, holder: Any) -> SchedulerSide:
    """Return the scheduler side of an engine that cannot be told of a failed load."""
    return SchedulerSide(size, groups, workers, index, holder=holder, keep=index.keep)


@pytest.mark.parametrize("fault", [LeftOut, Shifted])
@pytest.mark.parametrize(("family", "number"), PARTS)
def test_a_load_without_a_group_is_noticed(fault: type[Faulty], family: str, number: int) -> None:
    """The controls: a group does not come, or comes from another position."""
    worker = type("Worker", (fault,), {"group": number})
    assert f"group {number}, " in what_is_wrong(family, worker=worker)


def what_is_wrong(family: str, **terms: Any) -> str:
    """Return what walks with a fault find first."""
    for seed in range(60):
        try:
            walk(seed, family, **terms)
        except Wrong as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    "family", ["window + full", *(pytest.param(each, marks=pytest.mark.full) for each in OTHERS)]
)
def test_a_rank_without_a_group_is_noticed(family: str) -> None:
    """The control of ranks: the others load the group."""

    class OneRank(LeftOut):
        group = 0
        made = 0

        def __init__(self, *terms: Any) -> None:
            super().__init__(*terms)
            OneRank.made += 1
            self.sound = OneRank.made % 2 == 0

        def is_faulty(self, number: int) -> bool:
            return not self.sound and super().is_faulty(number)

    assert "group 0, rank 0" in what_is_wrong(family, worker=OneRank, ranks=(2,))


def test_heads_of_other_ranks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of slices: each rank of two saves and loads the heads of the other one."""
    memory_of = Draw.memory

    def swapped(draw: Draw, rank: int) -> list[Rows]:
        made = memory_of(draw, rank)
        others = memory_of(draw, draw.ranks - 1 - rank)
        for rows, other in zip(made, others, strict=True):
            rows.heads = other.heads
        return made

    monkeypatch.setattr(Draw, "memory", swapped)
    assert what_is_wrong("window + full", ranks=(2, 1))


@pytest.mark.parametrize("family", ["window + full", "MLA window compressed"])
def test_rows_without_their_scales_are_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of quantized rows, whose scales are a plane of their own."""
    made = hybrid_rows.lay_out

    def without_scales(part: Part, *terms: Any) -> tuple[KVView, Any]:
        view, planes = made(part, *terms)
        if part.widths[-1] < part.widths[0]:
            view = view.slice(kv=slice(0, 1))
        return view, planes

    monkeypatch.setattr(hybrid_rows, "lay_out", without_scales)
    assert what_is_wrong(family)


def test_states_that_are_not_divided_by_head_are_refused_by_other_ranks() -> None:
    with pytest.raises(InvalidTerms, match=r"heads=\(0, 2, 2\), as the store server stores them"):
        walk(0, "windows and states", ranks=(2, 1))


def test_rows_with_other_scales_are_refused() -> None:
    """Scales outside of the pages are part of the model's name."""
    names = ["model:scales 1", "model:scales 2"]
    with pytest.raises(InvalidTerms, match=r"model='model:scales 1', as the store server"):
        walk(0, "window + full", ranks=(1, 1), names=names)


@pytest.mark.parametrize("family", ["GDN hybrid", "Mamba 2 hybrid"])
def test_states_of_other_positions_are_noticed(family: str) -> None:
    """The control of which blocks have states."""

    assert "state after" in what_is_wrong(family, side=StatesAnywhere)


@pytest.mark.parametrize("family", ["window + full", "chunked + full"])
@pytest.mark.parametrize(
    ("fault", "what"), [(ReadsWhatIsFreed, "group 0, "), (LeavesOutLate, "is not saved")]
)
def test_saves_of_freed_blocks_and_late_ones_are_noticed(
    fault: type[SchedulerSide], what: str, family: str
) -> None:
    """The controls of windows and chunks."""
    assert what in what_is_wrong(family, side=fault)


SIZE = 8


class Known(LocalIndex):
    """An index of keys, of a group with states and one with rows."""

    def __init__(self, states: Sequence[bytes], rows: Sequence[bytes]) -> None:
        super().__init__()
        self.stored = [{*states}, {*rows}]
        self.validity = Validity([Group(SIZE, states="last"), Group(SIZE)], SIZE)

    def leading(self, keys: Sequence[bytes], first: int = 0) -> int:
        assert self.validity is not None
        return self.validity.longest(
            first,
            len(keys),
            lambda number, many: len([*takewhile(self.stored[number].__contains__, keys[:many])]),
            lambda number, many: [key in self.stored[number] for key in keys[:many]],
        )

    def has(self, key: bytes, states: bool = True) -> bool:
        return all(key in some for some in (self.stored if states else self.stored[1:]))


TOKENS = [*range(50)]
KEYS = prefix_keys(TOKENS, SIZE)


def side(index: LocalIndex, kept: Literal["every", "last", "told"] = "last") -> SchedulerSide:
    made = SchedulerSide(SIZE, [Group(SIZE, states=kept), Group(SIZE)], 1, index)
    made.add("a", TOKENS)
    return made


@pytest.mark.parametrize(
    ("states", "rows", "tokens"),
    [([], 6, 0), ([3], 6, 32), ([0, 3], 3, 8), ([5], 6, 48), ([0, 1, 4], 5, 40), ([5], 5, 0)],
)
def test_a_prefix_ends_where_a_state_is(states: list[int], rows: int, tokens: int) -> None:
    index = Known([KEYS[n] for n in states], KEYS[:rows])
    assert side(index).leading("a", 0) == tokens


def test_a_load_that_failed_leaves_a_shorter_prefix_that_is_valid() -> None:
    """Rows of six blocks, states after the second and the sixth; the fifth does not come."""
    made = side(Known([KEYS[1], KEYS[5]], KEYS[:6]))
    assert made.leading("a", 0) == 6 * SIZE
    made.allocated("a", 0, 6 * SIZE, ((-1,) * 5 + (9,), (1, 2, 3, 4, 5, 6)))
    (load,) = made.plan().loads
    report = Report()
    report.end(load.number, frozenset({4}))
    made.take(report)
    assert made.leading("a", 0) == 2 * SIZE


def test_a_load_has_the_state_of_its_end_alone() -> None:
    made = side(Known([KEYS[0], KEYS[3]], KEYS[:5]))
    assert made.leading("a", SIZE) == 3 * SIZE
    made.allocated("a", SIZE, 3 * SIZE, ((5, -1, -1, 7), (1, 2, 3, 4)))
    (load,) = made.plan().loads
    assert load.keys == tuple(KEYS[1:4])
    assert load.blocks == ((-1, -1, 7), (2, 3, 4))


def test_a_load_without_a_block_for_its_state_is_refused() -> None:
    made = side(Known([KEYS[3]], KEYS[:4]))
    assert made.leading("a", 0) == 4 * SIZE
    with pytest.raises(InvalidTerms, match="a block for the state after 32 tokens"):
        made.allocated("a", 0, 4 * SIZE, ((-1, -1, -1, -1), (1, 2, 3, 4)))
    made = side(Known([KEYS[3]], KEYS[:4]))
    assert made.leading("a", 0) == 4 * SIZE
    with pytest.raises(InvalidTerms, match="the state after 30 tokens"):
        made.allocated("a", 0, 30, ((-1, -1, -1, 9), (1, 2, 3, 4)))


@pytest.mark.parametrize(
    ("kept", "until", "ids", "told", "saved"),
    [
        ("last", 32, (-1, -1, -1, 9), {}, (-1, -1, -1, 9)),
        ("last", 35, (-1, -1, -1, -1, 9), {}, (-1, -1, -1, -1)),
        ("every", 35, (5, 6, 7, 8, 9), {}, (5, 6, 7, 8)),
        ("told", 32, (-1, -1, -1, 9), {}, (-1, -1, -1, -1)),
        ("told", 35, (-1, -1, 4, 9, 5), {24: {0: 4}}, (-1, -1, 4, -1)),
    ],
)
def test_a_save_has_the_states_that_the_engine_keeps(
    kept: Literal["every", "last", "told"],
    until: int,
    ids: tuple[int, ...],
    told: dict[int, dict[int, int]],
    saved: tuple[int, ...],
) -> None:
    made = side(Known([], []), kept)
    made.allocated("a", 0, 0, ((), ()))
    made.scheduled("a", 0, until, (ids, (1, 2, 3, 4, 5)), True, told)
    (save,) = made.plan().saves
    assert save.keys == tuple(KEYS[:4])
    assert save.blocks == (saved, (1, 2, 3, 4))


def test_a_state_is_saved_whose_rows_are_stored() -> None:
    """And rows are not saved again without one."""
    made = side(Known([], KEYS[:4]))
    made.allocated("a", 0, 0, ((), ()))
    made.scheduled("a", 0, 35, ((-1, -1, -1, -1, 9), (1, 2, 3, 4, 5)), True)
    assert made.plan() is NO_PLAN
    made = side(Known([], KEYS[:4]))
    made.allocated("a", 0, 0, ((), ()))
    made.scheduled("a", 0, 32, ((-1, -1, -1, 9), (1, 2, 3, 4)), True)
    (save,) = made.plan().saves
    assert (save.keys, save.blocks) == ((KEYS[3],), ((9,), (4,)))


def test_a_state_is_saved_one_step_later_if_the_token_after_it_was_not_known() -> None:
    tokens = TOKENS[:31]
    made = SchedulerSide(SIZE, [Group(SIZE, states="last"), Group(SIZE)], 1, Known([], []))
    made.add("a", tokens)
    made.allocated("a", 0, 0, ((), ()))
    made.scheduled("a", 31, 32, ((-1, -1, -1, 9), (1, 2, 3, 4)), True)
    made.plan()
    tokens += TOKENS[31:32]
    made.scheduled("a", 32, 33, ((8,), (5,)))
    (save,) = made.plan().saves
    assert save.keys == (KEYS[3],)
    assert save.blocks == ((9,), (4,))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(
    "group",
    [
        Group(16),
        Group(16, window=64),
        Group(16, window=16),
        Group(4, window=17),
        Group(64, window=5),
        Group(16, chunk=64),
        Group(16, chunk=16),
        Group(64, chunk=64),
    ],
)
def test_each_decoded_block_is_saved(group: Group, late: int) -> None:
    """Next to full attention, and if a step is planned before the tokens of the one before are
    known. No save names a block that the group has given up."""
    groups = [group, Group(16)]
    made = SchedulerSide(16, groups, 1, Known([], []))
    tokens = [*range(100)]
    made.add("a", tokens)
    made.allocated("a", 0, 0, ((), ()))
    saved = list[int]()
    have = [0, 0]
    for computed, until in [(0, 100), *((n, n + 1) for n in range(100, 300))]:
        tokens += range(len(tokens), until - late if computed else until)
        ends = [-(-until // each.block_size) for each in groups]
        new = tuple(tuple(range(*each)) for each in zip(have, ends, strict=True))
        have = ends
        made.scheduled("a", computed, until, new)
        for job in made.plan().saves:
            saved += range(job.first, job.first + len(job.keys))
            given_up = group.first_needed(computed) // group.block_size
            assert not {*job.blocks[0]} & {*range(given_up)}
            assert -1 not in job.blocks[1]
    assert sorted({*saved}) == [*range(18)]


def test_a_save_has_no_rows_of_a_window_that_are_gone() -> None:
    """It begins where a block of full attention begins, before the window; the first save of these
    blocks found no staging."""
    made = SchedulerSide(4, [Group(4, window=8), Group(16)], 1, Known([], []))
    made.add("a", TOKENS)
    made.allocated("a", 0, 0, ((), ()))
    made.scheduled("a", 0, 12, ((1, 2, 3), (9,)), True)
    made.plan()
    made.scheduled("a", 12, 16, ((4,), ()))
    (save,) = made.plan().saves
    assert save.first == 0
    assert save.blocks == ((-1, 2, 3, 4), (9,))


@pytest.mark.parametrize(
    ("group", "tokens", "first"),
    [
        (Group(4), 19, 0),
        (Group(4, window=8), 19, 12),
        (Group(4, window=8), 5, 0),
        (Group(4, chunk=8), 19, 16),
        (Group(4, chunk=8), 16, 16),
        (Group(4, states="last"), 16, 15),
    ],
)
def test_what_later_tokens_need(group: Group, tokens: int, first: int) -> None:
    assert group.first_needed(tokens) == first


def is_valid(groups: Sequence[Group], stored: list[list[bool]], first: int, many: int) -> bool:
    """Return whether all groups have what they need at the end of a prefix: the oracle."""
    tokens = (first + many) * 4
    needed = [range(max(first, g.first_needed(tokens) // 4), first + many) for g in groups]
    pairs = zip(needed, stored, strict=True)
    return all(there[n - first] for some, there in pairs for n in some)


def test_the_longest_prefix_against_every_prefix() -> None:
    """Groups drawn with what is stored of them; every position is tried."""
    chance = random.Random(0)
    found = Counter[int]()
    kinds = [Group(4), Group(4, 4), Group(4, 9), Group(4, chunk=8), Group(4, states="last")]
    for _ in range(3000):
        groups = chance.choices(kinds, k=chance.randint(1, 3))
        count = chance.randint(1, 9)
        first = chance.randint(0, 3)
        stored = [[chance.random() < 0.8 for _ in range(count)] for _ in groups]
        every = range(1, count + 1)
        best = max((n for n in every if is_valid(groups, stored, first, n)), default=0)

        def leading(number: int, many: int, stored: list[list[bool]] = stored) -> int:
            return len([*takewhile(bool, stored[number][:many])])

        def there(number: int, many: int, stored: list[list[bool]] = stored) -> list[bool]:
            return stored[number][:many]

        made = Validity(groups, 4).longest(first, count, leading, there)
        found[best] += 1
        assert made == best, (groups, first, stored)
    assert len(found) == 10
