# SPDX-License-Identifier: Apache-2.0
"""`Reader` pulls rows that owners offer into its own views: in one launch for each piece if their
memory can be mapped, through staged slots if it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakSet

import torch

from portakv import arguments
from portakv.copy.rows import copy_rows
from portakv.graph.graph import Graph, Task
from portakv.interconnect.strategy import Overlap, Terms
from portakv.migrate.channel import Channel
from portakv.migrate.moved import taken, verified
from portakv.migrate.pairing import Pairings, renamed
from portakv.migrate.published import Part, Pull
from portakv.migrate.shards import Shard
from portakv.migrate.steps import count_blocks, steps
from portakv.runtime.devices import capturing, refuse_capture
from portakv.view.index import IdList

LONG = 8 << 20  # bytes on the host whose copy takes longer than to tell their owner of it


PATIENCE = 7.0  # seconds for which `Reader.close` waits for pulls: they end in three


class Reader:
    """A process that pulls rows which owners offer.

    Args:
        channel: by which owners are asked; one reader on each.
        shards: its views with their windows, one for each group of layers that share block ids.
        model: a fingerprint; owners of another one are refused.
        transport: the name of the transport for memory that cannot be mapped; None: the one that
            the owner names, else the first that serves here.
        mover: deprecated, the same as ``transport``.

    Raises `LayoutError` without a shard, or if not all are on one device, and `InvalidTerms` for a
    channel that has a reader.
    """

    def __init__(
        self,
        channel: Channel,
        *shards: Shard,
        model: str,
        transport: str | None = None,
        mover: str | None = None,
    ) -> None:
        arguments.instance("channel", channel, Channel)
        transport = renamed(transport, mover)
        arguments.text("model", model)
        self._owners = Pairings(channel, shards, model, transport)
        self._graph = Graph()
        self.channel = channel
        self.shards = shards
        self.device = self._owners.device
        self._queue, self._checks = (self._graph.queue(x, width=16) for x in ("pull", "verify"))
        self._pulls = WeakSet[Pull]()
        channel.claim("a reader", self)

    def pull(
        self,
        tickets: bytes | Sequence[bytes],
        *blocks: IdList,
        first: int = 0,
        by_layer: bool = False,
        overlap: Overlap = "compute",
        max_thread_blocks: int | None = None,
        max_gbps: float | None = None,
        verify: bool = False,
        timeout: float | None = None,
    ) -> Pull:
        """Pull what tickets offer into lists of blocks, one for each shard; None: blocks from the
        first one on.

        Args:
            tickets: one of each owner that has a part of this reader's windows.
            first: tokens that are here already, and are passed over on both sides.
            by_layer: one layer behind the other, each with an end of its own: `Pull.layers`.
            overlap, max_thread_blocks: as for `copy_rows`, for memory that is mapped.
            max_gbps: the most 10^9 bytes in a second, of all owners together. Other pulls of rows
                that the same owner moves wait meanwhile.
            verify: compare digests of all bytes with the owners' before they are published.
            timeout: seconds from the call, pairing included; then it ends, and publishes nothing.

        Raises:
            PeerError, OfferGone: no ticket; an owner that is gone, refuses, or was restarted.
            LayoutError: rows that cannot become this reader's; layers or heads that nobody offers.
            SlotError: bad blocks on either side, or too few.
            Unsupported: memory that can neither be mapped nor moved; inside graph capture.
        """
        terms = Terms(overlap, max_thread_blocks, max_gbps)
        arguments.whole("first", first)
        arguments.flag("by_layer", by_layer)
        arguments.flag("verify", verify)
        if capturing(self.device):
            raise refuse_capture("A pull", "owners are asked whether offers held; pull outside")
        self._graph.submit(())  # raises after `close`, and in a forked process
        limit = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + limit
        told = self._owners.told(tickets, until)
        plan = steps(told, self.shards, blocks, first)
        for ticket, owner in told:
            event = owner.events[ticket.event] if 0 <= ticket.event < len(owner.events) else None
            if event is not None and not event.query():
                module = torch.get_device_module(self.device)  # its events take its own streams
                event.wait(module.current_stream(self.device))
        pull = Pull(Task(None, 1, queue=self._queue, name="pull"), until)
        self._pulls.add(pull)
        pull.blocks = count_blocks(self.shards, blocks, first, told[0][0].tokens)
        asked = {step.ticket.offer for step in plan if step.cut.src is None}
        pull.quiet = [one for one in told if one[0].offer not in asked]
        whole = sum(step.nbytes for step in plan)
        layers: Any = [[([], []) for _ in range(x.view.layers)] for x in self.shards]
        try:
            if self.device.type == "cpu" and whole >= LONG:  # it copies before this returns
                pull.begin()
            for step in plan:
                ends = layers[step.cut.group]
                pull.nbytes = pull.nbytes + step.nbytes
                # All steps together keep to the rate.
                rate = terms.max_gbps and terms.max_gbps * step.nbytes / whole
                if step.cut.src is None:
                    pull.way = step.owner.transport.name, step.owner.why
                    for some, task in taken(self._graph, step, pull, rate):
                        pull.slices.append(task)
                        for layer in some:
                            ends[step.cut.layers[layer]][1].append(task)
                    continue
                copy = copy_rows(
                    step.cut.src,
                    step.cut.dst,
                    step.theirs,
                    step.mine,
                    count=step.tokens,
                    by_layer=by_layer,
                    overlap=overlap,
                    max_thread_blocks=max_thread_blocks,
                    max_gbps=rate,
                )
                pull.copies.append(copy)
                for nth, end in enumerate(copy.layers if by_layer else ()):
                    ends[step.cut.layers[nth]][0].append(end)
            if by_layer:
                pull.layers = [Part(*layer) for ends in layers for layer in ends]
            checks = list[Task]()
            if verify:
                checks = [Task(partial(verified, x, pull), 1, queue=self._checks) for x in plan]
            pull.tasks[0].work = lambda *_: pull.end(told, checks)
            self._graph.submit([*pull.slices, *pull.tasks], priority="urgent")
            return pull
        except BaseException:  # nobody gets the handle of what was issued
            pull.drop()
            raise

    def explain(self, tickets: bytes | Sequence[bytes]) -> str:
        """How rows of these tickets' owners would come, and why so."""
        lines = list[str]()
        for ticket, owner in self._owners.told(tickets):
            how = "rows are read where they lie, by one launch for each piece"
            if owner.why:
                how = f"rows are moved by {owner.transport.name}, through staging: {owner.why}"
                how += f" ({owner.transport.why})"
            lines.append(f"{owner.address}, {ticket.tokens} tokens: {how}.")
        return "\n".join(lines)

    def close(self) -> None:
        """Let go of all owners. Pulls under way end first; they are cancelled in time to be
        closed after ten seconds."""
        until = monotonic() + PATIENCE
        for pull in tuple(self._pulls):
            if not pull.tasks[0].wait(max(0.0, until - monotonic())):
                pull.cancel()
        self._graph.close(2.0)
        self._owners.close()
        self.channel.free("a reader", self)
