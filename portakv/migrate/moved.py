# SPDX-License-Identifier: Apache-2.0
"""What a reader's workers do with owners that bring rows for it: take slices through slots, and
compare digests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic, sleep

import torch

from portakv.copy.rows import copy_rows
from portakv.errors import PeerError, TransferCancelled, TransferError, TransferTimeout
from portakv.graph.graph import Graph, Node
from portakv.migrate.channel import Channel
from portakv.migrate.chunks import chunk, chunk_bytes
from portakv.migrate.digest import digest
from portakv.migrate.messages import Answer, Gather
from portakv.migrate.pairing import gone
from portakv.migrate.steps import Step
from portakv.runtime.streams import Behind

PATIENCE = 30.0  # seconds for which an owner that is busy is asked again
CANCELLED = "A pull was cancelled; nothing of it is published."
Stopped = Callable[[], bool]


def _take(
    channel: Channel,
    step: Step,
    part: tuple[range, int, int],
    behind: Behind,
    stopped: Stopped,
    *_: object,
) -> None:
    """Have an owner bring layers and tokens of a step into a slot, take it, and scatter it."""
    (layers, at, count), owner = part, step.owner
    number, room = owner.slots.get()
    try:
        dst = step.dst.slice(layers=slice(layers.start, layers.stop))
        with owner.turn:
            owner.tag += 1
            terms = {"mover": owner.mover.name, "slot": number, "tag": owner.tag}
            ask(channel, step, step.gather(layers, at, count, **terms), stopped)
            slot = room[: chunk_bytes(dst, count)]
            moving = owner.mover.take(owner.address, slot, owner.tag)
        while not moving.done():
            if stopped():
                raise TransferCancelled(CANCELLED)
            with suppress(TransferTimeout):
                moving.wait(0.05)
        moving.wait()
        src, mine = chunk(dst, count, room)[1], step.mine.shifted(at)
        with torch.inference_mode(False), behind.inside():
            copy_rows(src, dst.as_bytes(), None, mine, count=count).synchronize()
    finally:
        owner.slots.put((number, room))


def moving_nodes(
    channel: Channel, graph: Graph, device: torch.device, stopped: Stopped
) -> Callable[[Step], list[tuple[range, Node]]]:
    """For steps that are moved, the nodes that bring them behind what the device's current stream
    holds, and the layers of each."""
    behind = Behind(device)

    def nodes(step: Step) -> list[tuple[range, Node]]:
        found = list[tuple[range, Node]]()
        link = graph.link(f"pull:{step.owner.address}", width=step.owner.welcome.slots)
        for part in step.slices():
            work = partial(_take, channel, step, part, behind, stopped)
            found.append((part[0], Node(work, 1, link=link, name="slice")))
        return found

    return nodes


def verified(channel: Channel, step: Step, stopped: Stopped) -> None:
    """Compare what a step brought with what its owner has, by digests."""
    asked, window = step.whole()
    mine = digest(step.dst, step.mine, step.tokens, window, step.first)
    theirs = ask(channel, step, asked, stopped).digest
    if mine != theirs:
        raise TransferError(
            f"Rows of {step.owner.address} were pulled, and are other bytes than it has (digests "
            f"{mine:x} and {theirs:x}); nothing is published. Pull again, or by another way."
        )


def ask(channel: Channel, step: Step, gather: Gather, stopped: Stopped) -> Answer:
    """An owner's answer to a gather; it is asked again while it is busy."""
    until = monotonic() + PATIENCE
    while not stopped():
        answer = channel.ask(step.owner.address, gather, Answer)
        if answer.state == "done":
            return answer
        if answer.state == "gone":
            raise gone(step.ticket, answer.why)
        if answer.state != "busy" or monotonic() > until:
            raise PeerError(f"{step.owner.address} did not bring rows: {answer.why}")
        sleep(answer.seconds)
    raise TransferCancelled(CANCELLED)
