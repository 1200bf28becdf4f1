# SPDX-License-Identifier: Apache-2.0
"""A `Reader` pulls rows that owners offer into its own views.

It copies rows by one launch for each piece if the owner's memory can be mapped. Otherwise the owner
sends the rows through staging buffers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import is_
from time import monotonic

from portakv import arguments
from portakv.copy.options import USUAL, CopyOptions, Overlap, options_from
from portakv.graph.graph import Graph
from portakv.migrate.by_name import ByName
from portakv.migrate.channel import Channel
from portakv.migrate.connections import Connections, closed_reader, listed
from portakv.migrate.crossed import Encoding
from portakv.migrate.housekeeping import Housekeeper
from portakv.migrate.issue import Issuer, Request
from portakv.migrate.pull import Part, Pull
from portakv.migrate.shards import Shard
from portakv.runtime.devices import capturing, refuse_capture
from portakv.view.index import Ids

#: The options that a pull takes.
OPTIONS = ("by_layer", "overlap", "max_thread_blocks", "max_gbps")

PATIENCE = 7.0  # seconds for which `Reader.close` waits for pulls, which end within three


class Reader:
    """A process that pulls the rows that owners offer.

    Args:
        channel: the channel for requests to owners; a channel has at most one reader.
        shards: the views with their windows, one for each group of layers that share block ids.
        model: a fingerprint; owners of another model are rejected.
        transport: the name of the transport for memory that cannot be mapped. None: the transport
            that the owner names, else the first that runs here.

    Raises `LayoutError` without a shard or if the shards are on several devices, and `InvalidTerms`
    for a channel that has a reader.
    """

    def __init__(
        self,
        channel: Channel,
        *shards: Shard,
        model: str,
        transport: str | None = None,
    ) -> None:
        arguments.instance("channel", channel, Channel)
        arguments.text("model", model)
        self._owners = Connections(channel, shards, model, transport)
        self._graph = Graph()
        self.channel = channel
        self.shards = shards
        self.device = self._owners.device
        self._issuer = Issuer(self._graph, shards, self.device)
        self._keeper = Housekeeper(self.device)
        self._by_name = ByName(self._graph, self._owners, self._issuer, self._keeper)
        self._closed = False
        #: The options of the last pull, as they were passed, and as they were checked.
        self._last_options: tuple[tuple[object, ...], CopyOptions] = (), USUAL
        channel.claim("a reader", self)

    def pull(
        self,
        tickets: bytes | Sequence[bytes],
        *blocks: Ids | None,
        first: int = 0,
        by_layer: bool = False,
        overlap: Overlap = "compute",
        max_thread_blocks: int | None = None,
        max_gbps: float | None = None,
        options: CopyOptions | None = None,
        verify: bool = False,
        encoding: Encoding | None = None,
        timeout: float | None = None,
    ) -> Pull:
        """Pull the rows of tickets into lists of blocks, one list for each shard, of as many blocks
        as the tokens fill. None: a view that is not paged, from its first row on.

        Args:
            tickets: one ticket of each owner that has a part of this reader's windows. A pull by
                `Ticket.of` waits for its offer, of that the call itself for at most 1 ms. Pulls
                wait for handshakes, and for rows that are not complete. An `Index` and ids on a
                device must not change meanwhile. Other lists are copied.
            first: the number of tokens that are here already; both sides skip them.
            by_layer: copy one layer after the other, each with a separate end in `Pull.layers`;
                of offers that are not complete, what their owners have written by then.
            overlap, max_thread_blocks: as for `copy_rows`, for memory that is mapped.
            max_gbps: the most 10^9 bytes in a second, of all owners together. Other pulls of rows
                that the same owner sends wait meanwhile.
            options: these four options, made once for many pulls, in place of them.
            verify: compare checksums of all bytes with the owners' before the commit.
            encoding: "pack" or a `Pack`: owners that send rows pack blocks of bf16; those that do
                not fit follow raw. "auto": each such owner chooses, by a sample and by the rate of
                earlier pulls or ``max_gbps``. Mapped memory is never packed. See `PullStatistics`.
            timeout: seconds from the call, handshake included; then the pull ends without a commit.

        Raises, or with a name, a handshake, or rows that are not complete ends with:
            PeerError, OfferGone: no ticket; an owner that is gone, refuses, or was restarted.
            LayoutError: rows that cannot become this reader's; layers or heads without an owner.
            SlotError: bad blocks on either side, or more or fewer than the tokens fill.
            Unsupported: memory that is neither mapped nor sent; a graph capture; another encoding.
            PackOverflow: blocks of a packed view that did not fit into it.
        """
        options = self._checked(options, by_layer, overlap, max_thread_blocks, max_gbps)
        if type(first) is not int or first < 0:
            first = arguments.whole("first", first)
        if type(verify) is not bool:
            arguments.flag("verify", verify)
        if capturing(self.device):
            raise refuse_capture("A pull", "it waits for the end of its copies; pull outside")
        self._check_open()
        seconds = arguments.FOREVER
        if timeout is not None:
            seconds = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + seconds
        request = Request.of(self.shards, blocks, first, options, verify, encoding)
        packed = listed(tickets)
        by_name = self._by_name.pull(packed, request, until)
        if by_name is not None:
            return by_name
        return self._start(packed, request, until)

    def _checked(self, options: CopyOptions | None, *keywords: object) -> CopyOptions:
        """Return the options of a pull that takes ``options`` or `OPTIONS` as keywords.

        A pull that passes the same objects as the last one gets the same options: nothing can
        change them.
        """
        passed = options, *keywords
        before, checked = self._last_options
        if len(before) == len(passed) and all(map(is_, passed, before)):
            return checked
        checked = options_from(options, dict(zip(OPTIONS, keywords, strict=True)))
        checked.check_only("a pull", OPTIONS)
        if checked.max_gbps is not None:
            arguments.rate("max_gbps", checked.max_gbps)
        self._last_options = passed, checked
        return checked

    def _start(self, packed: list[bytes], request: Request, until: float) -> Pull:
        """Return a pull of plain tickets, after its copies were issued if its owners are connected
        and its offers are complete."""
        sources = self._owners.resolve_connected(packed)
        if sources is None:
            return self._by_name.pull_connected(packed, request, until)
        pull = Pull(sources, until, self._keeper.report)
        if self._by_name.waits(pull):
            return self._by_name.follow(pull, request)
        try:
            tasks, pull.layers = self._issuer.issue(pull, request)
            self._keeper.add(pull)
            if tasks:
                self._graph.submit(tasks, priority="urgent")
            elif self.device.type == "cpu":  # without a rate its copies have ended
                pull.look()
            return pull
        except BaseException:  # the caller does not get the handle of the copies in flight
            pull.drop()
            raise

    def _check_open(self) -> None:
        """Raise `PeerError` after `close`, and `TransferError` in a forked process."""
        if self._closed:
            raise closed_reader()
        if self.channel.forked:
            self._graph.submit(())  # raises the error of a graph that was forked

    def prepare(self, address: str) -> Part:
        """Connect to the owner at an address, and map its memory, in a worker.

        The first pull of that owner then waits for no handshake. The result ends with the
        connection, and raises the errors of `pull` that are about owners. An owner that took the
        place of another on one channel counts as connected, and its first pull connects to it.

        The first copy of a process on a device also imports and chooses a backend, in the caller's
        thread: the first pull then takes 25 ms longer on a CPU. Make another copy on the reader's
        device beforehand, such as `copy_blocks` of one block, if the first pull must be quick.
        """
        arguments.text("address", address)
        self._check_open()
        return self._by_name.prepare(address)

    def extend(self, ticket: bytes, seconds: float, *, timeout: float | None = None) -> float:
        """Have the owner of a ticket keep its offer for ``seconds`` from now on; return the seconds
        for which the owner does, at most to the offer's ``max_lease``.

        Blocks until the owner answers, for at most ``timeout`` seconds, handshake included. None:
        the timeout of the channel. The call waits so long only if the owner's process is stopped or
        busy, or its host does not answer: a process that has ended is detected in 0.1 s.

        A ticket by name has no lease yet. A pull of it renews the lease of the offer that it finds.

        Raises:
            InvalidTerms: a ticket by name.
            OfferGone: the offer has ended.
            TransferTimeout: no answer in time, of the owner or in another thread's handshake with
                it.
            PeerError, LayoutError, Unsupported: no connection to the owner, as for `pull`.
        """
        limits = "a number of seconds from 0 to 10^6"
        seconds = arguments.number("seconds", seconds, 0.0, 1e6, limits)
        limit = self.channel.timeout
        if timeout is not None:
            limit = arguments.seconds("timeout", timeout)
        self._check_open()
        return self._owners.extend(ticket, seconds, monotonic() + limit)

    def explain(self, tickets: bytes | Sequence[bytes]) -> str:
        """Return a line for each ticket: how its rows would be copied, and why.

        Raises as `pull` about owners and about a reader that is closed.
        """
        self._check_open()
        lines = list[str]()
        for ticket, owner, _ in self._owners.resolve(listed(tickets)):
            how = "one launch for each piece reads the rows in the owner's memory"
            if owner.why_not_mapped:
                transport = owner.staging.transport
                how = f"{transport.name} sends the rows through staging buffers: "
                how += f"{owner.why_not_mapped} ({transport.why})"
            lines.append(f"{owner.address}, {ticket.tokens} tokens: {how}.")
        return "\n".join(lines)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last tasks of the reader, and its last choices of an encoding, for Perfetto or
        Chrome.

        Raises:
            InvalidTerms: not a path.
            TransferError: the file cannot be written.
        """
        self._issuer.write_trace(path)

    def finished(self) -> list[Pull]:
        """Return the pulls that have ended since the last call, in the order of their ends.

        The first call returns none: nothing is kept before it. At most 65,536 pulls are kept.
        """
        return self._keeper.finished.take()

    def finished_fd(self) -> int:
        """Return the descriptor that is readable while `finished` has pulls; -1 after `close`.

        For ``select``, ``epoll`` and event loops. Do not read or close it.
        """
        return self._keeper.finished.fileno()

    def statistics(self) -> dict[str, int]:
        """Return the numbers of pulls that are in flight or not reported to their owners yet
        (``pulls``), of pulls that were committed and that failed, and of owners now."""
        ends = self._keeper.ends
        return {
            "pulls": len(self._keeper.pulls),
            "committed": ends["committed"],
            "failed": ends["failed"],
            "owners": len(self._owners),
        }

    def figures(self) -> dict[str, list[dict[str, str | float]]]:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        return self._keeper.figures(len(self._owners))

    def close(self) -> None:
        """Release all owners.

        Waits for pulls in flight, and cancels them early enough to return within ten seconds.
        """
        self._keeper.wait(PATIENCE)
        self._closed = True
        self._graph.close(2.0)
        self._keeper.close()
        self._owners.close()
        self.channel.free("a reader", self)
