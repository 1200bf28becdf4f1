# SPDX-License-Identifier: Apache-2.0
"""A `Reader` pulls rows that owners offer into its own views.

It copies rows by one launch for each piece if the owner's memory can be mapped. Otherwise the owner
sends the rows through staging buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from weakref import WeakSet

import torch

from portakv import arguments
from portakv.copy.options import CopyOptions, Overlap, options_from
from portakv.copy.rows import copy_rows
from portakv.graph.graph import Graph
from portakv.migrate.channel import Channel
from portakv.migrate.connections import Connections, Sources, renamed
from portakv.migrate.plan import count_blocks, steps
from portakv.migrate.pull import Ends, Part, Pull
from portakv.migrate.shards import Shard
from portakv.migrate.staged import taken, verifications
from portakv.runtime.devices import capturing, refuse_capture
from portakv.view.index import IdList

LONG = 8 << 20  # bytes on the host whose copy takes longer than the message to the owner
#: The options that a pull takes.
OPTIONS = ("by_layer", "overlap", "max_thread_blocks", "max_gbps")

PATIENCE = 7.0  # seconds for which `Reader.close` waits for pulls, which end within three


def _at_rate(options: CopyOptions, rate: float | None) -> CopyOptions:
    """Return the options of a step at its share of the rate; the same ones without a rate."""
    return options if rate is None else replace(options, max_gbps=rate)


class Reader:
    """A process that pulls the rows that owners offer.

    Args:
        channel: the channel for requests to owners; a channel has at most one reader.
        shards: the views with their windows, one for each group of layers that share block ids.
        model: a fingerprint; owners of another model are rejected.
        transport: the name of the transport for memory that cannot be mapped. None: the transport
            that the owner names, else the first that runs here.
        mover: deprecated, the same as ``transport``.

    Raises `LayoutError` without a shard or if the shards are on several devices, and `InvalidTerms`
    for a channel that has a reader.
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
        self._owners = Connections(channel, shards, model, transport)
        self._graph = Graph()
        self.channel = channel
        self.shards = shards
        self.device = self._owners.device
        self._queue = self._graph.queue("pull", width=16)
        self._checks = self._graph.queue("verify", width=16)
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
        options: CopyOptions | None = None,
        verify: bool = False,
        timeout: float | None = None,
    ) -> Pull:
        """Pull the rows of tickets into lists of blocks, one list for each shard.

        None in place of a list: blocks from the first one on.

        Args:
            tickets: one ticket of each owner that has a part of this reader's windows.
            first: the number of tokens that are here already; both sides skip them.
            by_layer: copy one layer after the other, each with a separate end in `Pull.layers`.
            overlap, max_thread_blocks: as for `copy_rows`, for memory that is mapped.
            max_gbps: the most 10^9 bytes in a second, of all owners together. Other pulls of rows
                that the same owner sends wait meanwhile.
            options: these four options, made once for many pulls, in place of them.
            verify: compare checksums of all bytes with the owners' before the commit.
            timeout: seconds from the call, handshake included; then the pull ends without a commit.

        Raises:
            PeerError, OfferGone: no ticket; an owner that is gone, refuses, or was restarted.
            LayoutError: rows that cannot become this reader's; layers or heads without an owner.
            SlotError: bad blocks on either side, or too few.
            Unsupported: memory that can neither be mapped nor sent; inside graph capture.
        """
        keywords = dict(zip(OPTIONS, (by_layer, overlap, max_thread_blocks, max_gbps), strict=True))
        options = options_from(options, keywords)
        options.check_only("a pull", OPTIONS)
        arguments.whole("first", first)
        arguments.flag("verify", verify)
        if capturing(self.device):
            raise refuse_capture("A pull", "it asks owners to confirm their offers; pull outside")
        self._graph.submit(())  # raises after `close` and in a forked process
        limit = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + limit
        sources = self._owners.resolve(tickets, until)
        plan = steps(sources, self.shards, blocks, first)
        self._wait_for_events(sources)

        pull = Pull(self._queue, until)
        self._pulls.add(pull)
        pull.requested.blocks = count_blocks(self.shards, blocks, first, sources[0].ticket.tokens)
        staged = {step.ticket.offer for step in plan if step.cut.src is None}
        pull.quiet = [source for source in sources if source.ticket.offer not in staged]
        total = sum(step.nbytes for step in plan)
        layers = [[Ends() for _ in range(shard.view.layers)] for shard in self.shards]
        try:
            if self.device.type == "cpu" and total >= LONG:  # a host copy runs inside this call
                pull.begin()
            for step in plan:
                ends = layers[step.cut.group]
                pull.requested.nbytes += step.nbytes
                # The steps share the rate.
                rate = options.max_gbps and options.max_gbps * step.nbytes / total
                if step.cut.src is None:
                    pull.requested.strategy = step.owner.strategy
                    for some, task in taken(self._graph, step, pull, rate):
                        pull.slices.append(task)
                        for layer in some:
                            ends[step.cut.layers[layer]].tasks.append(task)
                    continue
                copy = copy_rows(
                    step.cut.src,
                    step.cut.dst,
                    step.src_index,
                    step.dst_index,
                    count=step.tokens,
                    options=_at_rate(options, rate),
                )
                pull.copies.append(copy)
                for nth, end in enumerate(copy.layers if options.by_layer else ()):
                    ends[step.cut.layers[nth]].copies.append(end)
            if options.by_layer:
                pull.layers = [Part(x.copies, x.tasks) for ends in layers for x in ends]
            checks = verifications(plan, pull, self._checks) if verify else []
            pull.tasks[0].work = lambda *_: pull.end(self._graph, sources, checks)
            self._graph.submit([*pull.slices, *pull.tasks], priority="urgent")
            return pull
        except BaseException:  # the caller does not get the handle of the copies in flight
            pull.drop()
            raise

    def _wait_for_events(self, sources: Sources) -> None:
        """Order this reader's stream after the events of offers that have not been reached."""
        for ticket, owner in sources:
            event = owner.events[ticket.event] if 0 <= ticket.event < len(owner.events) else None
            if event is not None and not event.query():
                module = torch.get_device_module(self.device)  # events take streams of their module
                event.wait(module.current_stream(self.device))

    def explain(self, tickets: bytes | Sequence[bytes]) -> str:
        """Return a line for each ticket: how its rows would be copied, and why."""
        lines = list[str]()
        for ticket, owner in self._owners.resolve(tickets):
            how = "one launch for each piece reads the rows in the owner's memory"
            if owner.why_not_mapped:
                transport = owner.staging.transport
                how = f"{transport.name} sends the rows through staging buffers: "
                how += f"{owner.why_not_mapped} ({transport.why})"
            lines.append(f"{owner.address}, {ticket.tokens} tokens: {how}.")
        return "\n".join(lines)

    def close(self) -> None:
        """Release all owners.

        Waits for pulls in flight, and cancels them early enough to return within ten seconds.
        """
        until = monotonic() + PATIENCE
        for pull in tuple(self._pulls):
            if not pull.tasks[0].wait(max(0.0, until - monotonic())):
                pull.cancel()
        self._graph.close(2.0)
        self._owners.close()
        self.channel.free("a reader", self)
