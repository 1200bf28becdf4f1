# SPDX-License-Identifier: Apache-2.0
"""A small model of a serving engine, with workers and a store, that judges a `SchedulerSide`.

The engine has paged blocks with a prefix cache, chunked prefill, asynchronous loads, preemption and
aborts. A row of a block is a number that only its token and all tokens before it give, so rows that
were read too late, written too late, or that belong to another request are seen.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from portakv.serving import Group, Job, Plan, Report, SchedulerSide
from portakv.serving.plan import PullJob
from portakv.storage.keys import KeyChain

NOTHING = -1  # the row of a block that was never written
GONE = -1  # in place of a block that was given up
FIRST = 7  # in place of the row before the first one
LIMIT = 3000  # steps; no request takes as long


def row_after(last: int, token: int) -> int:
    """Return the row of a token after the row of the token before it, or `FIRST`."""
    return hash((last, token))


class Store:
    """The stored blocks of all workers, and an index that is sometimes wrong."""

    def __init__(self, chance: random.Random, draw: Draw) -> None:
        self.blocks = dict[bytes, list[list[int] | None]]()  # for each worker its rows
        self.damaged = set[bytes]()
        self.believed = set[bytes]()  # keys that the index names
        self.expected = dict[bytes, list[int]]()  # the rows that belong to a key
        self.chance = chance
        self.workers = draw.workers
        self.wrong = draw.wrong
        self.losses = 0

    def leading(self, keys: Sequence[bytes], first: int = 0) -> int | None:
        """Answer as an index; sometimes not yet."""
        if self.chance.random() < self.wrong:
            return None
        return next((n for n, key in enumerate(keys) if key not in self.believed), len(keys))

    def has(self, key: bytes, states: bool = True) -> bool:
        """Answer as an index."""
        return key in self.believed

    def put(self, key: bytes, worker: int, rows: list[int]) -> None:
        """Store a worker's part; a block that has all parts can be loaded."""
        parts = self.blocks.setdefault(key, [None] * self.workers)
        parts[worker] = rows
        if None not in parts:
            self.believed.add(key)
            self.damaged.discard(key)

    def get(self, key: bytes, worker: int) -> list[int] | None:
        """Return a worker's part of a block that is whole."""
        parts = self.blocks.get(key)
        whole = parts is not None and None not in parts and key not in self.damaged
        return parts[worker] if parts is not None and whole else None

    def age(self) -> None:
        """Lose or damage a block now and then; the index learns of it later, or never."""
        if self.blocks and self.chance.random() < self.wrong:
            key = self.chance.choice([*self.blocks])
            if self.chance.random() < 0.5:
                self.damaged.add(key)
            else:
                del self.blocks[key]
                if self.chance.random() < 0.5:
                    self.believed.discard(key)
                    self.losses += 1


@dataclass
class Task:
    """A load or save of one worker. ``rows``: of a save, what was read."""

    job: Job
    load: bool
    rows: list[int] | None = None


