# SPDX-License-Identifier: Apache-2.0
"""A connector that the witness wraps in tests: it notes each hook that reaches it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

MODULE = __name__


class Stats(SimpleNamespace):
    """vLLM's object for the figures of a connector: ``data`` has numbers that add up."""

    data: dict[str, Any]

    def aggregate(self, other: Stats) -> Stats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, Any]:
        return dict(self.data)

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data


class Named:
    """Has every hook: each call is noted, and returns what `answers` has, or the hook's name."""

    seen: ClassVar[list[tuple[str, tuple[Any, ...], dict[str, Any]]]] = []  # of the class's hooks

    observed: ClassVar[list[tuple[Any, int]]] = []  # figures for Prometheus, by engine

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.config = vllm_config
        self.calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]()
        self.answers: dict[str, Any] = {
            "get_num_new_matched_tokens": (0, False),
            "get_finished": (None, None),
            "get_transfer_results": SimpleNamespace(
                finished_sending=set(), finished_recving=set(), failed_recving=set()
            ),
            "get_block_ids_with_load_errors": set(),
            "get_kv_connector_stats": None,
            "get_loaded_kv_cache_group_ids": (0,),
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def hook(*args: Any, **terms: Any) -> Any:
            self.calls.append((name, args, terms))
            answer = self.answers.get(name, name)
            return answer(*args, **terms) if callable(answer) else answer

        return hook

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: Any) -> bool:
        cls.seen.append(("requires_piecewise_for_cudagraph", (extra_config,), {}))
        return bool(extra_config.get("by_layer"))

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        cls.seen.append(("supports_sleep_mode", (kv_transfer_config,), {}))
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        cls.seen.append(("get_required_kvcache_layout", (vllm_config,), {}))
        return "HND"

    @classmethod
    def build_kv_connector_stats(cls, data: Any = None) -> Stats:
        cls.seen.append(("build_kv_connector_stats", (data,), {}))
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> Any:
        cls.seen.append(("build_prom_metrics", args, {}))
        cls.observed.clear()
        return SimpleNamespace(observe=lambda data, engine=0: cls.observed.append((data, engine)))


class Hybrid(Named, SupportsHMA):  # type: ignore[misc]
    """Serves several groups of layers."""

    def request_finished_all_groups(self, *args: Any) -> Any:
        self.calls.append(("request_finished_all_groups", args, {}))
        return False, None
