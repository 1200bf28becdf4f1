# SPDX-License-Identifier: Apache-2.0
"""A reader's lane to an owner that sends weights: the transport, and the staging buffers here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from secrets import token_bytes
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import ref

import torch

from portakv.errors import BackendUnavailable, PeerError, PortaKVError
from portakv.migrate.channel import Channel
from portakv.migrate.ipc import where
from portakv.migrate.staging import staging
from portakv.migrate.transports import choose, forced
from portakv.migrate.weight_lanes import (
    BUFFERS,
    Connect,
    Connected,
    Leave,
    SendSlice,
    lane_channel,
)
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import StreamFence

if TYPE_CHECKING:
    from portakv.migrate.published import Weights

_HOST = torch.device("cpu")
_FAREWELL = 0.5  # seconds for the last message of a lane
_LEAST = 4096  # bytes of a staging buffer, which the owner chooses
_MOST = 1 << 36


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

    def receiver(self, terms: Terms) -> Receiver:
        """Return the lane by which the owner sends weights."""


class Terms(NamedTuple):
    """What a pull needs a lane for.

    Attributes:
        device: of the reader's tensors.
        transport: the name of the transport that the reader forces.
        why: why the owner's memory is not mapped.
    """

    device: torch.device
    transport: str | None
    why: str


class Receiver:
    """A lane by which one owner sends weights, and the staging buffers that it fills.

    Attributes:
        gone: the lane was released, so another pull needs another.
        tag: of the last slice that the owner has accepted.
        ended: the number of slices that have ended. If it is less than ``tag`` after a pull, the
            end of the pull was interrupted, and bytes may still arrive in the buffers.
        why: why the memory is not mapped, and why this transport was chosen.
    """

    def __init__(self, owner: Sender, terms: Terms) -> None:
        (device, transport, why) = terms
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
        self._leave = partial(owner.channel.tell, owner.address, Leave(self.id), _FAREWELL)
        self.gone = False
        self.tag = 0
        self.ended = 0
        self._lock = threading.Lock()
        # Weak, because the end of a pull may be interrupted.
        self._user: Callable[[], object] = lambda: None
        self.why = f"{described.why or why} ({self.transport.why})"
        try:
            request = Connect(owner.id, self.id, self.transport.name, where(device))
            answer = owner.connect(request)
            self.buffer_bytes = _checked(answer, request, owner.address)
            self.lane = self.transport.lane(owner.address, lane_channel(owner.channel, self.id))
            self.lane.meet(stop=self._stopping(owner))
            self.buffers = _buffers(self.buffer_bytes, device, terms.device)
        except BaseException:  # also an interrupt: no caller has the lane
            self.release()
            raise

    def _stopping(self, owner: Sender) -> Callable[[], bool]:
        """Return a function that returns True if the pull must end."""

        def stop() -> bool:
            try:
                owner.check()
            except PortaKVError:
                return True
            return False

        return stop

    def claim(self, user: object) -> bool:
        """Let a pull use the lane, unless another pull does; return True if it may."""
        return uninterrupted(partial(self._claim, user))

    def _claim(self, user: object) -> bool:
        with self._lock:
            if self._user() is None:
                self._user = ref(user)
            return self._user() is user

    def free(self, user: object) -> None:
        """Let other pulls use the lane, if this one does."""
        if self._user() is user:
            self._user = lambda: None

    @property
    def usable(self) -> bool:
        """Return True if a pull may use the lane, now or after another pull."""
        in_step = self.tag == self.ended or self._user() is not None
        return in_step and not self.gone and self.lane.gone is None

    def release(self) -> None:
        """Release the lane on both sides; its slices in flight end with an error."""
        uninterrupted(self._release)

    def _release(self) -> None:
        if not self.gone:
            self.drop()
            with suppress(PortaKVError):  # the owner may be gone
                self._leave()

    def drop(self) -> None:
        """Release the lane here; quick, for the thread that notices the end of a connection."""
        self.gone = True
        self.transport.close(0.0)


def _checked(answer: Connected, request: Connect, address: str) -> int:
    """Return the bytes of a staging buffer; raise `PeerError` for an answer that differs."""
    if answer.transport != request.transport or not _LEAST <= answer.buffer_bytes <= _MOST:
        raise PeerError(
            f"Expected staging buffers of {_LEAST} to {_MOST} bytes by {request.transport} from "
            f"{address}, got {answer.buffer_bytes} by {answer.transport or 'none'}. Pull from "
            f"another owner."
        )
    return answer.buffer_bytes


def _buffers(nbytes: int, device: torch.device, tensors: torch.device) -> list[torch.Tensor]:
    """Return the staging buffers of a lane on a device, uint8 ``[nbytes]`` each, for any stream.

    ``tensors``: the device of the reader's tensors.
    """
    # In inference mode, buffers would be views without a common base, which transports register.
    with torch.inference_mode(False), StreamFence(device).inside():
        memory = staging(BUFFERS * nbytes, device, rows=tensors)
        if device.type != "cpu":  # the work of earlier users of the memory
            torch.accelerator.current_stream(device.index).synchronize()
        return [*memory.view(BUFFERS, -1)]