class Worker:
    """A worker: its memory, and jobs that go on at any time."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.number = number
        draw = engine.draw
        self._memory = [[NOTHING] * draw.block_size for _ in range(draw.blocks)]
        self.tasks = dict[int, Task]()
        self.retained = list[str]()
        self.report = Report()
        self.freed = set[str]()

    @property
    def busy(self) -> bool:
        """Return whether a job has not ended."""
        return bool(self.tasks)

    def row(self, block: int, at: int) -> int:
        """Return a row of a block."""
        return self._memory[block][at]

    def write(self, block: int, at: int, row: int) -> None:
        """Write a row of a block."""
        self._memory[block][at] = row

    def before_step(self, plan: Plan) -> None:
        """Release the blocks of saves that were stopped, before anything is written."""
        for number in plan.stop:
            if number in self.tasks and self.tasks[number].rows is None:
                if self.engine.chance.random() < 0.5:
                    self._read(self.tasks[number])
                else:
                    self._end_save(self.tasks[number], stored=False)

    def after_step(self, plan: Plan) -> None:
        """Begin what the plan says, and let some jobs go on."""
        for job in plan.loads:
            self.tasks[job.number] = Task(job, True)
        for job in plan.saves:
            self.tasks[job.number] = Task(job, False)
        self.retained += plan.retained
        chance = self.engine.chance
        for task in [*self.tasks.values()]:
            if chance.random() < self.engine.draw.speed:
                self._go_on(task)
        reading = self.reading()
        self.freed |= {name for name in self.retained if name not in reading}
        self.retained = [name for name in self.retained if name not in self.freed]

    def reading(self) -> set[str]:
        """Return the requests whose blocks are read."""
        return {x.job.request for x in self.tasks.values() if not x.load and x.rows is None}

    def _go_on(self, task: Task) -> None:
        if task.load:
            self._load(task.job)
        elif task.rows is None:
            self._read(task)
        else:
            self._end_save(task, stored=self.engine.chance.random() > self.engine.store.wrong)

    def _places(self, job: Job) -> list[tuple[int, int] | None]:
        """Return the block and the row of each token of a job's stored blocks; None: no block."""
        size = self.engine.draw.block_size
        begin = job.first * self.engine.draw.stored_size
        places = list[tuple[int, int] | None]()
        for token in range(begin, begin + len(job.keys) * self.engine.draw.stored_size):
            at = token // size - begin // size
            (blocks,) = job.blocks
            block = blocks[at] if at < len(blocks) else -1
            places.append(None if block < 0 else (block, token % size))
        return places

    def _read(self, task: Task) -> None:
        """Read the rows of a save, and release its blocks."""
        task.rows = [
            NOTHING if place is None else self.row(*place) for place in self._places(task.job)
        ]
        self.report.released[task.job.number] += 1

    def _end_save(self, task: Task, stored: bool) -> None:
        del self.tasks[task.job.number]
        size = self.engine.draw.stored_size
        if task.rows is None:
            self.report.released[task.job.number] += 1
        rows = task.rows if stored else None
        for position, key in enumerate(task.job.keys):
            if rows is not None:
                part = rows[position * size : (position + 1) * size]
                assert part == self.engine.store.expected.get(key), (
                    "a save read rows of something else"
                )
                self.engine.store.put(key, self.number, part)
        missing = frozenset[int]() if stored else frozenset(range(len(task.job.keys)))
        self.report.end(task.job.number, missing)

    def _load(self, job: Job) -> None:
        del self.tasks[job.number]
        places = self._places(job)
        missing = set[int]()
        size = self.engine.draw.stored_size
        for position, key in enumerate(job.keys):
            rows = self.engine.store.get(key, self.number)
            if rows is None:
                missing.add(position)
                continue
            for place, row in zip(places[position * size :], rows, strict=False):
                if place is not None:
                    self.write(*place, row)
        self.report.end(job.number, frozenset(missing))


@dataclass(eq=False)
class Request:
    """A request of the engine. ``wanted``: tokens until it ends.

    ``ends``: how often its end was reported. An aborted one that loads stays in `Engine.loads`.
    """

    name: str
    tokens: list[int]
    wanted: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    state: str = "waiting"  # loading, running, retained, ended
    load_tokens: int = 0
    loads: int = 0
    preemptions: int = 0
    handed: bool = False  # another engine has computed its prompt
    fresh: bool = False  # its blocks are not known to the scheduler side
    ends: int = 0
    chain: KeyChain | None = None  # the keys of its first tokens
    noted: int = 0  # how many of them
    _rows: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        """Return the row of each token. Tokens are only ever appended."""
        for token in self.tokens[len(self._rows) :]:
            self._rows.append(row_after(self._rows[-1] if self._rows else FIRST, token))
        return self._rows


@dataclass
class Load:
    """What the engine knows of a load. ``ends``: in how many workers it has ended."""

    request: Request
    job: Job | PullJob
    ends: int = 0
    missing: set[int] = field(default_factory=set)


class Draw:
    """The sizes of a walk.

    Attributes:
        block_size, blocks: of the engine.
        stored_size: the tokens of a stored block.
        workers: how many there are.
        speed: the chance that a job goes on in a step.
        budget: the most tokens of a request in a step.
        forgets: the chance that the engine forgets its prefix cache, whose hits would leave none
            for the store.
        wrong: the chance of each fault of the store.
        window: the latest tokens whose rows attention reads; None: it reads all. Blocks before the
            window are given up.
    """

    def __init__(self, chance: random.Random) -> None:
        self.block_size = chance.choice([2, 4])
        self.stored_size = chance.choice([2, 4, 8])
        self.blocks = chance.choice([8, 12, 40])
        self.workers = chance.choice([1, 2])
        self.speed = chance.choice([0.2, 0.6, 1.0])
        self.budget = chance.choice([4, 16])
        self.forgets = chance.choice([0.0, 0.3])
        self.wrong = chance.choice([0.0, 0.1, 0.3])
        self.window = chance.choice([None, None, self.stored_size, 2 * self.stored_size])


