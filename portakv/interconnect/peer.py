# SPDX-License-Identifier: Apache-2.0
"""Rows of another device of the same type: what carries them to the device that reads them.

Its kernel does, at the owner's addresses, once a known pattern was read right that way: with few
thread blocks beside a model, with the whole device if it is idle. What cannot be reached goes
through pinned host memory.
"""

from __future__ import annotations

import torch

from portakv.backends.base import PEERS
from portakv.errors import Unsupported
from portakv.interconnect.bounce import Bounce, carry
from portakv.interconnect.choose import across
from portakv.interconnect.strategy import Strategy, Terms
from portakv.interconnect.zero_copy import ZeroCopy, unreached
from portakv.plan.plan import Move
from portakv.registry.registry import REGISTRY, Choice, choose
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

# of the pattern, int16: a megabyte
_BLOCKS = 64
_BLOCK = 64
_ELEMENTS = 128
_WAY = "read where it is by"  # with a choice and terms: the way, kept in a peer's view
#: Why memory of one device is not to be read by another, by both; see `unmapped`.
answers: Bounded[tuple[torch.device, torch.device], str] = Bounded("answers about two devices", 256)
_ways: Bounded[tuple[Choice, Terms, str], Choice] = Bounded("ways between two devices", 256)


def unmapped(owner: torch.device, reader: torch.device) -> str:
    """Why kernels of ``reader`` are not to read memory of ``owner``, as a phrase; empty if they
    may, since they read a known pattern right. Asked once for each pair in a process, or again if
    a device was full."""
    try:
        return answers.get_or_make((owner, reader), lambda: _asked(owner, reader))
    except torch.OutOfMemoryError as error:
        return f"a pattern of {owner} could not be tried on {reader}: {error}"


def _asked(owner: torch.device, reader: torch.device) -> str:
    reaches = getattr(torch.get_device_module(reader), "can_device_access_peer", None)
    if reaches is None:
        return f"torch does not tell whether {reader} reaches memory of {owner}"
    try:
        if not reaches(reader, owner):
            return f"the driver says that {reader} does not reach memory of {owner}"
        wrong = _wrong_elements(owner, reader)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a pair that cannot be tried goes through the host
        return f"reading a pattern of {owner} on {reader} raised {type(error).__name__}: {error}"
    return f"{reader} read {wrong} elements of a pattern on {owner} wrong" if wrong else ""


def _wrong_elements(owner: torch.device, reader: torch.device) -> int:
    """How much of a pattern of the owner the reader's kernel reads wrong."""
    with torch.inference_mode(False):
        numbers = torch.arange(_BLOCKS * _BLOCK * _ELEMENTS, dtype=torch.int64, device="cpu")
        known = (numbers * 2654435761 % 65521).to(torch.int16).view(_BLOCKS, _BLOCK, _ELEMENTS)
        there = known.to(owner)
        landed = torch.full(known.shape, -1, dtype=torch.int16, device=reader)
        there.clone().copy_(landed)  # torch opens the way with the first copy, in each direction
        landed.copy_(there).fill_(-1)
    for device in (owner, reader):
        torch.accelerator.synchronize(device)
    ids = Index(list(range(_BLOCKS))[::-1], step=_BLOCK)
    src, dst = (KVView(each, "block token dim") for each in (there, landed))
    move = Move(src.as_peer(reader), dst, ids, Index(), _BLOCKS * _BLOCK)
    carry(move, choose(reader), torch.accelerator.current_stream(reader.index))
    torch.accelerator.synchronize(reader)
    return int((landed.cpu() != known.flip(0)).sum())


def reached(src: KVView, choice: Choice, terms: Terms) -> Choice:
    """What carries a peer's rows to the device of the chosen backend, on a caller's terms.

    Raises:
        Unsupported: a strategy that the caller named does not; terms that nothing here would keep.
    """
    key = _WAY, choice, terms.without_rate
    known: Choice | None = src.derived.get(key)
    if known is not None:
        return known
    device = choice.backend.device
    why = _unread(src, choice)
    if isinstance(choice.backend, Strategy):  # the caller named it
        if why:
            raise Unsupported(f"A copy from {src.home} to {device} by {choice.name!r}", why)
        return across(choice, terms)
    way = _ways.get_or_make((*key[1:], why), lambda: _way(*key[1:], why))
    if not why:  # else it may be reached later
        src.derived[key] = way
    return way


def _unread(src: KVView, choice: Choice) -> str:
    """Why the chosen backend, or `zero_copy` in its place, is not to read a peer's rows, as a
    phrase; empty if it may."""
    reader = choice.backend.device
    owner = src.home
    if choice.forced and PEERS.isdisjoint(choice.can.places):
        return f"backend {choice.name!r} was named, which reads no peer's rows"
    if owner == reader:  # of another process, who opened it had it mapped
        return ""
    why = unmapped(owner, reader)
    return why or (unreached(src, reader) if ZeroCopy.probe(reader).accepted else "")


def _way(choice: Choice, terms: Terms, why: str) -> Choice:
    device = choice.backend.device
    limit = terms.max_thread_blocks
    if why:
        bounce = Bounce(device, choice, terms, why)
        return Choice(bounce, choice.trace, False, bounce.capabilities())
    if not choice.forced and (limit is not None or terms.overlap == "compute"):
        found, said = REGISTRY.ask(ZeroCopy.name, device, check=True)
        if found is not None:
            zero_copy = ZeroCopy(device, None, terms)
            trace = (*choice.trace, said)
            return Choice(zero_copy, trace, limit is not None, zero_copy.capabilities())
    if limit is not None:
        raise Unsupported(
            f"A copy from a peer to {device} by {choice.name!r} with max_thread_blocks={limit}",
            "the limit is kept by 'zero_copy' alone; leave it out, or name no backend",
        )
    return choice
