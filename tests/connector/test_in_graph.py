# SPDX-License-Identifier: Apache-2.0
"""Transfers inside `torch.compile`: one op in the graph, ordered among reads and writes of the
caches, the same bytes as the eager call; and calls at the edges of what a graph holds."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.inductor import needs_inductor
from support.small_backends import small_backend

from portakv import AdaptiveConnector, Index, KVView, copy_rows
from portakv.connector.connector import Registration
from portakv.errors import LayoutError, SlotError, TransferError

LAYERS = 3
BLOCKS = 8
SIZE = 4
HEADS = 2
DIM = 8
SLOTS = BLOCKS * SIZE
#: Compilations of one process share what takes longest, the start of the compiler.
INDUCTOR_MARKS = (needs_inductor, pytest.mark.xdist_group("inductor"))
INDUCTOR = pytest.param("inductor", marks=INDUCTOR_MARKS)
COMPILER = pytest.mark.parametrize("compiler", ["eager", "aot_eager", INDUCTOR])
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICE = pytest.mark.parametrize("device", ["cpu", CUDA])
BY_INDUCTOR = pytest.mark.parametrize("device", [pytest.param("cpu", marks=INDUCTOR_MARKS), CUDA])


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing compiled before is there."""
    torch._dynamo.reset()


def make_caches(device: str = "cpu") -> list[torch.Tensor]:
    return [torch.randn(2, BLOCKS, SIZE, HEADS, DIM, device=device) for _ in range(LAYERS)]


def in_one_allocation(device: str = "cpu") -> list[torch.Tensor]:
    """Return caches as `make_caches` does, all layers views of one tensor."""
    return list(torch.randn(LAYERS, 2, BLOCKS, SIZE, HEADS, DIM, device=device))


ALLOCATIONS = [make_caches, in_one_allocation]


def make_chunk(tokens: int = 4, device: str = "cpu") -> torch.Tensor:
    return torch.randn(2, LAYERS, tokens, HEADS * DIM, device=device)


