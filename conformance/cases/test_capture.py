# SPDX-License-Identifier: Apache-2.0
"""Device graphs: a launch that claims `capturable` is captured once and replayed with other ids and
bytes; one that does not is refused inside a capture, in words, before anything is enqueued."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from portakv import Transfer, TransferError, Unsupported
from portakv_conformance.cases import Bench, Case, Shape, index_of, view_of
from portakv_conformance.judge.judging import changed
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.pattern import pattern_bytes

pytestmark = [
    pytest.mark.area("capture"),
    pytest.mark.needs("graphs"),
    pytest.mark.claim("capturable"),
]

Result = TypeVar("Result")


SHAPE = Shape(layers=3, widths=(64, 64))
#: Like no other case's, so that no kernel for it was launched before.
FIRST = Shape(layers=3, heads=7, widths=(104, 104), block_size=12)


def captured(call: Callable[[], Result]) -> tuple[Any, Result]:
    """Return a graph of one call, and what the call returned."""
    gc.collect()  # a graph that dies during a capture spoils it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def check_replays(bench: Bench, case: Case, graph: Any, holes: int) -> None:
    """Replay with new ids and new bytes, and judge each time."""
    side = case.src if case.src.ids is not None else case.dst
    assert side.ids is not None
    for turn in range(3):
        if bench.subject.can.index_on == "device":
            side.ids.copy_(torch.tensor(bench.other(turn).shuffled(side.slots, 9, holes)))
        for number, guard in enumerate(case.src.guards):
            fresh = pattern_bytes(bench.seed + turn + 1, number, guard.nbytes)
            guard.payload().copy_(torch.from_numpy(fresh.copy()))
        expected = case.expected()
        graph.replay()
        torch.cuda.synchronize()
        bench.judge.check(expected, case, f"At replay {turn}: ")


def check_captured_launch(bench: Bench, direction: str, *, first: bool) -> None:
    """Capture a launch that was never called before, or one that was, and replay it."""
    if not bench.judge.claims("capturable", "its launches cannot be captured into a graph."):
        return
    holes = 2 if bench.subject.can.skips_negative else 0
    shape = FIRST if first else SHAPE
    case = bench.move(direction, shape, bench.on_device(shape.slots, 9, holes))
    launch = bench.judge.launch_of(case)
    if not first:
        bench.judge.launch(case)  # made its tables, and all that a first launch makes
        launch(None, None)
    before = Memory.snapshot(case.dst.tensors)
    graph, pending = captured(lambda: launch(None, None))
    assert pending is None, (
        "A captured launch returned a Pending, but a replay cannot be waited for."
    )
    wrong = changed(before, case.dst.tensors)
    assert wrong is None, f"A captured launch is carried out at a replay, but {wrong}."
    check_replays(bench, case, graph, holes)


def test_a_launch_is_captured_and_replayed(bench: Bench, direction: str) -> None:
    """A captured launch reads ids and bytes again at every replay."""
    check_captured_launch(bench, direction, first=False)


def test_a_first_launch_inside_a_capture(bench: Bench, direction: str) -> None:
    """`prepare` makes everything that a launch needs: its first call may be inside a capture."""
    check_captured_launch(bench, direction, first=True)


def test_a_copy_inside_a_capture(bench: Bench, direction: str) -> None:
    """A user's copy of device ids is captured, or raises with nothing enqueued."""
    can = bench.subject.can
    able = can.capturable and can.skips_negative and can.guards and can.index_on == "device"
    case = bench.move(direction, SHAPE, bench.on_device(SHAPE.slots, 9, 2))
    call = _warm(bench, case)
    if able:
        graph, transfer = captured(call)
        for ask in (transfer.done, transfer.synchronize):
            with pytest.raises(TransferError):
                ask()
        check_replays(bench, case, graph, 2)
        return
    bench.judge.not_claimed("capturable", "a copy of device ids inside a capture is refused.")
    refused_in_capture(case, call)
    bench.copy(case)


def test_host_ids_inside_a_capture(bench: Bench, direction: str) -> None:
    """A backend that reads ids on the device is refused those of the host inside a capture."""
    case = bench.some(direction, SHAPE, 9)
    call = _warm(bench, case)
    if bench.subject.can.index_on == "device":
        refused_in_capture(case, call)
    bench.copy(case)


def _warm(bench: Bench, case: Case) -> Callable[[], Transfer]:
    """Make the copy of a case once and return the copy under other indices.

    An index that was used before has its ids on the device.
    """
    views = view_of(case.src), view_of(case.dst)

    def call() -> Transfer:
        own = index_of(case.src)
        other = index_of(case.dst)
        return bench.subject.copy(*views, own, other, count=case.count)

    call().synchronize()
    return call


def refused_in_capture(case: Case, call: Callable[[], object]) -> None:
    """Expect that the call raises `Unsupported` inside a capture, and that no byte changes."""
    before = Memory.snapshot(case.src.tensors, case.dst.tensors)
    with pytest.raises(Unsupported):
        captured(call)
    torch.cuda.synchronize()
    wrong = changed(before, [case.src.tensors, case.dst.tensors])
    assert wrong is None, f"It was refused inside a capture, but {wrong}."
