# SPDX-License-Identifier: Apache-2.0
"""`bounce`: rows of another device cross through pinned memory.

Strategies of the owner's device bring the rows down; strategies of the reader's device bring them
up.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import torch

from portakv.backends.base import PEERS, Decision, Launch
from portakv.interconnect.choose import across
from portakv.interconnect.staging import mark
from portakv.interconnect.strategy import Strategy, StrategyLaunch, Terms, finish
from portakv.plan.plan import CopyPlan, Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import Choice, choose
from portakv.runtime.streams import own_stream
from portakv.view import Index, KVView
from portakv.view.form import Form

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
