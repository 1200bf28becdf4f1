# SPDX-License-Identifier: Apache-2.0
"""Real engines on a CPU with a witness, whose loads get one fault after the other."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from support.vllm_cpu import Engine, prompt
from support.waits import LIMIT

SHIM = "support.witness_shim"
NAME = "witness-shim-"  # an engine's id begins so
LATE = "a copy that has not ended"
#: The fault of `support.witness_shim`, and its names that are right.
NAMES = {
    "a flipped byte": {"changed bytes"},
    "swapped blocks": {"other block", "shifted blocks"},
    "a shifted list": {"shifted blocks"},
    "shifted tokens": {"shifted tokens"},
    "stale rows": {"not written", "other block", "zeros"},
    "a half copy": {"half written"},
    "a copy without its last tokens": {"half written"},
    LATE: {"not written", "half written", "other block"},
    "a missing layer": {"missing layers"},
    "exchanged heads": {"heads exchanged"},
    "exchanged planes": {"planes exchanged"},
    "exchanged planes of a head": {"planes exchanged"},
    "exchanged layers": {"layers exchanged"},
    "zeros": {"zeros"},
    "another block": {"other block", "shifted blocks"},
}
#: The rows that a block had before may be those of another key, or of a part of a block.
BEFORE = {"other block", "older version", "unlike"}
#: Faults that leave these tokens alone: keys know their positions, and attention is a sum over all
#: rows. A request that has one of two swapped blocks would be wrong.
HARMLESS = {"swapped blocks", "shifted tokens"}


def around(name: str, inner: Mapping[str, Any], module: str = SHIM, **terms: Any) -> dict[str, Any]:
    """Return vLLM's terms of the witness around a connector.

    ``inner``: the terms of the connector. ``terms``: of the witness.
    """
    extra = {
        "connector": name,
        "connector_module_path": module,
        "connector_extra_config": dict(inner),
        "check": "all",
        **terms,
    }
    return {
        "kv_connector": "PortaKVWitness",
        "kv_connector_module_path": "portakv.integrations.vllm.witness",
        "engine_id": NAME + uuid4().hex,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def forget(engine: Engine) -> None:
    """Clear the engine's own prefix cache, after steps in which saves end."""
    until = time.monotonic() + LIMIT / 2
    number = 0
    while not engine.llm.reset_prefix_cache():
        assert time.monotonic() < until, "blocks are not freed"
        engine.ask([prompt(20, 900 + number)], 2)
        engine.llm.llm_engine.step()  # some connectors hold the blocks of a request that has ended
        number += 1


def counts_of(engine: Engine) -> Counter[str]:
    """Return what the witness of the worker has counted."""
    witness = engine.worker_connector.witness
    if witness is None:
        return Counter()
    witness.settle(wait=True)
    return Counter(engine.worker_connector.statistics())


def faults_in(counts: Counter[str]) -> dict[str, int]:
    """Return how many faults of each kind there are."""
    begins = "witness_faults/"
    return {x.removeprefix(begins): many for x, many in counts.items() if x.startswith(begins)}


def row_of(name: str, damaged: int, counts: Counter[str], is_right: bool) -> dict[str, Any]:
    """Return what a result has of a fault in some loads."""
    return {
        "fault": name,
        "loads": damaged,
        "compared": counts["witness_compared"],
        "found": faults_in(counts),
        "tokens_are_right": is_right,
    }


def walk_through(
    engine: Engine, names: Iterable[str], faults: Mapping[str, Any], prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Ask prompts whose loads have one fault after the other.

    Returns by the name of a fault: the tokens, the damaged loads, and what the witness has counted.
    """
    shim = importlib.import_module(SHIM)
    seen = dict[str, Any]()
    until = time.monotonic() + LIMIT / 2
    while not all(engine.ask(prompts).cached):
        assert time.monotonic() < until, "blocks are not stored"
        forget(engine)
    for name in names:
        forget(engine)
        before = counts_of(engine)
        shim.put(faults[name])
        answer = engine.ask(prompts)
        damaged = len(shim.damaged)
        shim.put(None)
        seen[name] = answer.tokens, damaged, counts_of(engine) - before
    return seen
