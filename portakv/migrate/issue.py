# SPDX-License-Identifier: Apache-2.0
"""Issue a pull: its copies in the caller's thread, and tasks for all that has to wait.

A task copies more than `LONG` bytes between host views, takes rows from an owner that sends them,
or compares checksums. A pull with a task, or of an owner without validity words, ends in a task.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch

from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.errors import PackOverflow, TransferCancelled, TransferError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.checked_copy import copy_checked
from portakv.migrate.connections import Sources
from portakv.migrate.crossed import Crossed, Encoding, Pack, is_auto, pack_of
from portakv.migrate.plan import (
    Step,
    check_arguments,
    check_packed,
    count_blocks,
    indices_of,
    planned,
)
from portakv.migrate.pull import CANCELLED, Ends, Part, Pull, known
from portakv.migrate.shards import Shard
from portakv.migrate.staged import Taker, verified
from portakv.view.index import Ids, Index

LONG = 1 << 20  # bytes on the host that a worker copies, so that the call does not block


class Request(NamedTuple):
    """What a caller wants of a pull.

    Attributes:
        indices: for each shard, where the rows go.
        first: the number of tokens that both sides skip.
        options: of the copies.
        verify: compare checksums before the commit.
        pack: how rows are packed that owners send; None: they cross as they are.
        auto: the owners choose whether and how they pack.
    """

    indices: list[Index]
    first: int
    options: CopyOptions
    verify: bool
    pack: Pack | None = None
    auto: bool = False

    @classmethod
    def of(
        cls,
        shards: Sequence[Shard],
        blocks: Sequence[Ids | None],
        first: int,
        options: CopyOptions,
        verify: bool,
        encoding: Encoding | None = None,
    ) -> Request:
        """Return a request for lists of blocks, one for each shard; raise as `Reader.pull`."""
        pack = pack_of(encoding)
        indices = indices_of(shards, blocks)
        return cls(indices, first, options, verify, pack, is_auto(encoding))

    def check(self, tickets: Sequence[bytes], shards: Sequence[Shard]) -> None:
        """Check the request for tickets whose owners are not connected; raise as `Reader.pull`."""
        check_arguments(tickets, shards, self.indices, self.first)


class Issuer:
    """Issues the pulls of one reader."""

    def __init__(self, graph: Graph, shards: Sequence[Shard], device: torch.device) -> None:
        self.graph = graph
        self.shards = shards
        self.device = device
        self.pulls = graph.queue("pull", width=16)
        self.checks = graph.queue("verify", width=16)
        self.copies = graph.queue("copy", width=4)

    def issue(self, pull: Pull, request: Request) -> tuple[list[Task], list[Part]]:
        """Issue the copies of a pull whose sources are known.

        Returns its tasks, which the caller submits, and the ends of its layers. Raises as
        `Reader.pull` does.
        """
        issuing = Issuing(self, pull, request)
        tasks = issuing.issue(issuing.plan)
        issuing.count_blocks()  # what no copy needs comes after the copies
        tasks += issuing.end(alone=True)
        return tasks, issuing.layers()

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the trace of the reader; see `Reader.trace`."""
        self.graph.trace.write(path, TransferError)

    def late_events(self, sources: Sources) -> list[torch.Event]:
        """Return the events of offers that have not been reached.

        Rows up to a mark are complete when the mark is seen. Their offer's event may stand for a
        later offer by then.
        """
        late = list[torch.Event]()
        for ticket, owner, _ in sources:
            if ticket.progress:
                continue
            event = owner.events[ticket.event] if 0 <= ticket.event < len(owner.events) else None
            if event is not None and not event.query():
                late.append(event)
        return late

    def wait_for_events(self, sources: Sources) -> None:
        """Order this reader's stream after the events of offers that have not been reached."""
        for event in self.late_events(sources):
            module = torch.get_device_module(self.device)  # events take streams of their module
            event.wait(module.current_stream(self.device))


