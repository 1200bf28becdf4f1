# SPDX-License-Identifier: Apache-2.0
"""Transfers inside `torch.compile`: calls at the edges of what a graph holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.in_graph_cases import (  # noqa: F401
    ALLOCATIONS,
    BLOCKS,
    COMPILERS,
    DEVICES,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    SLOTS,
    Counter,
    fresh,
    in_one_allocation,
    make_caches,
    make_chunk,
    rows_of,
)
from support.small_backends import small_backend
from torch._dynamo.exc import Unsupported

from portakv import (
    AdaptiveConnector,
    Index,
    KVView,
    LayoutError,
    SlotError,
    TransferError,
    copy_rows,
)


def test_an_empty_batch_is_no_op() -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    connector.register_kv_caches(caches)
    counter = Counter("eager")

    def step(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        connector.batched_from_gpu([], None, slots, [], [])
        return x + 1

    torch.compile(step, fullgraph=True, backend=counter)(torch.ones(2), torch.arange(3))
    assert not counter.ops()


def test_caches_that_were_never_registered_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    connector, caches, chunk = AdaptiveConnector("cpu"), make_caches("cpu"), make_chunk(4, "cpu")
    read, counted = connector._read, []

    def count(some: Any) -> Any:
        counted.append(some)
        return read(some)

    monkeypatch.setattr(connector, "_read", count)

    def step(slots: torch.Tensor) -> None:
        connector.from_gpu(chunk, caches, slots)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for first in range(5):
        slots = torch.arange(first, first + 4)
        compiled(slots)
        assert torch.equal(chunk, rows_of(caches, slots))
    assert len(counted) == 1


def test_other_caches_registered_after_the_compilation() -> None:
    connector, chunk, slots = AdaptiveConnector("cpu"), make_chunk(4, "cpu"), torch.arange(4)

    def step(slots: torch.Tensor) -> None:
        connector.from_gpu(chunk, None, slots)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for caches in (make_caches("cpu"), make_caches("cpu"), in_one_allocation("cpu")):
        connector.register_kv_caches(caches)
        compiled(slots)
        assert torch.equal(chunk, rows_of(caches, slots))


class _Later:
    """Work that lands when somebody waits for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: list[Callable[[], None]] = [work]

    def done(self) -> bool:
        return not self._work

    def wait(self) -> None:
        while self._work:
            self._work.pop()()


def test_work_that_no_stream_orders_has_landed_before_the_graph_goes_on() -> None:
    late = small_backend("late")
    prepare = late.prepare

    def prepare_late(self: Any, plan: Any) -> Any:
        launch = prepare(self, plan)
        return lambda *arguments: _Later(lambda: launch(*arguments))

    late.prepare = prepare_late  # type: ignore[method-assign]
    with registered(late=late):
        connector, caches = AdaptiveConnector("cpu", "late"), make_caches("cpu")
        connector.register_kv_caches(caches)

        def step(chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            connector.from_gpu(chunk, None, slots)
            return chunk * 2

        chunk, slots = torch.zeros_like(make_chunk(4, "cpu")), torch.arange(4)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(chunk, slots)
        assert torch.equal(found, 2 * rows_of(caches, slots))


@pytest.mark.gpu
def test_a_bad_device_id_is_told_by_the_next_compiled_call() -> None:
    connector, caches = AdaptiveConnector("cuda"), make_caches("cuda")
    connector.register_kv_caches(caches)
    chunk = make_chunk(4, "cuda")

    def step(slots: torch.Tensor) -> None:
        connector.from_gpu(chunk, None, slots)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0, SLOTS, 2, 3], device="cuda"))
    torch.cuda.synchronize()
    with pytest.raises(SlotError, match="Position 1 "):
        compiled(torch.arange(4, device="cuda"))
    compiled(torch.arange(4, device="cuda"))
    torch.cuda.synchronize()
    assert torch.equal(chunk, rows_of(caches, torch.arange(4, device="cuda")))


class _MemoryObj:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_nested_caches_and_memory_objects_with_a_tensor() -> None:
    connector = AdaptiveConnector("cpu", kv_layout="layer kv | block token head dim")
    caches = {f"model.{n}": tuple(torch.randn(2, BLOCKS, SIZE, HEADS, DIM)) for n in range(LAYERS)}
    chunk, slots = make_chunk(4, "cpu"), torch.tensor([9, 2, 17, 6])

    def step(memory_obj: _MemoryObj, slots: torch.Tensor) -> None:
        connector.from_gpu(memory_obj, caches, slots)

    torch.compile(step, fullgraph=True, backend="aot_eager")(_MemoryObj(chunk), slots)
    together = [torch.stack(pair) for pair in caches.values()]
    assert torch.equal(chunk, rows_of(together, slots))


def _call(connector: AdaptiveConnector, **others: Any) -> Callable[[], Any]:
    chunk = make_chunk(4, "cpu")
    arguments = {"slot_mapping": torch.arange(4), **others}
    return lambda: connector.from_gpu(chunk, **arguments)


