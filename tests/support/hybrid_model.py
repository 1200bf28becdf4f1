# SPDX-License-Identifier: Apache-2.0
"""A model of an engine whose layers are in several groups, over a real store, that judges both
sides.

Each group has its own kind of rows: of all tokens, of a window, of a chunk, or states. A row is a
number that its group and all tokens up to it give. Before a step computes, the model reads from the
caches what each group's kernels would, and compares. So a prefix that lacks a group, or has that of
another position, is seen at once.
"""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch

from portakv.serving import Group, GroupCache, SchedulerSide, StoreTerms, Validity, WorkerSide
from portakv.serving.local import GroupView, LocalIndex
from portakv.view import KVView

GONE = -1
LIMIT = 4000  # steps; no request takes as long
LAYERS = 2
LONGEST = 124  # tokens
PAUSE = 1e-4  # seconds, for copies, in a step that computes nothing

#: The kinds of groups of each family of models, by name: block sizes are drawn.
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "states that vLLM tells": [{"states": "told"}, {}],
    "states at ends of steps": [{"states": "last"}, {"states": "last"}, {}],
    "states at all blocks": [{"states": "every"}, {}],
    "windows": [{"window": True}, {}],
    "chunks": [{"chunk": True}, {}],
    "latent rows and an indexer": [{}, {}],
    "windows alone": [{"window": True}],
    "windows and states": [{"window": True}, {"states": "last"}, {}],
}


class Wrong(AssertionError):
    """A row or state that a kernel would read is not the right one."""


class Draw:
    """The sizes of a walk."""

    def __init__(self, chance: random.Random, family: str) -> None:
        self.chance = chance
        base = chance.choice([2, 4])
        groups = list[Group]()
        kinds = FAMILIES[family]
        recurrent = any("states" in kind for kind in kinds)
        stored = base * chance.choice([1, 2]) if not recurrent else base * 2
        for kind in kinds:
            size = stored if "states" in kind else chance.choice([base, stored])
            window = (
                stored * chance.choice([1, 2]) + chance.choice([0, 1]) if "window" in kind else None
            )
            chunk = stored * chance.choice([1, 2, 3]) if "chunk" in kind else None
            groups.append(Group(size, window, chunk, kind.get("states")))
        self.groups = groups
        self.stored = stored
        self.budget = chance.choice([stored, 3 * stored, 64])
        #: Enough for the longest request, or for several.
        least = sum(self._most_blocks(group) for group in groups)
        self.blocks = int(least * chance.choice([1.1, 1.6, 4]))
        self.host = chance.choice([6, 20, 200])  # stored blocks that the host has room for
        self.forgets = chance.choice([0.02, 0.1, 0.3])  # in each step

    def _most_blocks(self, group: Group) -> int:
        """Return how many blocks of a group a request has at most."""
        span = group.window or group.chunk
        tokens = LONGEST if span is None else min(LONGEST, span + self.budget)
        return 4 if group.states in ("last", "told") else -(-tokens // group.block_size) + 2


class Caches:
    """The paged memory of each group: int64 ``[blocks, block_size, 1]`` of each layer; of states
    the bytes of one number for each layer."""

    def __init__(self, draw: Draw) -> None:
        self.groups = draw.groups
        self.memory = [
            [
                torch.zeros(draw.blocks, 1 if group.states else group.block_size, 1).to(torch.int64)
                for _ in range(LAYERS)
            ]
            for group in draw.groups
        ]

    def views(self) -> list[GroupView]:
        """Return the view of each group."""
        made = list[GroupView]()
        for number, (group, memory) in enumerate(zip(self.groups, self.memory, strict=True)):
            layers = [each.view(torch.uint8) for each in memory]
            view = KVView(layers, "layer | block token dim")
            made.append(GroupView(view, f"group {number}", None if group.states else 1))
        return made

    def write(self, group: int, block: int, at: int, row: int) -> None:
        """Write a row of all layers."""
        for layer, memory in enumerate(self.memory[group]):
            memory[block, at, 0] = row_of(row, group, layer)

    def check(self, group: int, block: int, at: int, row: int, what: str) -> None:
        """Raise `Wrong` unless a row has its number in all layers."""
        for layer, memory in enumerate(self.memory[group]):
            if int(memory[block, at, 0]) != row_of(row, group, layer):
                raise Wrong(f"group {group}, layer {layer}: {what}")


def row_of(row: int, group: int, layer: int) -> int:
    """Return the number of a row in a layer."""
    return hash((row, group, layer)) & 0x7FFFFFFFFFFFFFFF


class Pool:
    """Blocks that all groups share, and the engine's prefix cache.

    Attributes:
        free: blocks that nothing has, the oldest first, with what the prefix cache has in them.
        cached: by the number of a group and the row at whose token a block ends, the block.
    """

    def __init__(self, blocks: int) -> None:
        self.free = OrderedDict[int, None](dict.fromkeys(range(blocks)))
        self.cached = dict[tuple[int, int], int]()
        self._names = dict[int, tuple[int, int]]()
        self._references = Counter[int]()

    def take(self, many: int) -> list[int] | None:
        """Return free blocks, which the prefix cache forgets; None: too few."""
        if len(self.free) < many:
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(many)]
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
    """A request of the engine. ``wanted``: tokens until it ends."""

    name: str
    tokens: list[int]
    wanted: int
    blocks: list[list[int]]
    computed: int = 0
    state: str = "waiting"  # loading, running, retained, ended
    fresh: bool = True  # its blocks are not known to the scheduler side
    aborted: bool = False
    tries: int = 0
    rows: list[int] = field(default_factory=list)

    def row(self, tokens: int) -> int:
        """Return the row of the last of so many tokens."""
        while len(self.rows) < tokens:
            last = self.rows[-1] if self.rows else 7
            self.rows.append(hash((last, self.tokens[len(self.rows)])))
        return self.rows[tokens - 1]


