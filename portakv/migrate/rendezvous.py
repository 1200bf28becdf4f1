# SPDX-License-Identifier: Apache-2.0
"""Start torch.distributed groups over a channel, for transports and for callers with collectives.

There is no TCPStore and no further port. The groups open separate sockets for data."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from time import monotonic, sleep
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from msgspec import Meta
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store

from portakv import arguments
from portakv.arguments import instance, text, whole
from portakv.errors import PeerError, TransferTimeout, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Message
from portakv.runtime.interrupts import uninterrupted

KEYS = 1 << 14  # that one rendezvous keeps
Key = Annotated[str, Meta(max_length=1024)]
Value = Annotated[bytes, Meta(max_length=16 << 10)]


class Keep(Message, frozen=True):
    """What is done with keys: see the methods of `torch.distributed.Store`."""

    do: Literal["set", "add", "get", "delete_key"]
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=256)]
    value: Value = b""
    amount: int = 0


class Meet(Keep, frozen=True):
    """The same, with keys of a transport's group, which no rendezvous of the channel mixes up."""


class Kept(Message, frozen=True):
    """The answer: the values of all keys, none if one of them has none; or a number."""

    values: tuple[Value, ...] = ()
    number: int = 0


class ChannelStore(Store):
    """Keys and values of torch.distributed, kept here or, with ``address``, by the channel there,
    which is asked by messages of ``kind``. torch needs it for as long as it works with it: hold it,
    as `pair` does.

    Attributes:
        over: set to True once the other side is gone: nobody waits here any more.
    """

    timeout: timedelta  # of torch's own, which its other stores set too

    def __init__(self, channel: Channel, address: str | None, kind: type[Keep] = Keep) -> None:
        super().__init__()
        self._channel = channel
        self._address = address
        self._kind = kind
        self._kept = dict[str, bytes]()
        self._lock = threading.Lock()
        self.over = False

    def do(self, asked: Keep) -> Kept:
        """What another side asks of keys that are kept here."""
        return uninterrupted(partial(self._do, asked))

    def _do(self, asked: Keep) -> Kept:
        """Do what `do` promises."""
        kept = self._kept
        key = asked.keys[0]
        with self._lock:
            if asked.do in ("set", "add") and len(kept) >= KEYS and key not in kept:
                raise PeerError(f"A rendezvous keeps {KEYS} keys; make another.")
            if asked.do == "set":
                kept[key] = asked.value
            elif asked.do == "add":
                kept[key] = b"%d" % (int(kept.get(key, b"0")) + asked.amount)
                return Kept(number=int(kept[key]))
            elif asked.do == "delete_key":
                return Kept(number=int(kept.pop(key, None) is not None))
            found = tuple(kept[each] for each in asked.keys if each in kept)
            return Kept(found * (len(found) == len(asked.keys)))

    def _ask(self, do: Any, *keys: str, **more: Any) -> Kept:
        asked = self._kind(do, keys, **more)
        if self._address is None:
            return self.do(asked)
        return self._channel.ask(self._address, asked, Kept)

    def _await(self, keys: Sequence[str], seconds: float) -> tuple[bytes, ...]:
        until = monotonic() + seconds
        pause = 0.001
        while not (found := self._ask("get", *keys).values):
            if monotonic() > until or self.over:
                raise TransferTimeout(f"Nobody has set {', '.join(keys)[:200]} in {seconds:g} s.")
            sleep(pause)
            pause = min(0.02, 2 * pause)
        return found

    def set(self, key: str, value: Any) -> None:
        self._ask("set", key, value=value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._await([key], self.timeout.total_seconds())[0]

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, amount=value).number

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._await(keys, (self.timeout if timeout is None else timeout).total_seconds())

    def check(self, keys: list[str]) -> bool:
        return self._ask("get", *keys).values != ()

    def delete_key(self, key: str) -> bool:
        return self._ask("delete_key", key).number == 1

    def num_keys(self) -> int:
        """Of those that are kept here."""
        return len(self._kept)


def rendezvous(channel: Channel, address: str | None = None) -> ChannelStore:
    """A `torch.distributed.Store` over a channel: kept here and served to others, one for each
    channel, or kept by the channel at ``address``, which is there already."""
    instance("channel", channel, Channel)
    if address is not None:
        text("address", address)
    store = ChannelStore(channel, address)
    if address is not None:
        return store

    def keep() -> ChannelStore:
        channel.claim("a rendezvous", store)
        channel.serve(Keep, lambda _, asked: store.do(asked))
        return store

    def undo(kept: ChannelStore) -> None:
        channel.free("a rendezvous", kept)

    return uninterrupted(keep, undo)


def pair(
    store: Store, rank: int, size: int, device: Any, timeout: float = 30.0, name: str = ""
) -> ProcessGroup:
    """A process group apart from the default one, of gloo, nccl or what a vendor registered for the
    device. A ``name`` serves once, for one of the groups of a store; an abort of it ends no other.

    Raises:
        Unsupported: torch has no such group for the device.
        PeerError: the others did not come in ``timeout`` seconds.
    """
    instance("store", store, Store, "Make one by rendezvous(channel).")
    whole("size", size, 1, 1 << 20)
    whole("rank", rank, 0, size - 1)
    text("name", name, least=0)
    seconds = timedelta(seconds=arguments.seconds("timeout", timeout, above=True))
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError, ValueError):
        raise arguments.invalid("device", "a device of torch", device) from None
    named = PrefixStore(f"{name}/", store)
    torchs = dist.distributed_c10d.__dict__
    backend = dist.Backend.default_device_backend_map.get(kind, "none")
    plugin: Any = getattr(dist.Backend, "_plugins", {}).get(backend.upper())
    here = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}.get(backend, bool)
    if plugin is None and not here():
        raise Unsupported(f"A process group for {kind}", "torch has none here")
    try:
        if plugin is not None and plugin.extended_api:
            given: Any = torchs["_DistributedBackendOptions"]()
            given.store = named
            given.group_rank = rank
            given.group_size = size
            given.timeout = seconds
            given.group_id = name
            made: Any = plugin.creator_fn(given, None)
        elif plugin is not None:
            made = plugin.creator_fn(named, rank, size, seconds)
        elif backend == "gloo":
            made = torchs["ProcessGroupGloo"](named, rank, size, seconds)
        else:
            options = torchs["ProcessGroupNCCL"].Options()
            options._timeout = seconds
            made = torchs["ProcessGroupNCCL"](named, rank, size, options)
    except RuntimeError as error:  # also what the store raised
        why = str(error).partition("\n")[0].rstrip(".")
        raise PeerError(
            f"{size} ranks were to meet, here is {rank}, and did not: {why}. Pair by another name."
        ) from None
    weakref.finalize(made, bool, (store, named))  # which are held as long as the group
    return cast(ProcessGroup, made)


def unique_id() -> bytes:
    """NCCL's unique id, for who brings a communicator; raises `Unsupported` without NCCL."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise Unsupported("A unique id", "this torch has no NCCL, or no device for it")
    return bytes(torch.cuda.nccl.unique_id())
