# SPDX-License-Identifier: Apache-2.0
"""Ask the owner of published weights, and open its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import torch
from msgspec import msgpack

from portakv.errors import (
    LayoutError,
    OfferGone,
    PeerError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.migrate.channel import Channel
from portakv.migrate.described import strided
from portakv.migrate.ipc import Opener
from portakv.migrate.messages import unsealed
from portakv.migrate.parameters import Box, Cell, Item, part_of
from portakv.migrate.published import MOST_BOXES, AskWeights, Weights, WeightsTicket
from portakv.runtime.bounded import Bounded

T = TypeVar("T")
MOST_LISTING = 256 << 20  # the most bytes of an owner's list


class Publication:
    """What this process knows of an owner's weights, and the owner's memory that it has opened."""

    def __init__(self, address: str, items: dict[str, Item], handles: list[bytes]) -> None:
        self.address = address
        self.items = items
        self.unwatch: Callable[[], object] = lambda: None
        #: Equal for publications that differ at most in their handles.
        self.digest = blake2b(msgpack.encode([*items.items()]), digest_size=16).digest()
        self.numbers = {name: number for number, name in enumerate(items)}
        #: The numbers of whole boxes, in the order in which the owner lists their checksums.
        self.boxes = dict[tuple[str, Box], int]()
        for name, item in items.items():
            for box in item.boxes:
                self.boxes.setdefault((name, box), len(self.boxes))
        self._handles = handles
        self._regions = dict[tuple[int, torch.device], torch.Tensor]()
        self._tensors = dict[tuple[str, torch.device], torch.Tensor]()

    def tensor(
        self, name: str, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return an owner's tensor for a device of this process, and open its region if necessary.

        Raises `PeerError` for a place outside of the owner's regions.
        """
        item = self.items[name]
        key = item.tie, like.device
        if key in self._tensors:
            return self._tensors[key]
        if item.place is None or item.place[0] >= len(self._handles):
            raise self.wrong(name)
        (number, offset) = item.place
        region = self._regions.get((number, like.device))
        if region is None:
            if like.device not in openers:
                openers[like.device] = Opener(like.device, descriptors=False)
            region = openers[like.device].open(self._handles[number])
            if region.dtype != torch.uint8 or region.ndim != 1:
                raise self.wrong(name)
            self._regions[number, like.device] = region
        try:
            tensor = strided(region, offset, like.dtype, item.local, item.strides)
        except (LayoutError, RuntimeError):
            raise self.wrong(name) from None
        self._tensors[key] = tensor
        return tensor

    def source(
        self, cell: Cell, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return the source of a cell in the owner's memory; raise the errors of `tensor`."""
        tensor = self.tensor(cell.name, like, openers)
        try:
            return part_of(tensor, cell.src, cell.box.extents)
        except LayoutError:
            raise self.wrong(cell.name) from None

    def wrong(self, name: str) -> PeerError:
        """Return the error of an owner whose description does not fit its memory."""
        return PeerError(
            f"Expected {name} as {self.address} described it, got other memory. Pull from another "
            f"owner."
        )


#: Publications by channel, address and id. The end of the connection to the owner removes them.
publications: Bounded[tuple[bytes, str, bytes], Publication] = Bounded("open publications", 64)


def _forget(key: tuple[bytes, str, bytes]) -> None:
    """Release the memory of a publication, as soon as no pull uses it."""
    publication = publications.pop(key, None)
    if publication is not None:
        publication.unwatch()


class Owner:
    """An owner of weights, for one pull that ends at the time ``until``."""

    def __init__(
        self,
        channel: Channel,
        ticket: bytes,
        timeout: float,
        until: float,
        stopped: Callable[[], bool],
    ) -> None:
        decoded = unsealed(ticket, WeightsTicket)
        if decoded is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got bytes that are "
                "not a ticket of weights of this release. Carry them unchanged."
            )
        self.channel = channel
        self.timeout = timeout
        self.until = until
        self.address = decoded.address
        self.id = decoded.id
        self.version: int | None = None
        self._stopped = stopped
        self._key = channel.id, decoded.address, decoded.id
        known = publications.get(self._key)
        if known is None:
            self.publication = self._list()
            return
        self.publication = known
        self.ask(AskWeights(self.id, len(known.items), begin=True))

    def _list(self) -> Publication:
        """Request all items and regions, and keep them until the connection ends."""
        request = AskWeights(self.id, begin=True)
        pairs = self._all("weights", request, lambda page: page.items, lambda pair: pair[0])
        handles = self._all(
            "regions", AskWeights(self.id, what="regions"), lambda page: page.regions
        )
        publication = Publication(self.address, dict(pairs), handles)
        # A channel publishes once, so what it published before is gone.
        for key in [key for key in [*publications] if key[:2] == self._key[:2]]:
            _forget(key)
        publications[self._key] = publication
        try:
            publication.unwatch = self.channel.watch(
                self.address, partial(publications.pop, self._key, None)
            )
        except BaseException:
            publications.pop(self._key, None)
            raise
        return publication

    def _all(
        self,
        what: str,
        request: AskWeights,
        of: Callable[[Weights], Sequence[T]],
        name: Callable[[T], object] | None = None,
        total: int | None = None,
    ) -> list[T]:
        """Request a list in pages; raise `PeerError` if its length is not the announced one.

        ``name``: of an object, which the list has once. ``total``: the length, if it is known.
        """
        listed = list[T]()
        names = set[object]()
        nbytes = 0
        while total is None or len(listed) < total:
            first = len(listed)
            begin = request.begin and not first
            page = self.ask(AskWeights(request.id, first, what=request.what, begin=begin))
            some = of(page)
            listed += some
            names.update(map(name, some) if name else ())
            nbytes += len(msgpack.encode(page))
            total = page.total if total is None else total
            stuck = not some and len(listed) < total
            twice = name is not None and len(names) < len(listed)
            long = len(listed) > total or nbytes > MOST_LISTING
            if page.total != total or stuck or twice or long:
                raise PeerError(
                    f"Expected {total} {what} from {self.address}, got {len(listed)}, or some "
                    f"twice. Pull from another owner."
                )
        return listed

    def ask(self, request: AskWeights) -> Weights:
        """Return the owner's answer, after the owner has one."""
        pause = 5e-4
        while True:
            answer = self.once(request)
            if answer.state == "held":
                return answer
            time.sleep(min(pause, max(0.0, self.until - time.monotonic())))
            pause = min(2 * pause, 0.05)

    def once(self, request: AskWeights) -> Weights:
        """Return the owner's answer, which may be busy; raise if its weights changed."""
        left = self.until - time.monotonic()
        self.check()
        try:
            answer = self.channel.ask(
                self.address, request, Weights, min(left, self.channel.timeout)
            )
        except TransferTimeout:
            if time.monotonic() < self.until:
                raise
            raise self.late() from None
        if answer.state == "gone":
            _forget(self._key)
            raise OfferGone(
                f"The weights at {self.address} are no longer published; request a new ticket."
            )
        if answer.state == "held" and self.version is None:
            self.version = answer.version
        if self.version not in (None, answer.version):
            raise TransferError(
                f"The weights at {self.address} changed while they were pulled. Do not use any of "
                f"them; pull again."
            )
        if answer.state == "replaced":
            raise PeerError(
                f"Expected {answer.replaced} at {self.address} in the memory that was published, "
                f"got other memory. Have its process publish the weights again."
            )
        return answer

    def check(self) -> None:
        """Raise the error of a pull that was cancelled or whose time is over."""
        if self._stopped():
            raise TransferCancelled("The pull of weights was cancelled. Do not use the weights.")
        if time.monotonic() >= self.until:
            raise self.late()

    def late(self) -> TransferTimeout:
        """Return the error of a pull whose time is over."""
        return TransferTimeout(
            f"The pull of weights from {self.address} timed out after {self.timeout:g} s. Do not "
            f"use the weights; pull again with a longer timeout."
        )

    def confirm(self) -> None:
        """Raise `TransferError` if the weights have changed since they were listed."""
        self.ask(AskWeights(self.id, len(self.publication.items)))

    def refuse(self) -> None:
        """Report checksums that differ, so that the owner does not use them again."""
        self.once(AskWeights(self.id, len(self.publication.items), again=True))

    def sums(self, cells: Sequence[Cell]) -> list[int]:
        """Return the owner's checksums of cells of this owner."""
        whole = self.publication.boxes
        boxes = [x.box._replace(start=x.src) for x in cells]
        listed = list[int]()
        if any((x.name, box) in whole for x, box in zip(cells, boxes, strict=True)):
            request = AskWeights(self.id, what="sums")
            listed = self._all("checksums", request, lambda page: page.sums, total=len(whole))

        sums = dict[tuple[str, Box], int]()
        numbered = list[tuple[str, Box]]()
        for cell, box in zip(cells, boxes, strict=True):
            number = whole.get((cell.name, box))
            if number is None:
                numbered.append((cell.name, box))
            else:
                sums[cell.name, box] = listed[number]
        for first in range(0, len(numbered), MOST_BOXES):
            some = numbered[first : first + MOST_BOXES]
            request = AskWeights(
                self.id,
                boxes=tuple((self.publication.numbers[name], box) for name, box in some),
            )
            answer = self.ask(request).sums
            self._check_number(len(some), len(answer))
            sums.update(zip(some, answer, strict=True))
        return [sums[cell.name, box] for cell, box in zip(cells, boxes, strict=True)]

    def _check_number(self, expected: int, got: int) -> None:
        if got != expected:
            raise PeerError(
                f"Expected {expected} checksums from {self.address}, got {got}. Do not use the "
                f"weights; pull from another owner."
            )
