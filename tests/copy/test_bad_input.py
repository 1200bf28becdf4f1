# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused with a sentence, and nothing is written: rows, padding and canaries."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import filled, refused, same

from portakv import AdaptiveConnector, CopyPlan, Index, KVView, copy_blocks, copy_rows
from portakv.errors import (
    BackendUnavailable,
    DeviceMismatch,
    InvalidTerms,
    LayoutError,
    PortaKVError,
    SlotError,
)

LAYERS = 3
BLOCKS = 5
SIZE = 4
HEADS = 2
DIM = 8
SLOTS = BLOCKS * SIZE
KV_LAYOUT = "layer | kv block token head dim"
PAIRS = "layer kv | block token head dim"
CHUNK_LAYOUT = "kv layer token (head dim)"


def dense(tokens: int, *, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return filled((2, LAYERS, tokens, HEADS * DIM), dtype, poison=True)


class Scene:
    """Caches, a chunk and a connector on which calls may go wrong."""

    def __init__(self) -> None:
        self.caches = [filled((2, BLOCKS, SIZE, HEADS, DIM)) for _ in range(LAYERS)]
        self.chunk = dense(8)
        self.single = filled((1, 1, 1, HEADS, DIM))
        self.memory = [*self.caches, self.chunk, self.single]
        self.shared = KVView(self.single.expand(2, 1, 8, HEADS, DIM), "kv layer token head dim")
        self.connector = AdaptiveConnector("cpu")
        self.cache = KVView(self.caches, KV_LAYOUT)
        self.rows = KVView(self.chunk, CHUNK_LAYOUT, heads=HEADS)


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture(params=["from_gpu", "to_gpu"])
def move(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# What a connector refuses


def _chunk(what: str, value: Any, *words: str) -> tuple[Any, ...]:
    return (f"a chunk {what}", {"memory_obj": value}, LayoutError, "memory_obj", *words)


def _caches(what: str, value: Any, *words: str) -> tuple[Any, ...]:
    return (f"caches {what}", {"kv_caches": value}, LayoutError, *words)


def _slots(what: str, value: Any, *words: str) -> tuple[Any, ...]:
    return (f"slots: {what}", {"slot_mapping": value}, SlotError, *words)


def _range(start: Any, end: Any, *words: str) -> tuple[Any, ...]:
    arguments = {"slot_mapping": [0, 1, 2, 3], "start": start, "end": end}
    return (f"[{start!r}:{end!r}]", arguments, SlotError, *words)


#: What is special about a call, in place of right arguments; functions are called with the scene.
CALLS: list[tuple[Any, ...]] = [
    (
        "an extent that is declared",
        {"options": {"block_size": 16}},
        LayoutError,
        "'token'",
        "extent 16",
        "got 4",
    ),
    _caches(
        "of another rank",
        lambda s: [x.flatten(3) for x in s.caches],
        "5 dimension",
        "(2, 5, 4, 16)",
        "axis",
    ),
    _caches("in an empty dict", {}, "empty", "at least one"),
    _caches("that are a number", 7, "Expected"),
    _caches("of None", [None], "Expected"),
    _caches("nested", [[torch.zeros(1)]], "Expected"),
    _caches("on meta", lambda s: [x.to("meta") for x in s.caches], "meta", "memory", "allocated"),
    (
        "caches on several devices",
        {"kv_caches": lambda s: [*s.caches[:-1], s.caches[-1].to("meta")]},
        DeviceMismatch,
        "cpu",
        "meta",
        "one device",
    ),
    (
        "caches whose keys and values have other blocks",
        {
            "options": {"kv_layout": PAIRS},
            "kv_caches": lambda s: [
                (filled((5, SIZE, HEADS, DIM)), filled((6, SIZE, HEADS, DIM)))
                for _ in range(LAYERS)
            ],
        },
        LayoutError,
        "'block'",
        "5",
        "6",
        "Expected",
    ),
    _chunk("of another rank", lambda s: s.chunk.flatten(1, 2), "4 dimension", "(2, 24, 16)"),
    *(
        _chunk(f"of shape {shape}", filled(shape, poison=True), "Expected", ", got")
        for shape in [(2, 2, 8, 16), (1, LAYERS, 8, 16), (2, LAYERS, 8, 24)]
    ),
    *(
        _chunk(f"of type {type(value)}", value, "to hold a tensor")
        for value in [None, 7, np.zeros(3), object()]
    ),
    *(
        _chunk(f"of {dtype}", dense(8, dtype=dtype), str(dtype), "torch.float16", "Expected")
        for dtype in [torch.float32, torch.uint8, torch.float64]
    ),
    _chunk(
        "inside the cache",
        lambda s: s.caches[1].view(-1)[: 2 * LAYERS * 32].view(2, LAYERS, 2, 16),
        "kv_caches",
        "separate buffer",
    ),
    _chunk("on meta", lambda s: s.chunk.to("meta"), "meta", "memory", "allocated"),
    (
        "a chunk of numbers",
        {"options": {"chunk_layout": "layer | kv token (head dim)"}, "memory_obj": [5, 6]},
        LayoutError,
        "got an int",
    ),
    (
        "a chunk whose elements do not divide a row",
        {
            "kv_caches": [filled((2, BLOCKS, SIZE, 1, 3), torch.uint8)],
            "memory_obj": filled((2, 1, 8, 3), torch.int16),
        },
        LayoutError,
        "memory_obj",
        "2 bytes",
        "3",
    ),
    _slots("more than the chunk holds", list(range(9)), "9 tokens", "one of 8", "larger"),
    _slots("none", None, "slot_mapping", "Pass"),
    _slots("of another type", [0.0, 1.0], "got"),
    _slots("on meta", torch.zeros(2, dtype=torch.int64, device="meta"), "got"),
    *(
        _slots(
            f"{slot} of {dtype}",
            torch.tensor([0, 1, slot, 3], dtype=dtype),
            "at position 2",
            f"slot {slot}",
            f"{SLOTS} slots",
        )
        for slot in (SLOTS, SLOTS + 1, 2**31 - 1)
        for dtype in (torch.int32, torch.int64)
    ),
    *(
        _range(
            start, end, f"[{start}:{4 if end is None else end}]", "<= 4, the slots", "start <= end"
        )
        for start, end in [(3, 2), (0, 5), (-1, 2), (5, None), (0, -1)]
    ),
    *(
        _range(start, end, "integer")
        for start, end in [(0.5, 2), (0, 1.5), ("0", 2), (0, "2"), (None, 2)]
    ),
    (
        "a range of a kept index",
        {"slot_mapping": Index([0, 1, 2, 3]), "start": 0.5},
        SlotError,
        "integer",
    ),
    *(
        (
            f"stream {stream!r}",
            {"stream": stream},
            DeviceMismatch,
            f"stream={stream!r}",
            "a stream of torch",
        )
        for stream in (0, 140_000, "default")
    ),
]


@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_what_a_connector_refuses(scene: Scene, move: str, case: tuple[Any, ...]) -> None:
    _, special, error, *words = case
    arguments = {"memory_obj": scene.chunk, "kv_caches": scene.caches, "slot_mapping": [0, 1]}
    for name, value in special.items():
        arguments[name] = value(scene) if isinstance(value, FunctionType) else value
    slots = arguments["slot_mapping"]
    if "end" not in arguments and hasattr(slots, "__len__"):
        arguments["end"] = len(slots)  # the chunk has more tokens
    connector = AdaptiveConnector("cpu", **arguments.pop("options", {}))  # type: ignore[arg-type]
    chunk = arguments["memory_obj"]
    with refused(
        error, *words, watch=[*scene.memory, *([chunk] * isinstance(chunk, torch.Tensor))]
    ):
        getattr(connector, move)(**arguments)


def test_chunk_inside_the_cache_behind_a_nested_plane() -> None:
    # Keys span the whole allocation; values lie between the keys' first and second block.
    pool = filled((4096,), torch.uint8)
    keys = pool.as_strided((4, 1, 16), (1000, 16, 1))
    values = pool.as_strided((4, 1, 8), (8, 8, 1), pool.storage_offset() + 100)
    layouts: dict[str, Any] = {
        "kv_layout": "layer kv | block token dim",
        "chunk_layout": "token (kv dim)",
    }
    with refused(LayoutError, "memory_obj", "kv_caches", watch=pool):
        AdaptiveConnector("cpu", **layouts).to_gpu(
            pool[2000:2048].view(2, 24), [(keys, values)], [0, 1]
        )


def test_chunk_inside_caches_whose_list_was_emptied(scene: Scene) -> None:
    scene.connector.register_kv_caches(scene.caches)
    caches = list(scene.caches)
    inside = caches[0].view(-1)[: 2 * LAYERS * 2 * 16].view(2, LAYERS, 2, 16)
    scene.caches.clear()
    with refused(LayoutError, "memory_obj", "kv_caches", watch=caches):
        scene.connector.to_gpu(inside, None, [8, 9])


def test_caches_nested_otherwise_are_other_caches() -> None:
    pairs = [(torch.zeros(6, 4, 2, 8), torch.zeros(6, 4, 2, 8)) for _ in range(2)]
    connector = AdaptiveConnector("cpu", kv_layout=PAIRS)
    connector.register_kv_caches(pairs)
    with refused(LayoutError, "container"):
        connector.from_gpu(torch.zeros(2, 2, 1, 16), [t for pair in pairs for t in pair], [0])


@pytest.mark.parametrize(
    ("device", "options", "error", "words"),
    [
        *((name, {}, BackendUnavailable, [str(name)]) for name in ("meta", "nonsense", None, 1.5)),
        (
            "cpu",
            {"backend": "nonsense"},
            BackendUnavailable,
            ["'nonsense'", "no such backend", "portakv backends --device"],
        ),
        ("cpu", {"chunk_layout": "layer | foo"}, LayoutError, ["Unknown axis 'foo'"]),
    ],
)
def test_bad_connectors(device: Any, options: dict[str, Any], error: Any, words: list[str]) -> None:
    with refused(error, *words):
        AdaptiveConnector(device, **options)


def test_destinations_that_require_grad(scene: Scene) -> None:
    grad = scene.chunk.detach().clone().requires_grad_()
    with refused(LayoutError, "destination", "grad", "detach", watch=[*scene.memory, grad]):
        scene.connector.from_gpu(grad, scene.caches, [0, 1], end=2)
    caches = [torch.nn.Parameter(cache.clone()) for cache in scene.caches]
    with refused(LayoutError, "destination", "grad", "detach", watch=[*scene.memory, *caches]):
        scene.connector.to_gpu(scene.chunk, caches, [0, 1], end=2)
    # As sources they are read like any other, and no gradient is recorded.
    scene.connector.to_gpu(grad, scene.caches, [0, 1], end=2).synchronize()
    assert same(scene.caches[0][0, 0, 0].reshape(-1), grad[0, 0, 0])
    scene.connector.from_gpu(scene.chunk, caches, [0, 1], end=2).synchronize()
    assert not scene.chunk.requires_grad


# What views and copies of rows and blocks refuse


def fake() -> torch.Tensor:
    with pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode():
        return torch.zeros(3, 4)


#: Without their types, for calls that are wrong.
rows: Any = copy_rows
blocks: Any = copy_blocks
#: Calls on a scene that are refused, by the error that they raise, and words of its sentence.
COPIES: dict[type[PortaKVError], list[tuple[Any, ...]]] = {
    LayoutError: [
        (lambda s: s.connector.from_gpu(np.zeros((2, 3, 4)), s.caches, [7]), "torch.from_numpy"),
        (lambda s: KVView(torch.zeros(3, 4, dtype=torch.complex64).conj(), "token dim"),
         "conjugated", "resolve_conj"),
        (lambda s: KVView(fake(), "token dim"), "owns no memory"),
        (lambda s: s.cache.plane(3000, 0), "plane", "count from 0"),
        (lambda s: s.cache.plane(-1, 0), "plane", "count from 0"),
        (lambda s: s.cache.plane(0, 2), "plane", "count from 0"),
        (lambda s: s.cache.plane("a", 0), "layer 'a'", "integers"),
        (lambda s: s.cache.plane(0, 0.5), "kv 0.5", "integers"),
        (lambda s: s.cache.overlaps(3), "got 3", "be a KVView"),
        (lambda s: rows(None, s.cache), "Expected src to be a view, got None"),
        (lambda s: blocks(s.cache, None, [0], [0]), "Expected dst to be a view, got None"),
        (lambda s: CopyPlan(s.cache, s.cache), "Expected two forms", "got a KVView"),
        (lambda s: rows(s.cache.slice(heads=0), s.rows, [0]), "'head'", "source"),
        (lambda s: blocks(s.cache, s.rows, [0], [0]), "dst_blocks", "`block`", "None"),
        (lambda s: rows(s.cache.slice(layers=0), s.shared, [0, 1]), "destination", "one"),
        (lambda s: s.connector.to_gpu(s.chunk, [s.caches[i] for i in (0, 1, 0)], [0, 1], 0, 2),
         "destination", "address"),
    ],
    SlotError: [
        (lambda s: CopyPlan(s.rows.form, s.rows.form, -1, 0), "steps -1"),
        (lambda s: Index(fake()[:, 0].long()), "owns no memory"),
        (lambda s: blocks(s.cache, s.rows, Index([0], 2), None), "src_blocks", "step 2", "step=4"),
        (lambda s: blocks(s.cache, s.cache, [0], [1, 2]), "covers 4", "of 8"),
        (lambda s: rows(s.cache, s.rows, [0, 1, 2], count=-1), "Expected count", "Pass one"),
        (lambda s: rows(s.cache, s.rows, [0, 1, 2], count=2.0), "Expected count", "Pass one"),
        (lambda s: rows(s.cache, s.rows, [0, 1, 2], count="2"), "Expected count", "Pass one"),
        (lambda s: rows(s.cache, s.rows, [0, 1, 2], count=4),
         "4 positions", "source index", "3 ids"),
        (lambda s: rows(s.cache, s.rows, list(range(9))), "9 tokens", "destination", "holds 8"),
        (lambda s: rows(s.cache, s.rows), "covers 20", "destination of 8"),
        (lambda s: rows(s.cache, s.cache, [0, 1, 2], [3, 4]), "covers 3", "destination of 2"),
        (lambda s: rows(s.cache, s.cache, [3, 4], [9, 3]), "slot 3", "source and destination"),
        (lambda s: s.connector.to_gpu(s.chunk, s.caches, [7, 3, 7], 0, 3),
         "slot 7", "2 times", "once"),
        (lambda s: s.connector.to_gpu(s.chunk, s.caches, [7, 3]), "2 tokens", "one of 8", "end"),
        (lambda s: s.connector.from_gpu(s.chunk, s.caches, [7, 3], 1), "1 tokens", "one of 8"),
        (lambda s: s.connector.from_gpu(s.chunk, s.caches, []), "0 tokens", "one of 8"),
        (lambda s: s.connector.batched_from_gpu([s.chunk], s.caches, [7, 3], [0], [None]),
         "2 tokens", "one of 8"),
        (lambda s: blocks(s.rows, s.cache, None, [2, 2]), "2 times", "once"),
        (lambda s: s.connector.batched_to_gpu([s.chunk], s.caches, [0, 1], [0, 1], [2]),
         "1 memory objects", "2 starts", "1 ends"),
        (lambda s: s.connector.explain(2**70), "Expected tokens", "from 1 to 2**31 - 1"),
    ],
    InvalidTerms: [
        (lambda s: rows(s.cache, s.rows, [0], reinterpret="no"), "'no'", "True or False"),
        (lambda s: s.connector.__class__("cpu", reinterpret=1), "reinterpret", "got 1"),
        (lambda s: rows(s.cache, s.rows, [0], check="loose"), "'loose'", "'usual' or 'strict'"),
    ],
    DeviceMismatch: [
        (lambda s: rows(s.cache, s.rows, [0], stream="default"), "='default'"),
        (lambda s: blocks(s.cache, s.cache, [0], [1], stream=7), "stream=7"),
        (lambda s: rows(s.cache, s.rows, [0], stream=s.chunk), "stream=tensor("),
    ],
    BackendUnavailable: [
        (lambda s: rows(s.cache, s.rows, [0], backend="nonsense"), "'nonsense'", "no such backend"),
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # it is refused
@pytest.mark.parametrize(
    ("error", "case"),
    [
        pytest.param(error, case, id=" ".join(case[1:]))
        for error, cases in COPIES.items()
        for case in cases
    ],
)
def test_what_views_and_copies_refuse(scene: Scene, error: Any, case: tuple[Any, ...]) -> None:
    call, *words = case
    with refused(error, *words, watch=scene.memory):
        call(scene)


def test_steps_of_any_integer_type() -> None:
    step: Any = np.int64(4)
    offset: Any = torch.tensor(1)
    assert Index([1], step=step, offset=offset).slots(2).tolist() == [5, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16])
def test_rows_of_another_type_unless_their_bits_are_meant(scene: Scene, dtype: torch.dtype) -> None:
    """1.0 of float16 would be 0.0078 of bfloat16."""
    caches = scene.caches
    chunk = scene.chunk.view(dtype)
    views = KVView(chunk, CHUNK_LAYOUT, heads=HEADS), scene.cache
    with refused(LayoutError, "float16", str(dtype)[6:], "reinterpret=True", watch=caches):
        copy_rows(*views, None, [*range(4, 12)])
    with refused(LayoutError, "reinterpret=True", watch=caches):
        scene.connector.to_gpu(chunk, caches, [4, 5, 6], end=3)
    copy_rows(*views, None, [*range(4, 12)], reinterpret=True).synchronize()
    AdaptiveConnector("cpu", reinterpret=True).to_gpu(chunk, caches, [1, 2, 3], end=3).synchronize()
    rows = chunk[1, 1].unflatten(1, (HEADS, -1))
    result = caches[1][1].flatten(0, 1).view(dtype)
    assert same(result[4:12], rows)
    assert same(result[1:4], rows[:3])
    other = KVView([x.view(dtype) for x in caches], KV_LAYOUT)
    with refused(LayoutError, "reinterpret=True", watch=caches):
        copy_blocks(scene.cache, other, [0], [1])
    copy_blocks(scene.cache, other, [0], [1], reinterpret=True).synchronize()
    assert same(caches[0][:, 0], caches[0][:, 1])


# Batches


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        *((True, fault) for fault in ("slot", "range", "meta", "grad", "twice", "overlap")),
        *((False, fault) for fault in ("slot", "range", "meta", "duplicate", "other shape")),
    ],
)
def test_a_bad_chunk_refuses_the_whole_batch(scene: Scene, store: bool, fault: str) -> None:
    # The first chunk is a separate set: it must not be moved before the others were judged.
    chunks = [dense(n) for n in (3, 4, 4)]
    slots = [*range(11)]
    starts = [0, 3, 7]
    ends = [3, 7, 11]
    error: Any = LayoutError
    if fault in ("slot", "duplicate", "other shape"):
        slots[9] = {"slot": SLOTS, "duplicate": slots[4], "other shape": slots[1]}[fault]
        error = SlotError
    elif fault == "range":
        ends[2] = 12
        error = SlotError
    elif fault == "grad":
        chunks[2].requires_grad_()
    elif fault == "twice":
        chunks[2] = chunks[1]
    elif fault == "overlap":
        chunks[1:] = [scene.chunk[:, :, 4:], scene.chunk[:, :, 1:5]]
    else:
        chunks[2] = chunks[2].to("meta")
    move = scene.connector.batched_from_gpu if store else scene.connector.batched_to_gpu
    with refused(error, watch=[*scene.memory, *chunks]):
        move(chunks, scene.caches, slots, starts, ends)


def test_a_batch_may_come_from_generators(scene: Scene) -> None:
    chunks = [dense(2), dense(2)]
    connector = scene.connector
    move: Any = connector.batched_from_gpu
    move(iter(chunks), scene.caches, [1, 2, 3, 4], iter([0, 2]), iter([2, 4])).synchronize()
    assert same(chunks[1][0, 0, 0], scene.caches[0][0, 0, 3].flatten())
