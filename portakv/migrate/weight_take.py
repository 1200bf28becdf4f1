# SPDX-License-Identifier: Apache-2.0
"""The reader's side of pulls of weights through staging buffers.

A `Receiver` is a lane to one owner. `Incoming` has the slices of one pull, from all of its owners.
While one slice crosses, the owner packs the next, and the reader copies from the one before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from secrets import token_bytes
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from portakv.errors import BackendUnavailable, PeerError, PortaKVError
from portakv.migrate.channel import Channel
from portakv.migrate.ipc import where
from portakv.migrate.parameters import Cell, part_of
from portakv.migrate.staging import staging
from portakv.migrate.transports import choose, forced
from portakv.migrate.transports.base import Moving
from portakv.migrate.weight_lanes import (
    BUFFERS,
    MOST_BOX_BYTES,
    MOST_BOXES,
    Connect,
    Connected,
    Leave,
    SendSlice,
    box_bytes,
    lane_channel,
    packed_bytes,
    unpacked,
)
from portakv.migrate.weight_pairs import copy_pairs
from portakv.migrate.weight_plan import split

if TYPE_CHECKING:
    from portakv.migrate.published import Weights

_HOST = torch.device("cpu")
_LOOK = 0.05  # seconds between two looks at a cancellation
_ASK = 1.0  # seconds without bytes after which a pull requests the version
STOPPING = 0.5  # seconds for the slices in flight of a pull that has failed
_FAREWELL = 0.5  # seconds for the last message of a lane
_MOST_BYTES = 1 << 36  # of a staging buffer, which the owner chooses


class Sender(Protocol):
    """The owner of weights, for one pull."""

    channel: Channel
    address: str
    id: bytes

    def check(self) -> None:
        """Raise the error of a pull that was cancelled or whose time is over."""

    def connect(self, request: Connect) -> Connected:
        """Return the owner's answer."""

    def request_slice(self, request: SendSlice) -> Weights:
        """Return the owner's answer, which may be busy. After an error the owner may send it."""

    def pause(self, seconds: float) -> None:
        """Wait before the next request to a busy owner."""

    def judge(self, answer: Weights) -> None:
        """Raise the error of an answer that says that the weights have changed."""

    def confirm(self) -> None:
        """Ask the owner if the weights have changed, and raise the error."""

    def number(self, name: str) -> int:
        """Return the number of an item."""


class Wanted(NamedTuple):
    """A box that is requested from an owner, and the reader's tensor that contains it."""

    cell: Cell
    tensor: torch.Tensor


