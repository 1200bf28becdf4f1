# SPDX-License-Identifier: Apache-2.0
"""The transfer graph: nodes of blocking work with dependencies, priorities and deadlines, carried
out by the workers of links, for block stores and for whoever else moves blocks."""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from heapq import heappop, heappush
from traceback import clear_frames
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from portakv.errors import TransferCancelled, TransferError
from portakv.graph.trace import Trace
from portakv.runtime.devices import this_process
from portakv.runtime.worker import EXIT_SECONDS, RateLimit

#: Seconds after its submission at which a node of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}
#: Bounds of the histogram of the seconds that nodes ran.
SECONDS = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1, "1": 1.0, "10": 10.0, "+Inf": np.inf}
#: Why blocks had not begun.
WHY = {
    "cancelled": "they were cancelled",
    "late": "their deadline passed: allow more time, or make them urgent",
    "dropped": "staging had no room in time, or the link was slow: they may be offered again",
}


@dataclass(eq=False)
class Lease:
    """What a chain of nodes takes from a pool before its first node starts: all or none. It goes
    back when the last node that names it has ended. Under the graph's lock: ``pool.take(count,
    store)`` returns items or None; ``ended(lease)`` comes before ``pool.give(items)``. After
    ``until``, by the graph's clock, nodes that still wait for it end as dropped."""

    pool: Any
    count: int  # 0: it takes none, and its items are the maker's
    store: bool = False
    until: float | None = None
    ended: Callable[[Lease], object] | None = None
    items: Any = None  # once granted
    users: int = 0  # nodes that name it and did not end
    nodes: list[Node] = field(default_factory=list, init=False)  # that wait for it


@dataclass(eq=False, repr=False)
class Node:
    """Blocking work for some blocks. ``work(node, mask)`` moves those of a mask (bool ``[blocks]``)
    and returns which landed; None: all of them. Without a link it is a gate, which ends when all
    that it follows have. ``after`` holds nodes, or (node, mine, theirs): block mine[i] needs block
    theirs[i] of that one. A rescue moves what did not land in the one node that it follows.
    ``given``: which blocks may be tried at all; ``name``: what it does, in a word.

    ``state``: new, waiting, room (for its lease), queued, running; then landed (it ran, or no block
    was left for it), failed, cancelled, late or dropped. ``error``: the first exception of it or of
    what it follows."""

    work: Any
    blocks: int
    _: KW_ONLY
    link: Any = None
    nbytes: int = 0
    after: Sequence[Any] = ()
    rescue: bool = False
    lease: Lease | None = None
    given: Any = None
    name: str = ""
    priority: str | None = None
    background, cut, number, waits, due, since = False, False, 0, 0, 0.0, 0.0

    def __post_init__(self) -> None:
        self.after = [x if isinstance(x, tuple) else (x, None, None) for x in self.after]
        self.followers, self.state, self.graph = list[Node](), "new", cast(Graph, None)
        # Masks of what is to be tried, what landed before a rescue, and what landed (None before
        # the end). True is all and False is none: most nodes need no array.
        self.left = self.base = cast(Any, False)
        self.mask = self.error = self.change = cast(Any, None)

    @property
    def landed(self) -> Any:
        """Which blocks landed; none before the end."""
        return np.full(self.blocks, False) | (False if self.mask is None else self.mask)

    def done(self) -> bool:
        """True once it ended; never blocks."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it ended, at most ``timeout`` seconds; True if it did."""
        graph = self.graph
        if self.mask is not None or graph.process.forked:  # a child has no thread to wait for
            return True
        with graph.lock:
            until = graph.clock() + (3e9 if timeout is None else timeout)
            while (now := graph.sweep()) < until and self.mask is None:
                self.change = self.change or threading.Condition(graph.lock)
                self.change.wait(min(until, now + 3600, *(x[0] for x in graph.timers[:1])) - now)
            return self.mask is not None


