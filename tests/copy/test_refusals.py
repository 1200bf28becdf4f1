# SPDX-License-Identifier: Apache-2.0
"""What else must be refused with a sentence: odd tensors, odd arguments, odd backends."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.connector_cases import HEADS, make_caches, make_chunk
from support.guarded_memory import refused, same
from support.small_backends import small_backend

from portakv import (
    AdaptiveConnector,
    BackendUnavailable,
    CopyPlan,
    DeviceMismatch,
    Index,
    KVView,
    LayoutError,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_rows,
    register_backend,
)
from portakv.backends.base import Decision
from portakv.registry import registry


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


@pytest.mark.parametrize("used", [False, True])
def test_memory_that_was_freed_in_place_is_never_written_through(used: bool) -> None:
    caches, chunk = make_caches(), make_chunk(3)
    connector = AdaptiveConnector("cpu")
    connector.register_kv_caches(caches)
    slots = [20, 21, 22]
    if used:
        connector.to_gpu(chunk, slot_mapping=slots).synchronize()
    for cache in caches:
        cache.untyped_storage().resize_(16)
    with refused(LayoutError, "replaced", "register"):
        connector.to_gpu(chunk, slot_mapping=slots)


def test_tensors_whose_bytes_are_not_their_values() -> None:
    KVView(torch.zeros(3, 4, dtype=torch.complex64), "token dim")  # known before
    with refused(LayoutError, "conjugated", "resolve_conj"):
        KVView(torch.zeros(3, 4, dtype=torch.complex64).conj(), "token dim")


def test_tensors_without_memory() -> None:
    mode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode()
    with mode:
        fake = torch.zeros(3, 4)
    with refused(LayoutError, "without memory"):
        KVView(fake, "token dim")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16])
def test_rows_of_another_number_type_unless_their_bits_are_meant(dtype: torch.dtype) -> None:
    """1.0 of float16 would be 0.0078 of bfloat16."""
    caches, chunk = make_caches(), make_chunk(3).view(dtype)
    before = [cache.clone() for cache in caches]
    views = KVView(chunk, "chunk-2ltd", heads=HEADS), KVView(caches, "vllm-nhd")
    with refused(LayoutError, "float16", str(dtype)[6:], "reinterpret=True"):
        copy_rows(*views, None, [4, 5, 6])
    with refused(LayoutError, "reinterpret=True"):
        AdaptiveConnector("cpu").to_gpu(chunk, caches, [4, 5, 6])
    assert all(same(*pair) for pair in zip(caches, before, strict=True))
    copy_rows(*views, None, [4, 5, 6], reinterpret=True).synchronize()
    AdaptiveConnector("cpu", reinterpret=True).to_gpu(chunk, caches, [7, 8, 9]).synchronize()
    assert same(
        caches[1][1].flatten(0, 1)[4:10].view(dtype),
        chunk[1, 1].unflatten(1, (HEADS, -1)).repeat(2, 1, 1),
    )
    half, other = (KVView([x.view(d) for x in caches], "vllm-nhd") for d in (torch.float16, dtype))
    with refused(LayoutError, "reinterpret=True"):
        copy_blocks(half, other, [0], [1])
    copy_blocks(half, other, [0], [1], reinterpret=True).synchronize()
    assert same(caches[0][:, 0], caches[0][:, 1])


@pytest.mark.parametrize(("layer", "kv"), [(3000, 0), (-1, 0), (0, 2), (9, 1)])
def test_planes_that_are_not_there(layer: int, kv: int) -> None:
    view = KVView(make_caches(), "layer | kv block token head dim")
    with refused(LayoutError, "plane", "count from 0"):
        view.plane(layer, kv)


def test_a_chunk_layout_is_read_at_once() -> None:
    with pytest.raises(LayoutError, match="Unknown axis 'foo'"):
        AdaptiveConnector("cpu", chunk_layout="layer | foo")


def test_caches_nested_otherwise_are_other_caches() -> None:
    keys, values = torch.zeros(2, 6, 4, 2, 8), torch.zeros(2, 6, 4, 2, 8)
    pairs = [(keys[i], values[i]) for i in range(2)]
    connector = AdaptiveConnector("cpu", kv_layout="layer kv | block token head dim")
    connector.register_kv_caches(pairs)
    with refused(LayoutError, "container"):
        connector.from_gpu(torch.zeros(2, 2, 1, 16), [t for pair in pairs for t in pair], [0])


def test_memory_objects_of_a_batch_that_overlap() -> None:
    caches, whole = make_caches(), make_chunk(8)
    chunks = [whole[:, :, :5], whole[:, :, 3:8]]
    connector = AdaptiveConnector("cpu")
    with refused(LayoutError, "same memory", watch=(caches, whole)):
        connector.batched_from_gpu(chunks, caches, list(range(10)), [0, 5], [5, 10])


def test_a_slot_written_by_two_chunks_of_other_shapes() -> None:
    caches, chunks = make_caches(), [make_chunk(3), make_chunk(2)]
    connector = AdaptiveConnector("cpu")
    with refused(SlotError, "Slot 1 occurs 2 times", watch=(caches, chunks)):
        connector.batched_to_gpu(chunks, caches, [0, 1, 2, 1, 4], [0, 3], [3, 5])


def test_a_batch_may_come_from_generators() -> None:
    caches, chunks = make_caches(), [make_chunk(2), make_chunk(2)]
    connector: Any = AdaptiveConnector("cpu")
    connector.batched_from_gpu(
        (chunk for chunk in chunks), caches, [1, 2, 3, 4], iter([0, 2]), iter([2, 4])
    ).synchronize()
    assert torch.equal(
        chunks[1][0, 0, 0].view(torch.uint8), caches[0][0, 0, 3].flatten().view(torch.uint8)
    )


def test_arguments_that_are_no_views() -> None:
    view: Any = KVView(torch.zeros(3, 4), "token dim")
    none: Any = None
    calls: list[Any] = [
        lambda: copy_rows(none, view),
        lambda: copy_blocks(view, none, [0], [0]),
        lambda: CopyPlan(view, view),
    ]
    for call in calls:
        with refused(LayoutError, "asked", "expected"):
            call()
    with refused(SlotError, "steps -1"):
        CopyPlan(view.form, view.form, -1, 0)


@pytest.mark.parametrize("layers", [[0, 1], 1.0, "0"])
def test_slices_that_are_none(layers: Any) -> None:
    view = KVView(make_caches(), "layer | kv block token head dim")
    with refused(LayoutError, "layers=", "expected an integer"):
        view.slice(layers=layers)


def test_a_memory_obj_of_numbers() -> None:
    connector = AdaptiveConnector("cpu", chunk_layout="layer | kv token (head dim)")
    with refused(LayoutError, "holds a int"):
        connector.from_gpu([5, 6], make_caches(), [0])  # type: ignore[list-item]


def test_steps_of_any_integer_type() -> None:
    step: Any = np.int64(4)
    offset: Any = torch.tensor(1)
    assert Index([1], step=step, offset=offset).slots(2).tolist() == [5, 6]


# Backends


@pytest.mark.usefixtures("fresh")
def test_a_backend_that_no_pattern_fits_is_never_chosen_unasked() -> None:
    class Picky(small_backend("picky")):  # type: ignore[misc]
        def check(self, plan: CopyPlan) -> Decision:
            takes = plan.src.layers == 3
            return Decision(self.name, takes, "it takes three layers and nothing else")

    register_backend("picky", Picky)
    choice = registry.choose("cpu")
    assert choice.name == "reference"
    reason = next(d.reason for d in choice.trace if d.name == "picky")
    assert "could not be self-checked" in reason
    forced = registry.choose("cpu", "picky")
    assert forced.name == "picky"
    views = [KVView(torch.zeros(3, 5, 4), "layer token dim") for _ in "ab"]
    copy_rows(views[0], views[1], [1, 2], [3, 4], backend="picky").synchronize()
    narrow = [view.slice(layers=0) for view in views]
    with pytest.raises(Unsupported, match="three layers"):
        copy_rows(narrow[0], narrow[1], [1], [2], backend="picky")


@pytest.mark.usefixtures("fresh")
def test_launches_that_claim_no_threads_run_one_at_a_time() -> None:
    running, most = [], []

    class Lonely(small_backend("lonely", threads=False)):  # type: ignore[misc]
        def prepare(self, plan: CopyPlan) -> Any:
            launch = super().prepare(plan)

            def slow(*arguments: Any) -> None:
                running.append(1)
                most.append(len(running))
                time.sleep(0.005)
                launch(*arguments)
                running.pop()

            return slow

    register_backend("lonely", Lonely)
    caches = make_caches()
    connector = AdaptiveConnector("cpu", backend="lonely")
    connector.register_kv_caches(caches)
    calls = [
        threading.Thread(target=connector.from_gpu, args=(make_chunk(2), None, [1, 2]))
        for _ in range(8)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert max(most) == 1


@pytest.mark.usefixtures("fresh")
def test_a_vendor_that_exits_is_reported_like_any_other(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "leaver.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    register_backend("leaver", "leaver:Backend")
    found = {d.name: d.reason for d in registry.trace("cpu")}
    assert "SystemExit" in found["leaver"]
    assert registry.choose("cpu").name == "reference"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["", None, 3])
def test_names_that_are_none(name: Any) -> None:
    with refused(BackendUnavailable, "not empty"):
        register_backend(name, "some.where:Class")


@pytest.mark.parametrize("stream", [0, 140_000, "default"])
def test_streams_that_are_none(stream: Any) -> None:
    caches, chunk = make_caches(), make_chunk(2)
    views = KVView(caches, "vllm-nhd"), KVView(caches, "vllm-nhd")
    with refused(DeviceMismatch, f"stream={stream!r}", "a stream of torch"):
        AdaptiveConnector("cpu").from_gpu(chunk, caches, [0, 1], stream=stream)
    with refused(DeviceMismatch, f"stream={stream!r}"):
        copy_rows(*views, [0], [1], stream=stream)
    with refused(DeviceMismatch, f"stream={stream!r}"):
        copy_blocks(*views, [0], [1], stream=stream)
