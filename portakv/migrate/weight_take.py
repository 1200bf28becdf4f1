# SPDX-License-Identifier: Apache-2.0
"""The reader's side of pulls of weights through staging buffers.

`Incoming` has the slices of one pull, from all of its owners.
While one slice crosses, the owner packs the next, and the reader copies from the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import torch

from portakv.migrate.parameters import Cell, part_of
from portakv.migrate.transports.base import Moving
from portakv.migrate.weight_lanes import (
    BUFFERS,
    MOST_BOX_BYTES,
    MOST_BOXES,
    SendSlice,
    box_bytes,
    packed_bytes,
    unpacked,
)
from portakv.migrate.weight_pairs import copy_pairs
from portakv.migrate.weight_plan import split
from portakv.migrate.weight_receiver import Receiver, Sender, Terms

if TYPE_CHECKING:
    from portakv.migrate.published import Weights

_LOOK = 0.05  # seconds between two looks at a cancellation
_TURN = 2e-3  # seconds between two looks at a lane that another pull uses
_ASK = 1.0  # seconds without bytes after which a pull requests the version
STOPPING = 0.5  # seconds for the slices in flight of a pull that has failed


class Wanted(NamedTuple):
    """A box that is requested from an owner, and the reader's tensor that contains it."""

    cell: Cell
    tensor: torch.Tensor


class _Slice(NamedTuple):
    """A slice that was requested, and what it is copied to."""

    receiver: Receiver
    owner: Sender
    buffer: torch.Tensor
    moving: Moving
    into: list[torch.Tensor]
    then: list[Callable[[], object]]  # called after the copies from the buffer


