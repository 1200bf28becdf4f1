# SPDX-License-Identifier: Apache-2.0
"""Walks of the model engine through the hooks of vLLM's connector, without vLLM.

`python -m support.vllm_hooks FOLDER FIRST LAST alone` makes walks of these numbers; with ``shared``
in place of ``alone`` a server stores the engine's blocks. A module ``vllm`` as
`vllm_stub.write_vllm` makes it must be found.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from portakv.integrations.vllm import caches as vllm_caches
from portakv.integrations.vllm import connector as vllm_connector
from portakv.integrations.vllm import metrics, ranks
from portakv.integrations.vllm.connector import PlanMetadata, PortaKVConnector, ReportMetadata
from portakv.serving import Group, Plan, Report
from support.serving_model import NOTHING, Engine, Holder
from support.vllm_stub import configuration
from support.waits import LIMIT

STEP = 5e-4  # seconds of a step in which workers go on
Role: Any = vllm_connector.KVConnectorRole  # type: ignore[attr-defined]


class HookStore:
    """The model's side of a store that the connector opens itself.

    vLLM's ids of blocks are the model's plus one: block 0 stands for one that is gone.
    """

    folder = ""
    shared = False
    across = False  # one tensor for all layers, if the connector prefers it

    def __init__(self, chance: random.Random, draw: Any) -> None:
        self.draw = draw
        draw.workers = 1
        if draw.window is not None:
            draw.window = max(draw.window, draw.block_size)
        # Prompts are short.
        vars(vllm_caches)["TOKENS"] = chance.choice([1, 2]) * draw.block_size
        draw.stored_size = vllm_caches.whole_blocks([Group(draw.block_size, draw.window)])
        self.expected = dict[bytes, list[int]]()
        self.wrong = 0.0
        name = f"{id(self)}"
        many = draw.blocks + 1
        self.configurations = configuration(self.folder, name, many, draw.block_size, draw.window)
        self.configurations[0].kv_transfer_config.kv_connector_extra_config["shared"] = self.shared

    def age(self) -> None:
        """Nothing is damaged; the host tier evicts."""


class HookSchedulerSide:
    """A scheduler side behind the hooks of the scheduler."""

    def __init__(
        self,
        size: int,
        groups: Any,
        workers: int,
        store: HookStore,
        now: Any,
        holder: Holder | None,
    ) -> None:
        role = Role.SCHEDULER
        config, caches = store.configurations
        self.connector = PortaKVConnector(config, role, caches)
        if holder is not None:
            blocks = range(-1, caches.num_blocks - 1)
            self.connector.bind_gpu_block_pool(
                SimpleNamespace(blocks=blocks, touch=holder.hold, free_blocks=holder.give_back)
            )
        self.requests = dict[str, Any]()
        self.news = list[Any]()
        self.olds = list[Any]()
        self.gone = set[str]()
        self.known = set[str]()
        self._taken: Any = None  # a report, until the requests that were freed are known

    def add(self, name: str, tokens: Sequence[int]) -> None:
        self.requests[name] = request = SimpleNamespace(
            request_id=name,
            all_token_ids=tokens,
            cache_salt=None,
            lora_request=None,
            mm_features=[],
        )
        self.connector.on_new_request(request)

    def leading(self, name: str, computed: int) -> int | None:
        tokens, later = self.connector.get_num_new_matched_tokens(self.requests[name], computed)
        assert later is bool(tokens)
        return tokens

    def allocated(self, name: str, computed: int, tokens: int, blocks: Any) -> None:
        some = SimpleNamespace(get_block_ids=lambda: ids_in_vllm(blocks))
        self.connector.update_state_after_alloc(self.requests[name], some, tokens)

    def scheduled(self, name: str, computed: int, past: int, blocks: Any, replaced: bool) -> None:
        many = past - computed
        blocks = ids_in_vllm(blocks)
        if name not in self.known:
            self.known.add(name)
            self.news.append((name, computed, many, blocks))
        else:
            self.olds.append((name, computed, many, blocks, replaced))

    def preempted(self, name: str) -> None:
        self.gone.add(name)

    def plan(self, idle: bool = False) -> Plan:
        output = SimpleNamespace(
            num_scheduled_tokens={each[0]: each[2] for each in (*self.news, *self.olds)},
            preempted_req_ids=self.gone or None,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=blocks)
                for name, computed, _, blocks in self.news
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[each[0] for each in self.olds],
                resumed_req_ids={each[0] for each in self.olds if each[4]},
                new_block_ids=[each[3] if any(each[3]) else None for each in self.olds],
                num_computed_tokens=[each[1] for each in self.olds],
            ),
        )
        self.news = []
        self.olds = []
        self.gone = set()
        return self.connector.build_connector_meta(output).plan

    def take(self, report: Report) -> None:
        self._taken = ReportMetadata(report)

    def freed(self, names: Iterable[str]) -> None:
        sent = {*names} or None
        output = SimpleNamespace(kv_connector_worker_meta=self._taken, finished_sending=sent)
        self.connector.update_connector_output(output)

    def end_step(self) -> None:
        self.connector.get_kv_connector_stats()
        assert not self.connector.take_events()

    def finished(self, name: str) -> bool:
        return self.connector.request_finished_all_groups(self.requests[name], ([],))[0]

    def statistics(self) -> dict[str, int]:
        assert not self.connector.has_pending_block_frees()
        return self.connector.scheduler_side.statistics()


def ids_in_vllm(blocks: Iterable[Iterable[int]]) -> tuple[list[int], ...]:
    """Return the model's blocks of each group by their ids in vLLM."""
    return tuple([block + 1 for block in ids] for ids in blocks)