class Link:
    """A pair of places with ``width`` workers, made by `Graph.link`. ``queued_bytes`` are those of
    nodes that were submitted for it and have not ended."""

    def __init__(self, graph: Graph, name: str, width: int, max_gbps: Any, stall_seconds: float):
        self.graph, self.name, self.width, self.stall = graph, name, max(1, width), stall_seconds
        self.limit = RateLimit(max_gbps, graph.clock) if max_gbps else None
        self.tier, self.change = name.partition(":")[0], threading.Condition(graph.lock)
        self.queued_bytes = self.background = self.workers = 0
        # (due, number, node), and those of the background; since when what runs does, in order.
        self.heaps, self.running = (list[Any](), list[Any]()), dict[Node, float]()

    @property
    def oldest_wait(self) -> float:
        """Seconds for which a node that could run has waited for a worker."""
        since = [x[2].since for heap in self.heaps for x in heap if x[2].state == "queued"]
        return self.graph.clock() - min(since) if since else 0.0

    @property
    def slow(self) -> bool:
        """A node has run for longer than ``stall_seconds``; new background nodes are dropped."""
        now = self.graph.clock()
        return now - next(iter(self.running.values()), now) > self.stall

    def push(self, node: Node) -> None:
        """Have a worker run a node in its turn."""
        node.state, node.since = "queued", self.graph.clock()
        heappush(self.heaps[node.background], (node.due, node.number, node))
        self.change.notify()
        if self.workers < self.width:
            atexit.register(self.graph.close)  # once more, as memory must not go before a worker
            self.workers += 1
            terms = self.serve, f"portakv {self.name}", (self.workers,)
            self.graph.threads.append(threading.Thread(None, *terms, daemon=True))
            self.graph.threads[-1].start()

    def next(self) -> Node | None:
        """Wait for a node, which runs from now on; None if the graph is closed."""
        with self.graph.lock:
            while True:
                self.graph.sweep()
                background = self.background < max(1, self.width - 1)
                while heaps := [heap for heap in self.heaps[: 1 + background] if heap]:
                    node: Node = heappop(min(heaps))[2]
                    if node.state == "queued":  # not if it was cancelled
                        node.state, self.running[node] = "running", self.graph.clock()
                        self.background += node.background
                        return node
                if self.graph.closed.is_set():
                    return None
                self.change.wait()

    def serve(self, worker: int) -> None:
        """What a worker does until the graph is closed."""
        graph = self.graph
        while node := self.next():
            if self.limit:
                with graph.lock:
                    start = self.limit.start_of(node.nbytes)
                graph.closed.wait(self.limit.left(start))
            error, all_of = None, node.left
            try:
                landed = node.work(node, np.full(node.blocks, True) & all_of)
                if landed is not None:
                    all_of = all_of & np.asarray(landed, bool).reshape(node.blocks)
            except BaseException as caught:  # no caller stands above this thread
                clear_frames(caught.__traceback__)  # which hold views
                error, all_of = caught, False
            with graph.lock:
                start, end = self.running.pop(node), graph.clock()
                self.background -= node.background
                told = node.number, node.name, node.blocks, node.nbytes
                after = (x.number for x, *_ in node.after)
                graph.trace.ran.append((self.name, worker, start, end, *told, *after))
                tier, op, seconds = self.tier, node.name, end - start
                graph.times["tier_seconds_sum", tier, op] += seconds
                graph.times["tier_seconds_count", tier, op] += 1
                for le, most in SECONDS.items():
                    graph.times["tier_seconds_bucket", tier, op, le] += seconds <= most
                graph.end(node, all_of, "failed" if error else "landed", error)
                graph.settle()


