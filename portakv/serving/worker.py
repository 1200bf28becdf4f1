# SPDX-License-Identifier: Apache-2.0
"""The worker's side of an engine, which carries out plans on its part of the caches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from math import lcm
from secrets import token_bytes
from typing import Literal, NamedTuple, Protocol

import numpy as np

from portakv.copy.call import calling_for_layers
from portakv.copy.layer_words import LayerWords
from portakv.errors import PortaKVError
from portakv.runtime.interrupts import alongside, hand_over
from portakv.runtime.rate_limited_log import SLOW_DEVICE, RateLimitedLog
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Transfer
from portakv.serving.handover import Handover
from portakv.serving.local import numbers_of
from portakv.serving.plan import Job, Plan, Report
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore, FormStore, lie_alike, load_together
from portakv.storage.tiers.base import After, Keys
from portakv.storage.work import Handle
from portakv.tasks import Signal, runtime
from portakv.view import IdList, KVView

# ------------------------------------------------------------------------------------------------
# Calls for which an engine does not wait.

_log = RateLimitedLog(logging.getLogger(__name__))


class Calls:
    """Makes calls in their order, in a helper thread. Any thread may call.

    Attributes:
        closed: no more calls are added.
    """

    def __init__(self) -> None:
        self.closed = False
        self._runtime = runtime()
        self._calls = deque[Callable[[], object]]()
        self._running = False  # a helper makes calls
        self._ended = Signal(self._runtime)

    def add(self, call: Callable[[], object]) -> bool:
        """Have a call made; return False after `close`."""
        with self._runtime.lock:
            if not self.closed:
                self._calls.append(call)
        if not self._running:
            self._begin()
        return not self.closed

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the calls that were added have been made, at most so many seconds."""
        self._begin()  # an interrupt may have cut `add`
        self._ended.block(lambda: not (self._calls or self._running), timeout)

    def close(self, timeout: float) -> None:
        """Add no more calls, and wait for the others as `wait` does."""
        with self._runtime.lock:
            self.closed = True
        self.wait(timeout)

    def _begin(self) -> None:
        if not hand_over(self._run):  # the system gives no thread
            self._run()

    def _run(self) -> None:
        """Make calls, unless another helper does."""
        with self._runtime.lock:
            if self._running:
                return
            self._running = True
        while True:
            with self._runtime.lock:
                if not self._calls:
                    self._running = False
                    self._ended.notify()
                    return
                call = self._calls.popleft()
            try:
                call()
            except Exception as error:  # the next calls must be made
                _log.warning("call", "A call about pages failed: %r. Report it.", error)


# ------------------------------------------------------------------------------------------------
# A helper that issues the loads of a step, whose layers wait by words.


class Issuer:
    """Issue the loads of steps in a helper, so that the model's thread goes on meanwhile.

    To issue a load layer by layer takes the host about as long as a part of a step. The word of a
    layer is raised while later layers are issued.

    Args:
        words: of the layers that steps wait for.
        at_first: issue the first load of each size before the call returns. It may build kernels
            and take memory, for which some drivers wait until the device is idle; so the device
            must not wait for it.
    """

    def __init__(self, words: LayerWords, at_first: bool) -> None:
        self._words = words
        self._at_first = at_first
        self._sizes = set[int]()
        self._issued: Callable[[], None] | None = None  # waits until the loads were issued

    def issue(
        self, loads: Sequence[Callable[[], None]], fence: StreamFence, size: int, alone: bool
    ) -> None:
        """Begin a step with loads.

        Args:
            loads: calls that issue one load each, and have the words follow it.
            fence: their order after the model's work.
            size: of all loads, in any unit; sizes differ by powers of two.
            alone: the last load has one copy by layer. Its layers are those of the words.
        """
        words = self._words
        words.begin()

        def issue() -> None:
            try:
                with fence.inside():
                    for load in loads[:-1]:
                        load()
                    with calling_for_layers(words.issued) if alone else nullcontext():
                        loads[-1]()
            finally:
                words.commit()

        self._issued = alongside(issue)
        kind = size.bit_length()
        if self._at_first and kind not in self._sizes:
            self._sizes.add(kind)
            self.join()

    def join(self) -> None:
        """Wait until the loads of the present step were issued; raise what stopped them."""
        issued = self._issued
        if issued is not None:
            self._issued = None
            issued()


