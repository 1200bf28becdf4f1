# SPDX-License-Identifier: Apache-2.0
"""Loops of compute, as a model runs them: large matrix products, and attention of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from portakv_benchmarks.host.suite import HostPreset

#: Where a loop runs, and in words. On an H200 what the link reaches behind gathers depends on it.
DEFAULT, OWN = "default", "own"
STREAMS = {DEFAULT: "the default stream", OWN: "a stream of its own"}
_BATCH = 8  # steps that are captured together
_DIM = 128


class Loop:
    """A step again and again on the current stream, for at least so long when nothing disturbs it.

    The steps are captured, where the device has graphs: launches in their thousands would fill the
    queue and hold up the host, which has transfers to issue meanwhile.

    Args:
        step: one step, on the current stream.
        device: where.
        seconds: how long it takes alone, at least.
    """

    def __init__(self, step: Callable[[], object], device: torch.device, seconds: float) -> None:
        # A captured graph holds addresses, not tensors: freed, the step's memory would be given to
        # others, such as ids of what is moved beside the loop, and be overwritten by each replay.
        self._step = step
        self._module = torch.get_device_module(device)
        self._batch = _captured(step, device)
        self._times = 1
        taken = min(self._time() for _ in range(3))
        self._times = max(1, ceil(1.05 * seconds * 1e3 / taken)) if taken else 1

    @property
    def steps(self) -> int:
        """How many steps one run makes."""
        return _BATCH * self._times

    def run(self) -> None:
        """Issue every step."""
        for _ in range(self._times):
            self._batch()

    def _time(self) -> float:
        """Milliseconds of one run."""
        first, last = timed_event(self._module), timed_event(self._module)
        self._module.synchronize()
        first.record()
        self.run()
        last.record()
        self._module.synchronize()
        return float(first.elapsed_time(last))


def timed_event(module: Any) -> Any:
    """An event of a device that knows the time."""
    return module.Event(enable_timing=True)


def matmul(device: torch.device, preset: HostPreset) -> Loop:
    """Products of square bf16 matrices."""
    side = preset.matmul
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Loop(lambda: torch.mm(a, b, out=out), device, preset.loop_seconds)


def attention(device: torch.device, preset: HostPreset) -> Loop:
    """Attention of one new token over long keys and values, fp16, which is bound by memory."""
    batch, heads, tokens = preset.attention
    shape = (batch, heads, tokens, _DIM)
    k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(2))
    q = torch.randn(batch, heads, 1, _DIM, dtype=torch.float16, device=device)
    attend = torch.nn.functional.scaled_dot_product_attention
    return Loop(lambda: attend(q, k, v), device, preset.loop_seconds)


LOOPS = {"matmul": matmul, "attention": attention}


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
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
    replay: Callable[[], None] = graph.replay
    return replay