class Graph:
    """Links and nodes under one ``lock``, which a caller may hold for a moment as well; ``clock``
    never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, trace_events: int = 100_000):
        self.clock, self.trace, self.process = clock, Trace(trace_events), this_process()
        self.lock, self.closed, self.number = threading.RLock(), threading.Event(), 0
        self.counts, self.nbytes, self.links = Counter[Any](), Counter[Any](), dict[str, Link]()
        self.times = defaultdict[Any, float](int)  # figures of `statistics`
        self.threads, self.live, self.todo = list[threading.Thread](), set[Node](), list[Node]()
        self.timers = list[Any]()  # (when, number, the state to end in, node)
        # By pool, which another may hold: loads that wait, stores that do, leases of stores.
        self.rooms = WeakKeyDictionary[Any, Any]()

    def link(
        self, name: str, width: int = 1, max_gbps: float | None = None, stall_seconds: float = 10.0
    ) -> Link:
        """The link of that name, made if there is none; what stands before ":" is its tier."""
        with self.lock:
            return self.links.setdefault(name, Link(self, name, width, max_gbps, stall_seconds))

    def submit(
        self, nodes: Sequence[Node], *, priority: str = "normal", deadline: float | None = None
    ) -> None:
        """Begin nodes, all at once, each behind those that it follows. ``deadline`` seconds from
        now those that nobody follows are cancelled. Raises `TransferError` after `close`, in a
        forked process, or for an unknown priority."""
        if self.process.forked or self.closed.is_set() or priority not in SLACK:
            terms = f"{', '.join(SLACK)}, and a graph that this process made and did not close"
            raise TransferError(f"Work of priority {priority!r} was asked for; expected {terms}.")
        with self.lock:
            now, by = self.clock(), np.inf if deadline is None else deadline
            for node in nodes:
                kind, self.number = node.priority or priority, self.number + 1
                node.graph, node.state, node.number = self, "waiting", self.number
                node.background, node.due = kind == "background", now + min(by, SLACK[kind])
                self.live.add(node)
                if node.link:
                    node.link.queued_bytes += node.nbytes
                if node.lease:
                    node.lease.users += 1
                before = [x for x, *_ in node.after if x.mask is None]
                node.waits = len(before)
                for one in before:
                    one.followers.append(node)
                while before:  # what another transfer began is as urgent as what now waits for it
                    one = before.pop()
                    if one.due > node.due and one.mask is None and one.state != "running":
                        one.due, one.background = node.due, False
                        before += [x for x, *_ in one.after]
                        if one.state in ("room", "queued"):
                            self.place(one)
            for node in nodes:
                if by < np.inf and not node.followers:
                    heappush(self.timers, (now + by, node.number, "late", node))
                if node.background and node.link and node.link.slow:
                    self.cancel(node, "dropped")
            ready = [node for node in nodes if not node.waits and node.state == "waiting"]
            self.todo += ready[::-1]  # the first one is settled first
            self.settle()
            self.sweep()

    def cancel(self, node: Node, state: str = "cancelled") -> bool:
        """End a node that does not run and, in turn, what it follows if nobody else does; a gate
        ends behind what runs. True if some blocks will not be moved."""
        kind = TransferCancelled if state == "cancelled" else TransferError
        error, nodes, found = kind(f"Some blocks had not begun when {WHY[state]}."), [node], False
        with self.lock:
            while nodes:
                node = nodes.pop()
                if not node.cut and node.state != "running":
                    node.cut = True
                    nodes += [x for x, *_ in node.after if all(y.cut for y in x.followers)]
                    if node.link:
                        found = True
                        self.end(node, False, state, error)
            self.settle()
        return found

    def sweep(self) -> float:
        """Cancel what is too late, and tell the time; called by whoever works or waits."""
        now = self.clock()
        while self.timers and (self.timers[0][0] <= now or self.timers[0][3].mask is not None):
            _, _, state, node = heappop(self.timers)
            if state == "late" or (node.state == "room" and node.lease.until is not None):
                self.cancel(node, state)
        return now

    def settle(self) -> None:
        """Go on with nodes for which all that they follow has ended."""
        while self.todo:
            node = self.todo.pop()
            left: Any = True if node.given is None else np.asarray(node.given, bool)
            for before, mine, theirs in node.after:
                node.error, landed = node.error or before.error, before.mask
                if node.rescue:
                    node.base, left = landed, left & (True ^ landed)
                elif mine is None:
                    left = left & landed
                elif landed is not True:
                    left = np.full(node.blocks, True) & left
                    left[np.asarray(mine)[~landed[theirs]] if landed is not False else mine] = False
            node.left = left
            if node.link and left is not False and (left is True or left.any()):
                self.place(node)
            else:
                self.end(node, False if node.link else left, "landed")

    def place(self, node: Node) -> None:
        """Queue a node for its lease, or its link."""
        lease = node.lease
        if not lease or lease.items is not None or not lease.count:
            node.link.push(node)
            return
        if lease.until is not None:
            heappush(self.timers, (lease.until, node.number, "dropped", node))
        node.state, room = "room", self.rooms.setdefault(lease.pool, [[], [], 0])
        lease.nodes.append(node)
        heappush(room[lease.store], (node.due, node.number, lease))
        self.grant(lease.pool)

    def grant(self, pool: Any) -> None:
        """Grant leases, in order; to be called if items of a pool came free but not from a lease.
        Loads pass a store that waits for other stores, but none that waits for loads."""
        with self.lock:
            room = self.rooms.get(pool, [])
            heaps = room[:2]
            while heaps := [heap for heap in heaps if heap]:
                heap = min(heaps)
                lease = heap[0][2]
                nodes = [node for node in lease.nodes if node.state == "room"]
                if nodes and lease.items is None:
                    lease.items = pool.take(lease.count, lease.store)
                    if lease.items is None:
                        heaps = [x for x in heaps if x is not heap and (room[2] or not lease.store)]
                        continue
                    room[2] += lease.store
                heappop(heap)
                lease.nodes.clear()
                for node in nodes:  # all at once: none may wait behind who waits for this lease
                    node.link.push(node)

    def end(self, node: Node, landed: Any, state: str, error: Any = None) -> None:
        """Note how a node ended, and what does not wait for it any more."""
        node.error, node.mask, node.state = node.error or error, landed | node.base, state
        self.live.discard(node)
        if node.link:
            node.link.queued_bytes -= node.nbytes
            if state != "landed":
                self.count(node.link.tier, node.name, state, node.blocks)
        for follower in node.followers:
            follower.waits -= 1
            if not follower.waits and follower.mask is None:
                self.todo.append(follower)
        node.cut, node.work, node.after, node.followers = True, None, (), []
        if node.change:
            node.change.notify_all()
        if lease := node.lease:
            lease.users -= 1
            if not lease.users:
                if lease.ended:
                    lease.ended(lease)
                if lease.count and lease.items is not None:
                    lease.pool.give(lease.items)
                    self.rooms[lease.pool][2] -= lease.store
                self.grant(lease.pool)

    def count(self, tier: str, op: str, result: str, blocks: int = 1, nbytes: int = 0) -> None:
        """Add to what `statistics` tells."""
        with self.lock:
            self.counts[tier, op, result] += blocks
            self.nbytes[tier, op] += nbytes

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Figures by the names that they have in Prometheus, but for "portakv_": of each a list of
        its labels and "value". `Collector` takes any others beside them."""
        with self.lock:
            found, now = dict(self.times), defaultdict[str, list[dict[str, Any]]](list)
            found |= {("tier_blocks_total", *key): n for key, n in self.counts.items()}
            found |= {("tier_bytes_total", *key): n for key, n in self.nbytes.items()}
            for x in self.links.values():
                found["link_queue_bytes", x.name] = x.queued_bytes
                found["link_oldest_seconds", x.name] = x.oldest_wait
                found["link_slow", x.name] = x.slow
        for (name, *values), value in found.items():
            last = "le" if name.endswith("bucket") else "result"
            labels = zip(("tier", "op", last) if values[1:] else ("link",), values, strict=False)
            now[name].append({**dict(labels), "value": value})
        return dict(now)

    def close(self, timeout: float = EXIT_SECONDS) -> bool:
        """Cancel what does not run and wait for what does; True if it ended in time."""
        if self.process.forked:
            return True
        atexit.unregister(self.close)  # one wait at the end of the interpreter, if work hangs
        until = time.monotonic() + timeout
        with self.lock:
            self.closed.set()
            for node in tuple(self.live):
                self.cancel(node)
            for link in self.links.values():
                link.change.notify_all()
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not self.live
