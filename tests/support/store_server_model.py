# SPDX-License-Identifier: Apache-2.0
"""A small model of a store, of ranks and of their processes, that judges a `ServerState`.

Rows hold, for each cell (a head of a layer), the key whose bytes a rank has written there. A copy
takes time: a rank writes or reads at its end, whatever has happened to its session meanwhile. So a
row that two have in hand, or a block that is sealed too early, shows as a wrong key.

Some cells of some blocks do not fit: a rank then writes a flag, and reports that. In a row that is
copied raw, keys have a mark, so that a row with bytes of both kinds shows, too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from portakv.errors import PortaKVError
from portakv.serving.server.messages import (
    UNFIT,
    Grant,
    Join,
    Load,
    Progress,
    Save,
)
from portakv.serving.server.state import Client, Lease, ServerState, cells_of, whole_form
from portakv.storage import BlockForm
from portakv.storage.eviction import Pins
from portakv.storage.work import Mask

LAYERS = 2
HEADS = 4
PATIENCE = 5.0  # seconds of the model's time


def form_of(layers: tuple[int, int], heads: tuple[int, int], model: str = "model") -> BlockForm:
    """Return the form of a part of the model's blocks."""
    return BlockForm(
        model,
        "float32",
        2,
        (4, 4),
        4,
        (*layers, LAYERS),
        (*heads, HEADS),
        "block layer head kv token dim",
    )


WHOLE = form_of((0, LAYERS), (0, HEADS))
#: The parts of the ranks of an engine.
SPLITS = [
    [WHOLE],
    [form_of((0, LAYERS), (0, 2)), form_of((0, LAYERS), (2, 4))],
    [form_of((0, 1), (0, 4)), form_of((1, 2), (0, 4))],
    [WHOLE, WHOLE],
    [form_of((0, LAYERS), (0, 2)), form_of((0, LAYERS), (2, 4)), form_of((0, LAYERS), (2, 4))],
]


#: The form of the same blocks for those that do not fit, and the mark of the keys in their rows.
RAW = replace(WHOLE, notes="raw")
MARK = b"raw "
FLAG = b"flag"


def fits(key: bytes, cell: int) -> bool:
    """Return whether the bytes of a block's cell fit."""
    return key[0] % 3 != 0 or (key[0] + cell) % 4 != 0


def cells_in(number: int) -> list[int]:
    """Return the numbers of the bits that are set."""
    return [bit for bit in range(number.bit_length()) if number >> bit & 1]


class End:
    """A part of a handle that can be asked for its end."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over


class FakeHandle(End):
    """The handle of a load or save of the model's store."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        super().__init__()
        self.keys = keys
        self.landed = np.zeros(len(keys), np.bool_)
        self.released = End()
        self.cancelled = False
        self.waiting = list[Callable[[], None]]()  # copies that have not begun
        self.copies = set[FakeCopy]()

    def when_ended(self, call: Callable[[], object]) -> None:
        self.call = call

    def cancel(self) -> bool:
        self.cancelled = True
        self.waiting.clear()
        return True


@dataclass(eq=False)
class FakeCopy:
    """A copy that the model's store has lent."""

    store: FakeStore
    handle: FakeHandle
    rows: list[int]
    blocks: list[int]
    saves: bool
    form: BlockForm = WHOLE
    raw: BlockForm | None = None
    over: bool = False

    @property
    def cancelled(self) -> bool:
        return self.handle.cancelled

    def end(self, landed: Any = None, raw: Any = None, /) -> None:
        assert not self.over, "a copy ended twice"
        self.over = True
        self.handle.copies.discard(self)
        good = np.ones(len(self.rows), np.bool_) if landed is None else landed
        rough = np.zeros(len(self.rows), np.bool_) if raw is None else raw
        self.store.take_back(self, good, rough)


