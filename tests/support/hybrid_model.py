# SPDX-License-Identifier: Apache-2.0
"""A model of engines whose layers are in several groups, over a real store, that judges both sides.

Each group has its own kind of rows: of all tokens, of a window, of a chunk, or states. A row is a
number that its group and all tokens up to it give; `Rows` knows its bytes. Before a step computes,
the model reads from the caches of each rank what each group's kernels would, and compares. So a
prefix that lacks a group, or has that of another position, is seen at once.

A walk has one engine over a store of its own, or several over one store server, of one model, whose
blocks and ranks differ. An engine that plans ahead learns a token one step after the step that
computes with it. Some free a block at one end of their pool and take the next one there, so that a
freed block has other rows in the same step; and some have no staging for a save.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from math import lcm
from typing import Any

import torch

from portakv.serving import (
    Group,
    GroupCache,
    SchedulerSide,
    ServerIndex,
    StoreClient,
    StoreServer,
    StoreTerms,
    Validity,
    WorkerSide,
)
from portakv.serving.local import LocalIndex, forms_of, image_of
from portakv.serving.plan import Job, Plan, Report
from portakv.storage import prefix_keys
from support.hybrid_rows import FAMILIES, LAYERS, PARTS, Kind, Memory, Part, Places, Rows, spoiled
from support.waits import LIMIT

GONE = -1
LONGEST = 124  # tokens
#: Seconds, for copies, in a step that computes nothing: of a store here, and of a server.
PAUSE = 1e-4
LONGER = 2e-3
#: Seconds for which a save waits for a rank, which may have been told to stop it.
PATIENCE = 1.0
STAGING = 4 << 20
#: Tokens of a block of an engine, or of a stored one.
SIZES = ((2, 4), (4, 8), (2, 8), (4, 16), (2, 16))
#: Tokens of a window that may be shorter than a stored block.
SHORT = 3
MODEL = "model"
numbers = count()


class Wrong(AssertionError):
    """A row or state that a kernel would read is not the right one."""


class Model:
    """The model of a walk, and the tokens of a stored block.

    Args:
        sizes: of a block, the smaller one first.

    Attributes:
        kinds, parts: of each group, how its rows lie in memory.
        spans: of each group its window or chunk, or which states are kept.
    """

    def __init__(self, chance: random.Random, family: str, sizes: Sequence[int]) -> None:
        self.kinds = FAMILIES[family]
        self.sizes = sizes
        recurrent = any("states" in kind.terms for kind in self.kinds)
        self.stored = sizes[-1] if recurrent else chance.choice(sizes)
        quantized = chance.random() < 0.5
        #: Groups have one memory, and like groups like rows, as vLLM gives it to them.
        self.shares = chance.random() < 0.5
        alike = {name: PARTS[name](chance, quantized) for name in sorted(PARTS)}
        self.parts = [
            alike[kind.rows] if self.shares else PARTS[kind.rows](chance, quantized)
            for kind in self.kinds
        ]
        self.spans = [self._span(chance, kind) for kind in self.kinds]
        self.prompts = [[chance.randrange(50) for _ in range(90)] for _ in range(2)]

    def _span(self, chance: random.Random, kind: Kind) -> Mapping[str, Any]:
        """Return the window or chunk of a group."""
        if "window" in kind.terms:
            longer = self.stored * chance.choice([1, 2]) + chance.choice([0, 1])
            return {"window": chance.choice([SHORT, longer, longer])}
        if "chunk" in kind.terms:
            return {"chunk": self.stored * chance.choice([1, 2, 3])}
        return kind.terms

    @property
    def image_bytes(self) -> int:
        """Return the bytes of a stored block of all groups."""
        return sum(
            image_of(self._rows_of(kind, part) * max(1, part.heads) * LAYERS * sum(part.widths))
            for kind, parts in zip(self.kinds, self.parts, strict=True)
            for part in parts
        )

    def _rows_of(self, kind: Kind, part: Part) -> int:
        return part.steps if "states" in kind.terms else self.stored // kind.tokens


class Draw:
    """The sizes of an engine.

    Attributes:
        ranks: of tensor parallelism.
        whole: blocks are pages that nothing looks into.
    """

    def __init__(self, chance: random.Random, model: Model, ranks: int, own: bool) -> None:
        self.chance = chance
        self.model = model
        self.ranks = ranks
        self.whole = own and chance.random() < 0.3
        self.stored = stored = model.stored
        self.groups = [self._group(span) for span in model.spans]
        self.budget = chance.choice([stored, 3 * stored, 64])
        #: Enough for the longest request, or for several.
        least = sum(self._most_blocks(group) for group in self.groups)
        self.blocks = int(least * chance.choice([1.1, 1.6, 4]))
        #: In each step; all that an engine forgets, it loads.
        self.forgets = chance.choice([0.2, 1.0] if own else [0.5, 1.0])
        self.plans_ahead = chance.random() < 0.5
        self.reuses = chance.random() < 0.5
        self.drops = chance.choice([0, 0, 0.3])  # of saves

    def _group(self, span: Mapping[str, Any]) -> Group:
        """Return a group with blocks of one of the sizes that fit the stored ones."""
        stored = self.stored
        sizes = [size for size in self.model.sizes if size <= stored or not self.whole]
        if "states" in span:
            sizes = [stored]
        elif span.get("window", stored) < stored:
            sizes = [size for size in sizes if size >= stored]
        return Group(self.chance.choice(sizes), **span)

    def _most_blocks(self, group: Group) -> int:
        """Return how many blocks of a group a request has at most."""
        span = group.window or group.chunk
        tokens = LONGEST if span is None else min(LONGEST, span + self.budget)
        return 4 if group.states in ("last", "told") else -(-tokens // group.block_size) + 2

    def memory(self, rank: int) -> list[Rows]:
        """Return the caches of a rank, of each group."""
        model = self.model
        each = zip(model.kinds, self.groups, model.parts, strict=True)
        made = dict[tuple[int, int, int], torch.Tensor]()

        def memory_of(number: int) -> Memory:
            """Return what gives memory to a group; several have the same, in which each has its
            blocks."""
            taken = Counter[int]()

            def take(nbytes: int) -> torch.Tensor:
                taken[nbytes] += 1
                name = 0 if model.shares else number, nbytes, taken[nbytes]
                return made.setdefault(name, spoiled(nbytes))

            return take

        return [
            Rows(
                number,
                kind,
                group,
                parts,
                self.blocks,
                rank,
                self.ranks,
                self.whole,
                memory_of(number),
            )
            for number, (kind, group, parts) in enumerate(each)
        ]


class Pool:
    """Blocks that all groups share, and the engine's prefix cache.

    Args:
        reuses: a block that was freed is the next one that is taken.

    Attributes:
        free: blocks that nothing has, in their order, with what the prefix cache has in them.
        cached: by the number of a group and the row at whose token a block ends, the block.
    """

    def __init__(self, blocks: int, reuses: bool = False) -> None:
        self._reuses = reuses
        self.free = OrderedDict[int, None](dict.fromkeys(range(blocks)))
        self.cached = dict[tuple[int, int], int]()
        self._names = dict[int, tuple[int, int]]()
        self._references = Counter[int]()

    def take(self, many: int) -> list[int] | None:
        """Return free blocks, which the prefix cache forgets; None: too few."""
        if len(self.free) < many:
            return None
        taken = [self.free.popitem(last=self._reuses)[0] for _ in range(many)]
        for block in taken:
            self._references[block] += 1
            name = self._names.pop(block, None)
            if name is not None and self.cached.get(name) == block:
                del self.cached[name]
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """Use blocks once more."""
        for block in blocks:
            assert block != GONE
            self.free.pop(block, None)
            self._references[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Use blocks no longer."""
        for block in blocks:
            if block == GONE:
                continue
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block was freed twice"
            if not self._references[block]:
                self.free[block] = None

    def cache(self, group: int, row: int, block: int) -> None:
        """Enter a block that ends with a row."""
        if (group, row) not in self.cached and block not in self._names:
            self.cached[group, row] = block
            self._names[block] = (group, row)

    def forget(self) -> None:
        """Forget the prefix cache."""
        self.cached.clear()
        self._names.clear()