@pytest.mark.parametrize(
    "others", [{"slot_mapping": [1, 2, 3, 4]}, {"slot_mapping": Index([1, 2, 3, 4])}]
)
def test_what_no_graph_can_hold_breaks_it_and_is_made_eagerly(others: dict[str, Any]) -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    connector.register_kv_caches(caches)
    with pytest.raises(Unsupported, match="PortaKV's op"):
        torch.compile(_call(connector, **others), fullgraph=True, backend="eager")()
    torch._dynamo.reset()
    torch.compile(_call(connector, **others), backend="eager")().synchronize()


def test_copy_rows_is_kept_out_of_graphs_by_its_caller() -> None:
    """`copy_rows` is no op; torch's own word for that serves."""
    caches, chunk = make_caches("cpu"), make_chunk(4, "cpu")
    cache = KVView(caches, "layer | kv block token head dim")
    dense = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    outside, index = torch.compiler.disable(copy_rows), Index([9, 2, 17, 6])

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        outside(cache, dense, index)
        return y * chunk.sum()

    found = torch.compile(step, backend="eager")(torch.ones(3))
    assert torch.equal(chunk, rows_of(caches, torch.tensor([9, 2, 17, 6])))
    assert torch.equal(found, 2 * torch.ones(3) * chunk.sum())


def test_nothing_registered_nothing_passed() -> None:
    connector = AdaptiveConnector("cpu")
    with pytest.raises((LayoutError, RuntimeError), match=r"No kv_caches|LayoutError|Observed"):
        torch.compile(_call(connector), backend="eager")()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_bad_slots_raise_from_the_compiled_function(compiler: str) -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    connector.register_kv_caches(caches)
    before = make_chunk(4, "cpu")
    chunk = before.clone()

    def step(slots: torch.Tensor) -> None:
        connector.from_gpu(chunk, None, slots)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with pytest.raises(SlotError, match=f"slot {SLOTS}"):
        compiled(torch.tensor([0, 1, SLOTS, 2]))
    assert torch.equal(chunk, before)
    compiled(torch.arange(4))
    assert torch.equal(chunk, rows_of(caches, torch.arange(4)))


def test_a_connector_that_is_gone() -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    handle = connector._enlisted.number
    del connector
    gc.collect()
    arguments = ([make_chunk(4, "cpu")], [1], caches, [LAYERS], torch.arange(4), [0], [4])
    with pytest.raises(TransferError, match="keep the connector"):
        torch.ops.portakv.from_gpu(handle, *arguments)


def test_caches_that_are_not_registered_do_not_replace_those_that_are() -> None:
    connector, caches, others = AdaptiveConnector("cpu"), make_caches("cpu"), make_caches("cpu")
    connector.register_kv_caches(caches)
    chunk, slots = make_chunk(4, "cpu"), torch.arange(4)
    arguments = ([chunk], [1], others, [LAYERS], slots, [0], [4])
    torch.ops.portakv.from_gpu(connector._enlisted.number, *arguments)
    assert torch.equal(chunk, rows_of(others, slots))
    connector.from_gpu(chunk, None, slots)
    assert torch.equal(chunk, rows_of(caches, slots))


@pytest.mark.parametrize("store", [True, False])
def test_torch_finds_the_schema_true(store: bool) -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    op = torch.ops.portakv.from_gpu if store else torch.ops.portakv.to_gpu
    torch.library.opcheck(
        op.default,
        (
            connector._enlisted.number,
            [make_chunk(4, "cpu")],
            [1],
            caches,
            [LAYERS],
            torch.arange(4),
            [0],
            [4],
        ),
    )


def test_eager_calls_do_not_go_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    connector, caches = AdaptiveConnector("cpu"), make_caches("cpu")
    monkeypatch.setattr(connector, "_run_op", None)
    connector.from_gpu(make_chunk(4, "cpu"), caches, torch.arange(4)).synchronize()


@pytest.mark.gpu
def test_another_stream_is_refused_in_a_graph() -> None:
    connector = AdaptiveConnector("cuda")
    connector.register_kv_caches(make_caches("cuda"))
    chunk, slots, side = make_chunk(4, "cuda"), torch.arange(4, device="cuda"), torch.cuda.Stream()
    with pytest.raises(Unsupported, match="PortaKV's op"):
        torch.compile(
            lambda: connector.from_gpu(chunk, None, slots, stream=side),
            fullgraph=True, backend="eager",
        )()  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled"])
def test_inside_the_compiler_s_own_graphs(backend: str) -> None:
    connector, caches = AdaptiveConnector("cuda", backend), make_caches("cuda")
    connector.register_kv_caches(caches)
    chunk = make_chunk(4, "cuda")
    connector.from_gpu(chunk, None, torch.arange(4, device="cuda")).synchronize()

    def step(row: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        caches[0][0, 1] = row
        connector.from_gpu(chunk, None, slots)
        return chunk + 1

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        row = torch.randn(SIZE, HEADS, DIM, device="cuda")
        slots = torch.randperm(SLOTS, device="cuda")[:4]
        found = compiled(row, slots).clone()
        assert torch.equal(caches[0][0, 1], row)
        assert torch.equal(chunk, rows_of(caches, slots))
        assert torch.equal(found, chunk + 1)
