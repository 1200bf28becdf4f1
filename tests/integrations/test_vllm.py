# SPDX-License-Identifier: Apache-2.0
"""The integration inside the real vLLM, which `.ci/plugs` installs in a separate environment."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; see .ci/plugs", allow_module_level=True)

from support.ambient import STATES, State
from support.engine_process import accelerators, answer, check_in_workers, defaults, in_a_process
from support.guarded_memory import check_sentence, refused
from support.vllm_cases import Caches, device_spec, host_spec, offloading_config
from torch.cuda import _sleep
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.cpu import spec as cpu_spec
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from portakv import (
    BackendUnavailable,
    BlockTransfer,
    CopyOptions,
    InvalidTerms,
    LayoutError,
    SlotError,
    TransferError,
    copy_rows,
    integrations,
)
from portakv.integrations import IntegrationError
from portakv.integrations.vllm import offloading
from portakv.integrations.vllm.caches import REFUSED, SERVED, groups_of
from portakv.integrations.vllm.offloading import PortaKVOffloadingSpec, PortaKVOffloadingWorker
from portakv.serving import Group
from portakv_conformance import simdev

NEW = hasattr(cpu_spec, "SharedOffloadRegion")
Make = Callable[..., PortaKVOffloadingWorker]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make workers, and shut them down."""
    made: list[PortaKVOffloadingWorker] = []

    def worker(caches: Caches, blocks_per_chunk: int = 1, chunks: int = 9, **options: Any) -> Any:
        made.append(
            PortaKVOffloadingWorker(caches.canonical(), blocks_per_chunk, chunks, **options)
        )
        return made[-1]

    yield worker
    for each in made:
        each.shutdown()


def finish(worker: Any, jobs: set[int]) -> Any:
    worker.wait(jobs)
    return worker.get_finished()


def hosts(worker: PortaKVOffloadingWorker) -> list[torch.Tensor]:
    return [part.host.tensors[0] for parts in worker._groups for part in parts]


def settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- vLLM's own factory, spec and manager ---------------------------------------------------------


@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
def test_store_lookup_and_load(device: torch.device, blocks_per_chunk: int) -> None:
    """The manager names chunks and the worker moves them, as in the connector."""
    caches = Caches(device, [256, 256, 96], [[0, 1, 2]])
    spec = OffloadingSpecFactory.create_spec(offloading_config(608, blocks_per_chunk, 8))
    assert type(spec) is PortaKVOffloadingSpec
    manager = spec.get_manager()
    worker = spec.get_worker(caches.canonical())
    assert isinstance(manager, CPUOffloadingManager)
    assert spec.get_worker(caches.canonical()) is worker
    context = base.ReqContext(req_id="request")
    manager.on_new_request(context)
    keys = [base.make_offload_key(bytes([n]) * 8, 0) for n in range(2)]
    assert manager.lookup(keys[0], context) is base.LookupResult.MISS

    went = list(range(1, 1 + 2 * blocks_per_chunk))
    planned = manager.prepare_store(keys, context)
    assert planned is not None
    assert worker.submit_store(1, device_spec([went], [0]), planned.store_spec)
    (result,) = finish(worker, {1})
    assert (result.job_id, result.success) == (1, True)
    assert result.transfer_size == 608 * len(went)
    assert result.transfer_time >= 0
    manager.complete_store(keys, context)
    assert manager.lookup(keys[1], context) is base.LookupResult.HIT

    caches.lose()
    came = list(range(12, 12 - 2 * blocks_per_chunk, -1))
    assert worker.submit_load(2, manager.prepare_load(keys, context), device_spec([came], [0]))
    assert [each.job_id for each in finish(worker, {2})] == [2]
    manager.complete_load(keys, context)
    caches.expect([came], [went])
    worker.shutdown()


ORDERS = ["LBNHC", "LBHNC"] if NEW else []


