# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for vLLM's own tests of connectors: PortaKV's stands in the place of theirs.

    python -m pytest --noconftest -p vllm_own_connector tests/v1/kv_connector/unit/...

Their schedulers then drive PortaKV's connector. What a test decides itself, such as how many tokens
are stored, stays the test's.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from portakv.integrations.vllm import ranks
from portakv.integrations.vllm.connector import PortaKVConnector
from portakv.serving import Report

#: The model that the tests name. vLLM takes the folder, and downloads nothing.
MODEL = "facebook/opt-125m"
CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 16384,
    "vocab_size": 50272,
    "torch_dtype": "float16",
    "bos_token_id": 2,
    "eos_token_id": 2,
}
TERMS = {"host": 1 << 20, "staging": 1 << 20}
UTILS = "tests.v1.kv_connector.unit.utils"
FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
utils: Any = importlib.import_module(UTILS)


class Own(PortaKVConnector):
    """PortaKV's connector, which leaves out the terms of vLLM's.

    It also stands for a worker, whose saves end immediately. Loads end when a test says so, or with
    the step that begins them.

    Attributes:
        latest: the one that was made last.
    """

    latest: Own | None = None

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        self.terms = {**transfer.kv_connector_extra_config}
        transfer.kv_connector_extra_config = TERMS
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        finally:
            transfer.kv_connector_extra_config = self.terms
        self.loads = dict[str, int]()
        Own.latest = self

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        report = Report()
        for job in metadata.plan.saves:
            report.released[job.number] += 1
            report.end(job.number, frozenset())
        self.loads.update({job.request: job.number for job in metadata.plan.loads})
        self.end_loads(report, [*scheduler_output.num_scheduled_tokens])
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        self.end_loads(Report(), connector_output.finished_recving or ())
        super().update_connector_output(connector_output)

    def end_loads(self, report: Report, requests: Iterable[str]) -> None:
        """Report the ends of loads of requests, and what else has ended."""
        for name in requests:
            number = self.loads.pop(name, None)
            if number is not None:
                report.end(number, frozenset())
        self.scheduler_side.take(report)


class Answering(Own):
    """The same with the answers of vLLM's mock, which tests choose."""

    def __init__(self, *terms: Any) -> None:
        super().__init__(*terms)
        self.config = utils.MockKVConfig(**self.terms)
        self.left = dict[str, int]()

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        divergent: bool = self.config.supports_divergent_local_hybrid_hits
        return divergent

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        super().get_num_new_matched_tokens(request, num_computed_tokens)
        left = self.left.get(request.request_id, self.config.num_defers_before_matching)
        self.left[request.request_id] = left - 1
        if left > 0:
            return None, False
        return self.config.matched_tokens, self.config.is_async

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        new = [each.req_id for each in scheduler_output.scheduled_new_reqs]
        old = scheduler_output.scheduled_cached_reqs
        resumed = [name for name in old.req_ids if name in old.resumed_req_ids]
        metadata.requests = [{"req_id": name} for name in chain(new, resumed)]
        return metadata


create_config: Callable[..., Any] = utils.create_vllm_config
create_mock: Callable[[], Mock] = utils.create_mock_connector


def create_vllm_config(*terms: Any, **named: Any) -> Any:
    """Return a configuration whose role PortaKV's connector has."""
    if named.get("kv_connector", "NixlConnector") == "NixlConnector":
        named["kv_role"] = "kv_both"
    return create_config(*terms, **named)


def create_mock_connector() -> Mock:
    """Return a mock that passes on to the latest connector what a test does not decide."""
    mock = Mock(wraps=Own.latest)
    sources = create_mock().get_external_cache_hit_sources
    mock.get_external_cache_hit_sources.side_effect = sources.side_effect
    return mock


def write_model() -> None:
    """Write the configuration of the model that the tests name into the current folder."""
    folder = Path(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def pytest_configure() -> None:
    """Put the connector in its place before a test module takes another one."""
    write_model()
    ranks.PATIENCE = 0.0  # no worker will join
    registry = vars(importlib.import_module(FACTORY).KVConnectorFactory)["_registry"]
    for name in ("ExampleConnector", "NixlConnector", "SimpleCPUOffloadConnector"):
        registry[name] = lambda: Own
    utils.MockKVConnector = Answering
    utils.create_vllm_config = create_vllm_config
    utils.create_mock_connector = create_mock_connector