class Incoming:
    """The slices of one pull, which arrive in the order of the requests.

    Use it as a context manager: no other pull uses its lanes until the end. ``terms``: by the
    numbers of the owners that send weights.
    """

    def __init__(self, terms: Mapping[int, Terms], owners: Sequence[Sender]) -> None:
        self._terms = terms
        self._owners = owners
        self._receivers = dict[int, Receiver]()
        self._in_flight = deque[_Slice]()
        self._copied = deque[_Slice]()  # copied on a stream that follows the bytes

    def __enter__(self) -> Incoming:
        """Wait for each lane. All pulls do so in one order, so no two wait for each other."""
        try:
            for number in sorted(self._terms, key=self._order):
                self._receivers[number] = self._claimed(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _order(self, number: int) -> tuple[str, bytes, str]:
        owner = self._owners[number]
        return owner.address, owner.id, str(self._terms[number].device)

    def _claimed(self, number: int) -> Receiver:
        """Return the lane to an owner, after another pull has left it."""
        owner = self._owners[number]
        while True:
            receiver = owner.receiver(self._terms[number])
            if receiver.claim(self):
                if receiver.usable and receiver.tag == receiver.ended:
                    return receiver
                receiver.free(self)  # another pull has left it closed, or out of step
                receiver.release()
            owner.check()
            owner.pause(_TURN)

    def request(self, number: int, wanted: Sequence[Wanted]) -> None:
        """Request boxes of an owner, in as many slices as they need."""
        owner = self._owners[number]
        receiver = self._receivers[number]
        for some, nbytes in slices(wanted, receiver.buffer_bytes):
            boxes = tuple((owner.number(x.cell.name), x.cell.src, x.cell.box.extents) for x in some)
            into = [part_of(x.tensor, x.cell.box.start, x.cell.box.extents) for x in some]
            buffer = self._buffer(receiver)
            with torch.inference_mode(False):
                buffer = buffer[:nbytes]
            request = SendSlice(owner.id, receiver.id, receiver.tag + 1, nbytes, boxes)
            answer, moving = self._accepted(owner, receiver, request, buffer)
            self._in_flight.append(_Slice(receiver, owner, buffer, moving, into, []))
            owner.judge(answer)  # only now, because the owner sends the slice in any case

    def _accepted(
        self, owner: Sender, receiver: Receiver, request: SendSlice, buffer: torch.Tensor
    ) -> tuple[Weights, Moving]:
        """Return the owner's answer after it has accepted a request, and the transfer of its bytes
        into a buffer."""
        pause = 5e-4
        while True:
            owner.check()
            try:
                answer = owner.request_slice(request)
                if answer.state == "held":
                    receiver.tag = request.tag
                    return answer, receiver.lane.move(buffer, request.tag)
            except BaseException:  # the owner may send the slice, which the next would take
                receiver.release()
                raise
            owner.judge(answer)
            owner.pause(pause)
            pause = min(2 * pause, 0.05)

    def then(self, call: Callable[[], object]) -> None:
        """Call ``call`` after the copies of all slices that were requested until now."""
        if self._in_flight:
            self._in_flight[-1].then.append(call)
        else:
            call()

    def finish(self) -> None:
        """Copy all slices, and wait until their bytes have landed. Raises the error of a slice."""
        while self._in_flight:
            self._land()
        while self._copied:
            self._settle()

    def __exit__(self, *_: object) -> None:
        """Leave all lanes; release those whose slices do not arrive any more."""
        until = monotonic() + STOPPING
        for each in [*self._copied, *self._in_flight]:
            if not each.moving.free.wait(max(0.0, until - monotonic())) or each.moving.error:
                each.receiver.release()
            each.receiver.ended += 1
        self._copied.clear()
        self._in_flight.clear()
        self._wait_for_copies()
        for receiver in self._receivers.values():
            receiver.free(self)

    def _wait_for_copies(self) -> None:
        """Wait until no copy reads a staging buffer: the next pull of a lane has another stream."""
        buffers = [each for receiver in self._receivers.values() for each in receiver.buffers]
        for device in {each.device for each in buffers if not each.is_cpu}:
            torch.accelerator.current_stream(device.index).synchronize()

    def _buffer(self, receiver: Receiver) -> torch.Tensor:
        """Return the next staging buffer of a lane, after its last bytes were copied."""
        buffer = receiver.buffers[(receiver.tag + 1) % BUFFERS]
        while any(_same(each.buffer, buffer) for each in self._in_flight):
            self._land()
        while any(_same(each.buffer, buffer) for each in self._copied):
            self._settle()
        return buffer

    def _land(self) -> None:
        """Copy the oldest slice from its staging buffer, after its bytes."""
        oldest = self._in_flight[0]
        _await(oldest, oldest.moving.follow)
        self._in_flight.popleft()
        self._copied.append(oldest)
        device = oldest.buffer.device
        if device.type != "cpu":
            oldest.buffer.record_stream(torch.accelerator.current_stream(device.index))
        packed = unpacked(oldest.buffer, [(each.dtype, each.shape) for each in oldest.into])
        copy_pairs([*zip(oldest.into, packed, strict=True)])
        for call in oldest.then:
            call()

    def _settle(self) -> None:
        """Wait until the oldest slice that was copied has landed, and no library touches it."""
        oldest = self._copied[0]
        _await(oldest, oldest.moving.wait)
        _await(oldest, oldest.moving.free.wait)
        self._copied.popleft()
        oldest.receiver.ended += 1


def _await(slice: _Slice, ended: Callable[[float], bool]) -> None:
    """Wait for the bytes of a slice, as long as the pull may and the weights stay."""
    last = monotonic()
    while not ended(_LOOK):
        slice.owner.check()
        if monotonic() - last > _ASK:
            slice.owner.confirm()
            last = monotonic()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if two parts of staging buffers begin at one address."""
    return one.data_ptr() == other.data_ptr()


def slices(wanted: Sequence[Wanted], most: int) -> Iterator[tuple[list[Wanted], int]]:
    """Yield boxes in slices, each with its packed bytes, which are at most ``most``; split larger
    boxes."""
    some = list[Wanted]()
    nbytes = 0
    encoded = 0
    for cell, tensor in wanted:
        itemsize = tensor.itemsize
        for part in split(cell, most // itemsize):
            extents = part.box.extents
            size = packed_bytes((prod(extents) * itemsize,))
            message = box_bytes(len(extents))
            full = nbytes + size > most or encoded + message > MOST_BOX_BYTES
            if some and (full or len(some) == MOST_BOXES):
                yield some, nbytes
                some = []
                nbytes = 0
                encoded = 0
            some.append(Wanted(part, tensor))
            nbytes += size
            encoded += message
    if some:
        yield some, nbytes