class Engine:
    """The engine: a scheduler and one worker, over a store in this process."""

    def __init__(
        self,
        seed: int,
        family: str,
        side: Callable[..., SchedulerSide] = SchedulerSide,
        worker: type[WorkerSide] = WorkerSide,
        folder: str | None = None,
    ) -> None:
        self.chance = chance = random.Random(f"{family} {seed}")
        self.draw = draw = Draw(chance, family)
        self.groups = draw.groups
        self.pool = Pool(draw.blocks)
        self.caches = Caches(draw)
        self.index = LocalIndex()
        self.index.validity = Validity(draw.groups, draw.stored)
        room = draw.host * (1 << 14)
        terms = StoreTerms(host=room, staging=4 << 20)
        if folder is not None:
            terms = replace(terms, folder=folder, capacity=2 * room)
        parts = self.index.open(self.caches.views(), terms, "model", draw.stored)
        views = [each.view for each in self.caches.views()]
        both = zip(views, parts, strict=True)
        self.worker_side = worker([GroupCache(view, part) for view, part in both])
        self.side = side(draw.stored, draw.groups, 1, self.index, holder=self.pool)
        self.requests = list[Request]()
        self.counts = Counter[str]()
        self._prompts = [[chance.randrange(50) for _ in range(90)] for _ in range(2)]
        self._all = lcm(*(group.block_size for group in draw.groups))

    def close(self) -> None:
        """Close the store."""
        self.index.close()

    # --- the walk

    def walk(self, requests: int) -> None:
        """Serve requests that come one after the other, and some together."""
        left = requests
        for _ in range(LIMIT):
            if left and (not self._alive() or self.chance.random() < 0.3):
                left -= 1
                self.add()
            if not left and not self._alive():
                break
            self.step()
        else:
            raise AssertionError("requests do not end")
        self.settle()

    def settle(self) -> None:
        """Let all saves end, and check that no block is lost."""
        for _ in range(LIMIT):
            if not self.side.statistics()["jobs"] and not self._alive():
                break
            self.step()
        else:
            raise AssertionError(f"jobs do not end: {self.side.statistics()}")
        assert len(self.pool.free) == self.draw.blocks, "blocks are lost"
        assert not self.side.statistics()["requests"]

    def _alive(self) -> list[Request]:
        return [each for each in self.requests if each.state != "ended"]

    def add(self) -> None:
        """Add a request: a prompt that begins as others do."""
        chance = self.chance
        prompt = chance.choice(self._prompts)[: chance.randrange(3, 90)]
        if chance.random() < 0.3:
            prompt = [*prompt, *(chance.randrange(50) for _ in range(chance.randrange(1, 20)))]
        name = f"request {len(self.requests)}"
        tokens = [*prompt]
        wanted = len(prompt) + chance.randrange(1, 12)
        made = Request(name, tokens, wanted, [[] for _ in self.groups])
        self.requests.append(made)
        self.side.add(name, tokens)

    def step(self) -> None:
        """Schedule, and carry out what both sides plan."""
        if self.chance.random() < self.draw.forgets:
            self.pool.forget()
        steps = list[tuple[Request, int, int]]()
        preempted = set[str]()
        for request in [*self._alive()]:
            if request.state == "running" and request.name not in preempted:
                self._abort_or_schedule(request, steps, preempted)
        steps = [each for each in steps if each[0].name not in preempted]
        for request in [*self._alive()]:
            if request.state == "waiting" and request.name not in preempted:
                self._admit(request)
        plan = self.side.plan(idle=not steps)
        worker = self.worker_side
        worker.stop(plan)
        worker.load(plan)
        for request, computed, until in steps:
            self._compute(request, computed, until)
        if not steps:
            time.sleep(PAUSE)
        worker.save(plan)
        self.side.take(worker.report())
        ended = worker.ended()
        for request in self._alive():
            if request.name in ended.loaded:
                self._loaded(request, request.name in ended.incomplete)
            if request.name in ended.freed:
                self._free(request)
        self.side.freed(ended.freed)

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
            self._end(request)
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
            self._end(request)
            return
        computed = request.computed
        until = self._until(request)
        self._slide(request)
        while (new := self._grow(request, until)) is None:
            others = [each for each in self._alive() if each.state == "running"]
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
        self.side.preempted(request.name)
        self._free(request, "waiting")

    def _free(self, request: Request, state: str = "ended") -> None:
        for blocks in request.blocks:
            self.pool.give_back(reversed(blocks))
        request.blocks = [[] for _ in self.groups]
        request.computed = 0
        request.state = state

    def _end(self, request: Request) -> None:
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
            size = group.block_size
            blocks = request.blocks[number]
            for token in range(group.first_needed(computed), computed):
                what = f"{request.name}, token {token} of {computed}"
                row = request.row(token + 1)
                self.caches.check(number, blocks[token // size], token % size, row, what)
            for token in range(computed, until):
                block = blocks[token // size]
                self.caches.write(number, block, token % size, request.row(token + 1))
        request.computed = until
        self._enter(request, until)
        if until == len(request.tokens):
            if len(request.tokens) >= request.wanted:
                self._end(request)
            else:
                request.tokens.append(request.row(until) % 50)

    def _advance(self, request: Request, number: int, computed: int, until: int) -> None:
        """Read the state after the computed tokens, and write those after the step."""
        group = self.groups[number]
        size = group.block_size
        blocks = request.blocks[number]
        if computed:
            block = blocks[(computed - 1) // size]
            what = f"{request.name}, state after {computed}"
            self.caches.check(number, block, 0, request.row(computed), what)
        ends = range((computed // size + 1) * size, until + 1, size)
        for end in [*ends] if group.states == "every" else []:
            self.caches.write(number, blocks[end // size - 1], 0, request.row(end))
        self.caches.write(number, blocks[(until - 1) // size], 0, request.row(until))

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
    requests: int = 10,
    folder: str | None = None,
) -> Counter[str]:
    """Walk, and return what was counted. Raises `Wrong`.

    ``folder``: of a disk below the host memory.
    """
    engine = Engine(seed, family, side, worker, folder)
    try:
        engine.walk(requests)
        return engine.counts + Counter(engine.side.counts)
    finally:
        engine.close()
