# SPDX-License-Identifier: Apache-2.0
"""Schedules: how a copy across the link is cut into slices that overlap.

A slice should be one run of host memory: a copy engine moves those at the link's full speed, and
rows at a pitch a little slower (D2H, 16 MiB in 64 rows: 0.94 of a plain memcpy on an H200 beside a
gather, against 0.99 in one run). So where planes lie outside the tokens the planes are cut, else
the positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from portakv.view.form import Form

#: Bytes of the largest slice of `staged`, and of the smallest. Only at one end of a transfer is the
#: link idle (the first gather, the last scatter), so slices grow from there, each by `GROWTH`. Of
#: 8, 16 and 32 MiB the largest lose least to the gaps between slices (H200).
LARGEST, SMALLEST, GROWTH = 32 << 20, 4 << 20, 4
#: Mirrors that are under way at once: one is filled or emptied while the other crosses. A third one
#: where transfers follow each other: a persistent matmul lets a gather in only between two of its
#: kernels, every 1.6 ms, in which the link of an H200 moves 85 MiB. Four where the next transfer
#: does not wait for the end of the last: one mirror is half drained by then, three are 96 MiB.
RING, LONG_RING, DETACHED_RING = 2, 3, 4
#: Bytes up to which a transfer of `staged` is one slice: a gather of 16 MiB takes 10 us, no more
#: than what the events and the gap of another slice cost.
WHOLE = 16 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice: which layers and kv (None: all), the first position, and how many."""

    layers: tuple[int, int] | None
    kv: tuple[int, int] | None
    start: int
    count: int


class Sizes(NamedTuple):
    """Bytes of slices: up to which a transfer is one, of the first, and of the largest."""

    whole: int
    smallest: int
    largest: int


def staged_sizes(idle: bool) -> Sizes:
    """Those of `staged`; where the link is not ``idle`` all are as large as they can be, as nothing
    waits for the first of them, and a model that leaves little room is asked for it least often."""
    return Sizes(WHOLE, SMALLEST if idle else LARGEST, LARGEST)


def cuts(
    form: Form,
    outside: tuple[str, ...],
    count: int,
    quantum: int,
    rising: bool,
    sizes: Sizes,
) -> list[Cut]:
    """Cut ``count`` positions of a form into slices, in the order in which they should be moved.

    Args:
        form: of the host's rows.
        outside: which of ``kv`` and ``layer`` lie outside the positions in memory, outermost first.
        count: positions.
        quantum: every slice but the last along the positions is a multiple of it.
        rising: small slices first; else last.
        sizes: of the slices.
    """
    if form.token_bytes // _page(form) * count <= sizes.whole:
        return [Cut(None, None, 0, count)]
    found: list[Cut] = []
    target, largest = sizes.smallest, sizes.largest
    for kv, layers, atom in _planes(form, outside, count, largest):
        at = 0
        while at < layers:
            # Powers of two: for each number of layers there is a plan, and perhaps a kernel.
            n = 1 << (min(max(1, target // atom), layers - at).bit_length() - 1)
            if "layer" not in outside:
                n = layers
            if "layer" in outside and atom <= largest:
                found.append(Cut((at, at + n), kv, 0, count))
            else:
                found += _positions((at, at + n), kv, count, quantum, n * atom, target, largest)
            at += n
            target = min(target * GROWTH, largest)
    if not outside:
        found = [replace(cut, layers=None) for cut in found]
    return found if rising else found[::-1]


def _planes(
    form: Form, outside: tuple[str, ...], count: int, largest: int
) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Which kv, how many layers, and bytes of one of these layers, outermost first."""
    plane = form.token_bytes // (form.layers * form.kv) * count // _page(form)
    if "layer" not in outside:
        if "kv" not in outside:
            return [(None, form.layers, plane * form.kv)]
        return [((k, k + 1), form.layers, plane) for k in range(form.kv)]
    if outside[0] == "kv" or (len(outside) == 2 and plane * form.kv > largest):
        return [((k, k + 1), form.layers, plane) for k in range(form.kv)]
    return [(None, form.layers, plane * form.kv)]


def _page(form: Form) -> int:
    return form.block_size if form.opaque else 1


def _positions(
    layers: tuple[int, int],
    kv: tuple[int, int] | None,
    count: int,
    quantum: int,
    nbytes: int,
    target: int,
    largest: int,
) -> list[Cut]:
    """Cut the positions of some layers, of ``nbytes`` in all, into slices that grow."""
    found, start = [], 0
    while start < count:
        taken = min(multiple(target, quantum, nbytes / count), count - start)
        found.append(Cut(layers, kv, start, taken))
        start += taken
        target = min(target * GROWTH, largest)
    return found


def capacity(count: int, quantum: int, token_bytes: float, largest: int | None = None) -> int:
    """Positions of a mirror that holds any slice of at most ``count`` positions, and if that is
    less no more than ``largest`` bytes (None: `LARGEST`).

    One of few numbers, so that transfers of any length share forms and with them plans.
    """
    held, most = quantum, multiple(LARGEST if largest is None else largest, quantum, token_bytes)
    while held < count:
        held *= 2
    return max(min(held, most), -(-count // quantum) * quantum)


def multiple(nbytes: int, quantum: int, token_bytes: float) -> int:
    """Positions of about so many bytes: a multiple of the quantum, at least one."""
    return max(1, int(nbytes / (quantum * max(1, token_bytes)))) * quantum