class FakeStore:
    """Rows, of which some cache a key, as a `FormStore` lends them."""

    def __init__(self, chance: random.Random, rows: int) -> None:
        self.chance = chance
        self.form = WHOLE
        self.raw: BlockForm | None = None  # it keeps blocks that do not fit in this form
        self.rough = set[int]()  # the rows of cached blocks of that form
        self.kept_raw = 0
        self.free = deque(range(rows))
        self.cached = dict[bytes, int]()
        self.readers = dict[int, int]()  # how many copies read a row
        self.saving = dict[bytes, FakeHandle]()
        self.handles = list[FakeHandle]()
        self.contents = [dict[int, bytes]() for _ in range(rows)]
        self.judge: Callable[[int], None] = lambda row: None  # before a row gets another block

    # --- as the state machine calls it

    @property
    def pinned(self) -> list[bytes]:
        """Return the keys of rows that are read or pinned, once for each time."""
        return [key for key, row in self.cached.items() for _ in range(self.readers.get(row, 0))]

    def pin(self, keys: Sequence[bytes]) -> Pins:
        pins = Pins(len(keys))
        for place, key in enumerate(keys):
            if key in self.cached:
                self._read(self.cached[key], 1)
                pins.add([place], partial(self._read, self.cached[key], -1))
        return pins

    def _read(self, row: int, more: int) -> None:
        self.readers[row] = self.readers.get(row, 0) + more

    def delete(self, keys: Sequence[bytes]) -> Mask:
        gone = np.zeros(len(keys), np.bool_)
        for place, key in enumerate(keys):
            gone[place] = self.cached.pop(key, None) is not None
        return gone

    def save_lent(self, copier: Any, keys: Sequence[bytes], **terms: Any) -> Any:
        handle = FakeHandle(keys)
        self.handles.append(handle)
        lacking = [i for i, key in enumerate(keys) if not self.knows(key)]
        for first in range(0, len(lacking), 2):
            some = lacking[first : first + 2]
            if len(self.free) < len(some):
                self.evict()
            if len(self.free) < len(some):
                continue  # dropped
            rows = [self.free.popleft() for _ in some]
            for row in rows:
                self.judge(row)
                self.contents[row] = {}
            copy = FakeCopy(self, handle, rows, some, True, raw=self.raw)
            handle.copies.add(copy)
            for i in some:
                self.saving[keys[i]] = handle
            copier.begin(copy)
        return handle

    def load_lent(self, copier: Any, keys: Sequence[bytes], **terms: Any) -> Any:
        handle = FakeHandle(keys)
        self.handles.append(handle)
        for i, key in enumerate(keys):
            if key not in self.cached:
                continue

            def begin(i: int = i, key: bytes = key) -> None:
                row = self.cached.get(key)
                if row is None:
                    return
                self.readers[row] = self.readers.get(row, 0) + 1
                form = RAW if row in self.rough else WHOLE
                copy = FakeCopy(self, handle, [row], [i], False, form)
                handle.copies.add(copy)
                copier.begin(copy)

            if self.chance.random() < 0.7:
                begin()
            else:
                handle.waiting.append(begin)
        return handle

    def borrow(self, keys: Sequence[bytes], packs: bool) -> Any:
        rows = [self.cached.get(key) for key in keys]
        if None in rows or not self.rough.isdisjoint(rows) or self.chance.random() < 0.5:
            return None
        for row in rows:
            self.readers[row] = self.readers.get(row, 0) + 1  # type: ignore[index, arg-type]
        return FakeCopy(self, FakeHandle(keys), rows, [*range(len(keys))], False)  # type: ignore[arg-type]

    # --- as the store goes on

    def knows(self, key: bytes) -> bool:
        return key in self.cached or key in self.saving

    def take_back(self, copy: FakeCopy, landed: Any, raw: Any) -> None:
        """Take the rows of a copy that has ended. ``raw``: the blocks that were copied raw."""
        for row, i, good, rough in zip(copy.rows, copy.blocks, landed, raw, strict=True):
            key = copy.handle.keys[i]
            if not copy.saves:
                self.readers[row] -= 1
                copy.handle.landed[i] = good
                continue
            self.saving.pop(key, None)
            if good and key not in self.cached:
                written = MARK + key if rough else key
                wrong = {x for x in self.contents[row].values() if x != written}
                assert not wrong, "a row was sealed with bytes of another block"
                have = len(self.contents[row])
                assert have == LAYERS * HEADS, f"a block was sealed with {have} cells"
                self.cached[key] = row
                self.rough.discard(row)
                if rough:
                    self.rough.add(row)
                    self.kept_raw += 1
                copy.handle.landed[i] = True
            else:
                self.free.append(row)

    def evict(self) -> None:
        """Free some rows that nothing reads."""
        for key, row in [*self.cached.items()]:
            if not self.readers.get(row) and self.chance.random() < 0.5:
                del self.cached[key]
                self.free.append(row)

    def go_on(self) -> list[FakeHandle]:
        """Begin a copy that waits, or end handles; return those that have ended."""
        for handle in self.handles:
            if handle.waiting and self.chance.random() < 0.5:
                handle.waiting.pop()()
        ended = list[FakeHandle]()
        for handle in [*self.handles]:
            if handle.waiting or handle.copies:
                continue
            handle.released.over = True
            if self.chance.random() < 0.5:
                handle.over = True
                handle.call()
                self.handles.remove(handle)
                ended.append(handle)
        return ended


