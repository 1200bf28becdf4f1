# SPDX-License-Identifier: Apache-2.0
"""A model's step that waits for layers by words, as a full CUDA graph does, and whose owner of rows
is killed meanwhile: the step ends, and the rows that did not come are reported.

On a GPU the step is the replay of a graph. Elsewhere a thread makes the same waits.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from support.mark_cases import TOKENS, UNTOUCHED
from support.migrate_pulls import Rows, Sides, sides
from support.store_server_processes import (
    LAYERS,
    Rank,
    Worker,
    image_bytes,
    keys_of,
    nursery,
    prompt,
    rows_of,
)
from support.waits import LIMIT, until

from portakv.copy.layer_words import LayerWords
from portakv.errors import PeerError, PortaKVError
from portakv.migrate import Reader
from portakv.runtime import late_release
from portakv.runtime.transfer import Transfer
from portakv.serving import GroupCache, Job, Plan, WorkerSide
from portakv.serving.plan import Report
from portakv.serving.server import client
from portakv.serving.worker import Ended

pytestmark = pytest.mark.xdist_group("keeper")
GUARD = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
INTO = [6, 1, 4]
BLOCKS = 3


# --- steps of a model


class Step(Protocol):
    """A step that waits for each layer and then copies it to ``seen``."""

    seen: list[torch.Tensor]

    def begin(self) -> None:
        """Begin the step; it runs alongside the caller."""

    def ended(self) -> bool:
        """Return whether the step has ended."""


class ThreadStep:
    """A step in a thread, which calls nothing but the waits."""

    def __init__(self, words: LayerWords, layers: list[torch.Tensor]) -> None:
        self.seen = [torch.empty(0, device="cpu")] * LAYERS
        self._words = words
        self._layers = layers
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """See `Step`."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number, layer in enumerate(self._layers):
            self._words.wait(number)
            self.seen[number] = layer.cpu().clone()

    def ended(self) -> bool:
        """See `Step`."""
        return not self._thread.is_alive()


class GraphStep:
    """A step that is the replay of a CUDA graph."""

    def __init__(self, words: LayerWords, layers: list[torch.Tensor]) -> None:
        self.seen = [torch.empty_like(layer) for layer in layers]
        self._end: torch.cuda.Event = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(layers[0].device)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            for number, layer in enumerate(layers):
                words.wait(number)
                self.seen[number].copy_(layer)

    def begin(self) -> None:
        """See `Step`."""
        self._graph.replay()
        self._end.record()

    def ended(self) -> bool:
        """See `Step`."""
        ended: bool = self._end.query()
        return ended


# --- words


class ByHost(LayerWords):
    """Words of a device without such kernels: the host waits for copies, and then writes."""

    def __init__(self, device: torch.device, layers: int, limit: float) -> None:
        super().__init__(torch.device("cpu"), layers, limit)
        self._device = device

    def _write(self, layer: int) -> None:
        for end in self._ordered[layer]:
            if isinstance(end, Transfer):
                end.synchronize(LIMIT)
            else:
                end.wait()
        self._words.write(layer, 1, self._number, None)


def believing(base: type[LayerWords]) -> type[LayerWords]:
    """Return words that take an error for no end: the negative control of owners of offers."""

    class Believing(base):  # type: ignore[misc, valid-type]
        over = False  # the thread that looks at ends may end

        def _is_done(self, end: Transfer) -> bool:
            try:
                return end.done()
            except PortaKVError:
                return self.over

    return Believing


def forgetful(base: type[LayerWords]) -> type[LayerWords]:
    """Return words that are not raised once ``forgets`` is set: the negative control of servers."""

    class Forgetful(base):  # type: ignore[misc, valid-type]
        forgets = False

        def commit(self) -> None:
            if not self.forgets:
                super().commit()

    return Forgetful


class Model:
    """A model with words, and its steps."""

    def __init__(
        self,
        device: torch.device,
        layers: list[torch.Tensor],
        control: Callable[[type[LayerWords]], type[LayerWords]] | None = None,
        limit: float = 2 * LIMIT,
    ) -> None:
        gc.collect()  # what other tests left may wait for the device when it is freed
        base = LayerWords if device.type in ("cpu", "cuda") else ByHost
        kind = base if control is None else control(base)
        self.words: Any = kind(device, LAYERS, limit)
        made = GraphStep if device.type == "cuda" else ThreadStep
        self.step: Step = made(self.words, layers)

    def finish(self) -> None:
        """Wait until the step has ended."""
        assert until(self.step.ended, LIMIT)


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- an offer whose owner is killed