class Issuing:
    """A pull whose plan is made, and whose copies are issued, all together or part by part.

    Raises the errors of `Reader.pull` about rows and blocks.

    Attributes:
        plan: the steps of the whole pull.
    """

    def __init__(self, issuer: Issuer, pull: Pull, request: Request) -> None:
        sources = pull.sources
        self.plan, self._skips = planned(sources, issuer.shards, request.indices, request.first)
        self._issuer = issuer
        self._pull = pull
        self._request = request
        self._layers = _Layers(issuer.shards) if request.options.by_layer else None
        self._staged = set[bytes]()  # offers whose owners get requests for rows
        self._takers = list[Taker]()

        for step in self.plan:
            if step.cut.packed:
                check_packed(step, request.verify, request.auto)
        requested = pull.requested
        requested.encoded = request.pack is not None
        requested.nbytes = sum([step.nbytes for step in self.plan])
        # A copy at a rate has a separate worker.
        on_host = issuer.device.type == "cpu"
        self._long = on_host and requested.nbytes > LONG and not request.options.max_gbps
        pull.copies = self._copies = list[BlockTransfer]()
        pull.slices = self._slices = list[Task]()

    def count_blocks(self) -> None:
        """Count the blocks of the pull, for its statistics."""
        pull = self._pull
        request = self._request
        past = pull.sources[0].ticket.tokens
        blocks = count_blocks(request.indices, request.first, past, self._skips)
        pull.requested.blocks = blocks

    def issue(self, some: Sequence[Step]) -> list[Task]:
        """Issue the copies of steps, or of parts of steps, and return their tasks."""
        pull = self._pull
        options = self._request.options
        requested = pull.requested
        self._issuer.wait_for_events(pull.sources)
        tasks = list[Task]()
        staged = dict[bytes, list[Step]]()  # by offers whose owners send the rows
        for step in some:
            if step.cut.src is None:
                staged.setdefault(step.ticket.offer, []).append(step)
                requested.strategy = step.owner.strategy
            elif self._long:
                tasks += self._ending(step, self._copied(step))
            else:
                copy = _copy_of(step, options, self._rate([step]) if options.max_gbps else None)
                self._copies.append(copy)
                if self._layers is not None:
                    self._layers.add_copy(step, copy)
        self._slices += tasks
        for steps_of_offer in staged.values():
            tasks.append(self._take(steps_of_offer))
        self._staged |= staged.keys()
        return tasks

    def _take(self, some: Sequence[Step]) -> Task:
        """Return the task that takes the rows of an offer from the owner that sends them, at their
        share of the rate."""
        request = self._request
        rate = self._rate(some)
        crossed = Crossed(request.pack, request.auto, inf if rate is None else rate)
        self._pull.requested.crossed.append(crossed)
        taker = Taker(self._issuer.graph, some, self._pull, rate, crossed)
        self._takers.append(taker)
        for each in taker.arrivals:
            self._slices += self._ending(each.step, [(each.part.layers, each)])
        return taker.task

    def _ending(self, step: Step, tasks: Iterable[tuple[range, Task]]) -> list[Task]:
        """Return tasks that each bring some layers of a step, after their layers know them."""
        listed = [*tasks]
        if self._layers is not None:
            self._layers.add_tasks(step, listed)
        return [task for _, task in listed]

    def _rate(self, some: Sequence[Step]) -> float | None:
        """Return the share of steps in the rate of the pull; None: it has none."""
        rate = self._request.options.max_gbps
        if rate is None:
            return None
        return rate * sum(step.nbytes for step in some) / self._pull.requested.nbytes

    def end(self, alone: bool = False) -> list[Task]:
        """Return the task that commits the pull.

        None if whoever looks at the pull commits it, or the task that takes all of its rows.

        Args:
            alone: no task of the pull was submitted yet.
        """
        pull = self._pull
        issuer = self._issuer
        requested = pull.requested
        requested.quiet = pull.sources
        if self._staged:
            requested.quiet = [x for x in pull.sources if x.ticket.offer not in self._staged]
        # This is set last, for the reader's thread.
        requested.pieces = len(self._copies) + len(self._slices)

        verifying = self.plan if self._request.verify else ()
        checks = [Task(partial(verified, step, pull), 1, queue=issuer.checks) for step in verifying]
        if not (self._slices or checks or pull.remote):
            return []
        if alone and self._one_taker and not checks:
            self._commit_by(self._takers[0])
            return []
        pull.task = Task(lambda *_: pull.run(issuer.graph, checks), 1, queue=issuer.pulls)
        return [pull.task]

    @property
    def _one_taker(self) -> bool:
        """Return True if one task takes all rows, from the pull's only owner."""
        return len(self._takers) == len(self._pull.sources) == 1 and not self._copies

    def _commit_by(self, taker: Taker) -> None:
        """Let the task that takes all rows also commit the pull: no other thread has to wake.

        If it lasts long, another worker renews the offer.
        """
        issuer = self._issuer
        pull = self._pull
        taker.commits = True
        pull.task = taker.task
        renew = Task(lambda *_: pull.renew_until(taker.task), 1, queue=issuer.pulls, name="renew")
        pull.requested.tend = partial(issuer.graph.submit, [renew], priority="urgent")

    def layers(self) -> list[Part]:
        """Return the ends of all layers, as far as they are issued."""
        return [] if self._layers is None else self._layers.parts()

    def layer(self, group: int, layer: int) -> Part:
        """Return the end of a layer of a shard, as far as it is issued."""
        assert self._layers is not None  # only pulls by layer have these
        return self._layers.part(group, layer)

    def _copied(self, step: Step) -> Iterator[tuple[range, Task]]:
        """Yield the tasks that copy the rows of a step on the host, and the layers of each."""
        options = self._request.options
        layers = step.cut.dst.layers
        each = 1 if options.by_layer else layers
        options = replace(options, by_layer=False)
        for start in range(0, layers, each):
            some = range(start, start + each)
            copy = partial(_copy_layers, step, some, self._pull, options)
            yield some, Task(copy, 1, queue=self._issuer.copies)