@dataclass(eq=False)
class Copying:
    """A copy that a rank makes: of rows, of keys, in a session."""

    rank: Rank
    session: int
    number: int
    grant: Grant
    keys: list[bytes]
    saves: bool


@dataclass(eq=False)
class Asked:
    """A request of a rank."""

    keys: list[bytes]
    saves: bool
    more: bool = True
    stored: bytes | None = None

    @property
    def ended(self) -> bool:
        return self.stored is not None if self.saves else not self.more


@dataclass(eq=False)
class Rank:
    """A rank of an engine, in a process."""

    engine: str
    form: BlockForm
    pid: int
    client: Client | None = None
    before: int = 0
    plans: deque[tuple[bool, list[bytes]]] = field(default_factory=deque)
    asked: dict[int, Asked] = field(default_factory=dict)
    copies: list[Copying] = field(default_factory=list)
    reports: deque[tuple[int, int, bytes]] = field(default_factory=deque)
    numbers: int = 0
    stopped: bool = False
    dead: bool = False
    seen_dead: bool = False

    @property
    def cells(self) -> int:
        return cells_of(self.form)


class Walk:
    """A random walk of engines over a server's state.

    Args:
        kind: the class of the state, with or without a bug.
    """

    def __init__(self, kind: type[ServerState], seed: int) -> None:
        self.chance = random.Random(seed)
        self.time = 0.0
        self.state = kind(bool, PATIENCE, lambda: self.time)
        self.store = FakeStore(self.chance, self.chance.choice([4, 8, 24]))
        self.store.judge = self.judge
        self.store.raw = self.chance.choice([RAW, RAW, None])
        stores: Any = self.state.stores
        stores[whole_form(WHOLE).digest] = self.store
        self.ranks = list[Rank]()
        self.pids = 0
        self.loaded = 0
        self.stored = 0
        for number in range(self.chance.choice([1, 2])):
            for form in self.chance.choice(SPLITS):
                self.new_rank(f"engine {number}", form)

    def new_rank(self, engine: str, form: BlockForm) -> None:
        self.pids += 1
        self.ranks.append(Rank(engine, form, self.pids))

    def judge(self, row: int) -> None:
        """Before a row gets another block: nothing that may still run uses it."""
        for rank in self.ranks:
            if not rank.dead:
                hands = [copy for copy in rank.copies if row in copy.grant.rows]
                assert not hands, "a row that a process uses was lent to another one"

    # --- steps

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        self.settle()

    def step(self) -> None:
        rank = self.chance.choice(self.ranks)
        kinds: list[tuple[Callable[[Rank], None], float]] = [
            (self.join, 3),
            (self.plan, 3),
            (self.ask, 6),
            (self.copy, 8),
            (self.deliver, 8),
            (self.advance, 6),
            (self.pass_time, 1),
            (self.lose, 0.4),
            (self.kill, 0.3),
            (self.see_dead, 0.5),
            (self.stop, 0.4),
            (self.go_on, 1.5),
            (self.give_up, 0.4),
        ]
        weights = [weight for _, weight in kinds]
        act = self.chance.choices([kind for kind, _ in kinds], weights)[0]
        act(rank)

    def join(self, rank: Rank) -> None:
        """Begin a session, unless copies of the session before are under way."""
        if rank.client is not None or rank.stopped or rank.dead or rank.copies:
            return
        join = Join(rank.engine, (1, rank.pid, 1), "", (rank.form.json(),), rank.before)
        rank.client = self.state.join(join)
        rank.before = rank.client.session

    def plan(self, rank: Rank) -> None:
        """Have all ranks of an engine save, or load, the same blocks."""
        first = self.chance.randrange(12)
        names = range(first, first + self.chance.choice([1, 2, 5]))
        keys = [name.to_bytes(32, "little") for name in names]
        saves = self.chance.random() < 0.6
        for each in self.ranks:
            if each.engine == rank.engine:
                each.plans.append((saves, keys))

    def ask(self, rank: Rank) -> None:
        if not rank.plans or rank.stopped or rank.dead:
            return
        saves, keys = rank.plans.popleft()
        if rank.client is None:
            return
        rank.numbers += 1
        rank.asked[rank.numbers] = Asked(keys, saves)
        words = rank.client.session, rank.numbers, 0, tuple(keys)
        try:
            if saves:
                progress = self.state.save(Save(*words, None, "background"))
            else:
                progress = self.state.load(Load(*words, 0.0, "urgent"))
        except PortaKVError:
            del rank.asked[rank.numbers]
            return
        self.hear(rank, progress)

    def hear(self, rank: Rank, progress: Progress) -> None:
        """Have a rank take rows."""
        asked = rank.asked.get(progress.number)
        if asked is None:
            return
        asked.more = asked.more and progress.more
        asked.stored = progress.stored if progress.stored is not None else asked.stored
        for grant in progress.grants:
            words = progress.session, progress.number, grant, asked.keys, asked.saves
            rank.copies.append(Copying(rank, *words))

    def copy(self, rank: Rank) -> None:
        """End a copy: its bytes are written, or read, now."""
        if not rank.copies or rank.stopped or rank.dead:
            return
        copy = rank.copies.pop(self.chance.randrange(len(rank.copies)))
        good = self.chance.random() < 0.95
        landed = bytearray([good]) * (len(copy.grant.places))
        mark = MARK if copy.grant.form else b""
        places = zip(copy.grant.rows, copy.grant.places, strict=True)
        for number, (row, place) in enumerate(places):
            key = copy.keys[place]
            for cell in cells_in(rank.cells) if good else ():
                if not copy.saves:
                    found = self.store.contents[row].get(cell)
                    assert found == mark + key, "a load read bytes of another block"
                    self.loaded += 1
                elif mark or fits(key, cell):
                    self.store.contents[row][cell] = mark + key
                else:
                    self.store.contents[row][cell] = FLAG
                    landed[number] = UNFIT
        rank.reports.append((copy.session, copy.grant.lease, bytes(landed)))

    def deliver(self, rank: Rank) -> None:
        """Deliver a report, also of a session that has ended."""
        if rank.reports and not rank.stopped and not rank.dead:
            self.state.report(*rank.reports.popleft())

    def advance(self, rank: Rank) -> None:
        """Have the store and the state go on, and tell clients."""
        for handle in self.store.go_on():
            self.stored += int(handle.landed.sum())
        self.state.advance()
        for client, progress in self.state.take():
            for each in self.ranks:
                if each.client is client and not each.dead:
                    self.hear(each, progress)

    def pass_time(self, rank: Rank) -> None:
        self.time += self.chance.choice([0.5, PATIENCE])

    def lose(self, rank: Rank) -> None:
        """End a session, whose copies go on."""
        if rank.client is not None:
            self.state.lost(rank.client)
            rank.client = None
            rank.asked.clear()

    def kill(self, rank: Rank) -> None:
        """End a process; the state learns of the connection now, and of the process later."""
        if not rank.dead:
            rank.dead = True
            self.lose(rank)
            self.new_rank(rank.engine, rank.form)

    def see_dead(self, rank: Rank) -> None:
        for each in self.ranks:
            if each.dead and not each.seen_dead:
                each.seen_dead = True
                for process in self.state.processes():
                    if process[1] == each.pid:
                        self.state.process_ended(process)
                return

    def stop(self, rank: Rank) -> None:
        """Stop a process in the middle of its copies; its session may end."""
        if not rank.dead:
            rank.stopped = True
            if self.chance.random() < 0.7:
                self.lose(rank)

    def go_on(self, rank: Rank) -> None:
        rank.stopped = False

    def give_up(self, rank: Rank) -> None:
        """Have a rank wait no longer for a request."""
        if rank.client is not None and rank.asked:
            self.state.stop(rank.client.session, self.chance.choice([*rank.asked]))

    def settle(self) -> None:
        """Let everything end, and judge that it does."""
        for rank in self.ranks:
            rank.stopped = False
            rank.plans.clear()
        for _ in range(60):
            self.time += 1.0
            for rank in self.ranks:
                self.end_copies(rank)
                self.see_dead(rank)
                self.join(rank)  # the rows of an earlier session are free from here on
            self.advance(self.ranks[0])
        self.judge_end()

    def end_copies(self, rank: Rank) -> None:
        """End all copies of a process that lives, and deliver its reports."""
        while rank.copies and not rank.dead:
            self.copy(rank)
        while rank.reports and not rank.dead:
            self.deliver(rank)

    def judge_end(self) -> None:
        """Judge that everything has ended, and that no row is lost."""
        for rank in self.ranks:
            if rank.client is not None:
                ends = [asked.ended for asked in rank.asked.values()]
                assert all(ends), "a request has not ended"
        assert not self.store.handles, "a handle of the store has not ended"
        now = self.state.statistics()
        assert now["leases"] == 0, "a lease has not ended"
        assert now["requests"] == 0
        while self.store.cached:
            self.store.evict()
        assert len(self.store.free) == len(self.store.contents), "a row was lost"


class Forgetful(ServerState):
    """A state that gives rows to others as soon as a session has ended."""

    def lost(self, client: Client) -> None:
        super().lost(client)
        self.process_ended(client.process)


class Believing(ServerState):
    """A state that takes blocks that do not fit for copied ones."""

    def report(self, session: int, number: int, landed: bytes) -> None:
        super().report(session, number, bytes(map(bool, landed)))


class Early(ServerState):
    """A state that has blocks copied raw as soon as a rank could not pack them."""

    def _return(self, lease: Lease, landed: Iterable[int] = ()) -> None:
        super()._return(lease, landed)
        lent = lease.lent
        if lent.ended or lent.raw is not None or lent.copy.raw is None or not lent.unfit:
            return
        lent.raw = [*lent.unfit]
        lent.assigned = 0
        for place in lent.raw:
            lent.covered[place] = 0
        for client, number in lent.work.requesters.items():
            self._grant(lent, client, number)


class Hasty(ServerState):
    """A state that takes a block for whole when the first rank has reported."""

    def report(self, session: int, number: int, landed: bytes) -> None:
        lease = self.leases.get(number)
        if lease is not None and lease.client.session == session:
            lease.cells = -1
        super().report(session, number, landed)
