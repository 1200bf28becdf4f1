# SPDX-License-Identifier: Apache-2.0
"""`KeeperClient`: the blocks of a rank, in the store of the keeper of its host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from portakv.arguments import instance, items, seconds, text
from portakv.migrate.channel import Channel, Peer
from portakv.serving.keeper_blocks import KeptBlocks
from portakv.serving.keeper_link import Link, Session, Sides, this_client
from portakv.serving.keeper_locks import KeptLocks
from portakv.serving.keeper_messages import Join, Joined, Progress, Report
from portakv.serving.keeper_requests import Requests
from portakv.serving.keeper_rows import MappedRows, RankForm
from portakv.serving.place import Place
from portakv.storage import BlockForm


class KeeperClient:
    """The blocks of a rank of an engine, in the store of the keeper of its host.

    It finds the keeper whenever one serves. As long as none does, nothing is loaded, and what is
    saved is dropped; the log has a line about it.

    Args:
        place: where the processes of the host find the keeper.
        forms: of the rank's part of the blocks of each group of layers, with its layers and heads
            among those of the model.
        engine: its name. All ranks that save together have the same one.
        device: of the rank's caches, for which the rows of the store are registered.

    Raises `InvalidTerms` for wrong arguments.

    Attributes:
        blocks: of each group of layers.
        locks: of each group of layers, on its blocks.
        link: the connection to the keeper.
    """

    def __init__(
        self,
        place: Place,
        forms: Sequence[BlockForm],
        engine: str = "",
        device: torch.device | None = None,
    ) -> None:
        instance("place", place, Place)
        parts = [RankForm(instance("forms", x, BlockForm)) for x in items("forms", forms, "forms")]
        texts = tuple(part.form.json() for part in parts)
        self._device = device
        self._mapped: MappedRows | None = None
        self._requests = Requests()
        name = text("engine", engine, least=0)
        client = this_client()  # before the channel, which an error would leave open
        channel = Channel()
        self._hello = partial(Join, name, client, channel.address, texts)
        channel.serve(Progress, self._progress)
        sides = Sides(self._hello, Joined, lambda: self._requests.idle, self._began, self._ended)
        self.link = Link(place, channel, sides)
        self.blocks = [
            KeptBlocks(self._requests, self.link, number, part) for number, part in enumerate(parts)
        ]
        self.locks = [
            KeptLocks(self._requests, self.link, number) for number, _ in enumerate(parts)
        ]
        self.link.start()

    def __enter__(self) -> KeeperClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait for a keeper, at most so many seconds; return whether one serves.

        Raises `InvalidTerms` with the sentence of a keeper that refuses the blocks of this rank.
        """
        return self.link.wait(seconds("timeout", timeout))

    def close(self, timeout: float = 10.0) -> None:
        """End the loads and saves, and leave the keeper."""
        timeout = seconds("timeout", timeout)
        if self._requests.process.forked:
            return
        self._requests.close(timeout)
        self.link.close()
        self._requests.graph.close(timeout)
        if self._mapped is not None and self._requests.idle:
            self._mapped.close()

    def _began(self, address: str, joined: Joined) -> MappedRows:
        """Map the rows of a keeper, in place of those of the keeper before."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        self._mapped = MappedRows(joined.rows, self._device)
        return self._mapped

    def _ended(self, session: Session) -> None:
        self._requests.close_all()

    def _progress(self, peer: Peer, progress: Progress) -> None:
        """Take rows of the keeper, in the thread of the channel."""
        session = self.link.session
        if session is None or session.number != progress.session:
            return
        waiting = self._requests.find(progress.number)
        if waiting is not None:
            copying, piece = waiting
            self._requests.take(piece, progress)
            copying.copy_later(session, piece, progress.grants)
        for grant in progress.grants if waiting is None else ():  # nothing waits for these rows
            report = Report(session.number, grant.lease, bytes(len(grant.places) // 4))
            self._requests.run("load", partial(self.link.tell, session, report))