class Pool:
    """The blocks of an engine, and its prefix cache.

    Attributes:
        free: blocks that no request has, the oldest first, with the row of the last token.
        cached: the row of a whole block's last token, and the block.
    """

    def __init__(self, draw: Draw) -> None:
        self.size = draw.block_size
        self.free = OrderedDict[int, int | None](dict.fromkeys(range(draw.blocks)))
        self.cached = dict[int, int]()
        self._references = Counter[int]()

    def take(self, many: int) -> list[int] | None:
        """Return free blocks, which lose what the prefix cache had in them; None: too few."""
        if len(self.free) < many:
            return None
        taken = list[int]()
        for _ in range(many):
            block, row = self.free.popitem(last=False)
            if row is not None and self.cached.get(row) == block:
                del self.cached[row]
            self._references[block] += 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Give blocks of the prefix cache to one more request."""
        for block in blocks:
            self.free.pop(block, None)
            self._references[block] += 1

    def give_back(self, request: Request) -> None:
        """Free the blocks of a request, whose rows stay in the prefix cache."""
        self.release(reversed(request.blocks))
        request.blocks = []

    def release(self, blocks: Iterable[int]) -> None:
        """Free blocks that nothing else has."""
        known = {block: row for row, block in self.cached.items()}
        for block in blocks:
            if block == GONE:
                continue
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block was freed twice"
            if not self._references[block]:
                self.free[block] = known.get(block)

    def slide(self, request: Request, computed: int, window: int | None) -> None:
        """Free the blocks of a request that no later token reads."""
        if window is None:
            return
        past = max(0, computed - window + 1) // self.size
        self.release(request.blocks[:past])
        request.blocks[:past] = [GONE] * past

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep blocks from reuse, for a scheduler side."""
        for block in blocks:
            assert block != GONE, "a block is held that is gone"
            assert self._references[block], "a block is held that nothing has"
            self._references[block] += 1

    def cache(self, request: Request) -> None:
        """Enter whole blocks in the prefix cache."""
        rows = request.rows
        for at in range(min(request.computed, len(rows)) // self.size):
            if request.blocks[at] == GONE:
                continue
            self.cached.setdefault(rows[(at + 1) * self.size - 1], request.blocks[at])

    def hit(self, request: Request) -> list[int]:
        """Return the blocks of the prefix cache that a request can use."""
        rows = request.rows
        found = list[int]()
        for at in range((len(rows) - 1) // self.size):
            block = self.cached.get(rows[(at + 1) * self.size - 1])
            if block is None:
                break
            found.append(block)
        return found

    def grow(self, request: Request, until: int) -> list[int] | None:
        """Give a request blocks for so many tokens; None if there are too few."""
        lacking = -(-until // self.size) - len(request.blocks)
        new = self.take(max(0, lacking))
        if new is not None:
            request.blocks += new
        return new


class Holder:
    """What a scheduler side keeps blocks by."""

    def __init__(self, pool: Pool) -> None:
        self.hold = pool.hold
        self.give_back = pool.release


class Engine:
    """The scheduler of a serving engine, whose hooks call a `SchedulerSide`."""

    def __init__(
        self,
        made: type[SchedulerSide],
        seed: int,
        store: Callable[[random.Random, Draw], Any] = Store,
        worker: Callable[[Engine, int], Any] = Worker,
    ) -> None:
        self.chance = chance = random.Random(seed)
        self.draw = draw = Draw(chance)
        self.store = store(chance, draw)
        groups = [Group(draw.block_size, draw.window)]
        now = itertools.count(0, 0.2).__next__  # each look at the clock takes a while
        self.pool = Pool(draw)
        holder = Holder(self.pool) if draw.window else None
        self.scheduler_side = made(draw.stored_size, groups, draw.workers, self.store, now, holder)
        self.workers = [worker(self, n) for n in range(draw.workers)]
        self.requests = dict[str, Request]()
        self.waiting = list[Request]()
        self.running = list[Request]()
        self.loads = dict[int, Load]()

    # --- requests

    def add(self) -> None:
        """Add a request, whose prompt has a beginning in common with others."""
        length = self.chance.randint(1, 24)
        family = self.chance.randint(0, 2)
        tokens = [family + n % 3 for n in range(length)]
        if self.chance.random() < 0.5:
            tokens[-1] = self.chance.randint(0, 3)
        wanted = length + self.chance.randint(1, 8)
        if -(-wanted // self.draw.block_size) > self.draw.blocks:
            return
        request = Request(f"r{len(self.requests)}", tokens, wanted)
        self.requests[request.name] = request
        self.scheduler_side.add(request.name, request.tokens)
        self.waiting.append(request)

    def abort(self) -> None:
        """Abort any request."""
        loading = [x.request for x in self.loads.values() if x.request.state == "loading"]
        some = [*self.waiting, *self.running, *loading]
        if not some:
            return
        request = self.chance.choice(some)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.finish(request)

    def finish(self, request: Request) -> None:
        """End a request; its blocks stay if the scheduler side or a load still has them."""
        retained = self.scheduler_side.finished(request.name)
        request.ends += 1
        loading = request.state == "loading"
        request.state = "retained" if retained else "ended"
        assert not (retained and loading), "two would free the blocks"
        if not (retained or loading):
            self.pool.give_back(request)

    def preempt(self, request: Request, gone: list[str]) -> None:
        """Take all blocks from a request that runs."""
        self.running.remove(request)
        self.pool.give_back(request)
        request.computed = 0
        request.preemptions += 1
        request.state = "waiting"
        self.waiting.insert(0, request)
        gone.append(request.name)

    # --- a step

    def step(self) -> None:
        """Schedule, carry out the plan, compute, and take the reports."""
        plan, until = self.schedule()
        for worker in self.workers:
            worker.before_step(plan)
        for request, (_, past) in until.items():
            self._compute(request, past)
        for worker in self.workers:
            worker.after_step(plan)
        for request in until:
            self.advance(request)
        self.take_reports()
        self.store.age()

    def schedule(self) -> tuple[Plan, dict[Request, tuple[list[int], int]]]:
        """Return the plan of a step, and for each request in it its new blocks and past token."""
        gone = list[str]()
        until = self._schedule_running(gone)
        for name in gone:
            self.scheduler_side.preempted(name)
        if not gone:
            self._schedule_waiting(until)
        for request, (new, past) in until.items():
            self.note_keys(request, past)
            blocks = tuple(request.blocks) if request.fresh else tuple(new)
            self.scheduler_side.scheduled(
                request.name, request.computed, past, (blocks,), replaced=request.fresh
            )
            request.fresh = False
        plan = self.scheduler_side.plan(idle=not until)
        for job in plan.loads:
            self.loads[job.number] = Load(self.requests[job.request], job)
        return plan, until

    def note_keys(self, request: Request, past: int) -> None:
        """Remember the rows that belong to the keys of a request's blocks."""
        size = self.draw.stored_size
        begin = request.noted
        end = past // size * size
        if begin >= end:
            return
        rows = request.rows
        request.noted = end
        request.chain = request.chain or KeyChain(size)
        keys = request.chain.extend(request.tokens[begin:end])
        for first, key in zip(range(begin, end, size), keys, strict=True):
            self.store.expected[key] = rows[first : first + size]

    def _schedule_running(self, gone: list[str]) -> dict[Request, tuple[list[int], int]]:
        """Give running requests tokens of this step; preempt the last ones without blocks."""
        until = dict[Request, tuple[list[int], int]]()
        for request in [*self.running]:
            if request not in self.running:
                continue
            past = min(len(request.tokens), request.computed + self.draw.budget)
            if past == request.computed:  # an earlier step has yet to bring its next token
                continue
            self.pool.slide(request, request.computed, self.draw.window)
            while (new := self.pool.grow(request, past)) is None:
                last = self.running[-1]
                until.pop(last, None)
                self.preempt(last, gone)
                if last is request:
                    break
            if new is not None:
                until[request] = new, past
                if request.fresh:  # it was loaded, and is scheduled as if it had waited
                    blocks = (tuple(request.blocks),)
                    self.scheduler_side.allocated(request.name, request.computed, 0, blocks)
        return until

    def _schedule_waiting(self, until: dict[Request, tuple[list[int], int]]) -> None:
        """Let requests run or load that wait, as long as there are blocks."""
        for request in [*self.waiting]:
            hit = self.pool.hit(request)
            computed = len(hit) * self.draw.block_size
            tokens = self.scheduler_side.leading(request.name, computed)
            if tokens is None:
                continue
            most = len(request.tokens) if request.handed else len(request.tokens) - 1
            assert computed + tokens <= most, "the last token is the engine's"
            self.pool.share(hit)
            request.blocks = hit
            past = min(len(request.tokens), computed + (tokens or self.draw.budget))
            if self.pool.grow(request, past) is None:
                self.pool.give_back(request)
                break
            self.waiting.remove(request)
            self.pool.slide(request, computed + tokens, self.draw.window)
            request.computed = computed
            request.load_tokens = tokens
            self.scheduler_side.allocated(request.name, computed, tokens, (tuple(request.blocks),))
            if tokens:
                request.loads += 1
                most = 1 + request.preemptions + 3
                assert request.loads <= most, "a request loads again and again"
                request.state = "loading"
            else:
                request.state = "running"
                request.fresh = True
                self.running.append(request)
                until[request] = [], past

    def _compute(self, request: Request, past: int) -> None:
        """Write the rows of a step, each worker its own; what they depend on must be right."""
        rows = request.rows
        window = self.draw.window
        first = 0 if window is None else max(0, request.computed - window + 1)
        for worker in self.workers:
            for token in range(first, past):
                block = request.blocks[token // self.draw.block_size]
                at = token % self.draw.block_size
                if token >= request.computed:
                    worker.write(block, at, rows[token])
                assert worker.row(block, at) == rows[token], "a request reads other rows"
        request.computed = past
        self.pool.cache(request)

    def take_reports(self, sure: bool = False) -> None:
        """Merge the reports, as an executor does, and let loads and retained requests end."""
        if not sure and self.chance.random() < 0.3:  # reports of several steps come together
            return
        merged = Report()
        for worker in self.workers:
            merged = merged.merged(worker.report)
            worker.report = Report()
        ended = self._loads_ended(merged)
        self.scheduler_side.take(merged)
        for request, past in ended.values():
            self._loaded(request, past)
        freed = set.intersection(*(worker.freed for worker in self.workers))
        self.scheduler_side.freed(freed)
        for name in freed:
            request = self.requests[name]
            assert request.state == "retained", "a request is reported twice"
            request.state = "ended"
            self.pool.give_back(request)
            for worker in self.workers:
                worker.freed.discard(name)

    def _loads_ended(self, report: Report) -> dict[int, tuple[Request, int]]:
        """Return the loads that have ended in all workers, with the first token that is missing."""
        ended = dict[int, tuple[Request, int]]()
        for number in report.missing.keys() & self.loads.keys():
            load = self.loads[number]
            load.ends += report.ends[number]
            load.missing |= report.missing[number]
            if load.ends == self.draw.workers:
                ended[number] = load.request, self.past_of(load)
                del self.loads[number]
        return ended

    def past_of(self, load: Load) -> int:
        """Return the first token that a load has not brought."""
        past = load.request.computed + load.request.load_tokens
        if load.missing:
            # The engine computes the whole block anew in which a token is missing.
            first = (load.job.first + min(load.missing)) * self.draw.stored_size
            past = min(past, first // self.draw.block_size * self.draw.block_size)
            if self.draw.window is not None:
                past = 0  # rows before the window are gone
        return past

    def _loaded(self, request: Request, past: int) -> None:
        """Let a request run that was loaded, from the first token that did not land."""
        if request.state == "ended":
            self.pool.give_back(request)
            return
        request.computed = max(request.computed, past) if past or not self.draw.window else 0
        if not request.computed:  # as if it had never been scheduled
            self.pool.give_back(request)
            request.state = "waiting"
            self.waiting.insert(0, request)
            return
        request.state = "running"
        request.fresh = True
        self.running.append(request)
        self.pool.cache(request)

    @property
    def idle(self) -> bool:
        """Return whether no request is left."""
        return all(each.state == "ended" for each in self.requests.values()) and not self.loads

    def run(self, steps: int) -> None:
        """Serve requests that come at any time, then those that are left."""
        for _ in range(steps):
            self.act()
        for _ in range(LIMIT):
            if self.settled:
                break
            self.step()
        self.check_end()

    def act(self) -> None:
        """Serve for a step, in which anything may come."""
        if self.chance.random() < 0.4:
            self.add()
        if self.chance.random() < 0.05:
            self.abort()
        if self.chance.random() < self.draw.forgets:
            self.pool.cached.clear()  # the engine's own hits would leave none for the store
        self.step()

    @property
    def settled(self) -> bool:
        """Return whether no request and no job is left."""
        return self.idle and not any(worker.busy for worker in self.workers)

    def check_end(self) -> None:
        """Check that all requests have ended, once each, and that no block is lost."""
        self.take_reports(sure=True)
        assert self.idle, "a request does not end"
        assert {each.ends for each in self.requests.values()} <= {1}, "a request ended twice"
        assert len(self.pool.free) == self.draw.blocks, "a block is lost"
        left = self.scheduler_side.statistics()
        assert left["requests"] == 0
        assert left["jobs"] == 0

    def advance(self, request: Request) -> None:
        """Append a token to a request whose tokens are all computed, or end it."""
        if request.state != "running" or request.computed < len(request.tokens):
            return
        if len(request.tokens) >= request.wanted:
            self.running.remove(request)
            self.finish(request)
        else:
            request.tokens.append(self.chance.randint(0, 2))
