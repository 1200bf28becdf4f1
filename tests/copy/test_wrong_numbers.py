# SPDX-License-Identifier: Apache-2.0
"""Numbers and flags of public calls: a value that is none for its argument is refused, and nothing
is written. No value is cut, ignored, or read as another one."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from portakv import (
    AdaptiveConnector,
    CopyOptions,
    CopyPlan,
    Index,
    InvalidTerms,
    KVView,
    Pack,
    PortaKVError,
    Rope,
    choose_encoding,
    copy_blocks,
    copy_rows,
    copy_runs,
)
from portakv.host import memcpy, pinned
from portakv.host.pool import PinnedPool
from portakv.interconnect.strategy import Terms
from portakv.storage.work import Graph

SHAPE = (2, 4, 16, 2, 8)
LAYOUT = "kv block token head dim"
#: What is no count, flag or rate: booleans are no numbers, and numbers are no flags.
NO_COUNT: list[Any] = [True, False, -1, 1.0, 1.5, inf, nan, "1", b"1", np.bool_(True), [], {}]
NO_COUNT_ABOVE_0: list[Any] = [*NO_COUNT, 0]
NO_FLAG: list[Any] = [0, 1, None, "yes", np.bool_(True), 1.0]
NO_RATE: list[Any] = [0, -1, inf, -inf, nan, True, "1", 1e9, [1.0]]


class Scene:
    """Two caches, a connector with one of them, a chunk, and a plain tensor."""

    def __init__(self) -> None:
        self.tensors = [torch.zeros(SHAPE, device="cpu") + n for n in range(4)]
        self.src, self.dst = (KVView(each, LAYOUT) for each in self.tensors[:2])
        self.chunk = torch.full((2, 1, 4, 16), 7.0, device="cpu")
        self.connector = AdaptiveConnector("cpu")
        self.connector.register_kv_caches([self.tensors[2]])
        self.bytes = torch.zeros(64, dtype=torch.uint8, device="cpu")

    def runs(self, **arguments: Any) -> Any:
        at = self.bytes.data_ptr()
        terms = {"sizes": 8, "src_device": "cpu", "dst_device": "cpu", **arguments}
        return copy_runs([at], [at + 32], **terms)

    def at(self, **arguments: Any) -> KVView:
        terms = {"shape": (2, 8), "dtype": torch.uint8, "device": "cpu", **arguments}
        return KVView.at(self.bytes.data_ptr(), "token dim", **terms)

    def contents(self) -> list[torch.Tensor]:
        return [each.clone() for each in (*self.tensors, self.chunk, self.bytes)]


def requests(**arguments: Any) -> Index:
    tables = torch.zeros(1, 2, dtype=torch.int32, device="cpu")
    return Index.of_requests(tables, [2], **{"step": 4, **arguments})


SLOTS = [0, 1, 2, 3]
Call = Callable[[Scene, Any], object]
COUNTS: dict[str, Call] = {
    "count": lambda s, x: copy_rows(s.src, s.dst, SLOTS, SLOTS, count=x),
    "count of blocks": lambda s, x: copy_blocks(s.src, s.dst, [0], [0], count=x),
    "skip": lambda s, x: copy_blocks(s.src, s.dst, [0], [0], skip=x),
    "skip of one side": lambda s, x: copy_blocks(s.src, s.dst, [0], [0], skip=(x, 0)),
    "start": lambda s, x: s.connector.from_gpu(s.chunk, None, SLOTS, x, 4),
    "end": lambda s, x: s.connector.to_gpu(s.chunk, None, SLOTS, 0, x),
    "starts": lambda s, x: s.connector.batched_from_gpu([s.chunk], None, SLOTS, [x], [4]),
    "ends": lambda s, x: s.connector.batched_to_gpu([s.chunk], None, SLOTS, [0], [x]),
    "offset": lambda s, x: Index(SLOTS, 1, x),
    "src_step": lambda s, x: CopyPlan(s.src.form, s.dst.form, x, 16),
    "dst_step": lambda s, x: CopyPlan(s.src.form, s.dst.form, 16, x),
    "without_repeats": lambda s, x: Index(SLOTS).without_repeats(x),
    "of_requests count": lambda s, x: requests(count=x),
    "slice": lambda s, x: s.src.slice(heads=x),
    "plane": lambda s, x: s.src.plane(0, x),
    "stride": lambda s, x: s.at(strides=(8, x)),
    "rotary kv": lambda s, x: Rope(shift=1, base=1e4, kv=x),
}
COUNTS_ABOVE_0: dict[str, Call] = {
    "step": lambda s, x: Index(SLOTS, x),
    "step of": lambda s, x: Index.of(SLOTS, x),
    "of_requests step": lambda s, x: requests(step=x),
    "unit": lambda s, x: CopyPlan(s.src.form, s.dst.form, 16, 16, x),
    "max_thread_blocks": lambda s, x: CopyOptions(max_thread_blocks=x),
    "layers": lambda s, x: KVView(s.tensors[0], LAYOUT, layers=x),
    "block_size": lambda s, x: AdaptiveConnector("cpu", block_size=x),
    "dim": lambda s, x: KVView(s.tensors[0], LAYOUT, dim=(x, 8)),
    "sizes": lambda s, x: s.runs(sizes=x),
    "rows": lambda s, x: s.runs(rows=x),
    "explain": lambda s, x: s.connector.explain(x),
    "slot_bytes": lambda s, x: Pack(slot_bytes=x),
    "nbytes": lambda s, x: pinned.allocate(x),
    "blocks of a pool": lambda s, x: PinnedPool(64, x),
    "bytes of a block": lambda s, x: PinnedPool(x, 2),
    "threads": lambda s, x: pinned.allocate(64, threads=x),
    "width": lambda s, x: Graph().queue("disk", x),
}
FLAGS: dict[str, Call] = {
    "trusted": lambda s, x: Index(SLOTS, trusted=x),
    "trusted requests": lambda s, x: requests(trusted=x),
    "reinterpret": lambda s, x: copy_rows(s.src, s.dst, reinterpret=x),
    "reinterpret of a view": lambda s, x: KVView(s.tensors[0], LAYOUT, reinterpret=x),
    "reinterpret of a plan": lambda s, x: CopyPlan(s.src.form, s.dst.form, reinterpret=x),
    "by_layer": lambda s, x: copy_rows(s.src, s.dst, by_layer=x),
    "cancellable": lambda s, x: copy_rows(s.src, s.dst, cancellable=x),
    "detached": lambda s, x: copy_rows(s.src, s.dst, detached=x),
    "fallback": lambda s, x: pinned.allocate(64, fallback=x),
    "stacks": lambda s, x: PinnedPool(64, 2, stacks=x),
    "read_only": lambda s, x: pinned.register(torch.zeros(8, device="cpu"), read_only=x),
    "non_blocking": lambda s, x: memcpy.copy_(s.tensors[0], s.tensors[1], x),
}
#: None stands for "ask".
FLAGS_OR_NONE: dict[str, Call] = {
    "pinned": lambda s, x: s.at(pinned=x),
    "pinned runs": lambda s, x: s.runs(pinned=x),
}
RATES: dict[str, Call] = {
    "max_gbps": lambda s, x: copy_rows(s.src, s.dst, max_gbps=x),
    "max_gbps of options": lambda s, x: CopyOptions(max_gbps=x),
    "max_gbps of a queue": lambda s, x: Graph().queue("disk", max_gbps=x),
    "link_gbps": lambda s, x: choose_encoding(s.src, [0], link_gbps=x),
    "packing_gbps": lambda s, x: choose_encoding(s.src, [0], packing_gbps=x),
}
ALL = [
    pytest.param(call, value, id=f"{name}: {value!r}"[:60])
    for calls, values in (
        (COUNTS, NO_COUNT),
        (COUNTS_ABOVE_0, NO_COUNT_ABOVE_0),
        (FLAGS, NO_FLAG),
        (FLAGS_OR_NONE, [x for x in NO_FLAG if x is not None]),
        (RATES, NO_RATE),
    )
    for name, call in calls.items()
    for value in values
    if not (type(value) is list and name in ("sizes", "rows"))  # a list has a number for each run
]


@pytest.mark.parametrize(("call", "value"), ALL)
def test_a_value_that_is_none_for_its_argument(call: Call, value: Any) -> None:
    scene = Scene()
    before = scene.contents()
    with pytest.raises(PortaKVError) as caught:
        call(scene, value)
    assert str(caught.value).startswith("Expected") or ": " in str(caught.value)
    assert all(map(torch.equal, before, scene.contents()))


@pytest.mark.parametrize("starts", [torch.tensor(1, device="cpu"), 0, None])
def test_a_batch_takes_lists(starts: Any) -> None:
    scene = Scene()
    with pytest.raises(PortaKVError, match="one start and one end for each memory object"):
        scene.connector.batched_from_gpu([scene.chunk], None, SLOTS, starts, [4])


@pytest.mark.parametrize("device", [2**63, 2**70, -1, 1.5, True])
def test_a_device_that_is_none(device: Any) -> None:
    with pytest.raises(PortaKVError, match="device"):
        AdaptiveConnector(device)


def test_integers_of_numpy_are_numbers() -> None:
    scene = Scene()
    one: Any = np.int64(1)
    plan = CopyPlan(scene.src.form, scene.dst.form, np.int32(16), np.int64(16), one)
    assert (type(plan.src_step), type(plan.unit)) == (int, int)
    index = Index(SLOTS, one, one)
    assert (type(index.step), type(index.offset), index.length) == (int, int, 3)
    copy_rows(scene.src, scene.dst, SLOTS, SLOTS, count=one).synchronize()


def test_the_rate_of_a_worker_is_not_a_caller_s() -> None:
    """A worker that keeps a rate issues slices without a limit of their own."""
    assert Terms(max_gbps=2.0).without_rate.max_gbps == inf
    with pytest.raises(InvalidTerms, match="max_gbps"):
        CopyOptions(max_gbps=inf)


def test_a_chunk_of_other_length_is_refused_unless_an_end_is_passed() -> None:
    scene = Scene()
    before = scene.contents()
    for start, end, tokens in ((0, None, 2), (1, None, 1)):
        for move in (scene.connector.from_gpu, scene.connector.to_gpu):
            with pytest.raises(PortaKVError, match=f"of {tokens} tokens, .* of 4. Pass end"):
                move(scene.chunk, None, [5, 9], start, end)
    assert all(map(torch.equal, before, scene.contents()))
    scene.connector.from_gpu(scene.chunk, None, [5, 9], end=2).synchronize()
    assert bool((scene.chunk[:, :, :2] == 2).all())
    assert bool((scene.chunk[:, :, 2:] == 7).all())


def test_a_compiled_function_refuses_a_chunk_of_other_length() -> None:
    scene = Scene()

    @torch.compile(backend="eager", fullgraph=True)
    def stored(ids: torch.Tensor, end: int | None) -> None:
        scene.connector.from_gpu(scene.chunk, None, ids, 0, end)

    slots = torch.tensor([5, 9], device="cpu")
    with pytest.raises(PortaKVError, match=r"of 2 tokens, .* of 4. Pass end"):
        stored(slots, None)
    stored(slots, 2)
    assert bool((scene.chunk[:, :, :2] == 2).all())
    stored(torch.tensor([5, 9, 6, 7], device="cpu"), None)
    assert bool((scene.chunk == 2).all())
