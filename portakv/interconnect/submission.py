# SPDX-License-Identifier: Apache-2.0
"""Submit all slices of a transfer to CUDA's driver by one call of the core.

The core executes the schedule, launches the kernels that copy rows, lists the pieces of each slice
while earlier ones cross, and puts them on the link. `passage.Passage` executes the same schedule
for every other device, and for every other backend.
"""

from __future__ import annotations

from array import array
from typing import cast

from portakv.backends.rows_launch import RowsLaunch
from portakv.core.link import IDS, OUTSIDE, STAGE, Fault, pack_host, pack_sliced, pack_stage
from portakv.core.rows import pack_side
from portakv.interconnect.link import CudaLink
from portakv.interconnect.passage import Passage
from portakv.interconnect.pieces import Uncrossed, limits_of, whole_bytes
from portakv.interconnect.slices import Planes, Slice
from portakv.plan.runs import outside, side_words
from portakv.runtime import cuda
from portakv.view.index import Index


def submit(link: CudaLink, passage: Passage, host_index: Index) -> None:
    """Submit all slices of a settled passage, whose stages are all `RowsLaunch`.

    Args:
        link: of the device.
        passage: the caller holds the lock of its buffers.
        host_index: of the host's rows, with ids on the host.

    Raises:
        TransferError: the driver refused a call; what was submitted stays ordered.
        SlotError: a position of the host lies outside of its list or its view.
        Unsupported: a view has more units than the kernels count.
    """
    several = passage.planes
    number = {planes: nth for nth, planes in enumerate(several)}
    cuts = array("q")
    for each in passage.slices:
        cuts.extend((number[each.planes], each.cut.start, each.cut.count))
    # Without several allocations there are no edges besides those of registrations.
    uncrossed = [
        Uncrossed(planes.host) if planes.host.entries > 1 else Uncrossed() for planes in several
    ]
    planes = b"".join(
        _words(one, passage.downward, index, host_index, edges)
        for one, index, edges in zip(several, passage.placed, uncrossed, strict=True)
    )
    memory = array("q", passage.buffers.addresses)
    words = array("q", planes)
    sent = (0, 0, 0) if passage.sent is None else passage.sent.words
    handle = {id(each): cuda.raw(each, link.device.index) for each in passage.streams}
    streams = [handle[id(each)] for each in passage.streams]

    def run() -> Fault | None:
        order = passage.order()
        events = passage.buffers.handles()
        copy = pack_sliced(
            *order,
            *link.crossing(not passage.downward, streams[0]),
            *streams,
            *(each.buffer_info()[0] for each in (events, memory, words)),
            len(several),
            cuts.buffer_info()[0],
            *limits_of(link.fold_below),
            *uncrossed[0].words[:2],
            *sent,
        )
        fault = link.core.run(copy)
        if fault is not None:
            _refuse(fault, passage.slices[fault.slice])
        return fault

    try:
        link.ordered(run)
    finally:
        passage.record_tables()


def _words(
    planes: Planes, downward: bool, index: Index, host_index: Index, edges: Uncrossed
) -> bytes:
    """Return planes as the core reads them; ``index``: of the device's rows."""
    host = planes.host
    launch = _launch(planes)
    by_table = launch.tables[0 if downward else 1]
    rows = launch.side(planes.rows, index, by_table)
    # The core sets the address of the buffer.
    dense = pack_side(0, 0, 0, 0, planes.buffer_index.offset, planes.slots)
    plan = planes.link.words.buffer_info()[0]
    sides = *side_words(host, host_index), whole_bytes(host), *edges.words[2:4]
    return pack_stage(*launch.words) + rows + dense + pack_host(plan, *sides)


def _launch(planes: Planes) -> RowsLaunch:
    return cast("RowsLaunch", planes.ready.launch)


def _refuse(fault: Fault, each: Slice) -> None:
    """Raise the error of a copy of ids, or of a slice, that has a sentence of its own."""
    planes = each.planes
    if fault.what == IDS:
        name = cuda.error_name(fault.code, cuda.library())
        raise cuda.refused(name, f"A copy of {fault.values[0]} values")
    if fault.code == OUTSIDE:
        raise outside(each.crossing(planes.dense))
    if fault.what == STAGE:
        slots = planes.rows.slots, planes.slots
        _launch(planes).refuse(fault.code, *slots, each.cut.count)
