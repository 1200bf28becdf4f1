# SPDX-License-Identifier: Apache-2.0
"""What a connector's hooks do in the steps of a real engine: calls of functions, pieces of work for
other threads, and figures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from support.vllm_cpu import Engine

#: The hooks that a step calls, in the scheduler and in the worker.
HOOKS = (
    "build_connector_meta",
    "update_connector_output",
    "get_kv_connector_stats",
    "take_events",
    "has_pending_block_frees",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
)
#: The most calls of functions in the hooks of a step without work, if the engine publishes events,
#: and if both sides also report their figures, which they do once in a while.
MOST_CALLS = 140
MOST_CALLS_WITH_FIGURES = 420


def count_calls(connector: Any, hooks: Sequence[str]) -> list[int]:
    """Return a list to which each step appends the calls of functions that its hooks make."""
    steps = list[int]()
    begins = "build_connector_meta" if connector.role.name == "SCHEDULER" else "start_load_kv"

    def note(frame: Any, event: str, argument: Any) -> None:
        steps[-1] += event in ("call", "c_call")

    def counting(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if name == begins:
                steps.append(0)
            if not steps:
                return hook(*args, **named)
            sys.setprofile(note)
            try:
                return hook(*args, **named)
            finally:
                sys.setprofile(None)

        return call

    for name in hooks:
        if hasattr(connector, name):
            setattr(connector, name, counting(name, getattr(connector, name)))
    return steps


def count_help() -> list[None]:
    """Return a list that gets an item for each piece of work that the main thread hands over."""
    interrupts: Any = importlib.import_module("portakv.runtime.interrupts")
    interruptible = interrupts.interruptible
    helped = list[None]()

    def count() -> bool:
        if not interruptible():
            return False
        helped.append(None)
        return True

    interrupts.interruptible = count
    return helped


def publishing() -> dict[str, Any]:
    """Return the terms of an engine that publishes events and figures."""
    events: Any = importlib.import_module("vllm.config.kv_events")
    publish = events.KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    return {"kv_events_config": publish, "disable_log_stats": False}


def has_reported(engine: Engine) -> bool:
    """Return whether Prometheus has the loads, and the hooks of both sides."""
    metrics = [each for each in engine.llm.get_metrics() if each.name.startswith("vllm:portakv_")]
    sides = {each.labels.get("side") for each in metrics if each.name.endswith("_hook_seconds")}
    return sides == {"scheduler", "worker"} and figures_of(engine)["vllm:portakv_landed_bytes"] > 0


def figures_of(engine: Engine) -> dict[str, float]:
    """Return what Prometheus would read of the connector."""
    metrics = engine.llm.get_metrics()
    return {each.name: each.value for each in metrics if "portakv" in each.name}
