# SPDX-License-Identifier: Apache-2.0
"""Run transfers and loops of compute at the same time.

A transfer moves a case again and again. The loops are those of a model: large matrix products, and
attention of a decode step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import ceil
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

from portakv.runtime.transfer import Transfer
from portakv_benchmarks.host import suite
from portakv_benchmarks.host.cases import Sides, case_of, scene
from portakv_benchmarks.host.suite import BATCHED_MEMCPY, KB, Bench, HostPreset, Method
from portakv_benchmarks.shared.harness import FAILURES, Variant, in_a_line, take_error

#: Lengths of rows that move alongside a loop; `batched_memcpy` has blocks.
RUNS = (2 * KB, 256)
BLOCK_RUN = 32 * KB
#: Transfers in the queue at a time: several milliseconds of the link's time, in which the host
#: issues what is measured and the next ones.
AHEAD = 4


class Traffic:
    """A method of moving a case of so many bytes, and its results alongside other work.

    One call of its variant moves the case once, after the current stream. The call returns a handle
    that reports the end, or None if the stream does. A peer and memcpy have no `Method`.
    """

    def __init__(self, variant: Variant, payload: int, method: Method | None = None, **labels: Any):
        self.payload = payload
        self.labels = {**labels, **variant.labels}
        self.verified = True  # every byte was right whenever it was checked
        self.variant = variant
        self._method = method

    def __str__(self) -> str:
        return f"{self.labels['backend']} {self.labels['shape']}"

    def look(self) -> None:
        self.verified &= self.variant.right(0)

    def once(self) -> None:
        """Move once while nothing else runs, and look at every byte."""
        self.variant.poison(0)
        done = self.variant.call(0)
        self.look()
        if self._method is not None and isinstance(done, Transfer):
            self.labels |= self._method.taken(done)


class Queue:
    """Issues the transfers of one traffic on a stream, one after the other."""

    def __init__(self, module: ModuleType, traffic: Traffic, stream: torch.Stream) -> None:
        self.traffic = traffic
        self._module = module
        self._stream = stream
        self.stamps = list[float]()  # seconds on the host's clock at which one was seen to end
        self.dry = 0  # how often all had ended when the next was issued
        self._flying: deque[Callable[[], bool]] = deque()

    def fill(self) -> None:
        """Issue as many transfers as the queue may hold."""
        while len(self._flying) < AHEAD:
            self._issue()

    def go_on(self) -> None:
        """Note the transfers that ended, and issue one more if the queue has room."""
        self.land()
        if len(self._flying) < AHEAD:
            self.dry += not self._flying
            self._issue()

    def land(self) -> None:
        while self._flying and self._flying[0]():
            self._flying.popleft()
            self.stamps.append(perf_counter())

    def _issue(self) -> None:
        with self._module.stream(self._stream):
            done = self.traffic.variant.call(0)
            if hasattr(done, "done"):
                self._flying.append(done.done)
            else:
                self._flying.append(recorded(self._module, self._stream).query)


def recorded(module: ModuleType, stream: torch.Stream) -> Any:
    """Return an event after the work of a stream, without timing."""
    event = module.Event()
    event.record(stream)
    return event


class Methods:
    """Keeps the methods apart: a wrong result of one is reported, and the others go on for as long
    as the device can be used."""

    def __init__(self, bench: Bench, place: str) -> None:
        self._bench = bench
        self._place = place
        self.usable = True  # no failure has taken the device

    def tried(self, traffic: Traffic, action: Callable[[Traffic], object]) -> bool:
        """Return whether an action with traffic succeeded; report its failure otherwise."""
        if not self.usable:
            return False
        synchronise = self._bench.module.synchronize
        try:
            action(traffic)
            synchronise()
        except FAILURES as error:
            self._tell(f"{traffic}: {in_a_line(error)}")
            take_error()
        else:
            return True
        try:
            synchronise()
        except RuntimeError as error:
            self.usable = False
            why = in_a_line(error)
            self._tell(f"the device cannot be used any more ({why}); the others stopped")
        return False

    def _tell(self, line: str) -> None:
        self._bench.left_out.append(f"{self._place}, {line}")


def sides_of(bench: Bench, run: int, nbytes: int = 0) -> Sides:
    """Return a chunk of the host with rows of ``run`` bytes, or blocks of so many in a plane.

    ``nbytes``: in all; 0: as many as a large transfer alongside a model has.
    """
    nbytes = nbytes or bench.preset.alongside
    case = case_of(scene(run), nbytes)
    assert case is not None, f"{nbytes} bytes are not whole runs of {run}"
    return bench.sides(case)


def memcpys(bench: Bench, direction: str, nbytes: int = 0) -> Traffic:
    """Return plain memcpys of as many bytes; see `sides_of`.

    The call fills the source of everything that moves in this direction.
    """
    dense = sides_of(bench, RUNS[0], nbytes)
    dense.fill(direction)
    return Traffic(suite.by_memcpy(dense, direction), dense.case.payload, shape="dense")


def transfers(
    bench: Bench, method: Method, direction: str, run: int | None = None, nbytes: int = 0
) -> Traffic:
    """Return the traffic of a strategy, with rows of ``run`` bytes or what suits the strategy; see
    `sides_of`."""
    run = run or (BLOCK_RUN if method.engine == BATCHED_MEMCPY.engine else RUNS[0])
    sides = sides_of(bench, run, nbytes)
    traffic = moved(sides, suite.by_engine(method, sides, direction), method)
    if "max_thread_blocks" in method.terms:
        traffic.labels["thread_blocks"] = method.terms["max_thread_blocks"]
    return traffic


def moved(sides: Sides, variant: Variant, method: Method | None = None) -> Traffic:
    """Return the traffic of any method of moving a case."""
    place = sides.case.scene
    return Traffic(variant, sides.case.payload, method, shape=place.name, row_bytes=place.row)


#: The stream of a loop, in words. On an H200 the link's bandwidth after gathers depends on it.
DEFAULT = "default"
OWN = "own"
STREAMS = {DEFAULT: "the default stream", OWN: "a separate stream"}
_BATCH = 8  # steps that are captured together
_DIM = 128


class Loop:
    """A step again and again on the current stream, for at least so many seconds when nothing
    disturbs it. The steps are captured, if the device has graphs: launches in their thousands would
    fill the queue and hold up the host, which has transfers to issue meanwhile."""

    def __init__(self, step: Callable[[], object], device: torch.device, seconds: float) -> None:
        # A captured graph holds addresses, not tensors: freed, the step's memory would be given to
        # others, such as ids of what is moved alongside the loop, and be overwritten by each
        # replay.
        self._step = step
        self._module = torch.get_device_module(device)
        self._batch = captured(step, device)
        self._times = 1
        taken = min(self._time() for _ in range(3))
        self._times = max(1, ceil(1.05 * seconds * 1e3 / taken)) if taken else 1
        self.steps = _BATCH * self._times  # of one run

    def run(self) -> None:
        for _ in range(self._times):
            self._batch()

    def _time(self) -> float:
        """Return the milliseconds of one run."""
        first, last = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize()
        first.record()
        self.run()
        last.record()
        self._module.synchronize()
        return float(first.elapsed_time(last))


def matmul(device: torch.device, preset: HostPreset) -> Loop:
    """Return a loop of products of square bf16 matrices."""
    shape = preset.matmul, preset.matmul
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Loop(lambda: torch.mm(a, b, out=out), device, preset.loop_seconds)


def attention(device: torch.device, preset: HostPreset) -> Loop:
    """Return attention of one new token over long keys and values, fp16: memory bounds it."""
    batch, heads, tokens = preset.attention
    shape = (batch, heads, tokens, _DIM)
    k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(2))
    q = torch.randn(batch, heads, 1, _DIM, dtype=torch.float16, device=device)
    attend = torch.nn.functional.scaled_dot_product_attention
    return Loop(lambda: attend(q, k, v), device, preset.loop_seconds)


LOOPS = {"matmul": matmul, "attention": attention}


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def batch() -> None:
        for _ in range(_BATCH):
            step()

    if device.type != "cuda":
        batch()
        return batch
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        batch()  # libraries take their memory before it is captured
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        batch()
    return graph.replay
