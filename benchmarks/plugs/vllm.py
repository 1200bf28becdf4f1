# SPDX-License-Identifier: Apache-2.0
"""vLLM's offloading worker with its own code and with PortaKV's, and `swap_blocks_batch` below it;
then its ops of a step.

A job is submitted as the connector does it, after the ended jobs were collected; `both` is one of
each direction together, of half the blocks each. Jobs of a step (`job`) follow each other, and the
step waits for their host time. What a worker keeps in host memory is judged through it: blocks that
were stored are loaded into others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from typing import Any

import torch

from portakv.integrations import check_release
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.plugs import suite, vllm_ops
from portakv_benchmarks.plugs.step_ops import step_ops
from portakv_benchmarks.plugs.suite import (
    OURS,
    OWN,
    Call,
    Case,
    IntegrationBench,
    PlannedCase,
    Side,
)
from portakv_benchmarks.shared.harness import Row, Step, Variant
from portakv_benchmarks.shared.shapes import POISON, in_words

_OP = "swap_blocks_batch"
#: Blocks that no job names, whose bytes must stay; and a job's blocks / those of a call of the op.
_REST = 8
_PART = 4
_BOTH = "both"
#: The names of a worker's jobs: many blocks of a request, and those of one step.
_WORKER = "worker"
_JOB = "job"


def vllm_steps(bench: IntegrationBench) -> Iterator[Step]:
    """Yield a step for each page size and direction, of the worker and of the op.

    Raises `IntegrationError` if vLLM is not here.
    """
    check_release("vllm")
    import_module("portakv.integrations.vllm.offloading")  # fails here, and not in each step
    why = ""
    if bench.device.type != "cuda":
        why = f"its worker takes CUDA's and XPU's tensors alone, and this is {bench.device.type}"
    elif not hasattr(import_module("vllm._custom_ops").torch.ops._C_cache_ops, _OP):
        why = f"its kernels do not load with torch {torch.__version__}"
    if why:
        bench.left_out.append(f"vllm: its own code: {why}")
    else:
        bench.installed["vllm"] = version("vllm")
    yield from suite.steps(bench, "vllm", _planned_cases(bench, not why))


def _planned_cases(bench: IntegrationBench, own: bool) -> Iterator[PlannedCase]:
    sizes = bench.sizes
    methods = [*product((_WORKER, _OP), DIRECTIONS), (_WORKER, _BOTH)]
    pair = lru_cache(maxsize=2)(partial(_workers, bench, own))  # each pins once for all its cases
    of_job = (partial(_job, pair, sizes.layers, sizes.blocks), sizes.blocks)
    of_op = (partial(_batch, own), _of_op(bench))
    for page, (kernel, op) in product(sizes.pages, methods):
        made, blocks = of_op if kernel == _OP else of_job
        name = f"{kernel}, {blocks} blocks, pages of {in_words(page)}"
        alongside = kernel != _OP and page == sizes.pages[0] and op != _BOTH
        fields = {"shape": name, "kernel": kernel, "row_bytes": page}
        yield PlannedCase(f"{name}, {op}", partial(made, bench, fields, page, op), alongside)
    for (layers, page, blocks), op in product(sizes.jobs, DIRECTIONS):
        name = f"job, {blocks} blocks, {layers} x pages of {in_words(page)}"
        fields = {"shape": name, "kernel": _JOB, "row_bytes": page, "blocks": blocks}
        make = partial(_job, pair, layers, blocks, bench, fields, page, op, busy=True)
        yield PlannedCase(f"{name}, {op}", make)
    yield from step_ops(bench, import_module("vllm._custom_ops") if own else None)


# --- The worker -----------------------------------------------------------------------------------


class Worker:
    """One of vLLM's workers and its jobs: blocks that are stored, and others that they are loaded
    into. Caches are int8 ``[blocks, page]`` for each layer."""

    def __init__(
        self, bench: IntegrationBench, worker: Any, layers: list[torch.Tensor], count: int
    ) -> None:
        base = import_module("vllm.v1.kv_offload.base")
        common = import_module("vllm.v1.kv_offload.cpu.common")
        self._bench = bench
        self._worker = worker
        self._layers = layers
        self._jobs = 0
        self._flying = set[int]()
        drawn = torch.Generator().manual_seed(1)
        order = torch.randperm(len(layers[0]), generator=drawn).split([count, count, _REST])
        self._ids = [each.to(bench.device) for each in order]  # stored, loaded, the rest
        chunks = torch.randperm(count, generator=drawn)

        def specs(part: slice) -> tuple[Any, Any, Any]:
            """Return the blocks to store, their chunks, and the blocks to load the chunks into."""
            stored, loaded = (
                base.GPULoadStoreSpec(
                    ids[part].tolist(), group_sizes=[len(ids[part])], block_indices=[0]
                )
                for ids in order[:2]
            )
            return stored, common.CPULoadStoreSpec(chunks[part].tolist()), loaded

        self._stored, self._chunks, self._loaded = specs(slice(None))
        self._halves = specs(slice(count // 2)), specs(slice(count // 2, None))
        self._before = [[each[ids] for ids in self._ids[::2]] for each in layers]

    def done(self, job: int) -> bool:
        """Return whether a job has ended."""
        self._flying -= {each.job_id for each in self._worker.get_finished()}
        return job not in self._flying

    def submit(self, *specs: Any) -> Job:
        """Move between chunks and blocks, the source first."""
        self._jobs += 1
        self.done(self._jobs)
        self._flying.add(self._jobs)
        loads = isinstance(specs[0], type(self._chunks))
        (self._worker.submit_load if loads else self._worker.submit_store)(self._jobs, *specs)
        return Job(self, self._jobs)

    def wait(self) -> None:
        self._worker.wait(set(self._flying))
        self._bench.module.synchronize()

    def poison(self, *first: Any) -> None:
        """Poison the blocks to load, after a job, if any."""
        if first:
            self.submit(*first)
        self.wait()
        for each in self._layers:
            each[self._ids[1]] = POISON - 256
        self._bench.module.synchronize()  # vLLM's own loads wait for no stream

    def right(self) -> bool:
        """Return whether exactly the requested blocks were loaded, and no other changed."""
        self.wait()
        (stored, loaded, rest) = self._ids
        pairs = zip(self._layers, self._before, strict=True)
        return all(
            now[loaded].equal(old[0]) and now[stored].equal(old[0]) and now[rest].equal(old[1])
            for now, old in pairs
        )

    def variant(self, name: str, op: str) -> Variant:
        """Return a store, judged by a load of what it left; or a load."""
        labels = suite.labels(name, op, "vllm")
        store = (self._stored, self._chunks)
        load = (self._chunks, self._loaded)

        def spoil(i: int) -> None:
            self.poison()
            self.poison(self._loaded, self._chunks)

        def stored(i: int) -> bool:
            self.poison()
            self.submit(*load)
            return self.right()

        if op == _BOTH:
            return self._both(labels)
        if op == "d2h":
            return Variant(labels, lambda i: self.submit(*store), spoil, stored)
        keep = partial(self.poison, *store)
        right = self.right
        return Variant(labels, lambda i: self.submit(*load), lambda i: keep(), lambda i: right())

    def _both(self, labels: Row) -> Variant:
        """Return a store of one half of the blocks and a load of the other, whose chunks hold them.

        A load of the stored chunks judges them.
        """
        (store, full, load), (more, empty, rest) = self._halves

        def spoil(i: int) -> None:
            self.poison(store, full)
            self.submit(rest, empty)
            self.wait()

        def call(i: int) -> Job:
            self.submit(more, empty)
            return self.submit(full, load)

        def right(i: int) -> bool:
            self.wait()
            self.submit(empty, rest)
            return self.right()

        return Variant(labels, call, spoil, right)


class Job:
    """A job that was submitted."""

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker = worker
        self._number = number

    def done(self) -> bool:
        return self._worker.done(self._number)


#: Both workers by layers, page and blocks of a job.
Pair = Callable[[int, int, int], dict[str, Worker]]


def _workers(
    bench: IntegrationBench, own: bool, layers_of: int, page: int, count: int
) -> dict[str, Worker]:
    """Return both workers over the same caches, each with separate host memory."""
    base = import_module("vllm.v1.kv_offload.base")
    blocks = 2 * count + _REST
    memory = [bench.memory(blocks * page, False, 1 + n) for n in range(layers_of)]
    layers = [each.view(torch.int8).view(blocks, page) for each in memory]
    tensors = [base.CanonicalKVCacheTensor(each, page) for each in layers]
    refs = [base.CanonicalKVCacheRef(at, page) for at in range(len(tensors))]
    arguments = base.CanonicalKVCaches(tensors, [refs]), 1, count
    made: dict[str, Worker] = {}
    if own:
        worker_class = import_module("vllm.v1.kv_offload.cpu.gpu_worker").CPUOffloadingWorker
        made[OWN] = Worker(bench, worker_class(*arguments), layers, count)
    ours = import_module("portakv.integrations.vllm.offloading").PortaKVOffloadingWorker
    made[OURS] = Worker(bench, ours(*arguments), layers, count)
    return made


def _job(
    pair: Pair,
    layers: int,
    blocks: int,
    bench: IntegrationBench,
    fields: Row,
    page: int,
    op: str,
    busy: bool = False,
) -> Case:
    methods = [worker.variant(name, op) for name, worker in pair(layers, page, blocks).items()]
    return Case(fields, op, blocks * page * layers, methods, streams=True, busy=busy)


def _of_op(bench: IntegrationBench) -> int:
    return bench.sizes.blocks // _PART


def _batch(own: bool, bench: IntegrationBench, fields: Row, page: int, op: str) -> Case:
    """Return runs of blocks of each layer, and of a pool block by block.

    They have a quarter of a job's pages.
    """
    layers = bench.sizes.layers
    salts = suite.turned(op, 1, None)
    sized = replace(suite.LIKE, layers=layers, dim=page, dtype="int8", kv=1, pool=2)
    shape = replace(sized, tokens=_of_op(bench))
    device = Side.make(bench, "layer | block dim", shape, 3, tensors=layers, salt=salts[0])
    host = Side.make(bench, "block layer dim", shape, 4, on_host=True, salt=salts[1])
    local = suite.addresses(device.tensors)[:, None] + device.rows * page
    remote = suite.addresses(host.tensors) + torch.arange(layers)[:, None] * page
    remote = remote + host.rows * layers * page
    (at, where), (to, into) = suite.turned(op, (local, bench.device), (remote, torch.device("cpu")))
    runs = at.flatten(), to.flatten(), torch.full((at.numel(),), page)
    moves: dict[str, Call] = {}
    if own:
        moves[OWN] = partial(import_module("vllm._custom_ops").swap_blocks_batch, *runs)
    moves[OURS] = partial(vllm_ops.swap_blocks_batch, *runs, where, into)
    makes = {name: partial(lambda move: move, move) for name, move in moves.items()}
    return suite.case(bench, "vllm", fields, op, device, host, makes)
