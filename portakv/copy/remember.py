# SPDX-License-Identifier: Apache-2.0
"""Remember a copy between two views that `repeat` can repeat.

A copy is remembered at the second of its kind, which views made for one call never reach.
"""

from __future__ import annotations

import torch

from portakv.backends.base import Again, Capabilities, Launch
from portakv.copy.call import Settled
from portakv.copy.options import CopyOptions
from portakv.copy.repeat import Packed, Repeat, Repeats, Seen, Sides, dtypes_of, sides_of, tokens_of
from portakv.plan.move import Move
from portakv.registry.prepared import Prepared, place_for
from portakv.registry.registry import Choice
from portakv.runtime.devices import capture_question, this_process
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.streams import ignoring_captures
from portakv.runtime.transfer import Transfer, event_pool

_PICKED = "picked for each copy"


def remember(
    move: Move,
    choice: Choice,
    options: CopyOptions,
    device: torch.device,
    settled: Settled,
    made: Transfer,
) -> None:
    """Remember a copy that this thread just made, if it can be repeated.

    Args:
        choice: the registry's, under which a later copy like this one is looked up.
        device: it executed the copy, outside of graph capture.
        settled: the decisions about the copy.
        made: its end.
    """
    sides = sides_of(move, device)
    if sides is None or not made.ordered:
        return
    launch = _launch_of(move, settled, sides)
    if launch is None:
        return
    ready = settled.pieces[0][0]
    picks = _picks(launch)
    repeats, token = Repeats.of(move)
    alike = token, sides, choice, options.terms
    kind = alike, _PICKED if picks else made.carried[0]
    seen = repeats.seen.get(kind)
    if seen is None:
        repeats.seen[kind] = Seen()
        _reserve_lists(launch, device)
        return
    if seen.repeat is None or seen.repeat.process.forked:
        can = ready.can if picks else ready.claims(move, captured=False)
        unowned = launch is not ready.launch
        src = move.src
        dst = move.dst
        seen.repeat = Repeat(
            launch=launch,
            packed=None if picks else _packed(move, ready, can),
            can=can,
            ids_device=can.home_of_ids(device),
            unit=ready.plan.unit,
            reads_pinned_ids=getattr(launch, "reads_pinned_ids", False),
            tabled=getattr(launch, "tables", ready.tables),
            skips=can.guards and can.skips_negative,
            unowned=(
                unowned and src.form.place != "device",
                unowned and dst.form.place != "device",
            ),
            events=None if device.type == "cpu" else event_pool(device),
            carried=None if picks else made.carried,
            process=this_process(),
            capturing=capture_question(device),
        )
    repeats.known[alike, tokens_of(move)] = seen.repeat


def _launch_of(move: Move, settled: Settled, sides: Sides) -> Launch | None:
    """Return what executes copies of this kind; None if they cannot be repeated."""
    if len(settled.pieces) != 1 or settled.error is not None:
        return None
    src = move.src
    dst = move.dst
    if src.memory_device == dst.memory_device and src.overlaps(dst):
        return None  # the ids decide which rows both sides share
    ready = settled.pieces[0][0]
    if ready is not settled.whole:
        return None
    launch = ready.repeatable(move)
    if all(side is None or side.checked for side in sides):
        return launch
    can = ready.claims(move, captured=False)
    return launch if can.guards and can.skips_negative and not _picks(launch) else None


def _reserve_lists(launch: Launch, device: torch.device) -> None:
    """Reserve memory for the ids of later copies with a first copy, which may wait."""
    if getattr(launch, "reads_pinned_ids", False):
        with ignoring_captures(device):  # of other threads
            PinnedIds.reserve()


def _picks(launch: Launch | None) -> bool:
    """Return whether a launch picks a strategy for each copy."""
    return getattr(launch, "carried", None) is not None


def _packed(move: Move, ready: Prepared, can: Capabilities) -> Packed | None:
    """Return the launch with everything packed but addresses and counts, if there is one."""
    again = getattr(ready.launch, "again", None)
    src, dst, src_index, dst_index, _ = move
    if again is None or src_index.offset or dst_index.offset:
        return None
    if any(x.ids is None and len(y.origins) > 1 for x, y in ((src_index, src), (dst_index, dst))):
        return None  # a packed launch takes one address for a side without ids
    placed = place_for(can, can.home_of_ids(ready.choice.backend.device), move)
    packed: Again | None = again(placed.src, placed.dst, placed.src_index, placed.dst_index)
    dtypes = dtypes_of(placed.src_index, placed.dst_index)
    return None if packed is None else Packed(packed, dtypes)
