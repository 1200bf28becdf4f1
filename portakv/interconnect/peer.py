# SPDX-License-Identifier: Apache-2.0
"""Rows of another device: of the same type, or through pinned memory.

A kernel of the reader reads them at the owner's addresses, if it read a known pattern right. It
takes few thread blocks while a model runs, and the whole device if the device is idle. Rows that no
kernel reaches go through pinned host memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import lcm

import torch

from portakv.backends.base import PEERS, Backend, Launch
from portakv.errors import Unsupported
from portakv.interconnect.choose import across, strategies
from portakv.interconnect.costs import measured
from portakv.interconnect.staging import mark
from portakv.interconnect.strategy import Strategy, StrategyLaunch, Terms, finish
from portakv.interconnect.zero_copy import ZeroCopy, unreached
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import REGISTRY, Choice, choose
from portakv.runtime.streams import own_stream
from portakv.selection import Decision, Kind, select
from portakv.view import Index, KVView
from portakv.view.form import Form

# The pattern: int16, one megabyte.
_BLOCKS = 64
_BLOCK = 64
_ELEMENTS = 128
_STRATEGY = "read where it is by"  # with a choice and terms, the key of a view's cached strategy
KIND = Kind("strategy", error=partial(Unsupported, "A copy from another device"))


def unmapped(owner: torch.device, reader: torch.device) -> str:
    """Return why kernels of ``reader`` may not read memory of ``owner``, as a phrase. Empty: they
    may, since they read a known pattern right.

    The pattern is read once for each pair in a process, and again if a device was full or after
    a calibration.
    """
    try:
        return measured(reader, owner, lambda: _test(owner, reader))
    except torch.OutOfMemoryError as error:
        return f"a pattern of {owner} could not be tested on {reader}: {error}"


def _test(owner: torch.device, reader: torch.device) -> str:
    """Return why reading the pattern fails, as a phrase; empty if it works."""
    reaches = getattr(torch.get_device_module(reader), "can_device_access_peer", None)
    if reaches is None:
        return f"torch does not report whether {reader} reaches memory of {owner}"
    try:
        if not reaches(reader, owner):
            return f"the driver says that {reader} does not reach memory of {owner}"
        wrong = _wrong_elements(owner, reader)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a pair whose test fails goes through the host
        return f"reading a pattern of {owner} on {reader} raised {type(error).__name__}: {error}"
    return f"{reader} read {wrong} elements of a pattern on {owner} wrong" if wrong else ""


def _wrong_elements(owner: torch.device, reader: torch.device) -> int:
    """Return how many elements of a pattern of the owner the reader's kernel reads wrong."""
    with torch.inference_mode(False):
        numbers = torch.arange(_BLOCKS * _BLOCK * _ELEMENTS, dtype=torch.int64, device="cpu")
        known = (numbers * 2654435761 % 65521).to(torch.int16).view(_BLOCKS, _BLOCK, _ELEMENTS)
        there = known.to(owner)
        landed = torch.full(known.shape, -1, dtype=torch.int16, device=reader)
        there.clone().copy_(landed)  # torch enables access with the first copy in each direction
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
    """Return what executes a copy of a peer's rows to the device of the chosen backend.

    Raises:
        Unsupported: a strategy that the caller named does not reach the rows, or nothing here keeps
            the terms.
    """
    key = _STRATEGY, choice, terms.without_rate
    known: Choice | None = src.derived.get(key)
    if known is not None:
        return known
    device = choice.backend.device
    why = _unread(src, choice)
    if isinstance(choice.backend, Strategy):  # the caller named it
        if why:
            raise Unsupported(
                f"A copy from {src.memory_device} to {device} by {choice.name!r}", why
            )
        return across(choice, terms)
    made = strategies.get_or_make((*key[1:], why), lambda: _strategy(*key[1:], why))
    if not why:  # else a later copy may reach it
        src.derived[key] = made
    return made


def _unread(src: KVView, choice: Choice) -> str:
    """Return why the chosen backend, or `zero_copy` in its place, may not read a peer's rows, as a
    phrase. Empty: it may."""
    reader = choice.backend.device
    owner = src.memory_device
    if choice.forced and PEERS.isdisjoint(choice.can.places):
        return f"backend {choice.name!r} was named, and it does not read a peer's rows"
    if owner == reader:  # another process's memory: opening it mapped it
        return ""
    why = unmapped(owner, reader)
    return why or (unreached(src, reader) if ZeroCopy.probe(reader).accepted else "")