class Receiver:
    """A lane by which one owner sends weights, and the staging buffers that it fills.

    Attributes:
        turn: held by the pull that uses the lane.
        gone: the lane was released, so another pull needs another.
        why: why the memory is not mapped, and why this transport was chosen.
    """

    def __init__(self, owner: Sender, device: torch.device, transport: str | None, why: str):
        described = owner.connect(Connect(owner.id, bytes(16)))
        # Another device of the same type: NCCL does not serve two processes on one.
        same = described.device.partition(" ")[0] == device.type
        if not same or described.device == where(device):
            device = _HOST
        name = forced(transport) or described.transport or None
        try:
            self.transport = choose(device, name)
        except BackendUnavailable:
            device = _HOST
            self.transport = choose(device, name)
        self.id = token_bytes(16)
        self.address = owner.address
        self.channel = owner.channel
        self.turn = threading.Lock()
        self.gone = False
        self.tag = 0  # of the last slice that was requested
        self.why = f"{described.why or why} ({self.transport.why})"
        try:
            request = Connect(owner.id, self.id, self.transport.name, where(device))
            self.buffer_bytes = self._agreed(owner.connect(request), request)
            self.lane = self.transport.lane(self.address, lane_channel(self.channel, self.id))
            self.lane.meet(stop=self._stopping(owner))
            with torch.inference_mode(False):  # else the buffers are views of no common memory
                memory = staging(BUFFERS * self.buffer_bytes, device)
                self.buffers: list[torch.Tensor] = [*memory.view(BUFFERS, -1)]
        except BaseException:  # also an interrupt: no caller has the lane
            self.release()
            raise

    def _agreed(self, answer: Connected, request: Connect) -> int:
        """Return the bytes of a staging buffer; raise `PeerError` for an answer that differs."""
        least = 4096
        if answer.transport != request.transport or not (
            least <= answer.buffer_bytes <= _MOST_BYTES
        ):
            raise PeerError(
                f"Expected staging buffers of {least} to {_MOST_BYTES} bytes by "
                f"{request.transport} from {self.address}, got {answer.buffer_bytes} by "
                f"{answer.transport or 'none'}. Pull from another owner."
            )
        return answer.buffer_bytes

    def _stopping(self, owner: Sender) -> Callable[[], bool]:
        """Return a function that returns True if the pull must end."""

        def stop() -> bool:
            try:
                owner.check()
            except PortaKVError:
                return True
            return False

        return stop

    def release(self) -> None:
        """Release the lane on both sides; its slices in flight end with an error."""
        if not self.gone:
            self.drop()
            with suppress(PortaKVError):  # the owner may be gone
                self.channel.tell(self.address, Leave(self.id), _FAREWELL)

    def drop(self) -> None:
        """Release the lane here; quick, for the thread that notices the end of a connection."""
        self.gone = True
        self.transport.close(0.0)


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

    Use it as a context manager: it has the turn of each lane until then.
    """

    def __init__(self, receivers: Mapping[int, Receiver], owners: Sequence[Sender]) -> None:
        self._receivers = receivers
        self._owners = owners
        self._turns = list[Receiver]()
        self._in_flight = deque[_Slice]()
        self._copied = deque[_Slice]()  # copied on a stream that follows the bytes

    def __enter__(self) -> Incoming:
        """Take the turn of each lane. All pulls do so in one order, so none waits for another."""
        order = sorted(self._receivers.items(), key=lambda each: each[1].id)
        try:
            for number, receiver in order:
                while not receiver.turn.acquire(timeout=_LOOK):
                    self._owners[number].check()
                self._turns.append(receiver)
                if receiver.gone:  # the pull before had an error
                    raise PeerError(
                        f"Expected a lane to {receiver.address}, got one that another pull has "
                        f"closed after an error. Pull again."
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def request(self, number: int, wanted: Sequence[Wanted]) -> None:
        """Request boxes of an owner, in as many slices as they need."""
        owner = self._owners[number]
        receiver = self._receivers[number]
        for some in slices(wanted, receiver.buffer_bytes):
            sizes = [prod(x.cell.box.extents) * x.tensor.itemsize for x in some]
            nbytes = packed_bytes(sizes)
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
        """Give back all lanes; release those whose slices do not arrive any more."""
        until = monotonic() + STOPPING
        for each in [*self._copied, *self._in_flight]:
            if not each.moving.free.wait(max(0.0, until - monotonic())) or each.moving.error:
                each.receiver.release()
        self._copied.clear()
        self._in_flight.clear()
        for receiver in self._turns:
            receiver.turn.release()
        self._turns.clear()

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


def slices(wanted: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    """Yield boxes in slices of at most ``most`` packed bytes; larger boxes are split."""
    some = list[Wanted]()
    nbytes = 0
    encoded = 0
    for cell, tensor in wanted:
        for part in split(cell, most // tensor.itemsize):
            size = packed_bytes([prod(part.box.extents) * tensor.itemsize])
            message = box_bytes(len(part.src))
            full = nbytes + size > most or encoded + message > MOST_BOX_BYTES
            if some and (full or len(some) == MOST_BOXES):
                yield some
                some = []
                nbytes = 0
                encoded = 0
            some.append(Wanted(part, tensor))
            nbytes += size
            encoded += message
    if some:
        yield some
