# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` saves blocks of a cache under keys and loads them into any view of that cache: it
plans which nodes of a transfer graph move which bytes between views, rows on the host, and tiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from numbers import Real
from operator import itemgetter
from typing import Any, Protocol, TypeAlias
from weakref import WeakSet

import numpy as np

from portakv.errors import InvalidTerms, StoreError, TransferTimeout
from portakv.graph.graph import SLACK, Graph, Lease, Link, Node
from portakv.graph.handle import Handle
from portakv.storage import image
from portakv.storage.form import BlockForm, Slices
from portakv.storage.keys import check_keys
from portakv.storage.rows import Crossing, Rows
from portakv.view import KVView
from portakv.view.index import IdList

#: Bytes of a node of a save, and of a load, unless one block has more. A load of 16 MiB pieces kept
#: a disk's queue too short on an H200 machine: 1.6 GB/s, by 32 MiB 2.1. An urgent load waits for
#: one piece of a save.
SAVED, LOADED = 16 << 20, 32 << 20
_KEPT = "kept"  # a spot: the host tier
PARTS = 8  # of the device's leg by layer, if blocks are read as a whole
Keys: TypeAlias = "Sequence[bytes]"


class Shelf(Protocol):
    """The blocks of one form in one tier. ``read`` and ``write`` block, in a worker of their link,
    and say which blocks are there and right; ``stop`` tells a read that nobody waits for it."""

    tier: str
    form: BlockForm
    writable: bool
    notes: list[str]  # for `BlockStore.explain`

    @property
    def generation(self) -> int: ...  # the highest that was found
    def has(self, keys: Keys, timeout: float | None = None, /) -> list[bool]: ...  # asks
    def known(self, keys: Keys, /) -> list[bool]: ...  # does not
    def wants(self, keys: Keys, /) -> list[bool]: ...  # what it lacks, and admits
    def link(self, key: bytes, /) -> Link: ...
    def link_for_write(self, nbytes: int, /) -> Link: ...
    def read(self, keys: Keys, rows: Any, segments: Any, stop: Any, /) -> list[bool]: ...
    def write(self, _: Link, keys: Keys, rows: Any, *known: Any) -> list[bool]: ...
    def touch(self, keys: Keys, /) -> None: ...
    def statistics(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class Part:
    """Blocks of one form, and the rectangle that they share with the store's form."""

    form: BlockForm
    shelves: list[Shelf]
    theirs: Slices
    mine: Slices
    rows: KVView  # that rectangle of all rows of the store


@dataclass(eq=False)
class Call:
    """What one call wants and its plan: nodes with the number of their segment, and where blocks
    end: in a node, which of the call's blocks the node's are, and which layers it has of them."""

    keys: list[bytes]
    order: dict[bytes, int]  # the place of each; a tier loses none for one behind it
    gate: Node  # by the call's name
    priority: str
    deadline: float | None
    given: Any = None  # blocks that are anywhere; None: all
    nodes: list[tuple[int, Node]] = field(default_factory=list)
    ends: list[tuple[Node, Any, Any, range]] = field(default_factory=list)
    fills: int = 0  # that did not end


@dataclass(eq=False)
class Fill(Lease):
    """Rows that are being filled: the i-th has block ``keys[i]`` of the part once all of ``ends``
    landed it: one for each segment, or that of None. Calls that follow them use the rows as well;
    a save ends with ``last``, and has a generation, and checksums by row."""

    part: Any = None
    keys: list[bytes] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)  # with their blocks, the maker first
    names: list[bytes] = field(default_factory=list)  # of its rows in `BlockStore._fills`
    ends: dict[int | None, Node] = field(default_factory=dict)
    last: list[Node] = field(default_factory=list)
    generation: int = 0
    sums: dict[int, Any] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        """Whether some call that was neither cancelled nor late waits for it; under the lock."""
        return any(not call.gate.cut for call, _ in self.calls)

    def of(self, mask: Any) -> tuple[list[int], list[bytes], list[Any]]:
        """Numbers, keys and bytes of rows."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        return rows, [self.keys[i] for i in rows], [self.pool.array[self.items[i]] for i in rows]


class BlockStore:
    """Blocks of one cache in host memory and in tiers, nearest first.

    Args:
        form: of the blocks that are saved; views hold its layers and heads.
        staging: bytes of pinned memory that transfers go through; host: bytes of it that keep
            blocks, the host tier.
        tiers: `Disk`, `Remote`, or anything with their ``forms`` and ``open``.
        graph: to share workers with others; by default the store's own.
        full: what a save does that finds no staging within its slack: ``drop`` or ``wait``.
        weak_keys: take keys of less than 16 bytes, of which two may meet.

    Blocks of a view belong to a load until its end: a model that writes them before `Handle.wait`
    mixes both. A save reads behind what the current stream holds at the call, and until its end.
    A store is its own context, and closed at the end of it.

    Raises:
        StoreError, StoreBusy: memory for no block; a tier that cannot be opened; after `close`.
        InvalidTerms: keys or terms that are none, a key twice in a call, more keys than blocks.
        LayoutError, SlotError: a view of another cache; blocks that it lacks, or one twice.
        Unsupported: `save` or `load` inside graph capture.
    """

    def __init__(
        self,
        form: BlockForm,
        *,
        staging: int = 1 << 30,
        host: int = 0,
        tiers: Sequence[Any] = (),
        graph: Graph | None = None,
        full: str = "drop",
        weak_keys: bool = False,
    ) -> None:
        kinds = (form, BlockForm), (tiers, Sequence), (staging, Real), (host, Real)
        right = all(isinstance(*each) for each in kinds) and all(hasattr(x, "open") for x in tiers)
        if not right or full not in ("drop", "wait"):
            raise InvalidTerms(
                f"A store of {form=}, {staging=}, {host=}, {tiers=}, {full=} was asked: expected a "
                f"BlockForm, two numbers of bytes, a list of tiers, and 'drop' or 'wait'."
            )
        forms = [*dict.fromkeys([form, *(x for tier in tiers for x in tier.forms(form))])]
        size = max(each.image_bytes for each in forms)
        if not (size <= staging < 1 << 62 and 0 <= host < 1 << 62 and (tiers or host >= size)):
            raise StoreError(
                f"A store was asked with {staging} bytes of staging, {host} of the host tier and "
                f"{len(tiers)} other tiers: expected room for a block in staging, and somewhere to "
                f"keep it; a block takes {size} bytes here. Give it more."
            )
        self.form, self._weak, self._drop, self._closed = form, weak_keys, full == "drop", False
        self.rows, self._shelves = Rows(size, staging // size, host // size), list[Shelf]()
        self.graph, self._own_graph = graph or Graph(), graph is None
        self._up, self._down = (self.graph.link(x, width=2) for x in ("host-device", "device-host"))
        # Under the graph's lock: what is under way, by form and key, with its row; ends of calls.
        self._fills, self._gates = dict[bytes, tuple[Fill, int]](), WeakSet[Node]()
        try:
            for tier in tiers:
                self._shelves += tier.open(self.graph, self.rows, forms, 0)
        except BaseException:
            self.close()
            raise
        self._generation = max([x.generation for x in self._shelves], default=0)
        parts = list[Part]()
        for each in forms:
            if slices := form.part_of(each):
                rows = each.view(self.rows.tensor).slice(**slices[0])
                shelves = [x for x in self._shelves if x.form == each]
                parts.append(Part(each, shelves, *slices, rows))
        self._own, self._tilings = parts[0], _tilings(parts)

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, keys: Keys, timeout: float | None = 1.0) -> int:
        """How many leading blocks can be loaded, from the host or some tier. What a far tier has
        not said within ``timeout`` seconds counts as not there."""
        keys = self._call("lookup", keys, "normal", timeout).keys
        until = self.graph.clock() + (3e9 if timeout is None else timeout)
        there = np.zeros(len(keys) + 1, np.bool_)
        for tiling in self._tilings:
            whole = there[:-1] ^ True
            for part in tiling:
                found = np.array([self.rows.has(part.form.digest + key) for key in keys], np.bool_)
                for shelf in part.shelves:
                    left = np.flatnonzero(whole & (found ^ True))
                    time = max(0.0, until - self.graph.clock())
                    found[left] = shelf.has([keys[i] for i in left], time)
                whole &= found
            there[:-1] |= whole
        leading = int(there.argmin())
        self._touch(keys[:leading])
        return leading

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        priority: str = "background",
        deadline: float | None = None,
    ) -> Handle:
        """Save blocks of a view under keys; a key that every writable tier has, or does not
        admit yet, or whose save is under way, is nothing. ``blocks``: ids of the view's blocks,
        whose tokens the keys name in order; of another size than the form's, they need not be
        filled by the last key. A tier with no room for all keeps the first ones; on a disk the
        others do not land."""
        call, own = self._call("save", keys, priority, deadline), self._own
        crossing = Crossing(own.rows, view, blocks, len(call.keys), own.form.block_size, store=True)
        shelves = [shelf for shelf in own.shelves if shelf.writable]
        until = self.graph.clock() + SLACK[priority] if self._drop else None
        groups = dict[tuple[Shelf, ...], list[int]]()  # by the tiers that lack them
        with self._planned(call):
            self._touch(call.keys)
            wants = [shelf.wants(call.keys) for shelf in shelves]
            for i, key in enumerate(call.keys):
                fill, row = self._fills.get(own.form.digest + key, (None, 0))
                lacks = tuple(shelf for shelf, x in zip(shelves, wants, strict=True) if x[i])
                if fill and fill.store and fill.wanted:
                    call.ends += [(end, [i], [row], range(0)) for end in fill.last]
                elif lacks or not (shelves or self.rows.has(own.form.digest + key)):
                    groups.setdefault(lacks, []).append(i)
            for lacks, some in groups.items():
                chunks = self._chunks(some, SAVED, 1, *(shelf.link_for_write(0) for shelf in lacks))
                self._generation += len(chunks)
                for number, at in enumerate(chunks):
                    fill = self._fill(own, call, at, until)
                    fill.generation = self._generation - number  # a prefix is the newer part
                    steps = [(self._down, partial(self._gather, crossing, view, fill))]
                    for shelf in lacks:
                        link = shelf.link_for_write(len(at) * own.form.image_bytes)
                        steps.append((link, partial(self._write, shelf, link, fill)))
                    for link, work in steps:
                        after = fill.last[:1]
                        fill.last.append(self._node(call, at, work, link, fill, after, (0, 1)))
                    fill.ends[None] = fill.last[0]
                    call.ends += [(end, at, range(len(at)), range(0)) for end in fill.last]
                    self._submit(call)  # now, so that the links' queues show it
            return self._ended(call, view)

    def load(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        priority: str = "urgent",
        deadline: float | None = None,
        by_layer: bool = False,
        missing: str = "raise",
    ) -> Handle:
        """Load blocks into a view, of whatever layout, device, and size of blocks.

        Blocks that no tier has, or not in right bytes, do not land (`Handle.landed`), and nothing
        is written for them. ``by_layer``: layers are read, verified and handed on one behind the
        other, each with an end of its own (`Handle.layers`), so that of a block that does not land
        some layers may be written, in right bytes; blocks of a form with one segment are read as a
        whole, and only the device's leg goes by layer.
        """
        if missing not in ("raise", "skip"):
            raise InvalidTerms(f"{missing=} was asked of a load: expected 'raise' or 'skip'.")
        call, own = self._call("load", keys, priority, deadline), self._own
        crossing = Crossing(own.rows, view, blocks, len(call.keys), own.form.block_size)
        with self._planned(call):
            groups = self._spots(call)
            legs = {part: _legs(part, view, by_layer) for part, _ in groups}
            for (part, spot), some in groups.items():
                pieces = [segment for _, segment, _ in legs[part]]
                for lease, ends, at, rows in self._rows(call, part, spot, some, pieces):
                    for number, before in ends.items():
                        layers, _, sides = legs[part][number]
                        after = [(end, range(len(at)), rows) for end in before]
                        work = partial(_cross, crossing, sides, lease, rows, at)
                        order = number, len(pieces)
                        node = self._node(call, at, work, self._up, lease, after, order)
                        call.ends.append((node, at, range(len(at)), layers))
            self._touch(call.keys)
            return self._ended(call, view, view.layers * by_layer, missing)

    def prefetch(self, keys: Keys, priority: str = "background") -> Handle:
        """Read blocks into the host tier, of which what is prefetched and not yet loaded takes half
        at most: blocks above that do not land. Raises `StoreError` without a host tier."""
        if not self.rows.host:
            raise StoreError("A prefetch was asked of a store without a host tier; give it host=.")
        call, most = self._call("prefetch", keys, priority), max(1, self.rows.host // 2)
        with self._planned(call):
            groups = self._spots(call)
            call.given[most:] = False
            for (part, spot), some in groups.items():
                some = [i for i in some if i < most and spot != _KEPT]
                for _, ends, at, rows in self._rows(call, part, spot, some, [None]):
                    call.ends += [(end, at, rows, range(0)) for end in ends[0] if at]
            return self._ended(call, None, missing="skip")

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Figures by the names that they have in Prometheus, as `Graph.statistics`; what each tier
        tells beside them."""
        told, rows, shelves = self.graph.statistics(), self.rows, self._shelves
        staging = {x: n * rows.row_bytes for x, n in rows.counts().items()}
        told["staging_bytes"] = [{"state": x, "value": n} for x, n in staging.items()]
        told["host_evicted_total"] = [{"value": rows.evicted}]
        told["tiers"] = [{"tier": x.tier, "form": x.form.name, **x.statistics()} for x in shelves]
        return told

    def trace(self, path: str) -> None:
        """Write what the graph did last, for Perfetto or Chrome to show."""
        self.graph.trace.write(path)

    def explain(self) -> str:
        """How blocks are kept and moved, a line each."""
        rows, many = self.rows, len(self.form.segments)
        how = f"in {many} segments" if many > 1 else "as a whole, in one segment"
        lines = [f"Blocks of {self.form.payload_bytes} bytes, by layer read {how}."]
        kind = "pinned" if rows.pinned else "pageable"
        lines += [f"{rows.staging} {kind} rows of staging, {rows.host} of the host tier."]
        lines += [f"{x.tier} {x.form.name}: {note}" for x in self._shelves for note in x.notes]
        return "\n".join(lines)

    def close(self, timeout: float = 10.0) -> None:
        """Let what is under way end, for so many seconds; cancel prefetches at once, and the rest
        then; close the tiers. Raises `TransferTimeout` if a read or save hangs: tiers then stay
        open, as it uses the rows."""
        if self.graph.process.forked:  # locks may be held for ever, and nothing here is its own
            return
        with self.graph.lock:
            self._closed, until, gates = True, self.graph.clock() + timeout, [*self._gates]
        for gate in sorted(gates, key=lambda gate: gate.name != "prefetch"):
            gate.wait(0.0 if gate.name == "prefetch" else until - self.graph.clock())
            self.graph.cancel(gate)
        if self._own_graph:
            self.graph.close(max(0.0, until - self.graph.clock()))
        for fill, _ in [*self._fills.values()]:
            for end in (*fill.ends.values(), *fill.last):
                end.wait(until - self.graph.clock())
        if busy := {fill for fill, _ in self._fills.values()}:
            raise TransferTimeout(
                f"A block store was closed, and after {timeout:g} s {len(busy)} reads or saves had "
                f"not ended, so that tiers stay open; close it again, or end the process."
            )
        while self._shelves:
            self._shelves.pop().close()

    # --- plans ---

    def _call(self, kind: str, keys: Keys, priority: str, deadline: float | None = None) -> Call:
        """A call with keys of 32 bytes; refuses what is wrong with them, and a closed store."""
        self._refuse_closed(kind)
        keys, late = check_keys(keys, self._weak), 0.0 if deadline is None else deadline
        timed = priority in [*SLACK] and isinstance(late, Real) and late == late
        order = dict(zip(keys, range(len(keys)), strict=True))
        if (many := len(order)) < len(keys) or not timed:
            raise InvalidTerms(
                f"A {kind} was asked of {many} different keys among {len(keys)}, {priority=} and "
                f"{deadline=}: expected each once, one of {[*SLACK]}, and seconds or None."
            )
        call = Call(keys, order, Node(None, len(keys), name=kind), priority, deadline)
        if len(self._tilings) > 1 and kind in ("load", "prefetch"):  # where is what decides then
            until = self.graph.clock() + (3e9 if deadline is None else deadline)
            for shelf in self._shelves:
                left = [key for key in keys if not self._spot(key)]
                # In batches, as a tier that is far stops at what it lacks.
                while left and (time := until - self.graph.clock()) > 0:
                    left = left[[*shelf.has(left, time), False].index(False) + 1 :]
        return call

    def _refuse_closed(self, kind: str) -> None:
        if self._closed or self.graph.process.forked or self.graph.closed.is_set():
            why = "closed, or opened by a process that this one was forked from; open another one"
            raise StoreError(f"A {kind} was asked of a block store that was {why}.")

    @contextmanager
    def _planned(self, call: Call) -> Iterator[None]:
        """Inside, the graph is locked and the store open."""
        with self.graph.lock:
            self._refuse_closed(call.gate.name)
            try:
                yield
            except BaseException:  # such as Ctrl-C: nobody may wait for what never begins
                self._fills = {x: one for x, one in self._fills.items() if one[0].users}
                raise

    def _touch(self, keys: Keys) -> None:
        for shelf in self._shelves:
            shelf.touch(keys)
        for part in {part for tiling in self._tilings for part in tiling}:
            self.rows.touch([part.form.digest + key for key in keys])

    def _spots(self, call: Call) -> dict[tuple[Part, Any], list[int]]:
        """The call's blocks by part and spot; those that are anywhere are given."""
        groups, found = dict[tuple[Part, Any], list[int]](), [self._spot(key) for key in call.keys]
        for i, places in enumerate(found):
            for place in places:
                groups.setdefault(place, []).append(i)
        call.given = np.array([bool(x) for x in found], np.bool_)
        return groups

    def _spot(self, key: bytes) -> list[tuple[Part, Any]]:
        """For each part of a block where it is: `_KEPT`, a `Fill`, or links with their shelves, the
        nearest first. A remote tier is taken to have what nearer ones lack, unless there are blocks
        of other forms as well: then it was asked before."""
        for tiling in self._tilings:
            found = list[tuple[Part, Any]]()
            for part in tiling:
                name, links = part.form.digest + key, list[tuple[Shelf, Link]]()
                for shelf in part.shelves:
                    far = shelf.tier == "remote" and (len(self._tilings) == 1 or bool(links))
                    if far or shelf.known([key])[0]:
                        links.append((shelf, shelf.link(key)))
                fill, _ = self._fills.get(name, (None, 0))
                saved = any(shelf.known([key])[0] for shelf, _ in links)
                if self.rows.has(name):
                    found.append((part, _KEPT))
                elif fill and fill.wanted and not (fill.store and saved):
                    found.append((part, fill))
                elif links:
                    found.append((part, tuple(links)))
            if len(found) == len(tiling):
                return found
        return []

    def _rows(
        self, call: Call, part: Part, spot: Any, some: list[int], segments: list[int | None]
    ) -> Iterator[tuple[Lease, dict[int, list[Node]], list[int], list[int]]]:
        """Bring blocks into rows: a lease; by number of the segments after which nodes the rows
        are right; the blocks; their rows. What by segments is more than staging holds at once has a
        lease for each segment, so that the first layers do not wait for the last."""
        names = {i: part.form.digest + call.keys[i] for i in some}
        if isinstance(spot, Fill):
            spot.calls.append((call, some))
            spot.until, every = None, [*spot.ends.values()]  # what is waited for is not dropped
            which = enumerate(segments)
            ends = {n: [spot.ends[x]] if x in spot.ends else every for n, x in which}
            yield spot, ends, some, [self._fills[names[i]][1] for i in some]
            return
        pieces = [*dict.fromkeys(segments)]
        apart = len(pieces) > 1 and len(some) > self.rows.staging
        links = [] if spot == _KEPT else [spot[0][1]]
        for at in self._chunks(some, LOADED, len(pieces), *links):
            if spot == _KEPT:
                lease = Lease(self.rows, 0, ended=lambda lease: self.rows.unpin(lease.items))
                lease.items = [self.rows.find(names[i]) for i in at]
                self.graph.count("host", "load", "hit", len(at), len(at) * part.form.image_bytes)
                yield lease, {x: [] for x in range(len(segments))}, at, [*range(len(at))]
                continue
            for group in [[x] for x in pieces] if apart else [pieces]:
                fill = self._fill(part, call, at, None, str(group).encode() if apart else b"")
                for segment in group:
                    before, order = list[Node](), (pieces.index(segment), len(pieces))
                    for shelf, link in spot:
                        work = partial(self._read, shelf, segment, fill)
                        before = [self._node(call, at, work, link, fill, before, order)]
                    fill.ends[segment] = before[0]
                ends = {n: [fill.ends[x]] for n, x in enumerate(segments) if x in fill.ends}
                yield fill, ends, at, [*range(len(at))]

    def _chunks(self, blocks: list[int], nbytes: int, pieces: int, *links: Link) -> list[list[int]]:
        """The blocks of nodes that move them in so many pieces: all workers of a link have some."""
        share = -(-len(blocks) // max([2, *(link.width for link in links)]))
        most = self.rows.most // (4 if pieces > 1 else 1)
        most = max(1, min(most, pieces * nbytes // self.rows.row_bytes, share))
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]

    def _fill(
        self, part: Part, call: Call, at: list[int], until: float | None, apart: bytes = b""
    ) -> Fill:
        """Rows to be filled for blocks of a call, which others may use unless they have a name
        ``apart``; a save drops what has none at ``until``."""
        keys, store = [call.keys[i] for i in at], call.gate.name == "save"
        fill = Fill(self.rows, len(at), store, until, self._over, None, 0, part, keys, [(call, at)])
        fill.names = [part.form.digest + key + apart for key in keys]
        self._fills.update((name, (fill, row)) for row, name in enumerate(fill.names))
        call.fills += 1
        return fill

    def _over(self, fill: Any) -> None:
        """Rows go back, under the graph's lock; those that landed whole are kept. When a call's
        last ones do, its blocks count as used, the last first, so that a prefix outlives its
        suffix; before, if it has more of them than the host tier."""
        landed, call = np.zeros(fill.count, np.bool_), fill.calls[0][0]
        if fill.items and (None in fill.ends or len(fill.ends) == len(fill.part.form.segments)):
            landed = np.logical_and.reduce([end.landed for end in fill.ends.values()])
        prefetched = all(call.gate.name == "prefetch" for call, _ in fill.calls)
        if self.rows.crowded(call.order):
            self._touch(call.keys)
        for row, name in enumerate(fill.names):
            if self._fills.get(name, (None,))[0] is fill:
                del self._fills[name]
            if landed[row]:
                self.rows.keep(fill.items[row], name, prefetched, call.order)
        call.fills -= 1
        if not call.fills:
            self._touch(call.keys)

    def _node(
        self, call: Call, at: Any, work: Any, link: Link, lease: Lease, after: Any, order: Any
    ) -> Node:
        """Plan ``work(node, mask)`` on rows of a lease, of segment ``order[0]`` of ``order[1]``. A
        read that follows another one rescues what that one did not get."""
        name, nbytes = call.gate.name, len(at) * self.rows.row_bytes // order[1]
        rescue = name != "save" and bool(after) and isinstance(after[0], Node)
        terms = {"after": after, "rescue": rescue, "lease": lease, "name": name}
        call.nodes.append((order[0], Node(work, len(at), link=link, nbytes=nbytes, **terms)))
        return call.nodes[-1][1]

    def _submit(self, call: Call, *gates: Node) -> None:
        nodes = [node for _, node in sorted(call.nodes, key=itemgetter(0))]
        call.nodes.clear()
        late = call.deadline if gates else None  # who joins a node may have more time
        self.graph.submit([*nodes, *gates], priority=call.priority, deadline=late)

    def _ended(self, call: Call, view: Any, layers: int = 0, missing: str = "raise") -> Handle:
        """Begin a call, behind a gate of all and, by layer, one of each layer."""
        each = [Node(None, len(call.keys)) for _ in range(layers)]
        for layer, gate in enumerate([call.gate, *each], -1):
            gate.given = call.given
            gate.after = [x[:3] for x in call.ends if layer < 0 or layer in x[3]]
        self._submit(call, *each, call.gate)
        self._gates.add(call.gate)
        return Handle(self.graph, call.gate, each, missing, view)

    # --- what nodes do, in workers, for the blocks of a mask ---

    def _read(self, shelf: Shelf, segment: int | None, fill: Fill, _: Node, mask: Any) -> Any:
        def stop() -> bool:
            with self.graph.lock:
                self.graph.sweep()
                return not fill.wanted

        rows, keys, data = fill.of(mask)
        mask[rows] = shelf.read(keys, data, None if segment is None else [segment], stop)
        return mask

    def _gather(self, crossing: Crossing, view: KVView, fill: Fill, _: Node, mask: Any) -> None:
        sides, at = (fill.part.rows, view), fill.calls[0][1]
        _cross(crossing, sides, fill, range(fill.count), at, _, mask)
        for row, key, data in zip(*fill.of(mask), strict=True):
            fill.sums[row] = image.seal(data, fill.part.form, key, fill.generation)

    def _write(self, shelf: Shelf, link: Link, fill: Fill, _: Node, mask: Any) -> Any:
        rows, keys, data = fill.of(mask)
        known = [fill.generation] * len(rows), [fill.sums[row] for row in rows]
        mask[rows] = shelf.write(link, keys, data, *known, fill.calls[0][0].order)
        return mask


def _cross(
    crossing: Crossing, sides: Any, lease: Lease, rows: Any, at: Any, _: Node, mask: Any
) -> None:
    left, (inner, outer) = np.flatnonzero(mask), sides
    crossing.copy(inner, outer, np.array(lease.items)[np.array(rows)[left]], np.array(at)[left])


def _legs(part: Part, view: KVView, by_layer: bool) -> list[tuple[range, int | None, Any]]:
    """What crosses at once between rows of a part and a view: layers of the view, the segment that
    has them (None: the image), and both sides of the copy."""
    first, past = part.theirs["layers"].start, part.theirs["layers"].stop
    to, found, segmented = part.mine["layers"].start, list[Any](), bool(part.form.segments[1:])
    ends = np.linspace(first, past, 1 + (min(PARTS, past - first) if by_layer else 1), dtype=int)
    if by_layer and segmented:
        ends = np.array([0, *(x.past_layer for x in part.form.segments)])
    for number, (a, b) in enumerate(pairwise(ends.clip(first, past).tolist())):
        if a < b:
            cut, mine = slice(a - first, b - first), view.slice(**part.mine)
            pair = part.rows.slice(layers=cut), mine.slice(layers=cut)
            segment = number if by_layer and segmented else None
            found.append((range(to + a - first, to + b - first), segment, pair))
    return found


def _tilings(parts: list[Part]) -> list[list[Part]]:
    """The store's own form, and sets of other forms that cover its rectangle once."""
    found = [parts[:1]]
    for first in parts[1:]:
        chosen, cover = list[Part](), np.zeros([x.stop for x in parts[0].mine.values()], np.bool_)
        for part in (first, *parts[1:]):
            mine = part.mine["layers"], part.mine["heads"]
            if not cover[mine].any():
                cover[mine] = True
                chosen.append(part)
        if cover.all() and not any(first in tiling for tiling in found):
            found.append(chosen)
    return found