def _strategy(choice: Choice, terms: Terms, why: str) -> Choice:
    """Return the first that keeps the terms: `zero_copy` if few thread blocks are wanted, the
    chosen backend, or the way through the host; ``why``: nothing reads the peer's rows."""
    device = choice.backend.device
    limit = terms.max_thread_blocks

    def consider(name: str) -> tuple[Backend | None, Decision]:
        if name == Bounce.name:
            made = Bounce(device, choice, terms, why)
            return made, Decision(name, True, why)
        if name == ZeroCopy.name:
            backend, decision = REGISTRY.ask(name, device, check=True)
            return (None if backend is None else ZeroCopy(device, None, terms)), decision
        if limit is None:
            return choice.backend, choice.trace[-1]
        reason = f"only 'zero_copy' keeps max_thread_blocks={limit}; leave it out"
        return None, Decision(name, False, reason)

    if why:
        names = [Bounce.name]
    elif choice.forced or (limit is None and terms.overlap != "compute"):
        names = [choice.name]
    else:
        names = [ZeroCopy.name, choice.name]
    selected = select(KIND, f"{device} under these terms", names, consider)
    if selected.value is choice.backend:
        return choice
    trace = (*choice.trace, *selected.trace)
    forced = limit is not None and selected.name == ZeroCopy.name
    return Choice(selected.value, trace, forced, selected.value.capabilities())


# ------------------------------------------------------------------------------------------------
# `bounce`: rows of another device cross through pinned memory.
#
# Strategies of the owner's device bring the rows down; strategies of the reader's device bring
# them up.

#: Bytes of a slice. A copy pins two slices: one goes up while the next comes down.
SLICE = 32 << 20


class Bounce(Strategy):
    """A copy through pinned memory. ``why``: the reason why no kernel reads the rows in place, as a
    phrase."""

    name = "bounce"
    places = PEERS

    def __init__(self, device: torch.device, half: Choice, terms: Terms, why: str) -> None:
        super().__init__(device, half, terms)
        self._why = why

    def check(self, plan: CopyPlan) -> Decision:
        """Check as every backend does. The reason adds why no kernel reads the rows in place."""
        decision = super().check(plan)
        if not decision.accepted:
            return decision
        return Decision(self.name, True, f"goes through pinned host memory, since {self._why}")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _BounceLaunch(plan, self)


class _BounceLaunch(StrategyLaunch):
    """A prepared copy, in slices."""

    def __init__(self, plan: CopyPlan, strategy: Bounce) -> None:
        super().__init__(plan, strategy.device)
        # Each half is ordered on streams of this copy, whatever the caller's streams are.
        self._half = strategy.half
        self._terms = replace(strategy.terms, detached=False)
        size = plan.src.block_size if plan.src.opaque else 1
        # Tokens between two positions at which both sides may be cut.
        self._whole = lcm(plan.src_step or 1, plan.dst_step or 1, size)
        slices = SLICE * size // (plan.src.token_bytes * self._whole)
        self._most = max(1, slices) * self._whole

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        src = move.src.as_own()
        dst = move.dst
        count = move.count
        name = self._half.name if self._half.forced else None
        down, up = (across(x, self._terms) for x in (choose(src.device, name), self._half))
        work = stream or torch.accelerator.current_stream(self.device.index)
        away = own_stream(src.device)
        # Lengths are rounded up, so that copies of different lengths share few plans.
        tokens = min(self._most, self._whole << (-(-count // self._whole) - 1).bit_length())
        buffers = [_buffer(src.form, tokens) for _ in range(min(2, -(-count // tokens)))]
        free: list[torch.Event] = []
        away.wait_stream(work)
        # Ids that were made for this copy are ordered on the current stream of their device.
        away.wait_stream(torch.accelerator.current_stream(src.device.index))
        try:
            for first in range(0, count, tokens):
                part = move.part(first, min(tokens, count - first))
                bounce = buffers[len(free) % 2]
                if len(free) > 1:
                    away.wait_event(free[-2])
                carry(part._replace(src=src, dst=bounce, dst_index=Index()), down, away)
                work.wait_event(mark(away))
                carry(part._replace(src=bounce, dst=dst, src_index=Index()), up, work)
                free.append(mark(work))
        finally:
            work.wait_stream(away)


def _buffer(form: Form, tokens: int) -> KVView:
    """Return dense pinned memory for the rows of a form, a tensor for each kv. The strategies
    retain it until their copies end."""
    shapes = [(form.layers, tokens, form.heads * width) for width in form.widths]
    if form.opaque:
        shapes = [(form.layers, tokens // form.block_size, width) for width in form.widths]
    with torch.inference_mode(False):
        tensors = [torch.empty(x, dtype=torch.uint8, device="cpu", pin_memory=True) for x in shapes]
    if form.opaque:
        return KVView(tensors, "kv | layer block page", kv=form.kv, block_size=form.block_size)
    layout = "kv | layer token (head dim)"
    return KVView(tensors, layout, kv=form.kv, heads=form.heads, dim=form.widths)


def carry(move: Move, choice: Choice, stream: torch.Stream) -> None:
    """Copy under ids that need no guard, ordered on a stream. The body goes in the largest
    units."""
    forms = move.src.form, move.dst.form
    whole = prepared(*forms, *move.steps, None, choice)
    for first, tokens, unit in whole.plan.split(move):
        ready = whole
        if unit != whole.plan.unit:
            ready = prepared(*forms, *move.steps, unit, choice)
        finish(ready.launch(*ready.place_both(move).part(first, tokens), stream, None))
