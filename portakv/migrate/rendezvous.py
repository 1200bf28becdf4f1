# SPDX-License-Identifier: Apache-2.0
"""Start torch.distributed groups over a channel, for transports and for callers with collectives.

The groups need no TCPStore and no further port. They open separate sockets for data.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic, sleep
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from msgspec import Meta
from torch._C._distributed_c10d import HashStore, PrefixStore, ProcessGroup, Store

from portakv import arguments
from portakv.arguments import instance, text, whole
from portakv.errors import PeerError, TransferTimeout, Unsupported
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Message, prepare
from portakv.runtime.interrupts import shielded, uninterrupted
from portakv.tasks import runtime

KEYS = 1 << 14  # the most keys of one rendezvous
Key = Annotated[str, Meta(max_length=1024)]
Value = Annotated[bytes, Meta(max_length=16 << 10)]


class Keep(Message, frozen=True):
    """Request an operation on keys: see the methods of `torch.distributed.Store`."""

    do: Literal["set", "add", "get", "delete_key"]
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=256)]
    value: Value = b""
    amount: int = 0


class Meet(Keep, frozen=True):
    """Request an operation on keys of a transport's group, apart from the keys of a rendezvous."""


class Kept(Message, frozen=True):
    """Answer with the values of all keys, with no value if one key has none, or with a number."""

    values: tuple[Value, ...] = ()
    number: int = 0


class ChannelStore(Store):
    """Keys and values of torch.distributed, stored here or by the channel at ``address``.

    Requests to that channel are messages of ``kind``. torch uses the store for as long as the group
    exists: keep a reference, as `pair` does.

    Attributes:
        over: set to True after the other side is gone; calls that wait for keys then end.
    """

    timeout: timedelta  # the attribute of torch's stores, which torch sets

    def __init__(self, channel: Channel, address: str | None, kind: type[Keep] = Keep) -> None:
        super().__init__()
        self._channel = channel
        self._address = address
        self._kind = kind
        self._stored = HashStore()
        self.over = False

    @shielded
    def do(self, request: Keep) -> Kept:
        """Execute a request on the keys that are stored here, and return the answer."""
        stored = self._stored
        keys = [*request.keys]
        with runtime().lock:
            changes = request.do in ("set", "add")
            if changes and stored.num_keys() >= KEYS and not stored.check(keys[:1]):
                raise PeerError(
                    f"Expected at most {KEYS} keys in a rendezvous, got another. Make a second "
                    f"rendezvous."
                )
            if request.do == "set":
                value: Any = request.value  # the stub knows no bytes
                stored.set(keys[0], value)
            elif request.do == "add":
                return Kept(number=stored.add(keys[0], request.amount))
            elif request.do == "delete_key":
                return Kept(number=int(stored.delete_key(keys[0])))
            return Kept(tuple(map(stored.get, keys)) if stored.check(keys) else ())

    def _ask(self, do: Any, *keys: str, **more: Any) -> Kept:
        request = self._kind(do, keys, **more)
        if self._address is None:
            return self.do(request)
        return self._channel.ask(self._address, request, Kept)

    def _await(self, keys: Sequence[str], seconds: float) -> tuple[bytes, ...]:
        until = monotonic() + seconds
        pause = 0.001
        while not (values := self._ask("get", *keys).values):
            if monotonic() > until or self.over:
                raise TransferTimeout(
                    f"No rank set {', '.join(keys)[:200]} in {seconds:g} s. Start all ranks."
                )
            sleep(pause)
            pause = min(0.02, 2 * pause)
        return values

    def set(self, key: str, value: str | bytes | bytearray) -> None:
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
        """Return the number of keys that are stored here."""
        return self._stored.num_keys()


def rendezvous(channel: Channel, address: str | None = None) -> ChannelStore:
    """Return a `torch.distributed.Store` over a channel.

    Without ``address`` this channel stores the keys and serves them to others; a channel serves one
    rendezvous. With ``address`` the channel there, which has a rendezvous already, stores them.
    """
    instance("channel", channel, Channel)
    if address is not None:
        text("address", address)
    store = ChannelStore(channel, address)
    if address is not None:
        return store

    def keep() -> ChannelStore:
        channel.claim("a rendezvous", store)
        channel.serve(Keep, lambda _, request: store.do(request))
        return store

    def undo(_: ChannelStore) -> None:
        channel.free("a rendezvous", store)

    return uninterrupted(keep, undo)


def pair(
    store: Store,
    rank: int,
    size: int,
    device: torch.device | str,
    timeout: float = 30.0,
    name: str = "",
) -> ProcessGroup:
    """Return a process group apart from the default group: gloo, nccl or a vendor's for the device.

    A ``name`` serves once, for one of the groups of a store. Aborting the group ends no other
    group.

    Raises:
        Unsupported: torch has no such group for the device.
        PeerError: the other ranks did not join in ``timeout`` seconds.
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
            options: Any = torchs["_DistributedBackendOptions"]()
            options.store = named
            options.group_rank = rank
            options.group_size = size
            options.timeout = seconds
            options.group_id = name
            made: Any = plugin.creator_fn(options, None)
        elif plugin is not None:
            made = plugin.creator_fn(named, rank, size, seconds)
        elif backend == "gloo":
            made = torchs["ProcessGroupGloo"](named, rank, size, seconds)
        else:
            options = torchs["ProcessGroupNCCL"].Options()
            options._timeout = seconds
            made = torchs["ProcessGroupNCCL"](named, rank, size, options)
    except RuntimeError as error:  # also the errors that the store raised
        why = str(error).partition("\n")[0].rstrip(".")
        raise PeerError(
            f"Expected {size} ranks to join the group, got too few at rank {rank}: {why}. Pair by "
            f"another name."
        ) from None
    weakref.finalize(made, bool, (store, named))  # retained as long as the group
    return cast(ProcessGroup, made)


def unique_id() -> bytes:
    """Return NCCL's unique id for a caller's communicator. Raises `Unsupported` without NCCL."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise Unsupported("A unique id", "this torch has no NCCL, or no device for it")
    return bytes(torch.cuda.nccl.unique_id())


prepare(globals())
