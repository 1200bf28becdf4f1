# SPDX-License-Identifier: Apache-2.0
"""Send the requests of a pull's workers to its owners: for rows, for checksums, and for the choice
of an encoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from time import monotonic, sleep
from typing import Any

from msgspec.structs import replace

from portakv.copy.choose_encoding import EncodingChoice
from portakv.errors import (
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.layout.encodings import Pack
from portakv.migrate.arrival import Arrival, Crossed
from portakv.migrate.checksum import MODULUS, checksum_of
from portakv.migrate.connections import Source
from portakv.migrate.messages import Answer, Choose, Chosen, ForRows, Refused, Sum
from portakv.migrate.plan import Step
from portakv.migrate.pull import CANCELLED, Pull
from portakv.migrate.staging import Slots

PATIENCE = 30.0  # seconds for which a busy owner gets the request again


def ask(
    source: Source,
    request: ForRows,
    pull: Pull,
    patience: float = PATIENCE,
    by: Callable[..., Answer] | None = None,
) -> Answer:
    """Return an owner's answer to a request for rows; ask again while the owner is busy.

    ``by``: `Channel.ask` of the owner's channel, or of the channel of an agreement with it.
    """
    until = monotonic() + patience
    owner = source.owner
    asks = by or owner.channel.ask
    chooses = isinstance(request, Choose)
    kind: Any = Answer | Chosen if chooses else Answer
    while not pull.over:
        answer = _once(partial(asks, owner.address, request, kind), pull)
        if answer.state == "done":
            return answer
        if answer.state == "gone":
            raise source.ticket.gone(answer.why)
        if answer.state != "busy" or monotonic() > until:
            left_out = "chose no encoding" if chooses else "sent no rows"
            raise Refused(f"{owner.address} {left_out}: {answer.why or 'it is busy.'}")
        pause = answer.seconds if answer.seconds > 0 else 1e-3
        sleep(min(pause, 0.05))  # at most this long, because the pull may end meanwhile
    raise TransferCancelled(CANCELLED)


def _once(asks: Callable[..., Answer], pull: Pull) -> Answer:
    """Return an owner's answer; raise `TransferCancelled` if the pull has ended meanwhile."""
    try:
        return asks(stop=lambda: pull.over)
    except TransferTimeout:
        if pull.over:
            raise TransferCancelled(CANCELLED) from None
        raise


def verified(step: Step, pull: Pull, *_: object) -> None:
    """Compare the rows that a step copied with the owner's rows, by checksums."""
    whole = step.owner_part(range(step.cut.dst.layers), 0, step.tokens)
    source = Source(step.ticket, step.owner)
    local = 0
    remote = 0
    for start, end in step.runs():
        part = replace(whole, first=whole.first + start, count=end - start)
        dst_index = step.dst_index.shifted(start)
        local += checksum_of(step.cut.dst, dst_index, part)
        request = Sum(step.ticket.epoch, step.ticket.offer, part)
        remote += ask(source, request, pull, inf).digest
    if (local - remote) % MODULUS:
        raise TransferError(
            f"Expected the bytes of the rows of {step.owner.address}, got others (checksums "
            f"{local:x} and {remote:x}); no rows were committed. Pull again, or by another "
            f"transport."
        )


# --- the choice of an encoding


def leave_to_owner(arrivals: list[Arrival], pull: Pull, crossed: Crossed) -> None:
    """Have the owner choose how the slices cross that were made for packed rows.

    ``arrivals``: all slices of an offer, which get their slots, or none. ``crossed`` gets the
    choices, one for each step.
    """
    steps = {id(each.step): each.step for each in arrivals if each.slots is not None}
    for step in steps.values():
        choice = _choice_of(step, pull, crossed.most_gbps)
        crossed.choices.append(choice)
        if choice.pack is None:  # it concerns more rows than a reason for parts of blocks
            crossed.why = _clause(choice.why)
        for each in arrivals:
            if each.step is step and each.slots is not None:
                unit = each.slots.unit
                each.cross_in(None if choice.pack is None else Slots(choice.pack, unit))
    arrivals.sort(key=lambda each: each.slots is None)  # slices of one encoding are one request


def _choice_of(step: Step, pull: Pull, most_gbps: float) -> EncodingChoice:
    """Return the owner's choice for the whole blocks of a step, at the rate of its transport.

    The rows cross raw as long as the rate is not known, and if the owner makes no choice that this
    release knows.
    """
    source = Source(step.ticket, step.owner)
    history = step.owner.staging.history
    link = min(history.gbps, most_gbps)
    if link == inf:
        name = step.owner.staging.transport.name
        return EncodingChoice(None, f"No recent pull has measured the rate of {name}.")

    part = step.owner_part(range(step.cut.dst.layers), 0, step.tokens)
    terms = part, link, history.needs_sample(step.window)
    request = Choose(step.ticket.epoch, step.ticket.offer, *terms)
    try:
        answer = ask(source, request, pull)
    except Refused as error:  # it stays busy, or is of a release that does not know the request
        return EncodingChoice(None, f"The owner made no choice: {error}", link)
    if not isinstance(answer, Chosen):
        return EncodingChoice(None, "The owner made no choice: its answer has none.", link)

    pack = None
    if answer.encoding:
        try:
            pack = _checked(answer.encoding, step)
        except PortaKVError as error:  # also the format of a later release
            return EncodingChoice(None, f"The owner chose {answer.encoding!r}: {error}", link)
    figures = answer.packing_gbps, answer.ratio, answer.escapes, answer.fits
    return EncodingChoice(pack, answer.why or "The owner gave no reason.", link, *figures)


def _checked(text: str, step: Step) -> Pack:
    """Return the parameters that an owner chose for a step; raise if slots of them are no smaller
    than the rows, for which the staging buffers have space."""
    pack = Pack.of_text(text)
    unit = step.owner.handshake.described[step.cut.group].block_size
    for plane in Slots(pack, unit).planes(step.cut.dst):
        if plane.slot_bytes >= plane.raw_bytes:
            raise PeerError(
                f"Expected slots of less than {plane.raw_bytes} bytes, got {plane.slot_bytes}. "
                f"Connect sides of one release."
            )
    return pack


def _clause(sentence: str) -> str:
    """Return a sentence as a clause."""
    return f"{sentence[:1].lower()}{sentence[1:]}".rstrip(".")