# ------------------------------------------------------------------------------------------------
# Copies before an engine's first step, so that its first save and load stall no step.

#: Bytes of the long copy: more than those that a kernel moves by itself while a model runs.
LONG = 65 << 20


def warm_up(view: KVView, form: BlockForm, by_layer: bool = False) -> None:
    """Save blocks of a view, one and many, and load them again, by a store that is closed then.

    Kernels are built or read from disk, which takes up to a second for the first copy of a process.
    The view keeps its bytes. If the store cannot be opened or fails, the log has a line, and the
    first save and load take longer.

    Args:
        view: a cache whose blocks nothing uses yet.
        form: of its stored blocks.
        by_layer: loads are by layer.
    """
    whole = view.block_size
    assert whole is not None
    together = lcm(whole, form.block_size)  # tokens of whole blocks of both
    keys = together // form.block_size
    some = view.slots // together
    long = min(some, -(-LONG // (keys * form.image_bytes)))
    try:
        for count in sorted({min(1, some), long}):
            nbytes = count * keys * form.image_bytes
            if nbytes:
                blocks = range(count * together // whole)
                names = [token_bytes(32) for _ in range(count * keys)]
                # Half of the staging is for saves.
                with BlockStore(form, staging=2 * nbytes, host=nbytes) as store:
                    store.save(view, blocks, names).synchronize()
                    store.load(view, blocks, names, by_layer=by_layer).synchronize()
    except (PortaKVError, RuntimeError) as error:  # also without memory of the device
        _log.warning("warm up", "The first save or load of an engine will be slow: %s", error)


#: The most bytes of a load for which the model's stream waits: 80 ms at 50 GB/s, for which a
#: request that comes meanwhile would wait as well. A step computes 8,192 tokens of an 8B model in
#: 250.
ORDERED = 4 << 30
#: Seconds for which a step waits for saves of several requests of which one is preempted.
MOMENT = 0.5
PAUSE = 1e-3


class Blocks(Protocol):
    """Where blocks are stored: a `FormStore`, or the `ServerBlocks` of a `StoreClient`."""

    @property
    def form(self) -> BlockForm:
        """Return the form of the blocks."""

    def save(self, view: KVView, blocks: IdList, keys: Keys, *, after: After = None) -> Handle:
        """Save blocks of a view; see `FormStore.save`."""

    def load(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        deadline: float | None = None,
        by_layer: bool = False,
        missing: Literal["skip"] = "skip",
    ) -> Handle:
        """Load blocks into a view; see `FormStore.load`."""


class GroupCache(NamedTuple):
    """The caches of a group of layers in one worker, and where its blocks are stored.

    Attributes:
        group: its number; None: its place among the caches. A group has several caches if its
            layers have pages of several kinds.
    """

    view: KVView
    store: Blocks
    group: int | None = None


class Ended(NamedTuple):
    """What an engine learns from a worker.

    Attributes:
        loaded: requests whose load or pull has ended, of which the engine did not wait for.
        failed: for each group, the engine's blocks of loads and pulls that have no rows of their
            own.
        incomplete: requests with such blocks.
        freed: requests that were retained, whose blocks are read no longer.
    """

    loaded: set[str]
    failed: list[set[int]]
    incomplete: set[str]
    freed: set[str]


class _Part(NamedTuple):
    """The part of a load or save in one group.

    Attributes:
        handle: of its copies, and perhaps of those of other jobs.
        at: the positions of its keys among those of the job.
        start: the place of the first of them among the keys of the handle.
    """

    handle: Handle
    at: Sequence[int]
    start: int = 0


@dataclass
class _Work:
    """A load or save of this worker.

    Attributes:
        parts: of each group that has rows to move.
        failed: it could not begin in all groups.
        released: nothing reads the blocks of a save any longer.
        waited: the model's stream waits for it.
        began: when a load began.
    """

    job: Job
    parts: list[_Part] = field(default_factory=list)
    failed: bool = False
    released: bool = False
    waited: bool = False
    began: float = field(default_factory=time.monotonic)

    def ended(self) -> bool:
        """Return whether all groups have ended, however they did."""
        return self.waited or all(is_done(part.handle) for part in self.parts)

    def is_released(self) -> bool:
        """Return whether nothing reads the blocks of a save any longer."""
        releases = (part.handle.released for part in self.parts)
        return all(released is None or is_done(released) for released in releases)

    def cancel(self) -> None:
        """Start no further block."""
        for part in self.parts:
            part.handle.cancel()

    def missing(self) -> frozenset[int]:
        """Return the positions of keys that did not land in all groups."""
        landed = np.full(len(self.job.keys), not self.failed)
        for handle, at, start in self.parts:
            landed[np.asarray(at, np.intp)] &= handle.landed[start : start + len(at)]
        return frozenset(np.flatnonzero(~landed).tolist())


class _Needed(NamedTuple):
    """The part of a load in one group.

    Attributes:
        number: of the cache.
        first: the position of the first key among those of the job.
        blocks: of the engine; -1: not written.
        keys: of the stored blocks, all keys of the job from there on.
    """

    number: int
    first: int
    blocks: tuple[int, ...]
    keys: tuple[bytes, ...]


def _alike(groups: Sequence[GroupCache], by_layer: bool) -> list[list[int]]:
    """Return the numbers of caches by those that one copy loads."""
    alike = list[list[int]]()
    for number, group in enumerate(groups):
        some = (each for each in alike if _are_alike(groups[each[0]], group) and not by_layer)
        found = next(some, None)
        if found is None:
            alike.append([number])
        else:
            found.append(number)
    return alike


def _are_alike(one: GroupCache, other: GroupCache) -> bool:
    """Return whether one copy loads whole blocks of two caches: they are one memory, as vLLM gives
    it to groups of like layers, and their rows lie alike in one store."""
    if not (isinstance(one.store, FormStore) and isinstance(other.store, FormStore)):
        return False
    if one.view.form != other.view.form or one.view.origins != other.view.origins:
        return False
    whole = one.store.form.block_size % (one.view.block_size or 1) == 0
    return whole and lie_alike(one.store, other.store)


class WorkerSide:
    """Loads and saves the blocks of one worker, as the plans of a `SchedulerSide` say.

    An engine's worker calls, once a step and in this order: `stop` before anything of the step is
    written; `load` when its loads may begin; `save` after the work of the step is on the current
    stream; `report` and then `ended`, of a step with drafts perhaps before `save`. No call but
    `stop` waits; with ``by_layer`` also `layer` and `save` do, and `load` for a moment if it begins
    a pull: see `Handover.begin`.

    A failure of the store is no error of the engine: what could not be loaded is reported as
    missing, and what could not be saved is not stored. The log has a line about it.

    With words a thread issues the loads of a step, layer by layer, while the model's thread goes
    on.

    Args:
        groups: in the order of the scheduler side's groups, or with their numbers.
        deadline: seconds after which a load gives up what has not landed; None: never.
        by_layer: the engine computes with the rows of a load in the step that begins it, and calls
            `layer` before each layer. It waits for pulls outside of its steps.
        handover: offers rows to other engines, and pulls theirs; None: the plans have none.
        words: of the layers, with ``by_layer``: `layer` waits by them, so that graphs can capture
            its calls; None: it waits for the loads of the present step.
    """

    def __init__(
        self,
        groups: Sequence[GroupCache],
        deadline: float | None = 10.0,
        by_layer: bool = False,
        handover: Handover | None = None,
        words: LayerWords | None = None,
    ) -> None:
        self._groups = groups
        self._numbers = numbers_of(each.group for each in groups)
        self._alike = _alike(groups, by_layer)
        self._deadline = deadline
        self._by_layer = by_layer
        self._handover = handover
        self._words = words
        self._waiting = list[_Work]()  # loads that the step waits for
        self._loads = dict[int, _Work]()
        self._saves = dict[int, _Work]()
        self._retained = set[str]()
        self._noted: Plan | None = None  # the plan whose retained requests were noted last
        self._ended = self._nothing()
        self._issuer = None  # of loads whose layers wait by words
        if words is not None:
            self._issuer = Issuer(words, at_first=groups[0].view.device.type != "cpu")

    @property
    def busy(self) -> bool:
        """Return whether a load, save, pull or offer has not ended, or was not reported."""
        return bool(self._loads or self._saves) or self._hands_over

    @property
    def quiet(self) -> bool:
        """Return whether `report` and `ended` have nothing to say."""
        return not (self.busy or self._retained)

    @property
    def _hands_over(self) -> bool:
        return self._handover is not None and self._handover.busy

    def stop(self, plan: Plan) -> None:
        """Wait until the saves that a plan stops read no block any longer; drop what they can.

        Saves of other requests that began in the same calls go on, unless some of them have not
        released their blocks after `MOMENT`.
        """
        if not plan.stop:
            return
        self._await_issue()
        stopped = [work for number, work in self._saves.items() if number in plan.stop]
        others = [work for number, work in self._saves.items() if number not in plan.stop]
        shared = {id(part.handle) for work in others for part in work.parts}
        handles = [part.handle for work in stopped for part in work.parts]
        for handle in handles:
            if id(handle) not in shared:
                handle.cancel()
        until = time.monotonic() + MOMENT
        for handle in handles:
            released = handle.released
            if released is not None:
                if id(handle) in shared and not _ends_by(until, released):
                    handle.cancel()  # such as with a server that hangs
                released.wait()

    def load(self, plan: Plan) -> None:
        """Begin the loads of a plan, ordered after the current stream's work.

        They run on another stream, so that the model does not wait for them. If the engine does
        nothing else, the model's stream waits for a single one. Then it counts as ended, and the
        engine prepares the next step meanwhile.
        """
        self._await_issue()
        self._retain(plan)
        if self._handover is not None:
            self._handover.begin(plan.handovers, plan.idle)
        if not plan.loads:
            if self._words is not None:
                self._words.rest()
            return
        alone = plan.idle and len(plan.loads) == 1 and not self._loads and not self._by_layer
        works = [_Work(job) for job in plan.loads]
        self._loads |= {work.job.number: work for work in works}
        if self._by_layer:
            self._waiting += works
        fence = StreamFence(self._groups[0].view.device)
        if self._issuer is not None:
            loads = [partial(self._begin, work) for work in works]
            size = sum(len(job.keys) for job in plan.loads)
            self._issuer.issue(loads, fence, size, alone=len(self._groups) == 1)
            return
        with fence.inside():
            for work in works:
                self._begin(work)
        if alone:
            self._order(works[0])

    def _await_issue(self) -> None:
        """Wait until the loads of the present step were issued."""
        if self._issuer is not None:
            self._issuer.join()

    def _order(self, work: _Work) -> None:
        """Let the current stream wait for a load whose copies were all issued; then it has ended
        for whatever comes after on that stream."""
        handles = [*dict.fromkeys(part.handle for part in work.parts)]
        sizes = [each.store.form.payload_bytes for each in self._groups]
        if work.failed or len(work.job.keys) * sum(sizes) > ORDERED:
            return
        if handles and all(handle.is_issued for handle in handles):
            for handle in handles:
                _wait(handle)
            work.waited = True

    def layer(self, number: int) -> None:
        """Let the current stream wait for a layer of the loads of this step.

        A graph that is captured waits for the loads of each step that replays it, if there are
        words. ``number``: of the layer in its group.
        """
        if self._words is not None:
            if self._waiting or self._words.is_captured:
                self._words.wait(number)
            return
        for work in self._waiting:
            for part in work.parts:
                if number < len(part.handle.layers):
                    _wait(part.handle.layers[number])

    def save(self, plan: Plan) -> None:
        """Begin the saves of a plan, ordered after the current stream's work.

        What a step computed after rows that did not land is wrong, and not saved.
        """
        self._await_issue()
        wrong = self._end_waiting() if self._waiting else set()
        if plan.saves:
            for job in plan.saves:
                self._saves[job.number] = _Work(job, failed=job.request in wrong)
            self._begin_saves(
                [self._saves[job.number] for job in plan.saves if job.request not in wrong]
            )
        self._retain(plan)

    def _retain(self, plan: Plan) -> None:
        """Note the retained requests of a plan, once.

        An engine may leave out `save` in a step that computes nothing. With drafts it may call
        `save` after `ended`, which has reported them then.
        """
        if plan is not self._noted:
            self._noted = plan
            self._retained.update(plan.retained)

    def _end_waiting(self) -> set[str]:
        """Wait for the loads that this step waits for; return the requests that lack rows."""
        wrong = set[str]()
        expired = False
        if self._words is not None:
            # A device that waits may reach the limit long after the step was launched, and the
            # engine has to learn it before it uses the step's tokens.
            self._words.end_waits()
            expired = self._words.expired
        for work in self._waiting:
            for part in work.parts:
                _wait(part.handle)
            work.waited = True
            if expired:
                work.failed = True  # its rows came after the model had gone on
            if work.missing():
                wrong.add(work.job.request)
        self._waiting = []
        return wrong

    def report(self) -> Report:
        """Return what has ended since the last report."""
        self._await_issue()
        made = Report()
        for number, work in [*self._loads.items()]:
            if work.ended():
                del self._loads[number]
                missing = work.missing()
                made.end(number, missing)
                self._note_load(work.job, missing)
                if missing:
                    self._note_late(work, len(missing))
        for number, work in [*self._saves.items()]:
            if not work.released and work.is_released():
                work.released = True
                made.released[number] += 1
            if work.released and work.ended():
                del self._saves[number]
                made.end(number, work.missing())
        if self._hands_over:
            self._report_handovers(made)
        return made

    def _note_late(self, work: _Work, missing: int) -> None:
        """Log that a load lacks blocks, if it has lasted until its deadline."""
        if self._deadline is not None and time.monotonic() >= work.began + self._deadline:
            text = "%d of %d blocks did not land within %g s, and are computed. %s"
            _log.warning("late", text, missing, len(work.job.keys), self._deadline, SLOW_DEVICE)

    def _report_handovers(self, made: Report) -> None:
        """Note which pulls and offers have ended, for the scheduler and for the engine."""
        assert self._handover is not None
        for job, landed in self._handover.ended_pulls():
            made.end(job.number, frozenset() if landed else frozenset({0}))
            self._ended.loaded.add(job.request)
            if landed:
                continue
            self._ended.incomplete.add(job.request)
            for failed, ids in zip(self._ended.failed, job.blocks, strict=True):
                failed.update(block for block in ids if block >= 0)
        made.offers.update(self._handover.ended_offers())

    def ended(self) -> Ended:
        """Return what the engine is to learn since the last call."""
        reading = {work.job.request for work in self._saves.values() if not work.released}
        if self._handover is not None:
            reading |= self._handover.lending
        freed = self._retained - reading
        self._retained -= freed
        ended = self._ended._replace(freed=freed)
        self._ended = self._nothing()
        return ended

    def _nothing(self) -> Ended:
        return Ended(set(), [set() for _ in range(max(self._numbers) + 1)], set(), set())

    def _begin(self, work: _Work) -> None:
        """Begin a load in all groups; in none that is reported, if one fails."""
        try:
            for numbers in self._alike:
                every = [self._needed(work.job, number) for number in numbers]
                self._load(work, [each for each in every if each is not None])
        except PortaKVError as error:
            _fail([work], error)

    def _begin_saves(self, works: Sequence[_Work]) -> None:
        """Begin the saves of a step, those of whole blocks in one call for each group.

        Each call of a store occupies the host for about as long as a copy of one block takes, and
        requests that decode in step with each other fill their blocks in the same step.
        """
        for together in self._joined(works):
            try:
                for number in range(len(self._groups)):
                    self._save(together, number)
            except PortaKVError as error:
                _fail(together, error)

    def _joined(self, works: Sequence[_Work]) -> list[list[_Work]]:
        """Return the saves that one call can begin, which has each key once."""
        joined = list[_Work]()
        apart = list[list[_Work]]()
        keys = set[bytes]()
        for work in works:
            if self._has_whole_blocks(work.job) and keys.isdisjoint(work.job.keys):
                joined.append(work)
                keys.update(work.job.keys)
            else:
                apart.append([work])
        return [joined, *apart] if joined else apart

    def _has_whole_blocks(self, job: Job) -> bool:
        """Return whether the keys of a save fill the engine's blocks of all groups."""
        for number, (view, store, _) in zip(self._numbers, self._groups, strict=True):
            blocks = job.blocks[number]
            if len(blocks) * (view.block_size or 0) != len(job.keys) * store.form.block_size:
                return False
        return True

    def _needed(self, job: Job, number: int) -> _Needed | None:
        """Return the part of a load in one group's cache, from the first block on that the engine
        has; None: it has no block."""
        view, store, _ = self._groups[number]
        blocks = job.blocks[self._numbers[number]]
        size = store.form.block_size
        whole = view.block_size
        assert whole is not None
        gone = next((at for at, block in enumerate(blocks) if block >= 0), len(blocks))
        first = gone * whole // size
        keys = job.keys[first:]
        if not keys:
            return None
        blocks = blocks[first * size // whole :]
        lacking = -(-len(keys) * size // whole) - len(blocks)
        return _Needed(number, first, (*blocks, *(-1,) * lacking), keys)

    def _load(self, work: _Work, needed: Sequence[_Needed]) -> None:
        """Begin a load in caches that are alike: by one copy, if the host tier has all blocks."""
        caches = [self._groups[each.number] for each in needed]
        handle: Handle | None = None
        if len(needed) > 1:
            stores = [cache.store for cache in caches if isinstance(cache.store, FormStore)]
            both = zip(stores, needed, strict=True)
            loads = [(store, each.blocks, each.keys) for store, each in both]
            handle = load_together(caches[0].view, loads)
        start = 0
        for (view, store, _), (_, first, blocks, keys) in zip(caches, needed, strict=True):
            at = range(first, first + len(keys))
            if handle is not None:
                work.parts.append(_Part(handle, at, start))
                start += len(keys)
                continue
            own = store.load(
                view,
                blocks,
                keys,
                deadline=self._deadline,
                missing="skip",
                by_layer=self._by_layer,
            )
            work.parts.append(_Part(own, at))
            if self._words is not None:
                self._words.follow(own.layers)

    def _save(self, works: Sequence[_Work], number: int) -> None:
        """Begin a save of one group's cache, of the stored blocks that the engine has of it."""
        view, store, _ = self._groups[number]
        group = self._numbers[number]
        blocks = [block for work in works for block in work.job.blocks[group] if block >= 0]
        if not blocks:
            return
        keys = list[bytes]()
        before = list[bytes | None]()
        places = list[Sequence[int]]()
        size = store.form.block_size
        whole = view.block_size
        assert whole is not None
        for job in (work.job for work in works):
            ids = job.blocks[group]
            every = range(len(job.keys))
            if -1 in ids:
                places.append([n for n in every if ids[n * size // whole] >= 0])
            else:
                places.append(every)
            keys += [job.keys[n] for n in places[-1]]
            before += [job.keys[n - 1] if n else job.after for n in places[-1]]
        alone = len(works) == 1 and len(keys) == len(works[0].job.keys)
        handle = store.save(view, blocks, keys, after=before[0] if alone else before)
        start = 0
        for work, at in zip(works, places, strict=True):
            work.parts.append(_Part(handle, at, start))
            start += len(at)

    def _note_load(self, job: Job, missing: Collection[int]) -> None:
        """Note the end of a load for the engine, with the blocks that have no rows."""
        if not self._by_layer:
            self._ended.loaded.add(job.request)
        if missing:
            self._ended.incomplete.add(job.request)
        for number, (view, store, _) in zip(self._numbers, self._groups, strict=True):
            ids = job.blocks[number]
            size = store.form.block_size
            whole = view.block_size
            assert whole is not None
            for position in missing:
                first = position * size // whole  # of the engine's blocks that it covers
                past = -(-(position + 1) * size // whole)
                self._ended.failed[number].update(at for at in ids[first:past] if at >= 0)


def _fail(works: Sequence[_Work], error: PortaKVError) -> None:
    """Note that loads or saves could not begin, and cancel what has begun of them."""
    _log.warning("begin", "A load or save of an engine could not begin: %s", error)
    for work in works:
        work.failed = True
        work.cancel()


def is_done(transfer: Transfer) -> bool:
    """Return whether a transfer has ended; how it did is in the blocks that landed."""
    try:
        return transfer.done()
    except PortaKVError:
        return True


def _ends_by(until: float, copies: Transfer) -> bool:
    """Return whether copies end by a time of `time.monotonic`."""
    while not is_done(copies):
        if time.monotonic() > until:
            return False
        time.sleep(PAUSE)
    return True


def _wait(transfer: Transfer) -> None:
    """Let the current stream wait for a transfer; how it ended is in the blocks that landed."""
    with suppress(PortaKVError):
        transfer.wait()