OWNER = """
from support.mark_cases import *
both = Writing(Sides(), method)
both.write("layers", 0, LAYERS)
whole = both.offer()
part = both.offer(progress="layers")
part.raise_to(1)
tell([whole.ticket, part.ticket])
"""


@pytest.fixture
def made(device: torch.device) -> Iterator[Sides]:
    nursery()  # its pipes are no leak of a test
    with sides([str(device)]) as those:
        yield those


def warm_up(reader: Reader, method: str) -> None:
    """Pull a layer of an owner that is killed."""
    pid, (_, part) = nursery().born(OWNER, method=method)
    pull = reader.pull(part, INTO, by_layer=True, timeout=LIMIT)
    pull.layers[0].synchronize(LIMIT)
    nursery().end(pid)
    assert until(lambda: pull.ended, LIMIT)


@GUARD
@pytest.mark.parametrize("method", ["mapped", "staging"])
def test_the_owner_of_an_offer(made: Sides, device: torch.device, method: str, guard: bool) -> None:
    """It has completed one layer of two. Without the guard the step ends when words are closed."""
    rows = torch.full((2, 2, 8, 32, 4, 8), UNTOUCHED, dtype=torch.int16, device=device)
    reader = made.reader(Rows.shard_of(rows))
    model = Model(device, [*rows], None if guard else believing)
    expected = Rows().rows([7, 3, 11, 0, 5], TOKENS)

    def pulled(ticket: bytes) -> Any:
        model.words.begin()
        pull = reader.pull(ticket, INTO, by_layer=True, timeout=LIMIT)
        model.words.follow(pull.layers)
        model.words.commit()
        return pull

    def owner() -> tuple[int, bytes]:
        """Return a process that owns rows, and a ticket with a layer; this one has all of it."""
        pid, (whole, part) = nursery().born(OWNER, method=method)
        pulled(whole).synchronize(LIMIT)
        return pid, part

    def seen(layer: int) -> torch.Tensor:
        blocks = model.step.seen[layer].cpu()[:, torch.tensor(INTO, device="cpu")]
        return blocks.flatten(1, 2)[:, :TOKENS]

    if device.type == "cuda":  # builds what copies need, for which a driver may wait
        warm_up(reader, method)
    pid, ticket = owner()
    model.step.begin()
    model.finish()
    assert all(torch.equal(seen(layer), expected[layer]) for layer in range(LAYERS))

    rows.fill_(UNTOUCHED)
    pull = pulled(ticket)
    model.step.begin()
    pull.layers[0].synchronize(LIMIT)
    assert not model.step.ended()
    nursery().end(pid)
    if guard:
        model.finish()
        assert not model.words.expired
    assert until(lambda: pull.ended, LIMIT)
    with pytest.raises(PeerError):
        pull.synchronize(LIMIT)
    if not guard:
        assert not model.step.ended()
        model.words.close()
        model.finish()
        assert model.words.expired
        model.words.over = True
    assert torch.equal(seen(0), expected[0])
    assert bool((seen(1) == UNTOUCHED).all())


# --- an owner that is killed while the step waits for another one

SERVING = """
from support.mark_cases import *
both = Writing(Sides(), device=device)
both.write("layers", 0, LAYERS)
whole = both.offer()
part = both.offer(progress="layers")
part.raise_to(1)
answer = [whole.ticket, part.ticket]
"""