@pytest.mark.parametrize("order", ORDERS)
def test_what_the_connector_does(device: torch.device, order: str) -> None:
    """vLLM's own caches, layers and groups, and the connector's calls of the worker: stores wait
    for the next step, or for a preemption, and loads are reported when they have ended."""
    connector, common, specs, utils = (
        importlib.import_module(f"vllm.{name}")
        for name in (
            "distributed.kv_transfer.kv_connector.v1.offloading.worker",
            "distributed.kv_transfer.kv_connector.v1.offloading.common",
            "v1.kv_cache_interface",
            "v1.worker.utils",
        )
    )
    heads = {"num_kv_heads": 2, "head_size": 16, "dtype": torch.bfloat16}
    full = specs.FullAttentionSpec(block_size=16, **heads)
    latent = specs.MLAAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
    )
    page = full.page_size_bytes
    blocks = 13
    assert latent.page_size_bytes == page
    names = ["full.0", "full.1"], ["latent.0", "latent.1"]
    config = specs.KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            specs.KVCacheTensor(
                size=2 * page * blocks, layers=each, layer_stride=page * blocks, block_stride=page
            )
            for each in names
        ],
        kv_cache_groups=[
            specs.KVCacheGroupSpec(layer_names=each, kv_cache_spec=spec)
            for each, spec in zip(names, (full, latent), strict=True)
        ],
    )
    layout = specs.KVCacheLayout[order]
    caches = utils.allocate_kv_cache(config, device, layout, [16, 16])
    for each in caches.values():
        each.normal_()
    before = {name: each.cpu().clone() for name, each in caches.items()}
    spec = OffloadingSpecFactory.create_spec(offloading_config(2 * page, 2, 8))
    parallel = SimpleNamespace(  # two workers without tensor parallelism: nothing is canonical
        tensor_parallel_size=1, prefill_context_parallel_size=1, world_size=2
    )
    worker = connector.OffloadingConnectorWorker(
        spec, SimpleNamespace(parallel_config=parallel), config
    )
    worker.register_kv_caches(caches)

    def job(src: Any, dst: Any) -> Any:
        return common.TransferJob(req_id="request", src_spec=src, dst_spec=dst)

    def jobs(loads: dict[int, Any], stores: dict[int, Any], flush: set[int] | None = None) -> Any:
        return common.OffloadingConnectorMetadata(
            load_jobs=loads, store_jobs=stores, jobs_to_flush=flush
        )

    some = [[1, 2, 3], [4, 5]]
    more = [[6], [7]]
    first = jobs({}, {1: job(device_spec(some, [0, 0]), host_spec([0, 1, 2]))})
    worker.start_kv_transfers(first)
    worker.prepare_store_kv(first)
    preempted = jobs({}, {2: job(device_spec(more, [0, 0]), host_spec([3, 4]))}, {2})
    worker.handle_preemptions(preempted)
    for each in caches.values():  # those blocks may be written now
        each.zero_()
    settle(device)
    worker.worker.wait({1})
    assert worker.get_finished(set()) == (set(), set())
    assert worker.build_connector_worker_meta().completed_jobs == {1: 1, 2: 1}
    into = device_spec([[9], [10, 8]], [0, 0])
    worker.start_kv_transfers(jobs({3: job(host_spec([3, 2]), into)}, {}))
    worker.worker.wait({3})
    assert worker.get_finished(set()) == (set(), {"request"})
    for group, (new, old) in zip(names, (([9], [6]), ([10, 8], [4, 5])), strict=True):
        for name in group:
            blocked = specs.group_kernel_blocks(caches[name], blocks).cpu()
            assert torch.equal(blocked[new], specs.group_kernel_blocks(before[name], blocks)[old])
    worker.shutdown()


