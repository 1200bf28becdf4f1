# SPDX-License-Identifier: Apache-2.0
"""The library keeps to every claim of a backend in what it hands over."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any

import pytest
import torch
from support.connector_cases import DIM, HEADS, KV_LAYOUT, LAYERS, SIZE, caches, fresh, store
from support.guarded_memory import check_sentence, filled, same
from support.slot_cases import ended_well, forked
from support.small_backends import small_backend
from support.threads import run_threads
from support.waits import LIMIT

from portakv import (
    CopyPlan,
    Index,
    KVView,
    PortaKVError,
    Unsupported,
    copy_rows,
    register_backend,
)
from portakv.registry import prepared, registry
from portakv.registry.registry import turn

__all__ = ["caches", "fresh"]  # fixtures


@pytest.mark.parametrize("claimed", [torch.int32, torch.int64])
@pytest.mark.parametrize("passed", [torch.int32, torch.int64])
@pytest.mark.parametrize("place", ["host", "device"])
def test_ids_come_in_the_claimed_dtype_and_place(
    caches: list[torch.Tensor], claimed: torch.dtype, passed: torch.dtype, place: str
) -> None:
    backend = small_backend("choosy", index_on=place, index_dtypes=frozenset({claimed}))
    register_backend("choosy", backend)
    scattered = torch.tensor([3, 0, 1, 0, 2, 0], dtype=passed)[::2]
    chunk, wanted = store(caches, scattered, "choosy")
    assert same(chunk, wanted)
    passed_on = [ids for launch in backend.launches for ids in launch.ids()]
    assert {ids.dtype for ids in passed_on} == {claimed}
    assert all(ids.is_contiguous() and ids.device.type == "cpu" for ids in passed_on)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("step", [1, SIZE])
def test_negative_ids_reach_only_those_that_skip_them(
    caches: list[torch.Tensor], skips: bool, step: int
) -> None:
    backend = small_backend("skipper", by_runs=True, skips_negative=skips, guards=skips)
    register_backend("skipper", backend)
    chunk, wanted = store(caches, Index([3, -1, 1, -7, -1, 2], step=step), "skipper")
    assert same(chunk, wanted)
    launch = backend.launches[-1]
    assert bool((launch.ids()[0] < 0).any()) is skips
    assert launch.count == (6 if skips else 3) * step


@pytest.mark.simdev
@pytest.mark.parametrize("ids", [[3, -1], [3, 1]])
def test_ids_that_are_to_be_skipped_have_a_status_word(ids: list[int]) -> None:
    """A launch that picks a transfer strategy learns from it that the strategy must skip ids."""
    backend = small_backend("skipper", skips_negative=True)
    status_words = list[Any]()

    class Recording(backend):  # type: ignore[valid-type, misc]
        def prepare(self, plan: CopyPlan) -> Any:
            launch = super().prepare(plan)

            def recorded(src: KVView, dst: KVView, src_index: Index, *rest: Any) -> None:
                status_words.append(rest[-1])
                if src_index.ids is None or bool((src_index.ids >= 0).all()):
                    launch(src, dst, src_index, *rest)

            return recorded

    register_backend("skipper", Recording)
    src, dst = (KVView(torch.zeros(5, 1, 4, device="simdev"), "token head dim") for _ in "ab")
    copy_rows(src, dst, ids, [0, 2], backend="skipper").synchronize()
    assert (status_words[-1] is not None) == (-1 in ids)


@pytest.mark.parametrize("count", [22, 20, 3])
def test_head_and_tail_are_told_apart_by_who_carries_them_out(
    caches: list[torch.Tensor], count: int
) -> None:
    """A backend that skips negative ids and reads int32 takes the body, another the tail."""
    backend = small_backend(
        "bodies",
        by_runs=True,
        skips_negative=True,
        guards=True,
        index_dtypes=frozenset({torch.int32}),
        rejects=lambda plan: plan.unit == 1 and plan.src_step > 1,
    )
    register_backend("bodies", backend)
    chunk = filled((2, LAYERS, count, HEADS * DIM), poison=True)
    wanted = chunk.clone()
    table = Index([3, -1, 1, 0, 5, -1], step=SIZE, offset=1)
    for layer, cache in enumerate(caches):
        for position, slot in enumerate(table.slots(count).tolist()):
            if slot >= 0:
                wanted[:, layer, position] = cache.view(2, -1, HEADS * DIM)[:, slot]
    copy_rows(
        KVView(caches, KV_LAYOUT),
        KVView(chunk, "kv layer token (head dim)", heads=HEADS),
        table,
        count=count,
    ).synchronize()
    assert same(chunk, wanted)
    assert all(ids.dtype == torch.int32 for launch in backend.launches for ids in launch.ids())


def test_a_slot_that_int32_cannot_hold_is_not_narrowed() -> None:
    wide = filled((1, 1, 4)).expand(2**31 + 8, 1, 4)  # one row, seen as 2**31 + 8 slots
    chunk = filled((2, 1, 4), poison=True)
    backend = small_backend("narrow", index_dtypes=frozenset({torch.int32}))
    register_backend("narrow", backend)
    src = KVView(wide, "(block token) head dim", block_size=8)
    dst = KVView(chunk, "token head dim")
    try:
        copy_rows(src, dst, [2**31 + 1, 3]).synchronize()
    except PortaKVError as error:
        check_sentence(str(error), "int32")
    else:
        assert same(chunk, wide[:2].contiguous())
    assert not any(bool((ids < 0).any()) for launch in backend.launches for ids in launch.ids())


def test_a_backend_that_no_pattern_fits_is_never_chosen_unasked() -> None:
    register_backend("picky", small_backend("picky", rejects=lambda plan: plan.src.layers != 3))
    choice = registry.choose("cpu")
    assert choice.name == "reference"
    reason = next(d.reason for d in choice.trace if d.name == "picky")
    assert "could not be self-checked" in reason
    assert registry.choose("cpu", "picky").name == "picky"
    src, dst = (KVView(torch.zeros(3, 5, 4), "layer token dim") for _ in "ab")
    copy_rows(src, dst, [1, 2], [3, 4], backend="picky").synchronize()
    with pytest.raises(Unsupported, match="check dislikes this plan"):
        copy_rows(src.slice(layers=0), dst.slice(layers=0), [1], [2], backend="picky")


def test_launches_that_claim_no_threads_run_one_at_a_time(caches: list[torch.Tensor]) -> None:
    running = []
    most = 0

    def slow(view: KVView) -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        time.sleep(0.005)
        running.pop()

    register_backend("lonely", small_backend("lonely", threads=False, spoil=slow))
    run_threads(lambda _: store(caches, [1, 2], "lonely"), range(8))
    assert most == 1


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_a_launch_of_the_parent_holds_up_no_forked_process(
    caches: list[torch.Tensor], guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread is inside of a launch during the fork."""
    inside = threading.Event()
    leave = threading.Event()
    slow = list[None]()

    def spoil(view: KVView) -> None:
        if slow:
            inside.set()
            leave.wait(LIMIT)

    register_backend("lonely", small_backend("lonely", threads=False, spoil=spoil))
    store(caches, [1, 2], "lonely")
    if not guard:
        held = turn(False)
        monkeypatch.setattr(prepared, "turn", lambda threads: held)

    def work() -> None:
        slow.clear()
        if not guard:
            signal.alarm(1)
        store(caches, [1, 2], "lonely")

    slow.append(None)
    thread = threading.Thread(target=store, args=(caches, [1, 2], "lonely"))
    thread.start()
    assert inside.wait(LIMIT)
    try:
        assert ended_well(forked(work)) is guard
    finally:
        leave.set()
        thread.join()


@pytest.mark.simdev
def test_no_warning_on_a_device_that_no_backend_is_made_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    assert registry.choose("simdev").name == "reference"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