def rows_of(caches: list[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """Return the rows that a store of these slots puts into a chunk."""
    return torch.stack([cache.reshape(2, SLOTS, HEADS * DIM)[:, slots] for cache in caches], dim=1)


def scene(
    device: str = "cpu", backend: str | None = None
) -> tuple[AdaptiveConnector, list[torch.Tensor], torch.Tensor]:
    """A connector, its registered caches, and a chunk of four tokens."""
    connector = AdaptiveConnector(device, backend)
    caches = make_caches(device)
    connector.register_kv_caches(caches)
    return connector, caches, make_chunk(4, device)


def storing(
    connector: AdaptiveConnector, chunk: Any, caches: Any = None, compiler: str = "aot_eager"
) -> Callable[[torch.Tensor], None]:
    """A compiled function that stores the slots that it is given."""

    def step(slots: torch.Tensor) -> None:
        connector.from_gpu(chunk, caches, slots)

    return torch.compile(step, fullgraph=True, backend=compiler)


class Counter:
    """Count compilations by a backend of torch, and keep the graphs.

    This is `torch._dynamo.testing.CompileCounterWithBackend`, whose import takes seconds.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.frame_count = 0
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: list[torch.Tensor]) -> Any:
        self.frame_count += 1
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def ops(self) -> list[str]:
        return [
            str(node.target)
            for graph in self.graphs
            for node in graph.graph.nodes
            if "portakv" in str(node.target)
        ]


@DEVICE
@COMPILER
@pytest.mark.parametrize("registered", [True, False])
def test_a_store_behind_writes_before_reads(device: str, compiler: str, registered: bool) -> None:
    connector, caches, _ = scene(device)
    passed = None if registered else caches

    def step(row: torch.Tensor, chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        for layer, cache in enumerate(caches):
            cache[0, 1] = row + layer
        connector.from_gpu(chunk, passed, slots)
        return chunk * 2

    counter = Counter(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens in (5, 6, 7, 9, 12):
        row = torch.randn(SIZE, HEADS, DIM, device=device)
        chunk = make_chunk(tokens, device)
        slots = torch.randperm(SLOTS, device=device)[:tokens]
        result = compiled(row, chunk, slots)
        assert torch.equal(caches[1][0, 1], row + 1)
        wanted = rows_of(caches, slots)
        assert torch.equal(chunk, wanted)
        assert torch.equal(result, wanted * 2)
    assert counter.frame_count <= 2  # once for the first length, once for any
    assert set(counter.ops()) == {"portakv.from_gpu"}


@DEVICE
@COMPILER
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("make", ALLOCATIONS)
def test_a_load_stands_behind_the_chunk_and_before_reads_of_the_cache(
    device: str, compiler: str, registered: bool, make: Callable[[str], list[torch.Tensor]]
) -> None:
    connector = AdaptiveConnector(device)
    caches = make(device)
    connector.register_kv_caches(caches)

    def step(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        chunk = rows * 3  # made by the graph itself
        connector.to_gpu(chunk, None if registered else caches, slots, 1, 5)
        return sum((cache.double().sum() for cache in caches), torch.zeros((), device=device))

    before = [cache.clone() for cache in caches]
    rows = make_chunk(4, device)
    slots = torch.randperm(SLOTS, device=device)[:6]
    result = torch.compile(step, fullgraph=True, backend=compiler)(rows, slots)
    for layer, cache in enumerate(before):
        flat = cache.view(2, SLOTS, HEADS * DIM)
        flat[:, slots[1:5]] = rows[:, layer] * 3
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))
    torch.testing.assert_close(result, sum(cache.double().sum() for cache in caches))


@BY_INDUCTOR
@pytest.mark.parametrize("make", ALLOCATIONS)
@pytest.mark.parametrize("passed", [True, False])
def test_the_compiler_makes_no_copy_of_the_caches(
    device: str,
    make: Callable[[str], list[torch.Tensor]],
    passed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connector = AdaptiveConnector(device)
    caches = make(device)
    connector.register_kv_caches(caches)
    monkeypatch.setattr(Registration, "__init__", None)  # only other tensors would be read

    def step(chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        connector.from_gpu(chunk, caches if passed else None, slots)
        connector.to_gpu(chunk, caches if passed else None, slots + 1)
        connector.from_gpu(chunk, caches if passed else None, slots + 2)
        return caches[0].sum() + chunk.sum()

    chunk = make_chunk(4, device)
    slots = torch.arange(4, device=device)
    first = rows_of(caches, slots)
    second = rows_of(caches, slots + 2)
    second[:, :, :3] = first[:, :, 1:]  # slots 2, 3, 4 were loaded in between
    torch.compile(step, fullgraph=True)(chunk, slots)
    assert torch.equal(chunk, second)


@BY_INDUCTOR
def test_a_cache_that_the_graph_writes_by_indexing_and_then_loads(device: str) -> None:
    """Inductor then works on a copy of that cache and puts it back; slow, and right."""
    connector, caches, chunk = scene(device)

    def step(row: torch.Tensor, chunk: torch.Tensor, slots: torch.Tensor) -> None:
        caches[0][0, 1] = row
        connector.to_gpu(chunk, None, slots)

    row = torch.randn(SIZE, HEADS, DIM, device=device)
    slots = torch.tensor([9, SIZE + 1, 17, 6], device=device)
    wanted = [cache.clone() for cache in caches]
    wanted[0][0, 1] = row
    for layer, cache in enumerate(wanted):
        cache.view(2, SLOTS, HEADS * DIM)[:, slots] = chunk[:, layer]
    torch.compile(step, fullgraph=True)(row, chunk, slots)
    assert all(torch.equal(x, y) for x, y in zip(caches, wanted, strict=True))
    connector.from_gpu(chunk, None, slots)  # what was registered is so still
    assert torch.equal(chunk, rows_of(caches, slots))


@DEVICE
@pytest.mark.parametrize("store", [True, False])
def test_a_batch_is_one_op(device: str, store: bool) -> None:
    connector = AdaptiveConnector(device)
    caches = make_caches(device)
    twin = AdaptiveConnector(device)
    slots = torch.randperm(SLOTS, device=device)[:9]
    starts = [0, 3, 6]
    ends = [3, 6, 9]

    def run(one: AdaptiveConnector, pool: list[torch.Tensor], objects: list[torch.Tensor]) -> None:
        batched = one.batched_from_gpu if store else one.batched_to_gpu
        batched(objects, pool, slots, starts, ends)

    objects = [make_chunk(3, device) for _ in starts]
    eager_pool = [cache.clone() for cache in caches]
    eager_objects = [chunk.clone() for chunk in objects]
    counter = Counter("aot_eager")
    torch.compile(run, fullgraph=True, backend=counter)(connector, caches, objects)
    run(twin, eager_pool, eager_objects)
    assert len(counter.ops()) == 1
    assert all(torch.equal(x, y) for x, y in zip(caches, eager_pool, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(objects, eager_objects, strict=True))


# Calls at the edges of what a graph holds


def test_an_empty_batch_is_no_op() -> None:
    connector = scene()[0]
    counter = Counter("eager")

    def step(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        connector.batched_from_gpu([], None, slots, [], [])
        return x + 1

    torch.compile(step, fullgraph=True, backend=counter)(torch.ones(2), torch.arange(3))
    assert not counter.ops()


def test_caches_that_were_never_registered_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = AdaptiveConnector("cpu")
    caches = make_caches()
    chunk = make_chunk()
    made = Registration.__init__
    read = list[Any]()

    def reading(self: Registration, kv_caches: Any, *rest: Any) -> None:
        read.append(kv_caches)
        made(self, kv_caches, *rest)

    monkeypatch.setattr(Registration, "__init__", reading)

    compiled = storing(connector, chunk, caches)
    for first in range(5):
        slots = torch.arange(first, first + 4)
        compiled(slots)
        assert torch.equal(chunk, rows_of(caches, slots))
    assert len(read) == 1


def test_other_caches_registered_after_the_compilation() -> None:
    connector = AdaptiveConnector("cpu")
    chunk = make_chunk()
    slots = torch.arange(4)

    compiled = storing(connector, chunk)
    for caches in (make_caches(), make_caches(), in_one_allocation()):
        connector.register_kv_caches(caches)
        compiled(slots)
        assert torch.equal(chunk, rows_of(caches, slots))


def test_work_that_no_stream_orders_has_landed_before_the_graph_goes_on() -> None:
    late = small_backend("late")
    prepare = late.prepare

    def prepare_late(self: Any, plan: Any) -> Any:
        """Work that lands when the graph waits for it."""
        launch = prepare(self, plan)

        def start(*arguments: Any) -> Any:
            land = functools.cache(functools.partial(launch, *arguments))
            return SimpleNamespace(done=lambda: bool(land.cache_info().currsize), wait=land)

        return start

    late.prepare = prepare_late  # type: ignore[method-assign]
    with registered(late=late):
        connector, caches, _ = scene("cpu", "late")

        def step(chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            connector.from_gpu(chunk, None, slots)
            return chunk * 2

        chunk = torch.zeros_like(make_chunk())
        slots = torch.arange(4)
        result = torch.compile(step, fullgraph=True, backend="aot_eager")(chunk, slots)
        assert torch.equal(result, 2 * rows_of(caches, slots))


@pytest.mark.gpu
def test_a_bad_device_id_is_told_by_the_next_compiled_call() -> None:
    connector, caches, chunk = scene("cuda")
    compiled = storing(connector, chunk)
    compiled(torch.tensor([0, SLOTS, 2, 3], device="cuda"))
    torch.cuda.synchronize()
    with pytest.raises(SlotError, match="Position 1 "):
        compiled(torch.arange(4, device="cuda"))
    compiled(torch.arange(4, device="cuda"))
    torch.cuda.synchronize()
    assert torch.equal(chunk, rows_of(caches, torch.arange(4, device="cuda")))


def test_nested_caches_and_memory_objects_with_a_tensor() -> None:
    connector = AdaptiveConnector("cpu", kv_layout="layer kv | block token head dim")
    caches = {f"model.{n}": tuple(torch.randn(2, BLOCKS, SIZE, HEADS, DIM)) for n in range(LAYERS)}
    chunk = make_chunk()
    slots = torch.tensor([9, 2, 17, 6])

    storing(connector, SimpleNamespace(tensor=chunk), caches)(slots)
    together = [torch.stack(pair) for pair in caches.values()]
    assert torch.equal(chunk, rows_of(together, slots))


@pytest.mark.parametrize("slots", [[1, 2, 3, 4], Index([1, 2, 3, 4])])
def test_what_no_graph_can_hold_breaks_it_and_is_made_eagerly(slots: Any) -> None:
    connector, caches, chunk = scene()

    def step() -> Any:
        return connector.from_gpu(chunk, None, slots)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="PortaKV's op"):
        torch.compile(step, fullgraph=True, backend="eager")()
    torch._dynamo.reset()
    torch.compile(step, backend="eager")().synchronize()
    assert torch.equal(chunk, rows_of(caches, torch.arange(1, 5)))


def test_copy_rows_is_kept_out_of_graphs_by_its_caller() -> None:
    """`copy_rows` is no op; torch's own word for that serves."""
    caches = make_caches()
    chunk = make_chunk()
    cache = KVView(caches, "layer | kv block token head dim")
    dense = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    outside = torch.compiler.disable(copy_rows)
    index = Index([9, 2, 17, 6])

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        outside(cache, dense, index)
        return y * chunk.sum()

    result = torch.compile(step, backend="eager")(torch.ones(3))
    assert torch.equal(chunk, rows_of(caches, torch.tensor([9, 2, 17, 6])))
    assert torch.equal(result, 2 * torch.ones(3) * chunk.sum())


def test_nothing_registered_nothing_passed() -> None:
    with pytest.raises(
        (LayoutError, RuntimeError), match=r"Expected kv_caches|LayoutError|Observed"
    ):
        storing(AdaptiveConnector("cpu"), make_chunk())(torch.arange(4))


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_bad_slots_raise_from_the_compiled_function(compiler: str) -> None:
    connector, caches, chunk = scene()
    before = chunk.clone()
    compiled = storing(connector, chunk, compiler=compiler)
    with pytest.raises(SlotError, match=f"slot {SLOTS}"):
        compiled(torch.tensor([0, 1, SLOTS, 2]))
    assert torch.equal(chunk, before)
    compiled(torch.arange(4))
    assert torch.equal(chunk, rows_of(caches, torch.arange(4)))


def test_a_connector_that_is_gone() -> None:
    connector = AdaptiveConnector("cpu")
    caches = make_caches()
    handle = connector._number
    del connector
    gc.collect()
    arguments = ([make_chunk()], [1], caches, [LAYERS], torch.arange(4), [0], [4])
    with pytest.raises(TransferError, match="Keep the connector"):
        torch.ops.portakv.from_gpu(handle, *arguments)


def test_caches_that_are_not_registered_do_not_replace_those_that_are() -> None:
    (connector, caches, chunk) = scene()
    others = make_caches()
    slots = torch.arange(4)
    arguments = ([chunk], [1], others, [LAYERS], slots, [0], [4])
    torch.ops.portakv.from_gpu(connector._number, *arguments)
    assert torch.equal(chunk, rows_of(others, slots))
    connector.from_gpu(chunk, None, slots)
    assert torch.equal(chunk, rows_of(caches, slots))


@pytest.mark.parametrize("store", [True, False])
def test_torch_finds_the_schema_true(store: bool) -> None:
    connector = AdaptiveConnector("cpu")
    op = torch.ops.portakv.from_gpu if store else torch.ops.portakv.to_gpu
    arguments = ([make_chunk()], [1], make_caches(), [LAYERS], torch.arange(4), [0], [4])
    torch.library.opcheck(op.default, (connector._number, *arguments))


@pytest.mark.gpu
def test_another_stream_is_refused_in_a_graph() -> None:
    (connector, _, chunk) = scene("cuda")
    side = torch.cuda.Stream()
    slots = torch.arange(4, device="cuda")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="PortaKV's op"):
        torch.compile(
            lambda: connector.from_gpu(chunk, None, slots, stream=side),
            fullgraph=True,
            backend="eager",
        )()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled"])
def test_inside_the_compiler_s_own_graphs(backend: str) -> None:
    connector, caches, chunk = scene("cuda", backend)
    connector.from_gpu(chunk, None, torch.arange(4, device="cuda")).synchronize()

    def step(row: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        caches[0][0, 1] = row
        connector.from_gpu(chunk, None, slots)
        return chunk + 1

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        row = torch.randn(SIZE, HEADS, DIM, device="cuda")
        slots = torch.randperm(SLOTS, device="cuda")[:4]
        result = compiled(row, slots).clone()
        assert torch.equal(caches[0][0, 1], row)
        assert torch.equal(chunk, rows_of(caches, slots))
        assert torch.equal(result, chunk + 1)
