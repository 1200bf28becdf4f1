# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of an engine, which knows what can be loaded, and who uses what; and what
its hooks cost the engine's steps.

It is a state machine: it starts no thread, waits for nothing, and sends nothing. An engine's hooks
call it, and carry its plans to the workers and their reports back.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate
from secrets import token_bytes
from sys import maxsize
from types import MappingProxyType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from portakv.errors import InvalidTerms
from portakv.runtime import tracing
from portakv.runtime.bounded import Bounded
from portakv.serving.groups import Group
from portakv.serving.handover import Endpoint, Tickets
from portakv.serving.local import KeptPrefix
from portakv.serving.plan import (
    NO_HANDOVERS,
    NO_PLAN,
    Blocks,
    Job,
    Plan,
    PullJob,
    RemoteRows,
    Report,
)
from portakv.storage.keys import KeyChain
from portakv.storage.tiers.base import Keys

#: The most keys that are remembered because a load did not bring them.
MOST_FAILED = 1 << 16
#: The most blocks whose tokens are remembered.
MOST_DESCRIBED = 1 << 16
#: A prompt with fewer tokens is computed sooner than states are handed over.
SHORT = 64
#: Seconds for which a request waits for an index that asks another host.
PATIENCE = 2.0
_NONE = frozenset[int]()
NO_STATES: Mapping[int, Mapping[int, int]] = MappingProxyType({})


class Index(Protocol):
    """What a scheduler side queries about the stored blocks."""

    def leading(self, keys: Keys, first: int, /) -> int | None:
        """Return how many leading blocks can be loaded; None if another host has yet to answer.

        At the end of the last one every group of layers is valid. ``first``: the number of the
        first block in its request.
        """

    def has(self, key: bytes, states: bool, /) -> bool:
        """Return whether a block can be loaded, as far as is known here.

        ``states``: also those at its end, of groups that have states. Else only its rows.
        """

    @property
    def losses(self) -> int:
        """Return a number that changes if a block may have been lost."""


class BlockHolder(Protocol):
    """What keeps an engine from reusing blocks."""

    def hold(self, blocks: Sequence[int], /) -> None:
        """Keep blocks, which a request has now, from reuse after the request gives them up."""

    def give_back(self, blocks: Sequence[int], /) -> None:
        """Keep blocks no longer, once for each time that they were kept."""


class Described(NamedTuple):
    """What a stored block has been made of.

    Attributes:
        after: the key of the block before it; None: it begins a prompt.
        tokens: of the block.
        about: what the engine adds about the request.
    """

    after: bytes | None
    tokens: tuple[int, ...]
    about: object


class _Answer(NamedTuple):
    """How many stored blocks an index has from one on, until it loses blocks."""

    first: int
    stored: int
    losses: int


@dataclass
class _Request:
    """What is known of a request.

    Attributes:
        tokens: its tokens; the engine appends to them.
        extra: by the number of a stored block, what its key depends on besides its tokens.
        blocks: of each group, the engine's blocks from the first token on.
        considered: stored blocks before this number are saved, or are not to be; None: its first
            step says which.
        limit: no stored block from this number on is offered: a load did not bring it.
        promised: the first stored block and the past token of the latest answer.
        load: a load or pull that is in flight, or planned.
        kept: the blocks that are kept for a load, with their keys.
        remote: rows that another engine has, before they are pulled.
        offered: its rows are offered to other engines.
        reading: the numbers of saves that may still read blocks.
        about: what the engine adds about it.
        forgotten: its keys name blocks that must not be stored any more.
        queried: when an index was first queried that has yet to answer.
        answered: the latest answer of the index.
    """

    name: str
    tokens: Sequence[int]
    chain: KeyChain
    extra: Mapping[int, bytes]
    blocks: list[list[int]]
    considered: int | None = None
    limit: int = maxsize
    promised: int = 0
    load: Job | PullJob | None = None
    kept: tuple[KeptPrefix, Keys] | None = None
    remote: RemoteRows | None = None
    offered: bool = False
    reading: set[int] = field(default_factory=set)
    queried: float | None = None
    answered: _Answer | None = None
    ended: bool = False
    forgotten: bool = False
    about: object = None

    def keys(self, count: int) -> list[bytes]:
        """Return the keys of the first so many stored blocks, whose tokens are there, or of more.

        The list is not a copy: a step of a long request costs no more than that of a short one.
        """
        made = len(self.chain.keys)
        if made < count:
            size = self.chain.block_size
            extra = None
            if self.extra:
                extra = [self.extra.get(number) for number in range(made, count)]
            self.chain.extend(self.tokens[made * size : count * size], extra)
        return self.chain.keys