@dataclass(eq=False)
class Request:
    """A request of the engine.

    Attributes:
        wanted: tokens until it ends.
        known: those that the scheduler knows.
        began: the tokens whose rows it has from others; None: it cannot be told which stored
            blocks are saved of it, since some saves were withdrawn.
        past: stored blocks before this one were to be saved.
    """

    name: str
    tokens: list[int]
    wanted: int
    known: list[int]
    blocks: list[list[int]]
    computed: int = 0
    state: str = "waiting"  # loading, running, retained, ended
    fresh: bool = True  # its blocks are not known to the scheduler side
    aborted: bool = False
    tries: int = 0
    rows: list[int] = field(default_factory=list)
    began: int | None = None
    past: int = 0

    def learn(self) -> None:
        """Let the scheduler know all tokens."""
        self.known += self.tokens[len(self.known) :]

    def row(self, tokens: int) -> int:
        """Return the row of the last of so many tokens."""
        while len(self.rows) < tokens:
            last = self.rows[-1] if self.rows else 7
            self.rows.append(hash((last, self.tokens[len(self.rows)])))
        return self.rows[tokens - 1]


class Engine:
    """An engine: a scheduler and the workers of its ranks.

    Args:
        terms: of the store.
        server: that several engines share; None: the engine has a store of its own.
        name: of the model.
        saved: keys of which a save was planned, in all engines.
    """

    def __init__(
        self,
        chance: random.Random,
        draw: Draw,
        terms: StoreTerms,
        server: StoreServer | None = None,
        side: Callable[..., SchedulerSide] = SchedulerSide,
        worker: type[WorkerSide] = WorkerSide,
        name: str = MODEL,
        saved: set[bytes] | None = None,
    ) -> None:
        self.chance = chance
        self.draw = draw
        self._saved = set[bytes]() if saved is None else saved
        self.name = name
        self.groups = draw.groups
        self.pool = Pool(draw.blocks, draw.reuses)
        self.memory = [draw.memory(rank) for rank in range(draw.ranks)]
        self.index: LocalIndex | ServerIndex
        self._end = ExitStack()
        stores = self._open(terms) if server is None else self._join(server)
        self.workers = list[WorkerSide]()
        for memory, parts in zip(self.memory, stores, strict=True):
            views = [each for rows in memory for each in rows.views]
            both = zip(views, parts, strict=True)
            self.workers.append(worker([GroupCache(x.view, part, x.group) for x, part in both]))
        self.side = side(draw.stored, draw.groups, draw.ranks, self.index, holder=self.pool)
        self.requests = list[Request]()
        self.counts = Counter[str]()
        self._ended = Counter[tuple[str, str]]()  # by what has ended and the request: the workers
        self._incomplete = set[str]()
        self._all = lcm(*(group.block_size for group in draw.groups))

    def _open(self, terms: StoreTerms) -> list[Sequence[Any]]:
        """Open a store of this engine alone; return where blocks of its worker are stored."""
        self.index = index = LocalIndex()
        index.validity = Validity(self.groups, self.draw.stored)
        self._end.callback(index.close)
        views = [each for rows in self.memory[0] for each in rows.views]
        return [index.open(views, terms, self.name, self.draw.stored)]

    def _join(self, server: StoreServer) -> list[Sequence[Any]]:
        """Join a server; return where blocks of each worker are stored."""
        name = f"engine {next(numbers)}"
        stores = list[Sequence[Any]]()
        for memory in self.memory:
            views = [each for rows in memory for each in rows.views]
            heads = [each for rows in memory for each in rows.heads]
            forms = forms_of(views, self.name, self.draw.stored, heads)
            client = self._end.enter_context(StoreClient(server.place, forms, name))
            assert client.wait(LIMIT)
            stores.append(client.blocks)
        self.index = index = ServerIndex(server.place, name, len(stores[0]))
        self._end.callback(index.close)
        index.parts = [len(rows.views) for rows in self.memory[0]]
        index.validity = Validity(self.groups, self.draw.stored)
        assert index.wait(LIMIT)
        return stores

    def close(self) -> None:
        """Close the store, or leave the server."""
        self._end.close()

    # --- the walk

    def settle(self) -> None:
        """Let all saves end, and check that no block is lost."""
        until = time.monotonic() + LIMIT
        while self.side.statistics()["jobs"] or self.alive:
            assert time.monotonic() < until, f"jobs do not end: {self.side.statistics()}"
            self.step()
        assert len(self.pool.free) == self.draw.blocks, "blocks are lost"
        assert not self.side.statistics()["requests"]

    @property
    def alive(self) -> list[Request]:
        """Return the requests that have not ended."""
        return [each for each in self.requests if each.state != "ended"]

    def add(self) -> None:
        """Add a request: a prompt that begins as others do."""
        chance = self.chance
        prompt = chance.choice(self.draw.model.prompts)[: chance.randrange(3, 90)]
        if chance.random() < 0.3:
            prompt = [*prompt, *(chance.randrange(50) for _ in range(chance.randrange(1, 20)))]
        name = f"request {len(self.requests)}"
        tokens = [*prompt]
        wanted = len(prompt) + chance.randrange(1, 12)
        made = Request(name, tokens, wanted, [*tokens], [[] for _ in self.groups])
        self.requests.append(made)
        self.side.add(name, made.known)

    def step(self) -> None:
        """Schedule, and carry out what both sides plan."""
        if self.chance.random() < self.draw.forgets:
            self.pool.forget()
        steps = list[tuple[Request, int, int]]()
        preempted = set[str]()
        for request in [*self.alive]:
            if request.state == "running" and request.name not in preempted:
                self._abort_or_schedule(request, steps, preempted)
        steps = [each for each in steps if each[0].name not in preempted]
        for request in [*self.alive]:
            if request.state == "waiting" and request.name not in preempted:
                self._admit(request)
        plan = self.side.plan(idle=not steps)
        self._saved.update(key for job in plan.saves for key in job.keys)
        dropped = self._drop(plan)
        names = {each.name: each for each in self.alive}
        for worker in self.workers:
            worker.stop(plan)
            worker.load(plan)
        for request, computed, until in steps:
            self._compute(request, computed, until)
        for job in plan.saves:
            self._check_job(names[job.request], job)
        if not steps:
            time.sleep(PAUSE if isinstance(self.index, LocalIndex) else LONGER)
        for worker in self.workers:
            worker.save(plan)
            self.side.take(dropped)
            self.side.take(worker.report())
            ended = worker.ended()
            self._ended.update(("loaded", name) for name in ended.loaded)
            self._ended.update(("freed", name) for name in ended.freed)
            self._incomplete |= ended.incomplete
        for request in self.alive:
            if self._has_ended("loaded", request):
                self._loaded(request, request.name in self._incomplete)
                self._incomplete.discard(request.name)
            if self._has_ended("freed", request):
                self._free(request)
                self.side.freed({request.name})

    def _drop(self, plan: Plan) -> Report:
        """Take saves for which there is no staging out of a plan; return what each worker reports
        of them."""
        report = Report()
        for job in [*plan.saves]:
            if self.chance.random() < self.draw.drops:
                plan.saves.remove(job)
                report.released[job.number] += 1
                report.end(job.number, frozenset(range(len(job.keys))))
        return report

    def _has_ended(self, what: str, request: Request) -> bool:
        """Return once whether something has ended in all workers."""
        if self._ended[what, request.name] < len(self.workers):
            return False
        del self._ended[what, request.name]
        return True

    # --- the scheduler

    def _local(self, request: Request) -> tuple[int, list[list[int]]]:
        """Return how many tokens the prefix cache has in all groups, and the blocks."""
        most = (len(request.tokens) - 1) // self._all * self._all
        for tokens in range(most, 0, -self._all):
            found = list[list[int]]()
            for number, group in enumerate(self.groups):
                size = group.block_size
                first = group.first_needed(tokens) // size
                ends = [(at + 1) * size for at in range(first, tokens // size)]
                some = [self.pool.cached.get((number, request.row(end))) for end in ends]
                if None in some:
                    break
                found.append([GONE] * first + [block for block in some if block is not None])
            else:
                return tokens, found
        return 0, [[] for _ in self.groups]

    def _admit(self, request: Request) -> None:
        """Look a request up here and in the store, and begin it."""
        request.learn()
        local, blocks = self._local(request)
        more = self.side.leading(request.name, local)
        if more is None:
            return
        past = local + more
        for some in blocks:
            self.pool.hold(block for block in some if block != GONE)
        taken = list[list[int]]()
        for group, some in zip(self.groups, blocks, strict=True):
            size = group.block_size
            first = max(len(some), group.first_needed(past) // size if more else len(some))
            new = self.pool.take(max(0, -(-past // size) - first)) if more else []
            if new is None:
                self._undo(blocks, taken)
                return
            taken.append([GONE] * (first - len(some)) + new)
        request.blocks = [[*some, *new] for some, new in zip(blocks, taken, strict=True)]
        request.computed = past
        request.began = past
        request.fresh = True
        request.tries += 1
        ids = tuple(tuple(each) for each in request.blocks)
        self.side.allocated(request.name, local, more, ids)
        request.state = "loading" if more else "running"
        self.counts["loads"] += bool(more)
        self.counts["loaded tokens"] += more
        self.counts["local tokens"] += local

    def _undo(self, *blocks: Sequence[Sequence[int]]) -> None:
        for some in blocks:
            for each in some:
                self.pool.give_back(each)

    def _loaded(self, request: Request, incomplete: bool) -> None:
        """Go on after a load; a request whose load lacks something begins again."""
        assert request.state == "loading"
        if request.aborted:
            self._end_request(request)
        elif incomplete:
            self.counts["incomplete"] += 1
            self._free(request, "waiting")
        else:
            request.state = "running"
            self._enter(request, request.computed)

    def _abort_or_schedule(
        self, request: Request, steps: list[tuple[Request, int, int]], preempted: set[str]
    ) -> None:
        if self.chance.random() < 0.01:
            self._end_request(request)
            return
        computed = request.computed
        until = self._until(request)
        self._slide(request)
        while (new := self._grow(request, until)) is None:
            others = [each for each in self.alive if each.state == "running"]
            victim = self.chance.choice(others)
            self._preempt(victim)
            preempted.add(victim.name)
            if victim is request:
                return
        told = dict[int, dict[int, int]]()
        for number, group in enumerate(self.groups):
            if group.states == "told" and until % group.block_size == 0:
                block = request.blocks[number][until // group.block_size - 1]
                told.setdefault(until, {})[number] = block
        ids = request.blocks if request.fresh else new
        blocks = tuple(tuple(each) for each in ids)
        self.side.scheduled(request.name, computed, until, blocks, request.fresh, told)
        request.past = min(until, len(request.known)) // self.draw.stored
        request.learn()
        request.fresh = False
        steps.append((request, computed, until))

    def _until(self, request: Request) -> int:
        """Return the tokens that a step computes; with states steps end where blocks do."""
        until = min(request.computed + self.draw.budget, len(request.tokens))
        sizes = [group.block_size for group in self.groups if group.states]
        if sizes and until < len(request.tokens) + 1:
            size = lcm(*sizes)
            last = until // size * size
            if last > request.computed:
                return last
        return until

    def _slide(self, request: Request) -> None:
        """Free the blocks that no later token needs."""
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            past = group.first_needed(request.computed) // group.block_size
            past = min(past, len(blocks))
            self.pool.give_back(blocks[:past])
            blocks[:past] = [GONE] * past

    def _grow(self, request: Request, until: int) -> list[list[int]] | None:
        """Give a request blocks for a step, and return them; None: there are too few."""
        lacking = list[tuple[int, int]]()
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            many = max(0, -(-until // group.block_size) - len(blocks))
            skipped = many - 1 if many and group.states not in (None, "every") else 0
            lacking.append((skipped, many - skipped))
        taken = self.pool.take(sum(many for _, many in lacking))
        if taken is None:
            return None
        made = list[list[int]]()
        for (skipped, many), blocks in zip(lacking, request.blocks, strict=True):
            new = [GONE] * skipped + taken[:many]
            taken = taken[many:]
            blocks += new
            made.append(new)
        return made

    def _preempt(self, request: Request) -> None:
        self.counts["preempted"] += 1
        for each in self.alive:  # a withdrawn save may have had the blocks of others
            each.began = None
        self.side.preempted(request.name)
        self._free(request, "waiting")

    def _free(self, request: Request, state: str = "ended") -> None:
        for blocks in request.blocks:
            self.pool.give_back(reversed(blocks))
        request.blocks = [[] for _ in self.groups]
        request.computed = 0
        request.state = state

    def _end_request(self, request: Request) -> None:
        if self.side.finished(request.name):
            request.state = "retained"
        else:
            self._free(request)

    # --- the worker's kernels

    def _compute(self, request: Request, computed: int, until: int) -> None:
        """Read what the kernels of each group read, and write what they write."""
        for number, group in enumerate(self.groups):
            if group.states:
                self._advance(request, number, computed, until)
                continue
            blocks = request.blocks[number]
            for rank, memory in enumerate(self.memory):
                rows = memory[number]
                places, ends = rows.places(blocks, range(group.first_needed(computed), computed))
                what = f"rank {rank}: {request.name}, rows at {computed}"
                self._check(number, rows, places, [request.row(end) for end in ends], what)
                places, ends = rows.places(blocks, range(computed, until))
                rows.write(places, [request.row(end) for end in ends])
        request.computed = until
        self._enter(request, until)
        if until < len(request.tokens):
            return
        if len(request.tokens) < request.wanted:
            request.tokens.append(request.row(until) % 50)
            if not self.draw.plans_ahead:
                request.learn()
            return
        self._check_saved(request)
        self._end_request(request)

    def _check_saved(self, request: Request) -> None:
        """Raise `Wrong` unless each block that a request has filled was saved, here or before."""
        if request.began is None:
            return
        size = self.draw.stored
        keys = prefix_keys(request.tokens, size)
        for number in range(-(-request.began // size), request.past):
            if keys[number] not in self._saved:
                raise Wrong(f"{request.name}: block {number} of {request.past} is not saved")
            self.counts["checked blocks"] += 1

    def _check(
        self, number: int, rows: Rows, places: Places, expected: Sequence[int], what: str
    ) -> None:
        """Raise `Wrong` unless places have the rows or states that are expected."""
        wrong = rows.wrong(places, expected)
        if wrong:
            raise Wrong(f"group {number}, {what}: {', '.join(wrong)}")

    def _check_job(self, request: Request, job: Job) -> None:
        """Raise `Wrong` unless the blocks that a save names have the rows and states of its
        keys."""
        size = self.draw.stored
        begin = job.first * size
        past = begin + len(job.keys) * size
        for number, (group, ids) in enumerate(zip(self.groups, job.blocks, strict=True)):
            for rank, memory in enumerate(self.memory):
                rows = memory[number]
                what = f"rank {rank}: {request.name}, saved "
                if group.states:
                    for end, block in zip(range(begin + size, past + 1, size), ids, strict=True):
                        if block != GONE:
                            known = [request.row(end)]
                            self._check(number, rows, ([block],), known, f"{what}state after {end}")
                    continue
                before = begin // group.block_size
                first = (before + ids.count(GONE)) * group.block_size
                tokens = range(max(begin, first), past)
                places, ends = rows.places([GONE] * before + [*ids], tokens)
                known = [request.row(end) for end in ends]
                self._check(number, rows, places, known, f"{what}rows from {tokens.start} on")

    def _advance(self, request: Request, number: int, computed: int, until: int) -> None:
        """Read the state after the computed tokens, and write those after the step."""
        group = self.groups[number]
        size = group.block_size
        blocks = request.blocks[number]
        ends = {until}
        if group.states == "every":
            ends.update(range((computed // size + 1) * size, until + 1, size))
        for rank, memory in enumerate(self.memory):
            rows = memory[number]
            if computed:
                place = ([blocks[(computed - 1) // size]],)
                what = f"rank {rank}: {request.name}, state after {computed}"
                self._check(number, rows, place, [request.row(computed)], what)
            for end in ends:
                rows.write(([blocks[(end - 1) // size]],), [request.row(end)])

    def _enter(self, request: Request, tokens: int) -> None:
        """Enter whole blocks in the prefix cache."""
        for number, group in enumerate(self.groups):
            size = group.block_size
            blocks = request.blocks[number]
            whole = tokens // size
            if group.states in ("last", "told"):  # others may have a state of another position
                ends = [whole] if tokens % size == 0 else []
            else:
                ends = [*range(1, whole + 1)]
            for end in ends:
                if end and blocks[end - 1] != GONE:
                    self.pool.cache(number, request.row(end * size), blocks[end - 1])


def walk(
    seed: int,
    family: str,
    side: Callable[..., SchedulerSide] = SchedulerSide,
    worker: type[WorkerSide] = WorkerSide,
    requests: int = 6,
    folder: str | None = None,
    ranks: Sequence[int] = (),
    names: Sequence[str] = (),
) -> Counter[str]:
    """Walk, and return what was counted. Raises `Wrong`.

    Requests of each engine come one after the other, and some together.

    Args:
        folder: of a disk below the host memory.
        ranks: of each engine that shares a store server; (): one engine with a store of its own.
        names: of the model in each engine; (): one name.
    """
    chance = random.Random(f"{family} {seed}")
    model = Model(chance, family, chance.choice(SIZES))
    room = chance.choice([6, 20, 200]) * model.image_bytes
    terms = StoreTerms(host=room, staging=STAGING, folder=folder, capacity=2 * room)
    counts = Counter[str]()
    with ExitStack() as stack:
        server = None
        if ranks:
            place = f"hybrids {os.getpid()} {next(numbers)}"
            server = stack.enter_context(StoreServer(terms, place, patience=PATIENCE))
        engines = list[Engine]()
        saved = set[bytes]()
        ranks = ranks or (1,)
        for many, name in zip(ranks, names or [MODEL] * len(ranks), strict=True):
            draw = Draw(chance, model, many, own=server is None)
            engines.append(Engine(chance, draw, terms, server, side, worker, name, saved))
            stack.callback(engines[-1].close)
        left = [engine for engine in engines for _ in range(requests)]
        chance.shuffle(left)
        until = time.monotonic() + LIMIT
        while left or any(engine.alive for engine in engines):
            assert time.monotonic() < until, "requests do not end"
            if left and (not left[-1].alive or chance.random() < 0.3):
                left.pop().add()
            for engine in engines:
                engine.step()
        for engine in engines:
            engine.settle()
            counts += engine.counts + Counter(engine.side.counts)
    return counts