@GUARD
def test_another_owner(
    made: Sides,
    processes: ExitStack,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    guard: bool,
) -> None:
    """Its memory is unmapped after the step. Without the guard that waits for the step, which then
    ends by its limit, since no thread of the process runs meanwhile."""
    if device.type != "cuda" and not guard:
        pytest.skip("only CUDA waits for a device when it unmaps memory")
    if not guard:
        monkeypatch.setattr(late_release, "is_held", lambda: False)
    rows = torch.full((2, 2, 8, 32, 4, 8), UNTOUCHED, dtype=torch.int16, device=device)
    reader = made.reader(Rows.shard_of(rows))
    model = Model(device, [*rows], limit=LIMIT if guard else 5.0)
    workers = [processes.enter_context(Worker(nursery())) for _ in range(2)]
    where = str(device) if device.type == "cuda" else "cpu"
    tickets = [worker.do(SERVING, device=where) for worker in workers]
    for whole, part in tickets:  # connects, and builds what copies need
        pull = reader.pull(whole, INTO, timeout=LIMIT)
        pull.synchronize()
        pull = reader.pull(part, INTO, by_layer=True, timeout=LIMIT)
        pull.layers[0].synchronize(LIMIT)
        pull.cancel()
        assert until(lambda pull=pull: pull.ended, LIMIT)
    assert until(lambda: not reader.statistics()["pulls"], LIMIT)
    del pull

    rows.fill_(UNTOUCHED)
    model.words.begin()
    pull = reader.pull(tickets[1][1], INTO, by_layer=True, timeout=LIMIT)
    model.words.follow(pull.layers)
    model.words.commit()
    model.step.begin()
    pull.layers[0].synchronize(LIMIT)
    workers[0].kill()
    assert until(lambda: reader.statistics()["owners"] == 1, LIMIT)
    gc.collect()
    workers[1].do("part.raise_to(2)")
    model.finish()
    model.words.end_waits()
    assert model.words.expired == (not guard)
    pull.synchronize(LIMIT)
    model.words.close()


# --- a server that is killed

_STORE_SERVER = """
from portakv.serving.server.server import StoreServer
from portakv.serving.local import StoreTerms
store_server = StoreServer(StoreTerms(folder=folder, **terms))
"""


def store_server(processes: ExitStack, folder: str) -> Worker:
    """Return a process with a server."""
    made = processes.enter_context(Worker(nursery()))
    size = image_bytes()
    terms = {"staging": 16 * size, "host": 16 * size, "capacity": 64 << 20}
    made.do(_STORE_SERVER, folder=folder, terms=terms)
    return made


def reported(worker_side: WorkerSide) -> tuple[Report, Ended]:
    """Return what the scheduler and the engine hear of a step."""
    worker_side.save(Plan())
    return worker_side.report(), worker_side.ended()


@GUARD
def test_the_store_server_of_a_load(
    processes: ExitStack,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guard: bool,
) -> None:
    """It is stopped when the step begins, and then killed. Without the guard the step ends when
    words are closed. In any case all blocks are reported as failed."""
    monkeypatch.setattr(client, "ASKING", LIMIT)
    folder = str(tmp_path / "store")
    owner = store_server(processes, folder)
    rank = Rank(folder, device=device)
    processes.callback(rank.client.close)
    assert rank.client.wait(LIMIT)
    tokens = prompt(1, BLOCKS)
    assert rank.saved(tokens) == [True] * BLOCKS

    layers = rank.caches
    model = Model(device, layers, None if guard else forgetful)
    worker_side = WorkerSide(
        [GroupCache(rank.view, rank.blocks)], LIMIT, by_layer=True, words=model.words
    )
    ids = tuple(range(BLOCKS))
    plans = [
        Plan(loads=[Job(number, "a", tuple(keys_of(tokens)), 0, None, (ids,))]) for number in (1, 2)
    ]

    worker_side.load(plans[0])
    model.step.begin()
    model.finish()
    assert reported(worker_side)[0].missing == {1: frozenset()}
    right = rows_of(tokens, rank.size, rank.heads)
    for number, layer in enumerate(model.step.seen):
        assert torch.equal(layer[:BLOCKS].cpu(), torch.from_numpy(right[number]))

    for layer in layers:
        layer.fill_(UNTOUCHED)
    owner.stop()
    model.words.forgets = not guard
    worker_side.load(plans[1])
    model.step.begin()
    assert not model.step.ended()
    owner.kill()
    if guard:
        model.finish()
        assert not model.words.expired
    else:
        worker_side.stop(Plan(stop=[9]))  # the load was issued, and has ended
        assert not model.step.ended()
        model.words.close()
        model.finish()
        assert model.words.expired
    report, ended = reported(worker_side)
    assert report.missing == {2: frozenset(ids)}
    assert ended.failed == [{*ids}]
    for layer in model.step.seen:
        assert bool((layer[:BLOCKS] == UNTOUCHED).all())