class _Layers:
    """The ends of each layer of each shard, of a pull by layer."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._ends = [[Ends() for _ in range(shard.view.layers)] for shard in shards]

    def add_copy(self, step: Step, copy: BlockTransfer) -> None:
        """Add the layers of a copy."""
        ends = self._ends[step.cut.group]
        for nth, end in enumerate(copy.layers):
            ends[step.cut.layers[nth]].copies.append(end)

    def add_tasks(self, step: Step, tasks: Iterable[tuple[range, Task]]) -> None:
        """Add tasks that each bring some layers of a step."""
        ends = self._ends[step.cut.group]
        for some, task in tasks:
            for layer in some:
                ends[step.cut.layers[layer]].tasks.append(task)

    def part(self, group: int, layer: int) -> Part:
        """Return the end of a layer of a shard."""
        end = self._ends[group][layer]
        return Part(end.copies, end.tasks)

    def parts(self) -> list[Part]:
        """Return the end of each layer."""
        return [Part(x.copies, x.tasks) for ends in self._ends for x in ends]


def _copy_of(step: Step, options: CopyOptions, rate: float | None) -> BlockTransfer:
    """Copy the rows of a step, at its share of the rate."""
    if rate is not None:
        options = replace(options, max_gbps=rate)
    return copy_checked(
        step.src, step.cut.dst, step.src_index, step.dst_index, step.tokens, options
    )


def _copy_layers(step: Step, layers: range, pull: Pull, options: CopyOptions, *_: object) -> None:
    """Copy layers of a step between views on the host."""
    if pull.over:
        raise TransferCancelled(CANCELLED)
    window = slice(layers.start, layers.stop)
    try:
        with torch.inference_mode(False):
            src = step.src.slice(layers=window)
            dst = step.cut.dst.slice(layers=window)
            indices = step.src_index, step.dst_index
            copy_checked(src, dst, *indices, step.tokens, options).synchronize()
    except PackOverflow:  # the rows of the other tasks are moved
        raise
    except BaseException as error:
        pull.stop(known(error) or TransferCancelled(CANCELLED))  # no mark is waited for
        raise