@dataclass
class _Live:
    """A load, save or pull that has not ended.

    Attributes:
        ends: in how many workers it has ended.
        releases: in how many workers a save's blocks are no longer read.
        missing: the positions of keys that did not land, or were not stored, in any worker; of a
            pull that failed the position 0.
        held: blocks that a save reads, and that the engine may give up before.
        began: where the span of a load begins.
        loads: it is a load.
    """

    job: Job | PullJob
    request: _Request
    ends: int = 0
    releases: int = 0
    missing: frozenset[int] = _NONE
    held: tuple[int, ...] = ()
    began: tracing.Began = field(default_factory=tracing.begin)
    loads: bool = False


class SchedulerSide:
    """Decides for the requests of one engine which blocks its workers load and save.

    The engine's scheduler calls, in the order of a request's life: `add`; `leading` when it looks
    for computed tokens; `allocated` after it took blocks; `scheduled` in each step that computes
    tokens of it; `preempted` if it takes the blocks away; `finished`; and `freed` when the workers
    have reported a request that was retained. Once a step it calls `plan`, and `take` for reports.
    A request that was not added, or that has ended, is left alone: nothing is loaded or saved.

    Engines hand requests over to each other: `offer` before `finished` in the one that has computed
    a prompt, and the result as ``remote`` of `add` in the one that goes on. `open_offers` says
    where workers offer rows.

    Args:
        block_size: the tokens of a stored block. A multiple of each group's block size, or, of
            groups without states, a divisor of it. No more than a group's window, or than its
            block, and a divisor of a group's chunk.
        groups: of the engine's layers.
        workers: how many of them report each load and save.
        index: of the stored blocks; None: nothing is stored.
        now: returns the time in seconds.
        holder: keeps blocks from reuse that a save reads, of groups with a window, chunks or
            states. Without one, the engine must not give them up while a request runs.
        keep: keeps blocks that the index has counted in host memory; their keys, and the number of
            the first one in its request. For an engine that cannot be told that a load failed:
            others are not offered. They are kept until the end of the load.

    Raises `InvalidTerms` for sizes that do not fit.
    """

    def __init__(
        self,
        block_size: int,
        groups: Sequence[Group],
        workers: int,
        index: Index | None,
        now: Callable[[], float] = time.monotonic,
        holder: BlockHolder | None = None,
        keep: Callable[[Keys, int], KeptPrefix] | None = None,
    ) -> None:
        for group in groups:
            group.check(block_size)
        self.counts = Counter[str]()
        self._size = block_size
        self._groups = groups
        self._workers = workers
        self._index = index
        self._now = now
        self._holder = holder
        self._keep = keep
        self._requests = dict[str, _Request]()
        self._jobs = dict[int, _Live]()  # by number
        self._tickets = Tickets(now)
        self._saving = dict[bytes, int]()  # by key the number of a save that has not ended
        self._failed: Bounded[bytes, None] = Bounded("keys that a load did not bring", MOST_FAILED)
        self._described: Bounded[bytes, Described] | None = None  # what blocks were made of
        self._generation = b""  # part of all keys, other bytes after `forget`
        self._next = Plan()

    @property
    def _has_states(self) -> bool:
        return any(group.states for group in self._groups)

    # --- what the scheduler says and asks

    def add(
        self,
        request: str,
        tokens: Sequence[int],
        salt: bytes = b"",
        extra: Mapping[int, bytes] | None = None,
        about: object = None,
        remote: RemoteRows | None = None,
    ) -> None:
        """Take note of a request.

        Args:
            tokens: of the prompt; the engine appends the generated ones to the same sequence.
            salt: keeps tenants and adapters apart.
            extra: by the number of a stored block, what else its rows depend on, such as an image.
            about: an object for `Described`.
            remote: the rows of all tokens of the prompt, which another engine has.

        Raises `InvalidTerms` for a name that a request has which has not ended.
        """
        if request in self._requests:
            raise InvalidTerms(
                f"Expected a new name for a request, got {request!r}, which is in use. Report its "
                f"end by finished() first."
            )
        chain = KeyChain(self._size, self._generation + salt)
        blocks = [list[int]() for _ in self._groups]
        state = _Request(request, tokens, chain, extra or {}, blocks, about=about, remote=remote)
        self._requests[request] = state
        if remote is not None:
            self._tickets.expect(request, remote)

    def leading(self, request: str, computed: int) -> int | None:
        """Return how many tokens can be loaded that follow the computed ones.

        None: another host has yet to answer; ask again in the next step. The last token is left to
        the engine, which needs its logits, unless another engine has its row: then the engine
        computes that row again.
        """
        state = self._requests.get(request)
        if state is None:
            return 0
        if state.remote is not None and state.remote.tokens > computed:
            return state.remote.tokens - computed
        first = computed // self._size
        most = min((len(state.tokens) - 1) // self._size, state.limit)
        count: int | None = 0
        if self._index is not None and most > first:
            count = self._count_stored(self._index, state, first, most)
        if self._keep is not None and count is not None:
            count = self._kept(self._keep, state, first, count)
        if count is None:
            now = self._now()
            if state.queried is None:
                state.queried = now
            if now - state.queried < PATIENCE:
                return None
            self.counts["unanswered"] += 1
            count = 0
        state.queried = None
        state.promised = first
        return max(0, (first + count) * self._size - computed)

    def allocated(self, request: str, computed: int, tokens: int, blocks: Blocks) -> None:
        """Plan the load that the scheduler has decided on after `leading`.

        Args:
            computed: tokens whose rows the engine has already; their blocks are not written.
            tokens: how many to load, at most as many as `leading` returned; 0: none.
            blocks: of each group, all blocks of the request.
        """
        state = self._requests.get(request)
        if state is None:
            return
        state.blocks = [[*ids] for ids in blocks]
        state.considered = None
        if state.remote is not None:
            self._pull(state, computed, tokens)
            return
        if not tokens:
            self._keep_no_longer(state)
            return
        first = state.promised
        past = -(-(computed + tokens) // self._size)
        keys = state.keys(past)
        state.considered = past
        last = {past - 1: self._blocks_at(state, past)}
        begins = [computed] * len(self._groups)
        state.load = self._job(state, first, past, keys, begins, last)
        ends = (computed + tokens) % self._size == 0  # there is a state
        for group, ids in self._by_group(state.load.blocks):
            self._check_state(group, ids if ends else (), computed + tokens, request)
        self._jobs[state.load.number].loads = True
        self._next.loads.append(state.load)
        self.counts["loads"] += 1
        self.counts["promised"] += tokens

    def note_computed(self, tokens: int) -> None:
        """Count tokens that the scheduler has found nowhere, so that the engine computes them."""
        self.counts["computed"] += tokens

    def scheduled(
        self,
        request: str,
        computed: int,
        until: int,
        blocks: Blocks = (),
        replaced: bool = False,
        states: Mapping[int, Mapping[int, int]] = NO_STATES,
    ) -> None:
        """Take note of a step that computes tokens of a request, and plan what is saved after it.

        Args:
            computed: tokens whose rows existed before the step.
            until: tokens whose rows exist after it; those of drafted tokens do not count.
            blocks: of each group, blocks that the request got since the last call.
            replaced: these are all its blocks.
            states: by a number of tokens, the blocks that have the states after them when the step
                has ended, by the number of the group. Of groups whose states the engine tells.
        """
        state = self._requests.get(request)
        if state is None or state.forgotten:
            return
        for ids, new in zip(state.blocks, blocks, strict=False):
            if replaced:
                ids.clear()
            ids += new
        past = min(until, len(state.tokens)) // self._size
        first = state.considered
        if first is None:  # of blocks that others have computed, what the engine keeps
            groups = self._by_group(state.blocks)
            first = max(self._first_kept(group, ids, computed) for group, ids in groups)
            state.considered = first
        if past <= first:
            return
        keys = state.keys(past)
        state.considered = past
        ends = self._ends_of_states(state, first, past, computed, until, states)
        wanted = (n for n in range(first, past) if self._is_wanted(keys[n], n in ends))
        for run in _runs(wanted):
            self._save(state, run.start, run.stop, keys, computed, ends)

    def open_offers(self, endpoints: Sequence[Endpoint], lease: float) -> None:
        """Take note of where each worker offers rows, and for how many seconds it keeps them."""
        self._tickets.open(endpoints, lease)

    def awaits(self, request: str) -> bool:
        """Return whether a request is to pull the rows of another engine."""
        state = self._requests.get(request)
        return state is not None and state.remote is not None

    def offer(self, request: str, tokens: int, blocks: Blocks) -> RemoteRows | None:
        """Plan to keep the rows of a request that ends now, for another engine.

        The request is retained until an engine has taken them or their lease is over.

        Args:
            tokens: the first ones of the request, whose rows have been computed.
            blocks: of each group, all blocks of the request. Those with the states after these
                tokens still have them.

        Returns:
            What the other engine's scheduler side needs; None: nothing is offered.
        """
        state = self._requests.get(request)
        if state is None or state.forgotten or not self._tickets.offers:
            return None
        kept = tuple(
            _last(group, ids, tokens) if group.states else tuple(ids)
            for group, ids in self._by_group(blocks)
        )
        lacks = any(group.states and ids[-1:] in ((), (-1,)) for group, ids in self._by_group(kept))
        if lacks or (self._has_states and tokens < SHORT):
            return None
        state.offered = True
        self.counts["offers"] += 1
        return self._tickets.offer(request, tokens, kept)

    def preempted(self, request: str) -> None:
        """Take note that the scheduler took all blocks of a request; it may go on later."""
        state = self._requests.get(request)
        if state is None:
            return
        for job in [each for each in self._next.saves if each.request == request]:
            self._withdraw(job)
        # The workers release them before anything is written, whatever they report later.
        self._next.stop += sorted(state.reading)
        state.reading.clear()
        state.blocks = [list[int]() for _ in self._groups]
        state.considered = None
        state.queried = None

    def finished(self, request: str) -> bool:
        """Take note of the end of a request, and return whether its blocks are retained.

        True: the engine keeps the blocks until the workers have reported the request, and calls
        `freed` then. A request that ends during a load is not retained: the engine keeps its blocks
        until the end of the load.
        """
        state = self._requests.get(request)
        if state is None:
            return False
        state.ended = True
        if state.remote is not None:
            state.remote = None
            self._tickets.release(request)
        retained = bool(state.reading) or state.offered
        if state.load is None:
            self._keep_no_longer(state)
        if retained:
            self._next.retained.append(request)
        elif state.load is None:
            del self._requests[request]
        return retained

    def forget(self) -> bool:
        """Offer no block again that was saved until now, such as after other weights were loaded.

        Requests of now are neither loaded nor saved any more. Later ones have other keys, also
        those of the same tokens; what is stored stays until tiers evict it. Other engines take no
        rows that this one has offered.

        Returns False if a load has not ended, whose request will read rows that were saved before.
        """
        self._generation = token_bytes(16)
        for job in [*self._next.saves]:
            self._withdraw(job)
        self._tickets.revoke()
        for name, state in self._requests.items():
            state.limit = 0
            state.forgotten = True
            if state.remote is not None:
                state.remote = None
                self._tickets.release(name)
        return all(state.load is None for state in self._requests.values())

    def freed(self, requests: Iterable[str]) -> None:
        """Take note that all workers have reported requests that were retained."""
        for request in requests:
            self._requests.pop(request, None)

    @property
    def retains(self) -> bool:
        """Return whether an engine keeps blocks until saves are released.

        It does not wait for blocks that other engines take.
        """
        if any(live.held for live in self._jobs.values()):
            return True
        ended = [state for state in self._requests.values() if state.ended and state.load is None]
        return any(not state.offered for state in ended)

    # --- what the workers do

    def plan(self, idle: bool = False) -> Plan:
        """Return what the workers do in this step; `NO_PLAN` if that is nothing.

        ``idle``: the step computes nothing.
        """
        made = self._next
        made.handovers = self._tickets.plan()
        some = made.loads or made.saves or made.stop or made.retained
        if not some and made.handovers is NO_HANDOVERS:
            return NO_PLAN
        made.idle = idle and bool(made.loads or made.handovers.pulls)
        self._next = Plan()
        return made

    def describe_blocks(self) -> None:
        """Remember from now on what the blocks of loads and saves have been made of."""
        if self._described is None:
            self._described = Bounded("blocks that a scheduler side describes", MOST_DESCRIBED)

    def described(self, key: bytes) -> Described | None:
        """Return what a block has been made of, if that is remembered."""
        return None if self._described is None else self._described.get(key)

    def take(self, report: Report) -> None:
        """Take note of what workers have seen. Each worker's part comes once, in any order."""
        for number, workers in report.released.items():
            self._release(number, workers)
        for number, workers in report.ends.items():
            self._end(number, workers, report.missing.get(number, _NONE))
        for how, many in report.offers.items():
            self.counts[f"offers_{how}"] += many

    def statistics(self) -> dict[str, int]:
        """Return the requests and jobs now, the keys that failed, and the counters."""
        now = {"requests": len(self._requests), "jobs": len(self._jobs)}
        return {**now, "failed_keys": len(self._failed), **self.counts}

    def _count_stored(self, index: Index, state: _Request, first: int, most: int) -> int | None:
        """Return how many stored blocks can be loaded from one on; None: not known yet.

        A waiting request is looked up in each step: blocks that were there are not looked up again
        until a block was lost.
        """
        losses = index.losses
        known = 0
        answer = state.answered
        if answer is not None and (answer.first, answer.losses) == (first, losses):
            # A shorter prefix may lack a state, or rows of a window, at its end.
            known = answer.stored if answer.stored <= most - first else 0
        keys = state.keys(most)[first + known : most]
        more = index.leading(keys, first + known) if keys else 0
        if more is None:
            return None
        count = known + more
        state.answered = _Answer(first, count, losses)
        if not self._failed:
            return count
        offered = state.keys(first + count)[first : first + count]
        sound = next((n for n, key in enumerate(offered) if key in self._failed), count)
        return count if sound == count else index.leading(offered[:sound], first)

    def _kept(
        self, keep: Callable[[Keys, int], KeptPrefix], state: _Request, first: int, count: int
    ) -> int | None:
        """Keep so many stored blocks of a waiting request from one on, in place of those that were
        kept for it; return how many are kept, or None as `leading` does."""
        keys = state.keys(first + count)[first : first + count]
        if state.kept is not None and state.kept[1] != keys:
            self._keep_no_longer(state)
        if not keys:
            return 0
        if state.kept is None:
            state.kept = keep(keys, first), keys
        return state.kept[0].count()

    def _keep_no_longer(self, state: _Request) -> None:
        if state.kept is not None:
            state.kept[0].release()
            state.kept = None

    def _is_wanted(self, key: bytes, states: bool) -> bool:
        """Return whether a computed block is to be saved: no one saves it, and no load finds it.

        ``states``: the states at its end could be saved too.
        """
        if self._index is None or key in self._saving:
            return False
        return key in self._failed or not self._index.has(key, states)

    def _by_group(self, blocks: Blocks | list[list[int]]) -> Iterable[tuple[Group, Sequence[int]]]:
        return zip(self._groups, blocks, strict=True)

    def _ends_of_states(
        self,
        state: _Request,
        first: int,
        past: int,
        computed: int,
        until: int,
        told: Mapping[int, Mapping[int, int]],
    ) -> dict[int, list[int]]:
        """Return the stored blocks at whose ends the engine has the states of all groups after a
        step, and the block of each group there.

        The tokens of a step may be known only in the next one, which leaves the state before it
        alone: then ``computed`` is the end of the block.
        """
        ends = dict[int, list[int]]()
        if not self._has_states:
            return ends
        for number in range(max(first, computed // self._size - 1), past):
            tokens = (number + 1) * self._size
            if not computed <= tokens <= until:
                continue
            blocks = self._blocks_at(state, number + 1)
            kept = list[bool]()
            for at, group in enumerate(self._groups):
                if group.states == "told":
                    blocks[at] = told.get(tokens, {}).get(at, -1)
                over = group.states == "last" and tokens not in (computed, until)
                kept.append(not group.states or (blocks[at] >= 0 and not over))
            if all(kept):
                ends[number] = blocks
        return ends

    def _blocks_at(self, state: _Request, past: int) -> list[int]:
        """Return the block of each group in which so many stored blocks end; -1: none."""
        tokens = past * self._size
        places = [tokens // group.block_size - 1 for group in self._groups]
        return [
            ids[at] if 0 <= at < len(ids) else -1
            for at, ids in zip(places, state.blocks, strict=True)
        ]

    def _save(
        self,
        state: _Request,
        first: int,
        past: int,
        keys: Keys,
        computed: int,
        ends: Mapping[int, Sequence[int]],
    ) -> None:
        """Plan a save of consecutive stored blocks, with the states at some of their ends.

        The engine may have given up blocks before a window or chunk, and reuse them in this step:
        the save has the rows of the other groups there.
        """
        # The first stored block of a save begins where a block of the engine begins.
        most = max(group.block_size for group in self._groups)
        first = first * self._size // most * most // self._size if most > self._size else first
        groups = self._by_group(state.blocks)
        begins = [max(first, self._first_kept(*each, computed)) * self._size for each in groups]
        for begin, (group, ids) in zip(begins, self._by_group(state.blocks), strict=True):
            size = group.block_size
            if not group.states and -1 in ids[begin // size : -(-past * self._size // size)]:
                return
        job = self._job(state, first, past, keys, begins, ends)
        self._saving.update(dict.fromkeys(job.keys, job.number))
        state.reading.add(job.number)
        if self._holder is not None and not all(group.is_whole for group in self._groups):
            groups = self._by_group(job.blocks)
            some = (block for group, ids in groups if not group.is_whole for block in ids)
            held = tuple(block for block in some if block >= 0)
            self._jobs[job.number].held = held
            self._holder.hold(held)
        self._next.saves.append(job)
        self.counts["saves"] += 1

    def _first_kept(self, group: Group, ids: Sequence[int], computed: int) -> int:
        """Return the first stored block of which an engine keeps all rows of a group in a step.

        Args:
            ids: the blocks of the group.
            computed: tokens whose rows existed before the step.
        """
        if group.states:
            return 0
        first = group.first_needed(computed) // group.block_size
        while first < len(ids) and ids[first] < 0:
            first += 1
        return -(-first * group.block_size // self._size)

    def _check_state(self, group: Group, ids: Sequence[int], tokens: int, request: str) -> None:
        """Raise `InvalidTerms` if a group has states, and no block for that after some tokens."""
        if group.states and (not ids or ids[-1] < 0):
            raise InvalidTerms(
                f"Expected a block for the state after {tokens} tokens of the request {request!r}, "
                f"got none. Load as many tokens as leading() returned, and allocate the blocks of "
                f"all groups before."
            )

    def _pull(self, state: _Request, computed: int, tokens: int) -> None:
        """Plan a pull of the rows that another engine has; let it use them again if the engine
        wants none of them. Raises `InvalidTerms` without a block for a state."""
        remote = state.remote
        assert remote is not None
        state.remote = None
        if not tokens:
            self._tickets.release(state.name)
            return
        self.counts["begun"] += 1
        number = self.counts["begun"]
        blocks = list[tuple[int, ...]]()
        past = computed + tokens
        for group, ids in self._by_group(state.blocks):
            if group.states:
                blocks.append(_last(group, ids, remote.tokens))
                self._check_state(group, blocks[-1], past, state.name)
                continue
            size = group.block_size
            here = computed // size
            # A pull takes the blocks that the offered tokens fill, and a request has more.
            blocks.append((-1,) * here + (*ids[here : -(-remote.tokens // size)],))
        state.load = PullJob(number, state.name, remote.tickets, computed, past, tuple(blocks))
        self._jobs[number] = _Live(state.load, state)
        self._tickets.pull(state.load)
        self.counts["pulls"] += 1

    def _job(
        self,
        state: _Request,
        first: int,
        past: int,
        keys: Keys,
        begins: Sequence[int],
        ends: Mapping[int, Sequence[int]],
    ) -> Job:
        """Return a job of stored blocks.

        Args:
            begins: of each group, the token before whose block it touches none of the engine's.
            ends: by the number of a stored block, the blocks with the states at its end. Others
                have none that is moved.
        """
        blocks = list[tuple[int, ...]]()
        for at, (group, ids) in enumerate(self._by_group(state.blocks)):
            size = group.block_size
            if group.states:
                blocks.append(tuple(ends[n][at] if n in ends else -1 for n in range(first, past)))
                continue
            some = ids[first * self._size // size : -(-past * self._size // size)]
            untouched = min(len(some), begins[at] // size - first * self._size // size)
            blocks.append((*[-1] * untouched, *some[untouched:]))
        after = keys[first - 1] if first else None
        self.counts["begun"] += 1
        number = self.counts["begun"]
        if self._described is not None:
            for at in range(first, past):
                before = keys[at - 1] if at else None
                tokens = tuple(state.tokens[at * self._size : (at + 1) * self._size])
                self._described[keys[at]] = Described(before, tokens, state.about)
        job = Job(number, state.name, tuple(keys[first:past]), first, after, tuple(blocks))
        self._jobs[number] = _Live(job, state)
        return job

    def _withdraw(self, job: Job) -> None:
        """Forget a save that no worker knows."""
        self._next.saves.remove(job)
        live = self._jobs.pop(job.number)
        live.missing = frozenset(range(len(job.keys)))
        self._end_save(job, live)

    def _release(self, number: int, workers: int) -> None:
        """Note that some workers read the blocks of a save no longer."""
        live = self._jobs.get(number)
        if live is None:
            return
        live.releases += workers
        if live.releases >= self._workers:
            live.request.reading.discard(number)
            self._give_back(live)

    def _give_back(self, live: _Live) -> None:
        """Let the engine reuse the blocks that a save no longer reads."""
        if self._holder is not None and live.held:
            self._holder.give_back(live.held)
            live.held = ()

    def _end(self, number: int, workers: int, missing: frozenset[int]) -> None:
        """Note that a load or save has ended in some workers."""
        live = self._jobs.get(number)
        if live is None:
            return
        live.ends += workers
        live.missing |= missing
        if live.ends < self._workers:
            return
        del self._jobs[number]
        if isinstance(live.job, PullJob):
            self._end_pull(live.job, live)
        elif live.loads:
            self._end_load(live.job, live)
        else:
            self._end_save(live.job, live)

    def _end_pull(self, job: PullJob, live: _Live) -> None:
        """Let the other engine use its blocks again."""
        self._tickets.release(job.request)
        if live.missing:
            self.counts["failed_pulls"] += 1
        else:
            self.counts["pulled_tokens"] += job.tokens - job.first
        if live.request.load is job:
            self._end_loading(live.request)

    def _end_load(self, job: Job, live: _Live) -> None:
        """Offer no block again that did not land, until it was saved anew."""
        state = live.request
        self.counts["landed_blocks"] += len(job.keys) - len(live.missing)
        if live.missing:
            self.counts["failed_loads"] += 1
            for position in live.missing:
                self._failed[job.keys[position]] = None
            state.limit = job.first + min(live.missing)
            if state.considered is not None:
                state.considered = min(state.considered, state.limit)
        counts = {"load.blocks": len(job.keys), "load.blocks_missing": len(live.missing)}
        tracing.end("portakv load", live.began, counts)
        if state.load is job:  # not a later load of a request that was preempted
            self._end_loading(state)

    def _end_loading(self, state: _Request) -> None:
        """Note that the engine has the blocks of a request again."""
        state.load = None
        self._keep_no_longer(state)
        if state.ended:
            self._requests.pop(state.name, None)

    def _end_save(self, job: Job, live: _Live) -> None:
        """Forget the keys of a save; blocks that were stored may be offered again."""
        live.request.reading.discard(job.number)
        self._give_back(live)
        for position, key in enumerate(job.keys):
            if self._saving.get(key) == job.number:
                del self._saving[key]
            if position not in live.missing:
                self._failed.pop(key, None)
                self.counts["stored_blocks"] += 1


def _last(group: Group, ids: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the block of a group in which the last of some tokens is; none without one."""
    at = (tokens - 1) // group.block_size
    return tuple(ids[at : at + 1])


def _runs(numbers: Iterable[int]) -> list[range]:
    """Return ascending numbers as runs of consecutive ones."""
    runs = list[range]()
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


# ------------------------------------------------------------------------------------------------
# What the hooks of an engine cost its steps.

#: Seconds that the hooks of both sides may take together in a step without work.
LIMIT = 2e-4
#: The upper ends of the seconds by which idle steps are counted, for an estimate of their median.
BOUNDS = (5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 7.5e-5, 1e-4, 1.5e-4, 2e-4, 5e-4, 1e-3, 1e-2)


class Costs:
    """The time that hooks take, by step and by hook.

    Args:
        side: whose hooks they are, the scheduler's or a worker's.
        now: returns the time in seconds.

    Attributes:
        spent: the seconds of each hook in the step that runs.
    """

    def __init__(self, side: str = "", now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._side = side
        self.spent = defaultdict[str, float](float)
        self._steps = 0
        self._busy_seconds = defaultdict[str, float](float)  # in steps with work
        self._idle_steps = 0
        self._idle_seconds = defaultdict[str, float](float)
        self._within = [0] * (len(BOUNDS) + 1)  # idle steps by `BOUNDS`, and longer ones

    def step(self, idle: bool) -> None:
        """End a step. ``idle``: there was nothing to load, save, stop or report in it."""
        self._steps += 1
        _add(self._idle_seconds if idle else self._busy_seconds, self.spent)
        if idle:
            self._idle_steps += 1
            self._within[bisect_left(BOUNDS, sum(self.spent.values()))] += 1
        self.spent.clear()

    def statistics(self) -> dict[str, float]:
        """Return counts of steps and the seconds of each hook: in all steps, and in idle ones.

        A name has the side after a slash, and then the hook, or the most seconds of the steps.
        """
        side = self._side
        counts = {f"steps/{side}": self._steps, f"idle_steps/{side}": self._idle_steps}
        total = self._busy_seconds.copy()
        _add(total, self._idle_seconds)
        seconds = {f"hook_seconds/{side}/{hook}": x for hook, x in total.items()}
        within = dict[str, int]()
        for bound, many in zip(BOUNDS, accumulate(self._within), strict=False):
            if many:
                within[f"idle_steps_within/{side}/{bound:g}"] = many
        idle = {f"idle_hook_seconds/{side}/{hook}": x for hook, x in self._idle_seconds.items()}
        return {**counts, **within, **seconds, **idle}


def _add(totals: defaultdict[str, float], step: Mapping[str, float]) -> None:
    """Add the seconds of a step to those of all steps."""
    for hook, seconds in step.items():
        totals[hook] += seconds


P = ParamSpec("P")
R = TypeVar("R")


def measured(hook: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that adds its time to the `Costs` of its object, under its name."""
    name = hook.__name__

    @wraps(hook)
    def call(self: Any, /, *args: P.args, **terms: P.kwargs) -> R:
        costs: Costs = self.costs
        now = costs.now
        began = now()
        try:
            return hook(self, *args, **terms)
        finally:
            costs.spent[name] += now() - began

    return call
