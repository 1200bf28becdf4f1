# SPDX-License-Identifier: Apache-2.0
"""A worker side whose layers wait by words: loads that land, fail, are late or raise no word."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from support.model_worker import LAYOUT
from support.serving_model import NOTHING
from support.storage_cases import FakeTier
from support.waits import LIMIT, until
from support.word_cases import HOST, LAYERS, Lazy, Words

from portakv import KVView
from portakv.copy.layer_words import LayerWords
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Transfer
from portakv.serving import GroupCache, Job, Plan, Report, WorkerSide
from portakv.serving.worker import Issuer
from portakv.storage import BlockForm, BlockStore, prefix_keys

KEYS = prefix_keys(range(16), 8)
LOAD = Plan(loads=[Job(7, "a", tuple(KEYS), 0, None, ((3, 1),))])


def caches(fill: int) -> tuple[list[torch.Tensor], KVView]:
    layers = [torch.full((4, 2, 8, 1, 1), fill + at, dtype=torch.int64) for at in range(LAYERS)]
    return layers, KVView(layers, LAYOUT)


class Case(NamedTuple):
    store: BlockStore
    tier: FakeTier
    layers: list[torch.Tensor]
    view: KVView

    def worker_side(self, words: LayerWords, deadline: float = LIMIT) -> WorkerSide:
        return WorkerSide([GroupCache(self.view, self.store)], deadline, by_layer=True, words=words)


@pytest.fixture
def case() -> Iterator[Case]:
    """Two blocks in a tier that a worker reads, rows ``10 + layer``."""
    _, full = caches(10)
    tier = FakeTier()
    form = BlockForm.of(full, "model", block_size=8)
    with BlockStore(form, staging=1 << 16, tiers=[tier]) as store:
        store.save(full, [0, 1], KEYS).synchronize(LIMIT)
        assert until(lambda: len(tier.blocks) == 2)
        yield Case(store, tier, *caches(NOTHING))


@pytest.fixture
def host(case: Case) -> Iterator[Case]:
    """The same blocks in host memory."""
    _, full = caches(10)
    form = BlockForm.of(full, "model", block_size=8)
    with BlockStore(form, staging=1 << 16, host=1 << 16) as store:
        store.save(full, [0, 1], KEYS).synchronize(LIMIT)
        yield case._replace(store=store)


class Model(threading.Thread):
    """A model that computes as a replayed graph does: without any call of a `WorkerSide`."""

    def __init__(self, words: LayerWords, layers: list[torch.Tensor]) -> None:
        super().__init__()
        self.words = words
        self.layers = layers
        self.seen = list[set[int]]()
        self.start()

    def run(self) -> None:
        for number, layer in enumerate(self.layers):
            self.words.wait(number)
            self.seen.append(set(layer[[3, 1]].flatten().tolist()))


def ended(worker_side: WorkerSide) -> tuple[Report, set[int]]:
    """Return the report of a step and the blocks without rows."""
    worker_side.save(Plan())
    report = worker_side.report()
    return report, worker_side.ended().failed[0]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_a_model_computes_with_the_rows_of_its_step(case: Case, guard: bool) -> None:
    """Without waits it reads what was there before."""
    words = Words()
    worker_side = case.worker_side(words)
    read = threading.Event()
    for key in KEYS:
        case.tier.faults[key] = [lambda: read.wait(LIMIT)]
    worker_side.load(LOAD)
    if not guard:
        words.rest()
    model = Model(words, case.layers)
    if not guard:
        model.join(LIMIT)
    read.set()
    model.join(LIMIT)
    report, failed = ended(worker_side)
    assert report.missing == {7: frozenset()}
    assert failed == set()
    right = [{10 + at} for at in range(LAYERS)]
    assert (model.seen == right) is guard


def test_rows_of_host_memory_are_there_at_once(host: Case) -> None:
    words = Words()
    worker_side = host.worker_side(words)
    worker_side.load(LOAD)
    model = Model(words, host.layers)
    model.join(LIMIT)
    assert ended(worker_side) == (Report(missing={7: frozenset()}, ends=Counter({7: 1})), set())
    assert model.seen == [{10 + at} for at in range(LAYERS)]


def test_a_load_that_fails_lets_the_model_go_on(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    words = Words()
    worker_side = case.worker_side(words)
    case.tier.faults[KEYS[1]] = ["error"] * LAYERS
    worker_side.load(LOAD)
    model = Model(words, case.layers)
    model.join(LIMIT)
    assert not model.is_alive()
    assert not words.expired
    report, failed = ended(worker_side)
    assert report.missing == {7: frozenset([1])}
    assert failed == {1}
    assert "did not land within" not in caplog.text


def test_a_load_past_its_deadline_lets_the_model_go_on(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """The tier hangs; the load gives up, and nothing else looks at it. The log says so."""
    words = Words()
    worker_side = case.worker_side(words, deadline=0.05)
    hang = threading.Event()
    for key in KEYS:
        case.tier.faults[key] = [lambda: hang.wait(LIMIT)]
    worker_side.load(LOAD)
    model = Model(words, case.layers)
    model.join(LIMIT)
    assert not model.is_alive()
    assert not words.expired
    report, failed = ended(worker_side)
    hang.set()
    assert report.missing == {7: frozenset([0, 1])}
    assert failed == {3, 1}
    said = "2 of 2 blocks did not land within 0.05 s, and are computed. Look at its device"
    assert said in caplog.text


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_rows_after_a_wait_that_ended_by_its_limit_do_not_count(case: Case, guard: bool) -> None:
    """The load lands later, and the model has computed with what was there before."""
    words = Lazy(1e-3)
    worker_side = case.worker_side(words)
    worker_side.load(LOAD)
    model = Model(words, case.layers)
    model.join(LIMIT)
    assert words.expired
    if not guard:
        words.host.expired = 0
    report, failed = ended(worker_side)
    assert (report.missing == {7: frozenset([0, 1])}) is guard
    assert (failed == {3, 1}) is guard


class Launched(Words):
    """Words of a device: a wait is launched, and ends when the device gets to it.

    ``guard``: whoever asks whether a wait has expired lets the device get there before.
    """

    def __init__(self, guard: bool) -> None:
        super().__init__(1e-3)
        self.guard = guard
        self.launched = list[int]()

    def wait(self, layer: int) -> None:
        self.launched.append(layer)

    def end_waits(self) -> None:
        if self.guard:
            self.run()

    def run(self) -> None:
        """Run the waits, which reach their limit."""
        if self.launched:
            self.host.expired = self._number
            self.launched.clear()


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_a_wait_that_reaches_its_limit_after_the_launch_is_reported(
    host: Case, guard: bool
) -> None:
    """The rows are there by then, but a device whose copies hang may have gone on without them."""
    words = Launched(guard)
    worker_side = host.worker_side(words)
    worker_side.load(LOAD)
    for layer in range(LAYERS):
        worker_side.layer(layer)
    report, failed = ended(worker_side)
    words.run()
    assert words.expired
    assert (report.missing == {7: frozenset([0, 1])}) is guard
    assert (failed == {3, 1}) is guard


def test_steps_without_loads_wait_for_nothing(case: Case) -> None:
    """Also after a step whose words nothing raised."""
    words = Lazy()
    worker_side = case.worker_side(words)
    worker_side.load(LOAD)
    worker_side.save(Plan())
    worker_side.load(Plan())
    assert words.lacking == []
    for layer in range(LAYERS):
        worker_side.layer(layer)


class Gate(Words):
    """Words that hold the thread that issues a load, before it issues the second layer.

    ``early``: the word of the first layer is raised before; else at the end of the load, which is
    the negative control.
    """

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.reached = threading.Event()
        self.over = threading.Event()

    def issued(self, number: int, end: Transfer) -> None:
        if self.early:
            super().issued(number, end)
        self.reached.set()
        assert self.over.wait(LIMIT)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_a_layer_is_there_while_the_next_ones_are_issued(host: Case, guard: bool) -> None:
    """The call returns before."""
    words = Gate(guard)
    worker_side = host.worker_side(words)
    worker_side.load(LOAD)
    assert words.reached.wait(LIMIT)
    assert words.lacking == [0, 1, 2][guard:]
    assert worker_side.busy
    words.over.set()
    model = Model(words, host.layers)
    model.join(LIMIT)
    assert ended(worker_side) == (Report(missing={7: frozenset()}, ends=Counter({7: 1})), set())
    assert model.seen == [{10 + at} for at in range(LAYERS)]


def test_the_last_load_of_a_step_raises_words_of_all(host: Case) -> None:
    """A word waits for the first load too, which is issued whole before."""
    words = Gate(True)
    worker_side = host.worker_side(words)
    first, second = (
        Job(at, "a", (key,), 0, None, ((at,),)) for at, key in zip((3, 1), KEYS, strict=True)
    )
    worker_side.load(Plan(loads=[first, second]))
    assert words.reached.wait(LIMIT)
    assert words.lacking == [1, 2]
    assert [set(layer[3].flatten().tolist()) for layer in host.layers] == [{10}, {11}, {12}]
    words.over.set()
    report, failed = ended(worker_side)
    assert report.missing == {3: frozenset(), 1: frozenset()}
    assert failed == set()
    assert words.lacking == []


@pytest.mark.parametrize("hook", ["stop", "report"])
def test_no_hook_overtakes_the_thread_that_issues_loads(host: Case, hook: str) -> None:
    """A load that has not begun would count as ended."""
    words = Gate(True)
    worker_side = host.worker_side(words)
    worker_side.load(LOAD)
    assert words.reached.wait(LIMIT)
    call = partial(worker_side.stop, Plan(stop=[1])) if hook == "stop" else worker_side.report
    answers = list[object]()
    waiting = threading.Thread(target=lambda: answers.append(call()))
    waiting.start()
    waiting.join(0.02)
    assert not answers
    words.over.set()
    waiting.join(LIMIT)
    assert len(answers) == 1
    assert words.lacking == []
    ended(worker_side)


@pytest.mark.parametrize("at_first", [True, False])
def test_the_first_load_of_a_size_is_issued_before_the_step(at_first: bool) -> None:
    """What it builds must not wait for a device that waits for it."""
    issuer = Issuer(Words(), at_first)
    over = threading.Event()
    states = list[bool]()
    for size in (1, 5, 7, 4):
        over.clear()
        is_new = at_first and size in (1, 5)
        if is_new:
            over.set()
        ended = threading.Event()

        def load(over: threading.Event = over, ended: threading.Event = ended) -> None:
            assert over.wait(LIMIT)
            ended.set()

        issuer.issue([load], StreamFence(HOST), size, alone=True)
        states.append(ended.is_set())
        over.set()
        issuer.join()
        assert ended.is_set()
    assert states == [at_first, at_first, False, False]


def test_an_error_of_the_thread_is_raised_in_the_step() -> None:
    """The words are raised all the same."""
    words = Words()
    issuer = Issuer(words, at_first=False)

    def load() -> None:
        raise ZeroDivisionError

    issuer.issue([load], StreamFence(HOST), 1, alone=True)
    with pytest.raises(ZeroDivisionError):
        issuer.join()
    issuer.join()
    assert words.lacking == []
