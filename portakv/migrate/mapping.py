# SPDX-License-Identifier: Apache-2.0
"""Map the memory of an owner on this host: its rows, its events, its words and its names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from traceback import clear_frames
from typing import NamedTuple
from weakref import finalize

import torch

from portakv.errors import PeerError, PortaKVError
from portakv.migrate import ipc
from portakv.migrate.described import rebuild, reserve
from portakv.migrate.exports import exports_here
from portakv.migrate.messages import Handshake
from portakv.migrate.name_table import NamesOfOwner as NamesOfOwner
from portakv.migrate.name_table import open_names
from portakv.migrate.shards import Shard
from portakv.migrate.words import Place as Place
from portakv.migrate.words import WordsOfOwner as WordsOfOwner
from portakv.migrate.words import open_words
from portakv.runtime.devices import inside
from portakv.runtime.late_release import release
from portakv.runtime.streams import own_stream


class NotMapped(Exception):
    """The memory of an owner cannot be mapped; the text says why, as a clause."""


class Mapped(NamedTuple):
    """The memory of an owner.

    ``regions``: the same memory as bytes, whose last reference unmaps it.
    """

    shards: list[Shard]
    events: list[torch.Event]
    words: WordsOfOwner | None  # None if only the owner can say whether an offer holds
    names: NamesOfOwner | None  # None if only the owner can say which offer has a name
    regions: list[torch.Tensor]

    def live_with(self, owner: object) -> None:
        """Retain the memory as long as an object lives, and until no step may wait for this
        process."""
        finalize(owner, release, self.regions.clear).atexit = False


def map_owner(address: str, handshake: Handshake, device: torch.device) -> Mapped:
    """Map an owner's memory for a device of this process.

    Raises `NotMapped` if that fails, and `PeerError` if no views fit the regions that the owner
    describes.
    """
    _check(address, handshake)  # checks the description before any memory is mapped
    regions: list[torch.Tensor] = []
    try:
        return _mapped(handshake, device, regions)
    except BaseException as error:
        clear_frames(error.__traceback__)  # which refer to the memory
        release(regions.clear)
        raise


def _mapped(handshake: Handshake, device: torch.device, regions: list[torch.Tensor]) -> Mapped:
    """Map an owner's memory, and add each region as soon as it is mapped."""
    if missing := [region.why for region in handshake.regions if not region.handle]:
        raise NotMapped(f"the owner does not share it: {missing[0]}")
    try:
        here = exports_here(handshake.epoch, device)
        with _apart(device):
            if here is not None:
                regions += here.flat()
            for x in handshake.regions[len(regions) :]:
                place = "cpu" if x.device.startswith("cpu ") else device
                regions.append(ipc.open_shared(x.handle, place))
            *flat, proof = regions
            read = (proof ^ 0).cpu()  # a kernel reads it, as kernels read rows
        if not torch.equal(read, ipc.proof_of(handshake.epoch)):
            raise NotMapped("the mapped memory does not show the bytes of its owner")
        shards = [rebuild(one, flat) for one in handshake.described]
        remote = handshake.regions[0].device
        if remote != ipc.where(device) and not remote.startswith("cpu "):
            # torch reports another device's memory as this device's: mark the views.
            shards = [Shard(x.view.as_peer(device), x.group.layers, x.group.heads) for x in shards]
        if here is not None:
            events = [*here.events]
        else:
            events = [ipc.open_event(one, device) for one in handshake.events]
    except ipc.NoDescriptor:  # another method would take descriptors, too
        raise
    except PortaKVError as error:
        raise NotMapped(str(error)) from error
    words = open_words(handshake.words)
    names = open_names(handshake.names, handshake.key)
    return Mapped(shards, events, words, names, regions)


def _apart(device: torch.device) -> AbstractContextManager[object]:
    """Make a private stream current: this thread's may wait for the rows of a pull that waits for
    this connection."""
    return nullcontext() if device.type == "cpu" else inside(own_stream(device))


def _check(address: str, handshake: Handshake) -> None:
    """Raise `PeerError` if no views fit the regions that an owner describes."""
    try:
        regions = [reserve(region.nbytes) for region in handshake.regions]
    except (OSError, OverflowError, ValueError) as error:
        raise PeerError(
            f"Expected regions of memory that this process has addresses for from {address}, got "
            f"others ({error}). Pull from another owner."
        ) from None
    for described in handshake.described:
        rebuild(described, regions)