class HookWorker:
    """A worker behind the hooks of the model runner."""

    def __init__(self, engine: Engine, number: int) -> None:
        draw = engine.draw
        config, caches = engine.store.configurations
        self.connector = PortaKVConnector(config, Role.WORKER, caches)
        self._memory = torch.full((draw.blocks + 1, 2, draw.block_size), NOTHING)
        if self.connector.prefer_cross_layer_blocks and HookStore.across:
            self.connector.register_cross_layers_kv_cache(self._memory, None)
        else:
            self.connector.register_kv_caches({"layer": self._memory})
        self._said = Report()
        self.freed = set[str]()
        self.lacking = set[int]()
        self._steps = 0
        self._computes = False

    @property
    def busy(self) -> bool:
        return self.connector.worker_side.busy

    @property
    def report(self) -> Report:
        return self._said

    @report.setter
    def report(self, empty: Report) -> None:
        self._said = empty

    def row(self, block: int, at: int) -> int:
        both = {int(x) for x in self._memory[block + 1, :, at]}
        return both.pop() if len(both) == 1 else NOTHING

    def write(self, block: int, at: int, row: int) -> None:
        self._memory[block + 1, :, at] = row
        self._computes = True

    def before_step(self, plan: Plan) -> None:
        self.connector.handle_preemptions(PlanMetadata(plan))
        self.connector.bind_connector_metadata(PlanMetadata(plan))
        self._computes = False

    def after_step(self, plan: Plan) -> None:
        if self._computes:
            self.connector.wait_for_layer_load("layer")
            self.connector.save_kv_layer("layer", self._memory, None)
        self.connector.start_load_kv(None)
        self.connector.wait_for_save()
        if self.connector.worker_side.busy:
            time.sleep(STEP)  # the store's workers go on
        self._end_step()
        self._steps += 1
        if HookStore.shared and self._steps % 2:  # else a server takes longer than a walk
            until = time.monotonic() + LIMIT
            while self.busy and time.monotonic() < until:
                time.sleep(STEP)
                self._end_step()

    def _end_step(self) -> None:
        """Note what the worker reports at the end of a step."""
        results = self.connector.get_transfer_results(set())
        self.freed |= results.finished_sending
        assert results.failed_recving <= results.finished_recving
        self.lacking |= self.connector.get_block_ids_with_load_errors()
        self.connector.get_kv_connector_stats()
        self.connector.get_kv_connector_kv_cache_events()
        metadata = self.connector.build_connector_worker_meta()
        if metadata is not None:
            self._said = self._said.merged(metadata.report)
        self.connector.clear_connector_metadata()


class HookEngine(Engine):
    """An engine that calls the hooks at the end of a step too."""

    def step(self) -> None:
        super().step()
        self.scheduler_side.end_step()  # type: ignore[attr-defined]


def reported(connector: Any) -> dict[str, int]:
    """Return the counters of tiers that a connector's next report has."""
    connector.figures = metrics.Figures(0.0)
    stats = connector.get_kv_connector_stats()
    counters = {} if stats is None else stats.data
    return {x: round(n) for x, n in counters.items() if x.startswith(("tier_blocks", "tier_bytes"))}


def walk(seed: int, folder: str) -> Mapping[str, int]:
    """Make one walk; return what the scheduler side and the tiers have counted."""
    HookStore.folder = folder
    HookStore.across = seed % 2 == 0
    ranks.PATIENCE = 0.0  # the worker comes after the scheduler
    engine = HookEngine(HookSchedulerSide, seed, HookStore, HookWorker)  # type: ignore[arg-type]
    connector = engine.scheduler_side.connector  # type: ignore[attr-defined]
    try:
        if HookStore.shared:
            assert all(worker.connector.store.wait(LIMIT) for worker in engine.workers)
            assert connector.index.wait(LIMIT)
        engine.run(12)
        tiers = reported(connector)
        for worker in engine.workers:
            for name, count in reported(worker.connector).items():
                assert name not in tiers  # it would be counted twice
                tiers[name] = count
    finally:
        for worker in engine.workers:
            worker.connector.shutdown()
        connector.shutdown()
    return {**engine.scheduler_side.statistics(), **tiers}


def main() -> None:
    """Make walks, and print what all of them counted."""
    folder = sys.argv[1]
    first, past = (int(each) for each in sys.argv[2:4])
    HookStore.shared = sys.argv[4] == "shared"
    counts = dict[str, int]()
    # When an index of another process knows a block depends on the speed of both.
    latest = past + 32 if HookStore.shared else past
    for seed in range(first, latest):
        if seed >= past and counts.get("landed_blocks"):
            break
        for name, count in walk(seed, f"{folder}/store-{seed}").items():
            counts[name] = counts.get(name, 0) + count
    print(counts)


if __name__ == "__main__":
    main()