# --- What is moved --------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
@pytest.mark.parametrize(
    ("pages", "groups", "gap"),
    [
        ([64], [[0]], 0),
        ([512] * 5, [[0, 1, 2, 3, 4]], 0),
        ([512, 96, 512, 96], [[0, 1], [2, 3]], 0),
        ([512, 512], [[0, 1], [0], [1]], 0),
        ([512, 512], [[(0, 400), (1, 400)], [(0, 33), (1, 512)]], 0),
        ([768, 768], [[0, 1]], 256),
        ([4160], [[0], [0], [0]], 0),
    ],
    ids=["one", "layers", "groups", "overlaid", "padded", "apart", "packed"],
)
def test_every_byte_comes_back(
    device: torch.device,
    make: Make,
    pages: Sequence[int],
    groups: Any,
    gap: int,
    blocks_per_chunk: int,
) -> None:
    """Blocks of each group go into chunks of their own, and come back elsewhere."""
    caches = Caches(device, pages, groups, gap=gap)
    worker = make(caches, blocks_per_chunk, 3 * 4)
    went = [[g, g + 3, g + 6] for g in range(len(groups))]
    came = [[12 - g, 9 - g, 6 - g] for g in range(len(groups))]
    each = -(-3 // blocks_per_chunk)
    chunks = list(range(11, 11 - each * len(groups), -1))
    firsts = [0] * len(groups)
    worker.submit_store(1, device_spec(went, firsts), host_spec(chunks))
    moved = sum(3 * width for group in caches.groups for _, width in group)
    assert [x.transfer_size for x in finish(worker, {1})] == [moved]
    caches.lose()
    worker.submit_load(2, host_spec(chunks), device_spec(came, firsts))
    finish(worker, {2})
    caches.expect(came, went)


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_first_and_last_chunk_in_part(
    device: torch.device, make: Make, first: int, count: int
) -> None:
    """A request's blocks move from ``first`` on, in chunks of three; the rows around them stay."""
    caches = Caches(device, [128, 128], [[0], [1]])
    worker = make(caches, 3, 9)
    all_of_it = [list(range(12)), []]
    worker.submit_store(1, device_spec(all_of_it, [0, 0]), host_spec([4, 2, 7, 0]))
    went = list(range(20 - first - count, 20 - first))
    went = [block % 13 for block in went]
    used = -(-(first % 3 + count) // 3)
    chunks = [4, 2, 7, 0][first // 3 :][:used]
    worker.submit_store(2, device_spec([went, []], [first, 5]), host_spec(chunks))
    finish(worker, {1, 2})
    caches.lose()
    worker.submit_load(3, host_spec([4, 2, 7, 0]), device_spec(all_of_it, [0, 0]))
    finish(worker, {3})
    stored = list(range(12))
    stored[first : first + count] = went
    caches.expect(all_of_it, [stored, []])
    caches.lose()
    worker.submit_load(
        4, host_spec(chunks), device_spec([[12, 3, 5, 8, 0][:count], []], [first, 0])
    )
    finish(worker, {4})
    caches.expect([[12, 3, 5, 8, 0][:count], []], [went, []])


def test_a_group_without_blocks_is_skipped(device: torch.device, make: Make) -> None:
    caches = Caches(device, [128, 128, 128], [[0], [1], [2]])
    worker = make(caches, 2, 9)
    went = [[4, 5, 6], [], [1]]
    firsts = [3, 8, 1]
    worker.submit_store(1, device_spec(went, firsts), host_spec([3, 8, 5]))
    (result,) = finish(worker, {1})
    assert result.transfer_size == 4 * 128
    caches.lose()
    worker.submit_load(2, host_spec([3, 8, 5]), device_spec(went, firsts))
    finish(worker, {2})
    caches.expect(went, went)


def test_a_job_without_blocks_ends(make: Make) -> None:
    worker = make(Caches(torch.device("cpu"), [64], [[0]]))
    worker.submit_store(5, device_spec([[]], [0]), host_spec([]))
    assert [(x.job_id, x.transfer_size) for x in worker.get_finished()] == [(5, 0)]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_whatever_torch_was_told_before(device: torch.device, make: Make, state: State) -> None:
    caches = Caches(device, [512, 96], [[0], [1]])
    with state(device):
        worker = make(caches, 2, 9)
        worker.submit_store(1, device_spec([[1, 2, 3], [4]], [1, 0]), host_spec([7, 0, 3]))
        finish(worker, {1})
        caches.lose()
        worker.submit_load(2, host_spec([7, 0, 3]), device_spec([[4, 6, 9], [0]], [1, 0]))
        finish(worker, {2})
    caches.expect([[4, 6, 9], [0]], [[1, 2, 3], [4]])


# --- Order ----------------------------------------------------------------------------------------


def delay(device: torch.device, stream: torch.Stream | None = None) -> None:
    """Keep a stream busy: the current one, or another."""
    stream = stream or torch.accelerator.current_stream(device)
    if device.type == "cuda":
        with stream:
            _sleep(4_000_000_000)
    else:
        simdev.delay(stream, 200)


def test_both_directions_wait_for_the_model(accelerator: torch.device, make: Make) -> None:
    """A store must not overtake the writing of its blocks, nor a load their zeroing."""
    caches = Caches(accelerator, [256, 256], [[0, 1]])
    worker = make(caches)
    worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    finish(worker, {1})
    settle(accelerator)
    delay(accelerator)
    caches.tensors[0][7] = 5
    worker.submit_store(2, device_spec([[7]], [0]), host_spec([2]))
    finish(worker, {2})
    delay(accelerator)
    caches.lose()
    worker.submit_load(3, host_spec([1]), device_spec([[9]], [0]))
    worker.submit_load(4, host_spec([2]), device_spec([[4]], [0]))
    finish(worker, {3, 4})
    caches.before[0][7] = 5
    caches.expect([[9, 4]], [[3, 7]])


def test_submitting_and_asking_never_wait(accelerator: torch.device, make: Make) -> None:
    caches = Caches(accelerator, [256], [[0]])
    worker = make(caches)
    worker.submit_store(1, device_spec([[0]], [0]), host_spec([0]))
    finish(worker, {1})
    settle(accelerator)
    delay(accelerator)
    worker.submit_store(2, device_spec([[3]], [0]), host_spec([1]))
    worker.submit_store(3, device_spec([[4]], [0]), host_spec([2]))
    assert worker.get_finished() == []
    worker.wait({3})
    assert [each.job_id for each in worker.get_finished()] == [2, 3]


def test_expedited_loads_pass_the_others(accelerator: torch.device, make: Make) -> None:
    caches = Caches(accelerator, [256], [[0]])
    worker = make(caches)
    worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    worker.submit_load(0, host_spec([1]), device_spec([[7]], [0]))  # a kernel is loaded once
    finish(worker, {0, 1})
    settle(accelerator)
    delay(accelerator, worker._load.stream)
    worker.submit_load(2, host_spec([1]), device_spec([[5]], [0]))
    worker.submit_load(3, host_spec([1]), device_spec([[6]], [0]), expedited=True)
    worker.wait({3})
    assert [each.job_id for each in worker.get_finished()] == [3]
    worker.wait({2})
    assert [each.job_id for each in worker.get_finished()] == [2]


def test_preempted_blocks_are_waited_for(accelerator: torch.device, make: Make) -> None:
    """After `wait` the blocks may be written by the next request."""
    caches = Caches(accelerator, [256], [[0]])
    worker = make(caches)
    settle(accelerator)
    delay(accelerator)
    worker.submit_store(1, device_spec([[3, 4]], [0]), host_spec([1, 2]))
    worker.wait({1, 99})
    with torch.Stream(accelerator):  # which no copy follows
        caches.lose()
    settle(accelerator)
    worker.submit_load(2, host_spec([1, 2]), device_spec([[8, 9]], [0]))
    finish(worker, {2})
    caches.expect([[8, 9]], [[3, 4]])


def test_another_thread_may_ask(device: torch.device, make: Make) -> None:
    """Each result is given once, in the order of its direction."""
    caches = Caches(device, [64], [[0]])
    worker = make(caches, 1, 9)
    taken: list[list[int]] = [[], []]
    stop = threading.Event()

    def take(job_ids: list[int]) -> None:
        while not stop.is_set():
            job_ids += [each.job_id for each in worker.get_finished()]

    threads = [threading.Thread(target=take, args=(job_ids,)) for job_ids in taken]
    for thread in threads:
        thread.start()
    for job in range(60):
        worker.submit_store(job, device_spec([[job % 13]], [0]), host_spec([job % 9]))
    worker.wait(set(range(60)))
    while sum(map(len, taken)) < 60:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(60))
    assert all(job_ids == sorted(job_ids) for job_ids in taken)


# --- Errors at submit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "firsts", "chunks", "messages"),
    [
        ([[3], [13]], [0, 0], [0, 1], ("slot 13", "13 slots")),
        ([[3], [-1]], [0, 0], [0, 1], ("-1",)),
        ([[3], [4]], [0, 0], [0, 4], ("id 4", "8 slots")),
        ([[3], [4]], [0, 0], [0, -2], ("-2",)),
        ([[3], [4]], [0, 0], [0, 1, 2], ("3 chunks", "2 chunks of 2")),
        ([[3, 4], [4]], [1, 0], [0, 1], ("2 chunks", "3 chunks of 2")),
        ([[3]], [0], [0], ("2 groups",)),
        ([[1, 2, 3, 4], [4]], [0, 0], [1, 1, 0], ("2 times",)),
    ],
    ids=["block", "negative block", "chunk", "negative chunk", "more", "fewer", "groups", "twice"],
)
def test_bad_stores_are_refused_and_move_nothing(
    device: torch.device,
    make: Make,
    blocks: Any,
    firsts: list[int],
    chunks: list[int],
    messages: tuple[str, ...],
) -> None:
    worker = make(Caches(device, [64, 64], [[0], [1]]), 2, 4)
    settle(device)
    with refused(SlotError, *messages, watch=hosts(worker)):
        worker.submit_store(1, device_spec(blocks, firsts), host_spec(chunks))
    assert worker.get_finished() == []


@pytest.mark.parametrize(
    ("blocks", "message"), [([[3, 4], [5, 13]], "slot 13"), ([[3, 4], [5, 5]], "2 times")]
)
def test_bad_loads_are_refused_and_move_nothing(
    device: torch.device, make: Make, blocks: Any, message: str
) -> None:
    caches = Caches(device, [64, 64], [[0], [1]])
    worker = make(caches, 2, 4)
    with refused(SlotError, message, watch=caches.tensors):
        worker.submit_load(1, host_spec([0, 1]), device_spec(blocks, [0, 0]))


def test_two_groups_in_one_tensor_write_no_block_twice(device: torch.device, make: Make) -> None:
    caches = Caches(device, [64, 64], [[0, 1], [(0, 48)]])
    worker = make(caches)
    worker.submit_store(1, device_spec([[3], [3]], [0, 0]), host_spec([0, 1]))  # read twice
    finish(worker, {1})
    both = device_spec([[5, 4], [6, 5]], [0, 0])
    with refused(SlotError, "5 in its destination", "(0, 1)", watch=caches.tensors):
        worker.submit_load(2, host_spec([0, 1, 2, 3]), both)
    with refused(SlotError, "2 in its destination", "chunk"):
        worker.submit_store(3, both, host_spec([0, 2, 2, 1]))


def test_a_refused_job_leaves_no_copy_under_way(accelerator: torch.device, make: Make) -> None:
    """The first copy of a job has ended if the second one is refused, as no job would report it."""
    caches = Caches(accelerator, [256, 96], [[0, 1]])
    worker = make(caches)
    worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    finish(worker, {1})
    settle(accelerator)
    caches.tensors[1].untyped_storage().resize_(0)
    delay(accelerator)
    with refused(LayoutError, "replaced"):
        worker.submit_load(2, host_spec([1]), device_spec([[5]], [0]))
    with torch.Stream(accelerator):  # which no copy follows
        assert torch.equal(caches.tensors[0][5].cpu(), caches.before[0][3])
    assert worker.get_finished() == []


def test_a_job_under_way_is_not_submitted_again(accelerator: torch.device, make: Make) -> None:
    worker = make(Caches(accelerator, [64], [[0]]))
    delay(accelerator)
    worker.submit_store(7, device_spec([[3]], [0]), host_spec([1]))
    with refused(IntegrationError, "Job 7"):
        worker.submit_load(7, host_spec([2]), device_spec([[4]], [0]))
    finish(worker, {7})
    worker.submit_store(7, device_spec([[3]], [0]), host_spec([1]))  # the number is free again


def test_shutdown_waits_and_is_the_end(device: torch.device, make: Make) -> None:
    caches = Caches(device, [64], [[0]])
    worker = make(caches)
    host = hosts(worker)[0]
    if device.type != "cpu":
        delay(device)
    worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    worker.shutdown()
    assert torch.equal(host[1].flatten(), caches.before[0][3])
    assert worker.get_finished() == []
    with refused(IntegrationError, "Job 2", "shutdown"):
        worker.submit_store(2, device_spec([[3]], [0]), host_spec([1]))
    worker.shutdown()


def test_shutdown_waits_for_all_jobs_if_one_failed(accelerator: torch.device, make: Make) -> None:
    """Else a copy would go on into memory that was given back."""
    caches = Caches(accelerator, [64], [[0]])
    worker = make(caches)
    host = hosts(worker)[0]
    gone = []
    worker._region = SimpleNamespace(cleanup=lambda: gone.append(host[1].clone()))
    worker.submit_store(1, device_spec([[2]], [0]), host_spec([0]))
    worker._store.jobs[1].transfer.completions[0].error = TransferError("Job 1 failed.")
    settle(accelerator)
    delay(accelerator)
    worker.submit_store(2, device_spec([[3]], [0]), host_spec([1]))
    with pytest.raises(TransferError, match="Job 1 failed"):
        worker.shutdown()
    assert torch.equal(gone[0].flatten(), caches.before[0][3])


def test_a_job_that_failed_is_an_error_once_and_the_others_are_reported(
    accelerator: torch.device, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make(Caches(accelerator, [64], [[0]]))
    worker.submit_store(1, device_spec([[2]], [0]), host_spec([0]))

    def fail(*sides: Any, **terms: Any) -> BlockTransfer:
        failed = copy_rows(*sides, **terms)
        failed.completions[0].error = TransferError("Job 2 failed.")
        return failed

    with monkeypatch.context() as patch:
        patch.setattr("portakv.integrations.vllm.offloading.copy_rows", fail)
        worker.submit_load(2, host_spec([0]), device_spec([[3]], [0]))
    worker.submit_load(3, host_spec([0]), device_spec([[4]], [0]))
    settle(accelerator)
    with pytest.raises(TransferError, match="Job 2 failed"):
        worker.get_finished()
    assert [each.job_id for each in worker.get_finished()] == [1, 3]
    assert worker.get_finished() == []


def test_results_may_be_asked_for_during_shutdown(make: Make) -> None:
    """Another thread may request them; each job ends in one of the threads."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            worker = make(Caches(torch.device("cpu"), [64], [[0]]))
            for job in range(30):
                worker.submit_store(job, device_spec([[job % 13]], [0]), host_spec([job % 9]))
            with ThreadPoolExecutor() as pool:
                futures = [pool.submit(worker.get_finished) for _ in range(3)]
                worker.shutdown()
            job_ids = [each.job_id for one in futures for each in one.result()]
            assert len(job_ids) == len({*job_ids})
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("shape", [(13,), (13, 4, 16)])
def test_caches_that_were_never_seen(shape: tuple[int, ...], make: Make) -> None:
    caches = Caches(torch.device("cpu"), [64], [[0]])
    caches.tensors = [odd := torch.zeros(shape, dtype=torch.int8)]
    with refused(LayoutError, f"shape {shape}, strides {odd.stride()}", "[blocks, page]"):
        make(caches)


@pytest.mark.parametrize(
    ("pages", "groups", "blocks"), [([], [[]], 1), ([64], [], 1), ([64], [[0]], 0)]
)
def test_nothing_to_move_at_all(pages: Any, groups: Any, blocks: int, make: Make) -> None:
    messages = f"{len(pages)} tensors, {len(groups)} groups", f"{blocks} blocks"
    with refused(LayoutError, *messages):
        make(Caches(torch.device("cpu"), pages, groups), blocks)


@pytest.mark.parametrize("ref", [(1, 64), (-1, 64), (0, 65), (0, 0)])
def test_a_group_of_pages_that_no_tensor_has(ref: tuple[int, int], make: Make) -> None:
    caches = Caches(torch.device("cpu"), [64], [[0]])
    caches.groups = [[ref]]
    with refused(LayoutError, f"pages of {ref[1]} bytes in tensor {ref[0]}", "1 tensors"):
        make(caches)


def test_a_group_without_tensors(device: torch.device, make: Make) -> None:
    """Its blocks have no bytes; those of the others are moved."""
    caches = Caches(device, [64], [[], [0]])
    worker = make(caches)
    went = [[1, 2], [3]]
    came = [[4, 6], [5]]
    worker.submit_store(1, device_spec(went, [0, 0]), host_spec([0, 1, 2]))
    assert [each.transfer_size for each in finish(worker, {1})] == [64]
    caches.lose()
    worker.submit_load(2, host_spec([0, 1, 2]), device_spec(came, [0, 0]))
    finish(worker, {2})
    caches.expect(came, went)


def test_a_device_without_a_backend(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = Caches(torch.device("cpu"), [64], [[0]])
    worker = make(caches)
    monkeypatch.setenv("PORTAKV_BACKEND", "cuda")
    with refused(BackendUnavailable, "cpu", watch=caches.tensors):
        worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    assert worker.get_finished() == []


def test_caches_that_were_made_again(make: Make) -> None:
    """A worker lets go of them with its shutdown, and the next one has others."""
    for seed in range(3):
        memory = np.full((13, 64), seed, dtype=np.int8)
        gone = weakref.ref(memory)
        caches = Caches(torch.device("cpu"), [64], [[0]])
        caches.tensors = [torch.from_numpy(memory)]
        caches.before = [torch.from_numpy(memory + 0)]
        worker = PortaKVOffloadingWorker(caches.canonical(), 1, 9)
        worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
        worker.submit_load(2, host_spec([1]), device_spec([[5]], [0]))
        assert len(finish(worker, {1, 2})) == 2
        worker.shutdown()
        del caches, memory
        gc.collect()
        assert gone() is None


def test_no_room_for_one_chunk(make: Make) -> None:
    """vLLM starts all the same, and its manager stores nothing."""
    worker = make(Caches(torch.device("cpu"), [64], [[0]]), 3, 0)
    with pytest.raises(SlotError):
        worker.submit_store(1, device_spec([[3]], [0]), host_spec([0]))


# --- Configuration --------------------------------------------------------------------------------


def test_terms_come_from_the_configuration(device: torch.device) -> None:
    caches = Caches(device, [64], [[0]])
    terms: dict[str, Any] = {"overlap": "idle"}
    spec = OffloadingSpecFactory.create_spec(offloading_config(64, 1, 4, portakv=terms))
    worker = spec.get_worker(caches.canonical())
    assert worker._load.options == CopyOptions(**terms)
    worker.submit_store(1, device_spec([[3]], [0]), host_spec([1]))
    assert len(finish(worker, {1})) == 1
    worker.shutdown()


@pytest.mark.parametrize("terms", [{"detached": True}, "idle", ["overlap"]])
def test_other_terms_are_refused(terms: Any) -> None:
    with refused(InvalidTerms, "portakv=", "max_thread_blocks"):
        OffloadingSpecFactory.create_spec(offloading_config(64, 1, 4, portakv=terms))


@pytest.mark.skipif(not NEW, reason="0.26 has no canonical layout")
def test_a_canonical_layout_is_refused() -> None:
    with refused(IntegrationError, "canonical_layout"):
        OffloadingSpecFactory.create_spec(offloading_config(64, 1, 4, canonical_layout=True))


def test_the_factory_refuses_a_release_outside_the_matrix() -> None:
    """It refuses at the start, with both versions; other specs of that release stay vLLM's."""
    code = """
        from importlib import metadata
        real = metadata.version
        metadata.version = lambda name: "0.25.0" if name == "vllm" else real(name)
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory
        print(OffloadingSpecFactory.get_spec_cls({}).__name__)
        where = {"spec_module_path": "portakv.integrations.vllm"}
        OffloadingSpecFactory.get_spec_cls({"spec_name": "PortaKVOffloadingSpec"} | where)
    """
    done = in_a_process(code)
    assert done.stdout.strip().splitlines()[-1] == "CPUOffloadingSpec"
    message = done.stderr.strip().splitlines()[-1]
    assert "IntegrationError" in message
    check_sentence(message.partition(": ")[2], "vllm 0.25.0", "PortaKV 0.")


def test_the_installed_release_is_in_the_matrix() -> None:
    assert integrations.why_not("vllm") is None


# --- The memory that workers share ----------------------------------------------------------------


class Sharing(PortaKVOffloadingSpec):
    """Use a shared region on any platform, as on CUDA."""

    def _uses_shared_region(self) -> bool:
        return True


@pytest.mark.skipif(not NEW, reason="0.26 shares none")
def test_workers_share_one_region(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's own region, as on CUDA: laid out as vLLM lays it out, and given back at the end."""
    monkeypatch.setattr(cpu_spec, "_all_workers_barrier", lambda: None)
    caches = Caches(device, [256, 96], [[0], [0, 1]])
    spec = Sharing(offloading_config(352, 3, 8))
    worker = spec.get_worker(caches.canonical())
    region = worker._region
    went = [[4, 5, 6, 7], [1]]
    worker.submit_store(1, device_spec(went, [2, 0]), host_spec([3, 6, 5]))
    finish(worker, {1})
    rows = region.base_tensor.view(-1, region._row_stride)
    assert torch.equal(rows[3, 512:768], caches.before[0][4])
    assert torch.equal(rows[6, :256], caches.before[0][5])
    assert torch.equal(rows[5, 768:864], caches.before[1][1])
    del rows
    caches.lose()
    worker.submit_load(2, host_spec([3, 6, 5]), device_spec(went, [2, 0]))
    finish(worker, {2})
    caches.expect(went, went)
    worker.submit_store(3, device_spec(went, [2, 0]), host_spec([3, 6, 5]))
    with caplog.at_level(logging.WARNING):
        worker.shutdown()
    assert region.mmap_obj is None  # nothing held it
    assert "mapped" not in caplog.text


@pytest.mark.skipif(not NEW, reason="0.26 shares none")
def test_registrations_of_a_region_are_adopted() -> None:
    """Copies are cut where vLLM cut its registrations."""
    region = cpu_spec.SharedOffloadRegion("portakv-boundaries", 6, 0, 4096, 192, lambda: None)
    begin = region.base_tensor.data_ptr()
    region.pinned_addresses = [begin, begin + 2 * 4096, begin + 4 * 4096]
    adopted = offloading._adopt(region)
    assert [nbytes for _, nbytes in adopted.pieces] == [8192] * 3
    adopted.close()
    region.cleanup()


# --- Whole processes ------------------------------------------------------------------------------

PROCESS = """
import torch
{before}
from support.vllm_cases import Caches, device_spec, host_spec, offloading_config
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

def made(page, device="cpu"):
    caches = Caches(torch.device(device), [page, page], [[0, 1]])
    spec = OffloadingSpecFactory.create_spec(offloading_config(2 * page, 2, 8))
    return caches, spec.get_worker(caches.canonical())

def judge(*engines):
    for caches, worker in engines:
        worker.submit_store(1, device_spec([[1, 2, 3]], [0]), host_spec([5, 2]))
    for caches, worker in engines:
        worker.wait({{1}})
        caches.lose()
        worker.submit_load(2, host_spec([5, 2]), device_spec([[7, 8, 9]], [0]))
    for caches, worker in engines:
        worker.wait({{2}})
        caches.expect([[7, 8, 9]], [[1, 2, 3]])
        assert [each.job_id for each in worker.get_finished()] == [1, 2]
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta'); torch.set_default_dtype(torch.bfloat16)",
    ],
    ids=["dtype", "both"],
)
def test_defaults_of_torch_that_were_set_before_the_first_use(setting: str) -> None:
    before = "torch.set_default_dtype(torch.bfloat16)"
    code = PROCESS.format(before=before) + f"engine = made(256)\n{setting}\njudge(engine)"
    assert answer(f"{code}\nprint('right')") == "right"


@accelerators
def test_an_accelerator_that_is_the_default_device(name: str) -> None:
    code = f"{PROCESS.format(before='')}{defaults(name)}judge(made(256, {name!r}))\nprint('right')"
    assert answer(code) == "right"


def test_in_worker_processes() -> None:
    code = PROCESS.format(before="") + "def work():\n    judge(made(256))\n"
    check_in_workers(code)


def test_two_engines_in_one_process() -> None:
    """Two of vLLM's run alongside a cache of transformers."""
    code = """
from portakv.integrations.transformers import PortaKVLayer
layer, rows = PortaKVLayer(), torch.randn(2, 1, 2, 9, 16)
layer.update(*rows)
layer.offload()
judge(made(256), made(96))
layer.land()
assert torch.equal(layer.keys, rows[0])
print("right")
"""
    assert answer(PROCESS.format(before="") + code) == "right"


def test_every_kind_of_layers_is_served_or_refused_by_a_reason() -> None:
    """A kind that a new release brings needs an entry in one of both tables."""
    specs = importlib.import_module("vllm.v1.kv_cache_interface")
    kinds = {
        name
        for name, each in vars(specs).items()
        if isinstance(each, type) and issubclass(each, specs.KVCacheSpec)
    }
    abstract = {"KVCacheSpec", "AttentionSpec", "UniformTypeKVCacheSpecs"}
    assert kinds - abstract - {*SERVED} - {*REFUSED} == set()


def test_windows_of_latent_rows_are_served_but_those_of_deepseek_v4() -> None:
    specs = importlib.import_module("vllm.v1.kv_cache_interface")
    if not hasattr(specs, "SlidingWindowMLASpec"):
        pytest.skip("this release has none")
    terms = {"block_size": 16, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16}

    def groups(**more: Any) -> list[Group]:
        spec = specs.SlidingWindowMLASpec(**terms, sliding_window=128, **more)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        return groups_of(SimpleNamespace(kv_cache_groups=[group]))

    assert groups() == [Group(16, 128)]
    with pytest.raises(IntegrationError, match="pages of deepseek_v4"):
        groups(model_version="deepseek_v4")
